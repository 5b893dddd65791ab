r"""Fusion that knows the tasks' data by its second moments: Fisher merging, RegMean and its relatives, Kronecker fusion.

All of them minimise a sum over tasks of quadratic costs of missing the task's own change :math:`\Delta W_t`:

============== ================================================================ ========================================
method         cost of :math:`D = X - \Delta W_t`                               needs
============== ================================================================ ========================================
fisher         :math:`\sum_{ij} F_{t,ij} D_{ij}^2`                              ``kinds=("fisher",)``
regmean        :math:`\mathrm{tr}(D^\top G_t D)`                                ``kinds=("inputs",)``
gram           :math:`\mathrm{tr}(D^\top G_t D S_t)`                            ``kinds=("inputs", "outputs")``
============== ================================================================ ========================================

Statistics are given by task name and matched to the trees by name. A task whose statistics lack a parameter has no say there,
and must not have changed it. Parameters that no task has statistics of (norms, where only moments were collected) are
averaged. One task alone comes back bit for bit, at scale 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax.deltas import Change, LowRank, dense
from pefusion_jax.fusion.kronecker import as_matrix, from_matrix, regression, residual, solve, truncated, weighted
from pefusion_jax.fusion.matching import (
    averaged,
    by_name,
    check,
    fusion_of,
    matched,
    moments_shape,
    require,
    require_outputs,
    scaled,
    unbound,
)
from pefusion_jax.fusion.parts import Changes, Fusion
from pefusion_jax.moments import Moment, Moments, Statistics, dense_moment, moment_diagonal, times
from pefusion_jax.trees import wide_dtype


def fisher(
    statistics: Mapping[str, Statistics], *, scale: float | jax.Array = 1.0, normalize: bool = True, floor: float = 1e-6
) -> Fusion:
    r"""The average weighted by each task's diagonal Fisher information, element by element.

    .. math:: X = \lambda \frac{\sum_t \hat F_t \odot \Delta W_t}{\sum_t \hat F_t}, \qquad
       \hat F_t = \frac{F_t + \epsilon\, \mathrm{mean}\, F_t}{\lVert F_t \rVert}

    Args:
      statistics: task name -> statistics with ``kinds=("fisher",)``.
      scale: :math:`\lambda`; may be traced.
      normalize: divide a task's Fisher information by its norm over all parameters, so that all tasks weigh alike.
      floor: :math:`\epsilon`, relative to the mean information, so that an element that no task needs is
        averaged.

    Raises:
      ValueError: when fused, for tasks without statistics, or statistics of other parameters or shapes.

    Reference: M. Matena and C. Raffel, Merging Models with Fisher-Weighted Averaging, 2022. The normalisation is theirs; their
    floor is absolute, 1e-6.
    """
    weights: dict[str, Any] = {}
    for name, found in statistics.items():
        if not found.fisher:
            raise ValueError(f"the statistics of {name!r} have no Fisher diagonals; collect them with kinds=('fisher',)")
        count = sum(f.size for f in found.fisher.values())
        mean = sum(jnp.sum(f) for f in found.fisher.values()) / count
        tiny = jnp.finfo(jnp.float32).tiny
        # In units of the largest entry: the square of one below 1e-22 or above 1e19 is none of float32's numbers.
        most = functools.reduce(jnp.maximum, [jnp.max(f) for f in found.fisher.values()], jnp.float32(tiny))
        norm = most * jnp.sqrt(sum(jnp.sum(jnp.square(f / most)) for f in found.fisher.values()))
        by = jnp.maximum(norm, tiny) if normalize else jnp.ones((), jnp.float32)
        weights[name] = {path: (f + floor * jnp.maximum(mean, tiny)) / by for path, f in found.fisher.items()}

    def one(path: str, changes: tuple[Change, ...], found: list[Any]) -> Change:
        present = [(dense(change), f) for change, f in zip(changes, found, strict=True) if f is not None]
        return weighted([(change, f.astype(change.dtype)) for change, f in present])

    return by_name(weights, one, scale, lambda f: f.shape, "kinds=('fisher',)")


def regmean(
    statistics: Mapping[str, Statistics], *, scale: float | jax.Array = 1.0, off_diagonal: float = 0.95, damping: float = 1e-6
) -> Fusion:
    r"""The weight whose outputs are nearest to each task's own, on each task's own inputs, layer by layer.

    .. math:: X = \lambda \Big(\sum_t \hat G_t\Big)^{-1} \sum_t \hat G_t \Delta W_t, \qquad
       \hat G = \alpha G + (1 - \alpha)\,\mathrm{diag}(G) + \delta\,\tfrac{\mathrm{tr} G}{n} I

    Rows of embeddings are averaged by their frequencies, biases alike.

    Args:
      statistics: task name -> statistics with input moments.
      scale: :math:`\lambda`; may be traced.
      off_diagonal: :math:`\alpha`, in [0, 1]; the default is FusionBench's for CLIP.
      damping: :math:`\delta`. It stands on both sides: a direction that no task's inputs have is averaged, by the traces of the
        moments, or plainly where all are zero.

    Raises:
      ValueError: for settings outside their range; when fused, as :func:`fisher`.

    Reference: X. Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2023. They merge weights, which
    gives the same as merging changes; they sum where we average over positions, and have no damping.
    """
    check(off_diagonal, damping)

    def one(path: str, changes: tuple[Change, ...], found: list[Any]) -> Change:
        axes = next(f.axes for f in found if f is not None)
        return _regmean(changes, [None if f is None else f.inputs for f in found], axes, off_diagonal, damping)

    return by_name({t: s.moments for t, s in statistics.items()}, one, scale, moments_shape, "kinds=('inputs',)")


def regmean_shared(
    statistics: Mapping[str, Statistics], *, scale: float | jax.Array = 1.0, off_diagonal: float = 1.0, damping: float = 1e-6
) -> Fusion:
    r"""RegMean inside the low-rank space that all tasks share: same :math:`A`, merged :math:`B`, the rank stays :math:`r`.

    .. math:: B = \lambda \Big(\sum_t \hat Z_t\Big)^{-1} \sum_t \hat Z_t B_t, \qquad
       Z_t = A^\top G_t A = E[z z^\top], \; z = A^\top x

    This is the least-squares optimum among all changes :math:`A B`. It needs :math:`r \times r` moments only:
    see :func:`project`.

    Args:
      statistics: task name -> statistics with input moments, ``[in, in]`` or projected ``[r, r]``.
      scale, off_diagonal, damping: as in :func:`regmean`; there is little to shrink in ``r`` dimensions.

    Raises:
      ValueError: for settings outside their range; when fused, as :func:`fisher`, and if a change is no pair or tasks have
        different factors :math:`A`.

    Reference: X. Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2023, for the objective; the
    restriction to a shared factor, as in linearized LoRA with one random A for all tasks, is ours.
    """
    check(off_diagonal, damping)

    def one(path: str, changes: tuple[Change, ...], found: list[Any]) -> Change:
        pairs = [change for change in changes if isinstance(change, LowRank)]
        present = [pair for pair in pairs if pair.rank]
        if len(pairs) < len(changes) or not present:
            raise ValueError(
                f"the change of {path!r} is no low-rank pair; regmean_shared merges factors B beside one A for all"
            )
        a = present[0].a
        for other in present[1:]:
            known = not isinstance(a, jax.core.Tracer) and not isinstance(other.a, jax.core.Tracer)
            if a.shape != other.a.shape or (known and not bool(jnp.all(a == other.a))):
                raise ValueError(
                    f"the tasks have different factors A at {path!r}; train them with one A held still (one seed, and "
                    "freeze_a=True or linearize), or use regmean"
                )
        moments = [None if f is None else _projected(f.inputs, a) for f in found]
        bs = tuple(pair.b if pair.rank else jnp.zeros_like(present[0].b) for pair in pairs)
        b = _regmean(bs, moments, None, off_diagonal, damping)
        return dataclasses.replace(present[0], b=dense(b))

    # [in, in] or [r, r]: _projected looks which.
    return by_name({t: s.moments for t, s in statistics.items()}, one, scale, lambda found: None, "kinds=('inputs',)")


def project(statistics: Statistics, delta: Any) -> Statistics:
    r"""Input moments in the low-rank space of a change, :math:`A^\top G A`: all that :func:`regmean_shared` needs.

    Args:
      statistics: of a task, as collected.
      delta: the task's :class:`~pefusion_jax.deltas.Delta`, layers not stacked; parameters that are no pairs are left out.
    """
    pairs = {p: c for p, c in delta.leaves.items() if isinstance(c, LowRank) and p in statistics.moments}
    made = {p: Moments(_projected(statistics.moments[p].inputs, c.a), None, c.axes) for p, c in pairs.items()}
    return Statistics(made, {}, statistics.examples)


def gram(
    statistics: Mapping[str, Statistics],
    *,
    scale: float | jax.Array = 1.0,
    off_diagonal: float = 0.95,
    damping: float = 1e-3,
    iterations: int = 60,
    tolerance: float = 1e-4,
    rank: int | None = None,
    normalize: bool = True,
) -> Fusion:
    r"""Kronecker fusion: the weight that costs the tasks least by the moments of inputs and of output gradients together.

    .. math:: \sum_t \hat G_t X \hat S_t = \sum_t \hat G_t \Delta W_t \hat S_t, \qquad
       \hat M = \alpha M + (1 - \alpha)\,\mathrm{diag}(M) + \delta\,\tfrac{\mathrm{tr} M}{n} I

    and the result is :math:`\lambda X`. RegMean is the case :math:`S_t = I`: it makes up for what a task's inputs never
    reach, but takes every output for equally important. Solved by conjugate gradients in float32, preconditioned
    with the system's diagonal in the eigenbases of the mean factors; layers of one shape are solved together. Compressed
    moments are multiplied with as they are; their mean, for the eigenbases, is dense, and so is :math:`X` while it is solved
    for. Embeddings have a diagonal :math:`G`, biases :math:`G = 1`.

    Args:
      statistics: task name -> statistics with input and output moments, perhaps compressed.
      scale: :math:`\lambda`; may be traced.
      off_diagonal: :math:`\alpha`, in [0, 1]: shrinks correlations that few examples estimate badly.
      damping: :math:`\delta`, relative to the mean eigenvalue. It stands on both sides: where no task has data, changes are
        averaged.
      iterations: most iterations of the solver; the start is the average of the changes.
      tolerance: relative residual, in the preconditioner's norm, at which a layer is done. :func:`gram_residual` measures
        what was reached.
      rank: largest rank of the result, which then is a pair: truncated in the metric of the mean factors. ``None``: dense.
      normalize: divide each task's cost at each layer by :math:`\mathrm{tr} G_t\, \mathrm{tr} S_t`, so that a task with steeper
        likelihoods does not drown the others.

    Returns:
      A fusion for weight space.

    Raises:
      ValueError: for settings outside their range; when fused, as :func:`fisher`.

    Example::

      stats = {t.name: statistics(lora, params, taus[t.name], t) for t in tasks}
      merged = fuse(fusion.gram(stats), taus, adapted=lora, params=params)

    Reference: J. Martens and R. Grosse's Kronecker-factored curvature (2015) in the objective of M. Matena and C. Raffel's
    Fisher merging (2022); D. Tam et al., Merging by Matching Models in Task Parameter Subspaces, 2024, solve a like
    system. Shrinkage, normalisation and preconditioner are ours.
    """
    check(off_diagonal, damping)
    if iterations < 1 or not 0 < tolerance < 1 or (rank is not None and rank < 1):
        raise ValueError(f"iterations={iterations} must be 1 or more, tolerance={tolerance} in (0, 1), rank={rank} 1 or more")
    settings = (off_diagonal, damping, normalize)
    by_task = {t: s.moments for t, s in statistics.items()}
    require_outputs(by_task)

    def bind(names: tuple[str, ...]) -> Fusion:
        require(by_task, names, "statistics")

        def changes(by_path: Changes) -> dict[str, Change]:
            found, plain = matched(by_task, names, by_path, moments_shape)
            if len(names) == 1:
                out = {p: of_tasks[0] for p, of_tasks in by_path.items()}
                if rank is not None:
                    out |= {p: truncated(out[p], known[0], off_diagonal, damping, rank) for p, known in found.items()}
                return {p: scaled(c, scale) for p, c in out.items()}
            out = solve({p: by_path[p] for p in found}, found, *settings, iterations, tolerance, rank)
            return {p: scaled(c, scale) for p, c in (out | {p: averaged(by_path[p]) for p in plain}).items()}

        return fusion_of(changes)

    return Fusion(unbound, bind=bind)


def gram_residual(
    statistics: Mapping[str, Statistics],
    deltas: Mapping[str, Any],
    merged: Any,
    *,
    off_diagonal: float = 0.95,
    damping: float = 1e-3,
    normalize: bool = True,
) -> dict[str, float]:
    r"""How far a merged change is from solving :func:`gram`'s system, a parameter at a time.

    .. math:: \frac{\lVert \sum_t \hat G_t (X - \Delta W_t) \hat S_t \rVert}{\lVert \sum_t \hat G_t \Delta W_t \hat S_t \rVert}

    Args:
      statistics: task name -> statistics.
      deltas: task name -> the task's :class:`~pefusion_jax.deltas.Delta`, layers not stacked.
      merged: the merged Delta, at scale 1.
      off_diagonal, damping, normalize: as given to :func:`gram`.
    """

    def wide(change: Change) -> jax.Array:
        return dense(change).astype(wide_dtype(change.dtype))

    names = tuple(sorted(deltas))
    nothing = {p: jnp.zeros(c.shape, c.dtype) for d in deltas.values() for p, c in d.leaves.items()}
    by_path: Changes = {p: tuple(wide(deltas[name].leaves.get(p, zero)) for name in names) for p, zero in nothing.items()}
    found, _ = matched({t: s.moments for t, s in statistics.items()}, names, by_path, moments_shape)
    values = {p: residual(by_path[p], found[p], wide(merged.leaves[p]), off_diagonal, damping, normalize) for p in found}
    return {p: float(value) for p, value in values.items()}


def _projected(moment: Moment, a: jax.Array) -> jax.Array:
    inner, rank = a.shape[-2:]
    size = moment.shape[-1]
    if size == inner:
        a = a.astype(moment_diagonal(moment).dtype)
        return jnp.matmul(jnp.swapaxes(a, -1, -2), times(moment, a), precision=jax.lax.Precision.HIGHEST)
    if size == rank:
        return dense_moment(moment)
    raise ValueError(f"moments of size {size} belong neither to {inner} inputs nor to the rank {rank} of the change")


def _regmean(changes: tuple[Change, ...], inputs: list[Any], axes: Any, off_diagonal: Any, damping: Any) -> Change:
    """RegMean of changes that are pairs or dense, of the parameter's shape; ``None`` among ``inputs``: no say."""
    like = changes[0]
    terms = []
    for change, g in zip(changes, inputs, strict=True):
        if g is not None:
            side = (change.a, change.b) if isinstance(change, LowRank) else as_matrix(change, (*g.shape[:-1], -1), axes)
            terms.append((side, jax.tree.map(lambda leaf: leaf.astype(like.dtype), g)))
    # A traced one is not known to be below 1.
    shrunk = isinstance(off_diagonal, int | float) and off_diagonal < 1
    x = regression(terms, off_diagonal, damping, shrunk)
    return from_matrix(x, like.shape, like.axes if isinstance(like, LowRank) else axes)
