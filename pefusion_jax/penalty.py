r"""A training penalty that keeps a task's change out of other tasks' way, from their stored moments alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import LowRank, dense
from pefusion_jax.layerwise import separate, stacked_layers
from pefusion_jax.moments import Moments, Spectral, Statistics, dense_moment, moment_trace, times, times_right

Penalty = tuple[Callable[..., jax.Array], Any]


def interference_penalty(
    statistics: Mapping[str, Statistics], *, weight: float = 1.0, accumulate: bool = True, normalize: bool = False
) -> Penalty:
    r"""The expected cost of a change to other tasks, for ``finetune(..., penalty=interference_penalty(others))``.

    .. math:: R(\tau) = \frac{\lambda}{2} \sum_l \sum_t \mathrm{tr}(\Delta W_l^\top G_{t,l}\, \Delta W_l\, S_{t,l})
       \approx \frac{\lambda}{2} \sum_l \mathrm{tr}\Big(\Delta W_l^\top \bar G_l\, \Delta W_l\, \textstyle\sum_t S_{t,l}\Big)

    :math:`\Delta W = ` ``adapted.deltas(params, adapters)``, and a low-rank pair is never multiplied out:
    :math:`\mathrm{tr}((A^\top G A)(B S B^\top))`. By the second form the cost of training does not grow with the
    number of tasks: the mean of the input moments, weighted by the traces of :math:`S_t`, beside the sum of the
    output moments, with the same trace as the first.

    Args:
      statistics: task name -> statistics of every *other* task, with input and output moments at the parameters that will
        change (``paths=`` of :func:`~pefusion_jax.statistics.statistics` where those tasks changed others). A parameter
        without moments is not penalised.
      weight: :math:`\lambda`. One is the natural unit: the penalty is then the second-order estimate of the Kullback-Leibler
        divergence that the change causes on the other tasks' data, added up over the tasks.
      accumulate: use the second form.
      normalize: divide each task's cost by its total :math:`\sum_l \mathrm{tr} G_{t,l}\,\mathrm{tr} S_{t,l}` over
        all parameters.

    Returns:
      ``(function, arrays)``: ``function(arrays, adapted, params, adapters) -> []`` is a module-level function, the same
      object always, and everything that differs between tasks is in the arrays, so that all tasks train in one program.

    Raises:
      ValueError: if there are no statistics, or they lack output moments.

    Example::

      others = {name: stats[name] for name in stats if name != task.name}
      tau = finetune(llora, params, task, penalty=interference_penalty(others))

    Reference: A. Porrello et al., Dataless Weight Disentanglement in Task Arithmetic via Kronecker-Factored Approximate
    Curvature (TAK), 2026, and for the objective K. Yoshida et al., Mastering Task Arithmetic: tau-Jp as a Key Indicator for
    Weight Disentanglement, 2025. They train linearized models; here any model
    with weight-space changes does. Their weight, 500, belongs to other units: their mean over tasks has other scales.
    """
    if not statistics:
        raise ValueError("interference_penalty needs the statistics of at least one other task")
    kept: dict[str, list[tuple[Any, Any]]] = {}
    for name, found in sorted(statistics.items()):
        missing = next((path for path, moments in found.moments.items() if moments.outputs is None), None)
        if missing is not None:
            raise ValueError(f"the statistics of {name!r} have no output moments at {missing!r}; collect them as well")
        total = sum(jnp.sum(moment_trace(m.inputs) * moment_trace(m.outputs)) for m in found.moments.values())
        unit = 1.0 / jnp.maximum(jnp.asarray(total, jnp.float32), jnp.finfo(jnp.float32).tiny) if normalize else jnp.float32(1)
        for path, moments in found.moments.items():
            kept.setdefault(path, []).append((moments, unit))
    arrays: dict[str, list[Moments]] = {}
    for path, of_tasks in kept.items():
        scaled = [Moments(m.inputs, _scaled(m.outputs, unit), m.axes) for m, unit in of_tasks]
        arrays[path] = [_accumulated(scaled)] if accumulate and len(scaled) > 1 else scaled
    return _interference, {"weight": jnp.float32(weight), "moments": arrays}


def _scaled(moment: Any, unit: Any) -> Any:
    if isinstance(moment, Spectral):
        return Spectral(moment.vectors, moment.values * unit[..., None], moment.diagonal * unit[..., None])
    return moment * unit[..., None, None]


def _sum(moments: list[Any]) -> Any:
    """Diagonal matrices stay so."""
    if all(isinstance(m, Spectral) and not m.values.shape[-1] for m in moments):
        return Spectral(moments[0].vectors, moments[0].values, functools.reduce(jnp.add, [m.diagonal for m in moments]))
    return functools.reduce(jnp.add, [dense_moment(m) for m in moments])


def _accumulated(of_tasks: list[Moments]) -> Moments:
    traces = [moment_trace(m.outputs) for m in of_tasks]
    whole = jnp.maximum(functools.reduce(jnp.add, traces), jnp.finfo(jnp.float32).tiny)
    inputs = [_scaled(m.inputs, trace / whole) for m, trace in zip(of_tasks, traces, strict=True)]
    return Moments(_sum(inputs), _sum([m.outputs for m in of_tasks]), of_tasks[0].axes)


def _interference(arrays: Any, adapted: Any, params: Any, adapters: Any) -> jax.Array:
    delta = adapted.deltas(params, adapters)
    counts = stacked_layers({path: (change,) for path, change in delta.leaves.items()}, STACKS)
    changes = separate({path: (change,) for path, change in delta.leaves.items()}, counts)
    if not changes.keys() & arrays["moments"].keys():
        raise ValueError(
            f"the statistics know none of the parameters that change: {', '.join(sorted(changes)[:2])}, ... here, "
            f"{', '.join(sorted(arrays['moments'])[:2])}, ... there; collect them on the same model, with paths= if need be"
        )
    total = jnp.zeros((), jnp.float32)
    for path, (change,) in changes.items():
        for moments in arrays["moments"].get(path, ()):
            total = total + _cost(change, moments)
    return 0.5 * arrays["weight"] * total


def _cost(change: Any, moments: Moments) -> jax.Array:
    r""":math:`\mathrm{tr}(D^\top G D S)`."""
    if isinstance(change, LowRank):
        a, b = change.a.astype(jnp.float32), change.b.astype(jnp.float32)
        inner = jnp.matmul(jnp.swapaxes(a, -1, -2), times(moments.inputs, a), precision=jax.lax.Precision.HIGHEST)
        outer = jnp.matmul(times_right(b, moments.outputs), jnp.swapaxes(b, -1, -2), precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(inner * outer)
    x = dense(change) if moments.axes is None else dense(change).transpose(moments.axes)
    x = x.astype(jnp.float32).reshape(*moments.inputs.shape[:-1], moments.outputs.shape[-1])
    return jnp.sum(x * times_right(times(moments.inputs, x), moments.outputs))
