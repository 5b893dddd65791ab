"""Fusion methods that keep one vector for all tasks and a mask for each: they need the task's name to give its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.fusion.parts import Fusion, Part, chain
from pefusion_jax.fusion.tool_parts import require

Tree = Any


def emr(task: str | None = None, *, conform: Literal["paper", "fusion_bench"] = "paper") -> Fusion:
    r"""EMR: elect one vector for all tasks; mask and rescale it for each.

    .. math:: \gamma_j = \operatorname{sgn} \sum_t \tau_{t,j}, \qquad
       \tau_{\text{uni},j} = \gamma_j \max_{t\,:\,\gamma_j \tau_{t,j} > 0} |\tau_{t,j}|, \qquad
       \tau^{(t)} = r_t\, m_t \odot \tau_\text{uni}, \quad m_{t,j} = [\,\tau_{t,j} \tau_{\text{uni},j} > 0\,], \quad
       r_t = \frac{\sum_j |\tau_{t,j}|}{\sum_j |m_{t,j} \tau_{\text{uni},j}|}

    A task costs its mask (a bit an entry) and one number. One tree comes back bit for bit.

    Args:
      task: name of the task whose :math:`\tau^{(t)}` is wanted; ``None`` for the unified vector, without a task's mask.
      conform: ``"fusion_bench"``, as the authors' code, takes the two sums of :math:`r_t` over the means of tensors, so that
        small tensors count as much as large ones.

    Raises:
      ValueError: if the tool is unknown, or when it is applied, if no tree has the task's name.

    Reference:
      Huang et al., *EMR-Merging: Tuning-Free High-Performance Model Merging*, 2024. Coordinates whose sum is zero take
      minus, as in their code.
    """
    require("emr", conform, ("paper", "fusion_bench"))

    def size(tree: Tree) -> jax.Array:
        magnitude = jnp.mean if conform == "fusion_bench" else jnp.sum
        first, *others = (magnitude(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree))
        return sum(others, first)

    def sign(leaf: jax.Array) -> jax.Array:
        return jnp.where(jnp.sum(leaf, axis=0) > 0, 1, -1).astype(leaf.dtype)

    def unify(leaf: jax.Array) -> jax.Array:
        return sign(leaf) * jnp.max(jnp.maximum(leaf * sign(leaf)[None], 0), axis=0)

    if task is None:
        return chain(lambda stacked: jax.tree.map(unify, stacked))

    def of_task(place: int) -> Part:
        def part(stacked: Tree) -> Tree:
            own = jax.tree.map(lambda leaf: leaf[place], stacked)
            masked = jax.tree.map(
                lambda leaf: jnp.where(leaf[place] * sign(leaf) > 0, unify(leaf), jnp.zeros_like(leaf[place])), stacked
            )
            left = size(masked)
            factor = jnp.where(left > 0, size(own) / jnp.where(left > 0, left, jnp.ones_like(left)), jnp.ones_like(left))
            return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), masked)

        return part

    return _for_task(task, of_task, "emr")


def tall_masks(task: str, threshold: float | jax.Array = 0.4) -> Fusion:
    r"""TALL masks: one task's model, from the sum of all and the task's mask.

    .. math:: \tau^{(t)} = m_t \odot \bar\tau, \qquad m_{t,j} = [\,|\tau_{t,j}| \ge \lambda_m |\bar\tau_j - \tau_{t,j}|\,],
       \qquad \bar\tau = \sum_t \tau_t

    A task costs its mask, a bit an entry. One tree comes back bit for bit.
    :func:`~pefusion_jax.fusion.consensus` combines the masks into one model.

    Args:
      task: name of the task whose model is wanted.
      threshold: :math:`\lambda_m`; the authors choose it for each task on validation data from 0.2, 0.3, ..., 0.6. May be
        traced.

    Raises:
      ValueError: when it is applied, if no tree has the task's name.

    Reference:
      Wang et al., *Localizing Task Information for Improved Model Merging and Compression*, 2024.
    """

    def of_task(place: int) -> Part:
        def one(leaf: jax.Array) -> jax.Array:
            total = jnp.sum(leaf, axis=0)
            kept = jnp.abs(leaf[place]) >= jnp.asarray(threshold, leaf.dtype) * jnp.abs(total - leaf[place])
            return jnp.where(kept, total, jnp.zeros_like(total))

        return lambda stacked: jax.tree.map(one, stacked)

    return _for_task(task, of_task, "tall_masks")


def _for_task(task: str, of_task: Callable[[int], Part], method: str) -> Fusion:
    """A method for the tree of one name, which it learns the place of when it is bound to names."""

    def unbound(stacked: Tree) -> Tree:
        raise ValueError(f"{method}({task!r}) must know the trees' names; apply it with fuse, or bind it to the names first")

    def bind(names: Sequence[str]) -> Fusion:
        if task not in names:
            raise ValueError(f"{method}: no tree has the name {task!r}{trees.did_you_mean(task, names)}")
        return chain(of_task(list(names).index(task)))

    return Fusion(unbound, bind=bind)
