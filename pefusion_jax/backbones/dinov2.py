"""DINOv2 in Flax Linen, with and without registers, with the parameter names of Hugging Face's files.

Parameter paths are the names on disk with ``/`` for ``.``, without the prefix ``dinov2.`` or ``dinov2_with_registers.`` of
headed models; the fused SwiGLU tensor is split as in the memory of transformers 5 (see ``Family.modules`` for what else is
called differently there)::

    embeddings/{cls_token, mask_token, register_tokens, position_embeddings}
    embeddings/patch_embeddings/projection/{kernel,bias}
    encoder/layer/N/{norm1,norm2}/{scale,bias}     encoder/layer/N/{layer_scale1,layer_scale2}/lambda1
    encoder/layer/N/attention/{attention/{query,key,value},output/dense}/{kernel,bias}
    encoder/layer/N/mlp/{fc1,fc2}/{kernel,bias}
    encoder/layer/N/mlp/{gate_proj,up_proj,down_proj}/{kernel,bias}           (SwiGLU; on disk weights_in, weights_out)
    layernorm/{scale,bias}     classifier/{kernel,bias}

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layer`` has a leading axis of layers. Taps: see
``vision``.

References: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2024; Darcet et al., "Vision
Transformers Need Registers", 2024.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import configs, names, patches, vision
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import LayerNorm
from pefusion_jax.backbones.vit import ATTENTION_MODULES

__all__ = ["DINOV2", "DINOV2_REGISTERS", "Dinov2", "Dinov2Config", "Dinov2Output", "name_table"]

LAYOUT = vision.Layout(
    norms=("norm1", "norm2"), attention="attention", projections=("query", "key", "value"), nested=True, mlp=True
)
# What transformers' backbone wrapper reads.
_HARMLESS = {"apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names", *vision.LEGACY}
_REGISTERS = "dinov2_with_registers"
_ONLY = {"model_type": ("dinov2", _REGISTERS), **vision.ONLY}


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The shape of a DINOv2 model; names and defaults are Hugging Face's, except ``labels``.

    ``image_size`` and ``patch_size`` are ``(height, width)``; an integer means a square. ``num_register_tokens`` is None for a
    model without registers. ``labels`` is the number of classes of the classifier, None without one.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    image_size: Any = (224, 224)
    patch_size: Any = (14, 14)
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int | None = None
    labels: int | None = None

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")
        patches.set_pairs(self, "image_size", "patch_size")
        patches.grid_of(self)
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"Dinov2Config.drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")
        if self.num_register_tokens is not None and not self.use_mask_token:
            raise ValueError("Dinov2Config.use_mask_token=False is not implemented for a model with registers")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Dinov2Config:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file with arrays or descriptions, which decide on the classifier. Without
            them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"labels"}
        registers = raw.get("model_type") == _REGISTERS
        own -= {"use_mask_token"} if registers else {"num_register_tokens"}
        configs.refuse_unknown(raw, "DINOv2", own, _ONLY, _HARMLESS)
        if tensors is not None:
            labels = patches.rows_of(tensors, "classifier.weight")
        else:
            headed = "ForImageClassification" in str(raw.get("architectures"))
            labels = configs.num_labels(raw) if headed else None
        # The class with registers has defaults of its own.
        defaults = {"num_register_tokens": 4, "patch_size": 16} if registers else {}
        return cls(**defaults | {key: raw[key] for key in own if key in raw}, labels=labels)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        registers = self.num_register_tokens is not None
        left_out = {"labels", "use_mask_token" if registers else "num_register_tokens"}
        fields = {key: value for key, value in patches.plain_sizes(self).items() if key not in left_out}
        name = ("Dinov2WithRegisters" if registers else "Dinov2") + ("ForImageClassification" if self.labels else "Model")
        labels = {} if self.labels is None else {"num_labels": self.labels}
        return {"model_type": _REGISTERS if registers else "dinov2", "architectures": [name], **labels, **fields}

    @property
    def stack(self) -> vision.Stack:
        """The shape of the blocks."""
        hidden = self.hidden_size * self.mlp_ratio
        return vision.Stack(
            layout=LAYOUT,
            layers=self.num_hidden_layers,
            width=self.hidden_size,
            # SwiGLU has two thirds of the width, rounded up to a multiple of 8.
            hidden=(int(hidden * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else hidden,
            heads=self.num_attention_heads,
            act=self.hidden_act,
            eps=self.layer_norm_eps,
            bias=self.qkv_bias,
            swiglu=self.use_swiglu_ffn,
            layer_scale=self.layerscale_value,
            attention_dropout=self.attention_probs_dropout_prob,
            drop_path=self.drop_path_rate,
        )


class Dinov2Output(NamedTuple):
    """What a :class:`Dinov2` returns; what does not apply is None.

    ``last_hidden_state [batch, tokens, d]`` after the final norm: the class token, the registers, the patches row by row.
    ``pooler_output [batch, d]``: its class token. ``hidden_states``: the embeddings and every block's output, before that
    norm. ``logits [batch, labels]``, from the class token and the mean of the patches.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    logits: jax.Array | None = None


