"""PCB-Merging: a task's entries count by their own size and by how they get on with the other tasks'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax.fusion.elementwise import task_weights
from pefusion_jax.fusion.parts import Fusion, chain, floor_of

Tree = Any


def pcb(ratio: float | jax.Array = 0.05, scale: Any = 1.2) -> Fusion:
    r"""PCB-Merging: parameter competition balancing.

    .. math::
       \hat\tau_t = \operatorname{sgn}(\tau_t)\, c_t, \quad c_t = \operatorname{clamp}_{1\,\%}^{99\,\%} |\tau_t|, \quad
       u_t = \operatorname{minmax}(c_t), \quad
       \beta_t = e^{T u_t^2} \odot \tanh\!\Big(\tau_t \odot \sum_j \operatorname{sgn}(\tau_j)\,u_j\Big)

    .. math::
       s_t = \operatorname{minmax}\big(\max(\beta_t, Q_{1-\text{ratio}}(\beta_t))\big), \qquad
       \tau = \frac{\sum_t \lambda_t\, s_t \odot \hat\tau_t}{\sum_t s_t}

    Quantiles, minima and maxima are those of each task's whole vector; only the ``ratio`` of entries with the largest
    :math:`\beta` has a say, and coordinates where no task has one are 0. Even one tree is clamped and thinned out.

    Args:
      ratio: fraction of a task's entries that have a say, in (0, 1]; may be traced.
      scale: :math:`\lambda`, one number, or one for each task by name or in order (the authors also search for them, between
        0.8 and 1.3, on validation data); may be traced.

    Raises:
      ValueError: if the ratio is outside (0, 1].

    Reference:
      Du et al., *Parameter Competition Balancing for Model Merging*, 2024; formula and defaults are those of their code for
      vision models. Their code for language models clamps less and takes the sum of the tasks' entries themselves.
    """
    if not isinstance(ratio, jax.core.Tracer) and not 0.0 < float(ratio) <= 1.0:
        raise ValueError(f"ratio must be in (0, 1], the fraction of entries that have a say, but is {ratio}")
    one_each = isinstance(scale, Mapping | Sequence) or jnp.ndim(scale) > 0
    per_task, tasks = task_weights(scale if one_each else None, "pcb")

    def part(stacked: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(stacked)
        count, size = len(leaves[0]), sum(leaf[0].size for leaf in leaves)
        magnitudes = [jnp.abs(leaf) for leaf in leaves]
        low = order_statistic(magnitudes, floor_of(0.01, size))
        high = order_statistic(magnitudes, jnp.int32(max(int(size * 0.99 - 1), 0)))
        clamped = [jnp.minimum(jnp.maximum(leaf, _to(low, leaf)), _to(high, leaf)) for leaf in magnitudes]
        shares = _minmax(clamped)
        together = [jnp.sum(jnp.sign(leaf) * share, axis=0) for leaf, share in zip(leaves, shares, strict=True)]
        scores = [
            # Over e^T, which no later step sees: the factor alone is too large for float32 from 89 trees on.
            jnp.exp(count * (jnp.square(share) - 1)) * jnp.tanh(leaf * common[None])
            for leaf, share, common in zip(leaves, shares, together, strict=True)
        ]
        if isinstance(ratio, jax.core.Tracer):
            place = jnp.clip(jnp.floor(size * (1 - ratio)).astype(jnp.int32), 0, size - 1)
        else:
            place = jnp.int32(min(int(size * (1 - float(ratio))), size - 1))
        floor = order_statistic(scores, place)
        says = _minmax([jnp.maximum(score, _to(floor, score)) for score in scores])
        out = []
        for leaf, capped, say in zip(leaves, clamped, says, strict=True):
            factors = per_task(count).astype(leaf.dtype) * (1 if one_each else jnp.asarray(scale, leaf.dtype))
            heard = jnp.sum(_to(factors, leaf) * jnp.sign(leaf) * capped * say, axis=0)
            out.append(heard / jnp.maximum(jnp.sum(say, axis=0), 1e-12))
        return jax.tree.unflatten(structure, out)

    return chain(part)._replace(tasks=tasks)


def _to(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """``[task]`` beside a leaf ``[task, ...]``."""
    return values.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))


def _minmax(leaves: list[jax.Array]) -> list[jax.Array]:
    """Maps each task's entries linearly to [0, 1]; equal entries to 0."""

    def over_all(reduce: Any) -> jax.Array:
        return reduce(jnp.stack([reduce(leaf.reshape(len(leaf), -1), axis=1) for leaf in leaves]), axis=0)

    low, high = over_all(jnp.min), over_all(jnp.max)
    width = jnp.where(high > low, high - low, jnp.ones_like(high))
    return [(leaf - _to(low, leaf)) / _to(width, leaf) for leaf in leaves]


def order_statistic(leaves: list[jax.Array], place: jax.Array) -> jax.Array:
    """The entry at a place (0 the smallest) among each task's, over all leaves together.

    Found by bisection on bit patterns, as in :func:`~pefusion_jax.fusion.parts.trim`: exact, without sorting or gathering.

    Args:
      leaves: ``[task, ...]``, of one dtype.
      place: int32.

    Returns:
      ``[task]``.
    """
    dtype = jnp.dtype(leaves[0].dtype)
    bits = 8 * dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    top = jnp.left_shift(jnp.ones((), unsigned), jnp.asarray(bits - 1, unsigned))
    tasks = len(leaves[0])

    def pattern(leaf: jax.Array) -> jax.Array:
        raw = jax.lax.bitcast_convert_type(leaf, unsigned).reshape(tasks, -1)
        return jnp.where((raw & top) != 0, ~raw, raw | top)  # orders as the floats do, negative ones included

    patterns = [pattern(leaf) for leaf in leaves]

    def settle_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | jnp.left_shift(jnp.ones((), unsigned), (bits - 1 - i).astype(unsigned))[None]
        below = [jnp.sum(p < higher[:, None], axis=1, dtype=jnp.int32) for p in patterns]
        return jnp.where(sum(below[1:], below[0]) <= place, higher, found)

    found = jax.lax.fori_loop(0, bits, settle_bit, jnp.zeros((tasks,), unsigned))
    return jax.lax.bitcast_convert_type(jnp.where((found & top) != 0, found ^ top, ~found), dtype)
