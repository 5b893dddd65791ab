"""Linear combinations whose coefficients differ from layer to layer, or from tensor to tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import deltas, trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import Change
from pefusion_jax.fusion.parts import Changes, Fusion, weighted_sum

GroupOf = Callable[[str], str]


def by_layer(path: str) -> str:
    """The numbered layer that a path belongs to, ``encoder/layer/3``; outside of layers the path's first segment."""
    segments = path.split("/")
    for place, segment in enumerate(segments[:-1]):
        if segment in STACKS and segments[place + 1].isdigit():
            return "/".join(segments[: place + 2])
    return segments[0]


def by_tensor(path: str) -> str:
    """The path itself: every parameter, or every leaf of a plain tree, is a group of its own."""
    return path


def whole(path: str) -> str:
    """One group, ``all``, for everything."""
    del path
    return "all"


def per_group(coefficients: Mapping[str, Mapping[str, Any]], groups: GroupOf = by_layer) -> Fusion:
    r"""A linear combination with coefficients of its own for each group of parameters.

    .. math:: \tau^{(g)} = \sum_t \lambda_t^{(g)} \tau_t^{(g)}

    Low-rank changes stay factor pairs, exactly. Layers that a scan has stacked count one by one.

    Args:
      coefficients: group -> tree name -> coefficient; values may be traced. Found by :func:`adamerging` and the other
        searches, or by ``evaluation.solve_coefficients``.
      groups: path -> group: :func:`by_layer`, :func:`by_tensor`, :func:`whole` or a function of your own.

    Raises:
      ValueError: when it is applied, if a group or a tree has no coefficient, or a coefficient has no tree.
    """
    if not coefficients:
        raise ValueError("per_group was given no coefficients; give a mapping group -> tree name -> coefficient")

    def bind(names: tuple[str, ...]) -> Fusion:
        for group, by_name in coefficients.items():
            if set(by_name) != set(names):
                raise ValueError(
                    f"group {group!r} has coefficients for {', '.join(sorted(by_name))}, but the trees are "
                    f"{', '.join(sorted(names))}; give one for each tree"
                )

        def of(path: str) -> Sequence[Any]:
            group = groups(path)
            if group not in coefficients:
                raise ValueError(
                    f"no coefficients for {group!r}, the group of {path!r}{trees.did_you_mean(group, coefficients)}"
                )
            return [coefficients[group][name] for name in names]

        return Fusion(lambda stacked: combine_stacked(stacked, of), changes=lambda given: combine_changes(given, of))

    def unbound(stacked: Any) -> Any:
        return bind(numbered(len(jax.tree.leaves(stacked)[0]))).apply(stacked)

    return Fusion(unbound, bind=bind)


def combine_stacked(stacked: Any, coefficients: Callable[[str], Any]) -> Any:
    """Combines leaves ``[tree, ...]``; ``coefficients`` gives one number for each tree at a path."""

    def combine(path: str, leaf: jax.Array) -> jax.Array:
        return weighted_sum(leaf, list(coefficients(path)))

    return trees.map_paths(combine, stacked)


def combine_changes(changes: Changes, coefficients: Callable[[str], Any]) -> dict[str, Change]:
    """Combines the changes of each parameter; pairs stay pairs."""
    out = {}
    for path, of_tasks in changes.items():
        dtype = of_tasks[0].dtype
        out[path] = deltas.weighted_sum(of_tasks, [jnp.asarray(weight, dtype) for weight in coefficients(path)])
    return out


def numbered(count: int) -> tuple[str, ...]:
    """Names of trees that are given as a sequence."""
    return tuple(f"tree {i}" for i in range(count))
