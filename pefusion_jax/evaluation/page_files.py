"""What a page shows of each kind of file; every function raises ValueError for content that cannot be shown, saying why."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from pefusion_jax.evaluation.page_html import LONGEST_CELL, MOST_COLUMNS, MOST_ROWS, folded, framed, grid, markdown, short, text
from pefusion_jax.evaluation.report import SCHEMA, as_csv, as_markdown, as_text

LARGEST_TEXT, LARGEST_IMAGE, MOST_PIXELS = 4 * 2**20, 8 * 2**20, 64 * 10**6
MOST_SCORES, LONGEST_TEXT, MOST_PARTS = 2000, 100_000, 50
_PNG = b"\x89PNG\r\n\x1a\n"
_END = "</figcaption></figure>"


class File(NamedTuple):
    """A file of the folder; ``name`` is relative to it, with slashes."""

    name: str
    path: Path
    size: int

    @property
    def suffix(self) -> str:
        """Lower-case ending with its dot."""
        return os.path.splitext(self.name)[1].lower()

    @property
    def stem(self) -> str:
        """Name without the ending."""
        return os.path.splitext(self.name)[0]


def comparison_table(file: File) -> str:
    """A comparison's rows under their kinds: means first, then the tasks; the best of a kind bold, columns shaded."""
    table = comparison(read_json(file))
    tasks, rows = table["tasks"], table["rows"]
    summary = ("mean", "normalized_mean", "worst")
    columns: list[list[float | None]] = [[row[key] for row in rows] for key in summary]
    columns += [[row["scores"].get(task) for row in rows] for task in tasks]
    errors = [
        [row["mean_stderr"] for row in rows],
        *[[None] * len(rows)] * 2,
        *[[row["stderr"].get(t) for row in rows] for t in tasks],
    ]
    kinds = [row["kind"] for row in rows]
    shown = [_scores(values, error, kinds) for values, error in zip(columns, errors, strict=True)]
    body = []
    for place, row in enumerate(rows):
        if place == 0 or kinds[place] != kinds[place - 1]:
            body.append(f'<tr class="group"><th colspan="{len(columns) + 1}"><span>{text(row["kind"])}</span></th></tr>')
        name = f'<th scope="row">{text(row["name"])}<small class="of">{text(row["kind"])}</small></th>'
        body.append(f"<tr>{name}{''.join(cells[place] for cells in shown)}</tr>")
    names = ["mean", "normalized", "worst", *tasks]
    head = "".join(f'<th scope="col" class="num">{text(name)}</th>' for name in names)
    note = (
        '<p class="note">Scores × 100<span class="wide-only"> ± standard error</span>; stronger colour is better within a '
        "column, bold is the best of its kind. Normalized: mean over tasks, relative to each task’s own model.</p>"
    )
    head = f'<thead><tr><th scope="col">method</th>{head}</tr></thead>'
    return f"<h4>{text(table['title'] or file.name)}</h4>{framed(head, body, 'scores sort', 'scroll all')}{note}"


