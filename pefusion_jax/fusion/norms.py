"""The length of a fused change by a rule, where no data is there to choose it on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.deltas import Change, LowRank
from pefusion_jax.fusion.matrices import bound, of_changes
from pefusion_jax.fusion.parts import Changes, Fusion


def match_norm(method: Fusion, scale: float | jax.Array = 1.0) -> Fusion:
    r"""Makes what another method gives as long as the task vectors are on average.

    .. math:: \tau = s\,\frac{\frac1T \sum_t \|\tau_t\|}{\|\tau_\text{inner}\|}\,\tau_\text{inner}

    with the norms of whole trees. It replaces the inner method's own scale, which is lost. Where tasks have little in common
    the average is about :math:`\sqrt T` times shorter than each. What this is worth differs: much on
    ``experiments/text_suite``, nothing so far on ``experiments/vision_suite``. Low-rank changes stay low-rank if they do in the
    inner method. Use it in weight space.

    Args:
      method: the inner method; its scale must not be 0.
      scale: :math:`s`; may be traced.

    Reference:
      None: a rule of this library. A result of zeros stays as it is.
    """

    def factor(fused: Iterable[Change], of_tasks: list[list[Change]]) -> jax.Array:
        mean = sum((_norm(one) for one in of_tasks[1:]), _norm(of_tasks[0])) / len(of_tasks)
        length = _norm(fused)
        ratio = jnp.where(length > 0, mean / jnp.where(length > 0, length, jnp.ones_like(length)), jnp.ones_like(length))
        return ratio * jnp.asarray(scale, ratio.dtype)

    def apply(stacked: Any) -> Any:
        wide = jax.tree.map(lambda leaf: leaf.astype(trees.wide_dtype(leaf.dtype)), stacked)
        leaves, fused = jax.tree.leaves(wide), method.apply(wide)
        times = factor(jax.tree.leaves(fused), [[leaf[t] for leaf in leaves] for t in range(len(leaves[0]))])
        return jax.tree.map(lambda out, given: (out * times.astype(out.dtype)).astype(given.dtype), fused, stacked)

    def changes(given: Changes) -> dict[str, Change]:
        fused = of_changes(method, given)
        count = len(next(iter(given.values())))
        times = factor(fused.values(), [[of_tasks[t] for of_tasks in given.values()] for t in range(count)])
        return {path: change * times.astype(change.dtype) for path, change in fused.items()}

    keeps_pairs = method.weights is not None or method.changes is not None
    bind = bound(method, lambda inner: match_norm(inner, scale))
    return Fusion(apply, tasks=method.tasks, changes=changes if keeps_pairs else None, bind=bind)


def _norm(changes: Iterable[Change]) -> jax.Array:
    """Length of a tree of changes taken as one vector, of pairs from their factors' Gram matrices."""
    squares = []
    for change in changes:
        wide = trees.wide_dtype(change.dtype)
        if isinstance(change, LowRank):
            a, b = change.a.astype(wide), change.b.astype(wide)
            with jax.default_matmul_precision("highest"):
                squares.append(jnp.sum((a.mT @ a) * (b @ b.mT)))
        else:
            squares.append(jnp.sum(jnp.square(change.astype(wide))))
    widest = jnp.result_type(*(square.dtype for square in squares))
    # The Gram form may round to just below zero.
    return jnp.sqrt(jnp.maximum(sum((square.astype(widest) for square in squares), jnp.zeros((), widest)), 0))
