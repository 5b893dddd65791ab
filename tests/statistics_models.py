"""A tiny encoder in both layouts, and its moments written out plainly, for the tests of statistics and what uses them."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pefusion_jax as pf
from pefusion_jax.tasks import Head, Task

VOCAB, WIDTH, HIDDEN, LAYERS, CLASSES = 7, 4, 5, 2, 3
IDS = np.array([[1, 2, 3], [4, 2, 0], [6, 6, 6]], np.int32)
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], np.int32)
# The last row only fills up the batch.
WEIGHTS = np.array([1, 1, 0], np.float32)
BATCH = {"inputs": {"ids": IDS, "attention_mask": MASK}, "labels": np.zeros(3, np.int32), "weights": WEIGHTS}
TARGETS = r"embed|layer/(\d/)?(up|down)"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        return x + nn.Dense(WIDTH, name="down")(jnp.tanh(nn.Dense(HIDDEN, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x, _ = Block(name=str(i))(x)
        return x


class Model(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        if self.scan:
            scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return scanned(name="layer")(x, None)[0]
        return Stack(name="layer")(x)


def features(outputs: jax.Array, inputs: Any) -> jax.Array:
    mask = jnp.asarray(inputs["attention_mask"], jnp.float32)
    return jnp.sum(outputs * mask[..., None], axis=1)


def logits(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"]


HEAD = Head({"kernel": jax.random.normal(jax.random.key(9), (WIDTH, CLASSES))}, features, logits)


@functools.cache
def build(scan: bool = False) -> tuple[pf.Adapted, Any, Any, Any]:
    """(adapted, params, start, tuned adapters); the two layouts hold the same numbers."""
    params = jax.jit(Model().init)(jax.random.key(1), IDS)["params"]
    loop = pf.adapt(Model(), pf.LoRA(rank=2, alpha=4, targets=TARGETS))
    start = loop.init(jax.random.key(0), params, IDS)
    rng = np.random.default_rng(0)
    point = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) * np.float32(0.3), start)
    if scan:
        params, start, point = (pf.backbones.layers.stack_layers(tree) for tree in (params, start, point))
    return pf.adapt(Model(scan), pf.LoRA(rank=2, alpha=4, targets=TARGETS)), params, start, point


def reference(weights: Any, tangent: Any = None) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Kernel path -> (G, S, F) of BATCH, by a forward pass and gradients that use nothing of the library, example by example.

    ``tangent``: change of the prediction of an affine model, from the outputs of its expansion to its own, ``[batch, seq, d]``.
    """
    w = {path: jnp.asarray(leaf) for path, leaf in pf.trees.flat(weights).items()}
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), place) for place in range(len(IDS))])

    def forward(w: Any, ids: Any, eps: Any) -> Any:
        seen, x = {"embed/embedding": jax.nn.one_hot(ids, VOCAB)}, w["embed/embedding"][ids] + eps["embed/embedding"]
        for i in range(LAYERS):
            up, down = f"layer/{i}/up", f"layer/{i}/down"
            seen[up + "/kernel"] = x
            h = jnp.tanh(x @ w[up + "/kernel"] + w[up + "/bias"][None] + eps[up + "/kernel"])
            seen[down + "/kernel"] = h
            x = x + h @ w[down + "/kernel"] + w[down + "/bias"][None] + eps[down + "/kernel"]
        return x, seen

    widths = {"embed/embedding": WIDTH}
    widths |= {f"layer/{i}/{n}/kernel": m for i in range(LAYERS) for n, m in (("up", HIDDEN), ("down", WIDTH))}
    zero = {path: jnp.zeros((IDS.shape[1], m)) for path, m in widths.items()}
    moved = jnp.zeros((*IDS.shape, WIDTH)) if tangent is None else tangent

    def z_of(outputs: Any, mask: Any) -> Any:
        return jnp.sum(outputs * mask[:, None], axis=0) @ HEAD.params["kernel"]

    def one(ids: Any, mask: Any, shift: Any, label: Any) -> Any:
        outputs, seen = forward(w, ids, zero)
        tuned = outputs + shift
        c = jax.grad(lambda out: jax.nn.log_softmax(z_of(out, mask))[label])(tuned)
        g = jax.grad(lambda eps: jnp.sum(forward(w, ids, eps)[0] * c))(zero)
        dw = jax.grad(lambda w: jnp.sum(forward(w, ids, zero)[0] * c))(w)
        return seen, g, dw, z_of(tuned, mask)

    mask = jnp.asarray(MASK, jnp.float32)
    run = jax.jit(jax.vmap(one))
    z = run(IDS, mask, moved, jnp.zeros(3, jnp.int32))[3]
    labels = jax.vmap(jax.random.categorical)(keys, z)
    seen, g, dw, _ = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run(IDS, mask, moved, labels))
    kept = MASK * WEIGHTS[:, None]
    out = {}
    for path in widths:
        gram = np.einsum("bti,btj,bt->ij", seen[path], seen[path], kept) / kept.sum()
        outer = np.einsum("bti,btj,bt->ij", g[path], g[path], kept) / WEIGHTS.sum()
        out[path] = (gram, outer, np.einsum("bij,b->ij", dw[path] ** 2, WEIGHTS) / WEIGHTS.sum())
    return out


def loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(scores, -1) == labels))


def encode(examples: Any) -> dict[str, np.ndarray]:
    ids = np.stack([example["ids"] for example in examples])
    return {"ids": ids, "attention_mask": np.ones_like(ids)}


def make_task(name: str, seed: int, tokens: tuple[int, int] = (0, VOCAB)) -> Task:
    """The label is the first token's place; each task has tokens of its own."""
    rng = np.random.default_rng(seed)

    def split(count: int) -> list[dict[str, Any]]:
        ids = rng.integers(*tokens, size=(count, 3)).astype(np.int32)
        return [{"ids": row, "label": int(row[0] + seed) % CLASSES} for row in ids]

    return Task(name, tuple("abc"), split(32), split(8), split(8), encode, HEAD, accuracy, loss)
