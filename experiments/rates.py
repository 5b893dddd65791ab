"""The choice of a learning rate, the same for all experiments with few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

WIDER = 2  # times that a grid may grow


def best_rate(score: Callable[[float], float], rates: Sequence[float], say: Callable[[str], None]) -> dict[str, Any]:
    """The rate with the highest score; of several such the middle one.

    While the best one is at an end of the grid, the grid grows there by its own ratio, at most ``WIDER`` times: else a method
    whose grid happened to lie well would be favoured.

    Args:
      score: learning rate -> validation score.
      rates: the grid, in ascending order.
      say: told every score.

    Returns:
      ``rate``, and ``validation``: rate -> score.
    """
    found: dict[float, float] = {}

    def tried(rate: float) -> float:
        found[rate] = score(rate)
        say(f"rate {rate:g}: validation {found[rate]:.3f}")
        return rate

    grid = [tried(rate) for rate in rates]
    for _ in range(WIDER):
        best = max(found.values())
        at = [rate for rate in grid if found[rate] == best]
        if len(at) > 1 or len(grid) < 2 or at[0] not in (grid[0], grid[-1]):
            break
        if at[0] == grid[-1]:
            grid.append(tried(float(f"{grid[-1] ** 2 / grid[-2]:.1g}")))
        else:
            grid.insert(0, tried(float(f"{grid[0] ** 2 / grid[1]:.1g}")))
    best = max(found.values())
    at = [rate for rate in grid if found[rate] == best]
    return {"rate": at[len(at) // 2], "validation": {f"{rate:g}": found[rate] for rate in grid}}
