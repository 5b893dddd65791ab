"""T5 (v1.0, v1.1, Flan) in Flax Linen, with Hugging Face's parameter names: encoder, or encoder and decoder.

Parameter paths are Hugging Face's names with ``/`` for ``.``, but for the bias table, which stands outside of the blocks::

    shared/embedding
    {encoder,decoder}/relative_attention_bias/embedding     (in files: block.0.layer.0.SelfAttention.relative_...)
    {encoder,decoder}/block/N/layer/0/{SelfAttention/{q,k,v,o}/kernel, layer_norm/scale}
    decoder/block/N/layer/1/{EncDecAttention/{q,k,v,o}/kernel, layer_norm/scale}
    {encoder,decoder}/block/N/layer/{1,2}/{DenseReluDense/{wi | wi_0, wi_1, wo}/kernel, layer_norm/scale}
    {encoder,decoder}/final_layer_norm/scale
    lm_head/kernel                                          (only where it is not tied to the embeddings)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``block`` has a leading axis of layers.

Taps (:class:`Tap`) of a block, each ``[batch, seq, d_model]`` unless said otherwise::

    layer/{0/SelfAttention,1/EncDecAttention}/tap_{query,key,value}    after the projections, [batch, seq, heads * d_kv]; key
                                             and value may get positions put in front, which every query then attends to
    layer/{0/SelfAttention,1/EncDecAttention}/tap_context              attention's output, before the output projection
    layer/{1,2}/DenseReluDense/tap_hidden    after activation and gate, [batch, seq, d_ff]
    layer/{1,2}/DenseReluDense/tap_output    the feed-forward output, before the residual sum; source: the normed input
    tap_block                                the block's output

Reference: Raffel, Shazeer, Roberts, Lee, Narang, Matena, Zhou, Li, Liu, "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer", 2020. Float16 overflows in pretrained T5 models (transformers clamps it): use bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.t5_blocks import Hidden, Stack
from pefusion_jax.backbones.t5_config import T5Config, copies, name_table

__all__ = ["FAMILY", "T5", "T5Config", "T5Output", "name_table", "shift_right"]


class T5Output(NamedTuple):
    """What a :class:`T5` returns; what does not apply is None.

    ``last_hidden_state [batch, seq, d_model]``: the decoder's, or the encoder's of an encoder alone; ``hidden_states``: the
    embeddings and every block's output of the same stack, the last one normed; ``logits [batch, seq, vocab]``;
    ``encoder_last_hidden_state [batch, source, d_model]`` and ``encoder_hidden_states``; ``cache``: see ``T5.init_cache``.
    """

    last_hidden_state: jax.Array
    hidden_states: Hidden = None
    logits: jax.Array | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: Hidden = None
    cache: dict[str, jax.Array] | None = None


class T5(nn.Module):
    """T5, pre-norm: ``x += Attention(RMS(x)); [x += Attention(RMS(x), encoder)]; x += FeedForward(RMS(x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block a stack, scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: T5Config
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | Mapping[str, jax.Array] | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        encoder_outputs: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> T5Output:
        """Runs the encoder and, if the model has one, the decoder.

        Args:
          input_ids: token ids ``[batch, source]``, or a mapping with the names of the array arguments.
          attention_mask: ``[batch, source]``, non-zero = keep; all by default.
          decoder_input_ids: ``[batch, seq]``; see :func:`shift_right`.
          decoder_attention_mask: ``[batch, seq]``, non-zero = keep, besides the causal mask; all by default. With a cache
            it is over the cache's positions, ``[batch, length]``.
          encoder_outputs: ``[batch, source, d_model]`` in place of ``input_ids``: skips the encoder.
          cache: from :meth:`init_cache` or the last call; ``decoder_input_ids`` are the tokens that follow. The encoder's
            keys and values are computed and stored if ``input_ids`` or ``encoder_outputs`` are given, which the first call
            needs; without them those that are stored are used, which is faster.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return every block's output.

        Raises:
          ValueError: if an array is missing, superfluous or has a wrong shape.
        """
        arrays: tuple[Any, ...] = (attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs)
        if isinstance(input_ids, Mapping):
            allowed = ("attention_mask", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs")
            unknown = set(input_ids) - {"input_ids", *allowed}
            if unknown:
                raise ValueError(f"T5 takes a mapping of input_ids, {', '.join(allowed)}, not {sorted(map(str, unknown))}")
            twice = [name for name, array in zip(allowed, arrays, strict=True) if array is not None and name in input_ids]
            if twice:
                raise ValueError(f"T5 got {', '.join(twice)} twice: in the mapping and as an argument")
            given = input_ids
            arrays = tuple(given.get(name, array) for name, array in zip(allowed, arrays, strict=True))
            input_ids = given.get("input_ids")
        ids, mask, target, target_mask, source = (None if a is None else jnp.asarray(a) for a in (input_ids, *arrays))
        self._check(ids, mask, target, target_mask, source, cache)
        mask, target_mask = (None if m is None else m.astype(bool) for m in (mask, target_mask))

        config = self.config
        init = nn.initializers.normal(1.0)
        shared = nn.Embed(config.vocab_size, config.d_model, dtype=self.dtype, embedding_init=init, name="shared")
        how: dict[str, Any] = {
            "config": config,
            "dtype": self.dtype,
            "deterministic": deterministic,
            "keep": output_hidden_states,
            "scan_layers": self.scan_layers,
            "remat": self.remat,
        }
        encoder_hidden: Hidden = None
        if ids is not None:
            source, encoder_hidden, _ = Stack(**how, decoder=False, name="encoder")(shared(ids), mask)
        elif source is not None:
            source = source.astype(self.dtype)
        if target is None:
            return T5Output(last_hidden_state=source, hidden_states=encoder_hidden)  # type: ignore[arg-type]  # checked

        decoder = Stack(**how, decoder=True, name="decoder")
        if cache is None:
            last, hidden, _ = decoder(shared(target), target_mask, source, mask)
            after = None
        else:
            before = {name: array for name, array in cache.items() if name != "index"}
            last, hidden, store = decoder(shared(target), target_mask, source, mask, before, cache["index"])
            after = {**(store or {}), "index": cache["index"] + jnp.int32(target.shape[1])}
        return T5Output(
            last_hidden_state=last,
            hidden_states=hidden,
            logits=self._head(last, shared) if config.lm_head else None,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_hidden,
            cache=after,
        )

    def _head(self, x: jax.Array, shared: nn.Embed) -> jax.Array:
        if self.config.scale_decoder_outputs:
            x = x * jnp.asarray(self.config.d_model**-0.5, x.dtype)
        if self.config.tied:
            return shared.attend(x)
        init = nn.initializers.normal(1.0)
        head = nn.Dense(self.config.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init, name="lm_head")
        return head(x)

    @nn.nowrap
    def init_cache(self, batch: int, length: int, encoder_length: int) -> dict[str, jax.Array]:
        """An empty cache for decoding: keys and values of all layers, and how many positions are filled.

        Args:
          batch: rows.
          length: the most tokens that will be decoded. A call beyond it is not noticed: it overwrites the last positions.
          encoder_length: tokens of the encoder's input.

        Returns:
          ``{"key", "value": [layers, batch, heads, length, d_kv], "cross_key", "cross_value": [layers, batch, heads,
          encoder_length, d_kv], "index": int32}``.

        Raises:
          ValueError: if the model has no decoder.
        """
        if not self.config.decoder:
            raise ValueError("T5: an encoder alone has no cache")
        lead = (self.config.decoder_layers, batch, self.config.num_heads)
        lengths = {"key": length, "value": length, "cross_key": encoder_length, "cross_value": encoder_length}
        empty = {name: jnp.zeros((*lead, size, self.config.d_kv), self.dtype) for name, size in lengths.items()}
        return {**empty, "index": jnp.int32(0)}

    def _check(self, ids: Any, mask: Any, target: Any, target_mask: Any, source: Any, cache: Any) -> None:
        """Raises a ValueError that names the first array that is missing, superfluous or of a wrong shape."""
        for name, array, axes in (
            ("input_ids", ids, "[batch, source]"),
            ("decoder_input_ids", target, "[batch, seq]"),
            ("encoder_outputs", source, "[batch, source, d_model]"),
        ):
            if array is not None and (array.ndim != axes.count(",") + 1 or 0 in array.shape):
                raise ValueError(f"T5: {name} must be {axes}, not of shape {array.shape}")
        if not self.config.decoder:
            given = {"decoder_input_ids": target, "decoder_attention_mask": target_mask, "encoder_outputs": source}
            extra = [name for name, array in {**given, "cache": cache}.items() if array is not None]
            if extra or ids is None:
                raise ValueError(f"T5: an encoder alone takes input_ids and attention_mask, got also {', '.join(extra)}")
        elif target is None:
            raise ValueError("T5: decoder_input_ids is missing: make them of the labels with shift_right(labels, 0, 0)")
        if ids is not None and source is not None:
            raise ValueError("T5 takes either input_ids or encoder_outputs, not both")
        if ids is None and source is None and cache is None:
            raise ValueError("T5: input_ids is missing (or encoder_outputs, or a cache that has seen them)")
        if source is not None and source.shape[2] != self.config.d_model:
            raise ValueError(f"T5: encoder_outputs has width {source.shape[2]} instead of d_model={self.config.d_model}")
        known = ids if ids is not None else source
        batch = target.shape[0] if target is not None else ids.shape[0]
        if known is not None and known.shape[0] != batch:
            raise ValueError(f"T5: the encoder has {known.shape[0]} rows, the decoder {batch}")
        if known is not None and mask is not None and mask.shape != known.shape[:2]:
            raise ValueError(f"T5: attention_mask has shape {mask.shape} instead of {known.shape[:2]}")
        length = None if target is None else target.shape[1]
        if cache is not None:
            length, stored = cache["key"].shape[3], cache["cross_key"].shape[3]
            if known is None and mask is not None and (mask.shape[0] != batch or mask.shape[1] > stored):
                raise ValueError(f"T5: attention_mask has shape {mask.shape}, the cache is of {batch} rows of {stored} tokens")
            if cache["key"].shape[1] != batch or target.shape[1] > length:
                raise ValueError(
                    f"T5: the cache is for {cache['key'].shape[1]} rows of {length} tokens, decoder_input_ids has the shape "
                    f"{target.shape}"
                )
        if target_mask is not None and target_mask.shape != (batch, length):
            raise ValueError(f"T5: decoder_attention_mask has shape {target_mask.shape} instead of {(batch, length)}")


def shift_right(labels: jax.Array, decoder_start_token_id: int = 0, pad_token_id: int = 0) -> jax.Array:
    """Decoder inputs for labels ``[batch, seq]``: the start token, then the labels without the last; ``-100`` becomes pad."""
    labels = jnp.asarray(labels)
    shifted = jnp.roll(labels, 1, axis=1).at[:, 0].set(decoder_start_token_id)
    return jnp.where(shifted == -100, jnp.asarray(pad_token_id, shifted.dtype), shifted)


FAMILY = Family(
    name="T5",
    model_types=("t5",),
    architectures=("T5Model", "T5EncoderModel", "T5ForConditionalGeneration", "T5WithLMHeadModel"),
    read_config=T5Config.from_dict,
    write_config=T5Config.to_dict,
    build=T5,
    table=name_table,
    heads=("lm_head.",),
    # A table that the first T5 files hold and nothing reads.
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    copies=copies,
)
