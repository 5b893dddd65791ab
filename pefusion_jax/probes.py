"""Adapters that add nothing and whose gradient is the second moments of what passes their layer, see statistics.py.

Beside them, what says which of a layer's positions count: those of real rows and of real tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.layers import Layer

INPUTS, OUTPUTS, ROWS, MIXED = "moment_inputs", "moment_outputs", "moment_rows", "moment_mixed"

_TARGET = "decoder_"  # how the names of a decoder's inputs begin


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


Positions = tuple[int, ...]
Inputs = Mapping[str, Any]


class Calls(NamedTuple):
    """The shapes of the positions, by the layers' paths, that calls of the model with other inputs have.

    Shapes of the real call do not say what an axis is: 32 buckets of distances look like the rows of a batch of 32, and where
    source and target are equally long, keys and values of cross-attention look like the decoder's tokens.

    ``twice``: with twice the rows. ``moved``: with ``length`` tokens for the decoder, or ``None`` where there is none.
    """

    twice: dict[str, set[Positions]]
    moved: dict[str, set[Positions]] | None
    length: int


def listen(positions_of: Callable[[Inputs], dict[str, set[Positions]]], inputs: Inputs, rows: int) -> Calls:
    """Makes the calls; ``positions_of`` takes descriptions of inputs."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), dict(inputs))

    def resized(leaf: Any, axis: int, old: int, new: int) -> Any:
        shape = leaf.shape
        fits = len(shape) > axis and shape[axis] == old
        return jax.ShapeDtypeStruct((*shape[:axis], new, *shape[axis + 1 :]), leaf.dtype) if fits else leaf

    twice = positions_of(jax.tree.map(lambda leaf: resized(leaf, 0, rows, 2 * rows), like))
    old = _target_length(inputs)
    if old is None:
        return Calls(twice, None, 0)
    new = old - 1 or 2  # shorter where it can be: there may be a longest
    moved = {name: resized(leaf, 1, old, new) if name.startswith(_TARGET) else leaf for name, leaf in like.items()}
    return Calls(twice, positions_of(moved), new)


def row_weights(path: str, x: Any, positions: Positions, weights: jax.Array, inputs: Inputs, calls: Calls) -> jax.Array | None:
    """``[*positions]``: 0 for padding and for rows that fill up the batch; ``None`` of a table that is read once for all rows.

    Args:
      path: of the layer.
      x: its input.
      positions: ``[rows, ...]``, ``[rows * tokens, ...]`` with the tokens of one row together, or without rows.
      weights: ``[rows]``.
      inputs: of the model.
      calls: what ``listen`` heard.

    Raises:
      ValueError: if rows cannot be told, or not whether these are the encoder's tokens or the decoder's.
    """
    rows = len(weights)
    if not positions or (2 * positions[0], *positions[1:]) not in calls.twice[path] or positions[0] % rows:
        if jnp.issubdtype(x.dtype, jnp.integer) and positions in calls.twice[path]:
            return None
        raise ValueError(
            f"{path!r} is called at positions of shape {positions}, whose first axis is not that of the {rows} rows of the "
            "batch (a module under nn.vmap over the rows?), so that padding and filled-up rows cannot be left out of its "
            "moments; write the module for a whole batch, leave the layer out of the targets, or collect kinds=('fisher',)"
        )
    tokens = _by_row(positions, rows)
    own = weights.reshape(rows, *(1,) * (len(tokens) - 1))
    mask = inputs.get(_TARGET + "attention_mask" if _of_decoder(path, x, tokens, inputs, calls) else "attention_mask")
    if mask is not None and jnp.shape(mask) == tokens[:2]:
        own = own * (jnp.asarray(mask) > 0).astype(jnp.float32).reshape(*tokens[:2], *(1,) * (len(tokens) - 2))
    return jnp.broadcast_to(own, tokens).reshape(positions)


def _target_length(inputs: Inputs) -> int | None:
    ids = inputs.get(_TARGET + "input_ids")
    return None if ids is None or jnp.ndim(ids) < 2 else jnp.shape(ids)[1]


def _by_row(positions: Positions, rows: int) -> Positions:
    """``[rows, tokens, ...]`` where a layer has the two in one axis."""
    each = positions[0] // rows
    return (rows, each, *positions[1:]) if each > 1 else positions


def _of_decoder(path: str, x: Any, tokens: Positions, inputs: Inputs, calls: Calls) -> bool:
    """Whether ``[rows, tokens, ...]`` are the tokens of the decoder: those whose number is another when that of its ids is."""
    rows, length = tokens[0], _target_length(inputs)
    if calls.moved is None or tokens[:2] != (rows, length):
        return False
    fronts = {_by_row(positions, rows)[:2] for positions in calls.moved[path] if positions}
    if (rows, length) not in fronts:
        return True
    if (rows, calls.length) not in fronts:
        return False
    # A module that reads both, as the table of words does: it is given the very ids.
    named = [name for name, array in inputs.items() if array is x]
    if not named:
        raise ValueError(
            f"{path!r} reads the encoder's tokens and the decoder's, and in a batch with {length} of both its calls look "
            "alike; pad source and target to different lengths"
        )
    return named[0].startswith(_TARGET)
