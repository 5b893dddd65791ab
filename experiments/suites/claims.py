"""What the paper on partial linearization claims, measured on a suite's own models: each claim with its figures.

Runs as a stage of run.py (``--stages claims``), on the first seed: angles between task vectors, disentanglement errors, and
scores of the fused tasks over subsets of two to all tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pefusion_jax as pf
from experiments.suites import scoring
from experiments.suites.kinds import Base, Tuned
from pefusion_jax import evaluation, fusion

SUBSETS = 4  # of each size, the same for every kind of tuning
ALPHAS = np.linspace(-2.0, 2.0, 9)
PAIRS = 3


def angles(tuned: Tuned, params: Any, out: Path, name: str) -> dict[str, Any]:
    """Mean cosine between the weight changes of different tasks, and its mean magnitude; the matrix as a plot with its CSV."""
    found = evaluation.cosine(tuned.changes(params))
    evaluation.plot_matrix(
        found.overall, found.names, out / f"cosine_{name}.png", title=f"{tuned.kind.title}: task vectors", label="cosine"
    )
    apart = found.overall[~np.eye(len(found.names), dtype=bool)]
    return {"mean cosine": float(apart.mean()), "mean |cosine|": float(np.abs(apart).mean()), "largest": float(apart.max())}


def disentanglement(tuned: Tuned, base: Base, tasks: Sequence[Any], out: Path, name: str) -> dict[str, Any]:
    """Mean disentanglement error on [0, 1]^2 and on the whole grid, over pairs of tasks that are spread over the suite."""
    names = [task.name for task in tasks]
    pairs = list(itertools.combinations(names, 2))
    pairs = pairs[:: max(1, len(pairs) // PAIRS)][:PAIRS]
    errors = {
        pair: evaluation.disentanglement_error(
            tuned.adapted, base.params, tuned.trees, pair, [task for task in tasks if task.name in pair], ALPHAS
        )
        for pair in pairs
    }
    for pair, error in errors.items():
        evaluation.plot_disentanglement(error, out / f"disentanglement_{name}_{'_'.join(pair)}.png", title=tuned.kind.title)
    return {
        "pairs": [" + ".join(pair) for pair in pairs],
        "error on [0, 1]^2": float(np.mean([error.inside for error in errors.values()])),
        "error": float(np.mean([error.error for error in errors.values()])),
    }


def over_subsets(
    tuned: Tuned, plain: pf.Adapted, base: Base, tasks: Sequence[Any], own: Mapping[str, Any], reference: Mapping[str, float]
) -> dict[str, Any]:
    """Task arithmetic over subsets of the tasks: normalized score of the fused tasks, the length chosen on their validation."""
    changes = scoring.dense_changes(tuned.changes(base.params))
    linear = tuned.kind.mode == "network"
    make = scoring.affine_scorer if linear else scoring.plain_scorer
    names = [task.name for task in tasks]
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {}
    for size in range(2, len(names) + 1):
        subsets = list(itertools.combinations(names, size))
        chosen = [subsets[i] for i in sorted(rng.permutation(len(subsets))[:SUBSETS])]
        absolute, normalized = [], []
        for subset in chosen:
            here = [task for task in tasks if task.name in subset]
            score = make(plain, base.params, here)
            total = pf.fuse(fusion.task_arithmetic(1.0), {name: changes[name] for name in subset})
            total = jax.tree.map(np.asarray, total)
            unit = float(np.mean([scoring.norm(changes[name]) for name in subset])) / scoring.norm(total)
            times, _ = scoring.best_length(score, total, unit, scoring.LENGTHS, reference, linear)
            test = score(total, [unit * times], "test")[0]
            absolute.append(test.mean)
            normalized.append(float(np.mean([test[name] / own[name] for name in subset])))
        rows[str(size)] = {
            "subsets": len(chosen),
            "mean": float(np.mean(absolute)),
            "normalized": float(np.mean(normalized)),
            "sd": float(np.std(normalized)),
        }
    return rows
