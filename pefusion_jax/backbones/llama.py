"""Llama-style decoders (Llama, SmolLM2, Qwen2) in Flax Linen, with Hugging Face's parameter names.

Parameter paths are Hugging Face's names with ``/`` for ``.``, without the prefix ``model.`` of headed models::

    embed_tokens/embedding
    layers/N/self_attn/{q_proj,k_proj,v_proj,o_proj}/kernel      (bias: Qwen2 on q, k and v; Llama with attention_bias)
    layers/N/mlp/{gate_proj,up_proj,down_proj}/kernel            (bias: Llama with mlp_bias)
    layers/N/{input_layernorm,post_attention_layernorm}/scale
    norm/scale
    lm_head/kernel                                               (language models whose head is not tied)
    score/kernel                                                 (sequence classification)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``layers`` has a leading axis of layers.

Taps (:class:`Tap`) of a layer, each ``[batch, seq, width]``::

    self_attn/tap_query             the query after rotation, heads * head_dim wide
    self_attn/tap_{key,value}       all keys (after rotation) and values that are attended to, those from the cache
                                    included, kv_heads * head_dim wide; they may get positions put in front, which every
                                    query then attends to and which are not rotated (as prefix tuning does)
    self_attn/tap_context           attention's output, before the output projection
    mlp/tap_hidden                  the gated activation, d_ff wide
    mlp/tap_output                  the feed-forward output, before the residual sum; its source is the normed feed-forward
                                    input
    tap_block                       the block's output

Reference: Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", 2023; Su et al., "RoFormer: Enhanced
Transformer with Rotary Position Embedding", 2021; Ainslie et al., "GQA: Training Generalized Multi-Query Transformer
Models from Multi-Head Checkpoints", 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import names
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import ACTIVATIONS, RMSNorm
from pefusion_jax.backbones.llama_config import LlamaConfig
from pefusion_jax.backbones.taps import Tap

__all__ = ["LLAMA", "QWEN2", "Llama", "LlamaConfig", "LlamaOutput", "name_table"]

Cache = dict[str, jax.Array]
Past = tuple[jax.Array, jax.Array] | None


class LlamaOutput(NamedTuple):
    """What a :class:`Llama` returns; what does not apply is None.

    ``last_hidden_state [batch, seq, d_model]``, after the final norm; ``hidden_states``: the embeddings, every block's
    output but the last one's, and ``last_hidden_state``; ``logits [batch, seq, vocab]`` of a language model,
    ``[batch, num_labels]`` of a classifier; ``cache``: the one that was given, with the new positions.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    logits: jax.Array | None = None
    cache: Cache | None = None


class _Shared(NamedTuple):
    """What every layer needs besides its input: who sees whom ``[batch or 1, seq, keys]``, rotations, where to write."""

    visible: jax.Array
    cos: jax.Array
    sin: jax.Array
    start: jax.Array


class _Part(nn.Module):
    """What every part needs to know."""

    config: LlamaConfig
    dtype: Any
    deterministic: bool

    def dense(self, features: int, name: str, bias: bool) -> nn.Dense:
        return nn.Dense(features, use_bias=bias, dtype=self.dtype, name=name, kernel_init=nn.initializers.normal(0.02))

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(epsilon=self.config.rms_norm_eps, dtype=self.dtype, name=name)

    def parts(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "deterministic": self.deterministic}


