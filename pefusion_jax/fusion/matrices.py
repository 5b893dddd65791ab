r"""Linear algebra that the spectral methods share: numerical rank, polar factors, and pairs as small cores.

The changes of one parameter by T tasks, as pairs :math:`A_t B_t` of ranks :math:`r_t`, lie between two common orthonormal
bases: :math:`\Delta_t = Q_A M_t Q_B^\top` with cores :math:`M_t` of size R x R, :math:`R = \sum_t r_t`. A method f that does
not care about the basis, :math:`f(Q_A M Q_B^\top) = Q_A f(M) Q_B^\top`, is run on the cores: no array of the parameter's own
size is ever made, and the cost is that of two QR decompositions, :math:`O((m + n) R^2)`.

Rounding makes every matrix one of full rank. Here a singular value counts as zero if it is below ``eps * max(m, n)`` times the
largest one, m x n being the *parameter's* shape, so that cores and dense matrices agree about what is noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.deltas import Change, LowRank, dense, weighted_sum
from pefusion_jax.fusion.parts import Changes, Fusion
from pefusion_jax.in_turn import after, in_turn

Factors = tuple[jax.Array, jax.Array]


class Matrices(NamedTuple):
    """The changes of one parameter, or their cores.

    Attributes:
      stack: ``[task, m, n]``.
      shape: ``(inputs, outputs)`` of the parameter; (m, n), or more where these are cores.
      rank: a bound on the rank of each of them.
    """

    stack: jax.Array
    shape: tuple[int, int]
    rank: int


def small(values: jax.Array, shape: tuple[int, int], size: jax.Array | None = None) -> jax.Array:
    """Which singular values ``[..., k]``, the largest first, count as zero beside ``size`` ``[...]``, else beside the first."""
    reference = values[..., :1] if size is None else size[..., None]
    return values <= float(jnp.finfo(values.dtype).eps) * max(shape) * reference


def numerical_svd(x: jax.Array, shape: tuple[int, int], size: jax.Array | None = None) -> tuple[Any, Any, Any]:
    """The thin SVD of ``[..., m, n]``; singular values that count as zero are 0 and so are their vectors.

    Returns:
      u ``[..., m, k]``, s ``[..., k]``, vt ``[..., k, n]``.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    kept = ~small(s, shape, size)
    one = kept.astype(s.dtype)
    return u * one[..., None, :], jnp.where(kept, s, jnp.zeros_like(s)), vt * one[..., None]


