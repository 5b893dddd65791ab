r"""Parts of fusion methods as other tools have them, where they differ from the papers.

What differs is seldom the idea: which entries are compared with which, who wins a drawn vote, what a sum is divided by.
Each such choice is one part here, so that ``conform="mergekit"`` and its like are chains as every other method is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.fusion.parts import Part, floor_of, keep, uniform

Tree = Any
Weights = Callable[[int], jax.Array]


def by_rows(part: Part) -> Part:
    """Makes a part that compares the entries of a tensor compare those of each row.

    A row is all inputs of one output, which is what the rows of a weight are in PyTorch: the columns of a kernel
    ``[..., inputs, outputs]``, and the rows of a leaf named ``embedding``. A vector is one row.

    Args:
      part: a part whose leaves are each treated on their own; it gets one leaf ``[task * rows, entries]`` for each.
    """

    def whole(stacked: Tree) -> Tree:
        laid = {path: _rows_last(path, leaf) for path, leaf in trees.paths(stacked).items()}
        done = part({path: leaf.reshape(-1, leaf.shape[-1]) for path, leaf in laid.items()})
        back = [_undo(path, done[path].reshape(laid[path].shape), leaf) for path, leaf in trees.paths(stacked).items()]
        return jax.tree.unflatten(jax.tree.structure(stacked), back)

    return whole


def _by_output(path: str, leaf: jax.Array) -> bool:
    return leaf.ndim > 2 and path.rpartition("/")[2] != "embedding"


def _rows_last(path: str, leaf: jax.Array) -> jax.Array:
    """``[task, ..., entries of a row]``."""
    if leaf.ndim == 1:
        return leaf[:, None]
    return jnp.moveaxis(leaf, -1, 1).reshape(len(leaf), leaf.shape[-1], -1) if _by_output(path, leaf) else leaf


def _undo(path: str, laid: jax.Array, like: jax.Array) -> jax.Array:
    if not _by_output(path, like):
        return laid.reshape(like.shape)
    return jnp.moveaxis(laid.reshape(len(like), like.shape[-1], *like.shape[1:-1]), 1, -1)


def magprune(density: float | jax.Array, window: float | jax.Array, key: jax.Array | int, *, rescale: bool = True) -> Part:
    r"""Drops entries at random, the small ones of each row more often: MAGPRUNE.

    .. math:: \hat\tau_j = \frac{m_j\,\tau_j}{p_j}, \quad m_j \sim \mathrm{Bernoulli}(p_j), \quad
       p_j = p - \frac{\epsilon}{2} + \epsilon\,\frac{\mathrm{rank}_j - 1}{n - 1}

    Args:
      density: :math:`p`, the mean probability with which an entry is kept; may be traced.
      window: :math:`\epsilon`, how much likelier the largest of the n entries of a row is kept than the smallest; may be
        traced.
      key: a key, or the seed of one.
      rescale: divide what is kept by its probability.
    """

    def probabilities(flat: Tree) -> Tree:
        def one(leaf: jax.Array) -> jax.Array:
            if leaf.shape[-1] == 1:
                return jnp.broadcast_to(jnp.asarray(density, leaf.dtype), leaf.shape)
            rank = jnp.argsort(jnp.argsort(jnp.abs(leaf), axis=-1), axis=-1).astype(leaf.dtype)
            middle, width = jnp.asarray(density, leaf.dtype), jnp.asarray(window, leaf.dtype)
            return middle + width * (rank / (leaf.shape[-1] - 1) - 0.5)

        return jax.tree.map(one, flat)

    def part(stacked: Tree) -> Tree:
        chances = trees.paths(by_rows(probabilities)(stacked))

        def one(path: str, leaf: jax.Array) -> jax.Array:
            chance = chances[path]
            kept = uniform(path, leaf, key).astype(leaf.dtype) < chance
            return jnp.where(kept, leaf / chance if rescale else leaf, jnp.zeros_like(leaf))

        return trees.map_paths(one, stacked)

    return part


def keeping_l1(part: Part) -> Part:
    """Scales what a sparsifying part leaves of each task's tensor back to the tensor's L1 norm, as mergekit does."""

    def rescale(before: jax.Array, after: jax.Array) -> jax.Array:
        axes = tuple(range(1, before.ndim))
        old, new = (jnp.sum(jnp.abs(leaf), axis=axes, keepdims=True) for leaf in (before, after))
        measurable = (old >= 1e-7) & (new >= 1e-7)
        return after * jnp.where(measurable, old / jnp.where(measurable, new, jnp.ones_like(new)), jnp.ones_like(new))

    return lambda stacked: jax.tree.map(rescale, stacked, part(stacked))


def keep_floor(density: float | jax.Array) -> Part:
    """Keeps the ``floor(density * n)`` largest entries of each tensor, as PEFT does: none where that is zero."""

    def one(leaf: jax.Array) -> jax.Array:
        return keep([leaf], floor_of(density, leaf[0].size))[0]

    return lambda stacked: jax.tree.map(one, stacked)


def keep_one_more(density: float | jax.Array) -> Part:
    """Keeps ``floor(density * n) + 1`` entries of each task's whole tree: the TIES authors' threshold keeps what equals it."""

    def part(stacked: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(stacked)
        size = sum(leaf[0].size for leaf in leaves)
        return jax.tree.unflatten(structure, keep(leaves, jnp.minimum(floor_of(density, size) + 1, size)))

    return part


def keep_middle(density: float | jax.Array, outliers: float | jax.Array) -> Part:
    """Keeps ``floor(density * n)`` entries of each tensor after the ``floor(outliers * n)`` largest, as mergekit does.

    Fewer of the largest are removed where there would not be enough entries left.
    """

    def one(leaf: jax.Array) -> jax.Array:
        wanted = floor_of(density, leaf[0].size)
        removed = jnp.minimum(floor_of(outliers, leaf[0].size), leaf[0].size - wanted)
        return keep([leaf], removed + wanted)[0] - keep([leaf], removed)[0]

    return lambda stacked: jax.tree.map(one, stacked)


def weigh(weights: Weights) -> Part:
    """Multiplies each task's entries by the task's weight."""

    def one(leaf: jax.Array) -> jax.Array:
        return leaf * _along_tasks(weights, leaf)

    return lambda stacked: jax.tree.map(one, stacked)


def _along_tasks(weights: Weights, leaf: jax.Array) -> jax.Array:
    return weights(len(leaf)).astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))


def elect(by: Literal["sum", "count"], undecided: Literal["plus", "majority"]) -> Part:
    """Elects signs as :func:`~pefusion_jax.fusion.parts.elect`, but drawn votes go as in another tool.

    Args:
      by: vote by the sum of the values or by the count of the tasks.
      undecided: sign of a coordinate whose vote is zero: always ``"plus"`` (PEFT, mergekit), or the ``"majority"`` of the
        tree's coordinates and minus if that is a draw as well (the TIES authors' code, FusionBench).
    """
    if by not in ("sum", "count"):
        raise ValueError(f"signs are elected by 'sum' or 'count', not {by!r}")

    def part(stacked: Tree) -> Tree:
        votes = jax.tree.map(lambda leaf: jnp.sum(leaf if by == "sum" else jnp.sign(leaf), axis=0), stacked)
        balance = sum((jnp.sum(jnp.sign(vote), dtype=jnp.int32) for vote in jax.tree.leaves(votes)), jnp.int32(0))

        def agreeing(leaf: jax.Array, vote: jax.Array) -> jax.Array:
            plus = vote >= 0 if undecided == "plus" else (vote > 0) | ((vote == 0) & (balance > 0))
            return jnp.where(jnp.where(plus[None], leaf > 0, leaf < 0), leaf, jnp.zeros_like(leaf))

        return jax.tree.map(agreeing, stacked, votes)

    return part


def peft_disjoint_mean(weights: Weights) -> Part:
    """The weighted sum of the entries that are not zero, over their number: PEFT's division leaves the weights out."""

    def reduce(leaf: jax.Array) -> jax.Array:
        count = jnp.sum(leaf != 0, axis=0, dtype=jnp.int32)
        return jnp.sum(leaf * _along_tasks(weights, leaf), axis=0) / jnp.maximum(count, 1).astype(leaf.dtype)

    return lambda stacked: jax.tree.map(reduce, stacked)