def _rotate(x: jax.Array, shared: _Shared) -> jax.Array:
    """Rotary positions on ``[batch, heads, seq, head_dim]``: dimension i is paired with i + head_dim / 2."""
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (wide * shared.cos + turned * shared.sin).astype(x.dtype)


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, past: Past, shared: _Shared) -> tuple[jax.Array, Past]:
        config, (batch, seq, _) = self.config, x.shape
        size, kv = config.head_size, config.kv_heads

        def project(name: str, heads: int) -> jax.Array:
            y = self.dense(heads * size, name, bias=config.qkv_bias)(x)
            return y.reshape(batch, seq, heads, size).swapaxes(1, 2)

        def tap(name: str, y: jax.Array) -> jax.Array:
            """Taps see ``[batch, seq, width]``."""
            y = Tap(name=name)(y.swapaxes(1, 2).reshape(batch, y.shape[2], -1))
            return y.reshape(batch, y.shape[1], -1, size).swapaxes(1, 2)

        query = tap("tap_query", _rotate(project("q_proj", config.num_attention_heads), shared))
        new = _rotate(project("k_proj", kv), shared), project("v_proj", kv)
        key, value = new
        if past is not None:
            start = (0, 0, shared.start, 0)
            key, value = (
                jax.lax.dynamic_update_slice(old, y.astype(old.dtype), start) for old, y in zip(past, new, strict=True)
            )
        key, value = tap("tap_key", key), tap("tap_value", value)
        visible = shared.visible
        prefix = key.shape[2] - visible.shape[2]
        if prefix > 0:  # positions that a method put in front of keys and values
            visible = jnp.pad(visible, ((0, 0), (0, 0), (prefix, 0)), constant_values=True)
        # The query heads of a group stand in one matrix, so that their shared keys are never repeated.
        grouped = query.reshape(batch, kv, -1, size)
        # Scores and softmax are float32 whatever the compute dtype.
        scores = jnp.matmul(grouped, key.swapaxes(2, 3), preferred_element_type=jnp.float32) * jnp.float32(size**-0.5)
        scores = scores.reshape(batch, kv, -1, seq, key.shape[2])
        # A finite minimum: a row without any visible position attends uniformly instead of giving NaN.
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = nn.Dropout(config.attention_dropout, deterministic=self.deterministic)(weights)
        context = jnp.matmul(weights.reshape(batch, kv, -1, key.shape[2]), value)
        context = context.reshape(batch, -1, seq, size).swapaxes(1, 2).reshape(batch, seq, -1)
        out = self.dense(config.hidden_size, "o_proj", bias=config.output_bias)(Tap(name="tap_context")(context))
        return out, None if past is None else new


class _Mlp(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        dense = functools.partial(self.dense, bias=config.mlp_bias)
        gate = ACTIVATIONS[config.hidden_act](dense(config.intermediate_size, "gate_proj")(x))
        hidden = Tap(name="tap_hidden")(gate * dense(config.intermediate_size, "up_proj")(x))
        return Tap(name="tap_output")(dense(config.hidden_size, "down_proj")(hidden), x)


class _Block(_Part):
    keep: bool  # whether the block's output is collected as well as carried

    @nn.compact
    def __call__(self, x: jax.Array, past: Past, shared: _Shared) -> tuple[jax.Array, tuple[jax.Array | None, Past]]:
        attended, new = _Attention(**self.parts(), name="self_attn")(self.norm("input_layernorm")(x), past, shared)
        x = x + attended
        x = x + _Mlp(**self.parts(), name="mlp")(self.norm("post_attention_layernorm")(x))
        x = Tap(name="tap_block")(x)
        return x, (x if self.keep else None, new)


class _LoopedBlocks(_Part):
    keep: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, past: Past, shared: _Shared) -> tuple[jax.Array, Any]:
        block = nn.remat(_Block) if self.remat else _Block
        each = []
        for layer in range(self.config.num_hidden_layers):
            here = None if past is None else (past[0][layer], past[1][layer])
            x, out = block(**self.parts(), keep=self.keep, name=str(layer))(x, here, shared)
            each.append(out)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


