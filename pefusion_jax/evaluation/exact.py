r"""The best coefficients of a network-linear model, found on cached features without another forward pass.

    cached = cache_outputs(linear, params, taus, tasks)                  # T + 1 forwards of each validation split
    best = best_combination(cached, tasks)                               # milliseconds
    fused = pf.fuse(pf.fusion.task_arithmetic(best.by_name()), taus)

The features are :math:`f_0 + \sum_j c_j J\tau_j` exactly, so the validation loss is a function of a few coefficients:

* ``"cross_entropy"`` (each task's own loss, labelled; squared error for regressions), the mean over tasks of each task's mean.
  Convex where the head's logits are linear in the features. A zero-shot head is not: its logits are cosines. The result is
  then a local minimum, below the start in any case, and there is no certificate (``gap`` is ``None``).
* ``"entropy"`` of the predictions, unlabelled: never convex, local minimum, no certificate.
* ``"least_squares"``, unlabelled: the features of each task's own model are the targets,
  :math:`\frac1K \sum_k \lVert \sum_j c_j J\tau_j(x_k) - J\tau_k(x_k) \rVert^2 / \lVert J\tau_k(x_k) \rVert^2`. Convex with any
  head.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pefusion_jax.evaluation.fits import Fit, fit_of
from pefusion_jax.evaluation.groups import Grouped
from pefusion_jax.evaluation.newton import minimise
from pefusion_jax.evaluation.report import Comparison, Row
from pefusion_jax.evaluation.scores import Scores, named_tasks
from pefusion_jax.evaluation.sweep import Cached, best_coefficients, sweep
from pefusion_jax.tasks.task import Task

Loss = Literal["cross_entropy", "entropy", "least_squares"]
Tasks = Iterable[Task] | Mapping[str, Task]


class Solution(NamedTuple):
    r"""Coefficients that minimise a loss on cached features.

    Attributes:
      names: names of the displacements, or of (group, displacement) pairs.
      coefficients: ``[displacement]``, in that order; 0 for those that were left out.
      loss: without the penalty.
      objective: what was minimised: the loss plus :math:`\frac{\mu}{2} \lVert c - c_0 \rVert^2`.
      gap: certified upper bound of how much smaller the objective is anywhere else: at any coefficients on simplices, and if
        the gap is at most :math:`2 \mu R^2` for :math:`R` = ``radius``; otherwise, as always with ``l2=0``, at those within
        ``radius`` of these. ``None`` where the problem is not convex.
      iterations: Newton steps.
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    loss: float
    objective: float
    gap: float | None
    iterations: int

    def by_name(self) -> dict[str, float]:
        """Name -> coefficient, as ``fusion.task_arithmetic`` takes it."""
        return dict(zip(self.names, map(float, self.coefficients), strict=True))


