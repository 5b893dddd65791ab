r"""Parts of fusion methods over stacked task trees, and what chains them.

A fusion method takes task trees stacked on a leading axis (every leaf ``[task, ...]``) and returns one tree
(every leaf ``[...]``). It is a chain of parts, the way an optax optimizer is a chain of gradient
transformations:

* *sparsify* zeroes entries of each task (:func:`trim`, :func:`cut`, :func:`drop`), stacked tree -> stacked tree;
* *elect* zeroes the entries that lost a vote between tasks (:func:`elect`), stacked tree -> stacked tree;
* *reduce* removes the task axis (:func:`reduce_sum`, :func:`reduce_mean`, :func:`disjoint_mean`, :func:`largest`,
  :func:`shared`), stacked tree -> tree;
* *rescale* multiplies (:func:`rescale`), tree -> tree or stacked tree -> stacked tree.

Every part is a plain function of a tree, so a new method is one more part and a line with :func:`chain`. All
of it jits and vmaps, and scale, weights and density may be traced values: a sweep over coefficients compiles
once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.deltas import Change

Tree = Any
Part = Callable[[Tree], Tree]
Changes = dict[str, tuple[Change, ...]]


class Fusion(NamedTuple):
    """A fusion method.

    Attributes:
      apply: stacked tree, leaves ``[task, ...]`` -> tree, leaves ``[...]``, of the same dtypes.
      weights: number of tasks -> ``[task]`` coefficients of a linear method; ``None`` for every other method.
        Linear methods keep low-rank changes exactly low-rank.
      tasks: the task names, sorted, that the coefficients belong to; ``None`` if they belong to positions.
      changes: for methods that combine low-rank pairs as they are: parameter path -> the change in each task, in stacking
        order, gives path -> combined change. The changes of a parameter are all pairs, of one shape and of any ranks, or all
        dense; a task that leaves it alone has a pair of rank 0, or zeros. ``None``: pairs are multiplied out for ``apply``.
      bind: for methods that go by the names of the trees: the names in stacking order -> the method to use.
    """

    apply: Callable[[Tree], Tree]
    weights: Callable[[int], jax.Array] | None = None
    tasks: tuple[str, ...] | None = None
    changes: Callable[[Changes], dict[str, Change]] | None = None
    bind: Callable[[tuple[str, ...]], Fusion] | None = None


def chain(*parts: Part) -> Fusion:
    """Composes parts, first to last, into a method; arithmetic is in float32 or wider, whatever is stored.

    Args:
      *parts: functions from tree to tree; one of them must remove the leading task axis.

    Example:
      >>> chain(trim(0.2), elect(), disjoint_mean(), rescale(0.3))   # this is ties(density=0.2, scale=0.3)
    """

    def apply(stacked: Tree) -> Tree:
        tree = jax.tree.map(_widen, stacked)
        for part in parts:
            tree = part(tree)
        return jax.tree.map(lambda out, given: out.astype(given.dtype), tree, stacked)

    return Fusion(apply)


def linear(weights: Callable[[int], jax.Array], tasks: tuple[str, ...] | None = None) -> Fusion:
    r"""The method :math:`\sum_t w_t \tau_t`.

    Args:
      weights: number of tasks -> coefficients ``[task]``.
      tasks: see :class:`Fusion`.
    """

    def apply(stacked: Tree) -> Tree:
        coefficients = weights(len(jax.tree.leaves(stacked)[0]))

        def combine(leaf: jax.Array) -> jax.Array:
            return weighted_sum(leaf, list(coefficients))

        return jax.tree.map(combine, stacked)

    return Fusion(apply, weights, tasks)


def weighted_sum(leaf: jax.Array, weights: Sequence[Any]) -> jax.Array:
    """The sum over tasks of a leaf ``[task, ...]``, one weight for each, in float32 or wider, stored as the leaf is.

    A loop, not a dot product: the order of the sum is fixed, float32 stays float32 on every accelerator, and one task at weight
    1 comes back bit for bit.
    """
    wide = _widen(leaf)
    total = wide[0] * jnp.asarray(weights[0], wide.dtype)
    for t in range(1, len(wide)):
        total = total + wide[t] * jnp.asarray(weights[t], wide.dtype)
    return total.astype(leaf.dtype)


def trim(density: float | jax.Array, scope: Literal["global", "per_tensor"] = "global") -> Part:
    r"""Keeps each task's largest entries by magnitude and zeroes the others.

    Exactly :math:`\max(1, \lfloor \text{density} \cdot n \rfloor)` entries are kept, :math:`n` being the size
    of the whole tree (``"global"``) or of each leaf (``"per_tensor"``). Of entries with the same magnitude
    those that come first are kept, in the order of the tree's paths and then of the array, so that the result
    is deterministic. A traced density is multiplied out in its own precision: in float32 the number may
    differ from that of a Python number by one or two spacings of float32 at that size: 1 each up to
    :math:`2^{24}` entries kept, 128 each near :math:`2^{31}`.

    The threshold is found by bisection on the bit pattern of the magnitudes, one counting pass a bit: exact,
    without a sort and without a flattened copy, and sharded arrays stay sharded.

    Args:
      density: fraction of entries kept, in (0, 1]; may be traced.
      scope: over which entries a task's magnitudes are compared.

    Raises:
      ValueError: if the density is outside (0, 1], the scope is unknown, or more than 2**31 - 1 entries are
        compared.
    """
    if not isinstance(density, jax.core.Tracer) and not 0.0 < float(density) <= 1.0:
        raise ValueError(f"density must be in (0, 1], the fraction of entries kept, but is {density}")
    if scope not in ("global", "per_tensor"):
        raise ValueError(f"trim's scope must be 'global' or 'per_tensor', not {scope!r}")

    def part(stacked: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(stacked)
        groups = [leaves] if scope == "global" else [[leaf] for leaf in leaves]
        kept = [leaf for group in groups for leaf in _keep_largest(group, density)]
        return jax.tree.unflatten(structure, kept)

    return part


def cut(fraction: float) -> Part:
    r"""Zeroes each task's largest entries by magnitude, :math:`\lfloor \text{fraction} \cdot n \rfloor` of each leaf's n.

    Args:
      fraction: of the entries of each leaf, in [0, 1).

    Raises:
      ValueError: if the fraction is outside [0, 1).
    """
    if not 0.0 <= float(fraction) < 1.0:
        raise ValueError(f"the fraction of entries to cut must be in [0, 1), but is {fraction}")

    def part(leaf: jax.Array) -> jax.Array:
        count = int(float(fraction) * leaf[0].size)
        return leaf - keep([leaf], jnp.int32(count))[0] if count else leaf

    return lambda stacked: jax.tree.map(part, stacked)


def drop(density: float | jax.Array, key: jax.Array | int) -> Part:
    r"""Keeps each entry with a probability and makes up for the loss: :math:`\hat\tau = m \odot \tau / p, \; m \sim
    \mathrm{Bernoulli}(p)`.

    What is drawn depends on the key, the leaf's path and the task's place alone, so that it is the same for every order of
    the leaves and with any other leaves beside it.

    Args:
      density: :math:`p`, in (0, 1]; may be traced.
      key: a key, or the seed of one.

    Raises:
      ValueError: if the density is outside (0, 1].
    """
    if not isinstance(density, jax.core.Tracer) and not 0.0 < float(density) <= 1.0:
        raise ValueError(f"density must be in (0, 1], the probability that an entry is kept, but is {density}")

    def one(path: str, leaf: jax.Array) -> jax.Array:
        kept = uniform(path, leaf, key) < jnp.asarray(density, jnp.float32)
        return jnp.where(kept, leaf / jnp.asarray(density, leaf.dtype), jnp.zeros_like(leaf))

    return lambda stacked: trees.map_paths(one, stacked)


def uniform(path: str, leaf: jax.Array, key: jax.Array | int) -> jax.Array:
    """Draws in [0, 1) for every entry of a leaf ``[task, ...]``, from the key, the leaf's path and the task's place alone.

    Args:
      path: of the leaf.
      leaf: whose shape is wanted.
      key: a key, or the seed of one.

    Returns:
      Float32.
    """
    own = jax.random.fold_in(jax.random.key(int(key)) if isinstance(key, Integral) else key, zlib.crc32(path.encode()))
    keys = jax.vmap(lambda task: jax.random.fold_in(own, task))(jnp.arange(len(leaf), dtype=jnp.uint32))
    return jax.vmap(lambda key: jax.random.uniform(key, leaf.shape[1:], jnp.float32))(keys)


def elect(by: Literal["sum", "count"] = "sum") -> Part:
    r"""Elects one sign for every coordinate and zeroes the entries of the other sign.

    .. math:: \gamma_j = \operatorname{sgn} \sum_t \hat\tau_{t,j}
       \quad\text{or}\quad \gamma_j = \operatorname{sgn} \sum_t \operatorname{sgn} \hat\tau_{t,j}

    Coordinates whose vote is exactly zero take the sign that most coordinates of the whole tree elected; if
    that is a draw too, they take plus.

    Args:
      by: ``"sum"`` votes by mass, ``"count"`` by the number of tasks.
    """
    if by not in ("sum", "count"):
        raise ValueError(f"signs are elected by 'sum' or 'count', not {by!r}")

    def part(stacked: Tree) -> Tree:
        votes = jax.tree.map(lambda leaf: jnp.sign(jnp.sum(leaf if by == "sum" else jnp.sign(leaf), axis=0)), stacked)
        balance = sum((jnp.sum(vote, dtype=jnp.int32) for vote in jax.tree.leaves(votes)), jnp.int32(0))

        def agreeing(leaf: jax.Array, vote: jax.Array) -> jax.Array:
            majority = jnp.where(balance >= 0, 1, -1).astype(vote.dtype)
            sign = jnp.where(vote == 0, majority, vote)
            return jnp.where(jnp.sign(leaf) == sign[None], leaf, jnp.zeros_like(leaf))

        return jax.tree.map(agreeing, stacked, votes)

    return part


def reduce_sum() -> Part:
    """Sum over tasks."""
    return lambda stacked: jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)


def reduce_mean() -> Part:
    """Mean over all tasks, zeros included."""
    return lambda stacked: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stacked)


def disjoint_mean() -> Part:
    """Mean, coordinate by coordinate, over the tasks whose entry is not zero; 0 where all are zero."""

    def reduce(leaf: jax.Array) -> jax.Array:
        count = jnp.sum(leaf != 0, axis=0, dtype=jnp.int32)
        return jnp.sum(leaf, axis=0) / jnp.maximum(count, 1).astype(leaf.dtype)

    return lambda stacked: jax.tree.map(reduce, stacked)


def largest() -> Part:
    """The entry of the largest magnitude among the tasks, coordinate by coordinate; of equal ones the first task's."""

    def reduce(leaf: jax.Array) -> jax.Array:
        return jnp.take_along_axis(leaf, jnp.argmax(jnp.abs(leaf), axis=0)[None], axis=0)[0]

    return lambda stacked: jax.tree.map(reduce, stacked)