class Llama(nn.Module):
    """A decoder with pre-norm blocks: ``x = x + Attention(RMS(x)); x = x + W_down(act(W_gate RMS(x)) * W_up RMS(x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax, norms and rotations are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``length`` positions: ``key`` and ``value [layers, batch, kv_heads, length, head_dim]``."""
        config = self.config
        shape = (config.num_hidden_layers, batch, config.kv_heads, length, config.head_size)
        return {"key": jnp.zeros(shape, self.dtype), "value": jnp.zeros(shape, self.dtype), "index": jnp.zeros((), jnp.int32)}

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | Mapping[str, jax.Array],
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> LlamaOutput:
        """Runs the decoder.

        Args:
          input_ids: token ids ``[batch, seq]``, or a mapping with the names of the array arguments.
          attention_mask: ``[batch, seq]``, with a cache ``[batch, length]``; non-zero = keep; all by default. No token sees
            later ones in any case.
          position_ids: ``[batch, seq]`` or ``[1, seq]``; by default they count on from what is in the cache. With padding on
            the left, transformers' ``generate`` counts from the first kept token; its forward pass does not, nor does this.
          cache: from ``init_cache`` or from the call before; the new positions are written behind those that it holds.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return every block's output.

        Raises:
          ValueError: if a shape is wrong or the cache is too short.
        """
        arrays: tuple[jax.Array | None, ...] = (attention_mask, position_ids)
        if isinstance(input_ids, Mapping):
            allowed = ("input_ids", "attention_mask", "position_ids")
            if "input_ids" not in input_ids or set(input_ids) - set(allowed):
                raise ValueError(f"Llama takes a mapping with input_ids and any of {allowed[1:]}, not {list(input_ids)}")
            if any(array is not None for array in arrays):
                raise ValueError("Llama takes either one mapping or single arrays, not both")
            arrays = tuple(input_ids.get(name) for name in allowed[1:])
            input_ids = input_ids["input_ids"]
        config, ids = self.config, jnp.asarray(input_ids)
        mask, positions = (None if array is None else jnp.asarray(array) for array in arrays)
        length = self._check_shapes(ids, mask, positions, cache)
        index = jnp.zeros((), jnp.int32) if cache is None else cache["index"]
        where = index + jnp.arange(ids.shape[1], dtype=jnp.int32)
        visible = (jnp.arange(length, dtype=jnp.int32)[None, :] <= where[:, None])[None]
        visible = visible if mask is None else visible & mask.astype(bool)[:, None, :]
        cos, sin = config.rope.rotations(where[None, :] if positions is None else positions, config.head_size)

        parts = {"config": config, "dtype": self.dtype, "deterministic": deterministic}
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=init, name="embed_tokens")
        first = embed(ids)
        past = None if cache is None else (cache["key"], cache["value"])
        last, (kept, new) = self._blocks(parts, output_hidden_states)(first, past, _Shared(visible, cos, sin, index))
        last = RMSNorm(epsilon=config.rms_norm_eps, dtype=self.dtype, name="norm")(last)
        if cache is not None:
            zero = jnp.zeros((), jnp.int32)
            start = (zero, zero, zero, index, zero)
            key, value = (
                jax.lax.dynamic_update_slice(cache[name], y.astype(cache[name].dtype), start)
                for name, y in zip(("key", "value"), new, strict=True)
            )
            cache = {"key": key, "value": value, "index": index + ids.shape[1]}
        return LlamaOutput(
            last_hidden_state=last,
            hidden_states=(first, *(kept[layer] for layer in range(config.num_hidden_layers - 1)), last)
            if output_hidden_states
            else None,
            logits=self._logits(last, ids, embed),
            cache=cache,
        )

    def _blocks(self, parts: dict[str, Any], keep: bool) -> Any:
        if not self.scan_layers:
            return _LoopedBlocks(**parts, keep=keep, remat=self.remat, name="layers")
        scanned = nn.scan(
            # Inside a scan, common subexpressions cannot undo the rematerialisation.
            nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=self.config.num_hidden_layers,
        )
        return scanned(**parts, keep=keep, name="layers")

    def _logits(self, x: jax.Array, ids: jax.Array, embed: nn.Embed) -> jax.Array | None:
        config = self.config
        if config.head == "causal" and config.tie_word_embeddings:
            return embed.attend(x)
        if config.head is None:
            return None
        name, features = ("lm_head", config.vocab_size) if config.head == "causal" else ("score", config.num_labels)
        dense = nn.Dense(features, use_bias=False, dtype=self.dtype, name=name, kernel_init=nn.initializers.normal(0.02))
        if config.head == "causal":
            return dense(x)
        # As transformers: the rightmost token that is no padding, found by its id and not by the mask.
        kept = jnp.ones_like(ids) if config.pad_token_id is None else (ids != config.pad_token_id).astype(ids.dtype)
        last = jnp.argmax(kept * jnp.arange(ids.shape[1], dtype=ids.dtype)[None, :], axis=1)
        return dense(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0]

    def _check_shapes(self, ids: jax.Array, mask: Any, positions: Any, cache: Cache | None) -> int:
        """The number of positions that are attended to: the cache's length, or that of the input."""
        if ids.ndim != 2:
            raise ValueError(f"Llama: input_ids must be [batch, seq], not of shape {ids.shape}")
        batch, length = ids.shape
        if cache is not None:
            if set(cache) != {"key", "value", "index"} or cache["key"].shape[1] != batch:
                found = {name: jnp.shape(leaf) for name, leaf in cache.items()}
                raise ValueError(f"Llama: the cache must be of init_cache({batch}, length), not {found}")
            length, index = cache["key"].shape[3], cache["index"]
            filled = 0 if isinstance(index, jax.core.Tracer) else int(index)
            if filled + ids.shape[1] > length:
                raise ValueError(
                    f"Llama: {ids.shape[1]} more tokens do not fit into a cache of {length} positions that holds {filled}: "
                    "make a longer one with init_cache(batch, length)"
                )
        if mask is not None and mask.shape != (batch, length):
            raise ValueError(f"Llama: attention_mask has shape {mask.shape} instead of {(batch, length)}")
        if positions is not None and positions.shape not in {ids.shape, (1, ids.shape[1])}:
            raise ValueError(f"Llama: position_ids has shape {positions.shape}, input_ids has {ids.shape}")
        return length


