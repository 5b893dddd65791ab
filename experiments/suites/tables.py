"""Tables of a suite's rows: mean and spread over seeds; absolute, normalized and worst task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rows import markdown, write_tables
from experiments.suites.kinds import KINDS
from experiments.suites.methods import METHODS
from pefusion_jax.evaluation import plot_ranking

LOWEST = 0.15
COLUMNS = ("kind", "method", "data", "seeds", "mean", "mean sd", "normalized", "normalized sd", "worst", "of LoRA")


def summarize(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each kind and method; normalized by the single-task models of the same kind and seed, task by task.

    Ratios leave out tasks that a single-task model of any seed does not reach ``LOWEST`` on: next to 0 they say nothing.
    """
    own = {(r["kind"], r["seed"]): r["scores"] for r in rows.values() if r.get("method") == "single-task models"}
    low = {(kind, task) for (kind, _), scores in own.items() for task, score in scores.items() if score < LOWEST}
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows.values():
        if "scores" in row:
            groups.setdefault((row["kind"], row["method"]), []).append(row)
    lines = []
    for (kind, method), found in groups.items():
        absolute, relative, worst, of_lora = [], [], [], []
        for row in found:
            absolute.append(row["mean"])
            seeds = [row["seed"]] if row["seed"] is not None else sorted({seed for _, seed in own})
            for seed in seeds:
                if (kind, seed) in own:
                    kept = [task for task in row["scores"] if (kind, task) not in low]
                    ratios = [row["scores"][task] / own[kind, seed][task] for task in kept]
                    relative.append(float(np.mean(ratios)))
                    worst.append(min(ratios))
                if ("lora", seed) in own:
                    kept = [task for task in row["scores"] if ("lora", task) not in low]
                    of_lora.append(float(np.mean([row["scores"][task] / own["lora", seed][task] for task in kept])))
        lines.append(
            {
                "kind": KINDS[kind].title if kind in KINDS else kind,
                "method": method,
                "data": found[0]["data"],
                "seeds": len(found),
                "mean": _mean(absolute),
                "mean sd": _spread(absolute),
                "normalized": _mean(relative),
                "normalized sd": _spread(relative),
                "worst": _mean(worst),
                "of LoRA": _mean(of_lora),
            }
        )
    order = {kind.title: place for place, kind in enumerate(KINDS.values())}
    return sorted(lines, key=lambda line: (order.get(line["kind"], -1), -(line["mean"] or 0)))


NEEDS = ("nothing", "stored statistics", "unlabelled examples", "labelled examples")


def best_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best line of each kind among the methods that need no more than this of other tasks' data.

    A length that is chosen by validation scores needs labelled examples, whatever the method itself needs.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        method = METHODS.get(line["method"])
        if method is None or line["normalized"] is None:
            continue
        own = {"none": 0, "statistics": 1, "unlabelled": 2, "labelled": 3}[method.data]
        for place, need in enumerate(NEEDS):
            if (own if method.fixed and not method.tuned else 3) <= place:
                key = (line["kind"], need)
                if key not in found or line["normalized"] > found[key]["normalized"]:
                    found[key] = {**line, "needs at most": need}
    order = list(dict.fromkeys(kind for kind, _ in found))
    return sorted(found.values(), key=lambda line: (order.index(line["kind"]), NEEDS.index(line["needs at most"])))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def write(rows: Mapping[str, Any], out: Path) -> None:
    """``results.md``, the best methods first, and ``results.csv``."""
    lines = summarize(rows)
    few = ("kind", "needs at most", "method", "seeds", "mean", "normalized", "worst")
    best = markdown(few, [[line[column] for column in few] for line in best_rows(lines)], texts=3)
    every = [[line[column] for column in COLUMNS] for line in lines]
    write_tables(out, best, markdown(COLUMNS, every, texts=3), columns=COLUMNS, lines=every)
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for line in lines:
        if line["method"] in METHODS:
            groups.setdefault(line["kind"], {})[line["method"]] = (line["mean"], line["mean sd"] or 0.0)
    beside = ("zero-shot", "single-task models", "multi-task training")
    first = next(iter(KINDS.values())).title
    among = {line["method"]: line["mean"] for line in lines if line["kind"] in ("base model", first)}
    if groups:
        known = {f"{first}, {name}" if name != beside[0] else name: among[name] for name in beside if name in among}
        plot_ranking(groups, out / "ranking.png", x="mean score of the tasks", lines=known)
