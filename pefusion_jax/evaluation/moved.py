"""A model moved along several vectors: logits, losses and scores at coefficient vectors, by the cheapest exact way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees as tree_tools
from pefusion_jax.deltas import Delta
from pefusion_jax.evaluation.scores import head_logits
from pefusion_jax.evaluation.sweep import cache_outputs, combined_logits
from pefusion_jax.fusion import fuse, task_arithmetic
from pefusion_jax.tasks.task import Task, eval_batches

Space = Literal["weight", "adapter"]


class Runner(NamedTuple):
    """What can be asked of a moved model.

    Attributes:
      logits: (task name, coefficients ``[point, vector]``) -> the logits ``[n, classes]`` of the task's split, point by point.
      losses_and_scores: the same arguments -> mean losses ``[point]`` and scores ``[point]``.
      forwards: passes over a split that were paid for all points together; ``None`` where each point costs one.
    """

    logits: Callable[[str, np.ndarray], Iterator[np.ndarray]]
    losses_and_scores: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]
    forwards: int | None


def runner(
    adapted: Any,
    params: Any,
    vectors: Mapping[str, Any],
    tasks: Mapping[str, Task],
    split: str,
    batch_size: int,
    space: Space,
    init: Any,
) -> Runner:
    """Prepares a model for combinations of vectors; see ``analysis.disentanglement_error`` for the arguments.

    Raises:
      ValueError: for another space, vectors of several kinds or not finite; and, when it is run, for outputs not finite.
    """
    if space not in ("weight", "adapter"):
        raise ValueError(f"space must be 'weight' or 'adapter', not {space!r}")
    if init is not None and space != "adapter":
        raise ValueError("init is the common start of adapters that are added up in space='adapter'; pass it, or no init")
    for name, tree in vectors.items():
        tree_tools.require_finite(tree.leaves if isinstance(tree, Delta) else tree, repr(name))
    kinds = {isinstance(tree, Delta) for tree in vectors.values()}
    if len(kinds) > 1 or (True in kinds and space == "adapter"):
        raise ValueError("pass Deltas only, which are added up in space='weight', or adapters only")

    if adapted.pushforward is not None and space == "weight" and kinds == {False}:
        cached = cache_outputs(adapted, params, vectors, tasks, split=split, batch_size=batch_size)
        columns = [list(vectors).index(name) for name in cached.names]
        labels, forwards = cached.labels, cached.forwards

        def logits(name: str, points: np.ndarray) -> Iterator[np.ndarray]:
            return _affine_logits(tasks[name], cached.base[name], cached.moved[name], points[:, columns])

    else:
        if space == "adapter":
            moved = [tree if init is None else jax.tree.map(jnp.subtract, tree, init) for tree in vectors.values()]
        else:
            moved = [tree if isinstance(tree, Delta) else adapted.deltas(params, tree) for tree in vectors.values()]
        taking = adapted if space == "adapter" else None  # weight changes are the same for all tasks
        batches = {name: list(eval_batches(task, split, batch_size, adapted=taking)) for name, task in tasks.items()}
        labels = {name: np.concatenate([b["labels"][b["weights"] > 0] for b in of]) for name, of in batches.items()}
        forwards = None

        def logits(name: str, points: np.ndarray) -> Iterator[np.ndarray]:
            program = _moved_program(adapted, tasks[name].head.features, space)
            for point in points:
                # All batches are sent off before the first result is read.
                sent = [program(params, init, moved, point, batch["inputs"]) for batch in batches[name]]
                kept = [np.asarray(f)[b["weights"] > 0] for f, b in zip(sent, batches[name], strict=True)]
                yield head_logits(tasks[name].head, np.concatenate(kept))

    def checked(name: str, points: np.ndarray) -> Iterator[np.ndarray]:
        for point, found in zip(points, logits(name, points), strict=True):
            if not np.isfinite(found).all():
                where = ", ".join(f"{value:g} {vector}" for value, vector in zip(point, vectors, strict=True))
                raise ValueError(f"task {name!r}: outputs are not finite at {where}; choose smaller coefficients")
            yield found

    def losses_and_scores(name: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean_loss = _loss_program(tasks[name].loss)
        found = [(float(mean_loss(z, labels[name])), float(tasks[name].metric(z, labels[name]))) for z in checked(name, points)]
        losses, scores = np.asarray(found, np.float64).T
        return losses, scores

    return Runner(checked, losses_and_scores, forwards)


def _affine_logits(task: Task, base: np.ndarray, moved: np.ndarray, points: np.ndarray) -> Iterator[np.ndarray]:
    at_once = min(len(points), max(1, 2**22 // (base.size + len(base) * 64)))
    for start in range(0, len(points), at_once):
        part = points[start : start + at_once]
        # The last chunk is filled up, so that one program serves all.
        padded = np.concatenate([part, np.zeros((at_once - len(part), points.shape[1]), np.float32)])
        yield from np.asarray(combined_logits(task.head.logits)(task.head.params, base, moved, padded))[: len(part)]


@functools.lru_cache(maxsize=64)
def _moved_program(adapted: Any, features: Callable[..., jax.Array], space: Space) -> Callable[..., jax.Array]:
    def run(params: Any, init: Any, moved: list[Any], point: jax.Array, inputs: Any) -> jax.Array:
        tree = fuse(task_arithmetic(point), moved)
        if space == "weight":
            outputs = adapted.apply_deltas(params, tree, **inputs)
        else:
            outputs = adapted.apply(params, tree if init is None else jax.tree.map(jnp.add, init, tree), **inputs)
        return features(outputs, inputs).astype(jnp.float32)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def _loss_program(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(lambda logits, labels: jnp.mean(loss(logits, labels)))
