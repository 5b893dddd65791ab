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
from pefusion_jax.in_turn import after, in_turn


def match_norm(method: Fusion, scale: float | jax.Array = 1.0) -> Fusion:
    r"""Makes what another method gives as long as the task vectors are on average.

    .. math:: \tau = s\,\frac{\frac1T \sum_t \|\tau_t\|}{\|\tau_\text{inner}\|}\,\tau_\text{inner}

    with the norms of whole trees. It replaces the inner method's own scale, which is lost. Where tasks have little in common
    the average is about :math:`\sqrt T` times shorter than each. What this is worth differs: much on
    ``experiments/text_suite``, nothing so far on ``experiments/vision_suite``. Low-rank changes stay low-rank if they do in the
    inner method. Use it in weight space.

    Args:
      method: the inner method; its scale must not be 0, nor so small that its result is taken for rounding errors.
      scale: :math:`s`; may be traced.

    Reference:
      None: a rule of this library. A result of zeros, up to rounding, is not made longer.
    """

    def factor(fused: Iterable[Change], of_tasks: list[list[Change]]) -> jax.Array:
        result = list(fused)
        # Not before the whole result, among whose decompositions are the inner method's.
        length, *lengths = in_turn(_norm, [after(result, result), *of_tasks])
        mean = sum(lengths[1:], lengths[0]) / len(lengths)
        # What the tasks leave of each other by rounding alone has no direction.
        some = length > 4 * float(jnp.finfo(length.dtype).eps) * len(lengths) * mean
        ratio = jnp.where(some, mean / jnp.where(some, length, jnp.ones_like(length)), jnp.ones_like(length))
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
    """Length of a tree of changes taken as one vector."""
    squares = in_turn(_square, changes)
    widest = jnp.result_type(*(square.dtype for square in squares))
    return jnp.sqrt(sum((square.astype(widest) for square in squares), jnp.zeros((), widest)))


def _square(change: Change) -> jax.Array:
    """Squared length, of a pair A B that of R B for A = Q R: from Gram matrices, squares would cancel where tasks do."""
    wide = trees.wide_dtype(change.dtype)
    if isinstance(change, LowRank):
        if not change.rank:
            return jnp.zeros((), wide)
        r = jnp.linalg.qr(change.a.astype(wide), mode="r")
        change = jnp.matmul(r, change.b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(change.astype(wide)))
