"""Scores of one tree on many tasks, with standard errors; compiled once for all tasks and all trees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.deltas import Delta
from pefusion_jax.tasks.metrics import accuracy
from pefusion_jax.tasks.task import Batch, Head, Task, eval_batches

_RESAMPLES = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Scores(Mapping[str, float]):
    """Scores by task name, in the order in which the tasks were given; printing it prints a table.

    Attributes:
      values_by_task: task name -> score; larger is better. The object itself is this mapping.
      stderr: task name -> standard error of the score over the examples of the split; may lack tasks.
      counts: task name -> number of examples; may lack tasks.
    """

    values_by_task: dict[str, float]
    stderr: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def __getitem__(self, task: str) -> float:
        return self.values_by_task[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_task)

    def __len__(self) -> int:
        return len(self.values_by_task)

    @property
    def mean(self) -> float:
        """Mean over tasks, each task counting the same."""
        return float(np.mean(list(self.values_by_task.values())))

    @property
    def mean_stderr(self) -> float | None:
        """Standard error of :attr:`mean`, the tasks being independent; ``None`` if a task has none."""
        if set(self.stderr) != set(self):
            return None
        return float(np.sqrt(sum(error**2 for error in self.stderr.values())) / len(self))

    @property
    def worst(self) -> float:
        """The lowest score."""
        return min(self.values_by_task.values())

    @property
    def worst_task(self) -> str:
        """The task with the lowest score, the first of several."""
        return min(self, key=self.__getitem__)

    def normalized(self, reference: Mapping[str, float]) -> Scores:
        r"""Scores relative to a reference: :math:`s_t / r_t`.

        Args:
          reference: task name -> score, usually each task's own fine-tuned model. It is taken as exact, so
            the standard errors are only divided by it.

        Raises:
          ValueError: if the reference lacks a task, or its score is not positive, so that a ratio says
            nothing.
        """
        for task in self:
            if task not in reference:
                raise ValueError(f"the reference has no score for {task!r}; it has {', '.join(reference) or 'none'}")
            if not reference[task] > 0:
                raise ValueError(f"the reference score of {task!r} is {reference[task]}; a ratio needs a positive one")
        return Scores(
            {task: self[task] / reference[task] for task in self},
            {task: error / reference[task] for task, error in self.stderr.items()},
            dict(self.counts),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: scores, stderr and counts by task; mean, mean_stderr, worst, worst_task."""
        return {
            "scores": dict(self.values_by_task),
            "stderr": dict(self.stderr),
            "counts": dict(self.counts),
            "mean": self.mean,
            "mean_stderr": self.mean_stderr,
            "worst": self.worst,
            "worst_task": self.worst_task,
        }

    def __str__(self) -> str:
        def line(name: str, value: float, error: float | None, note: str) -> tuple[str, str, str, str]:
            return name, f"{value:.4f}", "" if error is None else f"± {error:.4f}", note

        lines = [
            line(
                task,
                self[task],
                self.stderr.get(task),
                f"n={self.counts[task]}" if task in self.counts else "",
            )
            for task in self
        ]
        lines += [
            line("mean", self.mean, self.mean_stderr, ""),
            line("worst", self.worst, None, self.worst_task),
        ]
        widths = [max(len(row[column]) for row in lines) for column in range(4)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in (0, 3) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in lines
        )


def evaluate(
    adapted: Any,
    params: Any,
    tree: Any,
    tasks: Iterable[Task] | Mapping[str, Task],
    *,
    split: str = "test",
    batch_size: int = 64,
) -> Scores:
    """Scores a tree of adapters, or a weight change, on each task under its own frozen head and metric.

    The forward pass compiles once for all tasks, trees and coefficients: they are arguments of one program
    for each feature function and batch shape.

    Args:
      adapted: the model.
      params: its base parameters.
      tree: adapters (or a displacement, for a linearized model), or a :class:`~pefusion_jax.deltas.Delta`.
      tasks: the tasks, or a mapping whose values they are. A model that was generated for several has to know their names.
      split: ``"train"``, ``"validation"`` or ``"test"``.
      batch_size: rows of a batch; the result does not depend on it.

    Returns:
      Scores with standard errors: binomial for accuracies, from 200 bootstrap resamples for other metrics.

    Raises:
      ValueError: if there are no tasks, two have the same name, a split is empty, or the model does not know a task.
    """
    return _evaluate(tree_kind(tree), adapted, params, tree, tasks, split, batch_size)


def evaluate_base(
    adapted: Any,
    params: Any,
    tasks: Iterable[Task] | Mapping[str, Task],
    *,
    split: str = "test",
    batch_size: int = 64,
) -> Scores:
    """Scores the model without adapters (``adapted.base``), the zero-shot row; see :func:`evaluate`."""
    return _evaluate("base", adapted, params, {}, tasks, split, batch_size)


