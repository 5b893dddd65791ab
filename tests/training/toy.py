"""A tiny model and task for the training tests: small enough that a run of many steps takes milliseconds."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pefusion_jax as pf
from pefusion_jax.tasks import Head, Task

FEATURES, CLASSES = 6, 3
# One object, so that all tests share its compiled programs.
SGD = optax.sgd(0.5)


class Net(nn.Module):
    """Two dense layers with dropout between them, active where a dropout key is given."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(8, name="up", dtype=x.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return nn.Dense(4, name="down", dtype=x.dtype)(x)


def features(outputs: jax.Array, inputs: Any) -> jax.Array:
    return outputs


def logits(head_params: Any, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) @ head_params["kernel"]


def loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(scores, -1) == labels))


def encode(examples: Any) -> dict[str, np.ndarray]:
    return {"x": np.stack([example["x"] for example in examples])}


def make_task(name: str = "toy", seed: int = 0, examples: int = 96) -> Task:
    rng = np.random.default_rng(seed)
    rule = rng.normal(size=(FEATURES, CLASSES))

    def split(count: int) -> list[dict[str, Any]]:
        x = rng.normal(size=(count, FEATURES)).astype(np.float32)
        return [{"x": row, "label": int(label)} for row, label in zip(x, np.argmax(x @ rule, -1), strict=True)]

    head = Head({"kernel": rng.normal(size=(4, CLASSES)).astype(np.float32)}, features, logits)
    return Task(name, ("a", "b", "c"), split(examples), split(24), split(24), encode, head, accuracy, loss)


def make_model(dropout: float = 0.0, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """(adapted model, base parameters)."""
    model = Net(dropout)
    params = model.init(jax.random.key(7), jnp.ones((1, FEATURES), dtype))["params"]
    return pf.adapt(model, pf.LoRA(rank=2, alpha=4, targets="up|down")), jax.tree.map(lambda x: x.astype(dtype), params)