def shared(threshold: float | jax.Array, agree: int) -> Part:
    r"""The sum over tasks at the coordinates that matter to several of them, 0 elsewhere.

    .. math:: \tau_j = \bar\tau_j \, [\, |\{t : |\tau_{t,j}| \ge \lambda |\bar\tau_j - \tau_{t,j}|\}| \ge k \,], \qquad
       \bar\tau = \sum_t \tau_t

    Args:
      threshold: :math:`\lambda`, how large a task's entry must be beside the sum of the others'; may be traced.
      agree: :math:`k`, the number of tasks that must meet it.
    """

    def reduce(leaf: jax.Array) -> jax.Array:
        total = jnp.sum(leaf, axis=0)
        matters = jnp.abs(leaf) >= jnp.asarray(threshold, leaf.dtype) * jnp.abs(total[None] - leaf)
        return jnp.where(jnp.sum(matters, axis=0, dtype=jnp.int32) >= agree, total, jnp.zeros_like(total))

    return lambda stacked: jax.tree.map(reduce, stacked)


def rescale(scale: float | jax.Array) -> Part:
    """Multiplies every leaf by ``scale``, which may be traced."""
    return lambda tree: jax.tree.map(lambda leaf: leaf * jnp.asarray(scale, leaf.dtype), tree)


