r"""How tasks get in each other's way, measured by running the model: disentanglement, interference, loss planes.

All three look at a model moved along several task vectors, :math:`\theta_0 + \sum_t \alpha_t \tau_t`, at many coefficients.
For a model that is affine in its displacement every point follows from :math:`T + 1` forward passes (see
``evaluation.sweep``); for all others one compiled forward pass takes the coefficients as arguments. What needs the task
vectors alone and no model is in ``evaluation.geometry``.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pefusion_jax.evaluation.moved import Space, runner
from pefusion_jax.evaluation.scores import named_tasks
from pefusion_jax.files import write_atomically
from pefusion_jax.tasks.task import Task

Tasks = Iterable[Task] | Mapping[str, Task]
ALPHAS = tuple(np.linspace(-2.0, 2.0, 21))
PLANE = tuple(np.linspace(-0.5, 1.5, 21))


class Disentanglement(NamedTuple):
    """The disentanglement error of two tasks on a grid.

    Attributes:
      names: the two tasks.
      alphas: coefficients, the same for both, ``[point]``.
      error: ``[coefficient of the first, coefficient of the second]``, in [0, 2]; 0 means that neither task notices the other.
      by_task: its two parts, ``[task, coefficient of the first, coefficient of the second]``, in [0, 1].
      counts: number of examples of each task.
      forwards: forward passes over a task's split that this took; a tangent counts as one.
    """

    names: tuple[str, str]
    alphas: np.ndarray
    error: np.ndarray
    by_task: np.ndarray
    counts: tuple[int, int]
    forwards: int

    @property
    def inside(self) -> float:
        """Mean error where both coefficients are in [0, 1], the square in which models are fused; NaN if no point is."""
        chosen = (self.alphas >= 0) & (self.alphas <= 1)
        return float(self.error[np.ix_(chosen, chosen)].mean()) if chosen.any() else float("nan")

    def csv(self) -> str:
        """One line a point: both coefficients, the error, its two parts."""
        first, second = self.names
        rows = (
            [a, b, self.error[i, j], *self.by_task[:, i, j]]
            for i, a in enumerate(self.alphas)
            for j, b in enumerate(self.alphas)
        )
        return table(["alpha " + first, "alpha " + second, "error", "part of " + first, "part of " + second], rows)

    def write(self, folder: str | os.PathLike[str], name: str = "disentanglement") -> Path:
        """Writes ``name.csv`` into a folder, atomically."""
        return write_table(folder, name, self.csv())


class LossPlane(NamedTuple):
    """Losses and scores on the plane through the base model and two task vectors.

    Attributes:
      names: the two task vectors.
      coefficients: of either vector, ``[point]``: (0, 0) is the base model, (1, 0) and (0, 1) are the tuned ones.
      tasks: tasks that were scored.
      loss: ``[task, coefficient of the first, coefficient of the second]``, mean over examples.
      score: the same for each task's metric.
      forwards: as in :class:`Disentanglement`.
    """

    names: tuple[str, str]
    coefficients: np.ndarray
    tasks: tuple[str, ...]
    loss: np.ndarray
    score: np.ndarray
    forwards: int

    def surface(self, what: Literal["loss", "score"] = "loss", task: str | None = None) -> np.ndarray:
        """One task's surface, or the mean over tasks: ``[coefficient of the first, coefficient of the second]``."""
        if what not in ("loss", "score"):
            raise ValueError(f"a loss plane has a 'loss' and a 'score', not {what!r}")
        values = self.loss if what == "loss" else self.score
        if task is None:
            return values.mean(axis=0)
        if task not in self.tasks:
            raise ValueError(f"the plane has no task {task!r}, only {', '.join(self.tasks)}")
        return values[self.tasks.index(task)]

    def csv(self) -> str:
        """One line a point and task."""
        points = [(i, j) for i in range(len(self.coefficients)) for j in range(len(self.coefficients))]
        rows = (
            [task, self.coefficients[i], self.coefficients[j], self.loss[t, i, j], self.score[t, i, j]]
            for t, task in enumerate(self.tasks)
            for i, j in points
        )
        return table(["task", *(f"coefficient of {name}" for name in self.names), "loss", "score"], rows)

    def write(self, folder: str | os.PathLike[str], name: str = "loss_plane") -> Path:
        """Writes ``name.csv`` into a folder, atomically."""
        return write_table(folder, name, self.csv())