def name_table(config: LlamaConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    width, hidden = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    table = names.embedding("embed_tokens", "embed_tokens", config.vocab_size, width)
    denses, norms = [], ["norm"]
    for layer in (f"layers.{layer}" for layer in range(config.num_hidden_layers)):
        denses += [(f"{layer}.self_attn.q_proj", width, query, config.qkv_bias)]
        denses += [(f"{layer}.self_attn.{name}_proj", width, key, config.qkv_bias) for name in "kv"]
        denses += [(f"{layer}.self_attn.o_proj", query, width, config.output_bias)]
        denses += [(f"{layer}.mlp.{name}_proj", width, hidden, config.mlp_bias) for name in ("gate", "up")]
        denses += [(f"{layer}.mlp.down_proj", hidden, width, config.mlp_bias)]
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    if config.head == "causal" and not config.tie_word_embeddings:
        denses.append(("lm_head", width, config.vocab_size, False))
    if config.head == "classes":
        denses.append(("score", width, config.num_labels, False))
    for name, inputs, outputs, bias in denses:
        table |= names.linear(name.replace(".", "/"), name, inputs, outputs, bias)
    for name in norms:
        table |= names.norm(name.replace(".", "/"), name, width, bias=False)
    return table


def _family(name: str, model_type: str) -> Family:
    return Family(
        name=name,
        model_types=(model_type,),
        architectures=(f"{name}Model", f"{name}ForCausalLM", f"{name}ForSequenceClassification"),
        read_config=functools.partial(LlamaConfig.from_dict, model_type=model_type),
        write_config=LlamaConfig.to_dict,
        build=Llama,
        table=name_table,
        prefix="model.",
        heads=("lm_head.", "score."),
        # The frequencies of the rotations, which old files hold and the configuration gives.
        ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        copies=lambda config: (
            {"lm_head.weight": "embed_tokens.weight"} if config.head == "causal" and config.tie_word_embeddings else {}
        ),
    )


LLAMA, QWEN2 = _family("Llama", "llama"), _family("Qwen2", "qwen2")
