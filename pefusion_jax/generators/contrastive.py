r"""The two losses that arrange instances and prototypes on the sphere, and the retriever that maps instances there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax.methods.prompt import WORD_EMBEDDINGS


def instance_features(outputs: Any, inputs: Any) -> jax.Array:
    """Mean of the encoder's last hidden states, padding left out.

    Args:
      outputs: a model's, with ``encoder_last_hidden_state`` (encoder-decoders) or ``last_hidden_state``, ``[batch, seq, d]``.
      inputs: ``attention_mask`` ``[batch, seq]`` if there is padding.

    Returns:
      ``[batch, d]``, float32.

    Raises:
      ValueError: if the outputs have neither.
    """
    hidden = getattr(outputs, "encoder_last_hidden_state", None)
    hidden = getattr(outputs, "last_hidden_state", None) if hidden is None else hidden
    if hidden is None:
        what = "an array" if isinstance(outputs, jax.Array) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"the model gives {what}, without last_hidden_state or encoder_last_hidden_state, which tell of the instance; let "
            "it give one, or take a generator that does not look at the instance, such as task_embeddings(...)"
        )
    return _mean(hidden, inputs.get("attention_mask"))


def word_features(params: Mapping[str, Any], inputs: Any) -> jax.Array:
    """Mean of the frozen word embeddings of the tokens, padding left out: what a text is about, and in what words.

    Args:
      params: the base parameters by path, with one table of word embeddings.
      inputs: ``input_ids`` ``[batch, seq]``; ``attention_mask`` ``[batch, seq]`` if there is padding.

    Returns:
      ``[batch, d]``, float32.

    Raises:
      ValueError: if there are no token ids, or not one table.
    """
    tables = [path for path in params if re.fullmatch(f"({WORD_EMBEDDINGS})/embedding", path)]
    if inputs.get("input_ids") is None or len(tables) != 1:
        raise ValueError(
            "instances='words' looks the input_ids up in the table of word embeddings, and the inputs have "
            f"{', '.join(map(repr, inputs)) or 'no names'}, the base parameters {len(tables)} such tables; take "
            "instances='base'"
        )
    return _mean(jnp.take(jnp.asarray(params[tables[0]]), inputs["input_ids"], axis=0), inputs.get("attention_mask"))


def instance_loss(z: jax.Array, tasks: jax.Array, temperature: float = 0.1) -> jax.Array:
    r"""Pulls instances of one task together, away from those of the others.

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{j \in P(i)} \Big[ s_{ij} - \log \sum_{a \ne i} e^{s_{ia}} \Big],
       \qquad s_{ij} = \cos(z_i, z_j) / \tau, \quad P(i) = \{ j \ne i : y_j = y_i \}

    the mean over rows that have a :math:`P(i)`, and 0 where none has. With clusters of equal size :math:`|P| + 1`, each on one
    point, far apart: :math:`\log |P|`.

    Args:
      z: ``[batch, d]``.
      tasks: ``[batch]``, numbers.
      temperature: :math:`\tau`.

    Reference: P. Khosla et al., Supervised Contrastive Learning, 2020 (``L_out``), as in the code of H. Zhao, J. Fu, Z. He,
    Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning, 2023; their code divides by zero where we give 0.
    """
    unit = _unit(z)
    scores = (unit @ unit.T) / jnp.float32(temperature)
    other = ~jnp.eye(z.shape[0], dtype=bool)
    positive = other & (tasks[:, None] == tasks[None, :])
    count = jnp.sum(positive, axis=1).astype(jnp.float32)
    whole = jax.nn.logsumexp(jnp.where(other, scores, -jnp.inf), axis=1)
    each = whole - jnp.sum(jnp.where(positive, scores, 0.0), axis=1) / jnp.maximum(count, 1.0)
    has = count > 0
    return jnp.sum(jnp.where(has, each, 0.0)) / jnp.maximum(jnp.sum(has.astype(jnp.float32)), 1.0)


def prototype_loss(
    z: jax.Array, prototypes: jax.Array, tasks: jax.Array, temperature: float = 0.1, positive_in_denominator: bool = False
) -> jax.Array:
    r"""Pulls instances and the prototype of their task together, away from the other prototypes.

    .. math:: \frac1B \sum_i \Big[ -q_{i,y_i} + \log \sum_{t \ne y_i} e^{q_{it}} \Big], \qquad q_{it} = \cos(z_i, k_t) / \tau

    It has no lower bound at 0: with eight orthonormal prototypes and every instance on its own it is -8.05. With
    ``positive_in_denominator`` the sum is over all :math:`t`, the usual cross-entropy.

    Args:
      z: ``[batch, d]``.
      prototypes: :math:`k` ``[task, d]``.
      tasks: ``[batch]``, numbers.
      temperature: :math:`\tau`.
      positive_in_denominator: see above.

    Raises:
      ValueError: for a single prototype without ``positive_in_denominator``: the sum over the others would be empty.

    Reference: H. Zhao, J. Fu, Z. He, Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning, 2023, as in their
    code.
    """
    if prototypes.shape[0] < 2 and not positive_in_denominator:
        raise ValueError("the prototype loss needs two or more prototypes: with one there is none to be told from")
    scores = (_unit(z) @ _unit(prototypes).T) / jnp.float32(temperature)
    own = tasks[:, None] == jnp.arange(prototypes.shape[0])[None, :]
    others = scores if positive_in_denominator else jnp.where(own, -jnp.inf, scores)
    return jnp.mean(jax.nn.logsumexp(others, axis=1) - jnp.sum(jnp.where(own, scores, 0.0), axis=1))


def _mean(vectors: jax.Array, mask: Any) -> jax.Array:
    """The mean of ``[batch, seq, d]`` over the positions that the mask ``[batch, seq]`` keeps; 0 where it keeps none."""
    vectors = vectors.astype(jnp.float32)
    if mask is None:
        return jnp.mean(vectors, axis=1)
    kept = jnp.asarray(mask).astype(jnp.float32)
    return jnp.einsum("bsd,bs->bd", vectors, kept) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)[:, None]


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
