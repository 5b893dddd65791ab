"""Adapters of their own for each task, as one tree: the plainest of generators."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.generators.kinds import check_expression
from pefusion_jax.generators.layout import Layout
from pefusion_jax.generators.names import different


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerTask:
    """Learned adapters for each task, all from one start; those that ``shared`` matches are the same for all tasks.

    Attributes:
      tasks: names of the tasks, in order: that of the leading axis of the tree's leaves.
      shared: regular expression for whole paths of adapter leaves.

    Reference: the task-specific adapters that R. Karimi Mahabadi et al., Parameter-efficient Multi-task Fine-tuning for
    Transformers via Shared Hypernetworks, 2021, compare with; there the normalisations are shared.
    """

    tasks: tuple[str, ...]
    shared: str = r"(?!)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", different("tasks", self.tasks))
        check_expression("shared", self.shared)

    def init(self, key: jax.Array, adapters: dict[str, Any], params: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """``shared/PATH`` as in the adapters, ``own/PATH`` with the tasks in front."""
        del key, params, layout
        flat: dict[str, Any] = {}
        for path, leaf in adapters.items():
            if re.fullmatch(self.shared, path):
                flat[f"shared/{path}"] = leaf
            else:
                flat[f"own/{path}"] = jnp.tile(leaf[None], (len(self.tasks), *(1 for _ in leaf.shape)))
        if self.shared != r"(?!)" and not any(path.startswith("shared/") for path in flat):
            raise ValueError(f"shared={self.shared!r} matches no adapter leaf{trees.did_you_mean(self.shared, adapters)}")
        return trees.nest(flat)

    def make(self, tree: Any, params: dict[str, Any], layout: Layout, task: jax.Array | None) -> dict[str, Any]:
        """The leaves of a task."""
        del params, layout
        own = trees.flat(tree.get("own", {}))
        for path, leaf in own.items():
            if leaf.shape[0] != len(self.tasks):
                raise ValueError(f"the tree has {leaf.shape[0]} tasks at {path!r}, the generator {len(self.tasks)}")
        return {**{path: leaf[task] for path, leaf in own.items()}, **trees.flat(tree.get("shared", {}))}

    def kept(self, tree: Any) -> dict[str, str]:
        """Path in the tree -> path of the adapter leaf: all of it."""
        return {path: path.partition("/")[2] for path in trees.flat(tree)}

    def trained(self, tree: Any) -> dict[str, Any]:
        """All of it; of these the model leaves out what its methods hold still."""
        return trees.nest(trees.flat(tree))

    def moving(self, tree: Any) -> dict[str, Any]:
        """All of it: whether a leaf at zero holds another still is the method's affair, and differs between tasks."""
        return self.trained(tree)
