r"""Damped Newton for few variables, with an upper bound on how far from the optimum it stopped.

The objective is :math:`F(c) = L(c) + \frac{\mu}{2} \lVert c - c_0 \rVert^2`, in float64 on the host. ``L`` gives its value, its
gradient and a positive semi-definite curvature: the Hessian where ``L`` is convex, else a part of it (Gauss-Newton), so that
every step goes downhill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Function = Callable[[np.ndarray], float]
Model = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]

_INNER = 2000


class Minimum(NamedTuple):
    """Where a minimisation stopped.

    Attributes:
      point: ``[n]``.
      value: of the objective, penalty included.
      bound: upper bound of the value minus the smallest value, if the objective is convex; see :func:`minimise`.
      iterations: Newton steps.
    """

    point: np.ndarray
    value: float
    bound: float
    iterations: int


def minimise(
    value: Function,
    model: Model,
    start: np.ndarray,
    *,
    penalty: float = 0.0,
    center: np.ndarray | float = 0.0,
    blocks: int = 0,
    radius: float = 100.0,
    tolerance: float = 1e-7,
    iterations: int = 200,
) -> Minimum:
    r"""Minimises a smooth function, on all of space or on a product of simplices.

    For a convex ``F`` the bound follows from the gradient :math:`g` at the point alone:

    * :math:`\lVert g \rVert^2 / 2\mu` by strong convexity, if :math:`\mu > 0`;
    * :math:`\lVert g \rVert R` against every point within the distance :math:`R` (``radius``). If no minimiser is that near
      this says nothing about them; it is the only bound there is for :math:`\mu = 0`, where they may lie at infinity. The
      smaller of the two counts, and it is this one exactly if it is above :math:`2 \mu R^2`;
    * on simplices :math:`\langle g, c \rangle - \min_s \langle g, s \rangle`, the Frank-Wolfe gap.

    Args:
      value: the function ``L`` alone.
      model: value, gradient ``[n]`` and curvature ``[n, n]`` of ``L``.
      start: ``[n]``; projected onto the simplices.
      penalty: :math:`\mu`.
      center: :math:`c_0`.
      blocks: number of simplices, each over ``n / blocks`` consecutive variables; 0 for no constraint.
      radius: :math:`R`.
      tolerance: stop when the bound is this small.
      iterations: largest number of steps.
    """
    c0 = np.broadcast_to(np.asarray(center, np.float64), start.shape)
    point = np.array(start, np.float64) if not blocks else project(np.array(start, np.float64), blocks)

    def total(c: np.ndarray) -> float:
        return value(c) + 0.5 * penalty * float(np.sum((c - c0) ** 2))

    def full(c: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        here, slope, curvature = model(c)
        here += 0.5 * penalty * float(np.sum((c - c0) ** 2))
        return here, slope + penalty * (c - c0), curvature + penalty * np.eye(len(c))

    def bound_at(c: np.ndarray, slope: np.ndarray) -> float:
        if blocks:
            return frank_wolfe_gap(c, slope, blocks)
        length = float(np.linalg.norm(slope))
        return min(length * radius, length**2 / (2 * penalty) if penalty > 0 else np.inf)

    here, slope, curvature = full(point)
    bound, done = bound_at(point, slope), 0
    while bound > tolerance and done < iterations:
        step = _on_simplices(point, slope, curvature, blocks) - point if blocks else _newton_step(slope, curvature)
        descent = float(slope @ step)
        if not descent < 0:
            break
        length = 1.0
        while not (after := total(point + length * step)) <= here + 1e-4 * length * descent and length > 1e-12:
            length *= 0.5
        # Near the minimum the gain is below rounding before the gradient is: then the whole step counts if it lowers the bound.
        moved = point + (length if after < here else 1.0) * step
        moved = project(moved, blocks) if blocks else moved  # only rounding
        tried = full(moved)
        if not (after < here or bound_at(moved, tried[1]) < bound):
            break
        point, (here, slope, curvature) = moved, tried
        bound, done = bound_at(point, slope), done + 1
    return Minimum(point, here, bound, done)


def project(point: np.ndarray, blocks: int) -> np.ndarray:
    """The nearest point of the product of simplices: each of ``blocks`` rows is non-negative and sums to 1.

    Reference: Held, Wolfe and Crowder, *Validation of subgradient optimization*, 1974, for the projection by sorting.
    """
    rows = point.reshape(blocks, -1)
    falling = -np.sort(-rows, axis=1)
    excess = np.cumsum(falling, axis=1) - 1.0
    count = np.arange(1, rows.shape[1] + 1)[None, :]
    last = np.sum(falling * count > excess, axis=1) - 1
    shift = np.take_along_axis(excess, last[:, None], axis=1) / (last[:, None] + 1)
    return np.maximum(rows - shift, 0.0).reshape(-1)


def frank_wolfe_gap(point: np.ndarray, slope: np.ndarray, blocks: int) -> float:
    r""":math:`\max_s \langle g, c - s \rangle` over the simplices, at least the value minus the minimum if convex."""
    return max(0.0, float(slope @ point - np.sum(slope.reshape(blocks, -1).min(axis=1))))


def _newton_step(slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Solves with as little damping as a Cholesky factorisation needs; flat directions have no gradient."""
    size = max(float(np.trace(curvature)) / len(slope), np.finfo(np.float64).tiny)
    damping = 1e-12 * size
    while True:
        try:
            factor = np.linalg.cholesky(curvature + damping * np.eye(len(slope)))
            return -np.linalg.solve(factor.T, np.linalg.solve(factor, slope))
        except np.linalg.LinAlgError:
            damping *= 100.0


def _on_simplices(point: np.ndarray, slope: np.ndarray, curvature: np.ndarray, blocks: int) -> np.ndarray:
    """Minimises the quadratic model on the simplices by accelerated projected gradient steps with restarts."""
    lipschitz = max(float(np.linalg.eigvalsh(curvature)[-1]), 1e-12)
    outer = frank_wolfe_gap(point, slope, blocks)
    best = ahead = point
    momentum = 1.0
    for _ in range(_INNER):
        moved = project(ahead - (slope + curvature @ (ahead - point)) / lipschitz, blocks)
        if float((ahead - moved) @ (moved - best)) > 0:  # uphill: begin anew
            momentum, ahead = 1.0, best
            continue
        following = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * momentum**2))
        ahead, best, momentum = moved + (momentum - 1.0) / following * (moved - best), moved, following
        if frank_wolfe_gap(best, slope + curvature @ (best - point), blocks) < 1e-3 * outer:
            break
    return best
