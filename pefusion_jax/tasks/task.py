"""What a task is, and the batches it gives.

    examples (any random-access sequence)  --encode-->  inputs  --model-->  outputs  --head-->  logits  --loss, metric
                                           --label--->  labels

A batch is a plain dictionary of NumPy arrays: ``{"inputs": {name: [batch, ...]}, "labels": [batch], "weights": [batch]}``.
Labels are int32, or float32 for a regression. Weights are 0 for rows that only fill up a batch, so that every batch has
the full size and there is a handful of compiled shapes.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from pefusion_jax import trees

Batch = dict[str, Any]
SPLITS = ("train", "validation", "test")


class Head(NamedTuple):
    """Turns a model's outputs into logits; frozen, so that all models and all fusions are judged by the same head.

    The functions live at module level, so tasks that differ in ``params`` alone share one compiled program.

    Attributes:
      params: dictionary of arrays, passed to ``logits`` as an argument.
      features: ``(outputs, inputs) -> [batch, d]``, linear in ``outputs``: it commutes with a linearized model's sum.
      logits: ``(params, [batch, d]) -> [batch, classes]``, classes padded; a padded class has the logit -1e9.
    """

    params: dict[str, Any]
    features: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]


@dataclass(frozen=True, eq=False)
class Task:
    """One labelled data set with its encoder, its frozen head, its loss and its metric.

    Attributes:
      name: shown in tables and used as a folder name.
      classes: class names in label order; empty for a regression.
      train: sequence of examples; also validation and test. A split that does not exist is an empty sequence.
      encode: ``(examples) -> inputs``. An encoder that also has ``padded`` and ``trim`` (``TextEncoder``) is called once a
        split, and a batch is a slice of what it gave; any other is called for each batch.
      head: the frozen head.
      metric: ``(logits [n, classes], labels [n]) -> float``, larger is better.
      loss: ``(logits, labels) -> [batch]``, a module-level function.
      label: name of the label's field, or ``(example) -> label``. A label is a number, or one of ``classes``.
      predict: ``(kind, adapted, params, tree, inputs) -> [batch, ...]``, which the metric gets in place of the head's logits,
        for tasks that need more than these. ``kind`` says how the model takes ``tree``: ``"adapters"``, ``"delta"``, or
        ``"base"``, without it.
    """

    name: str
    classes: tuple[str, ...]
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    encode: Callable[[Sequence[Any]], dict[str, np.ndarray]]
    head: Head
    metric: Callable[[Any, Any], float]
    loss: Callable[..., jax.Array]
    label: str | Callable[[Any], Any] = "label"
    predict: Callable[..., Any] | None = None
    _prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _labelled: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def batch(self, examples: Sequence[Any]) -> Batch:
        """The batch of these examples, outside any split: ``[{"text": ..., "label": 0}, ...]``; all weights are 1."""
        self._check(examples, "the given examples")
        labels = self._labels(examples, "the given examples")
        return _batch(self.encode(examples), labels, np.ones(len(labels), np.float32))

    def split(self, name: str) -> Sequence[Any]:
        """The examples of a split; ValueError if there are none."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is not one of {', '.join(SPLITS)}")
        examples = getattr(self, name)
        if not len(examples):
            source = getattr(examples, "source", None)
            raise ValueError(
                f"task {self.name!r} has no {name} examples{f' ({source} is empty)' if source else ''}; "
                f"give the task a {name} split, or use another one"
            )
        return examples

    def inputs(self, name: str) -> dict[str, np.ndarray] | None:
        """Inputs of a whole split at full width, made once; ``None`` if the encoder works by batch."""
        if name not in self._prepared:
            examples = self.split(name)
            self._check(examples, name)
            padded = getattr(self.encode, "padded", None)
            self._prepared[name] = None if padded is None else padded(examples)
        return self._prepared[name]

    def arrays(self, name: str) -> tuple[dict[str, np.ndarray] | None, np.ndarray]:
        """The inputs of a whole split, see :meth:`inputs`, and its labels; made once."""
        inputs = self.inputs(name)
        if name not in self._labelled:
            self._labelled[name] = self._labels(self.split(name), name)
        return inputs, self._labelled[name]

    def rows(self, name: str, index: np.ndarray, weights: np.ndarray, *, labels: bool = True) -> Batch:
        """The batch of the examples at these places of a split.

        Without ``labels`` it has none, and they may be missing or hidden, but for an encoder that writes them into the inputs,
        as that of ``text_to_text`` does.
        """
        of_split = self.arrays(name)[1] if labels else None
        inputs = self.inputs(name)
        if inputs is None:
            examples = self.split(name)
            inputs = self.encode([examples[int(i)] for i in index])
        else:
            trim = self.encode.trim  # type: ignore[attr-defined]
            inputs = trim({key: value[index] for key, value in inputs.items()})
        return {"inputs": inputs, "weights": weights} if of_split is None else _batch(inputs, of_split[index], weights)

    def _where(self, examples: Sequence[Any], name: str, row: int) -> str:
        where = getattr(examples, "where", None)
        return f"task {self.name!r}: " + (f"{name}, example {row}" if where is None else where(row))

    def _check(self, examples: Sequence[Any], name: str) -> None:
        problem = getattr(self.encode, "problem", None)
        if problem is not None:
            for row, example in enumerate(examples):
                if (message := problem(example)) is not None:
                    raise ValueError(f"{self._where(examples, name, row)}: {message}")

    def _labels(self, examples: Sequence[Any], name: str) -> np.ndarray:
        labels = []
        for row, example in enumerate(examples):
            try:
                labels.append(label_number(example, self.label, self.classes))
            except ValueError as error:
                raise ValueError(f"{self._where(examples, name, row)}: {error}") from error
        return np.asarray(labels, np.int32 if self.classes else np.float32)


