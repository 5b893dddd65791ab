"""Weight-space changes: what adapters amount to once they are written as ``W + dW``.

A :class:`Delta` maps the slash path of a base parameter to its change, which is either a dense array of the parameter's
shape or a :class:`LowRank` pair. Both are pytrees, so they jit, differentiate, stack and shard like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    r"""The change :math:`\Delta W = A B`, kept as its factors.

    Attributes:
      a: ``[*batch, inputs, rank]``; batch axes exist for layers stacked by a scan.
      b: ``[*batch, rank, outputs]``; scalings are already multiplied into it.
      shape: shape of the parameter; ``inputs * outputs`` elements a batch entry.
      axes: the order in which the parameter's axes are read as (batch, inputs, outputs); ``None`` where it is their own
        order, as in every layer but an einsum whose weight interleaves them.
    """

    a: jax.Array
    b: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Number of columns of ``a``: an upper bound of the rank of the change."""
        return self.a.shape[-1]

    @property
    def dtype(self) -> Any:
        """Element type of the factors."""
        return self.b.dtype

    def dense(self) -> jax.Array:
        """The change as one array of the parameter's shape, multiplied out in the factors' own precision."""
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        if self.axes is None:
            return product.reshape(self.shape)
        ordered = product.reshape([self.shape[axis] for axis in self.axes])
        return ordered.transpose([self.axes.index(axis) for axis in range(len(self.axes))])

    def __mul__(self, factor: Any) -> LowRank:
        return dataclasses.replace(self, b=self.b * factor)

    __rmul__ = __mul__
    __array_ufunc__ = None  # a NumPy number times a pair is ours to multiply


Change = jax.Array | LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """A change of some of the base parameters.

    Attributes:
      leaves: slash path of the parameter -> dense array or :class:`LowRank` pair.
    """

    leaves: dict[str, Any]

    def dense(self) -> Delta:
        """The same change with every low-rank pair multiplied out."""
        return Delta({path: dense(leaf) for path, leaf in self.leaves.items()})

    def __mul__(self, factor: Any) -> Delta:
        return Delta({path: leaf * factor for path, leaf in self.leaves.items()})

    __rmul__ = __mul__
    __array_ufunc__ = None


def dense(leaf: Change) -> jax.Array:
    """A change as an array of the parameter's shape."""
    return leaf.dense() if isinstance(leaf, LowRank) else leaf


def weighted_sum(changes: Sequence[Change], weights: Sequence[Any] | jax.Array) -> Change:
    r"""The linear combination :math:`\sum_t w_t \Delta W_t` of changes of one parameter.

    Low-rank pairs are combined exactly by placing their factors side by side, at rank :math:`\sum_t r_t`; the weight goes
    into ``b``. As soon as one change is dense, the result is dense.
    """
    first = changes[0]
    pairs = [change for change in changes if isinstance(change, LowRank)]
    if isinstance(first, LowRank) and [(c.shape, c.axes) for c in pairs] == [(first.shape, first.axes)] * len(changes):
        return LowRank(
            a=jnp.concatenate([c.a for c in pairs], axis=-1),
            b=jnp.concatenate([c.b * weights[t] for t, c in enumerate(pairs)], axis=-2),
            shape=first.shape,
            axes=first.axes,
        )
    total = dense(first) * weights[0]
    for t, change in enumerate(changes[1:], start=1):
        total = total + dense(change) * weights[t]
    return total


def tangent(primal: Change, direction: Change) -> Change:
    r"""Directional derivative of a change whose factors move: :math:`dA\,B + A\,dB` as a pair of twice the rank."""
    if not isinstance(primal, LowRank) or not isinstance(direction, LowRank):
        return direction
    return LowRank(
        a=jnp.concatenate([primal.a, direction.a], axis=-1),
        b=jnp.concatenate([direction.b, primal.b], axis=-2),
        shape=primal.shape,
        axes=primal.axes,
    )


def wide(leaf: Change) -> jax.Array:
    """:func:`dense`, multiplied out in float32 at least, whatever the factors are stored in."""
    return dense(jax.tree.map(lambda x: x.astype(trees.wide_dtype(x.dtype)), leaf))


def located(params: Mapping[str, Any], delta: Delta | Mapping[str, Any]) -> dict[str, Change]:
    """The changes under the paths that their parameters have in ``params``, which may be a dictionary of Linen collections.

    Raises:
      ValueError: if a path is not a parameter or its shape differs, naming the nearest parameters.
    """
    changes = delta.leaves if isinstance(delta, Delta) else trees.flat(delta)
    variables = trees.flat(params)
    # A dictionary of Linen collections: the change belongs to its "params".
    prefix = "params/" if isinstance(params.get("params"), Mapping) else ""
    for path, change in changes.items():
        if prefix + path not in variables:
            raise ValueError(f"no parameter {path!r} to fold into{trees.did_you_mean(prefix + path, variables)}")
        weight = variables[prefix + path]
        if weight.shape != change.shape:
            raise ValueError(f"parameter {path!r} has shape {weight.shape}, its change has {change.shape}")
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(f"parameter {path!r} is {weight.dtype}, which would lose its change; make it floating first")
    return {prefix + path: change for path, change in changes.items()}


def fold(params: Mapping[str, Any], delta: Delta | Mapping[str, Any]) -> dict[str, Any]:
    """Adds a weight-space change to base parameters: ``W + dW``, computed in float32 and stored in ``W``'s dtype.

    Args:
      params: nested dictionary of parameters, left as it is; unchanged leaves are shared, not copied.
      delta: a :class:`Delta`, or a nested dictionary of arrays that mirrors part of ``params``.

    Returns:
      A nested dictionary of the same structure, shapes and dtypes as ``params``.

    Raises:
      ValueError: if a path is not a parameter or its shape differs, naming the nearest parameters; if a parameter is not
        floating; or if a change is not finite, or too large for the parameter's dtype. What is traced is not looked at.
    """
    variables = trees.flat(params)
    for path, change in located(params, delta).items():
        weight, moved = variables[path], wide(change)
        kind = trees.wide_dtype(weight.dtype)
        variables[path] = folded = (weight.astype(kind) + moved.astype(kind)).astype(weight.dtype)
        if not isinstance(folded, jax.core.Tracer) and not jnp.all(jnp.isfinite(folded)):
            trees.require_finite({path: moved}, "the change")
            if jnp.all(jnp.isfinite(weight)):  # what the base has already is not the change's fault
                raise ValueError(f"parameter {path!r} is {weight.dtype}, for which its change is too large; cast it to float32")
    return trees.nest(variables)