def mergekit_merge(weights: Weights, *, consensus: bool, normalize: bool) -> Part:
    """mergekit's end of every task-vector method: weigh, elect signs on the weighted entries, add up, divide by the weights.

    Args:
      weights: number of tasks -> one weight for each.
      consensus: leave out the entries whose sign lost.
      normalize: divide each coordinate by the sum of the weights of the tasks that are in it.
    """

    def reduce(weighted: jax.Array) -> jax.Array:
        total = jnp.sum(weighted, axis=0)
        if not normalize:
            return total
        counted = jnp.broadcast_to(_along_tasks(weights, weighted), weighted.shape)
        if consensus:
            counted = jnp.where(weighted != 0, counted, jnp.zeros_like(counted))
        divisor = jnp.sum(counted, axis=0)
        none = divisor == 0 if consensus else jnp.abs(divisor) < 1e-8
        return total / jnp.where(none, jnp.ones_like(divisor), divisor)

    def part(stacked: Tree) -> Tree:
        weighted = weigh(weights)(stacked)
        return jax.tree.map(reduce, elect("sum", "plus")(weighted) if consensus else weighted)

    return part


def require(method: str, conform: str, known: tuple[str, ...], **belong: tuple[Any, tuple[str, ...]]) -> None:
    """Checks that a tool is known and that no argument is given that belongs to other tools.

    Args:
      method: name of the method, for the error.
      conform: the tool asked for.
      known: the tools that the method conforms to.
      **belong: name of an argument -> its value, ``None`` if not given, and the tools that have it.

    Raises:
      ValueError: naming the choice, and what there is.
    """
    if conform not in known:
        raise ValueError(f"{method} conforms to {', '.join(repr(name) for name in known)}, not {conform!r}")
    for name, (value, tools) in belong.items():
        if value is not None and conform not in tools:
            raise ValueError(
                f"{method} takes {name} only with conform={' or '.join(repr(tool) for tool in tools)}, not with {conform!r}"
            )
