"""CLIP in Flax Linen: both towers together, or the image or text tower alone, with Hugging Face's parameter names.

Parameter paths are the names on disk with ``/`` for ``.``. Of a tower alone they have no prefix, whether the file has one
(with a projection, and all that transformers 4 wrote) or not (transformers 5 without a projection)::

    text:   embeddings/{token_embedding,position_embedding}/embedding     final_layer_norm/{scale,bias}
    vision: embeddings/{class_embedding, patch_embedding/kernel, position_embedding/embedding}
            pre_layrnorm/{scale,bias}                                     post_layernorm/{scale,bias}
    both:   encoder/layers/N/{layer_norm1,layer_norm2}/{scale,bias}
            encoder/layers/N/self_attn/{q_proj,k_proj,v_proj,out_proj}/{kernel,bias}
            encoder/layers/N/mlp/{fc1,fc2}/{kernel,bias}
    text_projection/kernel     visual_projection/kernel
    together: text_model/..., vision_model/..., and logit_scale [], whose exponential is the factor of the cosines

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layers`` has a leading axis of layers. Taps: see
``vision``.

Reference: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import patches, vision
from pefusion_jax.backbones.clip_configs import ClipConfig, ClipTextConfig, ClipVisionConfig
from pefusion_jax.backbones.layers import LayerNorm

__all__ = [
    "Clip",
    "ClipConfig",
    "ClipOutput",
    "ClipText",
    "ClipTextConfig",
    "ClipTextOutput",
    "ClipVision",
    "ClipVisionConfig",
    "ClipVisionOutput",
]


class ClipTextOutput(NamedTuple):
    """What a :class:`ClipText` returns; what does not apply is None.

    ``last_hidden_state [batch, seq, d]`` after the final norm; ``pooler_output [batch, d]``: its end-of-text token;
    ``hidden_states``: the embeddings and every block's output, before that norm; ``text_embeds [batch, projection]``.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    text_embeds: jax.Array | None = None


class ClipVisionOutput(NamedTuple):
    """What a :class:`ClipVision` returns; what does not apply is None.

    ``last_hidden_state [batch, 1 + patches, d]`` without the final norm; ``pooler_output [batch, d]``: its class token with
    it; ``hidden_states``: the normed embeddings and every block's output; ``image_embeds [batch, projection]``.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    image_embeds: jax.Array | None = None


class ClipOutput(NamedTuple):
    """What a :class:`Clip` returns; what does not apply is None, such as everything of a tower that got no input.

    ``image_embeds [images, projection]`` and ``text_embeds [texts, projection]`` of length 1, ``logits_per_image [images,
    texts]`` and its transpose ``logits_per_text``, all float32: in bfloat16 the logits, up to 100, would be rounded to
    quarters. ``vision_model_output`` and ``text_model_output`` are the towers' own, before the projections.
    """

    image_embeds: jax.Array | None = None
    text_embeds: jax.Array | None = None
    logits_per_image: jax.Array | None = None
    logits_per_text: jax.Array | None = None
    vision_model_output: ClipVisionOutput | None = None
    text_model_output: ClipTextOutput | None = None


def _encoder(module: Any, deterministic: bool, keep: bool) -> vision.Encoder:
    return vision.Encoder(
        module.config.stack,
        module.dtype,
        deterministic,
        node="layers",
        keep=keep,
        scan_layers=module.scan_layers,
        remat=module.remat,
        name="encoder",
    )


def _projection(module: Any, name: str, size: int) -> nn.Dense:
    return nn.Dense(size, use_bias=False, dtype=module.dtype, name=name, kernel_init=vision.INIT)


def _norm(module: Any, name: str) -> LayerNorm:
    return LayerNorm(epsilon=module.config.layer_norm_eps, dtype=module.dtype, name=name)


class _TextEmbeddings(nn.Module):
    config: ClipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=vision.INIT, name=name)

        x = table(self.config.vocab_size, "token_embedding")(ids)
        return x + table(self.config.max_position_embeddings, "position_embedding")(positions)


class ClipText(nn.Module):
    """CLIP's text tower: a pre-norm transformer with causal attention, read at the end-of-text token.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: ClipTextConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | Mapping[str, jax.Array],
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> ClipTextOutput:
        """Runs the text tower.

        Args:
          input_ids: token ids ``[batch, seq]``, or a mapping with the names of the array arguments. Where the configuration
            has ``eos_token_id=2``, as all did at first, the end of text is the highest id of a row; else the first token of
            that id.
          attention_mask: ``[batch, seq]``, non-zero = keep; all by default.
          position_ids: ``[batch, seq]`` or ``[1, seq]``; 0, 1, 2, ... by default.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return the embeddings and every block's output.

        Raises:
          ValueError: if a shape is wrong or the sequence is longer than the position table.
        """
        others = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = patches.arrays_of("ClipText", "input_ids", input_ids, others)
        ids, keep, positions = given["input_ids"], given["attention_mask"], given["position_ids"]
        self._check(ids, keep, positions)
        length = ids.shape[1]
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None, :]
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        if keep is not None:
            mask = mask & keep.astype(bool)[:, None, :]
        first = _TextEmbeddings(self.config, self.dtype, name="embeddings")(ids, positions)
        last, kept = _encoder(self, deterministic, output_hidden_states)(first, mask)
        last = _norm(self, "final_layer_norm")(last)
        eos = self.config.eos_token_id
        end = jnp.argmax(ids if eos == 2 else ids == eos, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        size = self.config.projection_dim if self.config.projection else None
        return ClipTextOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=None if kept is None else (first, *kept),
            text_embeds=None if size is None else _projection(self, "text_projection", size)(pooled),
        )

    def _check(self, ids: jax.Array, mask: jax.Array | None, positions: jax.Array | None) -> None:
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ClipText: input_ids must be integers [batch, seq], not {ids.dtype} of shape {ids.shape}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"ClipText: the sequence has {ids.shape[1]} tokens, the model at most "
                f"{self.config.max_position_embeddings}: truncate when tokenizing"
            )
        for name, array, allowed in (
            ("attention_mask", mask, (ids.shape,)),
            ("position_ids", positions, (ids.shape, (1, ids.shape[1]))),
        ):
            if array is not None and array.shape not in allowed:
                raise ValueError(f"ClipText: {name} has shape {array.shape}, input_ids has {ids.shape}")