class Interference(NamedTuple):
    r"""What adding another task's vector does to a task. Rows are scored tasks, columns are added vectors.

    Attributes:
      names: the tasks.
      scale: coefficient of what was added.
      score: score of task i with :math:`\tau_i + s \tau_j`, ``[i, j]``; on the diagonal with :math:`\tau_i` alone.
      loss: the same for the loss.
      base_score: scores of the model without any vector, ``[i]``.
      base_loss: the same for the loss.
      forwards: as in :class:`Disentanglement`.
    """

    names: tuple[str, ...]
    scale: float
    score: np.ndarray
    loss: np.ndarray
    base_score: np.ndarray
    base_loss: np.ndarray
    forwards: int

    @property
    def score_change(self) -> np.ndarray:
        """Score with the other vector relative to the score without, less 1; negative is harm, NaN where there is none."""
        return _relative(self.score)

    @property
    def loss_change(self) -> np.ndarray:
        """The same for the loss; positive is harm."""
        return _relative(self.loss)

    def csv(self) -> str:
        """One line a pair."""
        kinds = (self.score, self.score_change, self.loss, self.loss_change)
        rows = (
            [task, added, *(values[i, j] for values in kinds)]
            for i, task in enumerate(self.names)
            for j, added in enumerate(self.names)
        )
        return table(["task", "added", "score", "score change", "loss", "loss change"], rows)

    def write(self, folder: str | os.PathLike[str], name: str = "interference") -> Path:
        """Writes ``name.csv`` into a folder, atomically."""
        return write_table(folder, name, self.csv())


def disentanglement_error(
    adapted: Any,
    params: Any,
    trees: Mapping[str, Any],
    pair: Sequence[str],
    tasks: Tasks,
    alphas: Sequence[float] | np.ndarray = ALPHAS,
    *,
    split: str = "validation",
    batch_size: int = 64,
    space: Space = "weight",
    init: Any = None,
) -> Disentanglement:
    r"""How often two tasks' vectors change each other's predictions.

    .. math:: \xi(\alpha_1, \alpha_2) = \sum_{t=1,2} \mathbb E_{x \sim \mu_t} \big[ \arg\max f(x; \theta_0 + \alpha_t \tau_t)
       \ne \arg\max f(x; \theta_0 + \alpha_1 \tau_1 + \alpha_2 \tau_2) \big]

    A network-linear model is additive in its outputs, but not therefore disentangled: :math:`J \tau_2` may be anything on the
    first task's inputs.

    Args:
      adapted: any model. If it has a ``pushforward`` and ``trees`` are its displacements, the grid is exact and takes three
        forward passes of each split; if not, one for each point.
      params: its base parameters.
      trees: task name -> adapters, displacement, or :class:`~pefusion_jax.deltas.Delta`.
      pair: the two tasks, names in ``trees`` and in ``tasks``.
      tasks: the tasks, among them the pair; classifications.
      alphas: coefficients of either vector.
      split: whose inputs are used; labels are not.
      batch_size: rows of a batch.
      space: where vectors are added up, as in :func:`~pefusion_jax.fusion.fuse`: ``"weight"``, or ``"adapter"`` for the
        adapters' own leaves.
      init: in adapter space, what all adapters started from; ``None`` if the trees are displacements.

    Raises:
      ValueError: if the pair is not two of the trees and tasks, a task is a regression, coefficients are not finite and
        one-dimensional, or outputs are not finite.

    Reference: G. Ortiz-Jimenez, A. Favero, P. Frossard, Task Arithmetic in the Tangent Space, 2023; grid and range from
    A. Tang et al., Parameter Efficient Multi-task Model Fusion with Partial Linearization, 2024, who also add up adapters'
    leaves (``space="adapter"``), where we take weight changes by default.
    """
    names = _pair(pair, trees)
    values = _coefficients(alphas, "alphas")
    chosen = _scored(tasks, names)
    for task in chosen.values():
        if not task.classes:
            raise ValueError(f"task {task.name!r} is a regression and has no predicted class; choose another task")
    run = runner(adapted, params, {name: trees[name] for name in names}, chosen, split, batch_size, space, init)
    count = len(values)
    grid = np.stack(np.meshgrid(values, values, indexing="ij"), axis=-1).reshape(-1, 2)
    parts, counts = [], []
    for t, name in enumerate(names):
        alone = np.zeros((count, 2), np.float32)
        alone[:, t] = values
        predictions = np.stack([np.argmax(logits, axis=-1) for logits in run.logits(name, np.concatenate([alone, grid]))])
        own, both = predictions[:count], predictions[count:].reshape(count, count, -1)
        parts.append(np.mean(both != (own[:, None] if t == 0 else own[None]), axis=-1))
        counts.append(predictions.shape[1])
    by_task = np.stack(parts)
    forwards = run.forwards if run.forwards is not None else 2 * (count + count**2)
    return Disentanglement(names, values.astype(np.float64), by_task.sum(axis=0), by_task, (counts[0], counts[1]), forwards)


