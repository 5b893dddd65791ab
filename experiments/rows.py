"""What long experiments share: results on disk after every one, a clock in front of every line, tables."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pefusion_jax import files


class Rows:
    """Rows by key in one JSON file: a run that was cut off goes on where it stopped."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Reads what is there.

        Raises:
          ValueError: if it was made with other settings, which would be mixed up with new rows.
        """
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        asked = json.loads(json.dumps(dict(settings)))
        if self.found and "settings" not in self.found:
            raise ValueError(f"{path} does not say with which settings its rows were made; name another --out")
        if self.found.setdefault("settings", asked) != asked:
            raise ValueError(f"{path} holds rows of {self.found['settings']}, but asked for is {asked}; name another --out")

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def put(self, key: str, **row: Any) -> None:
        """Adds a row and writes the file."""
        self.found[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path, self.found)


def clock() -> Callable[[str], None]:
    """``print`` with the seconds since now in front."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    return say


def markdown(columns: Sequence[str], lines: Iterable[Sequence[Any]], *, texts: int = 1) -> list[str]:
    """The lines of a table, all columns but the first ``texts`` set to the right."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * texts + " ---: |" * (len(columns) - texts)]
    return head + ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def write_tables(out: Path, *parts: Iterable[str], columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Writes ``results.md``, its parts with a blank line between, and ``results.csv``."""
    files.write_atomically(out / "results.md", ("\n\n".join("\n".join(part) for part in parts) + "\n").encode())
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])
    files.write_atomically(out / "results.csv", text.getvalue().encode())


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
