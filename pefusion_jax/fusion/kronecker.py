r"""Solves :math:`\sum_t G_t X S_t = \sum_t G_t \Delta W_t S_t` for many layers at once, never forming a Kronecker product."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax.deltas import Change, LowRank, dense
from pefusion_jax.in_turn import in_turn
from pefusion_jax.moments import (
    Moment,
    Moments,
    Spectral,
    dense_moment,
    diagonal_matrix,
    moment_diagonal,
    moment_trace,
    times,
    times_right,
)

# Elements that are stacked for one call; more layers than fit are solved one group after the other.
_ELEMENTS = 2**25


def damped(moment: Moment, off_diagonal: Any, damping: Any) -> Moment:
    r""":math:`\alpha M + (1 - \alpha)\,\mathrm{diag}(M) + \delta\,\mathrm{tr}(M) / n\, I`, in the form that it has."""
    diagonal = moment_diagonal(moment)
    share = jnp.asarray(off_diagonal, diagonal.dtype)
    added = (1 - share) * diagonal + jnp.asarray(damping, diagonal.dtype) * jnp.mean(diagonal, axis=-1, keepdims=True)
    if isinstance(moment, Spectral):
        return Spectral(moment.vectors, share * moment.values, share * moment.diagonal + added)
    return share * moment + diagonal_matrix(added)


def as_matrix(change: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> jax.Array:
    """A parameter's change as ``[*batch, in, out]``."""
    return (change if axes is None else change.transpose(axes)).reshape(shape)


