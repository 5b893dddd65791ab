"""Tables of a suite's rows: mean and spread over seeds; absolute, normalized and worst task."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.suites.kinds import KINDS
from pefusion_jax import files

COLUMNS = ("kind", "method", "data", "seeds", "mean", "mean sd", "normalized", "normalized sd", "worst", "of LoRA")


def summarize(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each kind and method; normalized by the single-task models of the same kind and seed, task by task."""
    own = {(r["kind"], r["seed"]): r["scores"] for r in rows.values() if r.get("method") == "single-task models"}
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
                    ratios = [row["scores"][task] / own[kind, seed][task] for task in row["scores"]]
                    relative.append(float(np.mean(ratios)))
                    worst.append(min(ratios))
                if ("lora", seed) in own:
                    of_lora.append(float(np.mean([row["scores"][t] / own["lora", seed][t] for t in row["scores"]])))
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


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def write(rows: Mapping[str, Any], out: Path) -> None:
    """Writes ``results.md`` and ``results.csv``."""
    lines = summarize(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    files.write_atomically(out / "results.csv", text.getvalue().encode())
    cells = [[_cell(line[column]) for column in COLUMNS] for line in lines]
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3)]
    table += ["| " + " | ".join(row) + " |" for row in cells]
    files.write_atomically(out / "results.md", ("\n".join(table) + "\n").encode())


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
