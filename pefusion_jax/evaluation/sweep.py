r"""Sweeps over coefficients: exact on cached outputs for affine models, the ordinary way for all others.

A network-linear model is affine in its displacement,

.. math:: f(\textstyle\sum_t \lambda_t \tau_t) = f_0 + \sum_t \lambda_t\, J \tau_t,

and a head's features are linear in the outputs. So the features of :math:`f_0` and of each :math:`J \tau_t`,
which cost
:math:`T + 1` forward passes, give the exact features at every coefficient vector: every subset at every scale
is arithmetic on arrays ``[examples, d]``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.evaluation.batched import features_of_many
from pefusion_jax.evaluation.scores import head_logits, named_tasks
from pefusion_jax.tasks.metrics import accuracy
from pefusion_jax.tasks.task import Task, eval_batches


class Cached(NamedTuple):
    """Features of a split from which every combination of displacements follows.

    Attributes:
      names: names of the displacements, sorted; the columns of a coefficient array.
      base: evaluation task -> features of :math:`f_0`, ``[n, d]``.
      moved: evaluation task -> features of each :math:`J \\tau_t`, ``[displacement, n, d]``.
      labels: evaluation task -> ``[n]``.
      split: the split that was read.
      forwards: forward passes over a task's split that this took, summed over tasks; a tangent counts as one.
      batches: number of times the model was called; each call makes the primal and all tangents of one batch.
    """

    names: tuple[str, ...]
    base: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    split: str
    forwards: int
    batches: int


class Best(NamedTuple):
    """The best point of a sweep.

    Attributes:
      point: its row.
      coefficients: ``[task vectors]``.
      score: what it was chosen by: mean (normalized) score over tasks.
    """

    point: int
    coefficients: np.ndarray
    score: float


def cache_outputs(
    adapted: Any,
    params: Any,
    taus: Mapping[str, Any],
    tasks: Iterable[Task] | Mapping[str, Task],
    *,
    split: str = "validation",
    batch_size: int = 64,
) -> Cached:
    """Runs an affine model once over each task's split, with all displacements at the same time.

    Args:
      adapted: a model with a ``pushforward``, from ``linearize(..., mode="network")`` or ``"weight"``. In the
        second, the combinations are those of weight space.
      params: its base parameters.
      taus: name -> displacement.
      tasks: the tasks to evaluate on; they need not be those of the displacements.
      split: ``"validation"`` by default, since coefficients are chosen there.
      batch_size: rows of a batch.

    Raises:
      ValueError: if the model has no pushforward, structures differ, a split is empty, a task's features are
        not linear in the outputs, or features are not finite.
    """
    if adapted.pushforward is None:
        raise ValueError(
            "this model is not affine in its adapters, so its outputs cannot be combined; linearize it with "
            "mode='network' or 'weight', or use sweep_trees"
        )
    by_name = named_tasks(tasks)
    names = tuple(sorted(taus))
    stacked = trees.stack({name: taus[name] for name in names})
    base, moved, labels, batches = {}, {}, {}, 0
    for task_name, task in by_name.items():
        program = _pushforward_program(adapted, task.head.features)
        primal, tangent, kept, nonlinearity = [], [], [], []
        for batch in eval_batches(task, split, batch_size, adapted=adapted):
            here, along, gap = program(params, stacked, batch["inputs"])
            real = batch["weights"] > 0
            primal.append(np.asarray(here)[real])
            tangent.append(np.asarray(along)[:, real])
            kept.append(batch["labels"][real])
            nonlinearity.append(float(gap))
            batches += 1
        if not max(nonlinearity) < 1e-3:
            raise ValueError(
                f"task {task_name!r}: its head's features are not finite or not linear in its outputs "
                f"(relative error {max(nonlinearity):.2g}); move the non-linear part into the head's logits"
            )
        base[task_name], moved[task_name] = np.concatenate(primal), np.concatenate(tangent, axis=1)
        labels[task_name] = np.concatenate(kept)
        if not (np.isfinite(base[task_name]).all() and np.isfinite(moved[task_name]).all()):
            raise ValueError(f"task {task_name!r}: features on {split} are not finite; check the displacements")
    return Cached(names, base, moved, labels, split, forwards=len(by_name) * (len(names) + 1), batches=batches)


def sweep(
    cached: Cached, tasks: Iterable[Task] | Mapping[str, Task], coefficients: Any, *, chunk: int | None = None
) -> np.ndarray:
    """Scores every coefficient vector on every task by arithmetic on cached features: no forward pass.

    Args:
      cached: from :func:`cache_outputs`.
      tasks: tasks that are in ``cached``.
      coefficients: ``[point, displacement]``, columns in the order of ``cached.names``.
      chunk: points that are computed at the same time; by default as many as fit 64 MiB.

    Returns:
      Scores ``[point, task]``, tasks in the order given.

    Raises:
      ValueError: if shapes do not fit, a coefficient is not finite, a task is not cached, or logits are not numbers.
    """
    points = np.asarray(coefficients, np.float32)
    if points.ndim != 2 or points.shape[1] != len(cached.names) or not len(points):
        raise ValueError(
            f"coefficients have shape {points.shape}; needed is [point, {len(cached.names)}], one column for "
            f"each of {', '.join(cached.names)}"
        )
    if not np.isfinite(points).all():
        raise ValueError("coefficients must be finite")
    columns = []
    for name, task in named_tasks(tasks).items():
        if name not in cached.base:
            raise ValueError(f"no outputs are cached for {name!r}, only for {', '.join(cached.base)}")
        columns.append(_sweep_task(cached, name, task, points, chunk))
    return np.stack(columns, axis=1)


def subset_grid(count: int, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Every non-empty subset of ``count`` displacements at every value.

    Args:
      count: number of displacements.
      values: coefficients, the same for all members of a subset.

    Returns:
      ``[(2**count - 1) * len(values), count]``: subsets by size, then in lexicographic order; values vary
      fastest. Members have the value, others 0.
    """
    if count < 1 or not len(values):
        raise ValueError(f"a grid needs at least one displacement and one value, got {count} and {len(values)}")
    rows = [
        [float(value) if t in subset else 0.0 for t in range(count)]
        for size in range(1, count + 1)
        for subset in itertools.combinations(range(count), size)
        for value in values
    ]
    return np.asarray(rows, np.float32)