def from_matrix(x: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> jax.Array:
    """Undoes :func:`as_matrix`."""
    if axes is None:
        return x.reshape(shape)
    return x.reshape([shape[axis] for axis in axes]).transpose([axes.index(axis) for axis in range(len(axes))])


def solve(
    by_path: Mapping[str, tuple[Change, ...]],
    found: Mapping[str, list[Any]],
    off_diagonal: Any,
    damping: Any,
    normalize: bool,
    iterations: int,
    tolerance: float,
    rank: int | None,
) -> dict[str, Change]:
    """Solves every parameter's system; those of equal shapes together.

    Args:
      by_path: parameter -> one change per task.
      found: parameter -> the moments of each task, ``None`` for a task that has no say.
      off_diagonal, damping, normalize, iterations, tolerance, rank: see :func:`~pefusion_jax.fusion.closed_form.gram`.
    """
    problems: dict[str, Any] = {}
    groups: dict[Any, list[str]] = {}
    for path, changes in by_path.items():
        problems[path] = _problem(changes, found[path])
        leaves, structure = jax.tree.flatten(problems[path])
        kind = (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        groups.setdefault(kind, []).append(path)
    out: dict[str, Change] = {}
    for paths in groups.values():
        size = sum(leaf.size for leaf in jax.tree.leaves(problems[paths[0]]))
        # XLA's products of stacked matrices are many times slower than of single ones on a CPU.
        at_once = 1 if jax.default_backend() == "cpu" else max(1, _ELEMENTS // max(size, 1))
        for first in range(0, len(paths), at_once):
            group = paths[first : first + at_once]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(problems[path] for path in group))
            _, g, s = problems[group[0]][0]
            kept = None if rank is None or min(g.shape[-1], s.shape[-1]) <= rank else rank
            x = _solve(stacked, off_diagonal, damping, normalize, iterations, tolerance, kept)
            for place, path in enumerate(group):
                like, moments = by_path[path][0], next(m for m in found[path] if m is not None)
                axes = like.axes if isinstance(like, LowRank) else moments.axes
                one = jax.tree.map(lambda leaf, place=place: leaf[place], x)
                if kept is None:
                    out[path] = from_matrix(one, like.shape, axes)
                else:
                    out[path] = LowRank(one[0], one[1], like.shape, axes)
    return out


@functools.partial(jax.jit, static_argnames="shrunk")
def regression(terms: list[tuple[Any, Any]], off_diagonal: Any, damping: Any, shrunk: bool) -> jax.Array:
    r"""Solves ``sum G_t X = sum G_t D_t``, with shrunk and damped moments, for ``[(D_t as a matrix or a pair, G_t)]``.

    Solved for what X has beside the tasks' average C by the traces, since what damping adds to both sides cancels there,
    :math:`(\sum_t S_t + \epsilon I)(X - C) = \sum_t S_t (D_t - C)`: a direction that no :math:`S_t` has is that of C, however
    little the damping is beside float32's rounding errors. Without any moments C is the plain average. ``shrunk`` says that
    ``off_diagonal`` is below 1: only inputs that are always zero are without moments then, and no eigenvalues are needed.
    """
    largest = functools.reduce(jnp.maximum, [moment_trace(g) for _, g in terms])
    # One unit for all: the system is as it was, and float32 has room above and below.
    known: list[Any] = [(side, _divided(damped(g, off_diagonal, 0.0), largest)) for side, g in terms]
    traces = jnp.stack([moment_trace(g) for _, g in known])
    whole = jnp.sum(traces, axis=0)
    shares = jnp.where(whole > 0, traces / jnp.where(whole > 0, whole, jnp.ones_like(whole)), 1.0 / len(known))
    center = _sum(share[..., None, None] * _matrix(d) for share, (d, _) in zip(shares, known, strict=True))
    right = _sum(_matmul(times(g, d[0]), d[1]) if isinstance(d, tuple) else times(g, d) for d, g in known)
    added = (jnp.asarray(damping, whole.dtype) * whole / center.shape[-2])[..., None]
    if all(_is_diagonal(g) for _, g in known):
        vectors, values = None, _sum(g.diagonal for _, g in known)
        right, kept = right - values[..., None] * center, values > 0
    else:
        total = _sum(dense_moment(g) for _, g in known)
        right = right - _matmul(total, center)
        if shrunk:
            # What is always zero has a zero here and on the right: any unit will do.
            unit = jnp.eye(total.shape[-1], dtype=total.dtype).reshape((1,) * (total.ndim - 2) + total.shape[-2:])
            diagonal = added + jnp.where(
                jnp.diagonal(total, axis1=-2, axis2=-1) > 0, jnp.zeros_like(added), jnp.ones_like(added)
            )
            return center + jnp.linalg.solve(total + diagonal[..., None] * unit, right)
        values, vectors = jnp.linalg.eigh(total)
        # Rounding gives every matrix all directions: those that are as small as it makes them are none of the moments'.
        kept = values > 4 * float(jnp.finfo(values.dtype).eps) * values.shape[-1] ** 0.5 * values[..., -1:]
    gain = jnp.where(kept, 1.0 / jnp.where(kept, values + added, jnp.ones_like(values)), jnp.zeros_like(values))
    return center + _out_of(vectors, gain[..., None] * _into(vectors, right))


@jax.jit
def weighted(terms: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Element-wise average of ``[(D_t, F_t)]`` with the weights ``F_t``; the plain one where all of them are zero."""
    total = _sum(f for _, f in terms)
    plain = _sum(d for d, _ in terms) / len(terms)
    return jnp.where(total > 0, _sum(f * d for d, f in terms) / jnp.where(total > 0, total, jnp.ones_like(total)), plain)


def truncated(change: Change, moments: Moments, off_diagonal: Any, damping: Any, rank: int) -> Change:
    r"""The pair of at most this rank, nearest in the metric :math:`\mathrm{tr}(D^\top G D S)`; what is so already stays."""
    inputs, outputs = (damped(m, off_diagonal, damping) for m in (moments.inputs, moments.outputs))
    if (change.rank if isinstance(change, LowRank) else min(inputs.shape[-1], outputs.shape[-1])) <= rank:
        return change
    axes = change.axes if isinstance(change, LowRank) else moments.axes
    matrix = as_matrix(dense(change), (*inputs.shape[:-1], outputs.shape[-1]), axes)
    first, second = in_turn(_eigen, [inputs, outputs])
    return LowRank(*_truncate(matrix, first, second, rank), change.shape, axes)


def residual(changes: Any, found: Any, merged: Change, off_diagonal: Any, damping: Any, normalize: bool) -> jax.Array:
    """Norm of the residual relative to the right-hand side; see :func:`~pefusion_jax.fusion.closed_form.gram_residual`."""
    terms = _problem((*changes, merged), [*found, next(f for f in found if f is not None)])
    return _residual(terms[:-1], _matrix(terms[-1][0]), off_diagonal, damping, normalize)


@jax.jit
def _residual(terms: list[Any], x: jax.Array, off_diagonal: Any, damping: Any, normalize: bool) -> jax.Array:
    left, right, sides = _prepared(terms, off_diagonal, damping, normalize)
    b = _sum(_from_both(g, side, s) for g, side, s in zip(left, sides, right, strict=True))
    ax = _sum(times_right(times(g, x), s) for g, s in zip(left, right, strict=True))
    return jnp.linalg.norm(b - ax) / jnp.maximum(jnp.linalg.norm(b), jnp.finfo(b.dtype).tiny)


def _problem(changes: tuple[Change, ...], found: list[Any]) -> list[Any]:
    """``[(change as a matrix or a pair, G, S)]`` of the tasks that have a say."""
    terms = []
    for change, moments in zip(changes, found, strict=True):
        if moments is None:
            continue
        if isinstance(change, LowRank):
            side: Any = (change.a, change.b)
        else:
            side = as_matrix(change, (*moments.inputs.shape[:-1], moments.outputs.shape[-1]), moments.axes)
        dtype = change.dtype
        cast = [jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), m) for m in (moments.inputs, moments.outputs)]
        terms.append((side, *cast))
    return terms


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _is_diagonal(moment: Any) -> bool:
    return isinstance(moment, Spectral) and not moment.values.shape[-1]


def _sum(terms: Iterable[Any]) -> Any:
    return functools.reduce(jnp.add, terms)


def _matrix(side: Any) -> jax.Array:
    return _matmul(*side) if isinstance(side, tuple) else side


def _from_both(g: Moment, side: Any, s: Moment) -> jax.Array:
    """``G dW S``; a pair is multiplied out last."""
    if isinstance(side, tuple):
        return _matmul(times(g, side[0]), times_right(side[1], s))
    return times_right(times(g, side), s)


def _divided(moment: Moment, by: jax.Array) -> Moment:
    unit = 1.0 / jnp.maximum(by, jnp.finfo(by.dtype).tiny)
    if isinstance(moment, Spectral):
        return Spectral(moment.vectors, moment.values * unit[..., None], moment.diagonal * unit[..., None])
    return moment * unit[..., None, None]


def _prepared(terms: list[Any], off_diagonal: Any, damping: Any, normalize: bool) -> tuple[list[Any], list[Any], list[Any]]:
    """Shrunk, damped and scaled moments: of trace 1 each, or with one unit for all tasks."""
    traces: list[Any] = [(moment_trace(g), moment_trace(s)) for _, g, s in terms]
    largest = [functools.reduce(jnp.maximum, side) for side in zip(*traces, strict=True)]
    traces = [tuple(jnp.where(normalize, one, all_) for one, all_ in zip(t, largest, strict=True)) for t in traces]
    left = [_divided(damped(g, off_diagonal, damping), t[0]) for (_, g, _), t in zip(terms, traces, strict=True)]
    right = [_divided(damped(s, off_diagonal, damping), t[1]) for (_, _, s), t in zip(terms, traces, strict=True)]
    return left, right, [side for side, _, _ in terms]


def _eigen(moment: Any) -> tuple[jax.Array | None, jax.Array]:
    """Eigenvectors (``None`` for the identity) and eigenvalues of a positive semi-definite moment."""
    if _is_diagonal(moment):
        return None, moment.diagonal
    values, vectors = jnp.linalg.eigh(dense_moment(moment))
    return vectors, jnp.maximum(values, jnp.zeros((), values.dtype))


def _mean(moments: list[Any]) -> Moment:
    if all(_is_diagonal(m) for m in moments):
        total = _sum(m.diagonal for m in moments)
        return Spectral(moments[0].vectors, moments[0].values, total / len(moments))
    return _sum(dense_moment(m) for m in moments) / len(moments)


def _into(basis: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if basis is None else _matmul(_flip(basis), x)


def _out_of(basis: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if basis is None else _matmul(basis, x)


def _flip(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _along(basis: jax.Array | None, moment: Moment) -> jax.Array:
    """Diagonal of a moment in a basis, ``[*batch, n]``."""
    return moment_diagonal(moment) if basis is None else jnp.sum(basis * times(moment, basis), axis=-2)


@functools.partial(jax.jit, static_argnames=("rank",))
def _solve(
    terms: list[Any], off_diagonal: Any, damping: Any, normalize: bool, iterations: int, tolerance: Any, rank: int | None
) -> Any:
    left, right, sides = _prepared(terms, off_diagonal, damping, normalize)
    (u, lam), (v, sig) = in_turn(_eigen, [_mean(left), _mean(right)])
    dtype = lam.dtype
    # The system's own diagonal in these bases; where it vanishes there is no data, and the start is kept.
    scale = _sum(_along(u, g)[..., :, None] * _along(v, s)[..., None, :] for g, s in zip(left, right, strict=True))
    floor = jnp.finfo(dtype).eps * jnp.max(scale, axis=(-2, -1), keepdims=True)
    inverse = jnp.where(scale > floor, 1.0 / jnp.maximum(scale, jnp.maximum(floor, jnp.finfo(dtype).tiny)), 0.0)

    def precondition(r: jax.Array) -> jax.Array:
        inner = _flip(_into(v, _flip(_into(u, r)))) * inverse
        return _flip(_out_of(v, _flip(_out_of(u, inner))))

    def operator(x: jax.Array) -> jax.Array:
        return _sum(times_right(times(g, x), s) for g, s in zip(left, right, strict=True))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=(-2, -1), keepdims=True)

    start = _sum(_matrix(side) for side in sides) / len(sides)
    # The residual at the start, from differences: nothing large cancels where tasks agree.
    residual = _sum(times_right(times(g, _matrix(side) - start), s) for g, side, s in zip(left, sides, right, strict=True))
    target = _sum(_from_both(g, side, s) for g, side, s in zip(left, sides, right, strict=True))
    goal = jnp.square(jnp.asarray(tolerance, dtype)) * dot(target, precondition(target))
    z = precondition(residual)

    def going(state: Any) -> jax.Array:
        *_, rz, count = state
        return (count < iterations) & jnp.any(rz > goal)

    def step(state: Any) -> Any:
        x, r, p, rz, count = state
        active = rz > goal
        q = operator(p)
        curvature = dot(p, q)
        alpha = jnp.where(active & (curvature > 0), rz / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * q
        z = precondition(r)
        new = dot(r, z)
        beta = jnp.where(active & (rz > 0), new / jnp.where(rz > 0, rz, 1.0), 0.0)
        return x, r, z + beta * p, jnp.where(active, new, rz), count + 1

    x, *_ = jax.lax.while_loop(going, step, (jnp.zeros_like(start), residual, z, dot(residual, z), jnp.int32(0)))
    x = start + x
    return x if rank is None else _truncate(x, (u, lam), (v, sig), rank)


def _truncate(x: jax.Array, inputs: Any, outputs: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    (u, lam), (v, sig) = inputs, outputs
    # Directions without any weight would be divided by zero; they get a little.
    lam, sig = (
        jnp.sqrt(jnp.maximum(e, 1e-6 * jnp.max(e, axis=-1, keepdims=True) + jnp.finfo(e.dtype).tiny)) for e in (lam, sig)
    )
    inner = _flip(_into(v, _flip(_into(u, x)))) * lam[..., :, None] * sig[..., None, :]
    p, s, q = jnp.linalg.svd(inner, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a = _out_of(u, p[..., :, :rank] * root[..., None, :] / lam[..., :, None])
    b = _flip(_out_of(v, _flip(q[..., :rank, :] * root[..., :, None] / sig[..., None, :])))
    return a, b
