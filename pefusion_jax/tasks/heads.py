"""Frozen heads: made once from the base model, then the same for every adapted, linearized or fused model.

Classes are padded to a multiple of ``pad_to`` with the logit -1e9, so that tasks with few and many classes share one
compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefusion_jax.tasks.features import cls_features, features_of, mean_pool_features
from pefusion_jax.tasks.task import Head

PADDED = -1e9
_ROWS = 256


def cosine_logits(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    r"""Scaled cosine of the features with each class embedding: :math:`z_c = s \cos(f, e_c) + b_c`.

    Args:
      params: ``classes`` ``[classes, d]`` of length 1, ``scale`` ``[]``, ``bias`` ``[classes]``: 0, or -1e9 for padding.
      features: ``[batch, d]``.

    Returns:
      ``[batch, classes]``.
    """
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    unit = features * jax.lax.rsqrt(squares + jnp.asarray(1e-12, features.dtype))
    return params["scale"] * (unit @ params["classes"].T) + params["bias"][None, :]


def whitened_logits(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    """:func:`cosine_logits` of ``(features - mean) @ whiten``.

    Args:
      params: of :func:`cosine_logits`, and ``mean`` ``[d]``, ``whiten`` ``[d, d]``.
      features: ``[batch, d]``.

    Returns:
      ``[batch, classes]``.
    """
    return cosine_logits(params, (features - params["mean"][None, :]) @ params["whiten"])


def linear_logits(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    """``features @ kernel + bias``.

    Args:
      params: ``kernel`` ``[d, classes]`` and ``bias`` ``[classes]``.
      features: ``[batch, d]``.

    Returns:
      ``[batch, classes]``.
    """
    return features @ params["kernel"] + params["bias"][None, :]


def zero_shot_head(
    apply: Callable[..., Any],
    params: Any,
    encoder: Any,
    descriptions: Sequence[str],
    *,
    pad_to: int = 32,
    scale: float = 30.0,
    features: Callable[..., jax.Array] = mean_pool_features,
) -> Head:
    """A head without training: cosine similarity of a text's features with the base model's features of the descriptions.

    Args:
      apply: ``(params, **inputs) -> outputs`` of the base model.
      params: of the base model.
      encoder: a ``TextEncoder``; its ``texts`` encodes the descriptions.
      descriptions: one text for each class, in label order.
      pad_to: classes are padded to a multiple of this.
      scale: factor of the cosine, the inverse temperature of the softmax.
      features: feature function, for the descriptions and for the texts.

    Returns:
      A head with ``cosine_logits``.

    Raises:
      ValueError: if there are fewer than two descriptions, or two are equal.

    Reference: A. Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021: their class
    prompts, with one text encoder in both roles.
    """
    if len(descriptions) < 2 or len(set(descriptions)) != len(descriptions):
        raise ValueError(f"descriptions={list(descriptions)!r:.200} must be two or more different texts, one for each class")
    embedded = features_of(apply, params, encoder.texts(descriptions), encoder.trim, features=features)
    unit = embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), 1e-12)
    return _cosine_head(unit, pad_to, scale, features)


def prototype_head(
    inputs: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    pad_to: int = 32,
    scale: float = 30.0,
    whiten: float | None = None,
    features: Callable[..., jax.Array] = cls_features,
) -> Head:
    r"""A head without training: cosine similarity with each class's prototype, the mean direction of its base-model features.

    .. math:: e_c = \frac{\sum_{i: y_i = c} f_i / |f_i|}{|\sum_{i: y_i = c} f_i / |f_i||}

    Features of one model often share a direction that no class owns, and all cosines are then alike. With ``whiten`` they are
    taken after :math:`f \mapsto (C + w \tfrac{\operatorname{tr} C}{d} I)^{-1/2} (f - \bar f)`, with the mean
    :math:`\bar f` and the covariance :math:`C` of ``inputs``.

    Args:
      inputs: features of the training split, ``[n, d]``, from :func:`features_of`.
      labels: ``[n]``, class numbers.
      num_classes: number of classes; each needs an example.
      pad_to: classes are padded to a multiple of this.
      scale: factor of the cosine, the inverse temperature of the softmax.
      whiten: the ridge :math:`w > 0`, relative to the mean variance; ``None`` takes the features as they are.
      features: the function that made ``inputs``; stored in the head.

    Returns:
      A head with ``cosine_logits``, or with ``whitened_logits``.

    Raises:
      ValueError: if shapes do not fit, values are not finite, a label is not a class, a class has no direction, or
        ``whiten`` is not above 0.

    Reference: J. Snell et al., Prototypical Networks for Few-shot Learning, 2017; here with cosines instead of squared
    distances, and with nothing trained.
    """
    x, y = np.asarray(inputs, np.float32), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or not np.isfinite(x).all():
        raise ValueError(f"features {x.shape} and labels {y.shape} must be finite [n, d] and [n]")
    if num_classes < 2 or set(np.unique(y).tolist()) != set(range(num_classes)):
        raise ValueError(
            f"the labels {np.unique(y).tolist()!r:.200} must be all of 0 to {num_classes - 1}: no class is without an example"
        )
    if whiten is not None and not 0 < whiten < np.inf:
        raise ValueError(f"whiten={whiten!r} must be above 0, or None")
    if whiten is not None:
        mean, spread = _whitening(x, whiten)
        x = (x - mean) @ spread
    sums = np.zeros((num_classes, x.shape[1]), np.float64)
    np.add.at(sums, y, x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    if lengths.min() < 1e-6:
        raise ValueError(f"the features of class {int(lengths.argmin())} cancel each other: it has no direction")
    head = _cosine_head((sums / lengths).astype(np.float32), pad_to, scale, features)
    if whiten is None:
        return head
    return Head({**head.params, "mean": jnp.asarray(mean), "whiten": jnp.asarray(spread)}, features, whitened_logits)


def _whitening(x: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and symmetric whitening matrix, float32."""
    mean = x.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.cov(x.T.astype(np.float64), bias=True))
    scales = 1 / np.sqrt(np.maximum(values, 0) + ridge * max(float(values.mean()), 1e-12))
    return mean.astype(np.float32), ((vectors * scales) @ vectors.T).astype(np.float32)