def best_coefficients(
    coefficients: Any,
    scores: np.ndarray,
    reference: Sequence[float] | np.ndarray | None = None,
) -> Best:
    r"""The point with the best mean normalized score, :math:`\arg\max_p \frac1K \sum_k s_{p,k} / r_k`.

    To be honest it must be given validation scores; the test split is then looked at once, at the point it
    returns.

    Args:
      coefficients: ``[point, displacement]``.
      scores: ``[point, task]``, from :func:`sweep` or :func:`sweep_trees`.
      reference: ``[task]``, scores of each task's own model, in the order of the columns; without it scores
        are not normalized.

    Returns:
      The best point; of equal ones the one with the smallest sum of magnitudes, then the first.

    Raises:
      ValueError: if shapes do not fit, a score is not finite or a reference not positive, or the references have names, which
        the columns do not have.
    """
    points, table = np.asarray(coefficients), np.asarray(scores, np.float64)
    if points.ndim != 2 or table.ndim != 2 or len(points) != len(table) or not len(table):
        raise ValueError(f"coefficients {points.shape} and scores {table.shape} must have the same number of points, not 0")
    if reference is not None:
        if isinstance(reference, Mapping):
            raise ValueError("the columns of scores have no names: pass [reference[task.name] for task in tasks], in order")
        divisor = np.asarray(reference, np.float64)
        if divisor.shape != table.shape[1:] or not (divisor > 0).all():
            raise ValueError(f"reference scores must be positive, one for each of {table.shape[1]} tasks, not {divisor}")
        table = table / divisor[None, :]
    means = table.mean(axis=1)
    if not np.isfinite(means).all():
        raise ValueError(f"{int((~np.isfinite(means)).sum())} points have scores that are not finite")
    size = np.abs(points).sum(axis=1)
    # Scores equal but for rounding count as equal.
    best = np.flatnonzero(means >= means.max() - 1e-12)
    index = int(best[np.argmin(size[best])])
    return Best(index, points[index], float(means[index]))