class _Embeddings(nn.Module):
    config: Dinov2Config
    dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, pixels: jax.Array, grid: tuple[int, int], masked: jax.Array | None) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        x = patches.PatchEmbeddings(width, config.patch_size, self.dtype, name="patch_embeddings")(pixels)
        if config.use_mask_token:
            token = self.param("mask_token", nn.initializers.zeros_init(), (1, width))
            if masked is not None:
                x = jnp.where(masked.astype(bool)[:, :, None], token.astype(self.dtype)[None], x)

        def in_front(token: jax.Array) -> jax.Array:
            return jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], *token.shape[1:]))

        old = patches.grid_of(config)
        x = jnp.concatenate([in_front(self.param("cls_token", vision.INIT, (1, 1, width))), x], axis=1)
        table = self.param("position_embeddings", vision.INIT, (1, 1 + old[0] * old[1], width))[0]
        registers = config.num_register_tokens
        # Registers have no position. Transformers resizes with antialiasing in the model with registers only.
        table = patches.resize_positions(table, 1, old, grid, antialias=registers is not None)
        x = x + table.astype(self.dtype)[None]
        if registers is not None:
            tokens = self.param("register_tokens", nn.initializers.zeros_init(), (1, registers, width))
            x = jnp.concatenate([x[:, :1], in_front(tokens), x[:, 1:]], axis=1)
        return nn.Dropout(config.hidden_dropout_prob, deterministic=self.deterministic)(x)


class Dinov2(nn.Module):
    """A DINOv2 encoder, pre-norm with layer scale: ``x = x + s1 * Attention(LN(x)); x = x + s2 * FFN(LN(x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: Dinov2Config
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array | Mapping[str, jax.Array],
        bool_masked_pos: jax.Array | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> Dinov2Output:
        """Runs the encoder.

        Args:
          pixel_values: images ``[batch, channels, height, width]`` of any size as in Hugging Face, or a mapping with the names
            of the array arguments. They are transposed inside. Positions are resized to their grid, bicubically in float32.
          bool_masked_pos: ``[batch, patches]``, non-zero where the mask token replaces a patch, as in pretraining.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return the embeddings and every block's output.

        Raises:
          ValueError: if a shape or dtype is wrong.
        """
        config = self.config
        given = patches.arrays_of("Dinov2", "pixel_values", pixel_values, {"bool_masked_pos": bool_masked_pos})
        pixels, masked = given["pixel_values"], given["bool_masked_pos"]
        grid = patches.check_pixels("Dinov2", pixels, config, True, "")
        if masked is not None and (masked.shape != (pixels.shape[0], grid[0] * grid[1]) or not config.use_mask_token):
            have = "has a" if config.use_mask_token else "has no"
            raise ValueError(
                f"Dinov2: bool_masked_pos has the shape {masked.shape} for {pixels.shape[0]} images of {grid[0]} x {grid[1]} "
                f"patches; the model {have} mask token"
            )
        first = _Embeddings(config, self.dtype, deterministic, name="embeddings")(pixels, grid, masked)
        last, kept = vision.Encoder(
            config.stack,
            self.dtype,
            deterministic,
            node="layer",
            keep=output_hidden_states,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="encoder",
        )(first)
        last = LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="layernorm")(last)
        logits = None
        if config.labels is not None:
            after = 1 + (config.num_register_tokens or 0)
            features = jnp.concatenate([last[:, 0], jnp.mean(last[:, after:], axis=1)], axis=-1)
            logits = nn.Dense(config.labels, dtype=self.dtype, name="classifier", kernel_init=vision.INIT)(features)
        return Dinov2Output(last, last[:, 0], None if kept is None else (first, *kept), logits)


def name_table(config: Dinov2Config) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    width, (rows, columns) = config.hidden_size, patches.grid_of(config)
    at = "embeddings/patch_embeddings/projection"
    table = names.conv(at, at.replace("/", "."), config.num_channels, width, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "position_embeddings": (1, 1 + rows * columns, width)}
    if config.use_mask_token:
        shapes["mask_token"] = (1, width)
    if config.num_register_tokens is not None:
        shapes["register_tokens"] = (1, config.num_register_tokens, width)
    table |= {f"embeddings/{name}": names.Entry(f"embeddings.{name}", shape) for name, shape in shapes.items()}
    table |= vision.stack_table(config.stack, "encoder.layer")
    table |= names.norm("layernorm", "layernorm", width)
    if config.labels is not None:
        table |= names.linear("classifier", "classifier", 2 * width, config.labels)
    return table


DINOV2 = Family(
    name="DINOv2",
    model_types=("dinov2",),
    architectures=("Dinov2Model", "Dinov2ForImageClassification"),
    read_config=Dinov2Config.from_dict,
    write_config=Dinov2Config.to_dict,
    build=Dinov2,
    table=name_table,
    prefix="dinov2.",
    heads=("classifier.",),
    # The stack stays encoder.layer; gate_proj, up_proj and down_proj are called so already.
    modules=ATTENTION_MODULES,
)
DINOV2_REGISTERS = DINOV2._replace(
    name="DINOv2 with registers",
    model_types=(_REGISTERS,),
    architectures=("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    prefix="dinov2_with_registers.",
)