def _widen(leaf: jax.Array) -> jax.Array:
    return leaf.astype(trees.wide_dtype(leaf.dtype))


def _keep_largest(leaves: list[jax.Array], density: float | jax.Array) -> list[jax.Array]:
    """Trims leaves ``[task, ...]``, all of them ranked together; see :func:`trim`."""
    total = sum(leaf[0].size for leaf in leaves)
    if total == 0:
        return leaves
    return keep(leaves, jnp.clip(floor_of(density, total), 1, total))


def floor_of(fraction: float | jax.Array, size: int) -> jax.Array:
    """``floor(fraction * size)`` as an int32; a traced fraction is multiplied out in its own precision.

    Raises:
      ValueError: for more entries than an int32 can count.
    """
    if size > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"cannot rank {size} entries of one task together, more than 2**31 - 1; trim per tensor")
    if isinstance(fraction, jax.core.Tracer):
        return jnp.floor(fraction * size).astype(jnp.int32)
    return jnp.int32(int(float(fraction) * size))


@jax.jit
def keep(leaves: list[jax.Array], kept: jax.Array) -> list[jax.Array]:
    """Zeroes all but the ``kept`` largest entries of each task, over all leaves ``[task, ...]`` together; see :func:`trim`.

    Compiled once for all numbers.
    """
    tasks = leaves[0].shape[0]
    # The bit patterns of non-negative floats order as the floats do.
    widest = max((jnp.dtype(leaf.dtype) for leaf in leaves), key=lambda dtype: dtype.itemsize)
    unsigned = jnp.dtype(f"uint{8 * widest.itemsize}")
    patterns = [jax.lax.bitcast_convert_type(jnp.abs(leaf.astype(widest)), unsigned).reshape(tasks, -1) for leaf in leaves]

    def count(compare: Callable[[jax.Array, jax.Array], jax.Array], threshold: jax.Array) -> jax.Array:
        counts = [jnp.sum(compare(p, threshold[:, None]), axis=1, dtype=jnp.int32) for p in patterns]
        return sum(counts[1:], counts[0])

    def settle_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        bit = jnp.left_shift(jnp.ones((), unsigned), (8 * widest.itemsize - 2 - i).astype(unsigned))
        higher = threshold | bit[None]
        return jnp.where(count(jnp.greater_equal, higher) >= kept, higher, threshold)

    # The largest threshold that at least `kept` entries reach, from the highest bit below the sign downwards.
    threshold = jax.lax.fori_loop(0, 8 * widest.itemsize - 1, settle_bit, jnp.zeros((tasks,), unsigned))

    room = kept - count(jnp.greater, threshold)  # entries equal to the threshold that may stay, the first ones
    out = []
    for leaf, pattern in zip(leaves, patterns, strict=True):
        equal = pattern == threshold[:, None]
        earlier = jnp.cumsum(equal, axis=1, dtype=jnp.int32)
        stays = (pattern > threshold[:, None]) | (equal & (earlier <= room[:, None]))
        out.append(jnp.where(stays.reshape(leaf.shape), leaf, jnp.zeros_like(leaf)))
        room = room - jnp.sum(equal, axis=1, dtype=jnp.int32)
    return out
