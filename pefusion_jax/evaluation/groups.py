"""Cached features of the parts of displacements, so that layers get coefficients of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.evaluation.sweep import Cached, cache_outputs
from pefusion_jax.fusion.grouped import by_layer, per_group
from pefusion_jax.fusion.parts import Fusion
from pefusion_jax.layerwise import join, separate, stacked_layers
from pefusion_jax.tasks.task import Task


class Grouped(NamedTuple):
    """Cached features of each group's part of each displacement, from :func:`cache_groups`.

    Attributes:
      cached: its displacements are all (group, displacement) pairs, groups outermost.
      groups: names of the groups.
      names: names of the displacements.
      of: path -> group.
    """

    cached: Cached
    groups: tuple[str, ...]
    names: tuple[str, ...]
    of: Callable[[str], str]

    def fusion(self, coefficients: np.ndarray) -> Fusion:
        """The fusion method with coefficients ``[group * displacement]``, for the displacements themselves."""
        table = np.asarray(coefficients).reshape(len(self.groups), len(self.names))
        rows = [dict(zip(self.names, map(float, row), strict=True)) for row in table]
        return per_group(dict(zip(self.groups, rows, strict=True)), self.of)


def cache_groups(
    adapted: Any,
    params: Any,
    taus: Mapping[str, Any],
    tasks: Iterable[Task] | Mapping[str, Task],
    groups: Callable[[str], str] = by_layer,
    *,
    split: str = "validation",
    batch_size: int = 64,
    at_once: int = 16,
) -> Grouped:
    """:func:`cache_outputs` for each group's part of each displacement, so that layers get coefficients of their own.

    It costs one forward pass for each displacement and group, and one more for every ``at_once`` of them.

    Args:
      adapted: a model with a ``pushforward``. If it is linear in the weights (``mode="weight"``) a group must hold all leaves
        of a module or none.
      params: its base parameters.
      taus: name -> displacement.
      tasks: see :func:`cache_outputs`, also for ``split`` and ``batch_size``.
      groups: path of a leaf -> group; layers that a scan has stacked count one by one.
      at_once: displacements in one pass; memory grows with it.

    Raises:
      ValueError: as :func:`cache_outputs`, or if a module is torn apart where that is no linear combination.
    """
    if at_once < 1:
        raise ValueError(f"at_once={at_once} must be 1 or more")
    names = tuple(sorted(taus))
    trees.require_same_structure({name: taus[name] for name in names})
    flat = [trees.flat(taus[name]) for name in names]
    leaves = {path: tuple(of_task[path] for of_task in flat) for path in sorted(flat[0])}
    counts = stacked_layers(leaves, STACKS)
    apart = separate(leaves, counts)
    found = tuple(sorted({groups(path) for path in apart}))
    if adapted.origin is not None and adapted.origin.mode == "weight":
        of_module: dict[str, str] = {}
        for path in apart:
            module = path.rpartition("/")[0]
            if of_module.setdefault(module, groups(path)) != groups(path):
                raise ValueError(
                    f"the leaves of {module!r} are in two groups, {of_module[module]!r} and {groups(path)!r}; in "
                    "mode='weight' their changes do not add up: put a module into one group"
                )

    def part(group: str, t: int) -> Any:
        picked = {p: of_tasks[t] if groups(p) == group else jnp.zeros_like(of_tasks[t]) for p, of_tasks in apart.items()}
        return trees.nest(join(picked, counts))

    pairs = [(group, t) for group in found for t in range(len(names))]
    chunks = []
    for start in range(0, len(pairs), at_once):
        chunk = pairs[start : start + at_once]
        chunk += chunk[-1:] * (min(at_once, len(pairs)) - len(chunk))  # filled up: one program serves all
        named = {f"{place:06d}": part(group, t) for place, (group, t) in enumerate(chunk)}
        chunks.append(cache_outputs(adapted, params, named, tasks, split=split, batch_size=batch_size))
    moved = {task: np.concatenate([chunk.moved[task] for chunk in chunks])[: len(pairs)] for task in chunks[0].moved}
    cached = chunks[0]._replace(
        names=tuple(f"{group}:{names[t]}" for group, t in pairs),
        moved=moved,
        forwards=sum(chunk.forwards for chunk in chunks),
        batches=sum(chunk.batches for chunk in chunks),
    )
    return Grouped(cached, found, names, groups)
