"""Adapts, linearizes and fuses a Linen model that the library has never seen.

    python experiments/foreign_model.py            # about 20 seconds on two cores

The model is defined below, with ``nn.scan`` over its layers and nothing in it that knows of adapters. Two tasks on the
hand-written digits that scikit-learn carries (is the digit even? is it above four?) train one adapter each, as LoRA and as
linearized LoRA; the script fuses them and prints the accuracy of every model on both tasks.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import pefusion_jax as pf
from pefusion_jax import trees


class Block(nn.Module):
    """A residual feed-forward block."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.gelu(nn.Dense(256, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h), None


class Net(nn.Module):
    """Somebody else's classifier: ten digits from 64 pixels."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = nn.Dense(128, name="stem")(pixels)
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)(name="layers")(x, None)
        return nn.Dense(10, name="head")(x)


def fit(apply, tree, pixels, labels, steps, learning_rate):
    """Trains ``tree`` so that ``apply(tree, pixels)`` predicts ``labels``."""
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(carry, batch):
        tree, state = carry

        def loss(tree):
            return optax.softmax_cross_entropy_with_integer_labels(apply(tree, pixels[batch]), labels[batch]).mean()

        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return (optax.apply_updates(tree, updates), state), None

    order = jnp.asarray(np.random.default_rng(0).integers(0, len(pixels), (steps, 64)))
    (tree, _), _ = jax.lax.scan(step, (tree, optimizer.init(tree)), order)
    return tree


def main() -> None:
    """Trains, fuses, prints."""
    digits = load_digits()
    pixels, labels = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target, jnp.int32)
    train, test = slice(0, 1200), slice(1200, None)

    model = Net()
    params = model.init(jax.random.key(0), pixels[:1])["params"]
    params = fit(lambda p, x: model.apply({"params": p}, x), params, pixels[train], labels[train], 300, 1e-3)

    # The digits' logits become two-class logits: a fixed head for each task, the same for every model.
    tasks = {"even": (labels + 1) % 2, "above four": (labels > 4).astype(jnp.int32)}
    permuted = jnp.asarray([3, 8, 1, 6, 0, 9, 4, 2, 7, 5])  # a mapping that the pretrained model cannot know

    def two_class(logits: jax.Array) -> jax.Array:
        logits = logits[:, permuted]
        return jnp.stack([jax.nn.logsumexp(logits[:, :5], -1), jax.nn.logsumexp(logits[:, 5:], -1)], -1)

    lora = pf.adapt(model, pf.LoRA(rank=8, alpha=16, targets=r"layers/(up|down)"))
    phi0 = lora.init(jax.random.key(1), params, pixels[:1])
    linear = pf.linearize(lora, phi0)
    print(f"base parameters {trees.size(params):,}; adapter {trees.size(phi0):,}")

    def accuracy(apply, tree):
        outputs = jax.jit(lambda tree, x: two_class(apply(tree, x)))(tree, pixels[test])
        return {name: float(jnp.mean(jnp.argmax(outputs, -1) == goal[test])) for name, goal in tasks.items()}

    def show(name: str, scores: dict[str, float]) -> None:
        print(f"{name:42s}" + "".join(f"  {task} {score:.3f}" for task, score in scores.items()))

    show("zero-shot", accuracy(lambda _, x: lora.base(params, x), None))
    for kind, adapted, start in (("LoRA", lora, phi0), ("linearized LoRA", linear, linear.init(None, params))):
        found = {}
        for name, goal in tasks.items():
            found[name] = fit(
                lambda tree, x, adapted=adapted: two_class(adapted.apply(params, tree, x)),
                start, pixels[train], goal[train], 300, 3e-3,
            )  # fmt: skip
            show(f"{kind}, trained on '{name}'", accuracy(lambda tree, x, ad=adapted: ad.apply(params, tree, x), found[name]))
        fused = pf.fuse(pf.fusion.task_arithmetic(scale=0.7), found, adapted=adapted, params=params)
        show(f"{kind}, fused in weight space", accuracy(lambda d, x, ad=adapted: ad.apply_deltas(params, d, x), fused))


if __name__ == "__main__":
    main()