class Combination(NamedTuple):
    """What :func:`best_combination` chose.

    Attributes:
      names: names of the displacements, or of (group, displacement) pairs.
      coefficients: ``[displacement]``.
      score: mean (normalized) score over tasks, on the split that was cached.
      grid_score: the best such score on the grid; never above ``score``.
      source: ``"grid"``, or the loss and penalty that gave the coefficients.
      solutions: source -> the solution, chosen or not.
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    score: float
    grid_score: float
    source: str
    solutions: dict[str, Solution]

    def by_name(self) -> dict[str, float]:
        """Name -> coefficient, as ``fusion.task_arithmetic`` takes it."""
        return dict(zip(self.names, map(float, self.coefficients), strict=True))


class Subsets(NamedTuple):
    """Solutions of subsets of the displacements, from :func:`solve_subsets`.

    Attributes:
      members: the names in each subset.
      solutions: one for each subset.
      scores: ``[subset, task]``, on the split that was cached.
      tasks: names of the tasks, in the order of the columns.
    """

    members: tuple[tuple[str, ...], ...]
    solutions: tuple[Solution, ...]
    scores: np.ndarray
    tasks: tuple[str, ...]

    def comparison(self, reference: Mapping[str, float] | None = None, title: str = "") -> Comparison:
        """The table: a row for each subset, a column for each task."""
        rows = [
            Row(" + ".join(names), f"{len(names)} adapters", Scores(dict(zip(self.tasks, row.tolist(), strict=True))))
            for names, row in zip(self.members, self.scores, strict=True)
        ]
        return Comparison(rows, reference, title)


def solve_coefficients(
    cached: Cached | Grouped,
    tasks: Tasks,
    *,
    loss: Loss = "cross_entropy",
    l2: float = 1e-3,
    center: float = 0.0,
    simplex: bool = False,
    members: Collection[str] | None = None,
    start: Any = None,
    radius: float = 100.0,
    tolerance: float = 1e-7,
) -> Solution:
    r"""Minimises a loss over coefficients, by damped Newton steps in float64 on the host.

    .. math:: \min_c \; \frac1K \sum_k L_k(f_0 + \textstyle\sum_j c_j J \tau_j) + \frac{\mu}{2} \lVert c - c_0 \rVert^2

    Args:
      cached: features by displacement (:func:`cache_outputs`), or by group and displacement (:func:`cache_groups`).
      tasks: whose losses count; their heads are taken from here.
      loss: see the module docstring. The features themselves are float32; they define the problem.
      l2: :math:`\mu`.
      center: :math:`c_0`, the same for all coefficients.
      simplex: coefficients are not negative and sum to 1, for each group.
      members: names of the displacements that may take part; all by default. Coefficients of the others are 0.
      start: ``[displacement]``, where to begin; matters only if the problem is not convex. ``center`` by default.
      radius: how far the certificate has to reach where ``l2`` alone gives none, see :class:`Solution`; iterations stop by it.
      tolerance: the certified gap at which to stop.

    Returns:
      The solution, with its certificate if the problem is convex.

    Raises:
      ValueError: if a task is not cached, has a loss that is not known here, or for ``"least_squares"`` has no displacement of
        its name, or one that does nothing.
    """
    problem = _prepared(cached, tasks, loss)
    return _solve(problem, cached, l2, center, simplex, members, start, radius, tolerance)


def solve_subsets(
    cached: Cached | Grouped,
    tasks: Tasks,
    *,
    sizes: Collection[int] | None = None,
    over: Literal["members", "all"] = "members",
    **options: Any,
) -> Subsets:
    """:func:`solve_coefficients` for every subset of the displacements, all from one cache, and their scores on every task.

    Args:
      cached: see :func:`solve_coefficients`, also for the ``options``.
      tasks: the tasks; the scores have a column for each.
      sizes: sizes of the subsets; all by default.
      over: whose losses are minimised: those of the tasks that the members are named after, or of all tasks.

    Raises:
      ValueError: as :func:`solve_coefficients`, or if a member has no task of its name with ``over="members"``.
    """
    by_name = named_tasks(tasks)
    names = cached.names
    wanted = range(1, len(names) + 1) if sizes is None else sorted(sizes)
    members = tuple(subset for size in wanted for subset in itertools.combinations(names, size))
    if over not in ("members", "all"):
        raise ValueError(f"over={over!r} must be 'members' or 'all'")
    if over == "members" and not set(names) <= set(by_name):
        raise ValueError(f"no tasks named {', '.join(sorted(set(names) - set(by_name)))}; pass them, or over='all'")
    if not members:
        raise ValueError(f"there is no subset of {len(names)} displacements of the sizes {list(wanted)}")
    prepared = _prepared(cached, by_name, options.pop("loss", "cross_entropy"))
    defaults = {"l2": 1e-3, "center": 0.0, "simplex": False, "start": None, "radius": 100.0, "tolerance": 1e-7}
    if unknown := set(options) - set(defaults):
        raise ValueError(f"unknown options {', '.join(sorted(unknown))}; known are loss, {', '.join(defaults)}")
    settings = defaults | options
    solutions = tuple(
        _solve({n: prepared[n] for n in (subset if over == "members" else by_name)}, cached, members=subset, **settings)
        for subset in members
    )
    scores = sweep(_plain(cached), by_name, np.stack([solution.coefficients for solution in solutions]))
    return Subsets(members, solutions, scores, tuple(by_name))


def best_combination(
    cached: Cached | Grouped,
    tasks: Tasks,
    *,
    losses: Sequence[Loss] = ("cross_entropy",),
    l2: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    grid: Any = None,
    reference: Mapping[str, float] | Sequence[float] | np.ndarray | None = None,
    simplex: bool = False,
) -> Combination:
    """The best of the solved coefficients and of a grid, by score on the split that was cached: never worse than the grid.

    A lower loss is no higher score, so every candidate is scored; that is arithmetic on cached features too.

    Args:
      cached: see :func:`solve_coefficients`.
      tasks: the tasks.
      losses: the losses to minimise.
      l2: a solution for each of these.
      grid: ``[point, displacement]``; by default one coefficient for all, at 21 values from 0 to 1.
      reference: scores of each task's own model, to normalize by: task name -> score, or in the order of the tasks.
      simplex: see :func:`solve_coefficients`. The grid is not bound by it.

    Returns:
      The best candidate; of equal scores the first solution, and the grid only if no solution reaches it.

    Raises:
      ValueError: as :func:`solve_coefficients`, or if references by name are not those of exactly these tasks.
    """
    plain, by_name = _plain(cached), named_tasks(tasks)
    if isinstance(reference, Mapping):
        if reference.keys() != by_name.keys():
            raise ValueError(f"reference has scores of {', '.join(reference)}; give one for each of {', '.join(by_name)}")
        reference = [reference[name] for name in by_name]
    points = np.linspace(0, 1, 21)[:, None] * np.ones((1, len(plain.names))) if grid is None else np.asarray(grid, np.float64)
    on_grid = best_coefficients(points, sweep(plain, by_name, points), reference)
    solutions: dict[str, Solution] = {}
    for loss in losses:
        problem = _prepared(cached, by_name, loss)
        for penalty in l2:
            # From the best point of the grid: where there are several minima, the one that is found lies below it.
            name = f"{loss}, l2 {penalty:g}"
            solutions[name] = _solve(problem, cached, penalty, 0.0, simplex, None, on_grid.coefficients, 100.0, 1e-7)
    candidates = np.stack([*(s.coefficients for s in solutions.values()), np.asarray(on_grid.coefficients, np.float64)])
    scores = sweep(plain, by_name, candidates)
    means = [best_coefficients(candidates[i : i + 1], scores[i : i + 1], reference).score for i in range(len(candidates))]
    order = sorted(range(len(candidates)), key=lambda i: (-round(means[i], 12), i == len(solutions), i))
    sources = [*solutions, "grid"]
    return Combination(plain.names, candidates[order[0]], means[order[0]], means[-1], sources[order[0]], solutions)


def _plain(cached: Cached | Grouped) -> Cached:
    return cached.cached if isinstance(cached, Grouped) else cached


def _prepared(cached: Cached | Grouped, tasks: Tasks, loss: str) -> dict[str, Fit]:
    fits = {}
    for name, task in named_tasks(tasks).items():
        names = cached.names * len(cached.groups) if isinstance(cached, Grouped) else cached.names
        fits[name] = fit_of(_plain(cached), task, loss, [place for place, of in enumerate(names) if of == name])
    return fits


def _solve(
    fits: Mapping[str, Fit],
    cached: Cached | Grouped,
    l2: float,
    center: float,
    simplex: bool,
    members: Collection[str] | None,
    start: Any,
    radius: float,
    tolerance: float,
) -> Solution:
    if not (l2 >= 0 and radius > 0 and tolerance > 0):
        raise ValueError(f"l2={l2} must not be negative, radius={radius} and tolerance={tolerance} must be positive")
    blocks = len(cached.groups) if isinstance(cached, Grouped) else 1
    names, count = _plain(cached).names, len(cached.names)
    allowed = set(cached.names) if members is None else set(members)
    if not allowed or not allowed <= set(cached.names):
        raise ValueError(f"members={sorted(allowed)} must be some of the displacements {', '.join(cached.names)}")
    keep = np.asarray([block * count + t for block in range(blocks) for t in range(count) if cached.names[t] in allowed])
    begin = np.full(len(names), float(center)) if start is None else np.asarray(start, np.float64)
    if begin.shape != (len(names),) or not np.isfinite(begin).all():
        raise ValueError(f"start has shape {begin.shape}; needed are {len(names)} finite coefficients")
    used = [fit if members is None else fit.restricted(keep) for fit in fits.values()]

    def value(c: np.ndarray) -> float:
        return sum(fit.value(c) for fit in used) / len(used)

    def model(c: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        parts = [fit.model(c) for fit in used]
        here = sum(part[0] for part in parts) / len(parts)
        return here, np.mean([part[1] for part in parts], axis=0), np.mean([part[2] for part in parts], axis=0)

    convex = all(fit.convex for fit in used)
    found = minimise(
        value,
        model,
        begin[keep],
        penalty=l2,
        center=center,
        blocks=blocks if simplex else 0,
        radius=radius,
        # Without convexity the bound is only a measure of the gradient, and that is no better than float32.
        tolerance=tolerance if convex else max(tolerance, 1e-5),
    )
    coefficients = np.zeros(len(names))
    coefficients[keep] = found.point
    return Solution(names, coefficients, value(found.point), found.value, found.bound if convex else None, found.iterations)