def polar(x: jax.Array) -> jax.Array:
    r"""The polar factor :math:`X (X^\top X)^{-1/2}` of unit columns, with the pseudo-inverse where they depend on each other.

    That is the nearest matrix with orthonormal columns; columns of zeros stay zero. Singular vectors are accurate to far less
    than machine precision, so directions of the columns' span count if their singular value is above ``sqrt(eps)``: those below
    are made of rounding errors.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    kept = s > float(jnp.finfo(s.dtype).eps) ** 0.5 * s[..., :1]
    return (u * kept[..., None, :].astype(s.dtype)) @ vt


def isotropic(x: jax.Array, shape: tuple[int, int]) -> Factors:
    """``[..., m, n]`` with each singular value replaced by the mean of those that are not zero, as two factors."""
    u, s, vt = numerical_svd(x, shape)
    count = jnp.maximum(jnp.sum(s > 0, axis=-1, keepdims=True), 1).astype(s.dtype)
    return u * (jnp.sum(s, axis=-1, keepdims=True) / count)[..., None, :], vt


def mean(stack: jax.Array) -> jax.Array:
    """The average over tasks, which is what becomes of leaves that are not matrices."""
    return jnp.mean(stack, axis=0)


def matrixwise(
    core: Callable[[Matrices], Factors],
    scale: float | jax.Array = 1.0,
    *,
    others: Callable[[jax.Array], jax.Array] = mean,
    single: bool = False,
) -> Fusion:
    """Makes a fusion method of what it does with the matrices of one parameter.

    Args:
      core: :class:`Matrices` -> factors ``[m, k]`` and ``[k, n]`` of the fused matrix. It must not depend on the basis:
        rotating all matrices alike must rotate the result. What depends on the parameter's size goes by ``Matrices.shape``.
      scale: multiplies everything; may be traced.
      others: stacked leaf that is not a matrix -> leaf.
      single: whether one task alone comes back as it is, times the scale; then it does so bit for bit.
    """

    def fuse_leaf(stack: jax.Array) -> jax.Array:
        wide = stack.astype(trees.wide_dtype(stack.dtype))
        if single and len(stack) == 1:
            out = wide[0]
        elif stack.ndim == 3:
            left, right = core(Matrices(wide, (wide.shape[1], wide.shape[2]), min(wide.shape[1:])))
            out = left @ right
        else:
            out = others(wide)
        return (out * jnp.asarray(scale, out.dtype)).astype(stack.dtype)

    def apply(stacked: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            leaves, structure = jax.tree.flatten(stacked)
            return jax.tree.unflatten(structure, in_turn(fuse_leaf, leaves))

    def changes(given: Changes) -> dict[str, Change]:
        out: dict[str, Change] = {}
        alike: dict[Any, list[str]] = {}
        plain: dict[str, jax.Array] = {}
        for path, of_tasks in given.items():
            pairs = as_pairs(of_tasks)
            if pairs is None:
                plain[path] = stacked_dense(of_tasks)
            elif single and len(pairs) == 1:
                out[path] = pairs[0] * jnp.asarray(scale, pairs[0].dtype)
            elif not sum(pair.rank for pair in pairs):
                out[path] = pairs[0]
            else:
                shapes = tuple((pair.a.shape[-2:], pair.b.shape[-1], pair.dtype) for pair in pairs)
                alike.setdefault(shapes, []).append(path)
        # Parameters of one shape go through the decompositions as one batch, so that they compile once.
        out |= apply(plain)
        groups = [[as_pairs(given[path]) or () for path in paths] for paths in alike.values()]
        for paths, fused in zip(alike.values(), in_turn(lambda group: _in_cores(core, group), groups), strict=True):
            for path, pair in zip(paths, fused, strict=True):
                out[path] = pair * jnp.asarray(scale, pair.dtype)
        return {path: out[path] for path in given}

    return Fusion(apply, changes=changes)


def as_pairs(of_tasks: Sequence[Change]) -> tuple[LowRank, ...] | None:
    """The changes of one parameter as the low-rank pairs they are, or ``None`` if they are dense."""
    pairs = tuple(change for change in of_tasks if isinstance(change, LowRank))
    return pairs if len(pairs) == len(of_tasks) else None


def of_changes(method: Fusion, given: Mapping[str, tuple[Change, ...]]) -> dict[str, Change]:
    """What a method makes of changes, as pairs if it keeps them."""
    if method.changes is not None:
        return method.changes(dict(given))
    if method.weights is None:
        return method.apply({path: stacked_dense(of_tasks) for path, of_tasks in given.items()})
    return {
        path: weighted_sum(of_tasks, method.weights(len(of_tasks)).astype(of_tasks[0].dtype))
        for path, of_tasks in given.items()
    }


def bound(inner: Fusion, outer: Callable[[Fusion], Fusion]) -> Callable[[tuple[str, ...]], Fusion] | None:
    """The ``bind`` of a method around another one."""
    bind = inner.bind
    return None if bind is None else lambda names: outer(bind(names))


def stacked_dense(of_tasks: Sequence[Change]) -> jax.Array:
    """The changes of one parameter as one array ``[task, ...]``, pairs multiplied out."""
    return jnp.stack([dense(change) for change in of_tasks])


def _in_cores(core: Callable[[Matrices], Factors], parameters: Sequence[tuple[LowRank, ...]]) -> list[LowRank]:
    """Fuses the pairs of several parameters of one shape and the same ranks."""

    def flat(factor: jax.Array) -> jax.Array:
        return factor.reshape(math.prod(factor.shape[:-2]), *factor.shape[-2:])

    tasks = range(len(parameters[0]))
    with jax.default_matmul_precision("highest"):
        a, b = jax.vmap(lambda a, b: _one(core, a, b))(
            [jnp.concatenate([flat(pairs[t].a) for pairs in parameters]) for t in tasks],
            [jnp.concatenate([flat(pairs[t].b) for pairs in parameters]) for t in tasks],
        )
    out, start = [], 0
    for pairs in parameters:
        batch = pairs[0].a.shape[:-2]
        stop = start + flat(pairs[0].a).shape[0]
        dtype = pairs[0].dtype
        own_a, own_b = (factor[start:stop].reshape(*batch, *factor.shape[1:]).astype(dtype) for factor in (a, b))
        out.append(dataclasses.replace(pairs[0], a=own_a, b=own_b))
        start = stop
    return out


def _one(core: Callable[[Matrices], Factors], a: Sequence[jax.Array], b: Sequence[jax.Array]) -> Factors:
    """The fused pair of one parameter, from the tasks' factors ``[inputs, r]`` and ``[r, outputs]``."""
    wide = trees.wide_dtype(b[0].dtype)
    ranks = [factor.shape[-1] for factor in a]
    q_a, r_a = jnp.linalg.qr(jnp.concatenate([factor.astype(wide) for factor in a], axis=1))
    q_b, r_b = jnp.linalg.qr(after(jnp.concatenate([factor.astype(wide) for factor in b], axis=0).T, q_a))
    stops = [sum(ranks[: t + 1]) for t in range(len(ranks))]
    cores = jnp.stack(
        [r_a[:, stop - rank : stop] @ r_b[:, stop - rank : stop].T for rank, stop in zip(ranks, stops, strict=True)]
    )
    left, right = core(Matrices(cores, (len(q_a), len(q_b)), min(max(ranks), *cores.shape[1:])))
    if left.shape[1] <= min(cores.shape[1:]):
        return q_a @ left, right @ q_b.T
    if cores.shape[1] <= cores.shape[2]:
        return q_a, (left @ right) @ q_b.T
    return q_a @ (left @ right), q_b.T
