r"""Fusion in common coordinates: the changes of all tasks are written in one basis, and any method fuses what is left.

Each matrix, a low-rank pair or a dense leaf with two axes, is replaced by its coordinates; the inner method gets those of all
parameters as one tree, so that what it ranks or counts over the whole tree it still does. Everything else (biases, scales,
convolution kernels) is given to the inner method as it is. Bases are singular vectors of all tasks' changes together: they
depend on neither the order of the tasks nor on how a pair is split into its factors, and a dense leaf has the same ones.

Directions whose singular value is zero up to rounding (below ``eps * max(inputs, outputs)`` times the largest) are left out.
Under ``jax.jit`` shapes cannot depend on values: there they stay as zeros, which a method that keeps a share of the entries
counts. It only matters where the rank is below the sum of the tasks' ranks, or a dense change has low rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.deltas import Change
from pefusion_jax.fusion.elementwise import task_arithmetic, ties
from pefusion_jax.fusion.matrices import as_pairs, bound, isotropic, of_changes, small, stacked_dense
from pefusion_jax.fusion.parts import Changes, Fusion
from pefusion_jax.in_turn import after, in_turn


class Coordinates(NamedTuple):
    """One parameter's changes in a common basis.

    Attributes:
      stack: ``[task, *batch, m, n]``.
      left: ``[*batch, inputs, m]``, or ``None`` where the inputs are as they were.
      right: ``[*batch, n, outputs]``.
      shape: ``(inputs, outputs)``.
    """

    stack: jax.Array
    left: jax.Array | None
    right: jax.Array
    shape: tuple[int, int]


class Changed(NamedTuple):
    """The changes of one parameter as pairs of factors ``[*batch, inputs, r]`` and ``[*batch, r, outputs]``.

    A dense matrix D is the pair of an identity (``None``) and D.
    """

    a: Sequence[jax.Array | None]
    b: Sequence[jax.Array]

    @property
    def shape(self) -> tuple[int, int]:
        """``(inputs, outputs)``."""
        a, b = self.a[0], self.b[0]
        return (b.shape[-2] if a is None else a.shape[-2]), b.shape[-1]


def knots(inner: Fusion | None = None, scale: float | jax.Array = 1.0) -> Fusion:
    r"""KnOTS: one basis of the outputs for all tasks; what each task has in it is fused by any method.

    .. math:: [\Delta_1; \dots; \Delta_T] = [C_1; \dots; C_T]\, V^\top, \qquad
       \delta = \lambda\, \mathrm{inner}(C_1, \dots, C_T)\, V^\top

    V are the right singular vectors of the changes ``[inputs, outputs]`` on top of each other. A low-rank result has a rank of
    at most :math:`\sum_t r_t`. One task alone comes back bit for bit under a linear inner method of weight 1.

    Args:
      inner: how the coordinates are fused; ``None`` is :func:`~pefusion_jax.fusion.ties` at its defaults, as in the paper.
      scale: :math:`\lambda`; may be traced.

    Reference:
      Stoica et al., *Model Merging with SVD to Tie the Knots*, 2025. The authors leave out singular values below 1e-5, whatever
      the largest is.
    """
    inner = ties() if inner is None else inner

    def represent(given: Changed) -> Coordinates:
        return _coordinates(given, "outputs")

    return _aligned(represent, inner, scale, lambda method: knots(method, scale), linear=True)


def core_space(
    inner: Fusion | None = None,
    scale: float | jax.Array = 1.0,
    *,
    isotropize: bool = False,
    bases: Literal["changes", "factors"] = "changes",
) -> Fusion:
    r"""Core Space: common bases of inputs and outputs; the small cores between them are fused by any method.

    .. math:: \Delta_t = U M_t V^\top, \qquad \delta = \lambda\, U\, \mathrm{inner}(M_1, \dots, M_T)\, V^\top

    Nothing of a task is lost; linear methods give what they give without it. A low-rank result has a rank of at most
    :math:`\sum_t r_t`. One task alone comes back bit for bit under a linear inner method of weight 1.

    Args:
      inner: how the cores are fused; ``None`` is their sum, task arithmetic at scale 1.
      scale: :math:`\lambda`; may be traced.
      isotropize: make the singular values of each fused core equal, as :func:`~pefusion_jax.fusion.iso_c` does.
      bases: ``"changes"``: singular vectors of :math:`[\Delta_1 \cdots \Delta_T]` and :math:`[\Delta_1; \dots; \Delta_T]`.
        ``"factors"``: of :math:`[A_1 \cdots A_T]` and :math:`[B_1; \dots; B_T]`, as the authors do; they move when A is
        multiplied by a matrix and B by its inverse, which changes nothing else, and a dense leaf has none.

    Raises:
      ValueError: if the option is unknown; when it is applied, if a matrix is dense and ``bases="factors"``.

    Reference:
      Panariello et al., *Accurate and Efficient Low-Rank Model Merging in Core Space*, 2025. We depart in the bases unless
      ``bases="factors"``; the cores differ by a rotation, which element-wise methods notice.
    """
    if bases not in ("changes", "factors"):
        raise ValueError(f"core_space takes its bases from 'changes' or 'factors', not {bases!r}")
    inner = task_arithmetic(1.0) if inner is None else inner

    def represent(given: Changed) -> Coordinates:
        if bases == "factors" and given.a[0] is None:
            raise ValueError(f"a dense change {list(given.shape)} has no factors; pass core_space(bases='changes')")
        return _coordinates(given, bases)

    def again(method: Fusion) -> Fusion:
        return core_space(method, scale, isotropize=isotropize, bases=bases)

    return _aligned(represent, inner, scale, again, linear=not isotropize, equalize=isotropize)


def compress_then_merge(rank: int, inner: Fusion | None = None, scale: float | jax.Array = 1.0, *, sweeps: int = 2) -> Fusion:
    r"""Compress, then merge: common bases of rank r found before anything is fused, so that the result has rank r.

    .. math:: \min_{U, V} \sum_t \|\Delta_t - U M_t V^\top\|_F^2, \quad M_t = U^\top \Delta_t V \in \mathbb R^{r \times r},
       \qquad \delta = \lambda\, U\, \mathrm{inner}(M_1, \dots, M_T)\, V^\top

    The bases start as the leading singular vectors of all changes together; each sweep then settles U for V and V for U.

    Args:
      rank: r.
      inner: how the cores are fused; ``None`` is their sum, task arithmetic at scale 1.
      scale: :math:`\lambda`; may be traced.
      sweeps: of the alternation; 0 keeps the starting bases.

    Raises:
      ValueError: if the rank is below 1 or there are fewer than 0 sweeps.

    Reference:
      He et al., *Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter*, 2026, for the order of the two; De
      Lathauwer et al., *On the Best Rank-1 and Rank-(R1, ..., RN) Approximation of Higher-Order Tensors*, 2000, for the
      alternation. The authors' blend of norms is left out: choose ``scale`` instead.
    """
    if not isinstance(rank, Integral) or rank < 1:
        raise ValueError(f"compress_then_merge needs a rank of at least 1, a whole number, not {rank}")
    if not isinstance(sweeps, Integral) or sweeps < 0:
        raise ValueError(f"compress_then_merge cannot take {sweeps} sweeps; give a whole number")
    inner = task_arithmetic(1.0) if inner is None else inner

    def represent(given: Changed) -> Coordinates:
        return _truncated(_coordinates(given, "changes"), rank, sweeps)

    return _aligned(represent, inner, scale, lambda method: compress_then_merge(rank, method, scale, sweeps=sweeps))


def _aligned(
    represent: Callable[[Changed], Coordinates],
    inner: Fusion,
    scale: float | jax.Array,
    again: Callable[[Fusion], Fusion],
    *,
    linear: bool = False,
    equalize: bool = False,
) -> Fusion:
    """A method that fuses coordinates; ``linear``: under a linear inner method it is that method."""

    def fuse(given: dict[str, Any]) -> dict[str, Any]:
        """Path -> pairs, or stacked leaf; to fused pair or leaf."""
        matrices: dict[str, Changed] = {}
        handed: dict[str, jax.Array] = {}
        out: dict[str, Any] = {}
        for path, of_tasks in given.items():
            if isinstance(of_tasks, tuple) and not sum(pair.rank for pair in of_tasks):
                out[path] = of_tasks[0]
            elif isinstance(of_tasks, tuple) or of_tasks.ndim == 3:
                matrices[path] = _widened(of_tasks)
            else:
                handed[path] = of_tasks.astype(trees.wide_dtype(of_tasks.dtype))
        spaces = dict(zip(matrices, in_turn(represent, matrices.values()), strict=True))
        apart = {path: _one_each(path, space.stack) for path, space in spaces.items()}
        for entries in apart.values():
            handed |= entries
        fused = inner.apply(handed) if handed else {}
        for path, entries in apart.items():
            of_batch = [fused.pop(entry) for entry in entries]
            fused[path] = jnp.stack(of_batch).reshape(spaces[path].stack.shape[1:])
        last = None
        for path in fused:
            space, like = spaces.get(path), given[path]
            value = fused[path] * jnp.asarray(scale, fused[path].dtype)
            if space is None:
                out[path] = value.astype(like.dtype)
                continue
            right = space.right
            if equalize:
                value, turned = isotropic(after(value, last), space.shape)
                right = turned @ right
                last = turned
            a = value if space.left is None else space.left @ value
            if isinstance(like, tuple):
                dtype = like[0].dtype
                out[path] = dataclasses.replace(like[0], a=a.astype(dtype), b=right.astype(dtype))
            else:
                out[path] = (a @ right).astype(like.dtype)
        return {path: out[path] for path in given}

    def apply(stacked: Any) -> Any:
        leaves, structure = jax.tree.flatten(stacked)
        if linear and inner.weights is not None and len(leaves[0]) == 1:
            return jax.tree.map(lambda leaf: leaf * jnp.asarray(scale, leaf.dtype), inner.apply(stacked))
        with jax.default_matmul_precision("highest"):
            fused = fuse(dict(zip(trees.paths(stacked), leaves, strict=True)))
        return jax.tree.unflatten(structure, list(fused.values()))

    def changes(given: Changes) -> dict[str, Change]:
        if linear and inner.weights is not None and len(next(iter(given.values()), ())) == 1:
            return {path: change * jnp.asarray(scale, change.dtype) for path, change in of_changes(inner, given).items()}
        with jax.default_matmul_precision("highest"):
            return fuse({path: as_pairs(of_tasks) or stacked_dense(of_tasks) for path, of_tasks in given.items()})

    return Fusion(apply, tasks=inner.tasks, changes=changes, bind=bound(inner, again))


def _one_each(path: str, stack: jax.Array) -> dict[str, jax.Array]:
    """A leaf ``[task, m, n]`` for each matrix of a batch (of experts), which the inner method would not take for matrices."""
    if stack.ndim == 3:
        return {path: stack}
    entries = stack.reshape(len(stack), -1, *stack.shape[-2:])
    return {f"{path}/{entry}": entries[:, entry] for entry in range(entries.shape[1])}


def _widened(of_tasks: Any) -> Changed:
    """Pairs or stacked matrices, in float32 or wider."""
    if isinstance(of_tasks, tuple):
        wide = trees.wide_dtype(of_tasks[0].dtype)
        return Changed([pair.a.astype(wide) for pair in of_tasks], [pair.b.astype(wide) for pair in of_tasks])
    return Changed([None] * len(of_tasks), list(of_tasks.astype(trees.wide_dtype(of_tasks.dtype))))


def _coordinates(given: Changed, bases: str) -> Coordinates:
    """The changes in common bases, which are as wide as their rank where that is known."""
    stack, left, right, ranks = _in_bases(given, bases)
    if not isinstance(right, jax.core.Tracer):
        m, n = (max(1, int(jnp.max(rank))) for rank in ranks)
        stack, right = stack[..., :n], right[..., :n, :]
        if left is not None:
            stack, left = stack[..., :m, :], left[..., :m]
    return Coordinates(stack, left, right, given.shape)


@functools.partial(jax.jit, static_argnames="bases")
def _in_bases(given: Changed, bases: str) -> Any:
    """Coordinates and both bases at full width, directions of singular values of zero being zeros; and their ranks."""
    if bases == "factors":
        right, rank = _basis(jnp.concatenate(given.b, axis=-2), given.shape)
        columns = jnp.concatenate([a for a in given.a if a is not None], axis=-1)
    else:
        right, rank = _basis(_rows(given), given.shape)
        columns = _columns(after(given, right))
    left, ranks = None, (rank, rank)
    if bases != "outputs":
        rows, own = _basis(after(columns.mT, right), given.shape)
        left, ranks = rows.mT, (own, rank)

    def project(a: jax.Array | None, b: jax.Array) -> jax.Array:
        turned = b @ right.mT
        if a is None:
            return turned if left is None else left.mT @ turned
        return (a if left is None else left.mT @ a) @ turned

    return jnp.stack([project(a, b) for a, b in zip(given.a, given.b, strict=True)]), left, right, ranks


def _truncated(whole: Coordinates, rank: int, sweeps: int) -> Coordinates:
    """The coordinates in bases of at most ``rank`` directions, settled by alternation."""
    left, right = whole.left, whole.right
    if left is None:
        raise ValueError("bases are truncated on both sides, and there is none of the inputs")
    stack, p, q = _settled(whole.stack, rank, sweeps)
    return Coordinates(stack, left @ p, q.mT @ right, whole.shape)


@functools.partial(jax.jit, static_argnames=("rank", "sweeps"))
def _settled(stack: jax.Array, rank: int, sweeps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Smaller cores of ``[task, *batch, m, n]``, and the bases of m and of n that they are in."""
    batch = stack.shape[1:-2]
    # The coordinates are those of leading singular vectors, so the first ones are where the alternation starts.
    p, q = (
        jnp.broadcast_to(jnp.eye(size, min(rank, size), dtype=stack.dtype), (*batch, size, min(rank, size)))
        for size in stack.shape[-2:]
    )
    for _ in range(sweeps):
        p = _leading([core @ q for core in stack], rank)
        q = _leading([core.mT @ p for core in stack], rank)
    return jnp.stack([p.mT @ core @ q for core in stack]), p, q


