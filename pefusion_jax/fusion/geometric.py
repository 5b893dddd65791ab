"""Fusion methods that look at the angles between task vectors."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax.fusion.parts import Fusion, chain
from pefusion_jax.fusion.tool_parts import require


def slerp(
    t: float | jax.Array = 0.5,
    *,
    threshold: float = 0.9995,
    conform: Literal["paper", "mergekit", "fusion_bench"] = "paper",
) -> Fusion:
    r"""Spherical interpolation between two trees.

    .. math:: \tau = \frac{\sin((1-t)\Omega)}{\sin\Omega}\,\tau_1 + \frac{\sin(t\Omega)}{\sin\Omega}\,\tau_2, \qquad
       \cos\Omega = \frac{\langle\tau_1, \tau_2\rangle}{\|\tau_1\|\,\|\tau_2\|}

    The angle is that of the whole trees, or with ``conform="mergekit"`` or ``"fusion_bench"`` that of each tensor. Where they
    are (anti)parallel or one is zero, the interpolation is linear; to the tools a tensor of length 1e-8 or less is at right
    angles to the other, and the second one then weighs :math:`\sin(t\,\pi/2)`. Both tools interpolate whole weights, not
    changes: give them whole trees of weights to compare. mergekit's ``nuslerp`` is the same of changes.

    Args:
      t: place between the first tree, by name, (0) and the second (1); may be traced.
      threshold: of :math:`|\cos\Omega|`, above which the interpolation is linear.
      conform: whose SLERP.

    Raises:
      ValueError: if the tool is unknown, or when it is applied, if there are not exactly two trees.

    Reference:
      Shoemake, *Animating Rotation with Quaternion Curves*, 1985.
    """
    require("slerp", conform, ("paper", "mergekit", "fusion_bench"))

    def part(stacked: Any) -> Any:
        leaves = jax.tree.leaves(stacked)
        if len(leaves[0]) != 2:
            raise ValueError(f"slerp is between two trees, but got {len(leaves[0])}; use average for more")
        inner = sum(jnp.sum(leaf[0] * leaf[1]) for leaf in leaves)
        lengths = [jnp.sqrt(sum(jnp.sum(jnp.square(leaf[i])) for leaf in leaves)) for i in range(2)]
        if conform == "paper":
            norms = lengths[0] * lengths[1]
            cosine = jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, jnp.ones_like(norms)), jnp.ones_like(norms))
        else:
            one, other = (jnp.where(length > 1e-8, length, jnp.ones_like(length)) for length in lengths)
            cosine = inner / one / other
        straight = jnp.abs(cosine) > threshold
        angle = jnp.arccos(jnp.where(straight, jnp.zeros_like(cosine), cosine))
        place = jnp.asarray(t, angle.dtype)
        first = jnp.where(straight, 1 - place, jnp.sin((1 - place) * angle) / jnp.sin(angle))
        second = jnp.where(straight, place, jnp.sin(place * angle) / jnp.sin(angle))
        return jax.tree.map(lambda leaf: first.astype(leaf.dtype) * leaf[0] + second.astype(leaf.dtype) * leaf[1], stacked)

    if conform == "paper":
        return chain(part)
    return chain(lambda stacked: jax.tree.map(lambda leaf: part([leaf])[0], stacked))


def model_stock(*, conform: Literal["paper", "mergekit", "fusion_bench"] = "paper") -> Fusion:
    r"""Model Stock: the average, drawn towards the base model by as much as the tasks disagree, tensor by tensor.

    .. math:: \tau = r\,\frac1T \sum_t \tau_t, \qquad r = \frac{T \cos\phi}{(T-1)\cos\phi + 1}

    :math:`\cos\phi` is the mean cosine over all pairs of tasks. Task vectors at right angles give the base model, equal ones
    their average. Made for several runs of one task. One tree comes back as it is.

    ``conform="mergekit"`` lets negative mean cosines extrapolate beyond the base model, keeps the base where the denominator
    vanishes, and takes lengths whose product is below 1e-6 for that long, so that small changes look unlike each other;
    ``"fusion_bench"`` extrapolates as well, adds 1e-8 in place of that, and takes the cosine of the mean angle.

    Args:
      conform: whose Model Stock.

    Raises:
      ValueError: if the tool is unknown.

    Reference:
      Jang, Yun and Han, *Model Stock: All We Need Is Just a Few Fine-Tuned Models*, 2024, where the angle is measured between
      two runs; the mean over pairs is the usual extension. A tensor that is zero in some task counts as at right angles to
      the others, and negative mean cosines count as 0.
    """

    require("model_stock", conform, ("paper", "mergekit", "fusion_bench"))

    def part(leaf: jax.Array) -> jax.Array:
        count = len(leaf)
        mean = jnp.mean(leaf, axis=0)
        if count == 1:
            return mean
        flat = leaf.reshape(count, -1)
        norms = jnp.linalg.norm(flat, axis=1)
        if conform == "paper":
            unit = flat / jnp.where(norms > 0, norms, jnp.ones_like(norms))[:, None]
            # The sum over all ordered pairs, from the length of the sum: nothing of size T x T is needed.
            pairs = jnp.sum(jnp.square(jnp.sum(unit, axis=0))) - jnp.sum(jnp.square(unit))
            cosine = jnp.maximum(pairs / (count * (count - 1)), 0)
        else:
            above = jnp.triu_indices(count, 1)
            inner = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)[above]
            lengths = (norms[:, None] * norms[None, :])[above]
            smallest = 1e-6 if conform == "mergekit" else 1e-8
            cosines = jnp.clip(inner / (jnp.maximum(lengths, smallest) if conform == "mergekit" else lengths + smallest), -1, 1)
            cosine = jnp.mean(cosines) if conform == "mergekit" else jnp.cos(jnp.mean(jnp.arccos(cosines)))
        below = (count - 1) * cosine + 1
        singular = jnp.abs(below) < 1e-6
        ratio = jnp.where(singular, jnp.zeros_like(below), count * cosine / jnp.where(singular, jnp.ones_like(below), below))
        return mean * ratio

    return chain(lambda stacked: jax.tree.map(part, stacked))