def _scores(values: list[float | None], errors: list[float | None], kinds: list[str]) -> list[str]:
    """The cells of a column."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    of_kind: dict[str, list[float]] = {}
    for value, kind in zip(values, kinds, strict=True):
        if value is not None:
            of_kind.setdefault(kind, []).append(value)
    best = {kind: max(rivals) for kind, rivals in of_kind.items() if len(rivals) > 1}
    cells = []
    for value, error, kind in zip(values, errors, kinds, strict=True):
        if value is None:
            cells.append('<td class="num">–</td>')
            continue
        shade = round(7 * (value - low) / (high - low)) if high > low else 0
        number = f"{100 * value:.1f}"
        number = f"<strong>{number}</strong>" if value == best.get(kind) else number
        spread = "" if error is None else f' <small class="wide-only">±&nbsp;{100 * error:.1f}</small>'
        cells.append(f'<td class="num{f" q{shade}" if shade else ""}" data-v="{value!r}">{number}{spread}</td>')
    return cells


def figure(file: File) -> str:
    """A PNG inside the page, at the size it was drawn for."""
    width, height, per_metre, content = _png(file)
    # A page has 96 pixels to the inch.
    shown = max(1, round(width / per_metre / 0.0254 * 96)) if per_metre else width
    tall = max(1, round(height * shown / width))
    encoded = base64.b64encode(content).decode()
    name = text(file.name)
    wide = ' class="wide"' if shown > 560 else ""
    return (
        f'<figure{wide}><div class="paper" tabindex="0"><img width="{shown}" height="{tall}" alt="{name}" '
        f'src="data:image/png;base64,{encoded}"></div><figcaption>{name}{_END}'
    )


def captioned(figure: str, more: str) -> str:
    """A figure with more HTML in its caption."""
    return figure.removesuffix(_END) + more + _END


def csv_file(file: File) -> str:
    """A table with its heading."""
    return f"<h4>{text(file.name)}</h4>{csv_table(file)}"


def csv_table(file: File) -> str:
    """The table of a CSV file, whose first row is the header."""
    rows = list(itertools.islice(csv.reader(io.StringIO(_text(file))), 200_000))
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("the table is empty")
    return grid(rows[0], rows[1:])


def jsonl_file(file: File) -> str:
    """JSON lines as a table: training metrics."""
    records = [_parse(line) for line in _text(file).splitlines() if line.strip()]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError("not one JSON object a line")
    return f"<h4>{text(file.name)}</h4>{_records_grid(records)}"


def _records_grid(records: list[dict[str, Any]]) -> str:
    """Records as rows; all their keys are columns, in the order of their first appearance."""
    header = list(dict.fromkeys(key for record in records for key in record))
    rows = [[record.get(key, "") for key in header[:MOST_COLUMNS]] for record in records[:MOST_ROWS]]
    # What is cut here anyway is only counted.
    return grid(header, [*rows, *[[]] * (len(records) - len(rows))])


def json_file(file: File) -> str:
    """Settings open, any other JSON folded."""
    inner = _value(read_json(file))
    settings = file.name.rpartition("/")[2] == "config.json"
    return f"<h4>{text(file.name)}</h4>{inner}" if settings else folded(file.name, inner)


def _value(value: Any, name: str = "", depth: int = 0) -> str:
    """Any JSON: a table where it is a mapping or a list of alike records, else its text."""
    title = f"<h5>{text(name)}</h5>" if name else ""
    if isinstance(value, list) and value and all(isinstance(item, dict) and _flat(item) for item in value):
        return title + _records_grid(value)
    if isinstance(value, dict) and value and depth < 4:
        records = _records(value)
        if records is not None:
            return title + grid(*records)
        simple = [(key, item) for key, item in value.items() if _simple(item)]
        nested = [(key, item) for key, item in value.items() if not _simple(item)]
        rows = [f'<tr><th scope="row">{text(short(k, 80))}</th><td>{text(short(v))}</td></tr>' for k, v in simple[:MOST_ROWS]]
        table = framed("", rows, "settings") if rows else ""
        parts = [_value(v, f"{name} › {short(k, 80)}" if name else short(k, 80), depth + 1) for k, v in nested[:MOST_PARTS]]
        left = max(0, len(simple) - MOST_ROWS) + max(0, len(nested) - MOST_PARTS)
        note = f'<p class="note">{left} more entries are in the file.</p>' if left else ""
        return title + table + "".join(parts) + note
    return f"{title}<pre>{text(_clipped(json.dumps(value, indent=1, ensure_ascii=False)))}</pre>"


def _records(value: dict[str, Any]) -> tuple[list[Any], list[list[Any]]] | None:
    """Nested mappings that end in records of the same fields, as one table; ``None`` if they do not."""
    level: list[tuple[tuple[str, ...], Any]] = [((key,), item) for key, item in value.items()]
    for deep in (1, 2, 3):
        if not level or not all(isinstance(item, dict) and item for _, item in level):
            return None
        if all(_flat(item) for _, item in level):
            fields = {tuple(sorted(item)) for _, item in level}
            if len(fields) > 1 or len(level) < 2:
                return None
            header = list(level[0][1])
            return [""] * deep + header, [[*keys, *(item[field] for field in header)] for keys, item in level]
        level = [((*keys, key), item) for keys, inner in level for key, item in inner.items()]
    return None


def markdown_file(file: File) -> str:
    """Notes with a little of Markdown's form."""
    return f"<h4>{text(file.name)}</h4>{markdown(_clipped(_text(file)))}"


def text_file(file: File) -> str:
    """Plain text, folded."""
    return folded(file.name, f"<pre>{text(_clipped(_text(file)))}</pre>")


def is_comparison(file: File) -> bool:
    """Whether a file is the JSON of a comparison, by what it says."""
    if file.suffix != ".json":
        return False
    try:
        found = read_json(file)
    except (ValueError, OSError, RecursionError):
        return False  # said again where the file is shown
    return isinstance(found, dict) and found.get("schema") == SCHEMA


