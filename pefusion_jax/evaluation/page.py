"""One HTML page of a folder of results, complete in itself: tables, settings and figures, without any connection.

What stands in the folder is not trusted. Files are looked at, never run: links are not followed, sizes are bounded, JSON, CSV
and PNG are checked, and all text is escaped. What cannot be shown is listed at the end with the reason.
"""

from __future__ import annotations

import csv
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pefusion_jax.evaluation import page_files
from pefusion_jax.evaluation.page_files import File, human_size
from pefusion_jax.evaluation.page_html import MOST_ROWS, as_number, folded, frame, grid, short, text
from pefusion_jax.files import write_atomically

_MOST_FILES, _DEEPEST = 1000, 8
_TEXTS = (".json", ".jsonl", ".csv", ".md", ".txt")


class Page(NamedTuple):
    """What became of a folder.

    Attributes:
      path: of the page.
      shown: files whose content is in it, relative to the folder.
      omitted: file -> why its content is not.
    """

    path: Path
    shown: tuple[str, ...]
    omitted: dict[str, str]


class _State(NamedTuple):
    """What is filled while the page is made."""

    shown: list[str]
    omitted: dict[str, str]
    contents: list[tuple[str, str, int]]
    room: list[int]  # bytes that may still go into the page
    anchors: Any


