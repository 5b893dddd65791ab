"""Where examples come from: JSON lines, CSV, Parquet, folders of these, and the committed extract.

Every source is a random-access sequence of dictionaries that knows where each row stands: ``where(3)`` is
``"reviews/train.csv, line 5"``, and errors about a row say so.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import importlib.resources
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

PathLike = str | os.PathLike[str]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Examples(Sequence[dict[str, Any]]):
    """Rows read from a file.

    Attributes:
      records: the rows.
      source: the file.
      numbers: the place of each row in the file, in ``unit``s counted from 1.
      unit: ``"line"`` or ``"row"``.
    """

    records: Sequence[dict[str, Any]]
    source: str
    numbers: Sequence[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self.records[index], self.source, self.numbers[index], self.unit)
        return self.records[index]

    def picked(self, index: Sequence[int]) -> Examples:
        """The rows at these places, in this order; each still knows where it stands."""
        places = [int(i) for i in index]
        return Examples([self.records[i] for i in places], self.source, [self.numbers[i] for i in places], self.unit)

    def where(self, index: int) -> str:
        """Place of a row, in words."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """The file as text, gunzipped if its name ends in .gz; damage becomes a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8-sig", newline="") as file
        ):
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it, for instance with iconv -t utf-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); copy or make it again") from error


def jsonl_source(path: PathLike) -> Examples:
    """Reads JSON lines, one object a line, plain or gzipped; blank lines are skipped.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and the line, if a line is not a JSON object.
    """
    path = Path(path)
    records, numbers = [], []
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}): {line.strip()!r:.80}") from error
            if not isinstance(record, dict):
                raise ValueError(f'{path}, line {number}: expected an object like {{"text": ..., "label": 0}}: {line!r:.80}')
            records.append(record)
            numbers.append(number)
    return Examples(records, str(path), numbers)


def csv_source(path: PathLike, *, delimiter: str | None = None, numeric: Sequence[str] = ("label",)) -> Examples:
    """Reads a CSV file with a header line, plain or gzipped.

    Args:
      path: the file.
      delimiter: a tab for names with ``.tsv``, else a comma, by default.
      numeric: columns to turn into int, else float, where all their values are numbers; all others stay text.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and the line, if a row has more or fewer columns than the header.
    """
    path = Path(path)
    if delimiter is None:
        delimiter = "\t" if ".tsv" in path.suffixes else ","
    records, numbers = [], []
    with _text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise ValueError(f"{path}, line 1: column names come twice: {header}")
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(values)} columns, the header has {len(header)} {header}; "
                        f"quote texts that hold {delimiter!r}"
                    )
                records.append(dict(zip(header, values, strict=True)))
                numbers.append(reader.line_num)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    for name in numeric:
        _to_numbers(records, name)
    return Examples(records, str(path), numbers)


def _to_numbers(records: list[dict[str, Any]], name: str) -> None:
    for kind in (int, float):
        try:
            values = [kind(record[name]) for record in records]
        except (ValueError, KeyError):
            continue
        for record, value in zip(records, values, strict=True):
            record[name] = value
        return


