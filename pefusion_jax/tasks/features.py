"""Features that heads work on: of a model's outputs, and of encoded examples under the base model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mean_pool_features(outputs: Any, inputs: Mapping[str, Any]) -> jax.Array:
    r"""Mean of the last hidden states of the tokens that are not padding: :math:`\sum_t m_t h_t / \sum_t m_t`.

    Args:
      outputs: has ``last_hidden_state``, ``[batch, seq, d]``.
      inputs: has ``attention_mask``, ``[batch, seq]``.

    Returns:
      ``[batch, d]``, float32.
    """
    hidden = outputs.last_hidden_state.astype(jnp.float32)
    mask = jnp.asarray(inputs["attention_mask"]).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), jnp.float32(1))
    return jnp.einsum("bsd,bs->bd", hidden, mask / total)


def cls_features(outputs: Any, inputs: Mapping[str, Any]) -> jax.Array:
    """The last hidden state of the first token.

    Args:
      outputs: has ``last_hidden_state``, ``[batch, seq, d]``.
      inputs: not used; there so that all feature functions are called alike.

    Returns:
      ``[batch, d]``, float32.
    """
    del inputs
    return outputs.last_hidden_state[:, 0].astype(jnp.float32)


def base_features(apply: Callable[..., Any], params: Any, encoder: Any, examples: Sequence[Any], **options: Any) -> np.ndarray:
    """Features of examples under the base model, ``[n, d]``: :func:`features_of` on what a ``TextEncoder`` makes of them."""
    return features_of(apply, params, encoder.padded(examples), encoder.trim, **options)


def features_of(
    apply: Callable[..., Any],
    params: Any,
    inputs: Mapping[str, np.ndarray],
    trim: Callable[..., dict[str, np.ndarray]],
    *,
    features: Callable[..., jax.Array] = mean_pool_features,
    batch_size: int = 32,
) -> np.ndarray:
    """Features of encoded examples under the base model.

    Args:
      apply: ``(params, **inputs) -> outputs``. Give the same function each time: programs are kept for it.
      params: of the base model.
      inputs: encoded examples; texts at full width, with an ``attention_mask`` ``[n, seq]``.
      trim: makes the model's inputs of a batch of them: for texts, cuts it to the smallest bucket.
      features: feature function.
      batch_size: rows at a time.

    Returns:
      ``[n, d]``, float32, in the order of the inputs.

    Raises:
      ValueError: if a feature is not finite, or there is no example.
    """
    forward = _forward(apply, features)
    # Rows of similar length together: most batches then fit a short bucket.
    mask = inputs.get("attention_mask")
    count = len(next(iter(inputs.values())))
    order = np.arange(count) if mask is None else np.argsort(mask.sum(axis=1), kind="stable")
    rows = []
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        full = np.concatenate([index, np.repeat(index[-1:], batch_size - len(index))])
        rows.append(np.asarray(forward(params, trim({name: value[full] for name, value in inputs.items()})))[: len(index)])
    if not rows or not all(np.isfinite(part).all() for part in rows):
        raise ValueError("the base model's features are not finite, or there is no example; check its weights and the data")
    out = np.empty((len(order), rows[0].shape[1]), np.float32)
    out[order] = np.concatenate(rows)
    return out


@functools.lru_cache(maxsize=16)
def _forward(apply: Callable[..., Any], features: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, inputs: features(apply(params, **inputs), inputs))
