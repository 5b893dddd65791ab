"""Scores of weight-space directions at several lengths, for plain models by running them and for affine ones exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pefusion_jax as pf
from pefusion_jax import evaluation

BATCH = 32
LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # relative to the mean length of the task vectors
WIDER = 4  # steps that the grid may grow beyond its ends

# (change, scales, split) -> scores at each scale.
Scorer = Callable[[pf.Delta, Sequence[float], str], list[evaluation.Scores]]


def norm(change: pf.Delta) -> float:
    """Length of a change taken as one vector."""
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in change.dense().leaves.values())))


def plain_scorer(adapted: pf.Adapted, params: Any, tasks: Sequence[Any]) -> Scorer:
    """Runs the model at every scale. Changes are multiplied out, so that one compiled program serves every method."""

    def score(change: pf.Delta, scales: Sequence[float], split: str) -> list[evaluation.Scores]:
        dense = change.dense()
        return [
            evaluation.evaluate(adapted, params, dense * np.float32(scale), tasks, split=split, batch_size=BATCH)
            for scale in scales
        ]

    return score


def affine_scorer(adapted: pf.Adapted, params: Any, tasks: Sequence[Any]) -> Scorer:
    """One forward pass of a network-linear model gives a direction's features, and with the base's those at every scale."""
    known: dict[str, evaluation.Cached] = {}

    def features(change: pf.Delta, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {t.name: evaluation.predict(adapted, params, change, t, split=split, batch_size=BATCH) for t in tasks}

    def score(change: pf.Delta, scales: Sequence[float], split: str) -> list[evaluation.Scores]:
        dense = change.dense()
        if split not in known:
            still = features(dense * np.float32(0), split)
            base, labels = ({name: pair[i] for name, pair in still.items()} for i in (0, 1))
            known[split] = evaluation.Cached(("direction",), base, {}, labels, split, len(tasks), 0)
        cached = known[split]
        moved = {name: (found - cached.base[name])[None] for name, (found, _) in features(dense, split).items()}
        table = evaluation.sweep(cached._replace(moved=moved), tasks, np.asarray(scales)[:, None])
        return [evaluation.accuracy_scores(tasks, row, cached.labels) for row in table]

    return score


def dense_changes(changes: Mapping[str, pf.Delta]) -> dict[str, pf.Delta]:
    """Changes multiplied out, as numpy arrays: fusing them compiles for one structure only."""
    return {name: jax.tree.map(np.asarray, change.dense()) for name, change in changes.items()}


def best_length(
    score: Scorer, direction: pf.Delta, unit: float, lengths: Sequence[float], reference: Mapping[str, float], at_once: bool
) -> tuple[float, float]:
    """The length, in units, with the best mean validation score relative to ``reference``, and that score.

    Without ``at_once``, which takes all lengths in one call, it climbs: every other inner length, then the neighbours of the
    best until it has none that was not tried. While the best is at an end, the grid grows there by its own ratio, at most
    ``WIDER`` steps in all.
    """
    found: dict[float, float] = {}
    todo = list(lengths) if at_once or len(lengths) < 4 else list(lengths[1:-1:2])
    most = len(lengths) + (WIDER if len(lengths) > 1 else 0)
    while todo:
        for length, scores in zip(todo, score(direction, [unit * length for length in todo], "validation"), strict=True):
            found[length] = float(np.mean([scores[name] / max(reference[name], 1e-9) for name in scores]))
        place = lengths.index(max(found, key=lambda length: found[length]))
        if len(lengths) < most and lengths[place] in found and place in (0, len(lengths) - 1):
            if place == 0:
                lengths, place = [float(f"{lengths[0] ** 2 / lengths[1]:.2g}"), *lengths], 1
            else:
                lengths = [*lengths, float(f"{lengths[-1] ** 2 / lengths[-2]:.2g}")]
        todo = [length for length in lengths[max(place - 1, 0) : place + 2] if length not in found]
    best = max(found, key=lambda length: found[length])
    return best, found[best]
