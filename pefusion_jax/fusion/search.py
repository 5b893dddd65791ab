r"""Fusion methods that search their coefficients on data.

.. math:: \tau^{(g)} = \sum_t \lambda_t^{(g)} \tau_t^{(g)}, \qquad \lambda = \arg\min L(\tau)

::

    loss = fusion.objective(lora, params, tasks, "entropy")
    fused = pf.fuse(fusion.adamerging(loss, report=print), trees, adapted=lora, params=params)

Each function gives a :class:`Fusion` that searches when it is applied, so that it works wherever a method does: on Deltas
(low-rank pairs stay pairs), on plain trees, in either space. What is found goes to ``report``, as :class:`Found`;
``found.fusion`` is the same combination without a search. The same arguments find the same coefficients.

Where what is fused are displacements of a network-linear model, ``evaluation.solve_coefficients`` finds the optimum itself.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefusion_jax import trees
from pefusion_jax.deltas import Delta
from pefusion_jax.fusion.grouped import (
    GroupOf,
    by_layer,
    by_tensor,
    combine_changes,
    combine_stacked,
    numbered,
    per_group,
    whole,
)
from pefusion_jax.fusion.objectives import Objective
from pefusion_jax.fusion.parts import Changes, Fusion


class Found(NamedTuple):
    """What a search found.

    Attributes:
      coefficients: group -> tree name -> coefficient.
      losses: ``[step]`` or ``[evaluation]``, the objective as it was met, penalties included.
      groups: path -> group.
    """

    coefficients: dict[str, dict[str, float]]
    losses: np.ndarray
    groups: GroupOf

    @property
    def fusion(self) -> Fusion:
        """The combination with these coefficients, without a search."""
        return per_group(self.coefficients, self.groups)


Report = Callable[[Found], Any]


def adamerging(
    loss: Objective,
    *,
    layerwise: bool = True,
    steps: int = 500,
    learning_rate: float = 1e-3,
    start: float = 0.3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    report: Report | None = None,
) -> Fusion:
    r"""AdaMerging: coefficients by Adam on the entropy of the predictions, without labels.

    Args:
      loss: ``objective(..., "entropy")``; each step takes one batch of every task.
      layerwise: one coefficient for each task and tensor; else one for each task.
      steps: updates; 500 in the authors' script.
      learning_rate: of Adam, the authors' 1e-3. Over 500 steps a coefficient moves by at most about 0.5.
      start: of every coefficient, the authors' 0.3.
      bounds: coefficients are kept in this interval; ``None`` for no bounds.
      report: gets the :class:`Found`.

    Reference:
      Yang et al., *AdaMerging: Adaptive Model Merging for Multi-Task Learning*, 2024. They adapt on the test inputs; which
      inputs these are is up to ``loss`` here. They clamp coefficients where they are used; we project after each update, so
      that a coefficient can leave a bound again.
    """
    return _by_adam(loss, by_tensor if layerwise else whole, steps, learning_rate, start, bounds, report)


def atlas(
    loss: Objective,
    *,
    groups: GroupOf = by_tensor,
    steps: int = 300,
    learning_rate: float = 1e-2,
    start: float = 0.0,
    report: Report | None = None,
) -> Fusion:
    r"""aTLAS: anisotropic scaling of task vectors, one coefficient for each task and parameter block.

    Args:
      loss: ``objective(..., examples=16)`` for few labelled examples, or ``"entropy"`` for none.
      groups: path -> block; every tensor by default.
      steps: updates of Adam. Steps and learning rate are our defaults.
      learning_rate: of Adam.
      start: of every coefficient; the authors start at the base model.
      report: gets the :class:`Found`.

    Reference:
      Zhang et al., *Knowledge Composition using Task Vectors with Learned Anisotropic Scaling*, 2024. Adam here, without weight
      decay.
    """
    return _by_adam(loss, groups, steps, learning_rate, start, None, report)


def lora_soups(
    loss: Objective,
    *,
    groups: GroupOf = by_layer,
    steps: int = 100,
    learning_rate: float = 5e-3,
    start: float | None = None,
    report: Report | None = None,
) -> Fusion:
    r"""LoRA Soups (CAT): learned scalars for each task and layer on a small mixed labelled set.

    .. math:: \Delta W^l = \sum_t \alpha_t^l A_t^l B_t^l

    Concatenated factor pairs at rank :math:`\sum_t r_t`, which ``compress`` brings back to a rank of your choice.

    Args:
      loss: ``objective(..., split="train", examples=...)``: each step takes a batch of every task.
      groups: path -> group; numbered layers by default, ``by_tensor`` for one scalar a matrix.
      steps: updates of Adam. Steps and learning rate are our defaults.
      learning_rate: of Adam.
      start: of every coefficient; ``None`` is the average, one by the number of trees.
      report: gets the :class:`Found`.

    Reference:
      Prabhakar et al., *LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks*, 2024.
    """
    return _by_adam(loss, groups, steps, learning_rate, start, None, report)


def lorahub(
    loss: Objective,
    *,
    budget: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    seed: int = 42,
    report: Report | None = None,
) -> Fusion:
    r"""LoraHub: one coefficient for each task, by search without gradients on few labelled examples.

    .. math:: \min_{|\lambda_t| \le b} L(\lambda) + \frac{\rho}{T} \sum_t |\lambda_t|

    with nevergrad's NGOpt from :math:`\lambda = 0`; all batches of the objective count in each evaluation. The best point that
    was evaluated is taken.

    Args:
      loss: ``objective(..., examples=5)``, for example.
      budget: evaluations; the authors' 40.
      bound: of every coefficient, the authors' 1.5.
      l1: :math:`\rho`, the authors' 0.05.
      seed: of the search.
      report: gets the :class:`Found`.

    Raises:
      ImportError: when it is applied, if nevergrad is not installed.

    Reference:
      Huang et al., *LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition*, 2023. They combine the factors
      A and B apart, so that products of different tasks appear. Here the weight changes are combined if ``fuse`` gets
      ``adapted`` and ``params``; their way is ``fuse(..., space="adapter")``.
    """
    if budget < 1 or bound <= 0 or l1 < 0:
        raise ValueError(f"budget={budget} must be 1 or more, bound={bound} positive and l1={l1} not negative")

    def find(space: _Space) -> tuple[np.ndarray, list[Any]]:
        nevergrad = _nevergrad()
        values: list[float] = []
        points: list[np.ndarray] = []

        def cost(point: np.ndarray) -> float:
            value = float(space.value(loss, np.asarray(point, np.float32)[None, :])) + l1 * float(np.mean(np.abs(point)))
            points.append(np.array(point, np.float32))
            values.append(value)
            return value

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solvers that NGOpt picks warn about their own settings
            variables = nevergrad.p.Array(init=np.zeros(space.trees)).set_bounds(-bound, bound)
            variables.random_state.seed(seed)
            nevergrad.optimizers.NGOpt(parametrization=variables, budget=budget).minimize(cost)
        return points[int(np.argmin(values))][None, :], values

    return _searched(find, whole, report)


def _nevergrad() -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError(
            "lorahub searches with nevergrad, which is not installed; pip install 'pefusion-jax[search]'"
        ) from error
    return nevergrad


class _Space(NamedTuple):
    """The combinations of given trees, as a function of coefficients ``[group, tree]``."""

    groups: tuple[str, ...]
    of_leaf: tuple[tuple[str, int], ...]  # path -> place of its group
    trees: int
    data: Any  # a stacked tree, or path -> one change for each tree
    pairs: bool  # which of the two

    def value(self, loss: Objective, point: np.ndarray) -> float:
        """The objective over all batches."""
        means = []
        for term in loss.terms:
            program = _total(term.function, self.of_leaf, self.pairs)
            parts = [program(jnp.asarray(point), self.data, term.arrays, batch) for batch in term.batches]
            means.append(sum(float(total) for total, _ in parts) / max(sum(float(count) for _, count in parts), 1.0))
        return sum(means) / len(means)


def _searched(find: Callable[[_Space], tuple[np.ndarray, list[Any]]], groups: GroupOf, report: Report | None) -> Fusion:
    def bind(names: tuple[str, ...]) -> Fusion:
        def solve(paths: list[str], data: Any, pairs: bool) -> Fusion:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(data)):
                raise ValueError("a search looks at values, so it cannot run under jit; fuse outside, then jit what is found")
            found_groups = tuple(sorted({groups(path) for path in paths}))
            of_leaf = tuple((path, found_groups.index(groups(path))) for path in paths)
            point, losses = find(_Space(found_groups, of_leaf, len(names), data, pairs))
            history = np.asarray([float(value) for value in losses], np.float64)
            if not (np.isfinite(point).all() and np.isfinite(history).all()):
                raise ValueError(
                    f"the search met {int((~np.isfinite(history)).sum())} losses of {len(history)} that are not finite; "
                    "try a smaller learning rate, or a start nearer to 0"
                )
            table = {
                group: {name: float(c) for name, c in zip(names, row, strict=True)}
                for group, row in zip(found_groups, point, strict=True)
            }
            found = Found(table, history, groups)
            if report is not None:
                report(found)
            return per_group(table, groups).bind(names)  # type: ignore[misc]  # per_group always has one

        def apply(stacked: Any) -> Any:
            return solve(list(trees.paths(stacked)), stacked, False).apply(stacked)

        def changes(given: Changes) -> Any:
            return solve(list(given), given, True).changes(given)  # type: ignore[misc]  # and so has what it binds

        return Fusion(apply, changes=changes)

    return Fusion(lambda stacked: bind(numbered(len(jax.tree.leaves(stacked)[0]))).apply(stacked), bind=bind)


def _by_adam(
    loss: Objective,
    groups: GroupOf,
    steps: int,
    learning_rate: float,
    start: float | None,
    bounds: tuple[float, float] | None,
    report: Report | None,
) -> Fusion:
    if steps < 0 or learning_rate <= 0:
        raise ValueError(f"steps={steps} must be 0 or more and learning_rate={learning_rate} positive")

    def find(space: _Space) -> tuple[np.ndarray, list[Any]]:
        value = 1.0 / space.trees if start is None else start
        point = jnp.full((len(space.groups), space.trees), value, jnp.float32)
        begin, update = _adam(float(learning_rate), bounds)
        state, losses = begin(point), []
        for step in range(steps):
            values, slopes = [], []
            for term in loss.terms:
                program = _slope(term.function, space.of_leaf, space.pairs)
                here, slope = program(point, space.data, term.arrays, term.batches[step % len(term.batches)])
                values.append(here)
                slopes.append(slope)
            mean, point, state = update(point, state, values, slopes)
            losses.append(mean)  # not read yet: the host runs ahead of the device
        return np.asarray(point), losses

    return _searched(find, groups, report)


@functools.lru_cache(maxsize=16)
def _adam(learning_rate: float, bounds: tuple[float, float] | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    optimizer = optax.adam(learning_rate)

    @jax.numpy_dtype_promotion("standard")  # optax mixes Python floats with its integer counters
    @jax.jit
    def update(point: jax.Array, state: Any, values: list[jax.Array], slopes: list[jax.Array]) -> Any:
        steps, state = optimizer.update(sum(slopes[1:], slopes[0]) / len(slopes), state, point)
        moved = optax.apply_updates(point, steps)
        moved = moved if bounds is None else jnp.clip(moved, bounds[0], bounds[1])
        return sum(values[1:], values[0]) / len(values), moved, state

    return optimizer.init, update


# Keyed by functions and paths; all arrays are arguments of the programs.
@functools.lru_cache(maxsize=64)
def _total(function: Any, of_leaf: tuple[tuple[str, int], ...], pairs: bool) -> Callable[..., Any]:
    places = dict(of_leaf)

    def run(point: jax.Array, data: Any, arrays: Any, batch: Any) -> Any:
        def of(path: str) -> list[jax.Array]:
            return [point[places[path], t] for t in range(point.shape[1])]

        fused = Delta(combine_changes(data, of)) if pairs else combine_stacked(data, of)
        return function(arrays, fused, batch)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def _slope(function: Any, of_leaf: tuple[tuple[str, int], ...], pairs: bool) -> Callable[..., Any]:
    total = _total(function, of_leaf, pairs)

    def mean(point: jax.Array, data: Any, arrays: Any, batch: Any) -> jax.Array:
        value, count = total(point, data, arrays, batch)
        return value / jnp.maximum(count, 1.0)

    return jax.jit(jax.value_and_grad(mean))