def label_number(example: Any, label: str | Callable[[Any], Any], classes: Sequence[str]) -> int | float:
    """The number of an example's class, or its target; see :class:`Task` for the arguments.

    Raises:
      ValueError: for a label that is missing, or not of the task.
    """
    if callable(label):
        value = label(example)
    elif label in example:
        value = example[label]
    else:
        raise ValueError(f"no field {label!r}, there are {sorted(example)}; name the label's field in Task(label=...)")
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not classes:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and np.isfinite(float(value)):
            return float(value)
        raise ValueError(f"label {value!r} is not a finite number; a task without classes is a regression")
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) < len(classes):
        return int(value)
    known = ", ".join(map(repr, classes[:8])) + (", ..." if len(classes) > 8 else "")
    hint = " (-1 marks a hidden test label: use the validation split)" if value == -1 else ""
    raise ValueError(
        f"label {value!r} is neither a number from 0 to {len(classes) - 1} nor one of the classes {known}{hint}; "
        "correct the row, or the task's classes"
    )


def _batch(inputs: dict[str, np.ndarray], labels: np.ndarray, weights: np.ndarray) -> Batch:
    return {"inputs": inputs, "labels": labels, "weights": weights}


def train_batch(task: Task, step: int, batch_size: int, seed: int, *, labels: bool = True) -> Batch:
    r"""The training batch of a step: a pure function of its arguments, so a resumed run sees the same batches.

    .. math:: \mathrm{batch}_k = \{x_{\pi_e(j)} : eN + j \in [kB, (k+1)B)\}

    with one permutation :math:`\pi_e` of the :math:`N` examples for each epoch: in every epoch each example comes once, also
    where a batch spans the border of two epochs or of more, as when ``batch_size`` exceeds the number of examples.

    Args:
      task: the task.
      step: number of the update, from 0.
      batch_size: number of rows over all devices.
      seed: of the permutations.
      labels: whether the batch has them, see :meth:`Task.rows`.

    Raises:
      ValueError: for an empty training split, a bad row (with its place), or a bad argument.
    """
    if step < 0 or batch_size < 1 or seed < 0:
        raise ValueError(f"step={step} and seed={seed} must be 0 or more, batch_size={batch_size} must be 1 or more")
    index = stream(len(task.split("train")), step * batch_size, batch_size, seed)
    return task.rows("train", index, np.ones(batch_size, np.float32), **_unless(labels))


