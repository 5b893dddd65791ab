"""Scores of many fused adapters or weight changes, several of them in one compiled forward pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees as tree_tools
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.evaluation.scores import (
    Scores,
    batches_of,
    head_features,
    head_logits,
    named_tasks,
    standard_error,
    tree_kind,
)
from pefusion_jax.tasks.task import Batch, Task


def evaluate_many(
    adapted: Any,
    params: Any,
    trees: Sequence[Any],
    tasks: Iterable[Task] | Mapping[str, Task],
    *,
    split: str = "validation",
    batch_size: int = 64,
    at_once: int | None = None,
) -> list[Scores]:
    """Scores of several trees, or of several Deltas, of one structure: :func:`evaluate` of each.

    ``at_once`` of them run in one program, over the same batch: for accelerators that one batch does not fill. On a CPU it was
    slower at every size that was tried, since it saves no products and larger activations leave the caches.

    Args:
      adapted, params, tasks, split, batch_size: as in :func:`~pefusion_jax.evaluation.evaluate`.
      trees: trees of one structure, or Deltas of the same parameters; low-rank changes may differ in rank.
      at_once: trees in one forward pass; memory for activations, and for Deltas for the changed weights, grows with it. By
        default 1 on a CPU, which is a plain loop, and 4 on others.

    Returns:
      Scores, in the order of ``trees``.

    Raises:
      ValueError: if there is no tree, structures differ (naming both, and the path), or as ``evaluate``.
    """
    at_once = (1 if jax.default_backend() == "cpu" else 4) if at_once is None else at_once
    if isinstance(trees, Delta | Mapping) or not len(trees):
        raise ValueError("evaluate_many takes a sequence of one or more trees or Deltas; for one of them use evaluate")
    features = features_of_many(adapted, params, trees, tasks, split=split, batch_size=batch_size, at_once=at_once)
    results: list[tuple[dict, dict, dict]] = [({}, {}, {}) for _ in trees]
    for name, task in named_tasks(tasks).items():
        of_trees, labels = features[name]
        for (values, errors, counts), rows in zip(results, of_trees, strict=True):
            logits = head_logits(task.head, rows)
            values[name] = task.metric(logits, labels)
            errors[name] = standard_error(task, logits, labels, values[name])
            counts[name] = len(labels)
    return [Scores(*result) for result in results]


def features_of_many(
    adapted: Any,
    params: Any,
    trees: Sequence[Any],
    tasks: Iterable[Task] | Mapping[str, Task],
    *,
    split: str,
    batch_size: int,
    at_once: int,
    batches: Mapping[str, Sequence[Batch]] | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features ``[tree, n, d]`` and labels ``[n]`` of each task; see :func:`evaluate_many`."""
    if at_once < 1:
        raise ValueError(f"at_once={at_once} must be 1 or more")
    by_name = named_tasks(tasks)
    if batches is None:
        kind = tree_kind(trees[0])
        batches = {name: list(batches_of(kind, adapted, task, split, batch_size)) for name, task in by_name.items()}
    if at_once == 1:
        single = {
            n: [head_features(tree_kind(tree), adapted, params, tree, t.head, batches[n]) for tree in trees]
            for n, t in by_name.items()
        }
        return {name: (np.stack([features for features, _ in found]), found[0][1]) for name, found in single.items()}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in by_name}
    for start in range(0, len(trees), at_once):
        chunk = list(trees[start : start + at_once])
        # The last chunk is filled up, so that one program serves all.
        filled = chunk + chunk[-1:] * (min(at_once, len(trees)) - len(chunk))
        stacked = _stacked(filled, start)
        for name, task in by_name.items():
            program = _program(adapted, task.head.features, isinstance(chunk[0], Delta))
            parts = [program(params, stacked, batch["inputs"]) for batch in batches[name]]
            rows[name].append(np.concatenate([np.asarray(part)[: len(chunk)] for part in parts], axis=1))
    out = {}
    for name in by_name:
        real = np.concatenate([batch["weights"] for batch in batches[name]]) > 0
        labels = np.concatenate([batch["labels"] for batch in batches[name]])
        out[name] = (np.concatenate(rows[name])[:, real], labels[real])
    return out


def _stacked(trees: Sequence[Any], first: int) -> Any:
    """Trees on a leading axis; pairs of different rank are filled up with zeros."""
    if isinstance(trees[0], Delta):
        ranks: dict[str, int] = {}
        for tree in trees:
            for path, change in tree.leaves.items() if isinstance(tree, Delta) else ():
                if isinstance(change, LowRank):
                    ranks[path] = max(ranks.get(path, 0), change.rank)
        trees = [
            Delta({p: _padded(c, ranks[p]) if isinstance(c, LowRank) else c for p, c in tree.leaves.items()})
            if isinstance(tree, Delta)
            else tree
            for tree in trees
        ]
    structures = {jax.tree.structure(tree) for tree in trees}
    tree_tools.require_same_structure({f"tree {first + i}": tree for i, tree in enumerate(trees)})
    if len(structures) > 1:
        raise ValueError("the trees are of different kinds, such as low-rank pairs and dense changes of one parameter")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _padded(change: LowRank, rank: int) -> LowRank:
    missing = rank - change.rank
    if not missing:
        return change
    width = [(0, 0)] * (change.a.ndim - 2)
    return dataclasses.replace(
        change,
        a=jnp.pad(change.a, [*width, (0, 0), (0, missing)]),
        b=jnp.pad(change.b, [*width, (0, missing), (0, 0)]),
    )


@functools.lru_cache(maxsize=64)
def _program(adapted: Any, features: Callable[..., jax.Array], delta: bool) -> Callable[..., jax.Array]:
    def run(params: Any, stacked: Any, inputs: Any) -> jax.Array:
        def one(tree: Any) -> jax.Array:
            outputs = (adapted.apply_deltas if delta else adapted.apply)(params, tree, **inputs)
            return features(outputs, inputs).astype(jnp.float32)

        return jax.vmap(one)(stacked)

    return jax.jit(run)