class _VisionEmbeddings(nn.Module):
    config: ClipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array, grid: tuple[int, int]) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        x = patches.project_patches(pixels, width, config.patch_size, self.dtype, False, "patch_embedding")
        token = self.param("class_embedding", vision.INIT, (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token[None, None, :], (x.shape[0], 1, width)), x], axis=1)
        old = patches.grid_of(config)
        count = 1 + old[0] * old[1]
        table = nn.Embed(count, width, dtype=self.dtype, embedding_init=vision.INIT, name="position_embedding")
        positions = table(jnp.arange(count, dtype=jnp.int32))
        return x + patches.resize_positions(positions, 1, old, grid)[None]


class ClipVision(nn.Module):
    """CLIP's image tower: a pre-norm vision transformer, read at the class token. Attributes as in :class:`ClipText`."""

    config: ClipVisionConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array | Mapping[str, jax.Array],
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> ClipVisionOutput:
        """Runs the image tower.

        Args:
          pixel_values: images ``[batch, channels, height, width]`` as in Hugging Face, or a mapping with that name. They are
            transposed inside: Flax's convolution wants the channels last.
          interpolate_pos_encoding: take images of any size and resize the positions to their grid, bicubically in float32.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return the embeddings and every block's output.

        Raises:
          ValueError: if shape, dtype or size of the images are wrong.
        """
        pixels = patches.arrays_of("ClipVision", "pixel_values", pixel_values, {})["pixel_values"]
        remedy = "resize them, or pass interpolate_pos_encoding=True"
        grid = patches.check_pixels("ClipVision", pixels, self.config, interpolate_pos_encoding, remedy)
        first = _norm(self, "pre_layrnorm")(_VisionEmbeddings(self.config, self.dtype, name="embeddings")(pixels, grid))
        last, kept = _encoder(self, deterministic, output_hidden_states)(first)
        pooled = _norm(self, "post_layernorm")(last[:, 0])
        size = self.config.projection_dim if self.config.projection else None
        return ClipVisionOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=None if kept is None else (first, *kept),
            image_embeds=None if size is None else _projection(self, "visual_projection", size)(pooled),
        )


class Clip(nn.Module):
    r"""Both towers of CLIP: :math:`z_{ij} = e^{s} \cos(W_v f(\mathrm{image}_i), W_t g(\mathrm{text}_j))`.

    Attributes as in :class:`ClipText`.
    """

    config: ClipConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | Mapping[str, jax.Array] | None = None,
        pixel_values: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> ClipOutput:
        """Runs the towers that get an input; logits need both. Arguments as in the towers.

        Raises:
          ValueError: if there is no input at all, or one that a tower refuses.
        """
        others = {"pixel_values": pixel_values, "attention_mask": attention_mask, "position_ids": position_ids}
        given = patches.arrays_of("Clip", "input_ids", input_ids, others, required=False)
        pixels, text = given.pop("pixel_values"), given
        if pixels is None and text["input_ids"] is None:
            raise ValueError("Clip needs pixel_values, input_ids or both")
        settings: dict[str, Any] = {"dtype": self.dtype, "scan_layers": self.scan_layers, "remat": self.remat}
        flags: dict[str, Any] = {"deterministic": deterministic, "output_hidden_states": output_hidden_states}
        seen = read = image_embeds = text_embeds = logits = None
        # All parameters exist whichever input there is.
        initializing = self.is_initializing()
        if pixels is None and initializing:
            pixels = jnp.zeros((1, self.config.vision.num_channels, *self.config.vision.image_size), jnp.float32)
        if text["input_ids"] is None and initializing:
            text = {"input_ids": jnp.zeros((1, 1), jnp.int32)}
        if pixels is not None:
            tower = ClipVision(self.config.vision, **settings, name="vision_model")
            seen = tower(pixels, interpolate_pos_encoding=interpolate_pos_encoding, **flags)
            image_embeds = _unit(_projection(self, "visual_projection", self.config.projection_dim)(seen.pooler_output))
        if text["input_ids"] is not None:
            read = ClipText(self.config.text, **settings, name="text_model")(**text, **flags)
            text_embeds = _unit(_projection(self, "text_projection", self.config.projection_dim)(read.pooler_output))
        scale = self.param("logit_scale", nn.initializers.constant(self.config.logit_scale_init_value), (), jnp.float32)
        if image_embeds is not None and text_embeds is not None:
            logits = jnp.exp(scale.astype(jnp.float32)) * (text_embeds @ image_embeds.T)
        return ClipOutput(image_embeds, text_embeds, None if logits is None else logits.T, logits, seen, read)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
