"""Tiny Linen models that the library does not own: the same network as a loop, under remat, and scanned."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH, HEADS, LAYERS = 16, 4, 3


class Attention(nn.Module):
    """Self-attention whose projections are the layer types that Linen users mix."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = WIDTH // HEADS
        q = nn.DenseGeneral((HEADS, heads), name="query")(x)
        k = nn.Einsum((WIDTH, HEADS, heads), "btd,dnh->btnh", name="key")(x)
        # As in Gemma: the weight's input axis stands between its output axes.
        v = nn.Einsum((HEADS, WIDTH, heads), "btd,ndh->btnh", name="value", use_bias=False)(x)
        weights = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k) / heads**0.5)
        mixed = jnp.einsum("bnqk,bknh->bqnh", weights, v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed)


class Block(nn.Module):
    """Pre-norm block with a convolution over time in front of the feed-forward layers."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        x = x + Attention(name="attention")(nn.LayerNorm(name="norm1")(x))
        x = x + nn.Conv(WIDTH, kernel_size=(3,), name="conv")(x)
        h = jnp.tanh(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(WIDTH, name="down")(h)
        return x, None


class Encoder(nn.Module):
    """Token ids -> logits, with the embedding tied to the output head."""

    layout: str = "loop"
    vocab: int = 11

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocab, WIDTH, name="embed")
        x = embed(ids)
        if self.layout == "scan":
            scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=LAYERS)
            x, _ = scanned(name="layers")(x, None)
        else:
            block = nn.remat(Block) if self.layout == "remat" else Block
            for i in range(LAYERS):
                x, _ = block(name=f"layer_{i}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class Shared(nn.Module):
    """One submodule called twice: one set of adapters."""

    def setup(self) -> None:
        self.inner = nn.Dense(WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(jnp.tanh(self.inner(x)))


def stack_layers(tree: dict[str, Any]) -> dict[str, Any]:
    """Loop layout -> scan layout, for parameters and for adapters."""
    names = sorted(name for name in tree if name.startswith("layer_"))
    rest = {name: value for name, value in tree.items() if name not in names}
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[n] for n in names))} if names else rest


class Wide(nn.Module):
    """Feed-forward stack of width 256, in which a rank of 2 costs next to nothing."""

    layout: str = "loop"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.layout == "scan":
            scanned = nn.scan(WideBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scanned(name="layers")(x, None)[0]
        block = nn.remat(WideBlock) if self.layout == "remat" else WideBlock
        for i in range(3):
            x, _ = block(name=f"layer_{i}")(x, None)
        return x


class WideBlock(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        return x + nn.Dense(256, name="down")(jnp.tanh(nn.Dense(512, name="up")(x))), None
