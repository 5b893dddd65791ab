"""Adapters that add nothing and whose gradient is the second moments of what passes their layer, see statistics.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.layers import Layer

INPUTS, OUTPUTS, ROWS, MIXED = "moment_inputs", "moment_outputs", "moment_rows", "moment_mixed"


@dataclasses.dataclass(frozen=True)
class Probe:
    """An adapter method whose leaves are zero, whose branch is zero, and whose gradient is the sums of second moments."""

    targets: str

    acts_on: ClassVar[str] = "layers"
    stochastic: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = (INPUTS, OUTPUTS, ROWS, MIXED)
    optional: ClassVar[tuple[str, ...]] = (MIXED,)

    def owns(self, leaf: str) -> str:
        return ""

    def leaves(self, site: Layer) -> dict[str, Any]:
        zeros = jax.nn.initializers.zeros
        n, m = int(np.prod(site.inputs)), int(np.prod(site.outputs))
        batch = site.a_shape(1)[: len(site.a_shape(1)) - 1 - len(site.inputs)]
        inputs = (n,) if site.rows is None else (*batch, n, n)
        made = {INPUTS: (zeros, inputs), OUTPUTS: (zeros, (*batch, m, m)), ROWS: (zeros, ())}
        # An einsum whose weight has its input axes between its output axes.
        mixed = len(site.b_shape(1)) != len(batch) + 1 + len(site.outputs)
        return made | ({MIXED: (zeros, ())} if mixed else {})

    def branch(self, layer: Layer, leaves: Any, x: Any, y: jax.Array, key: Any) -> jax.Array:
        raise ValueError("a probe needs the weights of the rows, which its caller gives to its own branch")

    def change(self, path: str, leaves: Any, weights: Any) -> dict[str, Any]:
        return {}

    def trained(self, leaves: Any) -> tuple[str, ...]:
        return tuple(leaves)

    def moving(self, leaves: Any) -> tuple[str, ...]:
        return tuple(leaves)


@jax.custom_vjp
def observe(sums: Any, x: jax.Array, weights: jax.Array, out: jax.Array) -> jax.Array:
    """Zeros like ``out``; the gradient of ``sums`` is the moments of ``x`` and of the gradient that comes back."""
    return jnp.zeros_like(out)


def _forward(sums: Any, x: jax.Array, weights: jax.Array, out: jax.Array) -> Any:
    return jnp.zeros_like(out), (sums, x, weights)


def _backward(kept: Any, g: jax.Array) -> Any:
    sums, x, weights = kept
    w = weights.reshape(-1)
    if jnp.issubdtype(x.dtype, jnp.integer):
        inputs = jnp.zeros_like(sums[INPUTS]).at[x.reshape(-1)].add(w)
    else:
        inputs = _weighted_gram(x, w, sums[INPUTS].ndim - 2)
    outputs = _weighted_gram(g, w, sums[OUTPUTS].ndim - 2)
    found = {INPUTS: inputs, OUTPUTS: outputs, ROWS: jnp.sum(w)}
    return {name: found.get(name, jnp.zeros_like(leaf)) for name, leaf in sums.items()}, None, None, None


observe.defvjp(_forward, _backward)


def _weighted_gram(x: jax.Array, w: jax.Array, batch: int) -> jax.Array:
    rows = x.reshape(*x.shape[:batch], -1, x.shape[-1]).astype(jnp.float32)
    weighted = rows * w.reshape(*(1,) * batch, -1, 1)
    # Exactly symmetric, whatever the order in which the product is summed up.
    gram = jnp.matmul(jnp.swapaxes(rows, -1, -2), weighted, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * (gram + jnp.swapaxes(gram, -1, -2))


def row_weights(path: str, positions: tuple[int, ...], weights: jax.Array, inputs: Mapping[str, Any]) -> jax.Array:
    """``[*positions]``: 0 for padding and for rows that fill up the batch."""
    masks = ["attention_mask", "decoder_attention_mask"]
    if "decoder" in path.split("/"):
        masks.reverse()
    own = weights if positions[:1] == weights.shape else jnp.ones(positions[:1], jnp.float32)
    own = own.reshape(-1, *(1,) * (len(positions) - 1))
    for name in masks:
        mask = inputs.get(name)
        if mask is not None and jnp.shape(mask) == positions[:2]:
            own = own * (jnp.asarray(mask) > 0).astype(jnp.float32).reshape(*positions[:2], *(1,) * (len(positions) - 2))
            break
    return jnp.broadcast_to(own, positions)
