"""The blocks of T5: relative positions, attention with a cache, feed-forward, and a stack of them, looped or scanned."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.backbones.layers import ACTIVATIONS, RMSNorm
from pefusion_jax.backbones.taps import Tap

__all__ = ["Stack", "relative_buckets"]

Hidden = tuple[jax.Array, ...] | None
Store = dict[str, jax.Array] | None  # what a cache holds of one layer


def relative_buckets(distance: np.ndarray, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance: one for each small distance, logarithmically wider ones up to ``max_distance``.

    Args:
      distance: position of the key minus position of the query, integers of any shape.
      bidirectional: half of the buckets are for keys after the query; otherwise these all fall into bucket 0.
      buckets: how many there are.
      max_distance: from here on everything falls into the last bucket.
    """
    distance = np.asarray(distance, np.int64)
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        far = np.abs(distance)
    else:
        far = np.maximum(-distance, 0)
    exact = buckets // 2
    # In float32, as everywhere else where T5 runs: where a border falls depends on it.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    wide = exact + (ratio * np.float32(buckets - exact)).astype(np.int64)
    return offset + np.where(far < exact, far, np.minimum(wide, buckets - 1))


class Relative(NamedTuple):
    """The position bias that all blocks of a stack share.

    ``bias [heads, query, key]``; ``table [buckets, heads]`` that it was looked up in; ``start``: the first query's position.
    """

    bias: jax.Array
    table: jax.Array
    start: jax.Array


class _Part(nn.Module):
    """What every part needs to know."""

    config: Any  # a T5Config
    dtype: Any
    deterministic: bool
    decoder: bool

    def dense(self, features: int, name: str, deviation: float) -> nn.Dense:
        init = nn.initializers.normal(deviation)
        return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name, kernel_init=init)

    def norm(self, name: str = "layer_norm") -> RMSNorm:
        return RMSNorm(epsilon=self.config.layer_norm_epsilon, dtype=self.dtype, name=name)

    def dropout(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout_rate, deterministic=self.deterministic)(x)

    def parts(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "dtype": self.dtype,
            "deterministic": self.deterministic,
            "decoder": self.decoder,
        }

    def bias(self, table: jax.Array, start: jax.Array, queries: int, first_key: int, keys: int) -> jax.Array:
        """The position bias ``[heads, query, key]`` of queries from ``start`` on and keys from ``first_key`` on."""
        config = self.config
        reach = config.relative_attention_max_distance  # all that is further falls into the same bucket
        lookup = relative_buckets(
            np.arange(-reach, reach + 1),
            not self.decoder,
            config.relative_attention_num_buckets,
            reach,
        )
        query = start + jnp.arange(queries, dtype=jnp.int32)
        key = jnp.arange(first_key, first_key + keys, dtype=jnp.int32)
        distance = jnp.clip(key[None, :] - query[:, None], -reach, reach)
        bucket = jnp.asarray(lookup, jnp.int32)[distance + reach]
        return jnp.take(table, bucket, axis=0).transpose(2, 0, 1)


class _Attention(_Part):
    """``softmax(q k^T + bias) v``: without the usual ``1 / sqrt(d)``, which T5's initialisation takes care of."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        mask: jax.Array | None,
        relative: Relative | None,
        stored: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attends from ``x`` to ``source``; returns the result, and the keys and values for a cache.

        With ``relative``, ``stored`` are the keys and values of a cache that those of ``source`` are written into. Without
        it (cross-attention) they are all there is, and read where ``source`` is None.
        """
        config = self.config
        heads, head = config.num_heads, config.d_kv
        deviation = config.d_model**-0.5

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], heads, head).swapaxes(1, 2)

        query = split(Tap(name="tap_query")(self.dense(heads * head, "q", deviation * head**-0.5)(x)))
        if source is not None:
            key = split(Tap(name="tap_key")(self.dense(heads * head, "k", deviation)(source)))
            value = split(Tap(name="tap_value")(self.dense(heads * head, "v", deviation)(source)))
            if stored is not None and relative is not None:
                # Positions that a method put in front are the same at every step: they stay in front of the cache.
                front = key.shape[2] - source.shape[1]
                at = (0, 0, relative.start, 0)
                new = [y[:, :, front:].astype(self.dtype) for y in (key, value)]
                kept = tuple(jax.lax.dynamic_update_slice(old, y, at) for old, y in zip(stored, new, strict=True))
                key, value = (
                    jnp.concatenate([y[:, :, :front].astype(self.dtype), all_], 2)
                    for y, all_ in zip((key, value), kept, strict=True)
                )
            else:
                kept = (key, value)
        elif stored is not None:
            key, value = kept = stored
        else:
            raise ValueError("attention needs a source, or stored keys and values")
        # Scores and softmax are float32 whatever the compute dtype.
        scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
        if relative is not None:
            bias, front = relative.bias, key.shape[2] - relative.bias.shape[2]
            if front > 0:
                before = self.bias(relative.table, relative.start, x.shape[1], -front, front)
                bias = jnp.concatenate([before, bias], axis=2)
            scores = scores + bias[None]
        if mask is not None:
            front = key.shape[2] - mask.shape[3]
            if front > 0:
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (front, 0)), constant_values=True)
            # A finite minimum: a row without any kept position attends uniformly instead of giving NaN.
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = self.dropout(jax.nn.softmax(scores, axis=-1).astype(self.dtype))
        context = jnp.matmul(weights, value).swapaxes(1, 2).reshape(*x.shape[:2], heads * head)
        context = Tap(name="tap_context")(context)
        return self.dense(config.d_model, "o", (heads * head) ** -0.5)(context), kept  # type: ignore[return-value]