def _rows(given: Changed) -> jax.Array:
    """Rows with the same right singular vectors and values as all changes on top of each other."""

    def upper(part: tuple[jax.Array | None, jax.Array]) -> jax.Array:
        a, b = part
        return b if a is None else jnp.linalg.qr(a, mode="r") @ b

    return jnp.concatenate(in_turn(upper, zip(given.a, given.b, strict=True)), axis=-2)


def _columns(given: Changed) -> jax.Array:
    """Columns with the same left singular vectors and values as all changes side by side."""

    def lower(part: tuple[jax.Array | None, jax.Array]) -> jax.Array:
        a, b = part
        return b if a is None else a @ jnp.linalg.qr(b.mT, mode="r").mT

    return jnp.concatenate(in_turn(lower, zip(given.a, given.b, strict=True)), axis=-1)


def _basis(rows: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Orthonormal rows that span ``rows`` ``[..., m, n]``: right singular vectors, with fixed signs; and their number."""
    if rows.shape[-2] > rows.shape[-1]:
        rows = jnp.linalg.qr(rows, mode="r")
    _, s, vt = jnp.linalg.svd(rows, full_matrices=False)
    kept = ~small(s, shape)
    largest = jnp.take_along_axis(vt, jnp.argmax(jnp.abs(vt), axis=-1)[..., None], axis=-1)
    sign = jnp.where(largest < 0, -1, 1).astype(vt.dtype)
    return vt * sign * kept[..., None].astype(vt.dtype), jnp.sum(kept, axis=-1)


def _leading(columns: Sequence[jax.Array], rank: int) -> jax.Array:
    """The leading left singular vectors of matrices ``[..., m, n]`` side by side."""
    u, _, _ = jnp.linalg.svd(jnp.concatenate(columns, axis=-1), full_matrices=False)
    return u[..., :rank]