def sweep_trees(
    adapted: Any,
    params: Any,
    fused_for: Callable[[np.ndarray], Any],
    coefficients: Any,
    tasks: Iterable[Task] | Mapping[str, Task],
    *,
    split: str = "validation",
    batch_size: int = 64,
    at_once: int = 1,
) -> np.ndarray:
    """Scores every point by fusing and running the model, which every model allows; compiled once.

    Args:
      adapted, params, split, batch_size: as in :func:`~pefusion_jax.evaluation.evaluate`.
      fused_for: coefficients ``[k]`` -> tree or Delta, for example ``lambda c: fuse(task_arithmetic(c),
        taus)``.
      coefficients: ``[point, k]``; what the columns mean is up to ``fused_for``.
      tasks: the tasks to evaluate on.
      at_once: points in one forward pass, for accelerators; see :func:`~pefusion_jax.evaluation.evaluate_many`.

    Returns:
      Scores ``[point, task]``, tasks in the order given.
    """
    points = np.asarray(coefficients, np.float32)
    if points.ndim != 2 or not len(points):
        raise ValueError(f"coefficients have shape {points.shape}; needed is [point, k] with at least one point")
    if at_once < 1:
        raise ValueError(f"at_once={at_once} must be 1 or more")
    by_name = named_tasks(tasks)
    batches = {name: list(eval_batches(task, split, batch_size, adapted=adapted)) for name, task in by_name.items()}
    rows: list[list[float]] = []
    for start in range(0, len(points), at_once):
        chunk = [fused_for(point) for point in points[start : start + at_once]]
        chunk += chunk[-1:] * (min(at_once, len(points)) - len(chunk))  # filled up: one program serves all
        found = features_of_many(
            adapted, params, chunk, by_name, split=split, batch_size=batch_size, at_once=at_once, batches=batches
        )
        for place in range(len(points[start : start + at_once])):
            features = {name: (of_trees[place], labels) for name, (of_trees, labels) in found.items()}
            rows.append(
                [task.metric(head_logits(task.head, features[name][0]), features[name][1]) for name, task in by_name.items()]
            )
    return np.asarray(rows, np.float64)


def _sweep_task(cached: Cached, name: str, task: Task, points: np.ndarray, chunk: int | None) -> np.ndarray:
    base, moved, labels = jnp.asarray(cached.base[name]), jnp.asarray(cached.moved[name]), cached.labels[name]
    classes = jax.eval_shape(task.head.logits, task.head.params, base).shape[-1]
    fits = 2**24 // (len(labels) * max(base.shape[-1], classes))  # 64 MiB of float32
    chunk = min(len(points), max(1, fits if chunk is None else chunk))
    scores = []
    for start in range(0, len(points), chunk):
        part = points[start : start + chunk]
        # The last chunk is filled up, so that one program serves all.
        padded = np.concatenate([part, np.zeros((chunk - len(part), points.shape[1]), np.float32)])
        if task.metric is accuracy:
            found = _combined_hits(task.head.logits)(task.head.params, base, moved, padded, labels)
            hits, bad = (np.asarray(counts)[: len(part)] for counts in found)
            if bad.any():
                place = int(np.argmax(bad > 0))
                raise ValueError(
                    f"task {name!r}: logits of {bad[place]} of {len(labels)} examples are not numbers at the coefficients "
                    f"{part[place].tolist()}; choose smaller ones"
                )
            scores += [int(hit) / len(labels) for hit in hits]
        else:
            logits = np.asarray(combined_logits(task.head.logits)(task.head.params, base, moved, padded))
            scores += [task.metric(logits[p], labels) for p in range(len(part))]
    return np.asarray(scores, np.float64)


@functools.lru_cache(maxsize=64)
def combined_logits(logits: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The program of a head's logits ``[point, n, classes]`` at base features plus combinations of moved ones."""

    def run(head_params: Any, base: jax.Array, moved: jax.Array, points: jax.Array) -> jax.Array:
        sums = jnp.einsum("pt,tnd->pnd", points, moved, precision=jax.lax.Precision.HIGHEST)
        features = base[None] + sums
        flat = logits(head_params, features.reshape(-1, base.shape[-1]))
        return flat.reshape(*features.shape[:2], -1)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def _combined_hits(logits: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The program of how many examples are right at each point, and of how many the logits are not numbers."""
    combined = combined_logits(logits)

    def run(head_params: Any, base: Any, moved: Any, points: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
        found = combined(head_params, base, moved, points)
        hits = jnp.argmax(found, axis=-1) == labels[None, :]
        bad = jnp.any(jnp.isnan(found), axis=-1)
        return jnp.sum(hits, axis=1, dtype=jnp.int32), jnp.sum(bad, axis=1, dtype=jnp.int32)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def _pushforward_program(adapted: Any, features: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(params: Any, stacked: Any, inputs: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        outputs, tangents = adapted.pushforward(params, stacked, **inputs)

        def of(outputs: Any) -> jax.Array:
            return features(outputs, inputs).astype(jnp.float32)

        # The derivative of a linear (or affine) function is its linear part, without the cancellation of a
        # difference.
        here, linear_part = jax.linearize(of, outputs)
        along = jax.vmap(linear_part)(tangents)
        # An affine function satisfies g(-2x) = 3 g(0) - 2 g(x); norms, rectifiers and saturations do not.
        zero = of(jax.tree.map(jnp.zeros_like, outputs))
        mirrored = of(jax.tree.map(lambda leaf: -2 * leaf, outputs))
        gap = jnp.max(jnp.abs(mirrored - (3.0 * zero - 2.0 * here)))
        return here, along, gap / jnp.maximum(jnp.max(jnp.abs(here)), jnp.finfo(jnp.float32).tiny)

    return jax.jit(run)
