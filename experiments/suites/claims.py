"""What the paper on partial linearization claims, measured on a suite's own models: each claim with its figures.

Runs as a stage of run.py (``--stages claims``), on the first seed: angles between task vectors, disentanglement errors, and
scores of the fused tasks over subsets of two to all tasks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pefusion_jax as pf
from experiments.rows import markdown
from experiments.suites import scoring, tables
from experiments.suites.kinds import KINDS, Base, Tuned
from pefusion_jax import evaluation, files, fusion, trees

SUBSETS = 4  # of each size, the same for every kind of tuning
ALPHAS = np.linspace(-2.0, 2.0, 9)
PAIRS = 3
NEEDS = "stored statistics"  # what the best method may need at most


def angles(tuned: Tuned, params: Any, out: Path, name: str) -> dict[str, Any]:
    """Mean cosine between the weight changes of different tasks, and its mean magnitude; the matrix as a plot with its CSV.

    The paper's angles are those of the trained factors, so these are measured as well.
    """
    found = evaluation.cosine(tuned.changes(params))
    evaluation.plot_matrix(
        found.overall, found.names, out / f"cosine_{name}.png", title=f"{tuned.kind.title}: task vectors", label="cosine"
    )
    others = ~np.eye(len(found.names), dtype=bool)
    apart = found.overall[others]
    still = 1.0 if tuned.kind.mode is None else 0.0  # displacements start at zero
    moved = {task: jax.tree.map(lambda a, b: a - still * b, tree, tuned.start) for task, tree in tuned.trees.items()}
    factors = np.asarray(trees.cosine(moved))[others]
    return {
        "mean cosine": float(apart.mean()),
        "mean |cosine|": float(np.abs(apart).mean()),
        "largest": float(apart.max()),
        "mean |cosine| of factors": float(np.abs(factors).mean()),
    }


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
    names = [task.name for task in tasks]

    @functools.cache
    def outputs(split: str) -> evaluation.Cached:
        """Every subset of a network-linear model follows from the features of its task vectors."""
        return evaluation.cache_outputs(tuned.adapted, base.params, tuned.trees, tasks, split=split, batch_size=scoring.BATCH)

    def scorer(here: Sequence[Any]) -> scoring.Scorer:
        if not linear:
            return scoring.plain_scorer(plain, base.params, here)
        fused = {task.name for task in here}

        def score(change: pf.Delta, scales: Sequence[float], split: str) -> list[evaluation.Scores]:
            del change  # the sum of the task vectors
            cached = outputs(split)
            points = np.asarray([[scale * (name in fused) for name in cached.names] for scale in scales])
            return [evaluation.accuracy_scores(here, row, cached.labels) for row in evaluation.sweep(cached, here, points)]

        return score

    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {}
    for size in range(2, len(names) + 1):
        subsets = list(itertools.combinations(names, size))
        chosen = [subsets[i] for i in sorted(rng.permutation(len(subsets))[:SUBSETS])]
        absolute, normalized = [], []
        for subset in chosen:
            here = [task for task in tasks if task.name in subset]
            score = scorer(here)
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
            "sd": float(np.std(normalized, ddof=1)) if len(normalized) > 1 else 0.0,
        }
    return rows


def write(rows: Mapping[str, Any], out: Path) -> None:
    """``claims.md``: each claim with the figures of every kind that was measured, and a plot of scores over subsets."""
    kinds = [kind for kind in KINDS if f"claims/{kind}/subsets" in rows]
    if len(kinds) < 2 or "lora" not in kinds:
        return
    of = {part: {kind: rows[f"claims/{kind}/{part}"] for kind in kinds} for part in ("angles", "disentanglement")}
    of["subsets"] = {kind: {k: v for k, v in rows[f"claims/{kind}/subsets"].items() if k.isdigit()} for kind in kinds}
    best = {
        line["kind"]: line["normalized"] for line in tables.best_rows(tables.summarize(rows)) if line["needs at most"] == NEEDS
    }
    best = {kind: best[KINDS[kind].title] for kind in kinds}
    sizes = sorted(map(int, of["subsets"]["lora"]))
    sub = {kind: [of["subsets"][kind][str(size)]["normalized"] for size in sizes] for kind in kinds}
    table = [
        (f"task arithmetic on {size} tasks, normalized", {k: sub[k][place] for k in kinds}) for place, size in enumerate(sizes)
    ]
    table += [
        (f"best method that needs at most {NEEDS}, normalized", best),
        ("mean absolute cosine of weight changes", {k: of["angles"][k]["mean |cosine|"] for k in kinds}),
        ("mean absolute cosine of factors", {k: of["angles"][k]["mean |cosine| of factors"] for k in kinds}),
        ("disentanglement error on [0, 1]^2", {k: of["disentanglement"][k]["error on [0, 1]^2"] for k in kinds}),
        ("disentanglement error on [-2, 2]^2", {k: of["disentanglement"][k]["error"] for k in kinds}),
    ]
    columns = ("", *(KINDS[kind].title for kind in kinds))
    lines = [*markdown(columns, [(what, *(values[kind] for kind in kinds)) for what, values in table]), ""]
    linear = [kind for kind in kinds if KINDS[kind].mode is not None]
    for kind in linear:
        title = KINDS[kind].title
        gap = [ours - theirs for ours, theirs in zip(sub[kind], sub["lora"], strict=True)]
        verdicts = {
            "fuses better than LoRA": gap[-1] > 0 and best[kind] > best["lora"],
            "the gap to LoRA grows with the number of tasks": gap[-1] > 0 and gap[-1] > gap[0],
            "task vectors are less alike": table[-3][1][kind] < table[-3][1]["lora"],
            "disentanglement error is lower": table[-2][1][kind] < table[-2][1]["lora"],
        }
        lines += [f"- {title}: {what}: {'reproduced' if held else 'not reproduced'} here." for what, held in verdicts.items()]
    files.write_atomically(out / "claims.md", ("\n".join(lines) + "\n").encode())
    curves = {}
    for kind in kinds:
        found = of["subsets"][kind]
        curves[KINDS[kind].title] = {float(n): (found[str(n)]["normalized"], found[str(n)]["sd"]) for n in sizes}
    evaluation.plot_curves(curves, out / "subsets.png", x="number of fused tasks", y="normalized score, task arithmetic")
