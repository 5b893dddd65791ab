"""Classifiers out of words: the class weights of a CLIP model, averaged over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def zero_shot_classifier(
    model: nn.Module,
    params: Mapping[str, Any],
    input_ids: Sequence[Any],
    attention_mask: Sequence[Any] | None = None,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    r"""Class weights from prompts, :math:`w_c \propto \sum_p t_{cp} / \lVert t_{cp} \rVert` with :math:`\lVert w_c \rVert = 1`.

    The cosines of image embeddings with the rows, times ``exp(params["logit_scale"])``, are the logits. As a head of a task::

        Head({"classes": weights, "scale": scale, "bias": zeros}, image_embeds_features, tasks.heads.cosine_logits)

    Args:
      model: a ``Clip``, or a ``ClipText`` with a projection.
      params: its parameters.
      input_ids: for each class the token ids of its prompts, ``[prompts, seq]``; an array ``[classes, prompts, seq]`` will do.
        The number of prompts may differ between classes, ``seq`` may not.
      attention_mask: the same, non-zero = keep; all by default.
      batch_size: how many prompts go through the model at a time.

    Returns:
      ``[classes, projection]``, float32.

    Raises:
      ValueError: if a class has no prompt, shapes differ, the model has no projection, or the weights are not finite.

    Reference: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 3.1.4.
    """
    arrays = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    by_class = {name: [np.asarray(rows) for rows in value] for name, value in arrays.items()}
    shapes = {name: [rows.shape for rows in value] for name, value in by_class.items()}
    given = shapes["input_ids"]
    if (
        not given
        or any(len(shape) != 2 or shape[0] == 0 or shape[1] != given[0][1] for shape in given)
        or any(other != given for other in shapes.values())
        or batch_size < 1
    ):
        raise ValueError(
            f"zero_shot_classifier needs [prompts, seq] for each class, with at least one prompt and one seq, and a mask of "
            f"the same shapes; the shapes are {shapes!r:.300}, batch_size={batch_size}"
        )
    flat = {name: np.concatenate(value) for name, value in by_class.items()}

    @jax.jit
    def embed(params: Any, batch: dict[str, jax.Array]) -> Any:
        outputs: Any = model.apply({"params": params}, batch)
        return outputs.text_embeds

    counts = [shape[0] for shape in given]
    rows = []
    for start in range(0, sum(counts), batch_size):
        part = {name: value[start : start + batch_size] for name, value in flat.items()}
        real = len(part["input_ids"])
        # The last batch is filled up with its last row: one compiled program for all.
        batch = {name: np.concatenate([value, value[-1:].repeat(batch_size - real, 0)]) for name, value in part.items()}
        embeds = embed(params, batch)
        if embeds is None:
            raise ValueError(f"this {type(model).__name__} has no text projection: load a model that has one")
        rows.append(np.asarray(embeds, np.float64)[:real])
    unit = np.concatenate(rows)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    weights = np.stack([part.mean(0) for part in np.split(unit, np.cumsum(counts)[:-1])])
    weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    if not np.isfinite(weights).all():
        raise ValueError("the class weights are not finite: check the model's weights and its dtype")
    return weights.astype(np.float32)


def image_embeds_features(outputs: Any, inputs: Mapping[str, Any]) -> jax.Array:
    """The image embeddings as features of a head: linear in the outputs, for heads that take the cosine themselves.

    Args:
      outputs: of a ``ClipVision`` with a projection, or of a ``Clip``; has ``image_embeds``, ``[batch, projection]``.
      inputs: not used; there so that all feature functions are called alike.

    Returns:
      ``[batch, projection]``, float32.
    """
    del inputs
    return outputs.image_embeds.astype(np.float32)