def parquet_source(path: PathLike) -> Examples:
    """Reads a Parquet file; needs the optional package pyarrow.

    Raises:
      ImportError: if pyarrow is not installed.
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a Parquet file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow (or convert the file to .jsonl)") from error
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return Examples(records, str(path), range(1, len(records) + 1), "row")


_READERS = {
    ".jsonl": jsonl_source,
    ".jsonl.gz": jsonl_source,
    ".csv": csv_source,
    ".csv.gz": csv_source,
    ".tsv": csv_source,
    ".parquet": parquet_source,
}


class Labelled(NamedTuple):
    """A labelled data set before any model sees it.

    Attributes:
      name: of the task.
      classes: class names in label order; empty for a regression.
      descriptions: one plain-English text for each class; the class names where nothing better is known.
      fields: names of the text's fields.
      train: examples; also validation and test, which may be empty.
    """

    name: str
    classes: tuple[str, ...]
    descriptions: tuple[str, ...]
    fields: tuple[str, ...]
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]


def folder_task_source(
    folder: PathLike,
    *,
    fields: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    descriptions: Sequence[str] | None = None,
) -> Labelled:
    """Reads a folder with ``train``, ``validation`` and ``test`` as .jsonl, .jsonl.gz, .csv, .csv.gz, .tsv or .parquet.

    Only ``train`` has to be there. A file ``task.json`` may hold ``name``, ``fields``, ``classes`` and ``descriptions``;
    arguments win over it. Without either, the text is ``text`` or the pair ``sentence1``, ``sentence2``, and the classes are
    the labels of the training split: names in alphabetical order, or numbers from 0; other numbers make it a regression.
    Where the classes are named by numbers, such as ``("1", "2", "3")``, the labels of CSV files are these names, not places.

    Args:
      folder: the folder; its name is the task's.
      fields: names of the text's fields.
      classes: class names in label order; ``()`` for a regression.
      descriptions: one text for each class.

    Raises:
      FileNotFoundError: if there is no training split.
      ValueError: if a split exists twice, ``task.json`` does not hold what it should, or fields or classes cannot be told; with
        the place of a bad row.
    """
    folder = Path(folder)
    spec = _spec(folder / "task.json")
    classes = spec.get("classes") if classes is None else classes
    readers = dict(_READERS)
    if any(_is_number(name) and name != str(place) for place, name in enumerate(classes or ())):
        readers |= {end: functools.partial(read, numeric=()) for end, read in _READERS.items() if read is csv_source}
    splits = {}
    for split in SPLITS:
        found = [folder / (split + ending) for ending in _READERS if (folder / (split + ending)).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} has the split {split} twice: {', '.join(path.name for path in found)}; keep one")
        if not found and split == "train":
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder} has no train{{{','.join(_READERS)}}}; found: {there or 'nothing'}")
        splits[split] = readers[found[0].name.removeprefix(split)](found[0]) if found else Examples((), str(folder / split), ())
    train = splits["train"]
    if not len(train):
        raise ValueError(f"{train.source} holds no examples")
    fields = fields or spec.get("fields") or _fields(train)
    if classes is None:
        classes = _classes(train)
    descriptions = descriptions or spec.get("descriptions") or classes
    if len(descriptions) != len(classes):
        raise ValueError(f"{folder}: {len(descriptions)} descriptions for {len(classes)} classes; give one for each")
    return Labelled(spec.get("name", folder.name), tuple(classes), tuple(descriptions), tuple(fields), **splits)


def _spec(path: Path) -> dict[str, Any]:
    """What a ``task.json`` says, or nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        spec = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise ValueError(f"{path} must hold an object with name, fields, classes and descriptions")
    if not isinstance(spec.get("name", ""), str):
        raise ValueError(f"{path}: name must be a string, not {spec['name']!r:.80}")
    for name in ("fields", "classes", "descriptions"):
        value = spec.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(set(value)) != len(value):
            raise ValueError(f"{path}: {name} must be a list of different strings, not {value!r:.80}")
    return spec


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fields(train: Examples) -> tuple[str, ...]:
    for fields in (("text",), ("sentence1", "sentence2"), ("sentence",)):
        if all(name in train[0] for name in fields):
            return fields
    raise ValueError(f"{train.where(0)}: the fields are {sorted(train[0])}; say which hold the text: fields=('text',)")


def _classes(train: Examples) -> tuple[str, ...]:
    labels = []
    for row, example in enumerate(train):
        if example.get("label") is None:
            raise ValueError(f"{train.where(row)}: no field 'label', there are {sorted(example)}")
        labels.append(example["label"])
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted(set(labels)))
    if all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels):
        return tuple(str(number) for number in range(max(labels) + 1))
    if all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels):
        return ()
    kinds = sorted({type(label).__name__ for label in labels})
    raise ValueError(f"{train.source}: labels are {' and '.join(kinds)}; make them all names, or all numbers")


def embedded_path(path: PathLike | None = None) -> Path:
    """The folder of the extract that is committed with the project: ``path``, else ``$PEFUSION_EMBEDDED``, else where it is.

    Raises:
      FileNotFoundError: saying where it was looked for, and what to do.
    """
    asked = path if path is not None else os.environ.get("PEFUSION_EMBEDDED")
    package = importlib.resources.files("pefusion_jax")
    places = (
        [Path(asked)] if asked else [Path(str(package)).parent / "experiments" / "embedded", Path(str(package / "_embedded"))]
    )
    for place in places:
        if any(place.glob("*/task.json")):
            return place
    raise FileNotFoundError(
        f"no embedded tasks (folders with a task.json) in {' or '.join(map(str, places))}; use a checkout of the project, "
        "or set PEFUSION_EMBEDDED to its folder experiments/embedded"
    )


def embedded(name: str = "all", *, path: PathLike | None = None) -> Any:
    """The committed extract of real labelled text: one task, or all of them.

    Args:
      name: of a task, or ``"all"``.
      path: of the extract, if not in its usual place.

    Returns:
      A :class:`Labelled`, or for ``"all"`` a dictionary of them by name.

    Raises:
      FileNotFoundError: if the extract is not there.
      ValueError: if there is no such task in it.
    """
    root = embedded_path(path)
    names = sorted(found.parent.name for found in root.glob("*/task.json"))
    if name == "all":
        return {each: folder_task_source(root / each) for each in names}
    if name not in names:
        raise ValueError(f"there is no embedded task {name!r}; there are: {', '.join(names)}")
    return folder_task_source(root / name)
