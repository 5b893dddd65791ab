"""EMR and TALL masks against their definitions in plain numpy, and PCB against its authors' steps with sorted arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.fusion.balanced import order_statistic

SHAPES = {"a/kernel": (6, 5), "b": (70,)}


def tasks(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"t{t}": {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
        for t in range(count)
    }


def flat(given):
    return np.stack(
        [np.concatenate([np.asarray(tree[path], np.float64).ravel() for path in SHAPES]) for tree in given.values()]
    )


def vector(tree):
    return np.concatenate([np.asarray(tree[path], np.float64).ravel() for path in SHAPES])


def test_emr():
    given = tasks()
    values = flat(given)
    sign = np.where(values.sum(0) > 0, 1.0, -1.0)
    unified = sign * np.where(values * sign > 0, np.abs(values), 0).max(0)
    got = jax.jit(lambda given: {str(name): pf.fuse(fusion.emr(name), given) for name in (None, *given)})(given)
    np.testing.assert_allclose(vector(got["None"]), unified, atol=1e-6)
    for place, name in enumerate(given):
        masked = np.where(values[place] * unified > 0, unified, 0)
        want = masked * np.abs(values[place]).sum() / np.abs(masked).sum()
        np.testing.assert_allclose(vector(got[name]), want, atol=2e-6)


def test_tall_masks():
    given = tasks()
    values = flat(given)
    total = values.sum(0)
    for place, name in enumerate(given):
        want = np.where(np.abs(values[place]) >= 0.5 * np.abs(total - values[place]), total, 0)
        np.testing.assert_allclose(vector(pf.fuse(fusion.tall_masks(name, 0.5), given)), want, atol=1e-6)


@pytest.mark.parametrize("method", [fusion.emr(), fusion.emr("t0"), fusion.tall_masks("t0")])
def test_one_tree_comes_back(method):
    given = tasks(1)
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(method, given), given["t0"])
    zero = {"t0": jax.tree.map(jnp.zeros_like, given["t0"])}
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(method, zero), zero["t0"])


def test_tasks_go_by_name():
    given = tasks()
    got = pf.fuse(fusion.tall_masks("t2"), dict(reversed(given.items())))
    jax.tree.map(np.testing.assert_array_equal, got, pf.fuse(fusion.tall_masks("t2"), given))
    jax.tree.map(np.testing.assert_array_equal, got, pf.fuse(fusion.tall_masks("tree 2"), list(given.values())))
    with pytest.raises(ValueError, match="emr: no tree has the name 't9'; nearest: 't"):
        pf.fuse(fusion.emr("t9"), given)
    with pytest.raises(ValueError, match="must know the trees' names; apply it with fuse"):
        fusion.emr("t0").apply(pf.trees.stack(given))


def numpy_pcb(values, ratio, scales):
    def clamp(x, low, high):
        ordered = np.sort(x, axis=1)
        size = x.shape[1]
        return np.clip(x, ordered[:, int(size * low)][:, None], ordered[:, int(size * (1 - high) - 1)][:, None])

    def minmax(x):
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        return (x - low) / (high - low)

    clamped = clamp(np.abs(values), 0.01, 0.01)
    share = minmax(clamped)
    together = (np.sign(values) * share).sum(0)
    score = np.exp(len(values) * share**2) * np.tanh(values * together)
    say = minmax(clamp(score, 1 - ratio, 0))
    return (scales[:, None] * np.sign(values) * clamped * say).sum(0) / np.maximum(say.sum(0), 1e-12)


@pytest.mark.parametrize(("ratio", "scale"), [(0.05, 1.2), (0.5, [1.0, 0.5, 2.0])])
def test_pcb(ratio, scale):
    given = tasks()
    want = numpy_pcb(flat(given), ratio, np.broadcast_to(np.asarray(scale, float), 3))
    got = jax.jit(lambda given: pf.fuse(fusion.pcb(ratio, scale), given))(given)
    np.testing.assert_allclose(vector(got), want, atol=1e-5)
    assert 0 < (want != 0).mean() < 1


def test_pcb_of_a_hundred_trees():
    values = np.random.default_rng(0).normal(size=(100, 40)).astype(np.float32)
    got = pf.fuse(fusion.pcb(0.3, 1.0), [{"w": row} for row in values])["w"]
    np.testing.assert_allclose(got, numpy_pcb(values.astype(np.float64), 0.3, np.ones(100)), atol=1e-4)


def test_pcb_takes_traced_numbers_and_names():
    given = tasks()
    traced = jax.jit(lambda ratio, scale, given: pf.fuse(fusion.pcb(ratio, scale), given))(0.25, jnp.float32(1.5), given)
    named = jax.jit(lambda given: pf.fuse(fusion.pcb(0.25, {"t2": 1.5, "t0": 1.5, "t1": 1.5}), given))(given)
    np.testing.assert_allclose(vector(traced), vector(named), atol=1e-6)
    with pytest.raises(ValueError, match="ratio must be in"):
        fusion.pcb(0.0)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_order_statistic(dtype):
    rng = np.random.default_rng(3)
    leaves = [np.round(rng.normal(size=(2, *shape)) * 4).astype(dtype) for shape in ((3, 5), (8,))]
    ordered = np.sort(np.concatenate([leaf.astype(np.float64).reshape(2, -1) for leaf in leaves], axis=1), axis=1)
    find = jax.jit(order_statistic)
    for place in range(ordered.shape[1]):
        got = find([jnp.asarray(leaf) for leaf in leaves], jnp.int32(place))
        np.testing.assert_array_equal(np.asarray(got, np.float64), ordered[:, place])