def _cosine_head(unit: np.ndarray, pad_to: int, scale: float, features: Callable[..., jax.Array]) -> Head:
    width = _padded(len(unit), pad_to)
    classes = np.zeros((width, unit.shape[1]), np.float32)
    classes[: len(unit)] = unit
    fixed = {"classes": jnp.asarray(classes), "scale": jnp.float32(scale), "bias": _padding_bias(len(unit), width)}
    return Head(fixed, features, cosine_logits)


def linear_head(
    inputs: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    pad_to: int = 32,
    l2: float = 0.1,
    steps: int = 100,
    features: Callable[..., jax.Array] = mean_pool_features,
) -> Head:
    r"""A linear head fitted to base-model features: multinomial logistic regression, or ridge regression.

    .. math:: \min_{W,b} \tfrac1N \sum_i \ell(W^\top \tilde f_i + b, y_i) + \tfrac{\lambda}{2} \lVert W \rVert^2

    on standardised features :math:`\tilde f`; the standardisation is folded into ``kernel`` and ``bias``. L-BFGS takes a fixed
    number of steps, in one compiled program for all tasks of about the same size.

    Args:
      inputs: features of the training split, ``[n, d]``, from :func:`base_features`.
      labels: ``[n]``: class numbers, or targets if ``num_classes`` is 0.
      num_classes: number of classes; 0 for a regression, whose prediction is the first logit.
      pad_to: classes are padded to a multiple of this.
      l2: weight of the penalty on the kernel; the bias goes free.
      steps: number of L-BFGS steps; the ridge regression is solved exactly.
      features: the function that made ``inputs``; stored in the head.

    Returns:
      A head with ``linear_logits``.

    Raises:
      ValueError: if shapes do not fit, values are not finite, or a label is not a class.
    """
    x, y = np.asarray(inputs, np.float32), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y) or not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError(f"features {x.shape} and labels {y.shape} must be finite [n, d] and [n] with n > 0")
    if l2 <= 0:
        raise ValueError(f"l2={l2} must be positive: without a penalty the solution is not unique")
    if num_classes and (num_classes < 2 or not np.isin(y, np.arange(num_classes)).all()):
        raise ValueError(
            f"labels from {y.min()} to {y.max()} do not fit num_classes={num_classes}, whose labels are whole numbers from 0; "
            "0 means regression"
        )
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 1e-6, spread, 1.0).astype(np.float32)
    standard = (x - mean) / spread
    width = _padded(max(num_classes, 1), pad_to)
    bias = np.asarray(_padding_bias(max(num_classes, 1), width))
    if num_classes:
        # Rows are padded as well: tasks of about the same size then share the program.
        rows = -(-len(y) // _ROWS) * _ROWS
        fill = rows - len(y)
        weights = np.pad(np.full(len(y), 1 / len(y), np.float32), (0, fill))
        targets = np.pad(y.astype(np.int32), (0, fill))
        fitted = _logistic(np.pad(standard, ((0, fill), (0, 0))), targets, weights, bias, jnp.float32(l2), steps)
        kernel, offset = np.asarray(fitted["kernel"]), np.asarray(fitted["bias"])
        kernel = np.where(bias == 0, kernel, 0)
    else:
        x64, y64 = standard.astype(np.float64), y.astype(np.float64)
        gram = x64.T @ x64 / len(y) + l2 / 2 * np.eye(x.shape[1])
        kernel, offset = np.zeros((x.shape[1], width)), np.zeros(width)
        kernel[:, 0], offset[0] = np.linalg.solve(gram, x64.T @ (y64 - y64.mean()) / len(y)), y64.mean()
    kernel = kernel / spread[:, None]
    params = {
        "kernel": jnp.asarray(kernel, jnp.float32),
        "bias": jnp.asarray(np.where(bias == 0, offset - mean @ kernel, bias), jnp.float32),
    }
    return Head(params, features, linear_logits)


@functools.partial(jax.jit, static_argnums=5)
def _logistic(x: jax.Array, y: jax.Array, weights: jax.Array, padding: jax.Array, l2: jax.Array, steps: int) -> Any:
    def loss(params: Any) -> jax.Array:
        logits = linear_logits(params, x) + padding[None, :]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(weights * losses) + l2 / 2 * jnp.sum(jnp.square(params["kernel"]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    start = {"kernel": jnp.zeros((x.shape[1], padding.shape[0])), "bias": jnp.zeros(padding.shape)}
    (params, _), _ = jax.lax.scan(step, (start, solver.init(start)), None, length=steps)
    return params


def _padded(count: int, pad_to: int) -> int:
    if pad_to < 1:
        raise ValueError(f"pad_to={pad_to} must be 1 or more")
    return -(-count // pad_to) * pad_to


def _padding_bias(count: int, width: int) -> jax.Array:
    return jnp.where(jnp.arange(width) < count, jnp.float32(0), jnp.float32(PADDED))
