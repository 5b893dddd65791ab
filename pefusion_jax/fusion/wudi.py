"""WUDI: a fused matrix that disturbs each task least in the span of the task's own rows."""

from __future__ import annotations

import functools
from numbers import Integral
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax.fusion.matrices import Factors, Matrices, matrixwise
from pefusion_jax.fusion.parts import Fusion


def wudi(
    steps: int = 300,
    learning_rate: float | jax.Array = 1e-5,
    scale: float | jax.Array = 1.0,
    *,
    moments: Literal["matrix", "entry"] = "matrix",
) -> Fusion:
    r"""WUDI: gradient descent on how much the fused matrix disturbs each task in the span of the task's own rows.

    .. math:: \min_\delta \sum_t \frac{\|(\delta - \Delta_t)^\top \Delta_t\|_F^2}{\|\Delta_t\|_F^2}, \qquad
       \delta_0 = \sum_t \Delta_t

    written for matrices ``[inputs, outputs]``. No data: the gradient is :math:`2 \sum_t \Delta_t \Delta_t^\top
    (\delta - \Delta_t) / \|\Delta_t\|_F^2`. Other leaves are averaged and scaled. One task alone comes back bit for bit at
    scale 1.

    Args:
      steps: of Adam; 300 are the authors'.
      learning_rate: 1e-5 is the authors', for entries of the size that fully fine-tuned weights move by. May be traced.
      scale: may be traced.
      moments: ``"matrix"``: Adam divides by one second moment a matrix, the mean over all entries of the parameter, which makes
        it independent of the basis and keeps pairs low-rank. ``"entry"``: ordinary Adam, as the authors do, whose division
        entry by entry leaves every low-rank space: pairs are multiplied out.

    Raises:
      ValueError: if there are fewer than 0 steps or the option is unknown.

    Reference:
      Cheng et al., *Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors*, 2025. We
      depart in the second moment unless ``moments="entry"``.
    """
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"wudi cannot take {steps} steps; give a whole number")
    if moments not in ("matrix", "entry"):
        raise ValueError(f"wudi's second moments are of each 'entry' or of the 'matrix', not {moments!r}")

    def core(given: Matrices) -> Factors:
        rate = jnp.asarray(learning_rate, given.stack.dtype)
        entries = None if moments == "entry" else given.shape[0] * given.shape[1]
        fused = _descended(given.stack, rate, steps, entries)
        return fused, jnp.eye(fused.shape[1], dtype=fused.dtype)

    method = matrixwise(core, scale, single=True)
    return method if moments == "matrix" else Fusion(method.apply)


# Compiled once a shape: a loop whose body is a new function in every call would be compiled in every call.
@functools.partial(jax.jit, static_argnames=("steps", "entries"))
def _descended(stack: jax.Array, rate: jax.Array, steps: int, entries: int | None) -> jax.Array:
    """Where Adam takes WUDI's objective from the sum of ``[task, m, n]``.

    Its second moment is the mean over the ``entries`` of the parameter, or for ``None`` one of each entry.
    """
    squares = jnp.sum(jnp.square(stack), axis=(1, 2), keepdims=True)
    weighted = stack * jnp.where(squares > 0, 2 / jnp.where(squares > 0, squares, jnp.ones_like(squares)), 0)
    grams = weighted @ stack.mT
    hessian, target = jnp.sum(grams, axis=0), jnp.sum(grams @ stack, axis=0)

    def step(i: jax.Array, carry: Any) -> Any:
        fused, first, second = carry
        gradient = hessian @ fused - target
        square = jnp.square(gradient)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * (square if entries is None else jnp.sum(square, keepdims=True) / entries)
        count = (i + 1).astype(stack.dtype)
        update = first / (1 - 0.9**count) / (jnp.sqrt(second / (1 - 0.999**count)) + 1e-8)
        return fused - rate * update, first, second

    start = jnp.sum(stack, axis=0)
    second = jnp.zeros(start.shape if entries is None else (1, 1), start.dtype)
    fused, _, _ = jax.lax.fori_loop(0, steps, step, (start, jnp.zeros_like(start), second))
    return fused
