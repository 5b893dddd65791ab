"""Fusion methods that keep some entries of each task: at random, by magnitude, or by what the tasks have in common."""

from __future__ import annotations

from typing import Literal

import jax

from pefusion_jax.fusion import parts
from pefusion_jax.fusion.parts import Fusion, chain


def dare(
    density: float | jax.Array = 0.1,
    scale: float | jax.Array = 1.0,
    *,
    then: Literal["average", "task_arithmetic", "ties"] = "task_arithmetic",
    key: jax.Array | int = 0,
) -> Fusion:
    r"""DARE: drop entries at random, rescale the rest, then combine.

    .. math:: \hat\tau_t = \frac{m_t \odot \tau_t}{p}, \quad m_{t,j} \sim \mathrm{Bernoulli}(p), \qquad
       \tau = \lambda \sum_t \hat\tau_t \;\text{(task arithmetic)}

    The expectation is that of the method without dropping.

    Args:
      density: :math:`p`, the fraction of entries kept, in (0, 1]; the authors drop 0.9 and more. May be traced.
      scale: :math:`\lambda`; may be traced.
      then: ``"average"`` of the tasks, their sum (``"task_arithmetic"``), or the sign election and disjoint mean of ``"ties"``.
      key: a key or the seed of one; the masks depend on it, the leaf's path and the task's place alone.

    Raises:
      ValueError: if the density is outside (0, 1] or the option is unknown.

    Reference:
      Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch*, 2024.
    """
    rest: dict[str, list[parts.Part]] = {
        "average": [parts.reduce_mean()],
        "task_arithmetic": [parts.reduce_sum()],
        "ties": [parts.elect(), parts.disjoint_mean()],
    }
    if then not in rest:
        raise ValueError(f"dare combines by 'average', 'task_arithmetic' or 'ties', not {then!r}")
    return chain(parts.drop(density, key), *rest[then], parts.rescale(scale))


def breadcrumbs(density: float | jax.Array = 0.2, outliers: float = 0.1, scale: float | jax.Array = 0.4) -> Fusion:
    r"""Model Breadcrumbs: without the largest entries and without the small ones.

    .. math:: \tau = \lambda \sum_t m_t \odot \tau_t

    :math:`m_t` zeroes the :math:`\gamma` fraction of largest magnitude of each tensor, then keeps the :math:`\beta` fraction of
    largest magnitude of what is left, both as fractions of the tensor.

    Args:
      density: :math:`\beta`, fraction kept; may be traced.
      outliers: :math:`\gamma`, fraction of the largest entries that is removed.
      scale: :math:`\lambda`; may be traced.

    Raises:
      ValueError: if a fraction is out of range.

    Reference:
      Davari and Belilovsky, *Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks*, 2023; the defaults are
      those of their repository's example. Their code compares the entries of each row of a matrix; we compare those of the
      whole tensor.
    """
    if not isinstance(density, jax.core.Tracer) and float(density) + float(outliers) > 1.0:
        raise ValueError(f"density={density} and outliers={outliers} add up to more than all entries")
    return chain(parts.cut(outliers), parts.trim(density, "per_tensor"), parts.reduce_sum(), parts.rescale(scale))


def magmax(scale: float | jax.Array = 0.5) -> Fusion:
    r"""MagMax: at each coordinate the entry of the largest magnitude.

    .. math:: \tau_j = \lambda\, \tau_{t^*_j, j}, \qquad t^*_j = \arg\max_t |\tau_{t,j}|

    Args:
      scale: :math:`\lambda`; may be traced.

    Reference:
      Marczak et al., *MagMax: Leveraging Model Merging for Seamless Continual Learning*, 2024.
    """
    return chain(parts.largest(), parts.rescale(scale))


def consensus(threshold: float | jax.Array = 0.4, scale: float | jax.Array = 0.3, *, agree: int = 2) -> Fusion:
    r"""Consensus task arithmetic: the sum of the tasks where several of them have a say.

    .. math:: m_{t,j} = [\,|\tau_{t,j}| \ge \lambda_m |\bar\tau_j - \tau_{t,j}|\,], \quad \bar\tau = \sum_t \tau_t, \qquad
       \tau_j = \lambda\, \bar\tau_j \Big[\sum_t m_{t,j} \ge k\Big]

    Coordinates that only one task uses (*selfish*) and those that none does (*catastrophic*) are left at the base model's.

    Args:
      threshold: :math:`\lambda_m`; the authors choose it on validation data from 0.2, 0.3, ..., 0.6. May be traced.
      scale: :math:`\lambda`, chosen on validation data as for task arithmetic; may be traced.
      agree: :math:`k`; 2 is the authors'. With 0 this is task arithmetic.

    Reference:
      Wang et al., *Localizing Task Information for Improved Model Merging and Compression*, 2024.
    """
    return chain(parts.shared(threshold, agree), parts.rescale(scale))