def write_page(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    max_bytes: int = 32 * 2**20,
) -> Page:
    """Turns a folder of results, and the folders in it, into one HTML page that needs nothing else.

    Shown are comparisons (``results.json``), other tables (CSV), settings (``config.json``), notes (Markdown, text), training
    metrics (JSON lines) and figures (PNG, each with the CSV of its name). Files of the same name that only repeat a comparison
    are listed, not shown.

    Args:
      folder: what a command or an experiment wrote.
      out: the page; by default ``report.html`` in the folder.
      title: of the page; by default the folder's name.
      max_bytes: of all content together; what comes after is listed as omitted.

    Returns:
      Where the page is, what is in it, and what is not and why.

    Raises:
      ValueError: if there is nothing to show, or the page's name does not end with .html.
      OSError: if the folder cannot be read or the page not be written.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder; give the folder that a command or an experiment wrote")
    target = root / "report.html" if out is None else Path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the page is an HTML file, but its path is {str(target)!r}; end it with .html")
    state = _State([], {}, [], [max_bytes], itertools.count())
    by_folder = _walk(root, state)
    sections = [_section(name, files, state) for name, files in by_folder.items()]
    if not state.shown:
        why = "; ".join(f"{name}: {reason}" for name, reason in itertools.islice(state.omitted.items(), 3))
        raise ValueError(f"{root} holds nothing to show (JSON, CSV, Markdown, text or PNG){f': {why}' if why else ''}")
    heading = title or root.resolve().name or "report"
    subtitle = f"{len(state.shown)} files shown" + (f", {len(state.omitted)} not shown" if state.omitted else "")
    main = "\n".join([_summary(by_folder.get("", []), state), *sections, _files(state)])
    page = frame(
        heading, subtitle, state.contents, main, "Written by <code>pefusion report</code>; nothing is loaded from elsewhere."
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page.encode())
    return Page(target, tuple(state.shown), dict(state.omitted))


def _walk(root: Path, state: _State) -> dict[str, list[File]]:
    """Files by folder, the folder itself first; links, special and hidden files are left out."""
    found: dict[str, list[File]] = {}
    count = 0

    def enter(folder: Path, prefix: str, depth: int) -> None:
        nonlocal count
        below = []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
        except OSError as error:
            if not prefix:
                raise
            state.omitted[prefix] = str(error)
            return
        for entry in entries:
            name = os.fsencode(f"{prefix}{entry.name}").decode(errors="replace")
            if entry.name.startswith("."):
                continue
            mode = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(mode.st_mode):
                below.append((Path(entry.path), name))
            elif not stat.S_ISREG(mode.st_mode):
                state.omitted[name] = "a link or a special file"
            elif count == _MOST_FILES:
                state.omitted["…"] = f"only the first {_MOST_FILES} files are read"
                return
            elif entry.name.lower().endswith((*_TEXTS, ".png")):
                count += 1
                found.setdefault(prefix.rstrip("/"), []).append(File(name, Path(entry.path), mode.st_size))
            elif not entry.name.lower().endswith((".html", ".htm")):
                state.omitted[name] = f"not a kind of file that is shown ({human_size(mode.st_size)})"
        for path, name in below:
            if depth == _DEEPEST:
                state.omitted[name + "/"] = f"more than {_DEEPEST} folders deep"
            else:
                enter(path, name + "/", depth + 1)

    enter(root, "", 0)
    return found


def _section(folder: str, files: list[File], state: _State) -> str:
    """Everything of one folder: results, figures, tables, settings, notes."""
    by_name = {file.name: file for file in files}
    used: set[str] = set()
    blocks: dict[str, list[str]] = {"Results": [], "Figures": [], "Tables": [], "Settings": [], "Notes": []}

    def made(file: File, make: Callable[..., str], *given: Any) -> str | None:
        """HTML of a file, or None and a line among what is omitted."""
        used.add(file.name)
        try:
            found = make(file, *given)
            if len(found) > state.room[0]:
                raise ValueError(f"the page is full: this would take {human_size(len(found))} more; raise its limit (--max-mb)")
        except (ValueError, OSError, csv.Error, RecursionError) as error:
            state.omitted[file.name] = "too deeply nested" if isinstance(error, RecursionError) else str(error)
            return None
        state.room[0] -= len(found)
        state.shown.append(file.name)
        return found

    def add(block: str, file: File, make: Callable[..., str], *given: Any) -> bool:
        found = made(file, make, *given)
        if found is not None:
            blocks[block].append(found)
        return found is not None

    for file in files:
        if page_files.is_comparison(file) and add("Results", file, page_files.comparison_table):
            for suffix in (".csv", ".md", ".txt"):
                twin = by_name.get(file.stem + suffix)
                if twin is not None and page_files.repeats(twin, file):
                    used.add(twin.name)
                    state.omitted[twin.name] = f"the same table as {file.name}"
    for file in files:
        if file.suffix == ".png" and add("Figures", file, page_files.figure):
            numbers = by_name.get(file.stem + ".csv")
            table = None if numbers is None or numbers.name in used else made(numbers, page_files.csv_table)
            if table is not None:
                blocks["Figures"][-1] = page_files.captioned(blocks["Figures"][-1], folded(f"Numbers ({file.stem}.csv)", table))
    for suffix, block, make in (
        (".csv", "Tables", page_files.csv_file),
        (".json", "Settings", page_files.json_file),
        (".jsonl", "Tables", page_files.jsonl_file),
        (".md", "Notes", page_files.markdown_file),
        (".txt", "Notes", page_files.text_file),
    ):
        for file in files:
            if file.name not in used and file.suffix == suffix:
                add(block, file, make)

    filled = {block: parts for block, parts in blocks.items() if parts}
    if not filled:
        return ""
    if folder and set(filled) <= {"Settings", "Notes"}:  # a run's own folder: its settings, to be opened
        inner = "\n".join(part for parts in filled.values() for part in parts)
        return f'<details class="folder"><summary>{text(folder)}</summary>{inner}</details>'
    anchor = f"s{next(state.anchors)}"
    out = []
    if folder:
        state.contents.append((anchor, folder, 0))
        out.append(f"<h2>{text(folder)}</h2>")
    for block, parts in filled.items():
        inner = "\n".join(parts)
        if block == "Figures":
            hint = '<p class="note narrow-only">Tap a figure to see it at its full size.</p>'
            inner = f'{hint}<div class="figures">{inner}</div>'
        here = f"s{next(state.anchors)}"
        state.contents.append((here, block, 1 if folder else 0))
        level = "h3" if folder else "h2"
        out.append(f'<section id="{here}"><{level}>{block}</{level}>{inner}</section>')
    return f'<section id="{anchor}">{"".join(out)}</section>' if folder else "".join(out)


def _summary(files: list[File], state: _State) -> str:
    """A few figures at the top, from the folder's own first comparison and settings, as far as there are any."""
    facts: list[tuple[str, str, str]] = []
    shown = [file for file in files if file.name in state.shown]
    for file in [file for file in shown if page_files.is_comparison(file)][:1]:
        table = page_files.comparison(page_files.read_json(file))
        rows = table["rows"]
        for key, label in (("mean", "Highest mean"), ("normalized_mean", "Highest normalized mean")):
            known = [row for row in rows if row[key] is not None]
            if known:
                best = max(known, key=lambda row: row[key])
                facts.append((label, f"{100 * best[key]:.1f}", f"{best['name']}, {best['kind']}"))
        facts.append(("Tasks", str(len(table["tasks"])), short(table["tasks"], 120)))
        facts.append(("Models compared", str(len(rows)), f"of {len({row['kind'] for row in rows})} kinds"))
    for file in shown:
        settings = page_files.read_json(file) if file.name == "config.json" else None
        if isinstance(settings, dict):
            for key, label in (("seconds", "Seconds"), ("model", "Base model")):
                value = settings.get(key)
                if isinstance(value, str | int | float) and not isinstance(value, bool):
                    facts.append((label, short(value, 120), ""))
    if not facts:
        return ""
    state.contents.insert(0, ("summary", "Summary", 0))
    items = []
    for label, value, more in facts:
        size = "" if as_number(value) is None else ' class="big"'
        note = f'<dd class="note">{text(more)}</dd>' if more else ""
        items.append(f"<div><dt>{text(label)}</dt><dd{size}>{text(value)}</dd>{note}</div>")
    return f'<section id="summary"><h2>Summary</h2><dl class="facts">{"".join(items)}</dl></section>'


def _files(state: _State) -> str:
    if not state.omitted:
        return ""
    state.contents.append(("files", "Not shown", 0))
    rows = list(state.omitted.items())
    note = f'<p class="note">{len(rows) - MOST_ROWS} more are not listed.</p>' if len(rows) > MOST_ROWS else ""
    table = grid(["file", "why it is not shown"], rows[:MOST_ROWS])
    count = "1 file" if len(rows) == 1 else f"{len(rows)} files"
    return f'<section id="files"><h2>Not shown</h2>{folded(count, table + note)}</section>'


def _natural(name: str) -> list[tuple[int, str]]:
    """Figure 2 comes before figure 10."""
    parts = ["".join(group) for _, group in itertools.groupby(name, key=lambda letter: letter.isascii() and letter.isdigit())]
    return [(int(part[:18]), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]
