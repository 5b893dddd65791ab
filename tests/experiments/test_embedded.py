"""The committed extract is what its README says it is."""

import gzip
import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "embedded"
NAMES = ("bible", "genre", "intents", "spam", "supersense", "wic")
SPLITS = ("train", "validation", "test")


def read(name, split):
    with gzip.open(FOLDER / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def spec(name):
    return json.loads((FOLDER / name / "task.json").read_text("utf-8"))


def normalised(text):
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower()))


def test_there_are_six_tasks_below_three_megabytes():
    assert tuple(sorted(path.parent.name for path in FOLDER.glob("*/task.json"))) == NAMES
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_twice_and_no_group_in_two_splits(name):
    texts, groups = {}, {}
    for split in SPLITS:
        for row in read(name, split):
            for field in spec(name)["fields"]:
                if field != "word":
                    key = normalised(row[field])
                    assert key and key not in texts, (split, texts.get(key), row)
                    texts[key] = split
            group = row.get("group", row.get("word"))
            if group is not None:
                assert groups.setdefault(group, split) == split, group
    if name in ("genre", "intents", "bible", "wic"):
        assert len(groups) > 50


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_complete_and_classes_balanced(name):
    task = spec(name)
    classes = len(task["classes"])
    assert len(set(task["classes"])) == len(set(task["descriptions"])) == classes == len(task["descriptions"])
    assert task["name"] == name and task["licence"] and task["source"]
    for split, least in zip(SPLITS, (950, 180, 300), strict=True):
        rows = read(name, split)
        assert least <= len(rows) <= 1100
        for row in rows:
            assert type(row["label"]) is int and 0 <= row["label"] < classes
            for field in task["fields"]:
                assert row[field] == row[field].strip() and len(row[field]) <= 400 and "  " not in row[field]
                assert not re.search(
                    r"</?(html|body|table|tr|td|font|br|p|b|i|a|strong|center|div|span)\b[^>]*>|&nbsp;|\ufffd", row[field]
                ), row
        counts = Counter(row["label"] for row in rows)
        assert len(counts) == classes and max(counts.values()) <= 3 * min(counts.values())


def test_the_manifest_and_the_readme_agree_with_the_files():
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    files = sorted(str(p.relative_to(FOLDER)) for name in NAMES for p in (FOLDER / name).iterdir())
    assert sorted(manifest["outputs"]) == files and len(manifest["inputs"]) == 6
    for name, expected in manifest["outputs"].items():
        data = (FOLDER / name).read_bytes()
        if name.endswith(".gz"):
            assert data[4:8] == bytes(4)  # no time stamp: the same build gives the same bytes
            data = gzip.decompress(data)
        assert hashlib.sha256(data).hexdigest() == expected, name
    readme = (FOLDER / "README.md").read_text("utf-8")
    for name in NAMES:
        sizes = " / ".join(str(len(read(name, split))) for split in SPLITS)
        assert re.search(rf"^\| {name} \|.*\| {sizes} \| {len(spec(name)['classes'])} \|", readme, re.M), name


def test_every_source_is_attributed():
    notice = (FOLDER / "NOTICE").read_text("utf-8")
    for text in (
        "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.",
        "Title to copyright in this software, database and\n  any associated documentation shall at all times remain",
        "Distributed with the permission of the copyright holder, redistribution permitted.",
        "W. N. Francis and H. Kucera",
        "PDDL 1.0",
        "CC0 1.0",
        "The Home Assistant Authors",
        "Version 2.0, January 2004",
        "END OF TERMS AND CONDITIONS",
        "sword-text-kjv",
        "trademark of eBible.org",
    ):
        assert text in re.sub(r"  +(?=rights)", "  ", notice), text
    for name in NAMES:
        assert f"{name}/" in notice
