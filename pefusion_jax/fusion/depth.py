"""LiNeS: any fusion method, with the deeper layers changed more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import deltas, trees
from pefusion_jax.deltas import Change
from pefusion_jax.fusion.parts import Changes, Fusion

Tree = Any
LAYERS = r"(?:^|/)(?:layers?|blocks?|h|resblocks)[/_](\d+)(?=/|$)"


def lines(
    method: Fusion,
    *,
    beta: float | jax.Array = 0.5,
    alpha: float | jax.Array | None = None,
    layers: str = LAYERS,
    depth: int | None = None,
) -> Fusion:
    r"""LiNeS: scales what another method gives, from :math:`\alpha` at the first layer to :math:`\alpha+\beta` at the last.

    .. math:: \tau^{(l)} = \Big(\alpha + \beta\,\frac{l}{L-1}\Big)\, \tau_\text{inner}^{(l)}, \qquad
       \alpha = \frac{1}{T}\,\frac{\|\sum_t \tau_t\|_1}{\|\tau_\text{inner}\|_1} \text{ unless given}

    Leaves outside the layers (embeddings, heads, final norms) are scaled by :math:`\alpha`. Low-rank changes stay low-rank if
    they do in the inner method. Use it in weight space: on the factors A and B apart the scale would enter twice. For a
    single task, to forget less of everything else, the authors take ``average()`` with :math:`\alpha = \gamma` and
    :math:`\beta = 1 - \gamma`.

    Args:
      method: the inner method, usually at scale 1: :math:`\beta` takes the scale's place.
      beta: :math:`\beta`, chosen by the authors on validation data (up to 1 for task arithmetic, 1.5 for TIES); may be
        traced. The default is the middle of their grid.
      alpha: :math:`\alpha`; may be traced. ``None``: from the L1 norms, which is :math:`1/T` for task arithmetic.
      layers: regular expression whose first match in a path says that the leaf is in a layer, and whose group is the layer's
        number. The default finds numbers below ``layer``, ``layers``, ``block``, ``blocks``, ``h`` or ``resblocks``, and
        takes the outermost.
      depth: :math:`L`; ``None`` takes the largest number found in the same stack, so that it must be given if the last layers
        have no leaf here. Encoder and decoder are a stack each. The one layer of a stack of one counts as its first.

    Raises:
      ValueError: when it is applied, if no path is in a layer, or one is in a layer beyond ``depth``.

    Reference:
      Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, 2024.
    """
    pattern = re.compile(layers)

    def scales(total: jax.Array, merged: jax.Array, count: int, paths: Iterable[str]) -> Callable[[str], jax.Array]:
        base = jnp.asarray(alpha, total.dtype) if alpha is not None else _ratio(total, merged) / count
        places = _places(paths, pattern, depth)
        return lambda path: base + jnp.asarray(beta, total.dtype) * places[path]

    def apply(stacked: Tree) -> Tree:
        wide = jax.tree.map(lambda leaf: leaf.astype(trees.wide_dtype(leaf.dtype)), stacked)
        merged = method.apply(wide)
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), wide)
        count = len(jax.tree.leaves(stacked)[0])
        scale = scales(_l1(jax.tree.leaves(total)), _l1(jax.tree.leaves(merged)), count, trees.paths(merged))
        scaled = trees.map_paths(lambda path, leaf: leaf * scale(path).astype(leaf.dtype), merged)
        return jax.tree.map(lambda out, given: out.astype(given.dtype), scaled, stacked)

    def changes(given: Changes) -> dict[str, Change]:
        count = len(next(iter(given.values())))
        if method.changes is not None:
            merged = method.changes(given)
        else:
            merged = {path: _combine(of_tasks, method.weights(count)) for path, of_tasks in given.items()}  # type: ignore[misc]
        ones = jnp.ones((count,))
        total = _l1(deltas.dense(_combine(of_tasks, ones)) for of_tasks in given.values()) if alpha is None else jnp.zeros(())
        norm = _l1(deltas.dense(change) for change in merged.values()) if alpha is None else jnp.ones(())
        scale = scales(total, norm, count, merged)
        return {path: change * scale(path).astype(change.dtype) for path, change in merged.items()}

    def bind(names: tuple[str, ...]) -> Fusion:
        return lines(method.bind(names), beta=beta, alpha=alpha, layers=layers, depth=depth)  # type: ignore[misc]

    keeps_pairs = method.weights is not None or method.changes is not None
    return Fusion(apply, None, method.tasks, changes if keeps_pairs else None, None if method.bind is None else bind)


def _combine(of_tasks: tuple[Change, ...], weights: jax.Array) -> Change:
    return deltas.weighted_sum(of_tasks, weights.astype(of_tasks[0].dtype))


def _l1(leaves: Iterable[jax.Array]) -> jax.Array:
    norms = [jnp.sum(jnp.abs(leaf)) for leaf in leaves]
    wide = jnp.result_type(*(norm.dtype for norm in norms))
    return jnp.sum(jnp.stack([norm.astype(wide) for norm in norms]))


def _ratio(total: jax.Array, merged: jax.Array) -> jax.Array:
    return jnp.where(merged > 0, total / jnp.where(merged > 0, merged, jnp.ones_like(merged)), jnp.ones_like(merged))


def _places(paths: Iterable[str], pattern: re.Pattern[str], depth: int | None) -> dict[str, float]:
    """Path -> place of its layer, from 0, the first and what is in no layer, to 1, the last."""
    found = {path: pattern.search(path) for path in paths}
    if not any(found.values()):
        some = ", ".join(repr(path) for path in list(found)[:3])
        raise ValueError(
            f"no path is in a numbered layer that {pattern.pattern!r} finds: {some}; pass layers, a regular expression with "
            "one group that matches the number"
        )
    last: dict[str, int] = {}
    for path, match in found.items():
        if match and not match.group(1).isdigit():
            raise ValueError(
                f"layers={pattern.pattern!r} must have a group that matches a number; in {path!r}: {match.group(1)!r}"
            )
        if match:
            stack, number = path[: match.start(1)], int(match.group(1))
            last[stack] = max(last.get(stack, 0), number)
            if depth is not None and number >= depth:
                raise ValueError(f"{path!r} is in layer {number}, but depth says that there are {depth} layers, from 0")
    return {
        path: int(match.group(1)) / max((depth - 1) if depth else last[path[: match.start(1)]], 1) if match else 0.0
        for path, match in found.items()
    }
