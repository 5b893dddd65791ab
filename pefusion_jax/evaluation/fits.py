"""One task's loss as a function of a network-linear model's coefficients, with gradient and curvature, on cached features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.evaluation.sweep import Cached
from pefusion_jax.tasks.metrics import cross_entropy, squared_error
from pefusion_jax.tasks.task import Task

Array = np.ndarray
# What a loss is made of: logits [n, classes] and labels [n] give losses [n] and their slopes [n, classes].
LossOf = Callable[[Array, Array], tuple[Array, Array]]


class Fit(NamedTuple):
    """The mean loss over a task's examples.

    Attributes:
      value: coefficients ``[k]`` -> loss.
      model: coefficients -> loss, gradient ``[k]`` and a positive semi-definite curvature ``[k, k]``; the Hessian if convex.
      restricted: places of the coefficients that may vary -> the same for these, the others being 0.
      convex: whether the loss is convex.
    """

    value: Callable[[Array], float]
    model: Callable[[Array], tuple[float, Array, Array]]
    restricted: Callable[[Array], Fit]
    convex: bool


def fit_of(cached: Cached, task: Task, loss: str, own: Sequence[int]) -> Fit:
    """The fit of one task.

    Args:
      cached: its features.
      task: the task.
      loss: ``"cross_entropy"``, ``"entropy"`` or ``"least_squares"``.
      own: places of the displacements that together are the task's own; for least squares.

    Raises:
      ValueError: see ``exact.solve_coefficients``.
    """
    if task.name not in cached.base:
        raise ValueError(f"no outputs are cached for {task.name!r}, only for {', '.join(cached.base)}")
    base, moved, labels = cached.base[task.name], cached.moved[task.name], cached.labels[task.name]
    if loss == "least_squares":
        if not own:
            raise ValueError(f"no displacement is named {task.name!r}, whose outputs least squares would go towards")
        flat = moved.reshape(len(moved), -1).astype(np.float64)
        target = flat[list(own)].sum(axis=0)
        power = float(target @ target)
        if not power > 0:
            raise ValueError(
                f"the displacement of {task.name!r} does nothing on its own examples, so least squares has nothing to go "
                "towards; train it, or leave the task out"
            )
        return _quadratic(flat @ flat.T / power, flat @ target / power, 1.0)
    if loss == "entropy":
        if not task.classes:
            raise ValueError(f"task {task.name!r} is a regression, whose predictions have no entropy")
        kind: LossOf = _entropy
    elif loss == "cross_entropy":
        if task.loss not in (cross_entropy, squared_error):
            raise ValueError(f"task {task.name!r} has a loss of its own; cross_entropy and squared_error are known here")
        kind = _cross_entropy if task.loss is cross_entropy else _squared
    else:
        raise ValueError(f"loss={loss!r} must be 'cross_entropy', 'entropy' or 'least_squares'")
    width = max(len(task.classes), 1)  # padded classes have probability 0 and count for nothing
    head, logits = task.head.params, task.head.logits
    if _is_linear(logits, head, base, moved, width):
        here, slopes = _expanded(logits)(head, base, moved)
        z, steps = np.asarray(here, np.float64)[:, :width], np.asarray(slopes, np.float64)[:, :, :width]
        return _affine(z, steps, labels, kind, convex=kind is not _entropy)
    return _curved(logits, head, base, moved, labels, width, kind)


def _quadratic(gram: Array, cross: Array, constant: float) -> Fit:
    def value(c: Array) -> float:
        return float(c @ gram @ c - 2 * cross @ c + constant)

    def restricted(keep: Array) -> Fit:
        return _quadratic(gram[np.ix_(keep, keep)], cross[keep], constant)

    return Fit(value, lambda c: (value(c), 2 * (gram @ c - cross), 2 * gram), restricted, convex=True)


def _affine(z: Array, steps: Array, labels: Array, kind: LossOf, convex: bool) -> Fit:
    """Logits ``z + sum_j c_j steps_j``, ``[n, classes]`` and ``[k, n, classes]``."""
    flat = steps.reshape(len(steps), -1)

    def at(c: Array) -> Array:
        return z + (c @ flat).reshape(z.shape)

    def model(c: Array) -> tuple[float, Array, Array]:
        return _expansion(at(c), steps, labels, kind)

    def restricted(keep: Array) -> Fit:
        return _affine(z, steps[keep], labels, kind, convex)

    return Fit(lambda c: float(kind(at(c), labels)[0].mean()), model, restricted, convex)


def _curved(logits: Any, head: Any, base: Array, moved: Array, labels: Array, width: int, kind: LossOf) -> Fit:
    """Logits that are not linear in the features: expanded anew at each point, in float32 (Gauss-Newton)."""
    on_device = jnp.asarray(base), jnp.asarray(moved)  # once for all points

    # A restriction keeps all displacements and sets the others' coefficients to 0, so that one program serves all subsets.
    def build(keep: Array) -> Fit:
        def full(c: Array) -> Array:
            out = np.zeros(len(moved), np.float32)
            out[keep] = c
            return out

        def value(c: Array) -> float:
            z = np.asarray(_at(logits)(head, *on_device, full(c)), np.float64)[:, :width]
            return float(kind(z, labels)[0].mean())

        def model(c: Array) -> tuple[float, Array, Array]:
            here, slopes = _expanded_at(logits)(head, *on_device, full(c))
            z, steps = np.asarray(here, np.float64)[:, :width], np.asarray(slopes, np.float64)[keep][:, :, :width]
            return _expansion(z, steps, labels, kind)

        return Fit(value, model, lambda chosen: build(keep[chosen]), convex=False)

    return build(np.arange(len(moved)))


def _expansion(z: Array, steps: Array, labels: Array, kind: LossOf) -> tuple[float, Array, Array]:
    losses, slopes = kind(z, labels)
    count = len(labels)
    flat = steps.reshape(len(steps), -1)
    gradient = flat @ slopes.reshape(-1) / count
    if kind is _squared:
        first = steps[:, :, 0]
        return float(losses.mean()), gradient, 2 * first @ first.T / count
    # diag(p) - p p', the curvature of a softmax; for entropies the natural metric, which keeps every step downhill.
    p = _softmax(z)
    means = np.einsum("knc,nc->kn", steps, p)
    curvature = ((steps * p[None]).reshape(len(steps), -1) @ flat.T - means @ means.T) / count
    return float(losses.mean()), gradient, (curvature + curvature.T) / 2


def _log_softmax(z: Array) -> Array:
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _softmax(z: Array) -> Array:
    return np.exp(_log_softmax(z))


def _cross_entropy(z: Array, labels: Array) -> tuple[Array, Array]:
    log_p = _log_softmax(z)
    rows = np.arange(len(labels))
    slopes = np.exp(log_p)
    slopes[rows, labels] -= 1.0
    return -log_p[rows, labels], slopes


def _entropy(z: Array, labels: Array) -> tuple[Array, Array]:
    log_p = _log_softmax(z)
    p = np.exp(log_p)
    entropy = -np.sum(p * log_p, axis=1)
    return entropy, -p * (log_p + entropy[:, None])


def _squared(z: Array, labels: Array) -> tuple[Array, Array]:
    off = z[:, 0] - labels
    return off**2, np.concatenate([2 * off[:, None], np.zeros_like(z[:, 1:])], axis=1)


def _is_linear(logits: Any, head: Any, base: Array, moved: Array, width: int) -> bool:
    """Whether logits are affine in the features, on probes of several sizes around and far from the cached features."""
    rng = np.random.default_rng(0)
    rows = rng.choice(len(base), min(len(base), 64), replace=False)
    away = np.einsum("j,jnd->nd", rng.normal(size=len(moved)), moved[:, rows].astype(np.float64)).astype(np.float32)
    size = float(np.abs(base).max()) + 1.0
    drawn = (size * rng.normal(size=away.shape)).astype(np.float32)
    for x, y in ((base[rows], away), (drawn, base[rows]), (drawn, 3 * drawn[::-1])):
        ends = [np.asarray(_plain_logits(logits)(head, f), np.float64)[:, :width] for f in (x, x + y, x - y)]
        gap = np.abs(ends[1] + ends[2] - 2 * ends[0]).max()
        if not gap <= 1e-4 * max(np.abs(end).max() for end in ends):
            return False
    return True


@functools.lru_cache(maxsize=64)
def _plain_logits(logits: Any) -> Callable[..., Any]:
    return jax.jit(logits)


def _combine(base: jax.Array, moved: jax.Array, c: jax.Array) -> jax.Array:
    return base + jnp.einsum("k,knd->nd", c, moved, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=64)
def _at(logits: Any) -> Callable[..., Any]:
    return jax.jit(lambda head, base, moved, c: logits(head, _combine(base, moved, c)))


@functools.lru_cache(maxsize=64)
def _expanded(logits: Any) -> Callable[..., Any]:
    def run(head: Any, features: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
        here, along = jax.linearize(lambda f: logits(head, f), features)
        return here, jax.vmap(along)(moved)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def _expanded_at(logits: Any) -> Callable[..., Any]:
    expanded = _expanded(logits)
    return jax.jit(lambda head, base, moved, c: expanded(head, _combine(base, moved, c), moved))
