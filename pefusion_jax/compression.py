"""Weight-space changes at a smaller rank, and as ordinary LoRA adapters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import Change, Delta, LowRank
from pefusion_jax.in_turn import after, in_turn
from pefusion_jax.layerwise import stacked_layers
from pefusion_jax.methods.lora import LoRA


class Compressed(NamedTuple):
    r"""A change of smaller rank and what that has cost.

    Attributes:
      delta: the change.
      residuals: path -> :math:`\|\Delta - \hat\Delta\|_F / \|\Delta\|_F`, float32, with :math:`\hat\Delta` of the factors as
        they are stored, rounded to the dtype of the change; 0 for what was kept as it is, NaN for a change that is not finite.
      residual: the same of all changes together, as one vector.
    """

    delta: Delta
    residuals: dict[str, jax.Array]
    residual: jax.Array


def compress(delta: Delta, rank: int, *, stacks: Collection[str] = STACKS) -> Compressed:
    r"""The best approximation of rank r of each matrix in a change.

    .. math:: \hat\Delta = U_{1:r} \Sigma_{1:r} V_{1:r}^\top, \qquad \Delta = U \Sigma V^\top

    Pairs are decomposed through their QR factors and never multiplied out; stacked layers and experts each get their own. Pairs
    of no higher rank than r, and what is not a matrix (biases, convolution kernels), are kept as they are. The roots of the
    singular values go into both factors, so that either fits a narrow float format.

    Args:
      delta: pairs, and dense arrays.
      rank: r.
      stacks: names of nodes below which dense leaves may be layers stacked by a scan, as in
        :func:`~pefusion_jax.fusion.fuse`: each is a matrix of its own.

    Raises:
      ValueError: if the rank is below 1, or an array is sharded over explicit mesh axes.

    Reference:
      Eckart and Young, *The approximation of one matrix by another of lower rank*, 1936.
    """
    if rank < 1:
        raise ValueError(f"compress needs a rank of at least 1, not {rank}")
    trees.require_auto_axes(delta.leaves, "the change")
    leaves: dict[str, Change] = {}
    lost, whole = {}, {}
    scanned = stacked_layers({path: (change,) for path, change in delta.leaves.items()}, stacks)
    with jax.default_matmul_precision("highest"):
        axes = [3 if any(path.startswith(node + "/") for node in scanned) else 2 for path in delta.leaves]
        made = in_turn(lambda item: _truncate(item[0], rank, item[1]), zip(delta.leaves.values(), axes, strict=True))
    for path, (leaf, rest, every) in zip(delta.leaves, made, strict=True):
        leaves[path], lost[path], whole[path] = leaf, rest, every
    residuals = {path: _ratio(lost[path], whole[path]) for path in leaves}
    return Compressed(Delta(leaves), residuals, _ratio(_norm(*lost.values()), _norm(*whole.values())))


def lora_of(delta: Delta) -> tuple[LoRA, dict[str, Any]]:
    """A change of low-rank pairs as a LoRA method and its adapters.

    ``adapt(model, method).deltas(params, adapters)`` is the change again, so that what was fused as pairs can be trained on,
    saved and served like any LoRA. The scale is 1 throughout.

    Args:
      delta: pairs of kernels and embeddings.

    Returns:
      The method, whose ``targets`` name exactly the changed layers, and the adapters. A pair of rank 0 becomes one of rank 1
      with zeros.

    Raises:
      ValueError: naming the path of a change that is dense, that is not of a kernel or an embedding, or whose axes cannot be
        told apart; or if there is none at all.
    """
    if not delta.leaves:
        raise ValueError("this change is empty: there is no layer that a LoRA could be put on")
    adapters: dict[str, jax.Array] = {}
    ranks: dict[str, int] = {}
    for path, change in delta.leaves.items():
        site, _, name = path.rpartition("/")
        if not isinstance(change, LowRank):
            raise ValueError(
                f"the change of {path!r} is a dense array of shape {change.shape}, and a LoRA stores pairs of low rank; "
                "compress(delta, rank) makes pairs of matrices, vectors have to be left out or folded"
            )
        if name not in ("kernel", "embedding"):
            raise ValueError(f"{path!r} is not the kernel or embedding of a layer, which is what a LoRA changes")
        if not change.rank:
            change = dataclasses.replace(change, a=jnp.zeros((*change.a.shape[:-1], 1), change.dtype), b=_zeros_row(change.b))
        prefix = site + "/" if site else ""
        adapters[prefix + "lora_a"], adapters[prefix + "lora_b"] = _leaves(path, change)
        ranks[site] = change.rank
    rank = Counter(ranks.values()).most_common(1)[0][0]
    method = LoRA(
        rank=rank,
        targets="|".join(re.escape(site) for site in ranks),
        rank_pattern={re.escape(site): own for site, own in ranks.items() if own != rank},
    )
    return method, trees.nest(adapters)


def _zeros_row(b: jax.Array) -> jax.Array:
    return jnp.zeros((*b.shape[:-2], 1, b.shape[-1]), b.dtype)


def _ratio(lost: jax.Array, whole: jax.Array) -> jax.Array:
    nothing = whole == 0
    return jnp.where(nothing, jnp.zeros_like(lost), lost / jnp.where(nothing, jnp.ones_like(whole), whole))


def _truncate(change: Change, rank: int, axes: int) -> tuple[Change, jax.Array, jax.Array]:
    """The truncated change, the norm of what is lost, and that of the whole change.

    Dense changes are matrices if they have so many axes, three where the first is that of layers.
    """
    wide = trees.wide_dtype(change.dtype)
    if isinstance(change, LowRank):
        q_a, r_a = jnp.linalg.qr(change.a.astype(wide))
        q_b, r_b = jnp.linalg.qr(after(change.b.astype(wide).mT, q_a))
        core = r_a @ r_b.mT
        if change.rank <= rank:
            return change, jnp.float32(0), _norm(core)
    elif change.ndim == axes:
        core = change.astype(wide)
    else:
        return change, jnp.float32(0), _norm(change.astype(wide))
    # LAPACK may not come back from a matrix with infinities; one with NaN it hands back as NaN.
    core = jnp.where(jnp.isfinite(core), core, jnp.nan)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    left, right = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
    if not isinstance(change, LowRank):
        pair = LowRank(left.astype(change.dtype), right.astype(change.dtype), change.shape)
        return pair, _norm(core - pair.a.astype(wide) @ pair.b.astype(wide)), _norm(core)
    pair = dataclasses.replace(change, a=(q_a @ left).astype(change.dtype), b=(right @ q_b.mT).astype(change.dtype))
    # What rounding moves out of both bases at once is the product of two roundings, and left out.
    a, b = pair.a.astype(wide), pair.b.astype(wide)
    a_core, b_core = q_a.mT @ a, b @ q_b
    lost = _norm(core - a_core @ b_core, (a - q_a @ a_core) @ b_core, a_core @ (b - b_core @ q_b.mT))
    return pair, lost, _norm(core)


def _norm(*parts: jax.Array) -> jax.Array:
    """Frobenius norm of all parts together, whose squares need not fit the float format; NaN if a part is not finite."""
    if not parts:
        return jnp.float32(0)
    flat = jnp.concatenate([part.reshape(-1) for part in parts])
    largest = jnp.max(jnp.abs(flat), initial=0)
    unit = jnp.where(largest == 0, jnp.ones_like(largest), largest)
    return (unit * jnp.sqrt(jnp.sum(jnp.square(flat / unit)))).astype(jnp.float32)


def _leaves(path: str, pair: LowRank) -> tuple[jax.Array, jax.Array]:
    """``lora_a`` and ``lora_b`` in the layout of :func:`~pefusion_jax.methods.lora.factor_pair`, which reads them back."""
    batch = pair.a.ndim - 2
    order = tuple(range(len(pair.shape))) if pair.axes is None else pair.axes
    sizes = [pair.shape[axis] for axis in order]
    # How many axes are inputs is not stored: the product of their sizes says it, unless an axis of size 1 stands at the border.
    fits = [
        stop
        for stop in range(batch + 1, len(sizes))
        if math.prod(sizes[batch:stop]) == pair.a.shape[-2] and math.prod(sizes[stop:]) == pair.b.shape[-1]
    ]
    if len(fits) != 1:
        raise ValueError(
            f"the axes {pair.shape} of {path!r} cannot be told apart as {pair.a.shape[-2]} inputs and {pair.b.shape[-1]} "
            "outputs; fold this change into the parameters instead"
        )
    inputs, outputs = order[batch : fits[0]], order[fits[0] :]
    lead = [pair.shape[axis] for axis in order[:batch]]
    a = pair.a.reshape(*lead, *(pair.shape[axis] for axis in inputs), pair.rank)
    if pair.axes is None or inputs + outputs == tuple(range(batch, len(sizes))):
        return a, pair.b.reshape(*lead, pair.rank, *(pair.shape[axis] for axis in outputs))
    spread = [1 if axis in inputs else size for axis, size in enumerate(pair.shape)][batch:]
    return a, pair.b.reshape(*lead, pair.rank, *spread)
