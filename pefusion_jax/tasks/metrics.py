"""Losses (one number per example, in JAX) and metrics (one number per split, in NumPy; larger is better)."""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.tasks.heads import PADDED


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Negative log-likelihood of the label under a softmax, per example.

    .. math:: \ell = \log \sum_c e^{z_c} - z_y

    Args:
      logits: ``[batch, classes]``; padded classes at -1e9 count for nothing.
      labels: ``[batch]``, integers.

    Returns:
      ``[batch]``, float32.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.lru_cache(maxsize=64)
def smoothed_cross_entropy(smoothing: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    r"""The cross-entropy with label smoothing; one function for each value, so that its programs are reused.

    .. math:: \ell = (1 - \epsilon)\, (\log \sum_c e^{z_c} - z_y) + \frac{\epsilon}{K} \sum_k (\log \sum_c e^{z_c} - z_k)

    over the :math:`K` real classes: those that only fill up a head, at -1e9, count for nothing.

    Args:
      smoothing: :math:`\epsilon`, from 0 to below 1.

    Returns:
      ``(logits, labels) -> [batch]``, see :func:`cross_entropy`.

    Reference: C. Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016.
    """

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        real = logits > PADDED / 2
        count = jnp.sum(real.astype(jnp.float32), axis=-1)
        mean = jnp.sum(jnp.where(real, logits, jnp.float32(0)), axis=-1) / count
        spread = jax.nn.logsumexp(logits, axis=-1) - mean
        return (1.0 - smoothing) * cross_entropy(logits, labels) + smoothing * spread

    return loss


def token_cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    r"""Mean negative log-likelihood of the target's tokens, per example.

    .. math:: \ell = \frac{1}{T} \sum_{t \le T} \log \sum_v e^{z_{tv} - z_{t y_t}}

    Args:
      logits: ``[batch, seq, vocab]``, relative to the target's: :math:`z_{tv} - z_{t y_t}`, as ``target_features`` makes them.
        All are 0 where there is no token, which counts for nothing.
      labels: not used: the target is in the logits.

    Returns:
      ``[batch]``, float32.
    """
    del labels
    logits = logits.astype(jnp.float32)
    return _token_mean(logits, jax.nn.logsumexp(logits, axis=-1))


@functools.lru_cache(maxsize=64)
def smoothed_token_cross_entropy(smoothing: float) -> Callable[[jax.Array, Any], jax.Array]:
    r"""The tokens' cross-entropy with label smoothing over the vocabulary; one function for each value.

    .. math:: \ell = (1 - \epsilon)\, \ell_{\text{target}} + \frac{\epsilon}{T V} \sum_{t,v} -\log p_{tv}

    Args:
      smoothing: :math:`\epsilon`, from 0 to below 1.

    Returns:
      ``(logits, labels) -> [batch]``, see :func:`token_cross_entropy`.

    Reference: C. Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016.
    """

    def loss(logits: jax.Array, labels: Any) -> jax.Array:
        del labels
        logits = logits.astype(jnp.float32)
        # -log p_v = logsumexp(z - z_y) - (z_v - z_y): the target's share of the smoothing is its 0.
        return _token_mean(logits, jax.nn.logsumexp(logits, axis=-1) - smoothing * jnp.mean(logits, axis=-1))

    return loss


def _token_mean(logits: jax.Array, each: jax.Array) -> jax.Array:
    """Means of ``[batch, seq]`` over the positions that have a token."""
    real = jnp.any(logits != 0, axis=-1)
    # A model that gives all tokens the same logit looks like a row without tokens; it is to learn all the same.
    real = real | ~jnp.any(real, axis=1, keepdims=True)
    return jnp.sum(jnp.where(real, each, jnp.float32(0)), axis=1) / jnp.sum(real.astype(jnp.float32), axis=1)


def squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Squared distance of the first logit to the target, per example: :math:`\ell = (z_0 - y)^2`.

    Args:
      logits: ``[batch, width]``; columns after the first are padding.
      labels: ``[batch]``, floats.

    Returns:
      ``[batch]``, float32.
    """
    return jnp.square(logits[:, 0].astype(jnp.float32) - labels.astype(jnp.float32))


def accuracy(logits: Any, labels: Any) -> float:
    """Share of examples whose largest logit is the label's.

    Args:
      logits: ``[n, classes]``.
      labels: ``[n]``, integers.
    """
    predicted, labels = _predicted(logits, labels)
    return float(np.mean(predicted == labels))


def macro_f1(logits: Any, labels: Any) -> float:
    r"""Mean over classes of :math:`2\,tp / (2\,tp + fp + fn)`; classes neither labelled nor predicted do not count.

    Args:
      logits: ``[n, classes]``.
      labels: ``[n]``, integers.
    """
    predicted, labels = _predicted(logits, labels)
    scores = []
    for c in np.union1d(predicted, labels):
        hit = np.sum((predicted == c) & (labels == c))
        scores.append(2 * hit / (np.sum(predicted == c) + np.sum(labels == c)))
    return float(np.mean(scores))


def matthews(logits: Any, labels: Any) -> float:
    r"""Matthews correlation of predicted and true classes, for any number of classes; 0 where it is not defined.

    .. math:: \frac{c\,s - \sum_k p_k t_k}{\sqrt{(s^2 - \sum_k p_k^2)(s^2 - \sum_k t_k^2)}}

    with ``s`` examples, ``c`` of them right, ``p_k`` predicted and ``t_k`` labelled as class ``k``.

    Args:
      logits: ``[n, classes]``.
      labels: ``[n]``, integers.

    Reference: J. Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    predicted, labels = _predicted(logits, labels)
    classes = np.union1d(predicted, labels)
    p = np.asarray([np.sum(predicted == c) for c in classes], np.float64)
    t = np.asarray([np.sum(labels == c) for c in classes], np.float64)
    s, right = float(len(labels)), float(np.sum(predicted == labels))
    spread = (s * s - np.sum(p * p)) * (s * s - np.sum(t * t))
    return float((right * s - np.sum(p * t)) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(logits: Any, labels: Any) -> float:
    """Correlation of the first logit with the target; 0 where one of them is constant.

    Args:
      logits: ``[n, width]`` or ``[n]``.
      labels: ``[n]``, floats.
    """
    return _correlation(*_scores(logits, labels))


def spearman(logits: Any, labels: Any) -> float:
    """Correlation of the ranks of the first logit and the target, ties at their mean rank; 0 where one is constant.

    Args:
      logits: ``[n, width]`` or ``[n]``.
      labels: ``[n]``, floats.
    """
    first, second = _scores(logits, labels)
    return _correlation(_ranks(first), _ranks(second))


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are the reference, but for case, punctuation, articles and spaces.

    Args:
      predictions: ``[n]`` texts.
      references: ``[n]`` texts.

    Reference: P. Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016, for the normalisation.
    """
    return float(np.mean([one == two for one, two in _words(predictions, references)]))


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over texts of the F1 score of the words that prediction and reference share, normalised as in :func:`exact_match`.

    Two texts without a word match; one without does not.

    Args:
      predictions: ``[n]`` texts.
      references: ``[n]`` texts.

    Reference: see :func:`exact_match`.
    """
    scores = []
    for one, two in _words(predictions, references):
        shared = sum((collections.Counter(one) & collections.Counter(two)).values())
        scores.append(float(one == two) if not one or not two else 2 * shared / (len(one) + len(two)))
    return float(np.mean(scores))


def _words(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references must be as many, and at least one")
    drop = str.maketrans("", "", string.punctuation)

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", str(text).lower().translate(drop)).split()

    return [(words(one), words(two)) for one, two in zip(predictions, references, strict=True)]


def _predicted(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must be [n, classes] and [n] with n > 0")
    if np.isnan(logits).any():
        raise ValueError(f"logits of {int(np.isnan(logits).any(axis=1).sum())} of {len(labels)} examples are not numbers")
    return np.argmax(logits, axis=-1), labels


def _scores(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    scores = logits[:, 0] if logits.ndim == 2 else logits
    if labels.ndim != 1 or scores.shape != labels.shape or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must be [n, width] and [n] with n > 0")
    for what, values in (("predictions", scores), ("labels", labels)):
        if bad := int(np.sum(~np.isfinite(values))):
            raise ValueError(f"{what} of {bad} of {len(labels)} examples are not finite numbers")
    return scores, labels


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    one, two = one - one.mean(), two - two.mean()
    scale = np.sqrt(np.sum(one * one) * np.sum(two * two))
    return float(np.sum(one * two) / scale) if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