def predict(
    adapted: Any, params: Any, tree: Any, task: Task, *, split: str = "test", batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Features of a split, which a head's logits are made of, and its labels.

    Args:
      adapted, params, tree, split, batch_size: as in :func:`evaluate`.
      task: one task.

    Returns:
      Features ``[n, d]`` and labels ``[n]`` of the split's real rows, in its order.

    Raises:
      ValueError: for a task that is not scored by a head, see :func:`named_tasks`.
    """
    named_tasks([task])
    kind = tree_kind(tree)
    return head_features(kind, adapted, params, tree, task.head, batches_of(kind, adapted, task, split, batch_size))


def head_logits(head: Head, features: np.ndarray, *, rows: int = 256) -> np.ndarray:
    """Logits of features ``[n, d]`` -> ``[n, classes]``, ``rows`` at a time, compiled once for all ``n``."""
    logits = _logits_program(head.logits)
    out = []
    for start in range(0, len(features), rows):
        chunk = features[start : start + rows]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], rows - len(chunk), axis=0)])
        out.append(np.asarray(logits(head.params, padded))[: len(chunk)])
    return np.concatenate(out)


def named_tasks(tasks: Iterable[Task] | Mapping[str, Task], *, by_head: bool = True) -> dict[str, Task]:
    """Tasks by their own names, in the order given.

    Args:
      tasks: the tasks, or a mapping whose values they are.
      by_head: whether all must be scored by their head's logits, of features that are kept.

    Raises:
      ValueError: if there are none, two have the same name, or one has a ``predict`` of its own, where the head is needed.
    """
    by_name: dict[str, Task] = {}
    for task in tasks.values() if isinstance(tasks, Mapping) else tasks:
        if task.name in by_name:
            raise ValueError(f"two tasks are named {task.name!r}; give each task a name of its own")
        if by_head and task.predict is not None:
            raise ValueError(
                f"task {task.name!r} is scored by its own predict, not by its head: its features cannot stand for the model. "
                "Score it with pf.evaluate, one tree at a time"
            )
        by_name[task.name] = task
    if not by_name:
        raise ValueError("there is nothing to evaluate: no tasks were given; pass at least one")
    return by_name


def accuracy_scores(tasks: Iterable[Task], values: Iterable[float], labels: Mapping[str, Any]) -> Scores:
    """Scores of accuracies that were computed from cached outputs, with their binomial standard errors.

    Args:
      tasks: in the order of ``values``.
      values: one accuracy a task, a row of :func:`~pefusion_jax.evaluation.sweep`.
      labels: task name -> ``[n]``, as in ``Cached.labels``.
    """
    found = {task.name: float(value) for task, value in zip(tasks, values, strict=True)}
    counts = {name: len(labels[name]) for name in found}
    return Scores(found, {n: float(np.sqrt(p * (1.0 - p) / counts[n])) for n, p in found.items()}, counts)


def standard_error(task: Task, logits: np.ndarray, labels: np.ndarray, score: float) -> float:
    r"""Standard error of a score over examples: :math:`\sqrt{p(1-p)/n}` for an accuracy, else by bootstrap.

    The bootstrap draws from a fixed seed, so the same predictions give the same error.
    """
    if task.metric is accuracy:
        return float(np.sqrt(score * (1.0 - score) / len(labels)))
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(labels), len(labels)) for _ in range(_RESAMPLES)]
    return float(np.std([task.metric(logits[draw], labels[draw]) for draw in draws], ddof=1))


def _evaluate(mode: str, adapted: Any, params: Any, tree: Any, tasks: Any, split: str, batch_size: int) -> Scores:
    values, errors, counts = {}, {}, {}
    for name, task in named_tasks(tasks, by_head=False).items():
        batches = batches_of(mode, adapted, task, split, batch_size)
        if task.predict is None:
            features, labels = head_features(mode, adapted, params, tree, task.head, batches)
            logits = head_logits(task.head, features)
        else:
            logits, labels = _predicted(mode, adapted, params, tree, task, batches)
        values[name] = task.metric(logits, labels)
        errors[name] = standard_error(task, logits, labels, values[name])
        counts[name] = len(labels)
    return Scores(values, errors, counts)


def tree_kind(tree: Any) -> Literal["adapters", "delta"]:
    """How a model takes a tree: with ``apply`` or with ``apply_deltas``."""
    return "delta" if isinstance(tree, Delta) else "adapters"


def batches_of(mode: str, adapted: Any, task: Task, split: str, batch_size: int) -> Iterator[Batch]:
    """A split's batches as a model takes them: only with adapters is there a difference between tasks that it has to know."""
    return eval_batches(task, split, batch_size, adapted=adapted if mode == "adapters" else None)


def head_features(
    mode: str, adapted: Any, params: Any, tree: Any, head: Head, batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`predict` on batches, for a tree of that kind, or for ``"base"`` without one."""
    program = _features_program(adapted, head.features, mode)
    features, labels, real = [], [], []
    for batch in batches:
        # Left on the device for now: the host prepares the next batch while this one is computed.
        features.append(program(params, tree, batch["inputs"]))
        labels.append(batch["labels"])
        real.append(batch["weights"] > 0)
    keep = np.concatenate(real)
    return np.concatenate([np.asarray(rows) for rows in features])[keep], np.concatenate(labels)[keep]


def _predicted(
    mode: str, adapted: Any, params: Any, tree: Any, task: Task, batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """What a task's own ``predict`` makes of batches, and their labels."""
    found, labels, real = [], [], []
    for batch in batches:
        found.append(task.predict(mode, adapted, params, tree, batch["inputs"]))  # type: ignore[misc]
        labels.append(batch["labels"])
        real.append(batch["weights"] > 0)
    keep = np.concatenate(real)
    return np.concatenate([np.asarray(rows) for rows in found])[keep], np.concatenate(labels)[keep]


# Keyed by functions, which live at module level or in an Adapted; arrays are always arguments of the
# programs.
@functools.lru_cache(maxsize=64)
def _features_program(adapted: Any, features: Callable[..., jax.Array], mode: str) -> Callable[..., jax.Array]:
    def run(params: Any, tree: Any, inputs: Any) -> jax.Array:
        if mode == "base":
            outputs = adapted.base(params, **inputs)
        elif mode == "delta":
            outputs = adapted.apply_deltas(params, tree, **inputs)
        else:
            outputs = adapted.apply(params, tree, **inputs)
        return features(outputs, inputs).astype(jnp.float32)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def _logits_program(logits: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(logits)
