"""Comparison tables: methods as rows, tasks as columns; as text, Markdown, CSV and JSON.

The JSON file (``results.json``) is an object:

* ``schema``: ``"pefusion_jax.comparison.v1"``; ``title``: string; ``tasks``: task names in column order;
* ``rows``: objects with ``name``, ``kind``, ``scores``, ``stderr`` and ``counts`` (each task name -> number),
  ``mean``, ``mean_stderr`` (number or null), ``worst``, ``worst_task``, and ``normalized`` (task name ->
  number, or null) with ``normalized_mean`` (number or null).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pefusion_jax.evaluation.scores import Scores
from pefusion_jax.files import write_atomically

SCHEMA = "pefusion_jax.comparison.v1"


class Row(NamedTuple):
    """One line of a comparison.

    Attributes:
      name: the method, such as ``"TIES"``.
      kind: what it was applied to, such as ``"LoRA"`` or ``"L-LoRA"``; rows of one kind stand together in
        plots.
      scores: its scores.
      reference: task name -> score by which this row is normalized, in place of the comparison's.
    """

    name: str
    kind: str
    scores: Scores
    reference: Mapping[str, float] | None = None

    def normalized(self, reference: Mapping[str, float] | None) -> Scores | None:
        """Scores relative to the row's own reference, or else to the one given; ``None`` without any."""
        chosen = self.reference if self.reference is not None else reference
        return None if chosen is None else self.scores.normalized(chosen)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table of methods by tasks; printing it prints aligned text.

    Attributes:
      rows: in the order in which they are shown; all with scores for the same tasks.
      reference: task name -> score of each task's own model, which rows are normalized by.
      title: shown above tables and in plots.

    Raises:
      ValueError: if there are no rows, or one has other tasks than the first.
    """

    rows: Sequence[Row]
    reference: Mapping[str, float] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise ValueError("a comparison needs at least one row")
        for row in self.rows:
            if set(row.scores) != set(self.tasks):
                raise ValueError(
                    f"row {row.name!r} has scores for {', '.join(row.scores)}, but row "
                    f"{self.rows[0].name!r} for {', '.join(self.tasks)}; evaluate all rows on the same tasks"
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the first row."""
        return tuple(self.rows[0].scores)

    @property
    def header(self) -> list[str]:
        """Column names."""
        return _header(self.tasks)

    def cells(self, row: Row) -> list[float | None]:
        """The numbers of a row: tasks, mean, mean of the normalized scores (or ``None``), worst."""
        relative = row.normalized(self.reference)
        tasks: list[float | None] = [row.scores[task] for task in self.tasks]
        return [*tasks, row.scores.mean, None if relative is None else relative.mean, row.scores.worst]

    def __str__(self) -> str:
        return as_text(self.to_dict())

    def markdown(self) -> str:
        """A Markdown table; scores in percent, the best of a kind in each column in bold."""
        return as_markdown(self.to_dict())

    def csv(self) -> str:
        """Comma-separated values at full precision, each task followed by its standard errors."""
        return as_csv(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`json` writes; see the module's docstring."""
        rows = []
        for row in self.rows:
            relative = row.normalized(self.reference)
            rows.append(
                {
                    "name": row.name,
                    "kind": row.kind,
                    **row.scores.to_dict(),
                    "normalized": None if relative is None else dict(relative),
                    "normalized_mean": None if relative is None else relative.mean,
                }
            )
        return {"schema": SCHEMA, "title": self.title, "tasks": list(self.tasks), "rows": rows}

    def json(self) -> str:
        """JSON text, in the schema of the module's docstring; numbers that are not finite become null."""
        return json.dumps(_plain(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def write(self, folder: str | os.PathLike[str], name: str = "results") -> list[Path]:
        """Writes ``name.txt``, ``name.md``, ``name.csv`` and ``name.json`` into a folder, each atomically.

        Returns:
          The four paths.
        """
        texts = {"txt": f"{self}\n", "md": self.markdown(), "csv": self.csv(), "json": self.json()}
        written = []
        for suffix, text in texts.items():
            path = Path(folder) / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
            written.append(path)
        return written


# The tables are made of what to_dict gives and the JSON file holds, so that a file can be compared with what it should say.
def as_text(table: Mapping[str, Any]) -> str:
    """The aligned text of a comparison's dictionary, without a last line break."""
    lines = [list(map(_line, _header(table["tasks"])))]
    lines += [[_line(row["name"]), _line(row["kind"]), *_texts(table, row)] for row in table["rows"]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(([table["title"], ""] if table["title"] else []) + [text[0], "-" * max(map(len, text)), *text[1:]])


def as_markdown(table: Mapping[str, Any]) -> str:
    """The Markdown of a comparison's dictionary."""
    header = _header(table["tasks"])
    title = [f"**{_line(table['title'])}**", ""] if table["title"] else []
    lines = [*title, f"| {' | '.join(map(_escape, header))} |", "|" + " --- |" * 2 + " ---: |" * (len(header) - 2)]
    known: dict[tuple[str, int], list[float]] = {}  # kind, column -> values
    for row in table["rows"]:
        for column, value in enumerate(_values(table, row)):
            if value is not None:
                known.setdefault((row["kind"], column), []).append(value)
    best = {place: max(rivals) for place, rivals in known.items() if len(rivals) > 1}
    for row in table["rows"]:
        cells = enumerate(zip(_values(table, row), _texts(table, row), strict=True))
        bold = [
            f"**{text}**" if value is not None and value == best.get((row["kind"], c)) else text for c, (value, text) in cells
        ]
        lines.append("| " + " | ".join([_escape(row["name"]), _escape(row["kind"]), *bold]) + " |")
    return "\n".join(lines) + "\n"


def as_csv(table: Mapping[str, Any]) -> str:
    """The comma-separated values of a comparison's dictionary."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tasks = [name for task in table["tasks"] for name in (task, f"{task} stderr")]
    writer.writerow(["method", "kind", *tasks, "mean", "normalized", "worst"])
    for row in table["rows"]:
        pairs = [of.get(task) for task in table["tasks"] for of in (row["scores"], row["stderr"])]
        numbers = [*pairs, *_values(table, row)[-3:]]
        writer.writerow([row["name"], row["kind"], *("" if v is None else repr(float(v)) for v in numbers)])
    return out.getvalue()


def _header(tasks: Sequence[str]) -> list[str]:
    return ["method", "kind", *tasks, "mean", "normalized", "worst"]


def _values(table: Mapping[str, Any], row: Mapping[str, Any]) -> list[float | None]:
    return [*map(row["scores"].get, table["tasks"]), row["mean"], row["normalized_mean"], row["worst"]]


def _texts(table: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Cells in percent; scores and their mean are followed by the standard error where it is known."""
    errors = [*map(row["stderr"].get, table["tasks"]), row["mean_stderr"], None, None]
    return [
        "–" if value is None else f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
        for value, error in zip(_values(table, row), errors, strict=True)
    ]


def _line(text: str) -> str:
    return " ".join(text.splitlines())


def _escape(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
