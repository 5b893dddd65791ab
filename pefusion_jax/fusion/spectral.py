r"""Fusion methods that look at the singular values and vectors of each matrix.

They treat one matrix at a time: low-rank pairs of any parameter, and dense leaves with two axes. Everything else (biases,
scales, convolution kernels) is averaged over the tasks. Low-rank pairs are fused through cores of size :math:`\sum_t r_t` (see
:mod:`~pefusion_jax.fusion.matrices`) and stay low-rank; the result is that of the dense computation.

The authors' programs run on fully fine-tuned matrices, whose ranks are full. On a matrix of lower rank they go on with
whatever vectors the SVD has put beside singular values of zero, which are arbitrary. Here such directions take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import deltas
from pefusion_jax.fusion.elementwise import task_weights
from pefusion_jax.fusion.matrices import (
    Factors,
    Matrices,
    as_pairs,
    bound,
    isotropic,
    matrixwise,
    mean,
    numerical_svd,
    of_changes,
    polar,
    stacked_dense,
)
from pefusion_jax.fusion.parts import Changes, Fusion, linear
from pefusion_jax.in_turn import after

Weights = Mapping[str, Any] | Sequence[Any] | jax.Array | None


def tsv_m(scale: float | jax.Array = 1.0, *, directions: int | None = None) -> Fusion:
    r"""TSV-M: each task's leading singular triplets, made orthogonal between the tasks.

    .. math:: \delta = \alpha\, \hat U \operatorname{diag}(\Sigma_1, \dots, \Sigma_T)\, \hat V^\top, \qquad
       \hat U = \operatorname{polar}([U_1 \cdots U_T]), \quad \hat V = \operatorname{polar}([V_1 \cdots V_T])

    :math:`U_t, \Sigma_t, V_t` are the leading ``directions`` triplets of :math:`\Delta_t` and polar(X) is the nearest matrix
    with orthonormal columns. Other leaves are averaged and scaled. One task alone comes back bit for bit at scale 1.

    Args:
      scale: :math:`\alpha`; 1 is the authors'. May be traced.
      directions: triplets kept of each task; ``None`` is the authors' min(inputs, outputs) // T, at least 1, of the parameter's
        own shape, which for LoRA is usually all of a task.

    Raises:
      ValueError: if ``directions`` is below 1.

    Reference:
      Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*, 2025. Singular values that are zero
      up to rounding take no part, nor do directions of :math:`[U_1 \cdots U_T]` that are: tasks with one frozen A share all of
      their left directions.
    """
    if directions is not None and (not isinstance(directions, Integral) or directions < 1):
        raise ValueError(f"tsv_m keeps at least 1 direction of each task, a whole number, not {directions}")

    def core(given: Matrices) -> Factors:
        tasks = len(given.stack)
        kept = max(1, min(given.shape) // tasks) if directions is None else directions
        kept = min(kept, given.rank)
        u, s, vt = numerical_svd(given.stack, given.shape)
        left = polar(_side_by_side(u[..., :kept]))
        right = polar(after(_side_by_side(vt.mT[..., :kept]), left))
        return left * s[:, :kept].reshape(1, -1), right.T

    return matrixwise(core, scale, single=directions is None)


def iso_c(scale: float | jax.Array = 1.0) -> Fusion:
    r"""Iso-C: the sum of the tasks with all its singular values made equal.

    .. math:: \delta = \alpha\, \bar\sigma\, U V^\top, \qquad U \Sigma V^\top = \sum_t \Delta_t

    Other leaves are averaged and scaled.

    Args:
      scale: :math:`\alpha`; the authors choose it on validation data between 0.8 and 1.5. May be traced.

    Reference:
      Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces*, 2025. The mean is
      over the singular values that are not zero up to rounding: for low-rank changes those of the rank, not of the matrix.
    """
    return matrixwise(lambda given: isotropic(jnp.sum(given.stack, axis=0), given.shape), scale)


def iso_cts(scale: float | jax.Array = 1.0, *, common: float = 0.8) -> Fusion:
    r"""Iso-CTS: Iso-C whose least directions give way to directions of the single tasks.

    The leading k directions of :math:`\sum_t \Delta_t` are kept. To them come the leading :math:`(r - k) / T` triplets of each
    :math:`\Delta_t (I - V_{1:k} V_{1:k}^\top)`, where V spans the outputs. Both sides are made orthogonal as in :func:`tsv_m`,
    and all singular values are set to their mean. Other leaves are averaged and scaled.

    Args:
      scale: :math:`\alpha`; the authors choose it on validation data between 1.1 and 1.9. May be traced.
      common: k / r, then moved so that the rest is a multiple of T, as the authors do; 0.8 is theirs.

    Raises:
      ValueError: if ``common`` is outside [0, 1].

    Reference:
      Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces*, 2025. r is the
      numerical rank of the sum, which is the authors' min(inputs, outputs) where ranks are full; counting directions that are
      not there would leave low-rank tasks without any of their own.
    """
    if not 0.0 <= common <= 1.0:
        raise ValueError(f"common must be in [0, 1], the share of directions that tasks have in common, but is {common}")

    def core(given: Matrices) -> Factors:
        tasks = len(given.stack)
        u, s, vt = numerical_svd(jnp.sum(given.stack, axis=0), given.shape)
        width = len(s)
        # Own directions of each task for every rank that the sum may turn out to have; the authors' rounding.
        own = [min(round((rank - int(rank * common)) / tasks), rank // tasks) for rank in range(width + 1)]
        rank = jnp.sum(s > 0)
        share = jnp.asarray(own)[rank]
        shared = jnp.arange(width) < rank - share * tasks
        spanned = vt * shared[:, None].astype(vt.dtype)
        rest = given.stack - (given.stack @ spanned.T) @ spanned
        # Beside the task's own size, or the rounding errors of the projection would be directions.
        size = jnp.sqrt(jnp.sum(jnp.square(given.stack), axis=(1, 2)))
        most = max(own)
        u_own, s_own, vt_own = numerical_svd(rest, given.shape, size)
        u_own, s_own, vt_own = u_own[..., :most], s_own[:, :most], vt_own[:, :most]
        taken = (jnp.arange(most) < share)[None] & (s_own > 0)
        active = jnp.concatenate([shared & (s > 0), taken.reshape(-1)])
        # At most `width` of them are active: those come first, and the others are left out.
        chosen = jnp.argsort(~active, stable=True)[:width]
        one = active[chosen].astype(s.dtype)
        values = jnp.concatenate([s, s_own.reshape(-1)])[chosen] * one
        left = jnp.concatenate([u, _side_by_side(u_own)], axis=1)[:, chosen] * one[None]
        right = jnp.concatenate([vt.T, _side_by_side(vt_own.mT)], axis=1)[:, chosen] * one[None]
        left = polar(left) * (jnp.sum(values) / jnp.maximum(jnp.sum(one), 1))
        return left, polar(after(right, left)).T

    return matrixwise(core, scale)


def svd(rank: int, weights: Weights = None, scale: float | jax.Array = 1.0) -> Fusion:
    r"""The best approximation of rank r of the weighted sum.

    .. math:: \delta = \lambda \operatorname{svd}_r\Big(\sum_t w_t \Delta_t\Big)

    Nothing is decomposed where the sum has no higher rank anyway: then pairs are placed side by side. Other leaves are summed
    with the same weights.

    Args:
      rank: r.
      weights: for each task, by name or in the order of the trees; ``None`` gives each 1. May be traced.
      scale: :math:`\lambda`; may be traced.

    Raises:
      ValueError: if the rank is below 1; when it is applied, if the number of weights is not the number of trees.

    Reference:
      Eckart and Young, *The approximation of one matrix by another of lower rank*, 1936; ``combination_type="svd"`` in PEFT.
    """
    if not isinstance(rank, Integral) or rank < 1:
        raise ValueError(f"svd needs a rank of at least 1, a whole number, not {rank}")
    coefficients, tasks = _coefficients(weights, scale)
    whole = linear(coefficients, tasks)

    def total(stack: jax.Array) -> jax.Array:
        return jnp.tensordot(coefficients(len(stack)).astype(stack.dtype), stack, 1)

    def core(given: Matrices) -> Factors:
        u, s, vt = jnp.linalg.svd(total(given.stack), full_matrices=False)
        return u[:, :rank] * s[None, :rank], vt[:rank]

    truncated = matrixwise(core, others=total)

    def apply(stacked: Any) -> Any:
        def one(leaf: jax.Array) -> Any:
            method = truncated if leaf.ndim == 3 and min(leaf.shape[1:]) > rank else whole
            return method.apply(leaf)

        return jax.tree.map(one, stacked)

    def changes(given: Changes) -> dict[str, deltas.Change]:
        low = {path: pairs for path, of_tasks in given.items() if (pairs := as_pairs(of_tasks)) is not None}
        exact = {path: pairs for path, pairs in low.items() if sum(pair.rank for pair in pairs) <= rank}
        fused = of_changes(truncated, {path: pairs for path, pairs in low.items() if path not in exact})
        fused |= of_changes(whole, exact)
        return {path: fused[path] if path in fused else apply(stacked_dense(of_tasks)) for path, of_tasks in given.items()}

    return Fusion(apply, tasks=tasks, changes=changes)


def concat(weights: Weights = None, scale: float | jax.Array = 1.0) -> Fusion:
    r"""The weighted sum, whose pairs are the tasks' pairs side by side: exact, at rank :math:`\sum_t r_t`.

    .. math:: \delta = \lambda \sum_t w_t \Delta_t

    Linear. :func:`~pefusion_jax.compression.compress` brings the result to a lower rank.

    Args:
      weights: for each task, by name or in the order of the trees; ``None`` gives each 1. May be traced.
      scale: :math:`\lambda`; may be traced.

    Raises:
      ValueError: when it is applied, if the number of weights is not the number of trees.

    Reference:
      Mangrulkar et al., *PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods*, 2022, ``combination_type="cat"``.
    """
    return linear(*_coefficients(weights, scale))


def svc(method: Fusion, floor: float | None = None) -> Fusion:
    r"""Singular value calibration: shrinks the directions of a fused matrix into which several tasks have paid.

    .. math:: \sigma_r \leftarrow \frac{T}{\sum_t \max(\alpha, s_{t,r})}\, \sigma_r, \qquad
       s_{t,r} = \frac{\langle \delta v_r, \Delta_t v_r \rangle}{\|\Delta_t v_r\|^2}

    :math:`v_r` are the singular vectors of the fused :math:`\delta` on the side of the outputs. Leaves that are not matrices
    are what the method made of them. Low-rank pairs stay pairs if the method keeps them.

    Args:
      method: any fusion method, whose result is calibrated.
      floor: :math:`\alpha`, above 0; ``None`` is the paper's 1 / T.

    Raises:
      ValueError: if the floor is not above 0.

    Reference:
      Li et al., *When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging*, 2026. The directions are only
      determined where the fused matrix has no equal singular values, so this is not for :func:`iso_c` and :func:`iso_cts`. A
      task without any part in a direction has :math:`s = 0`.
    """
    if floor is not None and not floor > 0:
        raise ValueError(f"svc needs a floor above 0, but got {floor}")

    def core(given: Matrices) -> Factors:
        fused, stack = given.stack[-1], given.stack[:-1]
        u, s, vt = numerical_svd(fused, given.shape)
        responses = stack @ vt.T  # [task, m, direction]
        ours = jnp.sum(responses * (u * s[None])[None], axis=1)
        squares = jnp.sum(jnp.square(responses), axis=1)
        ratio = jnp.where(squares > 0, ours / jnp.where(squares > 0, squares, jnp.ones_like(squares)), jnp.zeros_like(ours))
        least = 1.0 / len(stack) if floor is None else floor
        return u * (s * len(stack) / jnp.sum(jnp.maximum(ratio, least), axis=0))[None], vt

    calibrate = matrixwise(core, others=lambda stack: stack[-1])

    def alone(count: int) -> Any:
        """For one task under a linear method the whole change is scaled: no decomposition, no rounding."""
        if count != 1 or method.weights is None:
            return None
        weight = method.weights(1)
        return linear(lambda _: weight / jnp.maximum(weight, 1.0 if floor is None else floor))

    def apply(stacked: Any) -> Any:
        single = alone(len(jax.tree.leaves(stacked)[0]))
        if single is not None:
            fused = method.apply(stacked)
            return jax.tree.map(lambda leaf, out: single.apply(leaf) if leaf.ndim == 3 else out, stacked, fused)
        together = jax.tree.map(lambda leaf, out: jnp.concatenate([leaf, out[None]]), stacked, method.apply(stacked))
        return calibrate.apply(together)

    def changes(given: Changes) -> dict[str, deltas.Change]:
        count = len(next(iter(given.values())))
        single = alone(count)
        out = of_changes(method, given)
        for path, fused in list(out.items()):
            pairs = as_pairs(given[path])
            if single is not None:
                if pairs is not None or deltas.dense(fused).ndim == 2:
                    out |= of_changes(single, {path: given[path]})
            elif pairs is None or as_pairs([fused]) is None:
                both = [*(deltas.dense(change) for change in given[path]), deltas.dense(fused)]
                out[path] = calibrate.apply(jnp.stack(both))
            else:
                out |= of_changes(calibrate, {path: (*pairs, fused)})
        return out

    keeps_pairs = method.changes is not None or method.weights is not None
    return Fusion(
        apply, tasks=method.tasks, changes=changes if keeps_pairs else None, bind=bound(method, lambda m: svc(m, floor))
    )


def cart(share: float = 0.08, strength: float | jax.Array = 1.0) -> Fusion:
    r"""CART: the average and a low-rank part of what each task has beside it.

    .. math:: \delta = \bar\Delta + \lambda \sum_t \operatorname{svd}_k(\Delta_t - \bar\Delta), \qquad
       \bar\Delta = \frac1T \sum_t \Delta_t

    Leaves that are not matrices are averaged. One task alone comes back bit for bit.

    Args:
      share: k as a share of min(inputs, outputs) of the parameter, at least 1; the authors use 0.04 to 0.08.
      strength: :math:`\lambda`; with 0 this is the average. May be traced.

    Raises:
      ValueError: if the share is outside (0, 1].

    Reference:
      Choi et al., *Revisiting Weight Averaging for Model Merging*, 2024.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], the part of the directions that is kept, but is {share}")

    def core(given: Matrices) -> Factors:
        center = mean(given.stack)
        kept = max(1, int(share * min(given.shape)))
        u, s, vt = jnp.linalg.svd(given.stack - center[None], full_matrices=False)
        own = jnp.sum((u[..., :kept] * s[:, None, :kept]) @ vt[:, :kept], axis=0)
        fused = center + jnp.asarray(strength, own.dtype) * own
        return fused, jnp.eye(fused.shape[1], dtype=fused.dtype)

    return matrixwise(core, single=True)


def _side_by_side(columns: jax.Array) -> jax.Array:
    """``[task, m, k]`` -> ``[m, task * k]``."""
    return jnp.moveaxis(columns, 0, 1).reshape(columns.shape[1], -1)


def _coefficients(weights: Weights, scale: Any) -> tuple[Callable[[int], jax.Array], tuple[str, ...] | None]:
    """Number of tasks -> scaled weights, and the tasks that they belong to; no weights are weights of 1."""
    per_task, tasks = task_weights(weights, "a weighted sum")

    def coefficients(count: int) -> jax.Array:
        values = per_task(count)
        return values * jnp.asarray(scale, values.dtype)

    return coefficients, tasks
