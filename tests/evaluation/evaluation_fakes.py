"""A two-line model with every function of an Adapted, and tasks on random vectors."""

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.deltas import Delta, dense
from pefusion_jax.tasks.metrics import accuracy, cross_entropy
from pefusion_jax.tasks.task import Head, Task

WIDTH = 6


def features(outputs, inputs):
    """Masked mean, plus a constant: affine, not just linear."""
    mask = inputs["mask"][:, :, None]
    return jnp.sum(outputs["hidden"] * mask, axis=1) / jnp.sum(mask, axis=1) + 0.25


def cosine_features(outputs, inputs):
    hidden = features(outputs, inputs)
    return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)


def rectified_features(outputs, inputs):
    return jax.nn.relu(features(outputs, inputs))


def logits(params, features):
    """Cosines: not linear in the features. The last two classes are padding."""
    unit = features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-9)
    return unit @ params["classes"] + params["bias"][None, :]


def encode(examples):
    return {
        "x": np.stack([example["x"] for example in examples]),
        "mask": np.stack([example["mask"] for example in examples]),
    }


def task(name, seed, *, size=23, metric=accuracy, features=features, classes=("a", "b", "c")):
    rng = np.random.default_rng(seed)

    def examples(count):
        return [
            {
                "x": rng.normal(size=(4, WIDTH)).astype(np.float32),
                "mask": np.array([1, 1, 1, i % 2], np.float32),
                "label": int(rng.integers(3)) if classes else float(rng.normal()),
            }
            for i in range(count)
        ]

    head = Head(
        {
            "classes": jnp.asarray(rng.normal(size=(WIDTH, 5)), jnp.float32),
            "bias": jnp.asarray([0, 0, 0, -1e9, -1e9], jnp.float32),
        },
        features,
        logits,
    )
    return Task(name, classes, examples(3), examples(size), examples(size + 4), encode, head, metric, cross_entropy)


class Model:
    """``hidden = tanh(x @ kernel)`` expanded along ``tau``; counts traces, and the passes that really run."""

    def __init__(self, affine=True):
        self.traces, self.ran = [], []
        self.pushforward = self._pushforward if affine else None

    def _counted(self, kind, outputs):
        self.traces.append(kind)
        jax.debug.callback(lambda: self.ran.append(kind))
        return outputs

    def base(self, params, x, mask):
        return self._counted("base", {"hidden": jnp.tanh(x @ params["kernel"])})

    def _expand(self, params, tau, x):
        return jax.jvp(lambda kernel: {"hidden": jnp.tanh(x @ kernel)}, (params["kernel"],), (tau["kernel"],))

    def apply(self, params, tau, x, mask):
        primal, tangent = self._expand(params, tau, x)
        return self._counted("apply", jax.tree.map(jnp.add, primal, tangent))

    def apply_deltas(self, params, delta, x, mask):
        outputs = {"hidden": jnp.tanh(x @ (params["kernel"] + dense(delta.leaves["kernel"])))}
        return self._counted("delta", outputs)

    def _pushforward(self, params, stacked, x, mask):
        out = jax.vmap(lambda tau: self._expand(params, tau, x), out_axes=(None, 0))(stacked)
        return self._counted("pushforward", out)

    def ran_counts(self):
        jax.effects_barrier()
        return {kind: self.ran.count(kind) for kind in set(self.ran)}


def params():
    return {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)), jnp.float32) * 0.3}


def tau(seed):
    return {"kernel": jnp.asarray(np.random.default_rng(100 + seed).normal(size=(WIDTH, WIDTH)), jnp.float32)}


def numpy_logits(task, split, kernel, tangent=None):
    """The model, the features and the head once more, in NumPy and float64."""
    inputs = encode(getattr(task, split))
    x, mask = inputs["x"].astype(np.float64), inputs["mask"].astype(np.float64)
    kernel = np.asarray(kernel, np.float64)
    hidden = np.tanh(x @ kernel)
    if tangent is not None:
        hidden = hidden + (1 - hidden**2) * (x @ np.asarray(tangent, np.float64))
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None] + 0.25
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return unit @ np.asarray(task.head.params["classes"], np.float64) + np.asarray(task.head.params["bias"])


def labels(task, split):
    return np.array([example["label"] for example in getattr(task, split)])


def delta(seed):
    return Delta({"kernel": tau(seed)["kernel"]})