def stream(examples: int, start: int, count: int, seed: int) -> np.ndarray:
    """Places ``start`` to ``start + count`` of an endless stream of epochs, each a permutation of the examples: ``[count]``."""
    place = np.arange(start, start + count, dtype=np.int64)
    epoch, within = place // examples, place % examples
    index = np.empty(count, np.int64)
    for number in np.unique(epoch):
        here = epoch == number
        index[here] = _permutation(int(seed), int(number), examples)[within[here]]
    return index


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Ranks of raw Philox bits: NumPy guarantees the bit stream for good, but not what Generator.permutation makes of it.
    words = [seed % 2**64, epoch]
    return np.argsort(np.random.Philox(key=np.asarray(words, np.uint64)).random_raw(size), kind="stable")


def eval_batches(task: Task, split: str, batch_size: int, *, adapted: Any = None, labels: bool = True) -> Iterator[Batch]:
    """The batches of a split in its order; the last one is filled up with copies of its last row, of weight 0.

    Args:
      task: the task.
      split: ``"train"``, ``"validation"`` or ``"test"``.
      batch_size: number of rows of every batch.
      adapted: the model whose ``apply`` will take the inputs: one that makes a difference between tasks gets the task's number
        with them, see :func:`inputs_for`.
      labels: whether the batches have them, see :meth:`Task.rows`.

    Raises:
      ValueError: for an empty split, a bad row (with its place), a bad argument, or a task that the model does not know.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    examples = len(task.split(split))  # now, not at the first next(): errors belong to this call
    task_number(adapted, task)
    return _in_order(task, split, batch_size, examples, adapted, _unless(labels))


def _unless(labels: bool) -> dict[str, Any]:
    """Options of ``rows``; none where there are labels, since that of a task of one's own may know no others."""
    return {} if labels else {"labels": False}


def _in_order(task: Task, split: str, batch_size: int, examples: int, adapted: Any, options: dict[str, Any]) -> Iterator[Batch]:
    for start in range(0, examples, batch_size):
        place = np.arange(start, start + batch_size)
        batch = task.rows(split, np.minimum(place, examples - 1), (place < examples).astype(np.float32), **options)
        yield {**batch, "inputs": inputs_for(adapted, task, batch["inputs"])}


def inputs_for(adapted: Any, task: Task, inputs: dict[str, Any], groups: int | None = None) -> dict[str, Any]:
    """What a model's ``apply`` takes of a batch of one task: a model with ``tasks`` also gets ``task``, all others do not.

    Args:
      adapted: the model, or ``None`` for the inputs as they are (``base`` and ``apply_deltas`` take no ``task``).
      task: the task, which goes by its name.
      inputs: of a batch of it; left as it is.
      groups: ``task`` is int32 ``[]``; with a number it is ``[groups]``, to be split over devices and micro-batches.

    Raises:
      ValueError: if the model does not know the task.
    """
    number = task_number(adapted, task)
    if number is None:
        return inputs
    return {**inputs, "task": np.full(() if groups is None else (groups,), number, np.int32)}


def task_number(adapted: Any, task: Task) -> int | None:
    """The task's place among the tasks of a model; ``None`` for a model that makes no difference between tasks.

    Raises:
      ValueError: if there are tasks, but not this one, with the names and the nearest of them; or if the task's encoder has a
        ``refuses`` that says why its inputs are not for this model.
    """
    refuses = getattr(getattr(task, "encode", None), "refuses", None)  # a task of one's own may lack an encoder
    if refuses is not None and adapted is not None and (message := refuses(adapted)) is not None:
        raise ValueError(f"task {task.name!r}: {message}")
    names = getattr(adapted, "tasks", ())  # None is no model; a model of one's own may lack it
    if not names:
        return None
    if task.name not in names:
        raise ValueError(
            f"the model was generated for the tasks {', '.join(map(repr, names))}, not for {task.name!r}"
            f"{trees.did_you_mean(task.name, names)}; name it among the generator's tasks, or rename the task"
        )
    return tuple(names).index(task.name)