class _AttentionLayer(_Part):
    """``x + dropout(Attention(RMSNorm(x)))``, to itself where ``cross`` is false."""

    cross: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        mask: jax.Array | None,
        relative: Relative | None,
        stored: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        normed = self.norm()(x)
        attention = _Attention(**self.parts(), name="EncDecAttention" if self.cross else "SelfAttention")
        out, kept = attention(normed, source if self.cross else normed, mask, relative, stored)
        return x + self.dropout(out), kept


class _FeedForward(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, deviation = self.config, self.config.d_model**-0.5
        gated, activation = config.feed_forward
        if gated:
            hidden = ACTIVATIONS[activation](self.dense(config.d_ff, "wi_0", deviation)(x))
            hidden = hidden * self.dense(config.d_ff, "wi_1", deviation)(x)
        else:
            hidden = ACTIVATIONS[activation](self.dense(config.d_ff, "wi", deviation)(x))
        hidden = self.dropout(Tap(name="tap_hidden")(hidden))
        return Tap(name="tap_output")(self.dense(config.d_model, "wo", config.d_ff**-0.5)(hidden), x)


class _FeedForwardLayer(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(_FeedForward(**self.parts(), name="DenseReluDense")(self.norm()(x)))


class _Sublayers(_Part):
    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        store: Store,
        mask: jax.Array | None,
        relative: Relative,
        source: jax.Array | None,
        source_mask: jax.Array | None,
    ) -> tuple[jax.Array, Store]:
        stored = None if store is None else (store["key"], store["value"])
        x, kept = _AttentionLayer(**self.parts(), cross=False, name="0")(x, None, mask, relative, stored)
        out = dict(zip(("key", "value"), kept, strict=True))
        if self.decoder:
            stored = None if store is None else (store["cross_key"], store["cross_value"])
            x, kept = _AttentionLayer(**self.parts(), cross=True, name="1")(x, source, source_mask, None, stored)
            out |= zip(("cross_key", "cross_value"), kept, strict=True)
        x = _FeedForwardLayer(**self.parts(), name="2" if self.decoder else "1")(x)
        return x, None if store is None else out


class _Block(_Part):
    keep: bool  # whether the block's output is collected as well as carried

    @nn.compact
    def __call__(self, x: jax.Array, store: Store, *shared: Any) -> tuple[jax.Array, tuple[jax.Array | None, Store]]:
        x, store = _Sublayers(**self.parts(), name="layer")(x, store, *shared)
        x = Tap(name="tap_block")(x)
        return x, (x if self.keep else None, store)


class _LoopedBlocks(_Part):
    keep: bool
    remat: bool
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array, store: Store, *shared: Any) -> tuple[jax.Array, tuple[Hidden, Store]]:
        block = nn.remat(_Block) if self.remat else _Block
        hidden: list[Any] = []
        stores: list[Store] = []
        for layer in range(self.layers):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], store)
            x, (kept, own) = block(**self.parts(), keep=self.keep, name=str(layer))(x, own, *shared)
            hidden.append(kept)
            stores.append(own)
        together = None if store is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *stores)
        return x, (tuple(hidden) if self.keep else None, together)


class Stack(_Part):
    """The encoder or the decoder: blocks over embeddings ``[batch, seq, d_model]`` and the norm after them."""

    keep: bool
    scan_layers: bool
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        source: jax.Array | None = None,
        source_mask: jax.Array | None = None,
        store: Store = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, Hidden, Store]:
        """Runs the stack.

        Args:
          x: embedded tokens ``[batch, seq, d_model]``.
          mask: which tokens (with a store: which of its positions) may be attended to, ``[batch, key]``; None: all.
          source: the encoder's output ``[batch, source, d_model]``; None with a store that holds its keys and values.
          source_mask: ``[batch, source]``; None: all.
          store: keys and values of all layers on a leading axis.
          index: how many positions of the store are filled.

        Returns:
          The output, all hidden states as transformers orders them (the last one is normed), and the store.
        """
        config = self.config
        queries = x.shape[1]
        keys = queries if store is None else store["key"].shape[3]
        start = jnp.int32(0) if index is None else index
        # One lookup for all buckets and not for all pairs: so an adapter on the table is computed once.
        embed = nn.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            dtype=jnp.float32,
            embedding_init=nn.initializers.normal(config.d_model**-0.5),
            name="relative_attention_bias",
        )
        table = embed(jnp.arange(config.relative_attention_num_buckets, dtype=jnp.int32))
        relative = Relative(self.bias(table, start, queries, 0, keys), table, start)

        allowed = None if mask is None else mask[:, None, None, :]
        if self.decoder:
            at = start + jnp.arange(queries, dtype=jnp.int32)
            causal = (jnp.arange(keys, dtype=jnp.int32)[None, :] <= at[:, None])[None, None]
            allowed = causal if allowed is None else causal & allowed
        across = None if source_mask is None else source_mask[:, None, None, :]

        first = x = self.dropout(x)
        layers = config.decoder_layers if self.decoder else config.num_layers
        if self.scan_layers:
            scanned = nn.scan(
                # Inside a scan, common subexpressions cannot undo the rematerialisation.
                nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, *(nn.broadcast,) * 4),
                length=layers,
            )
            blocks: nn.Module = scanned(**self.parts(), keep=self.keep, name="block")
        else:
            blocks = _LoopedBlocks(**self.parts(), keep=self.keep, remat=self.remat, layers=layers, name="block")
        x, (hidden, store) = blocks(x, store, allowed, relative, source, across)
        x = self.dropout(self.norm("final_layer_norm")(x))
        return x, None if hidden is None else (first, *tuple(hidden)[:-1], x), store