def loss_plane(
    adapted: Any,
    params: Any,
    trees: Mapping[str, Any],
    pair: Sequence[str],
    tasks: Tasks,
    coefficients: Sequence[float] | np.ndarray = PLANE,
    *,
    split: str = "validation",
    batch_size: int = 64,
    space: Space = "weight",
    init: Any = None,
) -> LossPlane:
    r"""Losses and scores at :math:`\theta_0 + \alpha_1 \tau_1 + \alpha_2 \tau_2`, the plane through base and two models.

    Args:
      adapted, params, trees, pair, split, batch_size, space, init: as in :func:`disentanglement_error`.
      tasks: the tasks to score; they need not be those of the vectors.
      coefficients: of either vector.

    Raises:
      ValueError: as :func:`disentanglement_error`, but for regressions, which may be scored.
    """
    names = _pair(pair, trees)
    values = _coefficients(coefficients, "coefficients")
    chosen = named_tasks(tasks)
    run = runner(adapted, params, {name: trees[name] for name in names}, chosen, split, batch_size, space, init)
    grid = np.stack(np.meshgrid(values, values, indexing="ij"), axis=-1).reshape(-1, 2)
    found = [run.losses_and_scores(name, grid) for name in chosen]
    shape = (len(chosen), len(values), len(values))
    forwards = run.forwards if run.forwards is not None else len(chosen) * len(grid)
    loss, score = (np.stack([pair[kind] for pair in found]).reshape(shape) for kind in (0, 1))
    return LossPlane(names, values.astype(np.float64), tuple(chosen), loss, score, forwards)


def interference(
    adapted: Any,
    params: Any,
    trees: Mapping[str, Any],
    tasks: Tasks,
    *,
    scale: float = 1.0,
    split: str = "validation",
    batch_size: int = 64,
    space: Space = "weight",
    init: Any = None,
) -> Interference:
    r"""What adding :math:`s \tau_j` to a model tuned by :math:`\tau_i` does to task i, for all pairs.

    .. math:: R_{ij} = \frac{S_i(\theta_0 + \tau_i + s \tau_j)}{S_i(\theta_0 + \tau_i)} - 1

    Args:
      adapted, params, trees, split, batch_size, space, init: as in :func:`disentanglement_error`.
      tasks: the tasks of all trees, of the same names.
      scale: coefficient of what is added.

    Raises:
      ValueError: if trees and tasks do not have the same names, or outputs are not finite.
    """
    names = tuple(trees)
    chosen = _scored(tasks, names)
    amount = float(_coefficients([scale], "scale")[0])
    run = runner(adapted, params, trees, chosen, split, batch_size, space, init)
    count = len(names)
    scores, losses = np.zeros((count, count + 1)), np.zeros((count, count + 1))
    for i, name in enumerate(names):
        own = np.eye(count, dtype=np.float32)[i]
        # Nothing is added on the diagonal; the last point is the base model.
        points = [own if j == i else own + amount * np.eye(count, dtype=np.float32)[j] for j in range(count)]
        losses[i], scores[i] = run.losses_and_scores(name, np.stack([*points, 0 * own]))
    forwards = run.forwards if run.forwards is not None else count * (count + 1)
    return Interference(names, amount, scores[:, :-1], losses[:, :-1], scores[:, -1], losses[:, -1], forwards)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV text: numbers at full precision, nothing where a number is not finite."""

    def cell(value: Any) -> str:
        if isinstance(value, str | int):
            return str(value)
        return repr(float(value)) if np.isfinite(value) else ""

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([cell(value) for value in row] for row in rows)
    return out.getvalue()


def write_table(folder: str | os.PathLike[str], name: str, text: str) -> Path:
    """Writes ``name.csv`` into a folder, which is made, atomically."""
    path = Path(folder) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def _pair(pair: Sequence[str], trees: Mapping[str, Any]) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(f"pair={pair!r} must be two different names of trees")
    for name in pair:
        if name not in trees:
            raise ValueError(f"pair names {name!r}, but the trees are {', '.join(map(repr, trees)) or 'none'}")
    return pair[0], pair[1]


def _scored(tasks: Tasks, names: Sequence[str]) -> dict[str, Task]:
    known = named_tasks(tasks)
    for name in names:
        if name not in known:
            raise ValueError(f"there is a tree {name!r} but no task of this name, only {', '.join(known)}; name both alike")
    return {name: known[name] for name in names}


def _coefficients(values: Any, what: str) -> np.ndarray:
    found = np.asarray(values, np.float32)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{what} must be one or more finite numbers in a row, not {values!r:.100}")
    return found


def _relative(values: np.ndarray) -> np.ndarray:
    own = np.diagonal(values)[:, None]
    return np.divide(values, own, out=np.full(values.shape, np.nan), where=own > 0) - 1.0
