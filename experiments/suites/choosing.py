"""Which rows of a data set make its splits: by hashing, so the same rows give the same splits on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SEED = 2026
SPLITS = ("train", "validation", "test")


class Item(NamedTuple):
    """What choosing needs to know of a row.

    ``key`` is equal for rows that count as the same text or image, ``group`` must not be in two splits, ``side`` is ``"train"``
    or ``"test"`` where the source has an official test set, else ``""``, and ``row`` is the row itself.
    """

    label: int
    key: str
    group: str
    row: Any
    side: str = ""


def digest(text: str) -> str:
    return hashlib.sha256(f"{SEED}:{text}".encode()).hexdigest()


def distinct(items: Iterable[Item]) -> list[Item]:
    """Every key once, in a fixed random order; a key with two labels is dropped, and one on both sides stays in test."""
    items = list(items)
    labels = defaultdict(set)
    for item in items:
        labels[item.key].add(item.label)
    # "test" sorts before "train": of two equal rows the official test set keeps its own.
    items.sort(key=lambda item: (item.side, digest(f"{item.key}:{item.group}")))
    kept: dict[str, Item] = {}
    for item in items:
        if len(labels[item.key]) == 1:
            kept.setdefault(item.key, item)
    return sorted(kept.values(), key=lambda item: digest(item.key))


def shares(available: Sequence[int], total: int) -> list[int]:
    """As equal shares of ``total`` as ``available`` allows: small classes give all they have, the others what is missing."""
    given = [0] * len(available)
    for done, index in enumerate(sorted(range(len(available)), key=lambda i: (available[i], i))):
        given[index] = min(available[index], (total - sum(given)) // (len(available) - done))
    return given


def choose(items: Iterable[Item], classes: int, sizes: tuple[int, int, int]) -> dict[str, list[Item]]:
    """Splits of about ``sizes`` (train, validation, test) rows with balanced classes; deduplicated before they are made.

    Whole groups go to one split, in proportion to ``sizes`` within each set of labels that a group has. Where the source has
    an official test set, test rows come from it and all others from the rest.

    Raises:
      ValueError: if a class has no row in some split.
    """
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in distinct(items):
        groups[item.side, item.group].append(item)
    # A group that an official test set and its training set share would be in two splits.
    in_test = {group for side, group in groups if side == "test"}
    strata = defaultdict(list)
    for (side, group), rows in groups.items():
        if side != "train" or group not in in_test:
            strata[side, tuple(sorted({item.label for item in rows}))].append((side, group))
    pools: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for (side, _), names in strata.items():
        train, validation, test = (0, 0, 1) if side == "test" else (*sizes[:2], 0 if side == "train" else sizes[2])
        names.sort(key=lambda name: digest(f"group:{name[1]}"))
        first, second = (round(len(names) * part / (train + validation + test)) for part in (test, test + validation))
        for place, name in enumerate(names):
            split = "test" if place < first else "validation" if place < second else "train"
            pools[split] += groups[name]
    chosen = {}
    for split, size in zip(SPLITS, sizes, strict=True):
        by_class: dict[int, list[Item]] = defaultdict(list)
        for item in sorted(pools[split], key=lambda item: digest(f"row:{item.key}")):
            by_class[item.label].append(item)
        if missing := [label for label in range(classes) if not by_class[label]]:
            raise ValueError(f"the {split} split has no row of the classes {missing}; the source is not what it was")
        counts = shares([len(by_class[label]) for label in range(classes)], size)
        picked = [item for label, count in enumerate(counts) for item in by_class[label][:count]]
        chosen[split] = sorted(picked, key=lambda item: digest(f"order:{item.key}"))
    return chosen


def balance(items: Sequence[Item]) -> float:
    """The share of the largest class: what always guessing it scores."""
    return max(Counter(item.label for item in items).values()) / len(items)


def names_of(names: Sequence[str] | None, known: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks that were asked for, all if none is named.

    Raises:
      ValueError: for one that there is not, or a single text.
    """
    if isinstance(names, str) or (names is not None and not set(names) <= set(known)):
        raise ValueError(f"names={names!r} must be a sequence of some of {', '.join(known)}")
    return tuple(known) if names is None else tuple(names)
