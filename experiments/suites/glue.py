"""GLUE from a local extract as tasks, with heads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pefusion_jax as pf
from experiments.suites import choosing, texts


class _Glue(NamedTuple):
    fields: tuple[str, ...]
    classes: tuple[str, ...]
    descriptions: tuple[str, ...] | None = None  # where a zero-shot head makes sense
    metric: Callable[[Any, Any], float] = pf.tasks.accuracy
    test: str = "validation"


_SAME = ("entailment", "not entailment")
GLUE: dict[str, _Glue] = {
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), metric=pf.tasks.matthews),
    "sst2": _Glue(("sentence",), ("negative", "positive"), tuple(texts.TASKS["movie"]["classes"].values())),
    "mrpc": _Glue(("sentence1", "sentence2"), ("not equivalent", "equivalent")),
    "qqp": _Glue(("question1", "question2"), ("not duplicate", "duplicate")),
    "stsb": _Glue(("sentence1", "sentence2"), (), metric=pf.tasks.pearson),
    "mnli": _Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), test="validation_matched"),
    "qnli": _Glue(("question", "sentence"), _SAME),
    "rte": _Glue(("sentence1", "sentence2"), _SAME),
}


def glue_tasks(
    model: Any,
    params: Any,
    tokenizer: Any,
    extracts: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    max_length: int = 64,
    head: str = "auto",
    train_size: int | None = None,
    train_seed: int = 0,
    validation_size: int = 400,
    test_size: int | None = None,
    pad_to: int = 32,
    **options: Any,
) -> list[pf.tasks.Task]:
    """GLUE tasks from a local extract; the test split is GLUE's validation file, our validation is held out of its train file.

    Args:
      model: see ``data.text_tasks``, also for ``params``, ``tokenizer`` and ``options``.
      extracts: folder that holds ``glue/<set>/{train,validation}.jsonl.gz``; for MNLI ``validation_matched.jsonl.gz``.
      names: which sets, in this order; all eight by default.
      max_length: number of tokens that every batch has. Of a pair, the longer side is cut first.
      head: ``"auto"``: zero-shot from class descriptions for sst2; for all others, whose classes are about a pair or about
        grammar, which no description says, linear on the base model's features of the training split. ``"linear"``: for all.
      train_size: at most so many training rows; all by default. Chosen by hash, as are the other sizes.
      train_seed: another number, other training rows.
      validation_size: rows held out; no first sentence is in both parts.
      test_size: at most so many test rows.
      pad_to: classes are padded to a multiple of this.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: for another head, or a bad row.
    """
    if head not in ("auto", "linear"):
        raise ValueError(f"head={head!r} must be 'auto' or 'linear'")
    options = {"buckets": (max_length,), **options}
    tasks = []
    for name in choosing.names_of(names, GLUE):
        spec, folder = GLUE[name], Path(extracts).expanduser() / "glue" / name
        rows = pf.tasks.jsonl_source(folder / "train.jsonl.gz")
        test = _by_hash(pf.tasks.jsonl_source(folder / f"{spec.test}.jsonl.gz"), spec.fields, test_size)
        train, validation = _hold_out(rows, test, spec.fields, validation_size)
        data = pf.tasks.Labelled(
            name=name,
            classes=spec.classes,
            descriptions=spec.descriptions or spec.classes,
            fields=spec.fields,
            train=_by_hash(train, spec.fields, train_size, f"{train_seed}:" if train_seed else ""),
            validation=validation,
            test=test,
        )
        kind = "zero_shot" if head == "auto" and spec.descriptions else "linear"
        tasks.append(
            pf.tasks.text_task(
                data, model, params, tokenizer, head=kind, max_length=max_length, pad_to=pad_to, metric=spec.metric, **options
            )
        )
    return tasks


def _by_hash(rows: pf.tasks.Examples, fields: tuple[str, ...], size: int | None, salt: str = "") -> pf.tasks.Examples:
    """So many rows, chosen by the hash of their text, in the file's order."""
    if size is None or size >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda i: choosing.digest(salt + "|".join(rows[i][field] for field in fields)))
    return rows.picked(sorted(order[:size]))


def _hold_out(
    rows: pf.tasks.Examples, test: pf.tasks.Examples, fields: tuple[str, ...], size: int
) -> tuple[pf.tasks.Examples, pf.tasks.Examples]:
    """Training and validation rows: whole groups of one first sentence; rows whose text is in the test split are left out."""
    seen = {tuple(row[field] for field in fields) for row in test}
    usable = [i for i in range(len(rows)) if tuple(rows[i][field] for field in fields) not in seen]
    groups: dict[str, list[int]] = {}
    for i in usable:
        groups.setdefault(texts.normalise(rows[i][fields[0]]), []).append(i)
    held: list[int] = []
    for group in sorted(groups, key=lambda text: choosing.digest(f"hold out:{text}")):
        if len(held) >= size:
            break
        held += groups[group]
    return rows.picked(sorted(set(usable) - set(held))), rows.picked(sorted(held))
