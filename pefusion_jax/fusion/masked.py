"""Fusion methods that keep some entries of each task: at random, by magnitude, or by what the tasks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from pefusion_jax.fusion import parts, tool_parts
from pefusion_jax.fusion.elementwise import task_weights
from pefusion_jax.fusion.parts import Fusion, Part, chain

Weights = Mapping[str, Any] | Sequence[Any] | jax.Array | None
Then = Literal["average", "task_arithmetic", "ties"]


def dare(
    density: float | jax.Array = 0.1,
    scale: float | jax.Array = 1.0,
    *,
    then: Then = "task_arithmetic",
    key: jax.Array | int = 0,
    elect: Literal["sum", "count"] = "sum",
    weights: Weights = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    conform: Literal["paper", "peft", "mergekit", "fusion_bench"] = "paper",
) -> Fusion:
    r"""DARE: drop entries at random, rescale the rest, then combine.

    .. math:: \hat\tau_t = \frac{m_t \odot \tau_t}{p}, \quad m_{t,j} \sim \mathrm{Bernoulli}(p), \qquad
       \tau = \lambda \sum_t \hat\tau_t \;\text{(task arithmetic)}

    The expectation is that of the method without dropping.

    Where tools differ (the masks are drawn by JAX, so that they agree with a tool's in distribution and, given the tool's
    masks, in every entry):

    * ``"peft"``: tasks have weights; in ``"ties"`` undecided coordinates take plus, and signs are elected and entries counted
      without the weights, as in :func:`~pefusion_jax.fusion.ties`;
    * ``"mergekit"``: what is left of each tensor is scaled to the tensor's L1 norm, not by :math:`1/p`; tasks have weights;
      ``normalize=True`` divides by those that agree;
    * ``"fusion_bench"``: as the paper for ``"average"`` and ``"task_arithmetic"``. Its DARE with TIES trims in between: write
      ``chain(drop(...), trim(...), elect(), reduce_sum(), rescale(...))``.

    Args:
      density: :math:`p`, the fraction of entries kept, in (0, 1]; the authors drop 0.9 and more. May be traced.
      scale: :math:`\lambda`; may be traced.
      then: ``"average"`` of the tasks, their sum (``"task_arithmetic"``), or the sign election and disjoint mean of ``"ties"``.
      key: a key or the seed of one; the masks depend on it, the leaf's path and the task's place alone.
      elect: vote of ``"ties"``, by the ``"sum"`` of values or the ``"count"`` of tasks (PEFT: "total", "frequency").
      weights: one for each task, by name or in order; only with ``"peft"`` and ``"mergekit"``. ``None``: 1 each.
      normalize: only with ``"mergekit"``: divide by the sum of the weights; ``None`` is its default, false.
      rescale: only with ``"mergekit"``: restore the L1 norm; ``None`` is its default, true.
      conform: whose DARE.

    Raises:
      ValueError: if the density is outside (0, 1], an option is unknown, or is not one of that tool's.

    Reference:
      Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch*, 2024.
    """
    _require_then("dare", then, ("average", "task_arithmetic", "ties"))
    tool_parts.require(
        "dare",
        conform,
        ("paper", "peft", "mergekit", "fusion_bench"),
        weights=(weights, ("peft", "mergekit")),
        normalize=(normalize, ("mergekit",)),
        rescale=(rescale, ("mergekit",)),
    )
    if then == "ties" and conform == "fusion_bench":
        raise ValueError("FusionBench's DARE trims before TIES: chain drop, trim, elect and reduce_sum, or leave conform out")
    if elect != "sum" and conform == "mergekit":
        raise ValueError("mergekit's DARE elects by 'sum'; leave elect out, or take another conform")
    if then == "average" and conform in ("peft", "mergekit"):
        raise ValueError(f"{conform} has no average after DARE; pass then='task_arithmetic' and weights")
    per_task, tasks = task_weights(weights, "dare")
    drop = parts.drop(density, key)
    if conform == "mergekit":
        # drop has divided by the density, which the norm takes out again.
        left = [tool_parts.keeping_l1(drop)] if rescale is not False else [drop, parts.rescale(density)]
        whole = [*left, tool_parts.mergekit_merge(per_task, consensus=then == "ties", normalize=normalize is True)]
    elif conform == "peft":
        plain: list[Part] = [tool_parts.weigh(per_task), parts.reduce_sum()]
        signed: list[Part] = [tool_parts.elect(elect, "plus"), tool_parts.peft_disjoint_mean(per_task)]
        whole = [drop, *(signed if then == "ties" else plain)]
    else:
        whole = [drop, *_combine(then, elect)]
    return chain(*whole, parts.rescale(scale))._replace(tasks=tasks)


def della(
    density: float | jax.Array = 0.7,
    window: float | jax.Array = 0.14,
    scale: float | jax.Array = 1.1,
    *,
    then: Literal["task_arithmetic", "ties"] = "ties",
    key: jax.Array | int = 0,
    weights: Weights = None,
    normalize: bool | None = None,
    rescale: bool = True,
    conform: Literal["paper", "mergekit"] = "paper",
) -> Fusion:
    r"""DELLA: drop entries at random, the small ones more often, elect signs, merge what agrees.

    .. math:: \hat\tau_{t,j} = \frac{m_{t,j}\,\tau_{t,j}}{p_{t,j}}, \quad m_{t,j} \sim \mathrm{Bernoulli}(p_{t,j}), \quad
       p_{t,j} = p - \frac{\epsilon}{2} + \epsilon\,\frac{\mathrm{rank}_{t,j} - 1}{n - 1}

    with the rank of :math:`|\tau_{t,j}|` among the n entries of its row (all inputs of one output: a column of our kernels).
    What follows is :func:`~pefusion_jax.fusion.ties` without trimming, or the plain sum.

    ``conform="mergekit"`` scales what is left of each tensor to its L1 norm, and not each entry by its own probability; tasks
    have weights, signs are elected on weighted entries, and the sum is divided by the weights that agree. Its
    ``epsilon`` is half our window; its ``lambda`` is our scale, 1 by default. A density of 1 leaves every entry.

    Args:
      density: :math:`p`, mean probability with which an entry is kept (the authors drop 0.3); may be traced.
      window: :math:`\epsilon`, from the probability of a row's smallest entry to that of its largest; may be traced.
      scale: :math:`\lambda`; may be traced.
      then: election and disjoint mean (``"ties"``), or the sum (``"task_arithmetic"``, mergekit's ``della_linear``).
      key: a key or the seed of one; the masks depend on it, the leaf's path and the task's place alone.
      weights: one for each task, by name or in order; only with ``"mergekit"``. ``None``: 1 each.
      normalize: only with ``"mergekit"``; ``None`` is its default: true for ``"ties"``, false for the sum.
      rescale: make up for what was dropped.
      conform: whose DELLA.

    Raises:
      ValueError: if a probability would be outside (0, 1], an option is unknown, or is not one of that tool's.

    Reference:
      Deep, Bhardwaj and Poria, *DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling*, 2024;
      the defaults are those of their repository. A row of one entry is kept with probability p, where their code fails.
    """
    _require_then("della", then, ("task_arithmetic", "ties"))
    tool_parts.require(
        "della",
        conform,
        ("paper", "mergekit"),
        weights=(weights, ("mergekit",)),
        normalize=(normalize, ("mergekit",)),
    )
    traced = isinstance(density, jax.core.Tracer) or isinstance(window, jax.core.Tracer)
    untouched = conform == "mergekit" and not isinstance(density, jax.core.Tracer) and float(density) >= 1.0
    if not traced and not untouched:
        low, high = float(density) - float(window) / 2, float(density) + float(window) / 2
        if not 0.0 < low <= high <= 1.0 + 1e-9:
            raise ValueError(
                f"density={density} and window={window} give probabilities from {low:g} to {high:g}; they must be in (0, 1]"
            )
    per_task, tasks = task_weights(weights, "della")
    pruned: list[Part] = [tool_parts.magprune(density, window, key, rescale=rescale and conform == "paper")]
    if conform == "mergekit":
        pruned = [] if untouched else [tool_parts.keeping_l1(pruned[0])] if rescale else pruned
        divided = then == "ties" if normalize is None else normalize
        whole = [*pruned, tool_parts.mergekit_merge(per_task, consensus=then == "ties", normalize=divided)]
    else:
        whole = [*pruned, *_combine(then)]
    return chain(*whole, parts.rescale(scale))._replace(tasks=tasks)


def breadcrumbs(
    density: float | jax.Array = 0.2,
    outliers: float = 0.1,
    scale: float | jax.Array = 0.4,
    *,
    within: Literal["row", "tensor"] | None = None,
    then: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    weights: Weights = None,
    normalize: bool | None = None,
    conform: Literal["paper", "mergekit"] = "paper",
) -> Fusion:
    r"""Model Breadcrumbs: without the largest entries and without the small ones.

    .. math:: \tau = \lambda \sum_t m_t \odot \tau_t

    :math:`m_t` zeroes the :math:`\gamma` fraction of largest magnitude of each row, then keeps the :math:`\beta` fraction of
    largest magnitude of what is left, both as fractions of the row. A row is all inputs of one output (a column of our
    kernels ``[inputs, outputs]``), as in the authors' code.

    ``conform="mergekit"`` compares the entries of each tensor, removes fewer outliers where too few entries would be left, and
    removes none at a density of 1; tasks have weights. Its ``lambda`` is our scale, 1 by default, its ``gamma`` is
    ``outliers``, 0.01 by default. Not reproduced: where ``gamma * n < 1`` it keeps nothing of a tensor of n entries, for want
    of outliers to remove; here nothing is removed then.

    Args:
      density: :math:`\beta`, fraction kept; may be traced.
      outliers: :math:`\gamma`, fraction of the largest entries that is removed.
      scale: :math:`\lambda`; may be traced.
      within: compare the entries of each ``"row"``, the default, or of the whole ``"tensor"``, which is how the paper's text
        can be read.
      then: add up (``"task_arithmetic"``), or elect signs and average what agrees (``"ties"``, mergekit's
        ``breadcrumbs_ties``).
      weights: one for each task, by name or in order; only with ``"mergekit"``. ``None``: 1 each.
      normalize: only with ``"mergekit"``: divide by the sum of the weights; ``None`` is its default, false.
      conform: whose Breadcrumbs.

    Raises:
      ValueError: if a fraction is out of range, an option is unknown, or is not one of that tool's.

    Reference:
      Davari and Belilovsky, *Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks*, 2023; the defaults are
      those of their repository's example. At least one entry of a row is kept, where their code keeps none of a row of fewer
      than ``1 / density`` entries.
    """
    _require_then("breadcrumbs", then, ("task_arithmetic", "ties"))
    tool_parts.require(
        "breadcrumbs",
        conform,
        ("paper", "mergekit"),
        weights=(weights, ("mergekit",)),
        normalize=(normalize, ("mergekit",)),
        within=(within, ("paper",)),
    )
    if within not in (None, "row", "tensor"):
        raise ValueError(f"breadcrumbs compares entries within a 'row' or a 'tensor', not {within!r}")
    per_task, tasks = task_weights(weights, "breadcrumbs")
    removed, kept = parts.cut(outliers), parts.trim(density, "per_tensor")
    if conform == "mergekit":
        whole_tensors = not isinstance(density, jax.core.Tracer) and float(density) >= 1.0
        left = [] if whole_tensors else [tool_parts.keep_middle(density, outliers)]
        combined = [tool_parts.mergekit_merge(per_task, consensus=then == "ties", normalize=normalize is True)]
        return chain(*left, *combined, parts.rescale(scale))._replace(tasks=tasks)
    if not isinstance(density, jax.core.Tracer) and float(density) + float(outliers) > 1.0:
        raise ValueError(f"density={density} and outliers={outliers} add up to more than all entries")
    masks = [removed, kept] if within == "tensor" else [tool_parts.by_rows(removed), tool_parts.by_rows(kept)]
    return chain(*masks, *_combine(then), parts.rescale(scale))


def magnitude_prune(
    density: float | jax.Array = 0.2,
    scale: float | jax.Array = 1.0,
    *,
    weights: Weights = None,
    conform: Literal["paper", "peft"] = "paper",
) -> Fusion:
    r"""Keeps each tensor's largest entries and adds up: TIES without its election.

    .. math:: \tau = \lambda \sum_t w_t \operatorname{top}_{\text{density}}(\tau_t)

    Args:
      density: fraction of each tensor's entries kept, in (0, 1]; may be traced.
      scale: :math:`\lambda`; may be traced.
      weights: one for each task, by name or in order; ``None``: 1 each.
      conform: ``"peft"`` keeps none of a tensor's entries if ``density * n < 1``, where otherwise one always stays.

    Raises:
      ValueError: if the density is outside (0, 1].

    Reference:
      The ``magnitude_prune`` of PEFT's ``add_weighted_adapter``, which has no paper of its own.
    """
    tool_parts.require("magnitude_prune", conform, ("paper", "peft"))
    per_task, tasks = task_weights(weights, "magnitude_prune")
    trimmed = parts.trim(density, "per_tensor")
    kept = tool_parts.keep_floor(density) if conform == "peft" else trimmed
    return chain(kept, tool_parts.weigh(per_task), parts.reduce_sum(), parts.rescale(scale))._replace(tasks=tasks)


def _require_then(method: str, then: str, known: tuple[str, ...]) -> None:
    if then not in known:
        names = " or ".join([", ".join(repr(name) for name in known[:-1]), repr(known[-1])])
        raise ValueError(f"{method} combines by {names}, not {then!r}")


def _combine(then: str, elect: Literal["sum", "count"] = "sum") -> list[Part]:
    if then == "ties":
        return [parts.elect(elect), parts.disjoint_mean()]
    return [parts.reduce_mean() if then == "average" else parts.reduce_sum()]


def magmax(scale: float | jax.Array = 0.5, *, conform: Literal["paper", "fusion_bench"] = "paper") -> Fusion:
    r"""MagMax: at each coordinate the entry of the largest magnitude.

    .. math:: \tau_j = \lambda\, \tau_{t^*_j, j}, \qquad t^*_j = \arg\max_t |\tau_{t,j}|

    Args:
      scale: :math:`\lambda`; may be traced.
      conform: of equal magnitudes the first task's entry is taken; with ``"fusion_bench"``, as in the authors' code, the
        last's.

    Raises:
      ValueError: if the tool is unknown.

    Reference:
      Marczak et al., *MagMax: Leveraging Model Merging for Seamless Continual Learning*, 2024.
    """
    tool_parts.require("magmax", conform, ("paper", "fusion_bench"))
    backwards: list[Part] = [lambda stacked: jax.tree.map(lambda leaf: leaf[::-1], stacked)]
    return chain(*(backwards if conform == "fusion_bench" else []), parts.largest(), parts.rescale(scale))


def consensus(threshold: float | jax.Array = 0.4, scale: float | jax.Array = 0.3, *, agree: int = 2) -> Fusion:
    r"""Consensus task arithmetic: the sum of the tasks where several of them have a say.

    .. math:: m_{t,j} = [\,|\tau_{t,j}| \ge \lambda_m |\bar\tau_j - \tau_{t,j}|\,], \quad \bar\tau = \sum_t \tau_t, \qquad
       \tau_j = \lambda\, \bar\tau_j \Big[\sum_t m_{t,j} \ge k\Big]

    Coordinates that only one task uses (*selfish*) and those that none does (*catastrophic*) are left at the base model's.

    Args:
      threshold: :math:`\lambda_m`; the authors choose it on validation data from 0.2, 0.3, ..., 0.6. May be traced.
      scale: :math:`\lambda`, chosen on validation data as for task arithmetic; may be traced.
      agree: :math:`k`; 2 is the authors'. With 0 this is task arithmetic; with more than there are trees nothing is left.

    Reference:
      Wang et al., *Localizing Task Information for Improved Model Merging and Compression*, 2024.
    """
    return chain(parts.shared(threshold, agree), parts.rescale(scale))
