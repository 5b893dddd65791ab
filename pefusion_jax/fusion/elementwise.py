"""Element-wise fusion methods, each a chain of :mod:`~pefusion_jax.fusion.parts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.fusion import parts, tool_parts
from pefusion_jax.fusion.parts import Fusion, chain, linear


def average() -> Fusion:
    r"""Plain average.

    .. math:: \tau = \frac{1}{T} \sum_{t=1}^{T} \tau_t

    Linear. One tree comes back bit for bit.

    Reference:
      Wortsman et al., *Model soups: averaging weights of multiple fine-tuned models improves accuracy without
      increasing inference time*, 2022. There the models share one task; here they need not.
    """
    return linear(lambda count: jnp.full((count,), 1.0 / count, _float()))


def weighted_average(weights: Mapping[str, Any] | Sequence[Any] | jax.Array, *, normalize: bool = False) -> Fusion:
    r"""Weighted combination.

    .. math:: \tau = \sum_t w_t \tau_t
       \qquad\text{or, normalized,}\qquad \tau = \frac{\sum_t w_t \tau_t}{\sum_t w_t}

    Linear.

    Args:
      weights: task name -> weight, or weights in the order in which :func:`~pefusion_jax.fusion.fuse` sees
        the trees: by name for a mapping of trees, as given for a sequence. Negative weights are allowed;
        values may be traced.
      normalize: divide by the sum of the weights. Off by default: the weights are used exactly as they are
        given, so weights that do not sum to 1 give no average but a scaled one. mergekit's ``linear`` normalizes unless told
        otherwise; its ``task_arithmetic`` does not.

    Raises:
      ValueError: when it is applied, if the number of weights is not the number of trees, or they sum to zero
        with ``normalize=True``.

    Reference:
      Matena and Raffel, *Merging Models with Fisher-Weighted Averaging*, 2022, for averages with unequal
      weights.
    """
    values, tasks = _coefficients(weights, "weighted_average")
    if normalize:
        total = jnp.sum(values)
        if not isinstance(total, jax.core.Tracer):
            # Weights such as 0.1, 0.6 and -0.7 miss 0 by a rounding error only.
            rounding = 4 * float(jnp.finfo(values.dtype).eps) * float(jnp.sum(jnp.abs(values)))
            if abs(float(total)) <= rounding:
                raise ValueError(f"the weights {weights} sum to 0 and cannot be normalized; pass normalize=False")
        values = values / total
    return linear(_exactly(values, "weighted_average"), tasks)


def task_arithmetic(scale: Any = 0.3) -> Fusion:
    r"""Task arithmetic: the scaled sum of task vectors.

    .. math:: \tau = \lambda \sum_t \tau_t \qquad\text{or, per task,}\qquad \tau = \sum_t \lambda_t \tau_t

    Linear. A negative scale makes the model forget a task.

    Args:
      scale: one scale for all tasks, a mapping task name -> scale, or an array of scales ``[task]`` in the
        order of the trees. May be traced: a sweep under ``jax.jit`` compiles once.

    Reference:
      Ilharco et al., *Editing Models with Task Arithmetic*, 2023. They choose the scale on validation data, from 21 values
      between 0 and 1; 0.3 is FusionBench's default. For adapters the arithmetic is done on weight changes (or on
      displacements), never on the factors A and B apart, whose products would mix between tasks.
    """
    if isinstance(scale, Mapping | Sequence) or jnp.ndim(scale) > 0:
        values, tasks = _coefficients(scale, "task_arithmetic")
        return linear(_exactly(values, "task_arithmetic"), tasks)
    return linear(lambda count: jnp.broadcast_to(jnp.asarray(scale, _float()), (count,)))


def ties(
    density: float | jax.Array = 0.2,
    scale: float | jax.Array = 1.0,
    *,
    elect: Literal["sum", "count"] = "sum",
    reduce: Literal["mean", "sum"] | None = None,
    trim: Literal["global", "per_tensor"] | None = None,
    weights: Mapping[str, Any] | Sequence[Any] | jax.Array | None = None,
    normalize: bool | None = None,
    conform: Literal["paper", "peft", "mergekit", "fusion_bench"] = "paper",
) -> Fusion:
    r"""TIES: trim, elect sign, merge what agrees.

    .. math::
       \hat\tau_t = \operatorname{top}_{\text{density}}(\tau_t), \quad
       \gamma_j = \operatorname{sgn} \sum_t \hat\tau_{t,j}, \quad
       \tau_j = \frac{\lambda}{|\mathcal A_j|} \sum_{t \in \mathcal A_j} \hat\tau_{t,j}, \quad
       \mathcal A_j = \{t : \operatorname{sgn} \hat\tau_{t,j} = \gamma_j \ne 0\}

    Defaults are the paper's: the largest 20 % of each task's whole vector are kept, signs are elected by
    mass, entries that agree are averaged. The authors choose the scale on validation data between 0.8 and
    2.5.

    The tools differ from the paper, and from each other:

    * ``"peft"``: each tensor is trimmed on its own, to none of its entries if ``density * n < 1``; undecided coordinates
      take plus; signs are elected without the weights, and the weighted entries that agree are divided by their number;
    * ``"mergekit"``: each tensor is trimmed on its own; signs are elected on the weighted entries (plus if undecided), whose
      sum is divided by the sum of the weights that agree, unless ``normalize=False``;
    * ``"fusion_bench"``: one entry more is kept (all of the threshold's magnitude) and undecided coordinates take minus if
      elected signs balance, as in the authors' code; the entries that agree are added up, where the authors average unless told
      otherwise. FusionBench's scale is 0.3.

    Args:
      density: fraction of each task's entries kept, in (0, 1]; may be traced.
      scale: :math:`\lambda`; may be traced.
      elect: vote by ``"sum"`` of values or by ``"count"`` of tasks (PEFT: "total", "frequency").
      reduce: ``"mean"`` or ``"sum"`` of the entries that agree; ``None`` is the paper's mean, FusionBench's sum.
      trim: compare magnitudes over the task's whole tree (``"global"``, the paper) or inside each tensor (``"per_tensor"``).
      weights: one for each task, by name or in order; only with ``"peft"`` and ``"mergekit"``. ``None``: 1 each.
      normalize: only with ``"mergekit"``; ``None`` is its default, true.
      conform: whose TIES.

    Raises:
      ValueError: if the density is outside (0, 1], an option is unknown, or is not one of that tool's.

    Reference:
      Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, 2023. We depart in two
      details: exactly the wanted number of entries is kept where magnitudes are tied (see
      :func:`~pefusion_jax.fusion.parts.trim`), and if elected signs balance exactly, undecided coordinates take plus.
    """
    tool_parts.require(
        "ties",
        conform,
        ("paper", "peft", "mergekit", "fusion_bench"),
        weights=(weights, ("peft", "mergekit")),
        normalize=(normalize, ("mergekit",)),
        trim=(trim, ("paper",)),
        reduce=(reduce, ("paper", "fusion_bench")),
    )
    if reduce not in (None, "mean", "sum"):
        raise ValueError(f"ties reduces by 'mean' or 'sum', not {reduce!r}")
    per_task, tasks = task_weights(weights, "ties")
    trimmed = parts.trim(density, "per_tensor" if conform == "mergekit" else trim or "global")
    if conform == "paper":
        whole = [trimmed, parts.elect(elect), parts.reduce_sum() if reduce == "sum" else parts.disjoint_mean()]
    elif conform == "peft":
        whole = [tool_parts.keep_floor(density), tool_parts.elect(elect, "plus"), tool_parts.peft_disjoint_mean(per_task)]
    elif conform == "mergekit":
        if elect != "sum":
            raise ValueError("mergekit's TIES elects by 'sum'; leave elect out, or take another conform")
        whole = [trimmed, tool_parts.mergekit_merge(per_task, consensus=True, normalize=normalize is not False)]
    else:
        reduced = parts.disjoint_mean() if reduce == "mean" else parts.reduce_sum()
        whole = [tool_parts.keep_one_more(density), tool_parts.elect(elect, "majority"), reduced]
    return chain(*whole, parts.rescale(scale))._replace(tasks=tasks)


def _float() -> Any:
    """The widest float of this session: float32, or float64 where the user has switched that on."""
    return jnp.result_type(float)


def _coefficients(given: Any, method: str) -> tuple[jax.Array, tuple[str, ...] | None]:
    """Coefficients as a vector, and the sorted names in whose order they stand if they are given by name."""
    if isinstance(given, Mapping):
        if not given:
            raise ValueError(f"{method} was given an empty mapping of weights; give one weight for each task")
        tasks = tuple(sorted(given))
        return jnp.stack([jnp.asarray(given[task], _float()) for task in tasks]), tasks
    values = jnp.asarray(given, _float()) if hasattr(given, "dtype") else _stacked(given)
    if values.ndim != 1:
        raise ValueError(f"{method} needs one weight for each task, shape [task], but got shape {values.shape}")
    return values, None


def _stacked(given: Sequence[Any]) -> jax.Array:
    if not len(given):
        raise ValueError("the weights are empty; give one weight for each task")
    return jnp.stack([jnp.asarray(value, _float()) for value in given])


def task_weights(
    weights: Mapping[str, Any] | Sequence[Any] | jax.Array | None, method: str
) -> tuple[Callable[[int], jax.Array], tuple[str, ...] | None]:
    """Weights of a method that is not linear, 1 each by default: number of tasks -> weights, and the names they belong to."""
    if weights is None:
        return (lambda count: jnp.ones((count,), _float())), None
    values, tasks = _coefficients(weights, method)
    return _exactly(values, method), tasks


def _exactly(values: jax.Array, method: str) -> Callable[[int], jax.Array]:
    def weights(count: int) -> jax.Array:
        if len(values) != count:
            raise ValueError(f"{method} has {len(values)} weights but got {count} trees; give one weight for each tree")
        return values

    return weights


def require_tasks(method: Fusion, names: Sequence[str] | None) -> None:
    """Checks that a method's per-task coefficients are about exactly the tasks whose trees are given.

    Args:
      method: any method.
      names: names of the trees, or ``None`` if the trees are not named.

    Raises:
      ValueError: naming the task without a tree (with the nearest names) or without a coefficient.
    """
    if method.tasks is None:
        return
    if names is None:
        raise ValueError(
            f"the weights are given by task name ({', '.join(method.tasks)}) but the trees are a sequence "
            "without names; pass the trees as a mapping name -> tree"
        )
    for task in method.tasks:
        if task not in names:
            raise ValueError(f"no tree for the task {task!r} that a weight is given for{trees.did_you_mean(task, names)}")
    for name in names:
        if name not in method.tasks:
            raise ValueError(f"no weight for the task {name!r}; weights are given for {', '.join(method.tasks)}")