def repeats(twin: File, file: File) -> bool:
    """Whether a .csv, .md or .txt file is what ``Comparison.write`` makes of the comparison in another."""
    try:
        said, table = _text(twin), comparison(read_json(file))
    except (ValueError, OSError):
        return False  # said again where the file is shown
    if twin.suffix == ".csv":
        return said == as_csv(table)
    return said == (as_markdown(table) if twin.suffix == ".md" else f"{as_text(table)}\n")


def comparison(found: Any) -> dict[str, Any]:
    """The checked content of a comparison's JSON."""

    def numbers(value: Any, what: str) -> dict[str, float]:
        if not isinstance(value, dict):
            raise ValueError(f"not a comparison: {what} is not an object")
        return {key: known for key, item in value.items() if (known := real(item, what)) is not None}

    def real(value: Any, what: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
            raise ValueError(f"not a comparison: {what} holds {short(value)!r}, which is no score")
        return float(value)

    tasks, rows, title = found.get("tasks"), found.get("rows"), found.get("title", "")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks) or not 0 < len(tasks) <= MOST_COLUMNS:
        raise ValueError(f"not a comparison: 'tasks' must be 1 to {MOST_COLUMNS} names")
    if max(map(len, tasks)) > LONGEST_CELL:
        raise ValueError(f"not a comparison: the name of a task has more than {LONGEST_CELL} characters")
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_SCORES or not isinstance(title, str):
        raise ValueError(f"not a comparison: 'rows' must be 1 to {MOST_SCORES} objects, 'title' text")
    checked = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not isinstance(row.get("kind"), str):
            raise ValueError("not a comparison: a row has no 'name' and 'kind'")
        checked.append(
            {
                "name": short(row["name"]),
                "kind": short(row["kind"]),
                "scores": numbers(row.get("scores"), "'scores'"),
                "stderr": numbers(row.get("stderr", {}), "'stderr'"),
                **{key: real(row.get(key), repr(key)) for key in ("mean", "mean_stderr", "normalized_mean", "worst")},
            }
        )
    return {"tasks": tasks, "title": short(title), "rows": checked}


def _png(file: File) -> tuple[int, int, int, bytes]:
    """Width, height, pixels a metre (0: not known) and content of a PNG whose chunks are whole."""
    content = _read(file, LARGEST_IMAGE)
    width = height = per_metre = 0
    place = len(_PNG)
    kind = b""
    while content.startswith(_PNG) and place + 12 <= len(content) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        data = content[place + 8 : place + 8 + length]
        if place + 12 + length > len(content) or struct.unpack_from(">I", content, place + 8 + length)[0] != zlib.crc32(
            kind + data
        ):
            break
        if kind == b"IHDR" and length == 13 and place == len(_PNG):
            width, height = struct.unpack_from(">II", data)
        elif kind == b"pHYs" and length == 9 and data[8] == 1:
            per_metre = struct.unpack_from(">I", data)[0]
        place += 12 + length
    else:
        if kind == b"IEND" and place == len(content) and 0 < width and 0 < height and width * height <= MOST_PIXELS:
            return width, height, per_metre if 1000 <= per_metre <= 100_000 else 0, content
    raise ValueError(f"not a whole PNG image of at most {MOST_PIXELS // 10**6} million pixels")


def read_json(file: File) -> Any:
    """The content of a JSON file; NaN and infinities are null."""
    return _parse(_text(file))


def _parse(content: str) -> Any:
    try:
        return json.loads(content, parse_constant=lambda name: None)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def _text(file: File) -> str:
    try:
        return _read(file, LARGEST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start}") from error


def _read(file: File, most: int) -> bytes:
    if file.size > most:
        raise ValueError(f"the file has {human_size(file.size)}, more than {human_size(most)}")
    with open(file.path, "rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"the file grew beyond {human_size(most)} while it was read")
    return content


def _simple(value: Any) -> bool:
    return not isinstance(value, dict | list) or (
        isinstance(value, list) and not any(isinstance(v, dict | list) for v in value)
    )


def _flat(record: dict[str, Any]) -> bool:
    return all(_simple(value) for value in record.values())


def _clipped(found: str) -> str:
    return found if len(found) <= LONGEST_TEXT else f"{found[:LONGEST_TEXT]}\n… ({len(found) - LONGEST_TEXT} more characters)"


def human_size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count} bytes" if count < 1000 else f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
