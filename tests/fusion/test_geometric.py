"""Spherical interpolation and Model Stock against their definitions in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion


def tasks(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"t{t}": {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.asarray(rng.normal(size=3) + 3, jnp.float32)}
        for t in range(count)
    }


def flat(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in sorted(tree)])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(t):
    given = tasks(2)
    one, two = flat(given["t0"]), flat(given["t1"])
    angle = np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    want = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)
    got = pf.fuse(fusion.slerp(t), given)
    np.testing.assert_allclose(flat(got), want, atol=1e-6)
    traced = jax.jit(lambda t, given: pf.fuse(fusion.slerp(t), given))(jnp.float32(t), given)
    np.testing.assert_allclose(flat(traced), want, atol=1e-6)


def test_slerp_of_unit_vectors_stays_on_the_sphere():
    one, two = np.array([1.0, 0.0]), np.array([0.6, 0.8])
    for t in np.linspace(0, 1, 5):
        got = pf.fuse(fusion.slerp(float(t)), [{"w": jnp.asarray(one, jnp.float32)}, {"w": jnp.asarray(two, jnp.float32)}])
        assert abs(np.linalg.norm(got["w"]) - 1) < 1e-6
        assert abs(np.arctan2(got["w"][1], got["w"][0]) - t * np.arctan2(0.8, 0.6)) < 1e-6


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0])
def test_slerp_of_parallel_trees_is_linear(factor):
    tree = tasks(1)["t0"]
    other = jax.tree.map(lambda leaf: factor * leaf, tree)
    got = pf.fuse(fusion.slerp(0.25), [tree, other])
    np.testing.assert_allclose(flat(got), (0.75 + 0.25 * factor) * flat(tree), atol=1e-6)


@pytest.mark.parametrize("conform", ["mergekit", "fusion_bench"])
@pytest.mark.parametrize("length", [0.0, 1e-9])
def test_the_tools_see_a_zero_tensor_at_right_angles(conform, length):
    """Values of mergekit 0.1.5's and fusion_bench 0.2.33's slerp(t, zeros(1, 3), full((1, 3), 3.0)) for t = 0.5 and 0.25."""
    none, other = ({"w": jnp.full((1, 3), value, jnp.float32)} for value in (length / np.sqrt(3), 3.0))
    for t, wanted in ((0.5, 2.12132), (0.25, 1.14805)):
        got = pf.fuse(fusion.slerp(t, conform=conform), [none, other])
        np.testing.assert_allclose(got["w"], wanted, rtol=1e-5)
    swapped = pf.fuse(fusion.slerp(0.25, conform=conform), [other, none])
    np.testing.assert_allclose(swapped["w"], 3 * np.sin(0.75 * np.pi / 2), rtol=1e-5)
    both = pf.fuse(fusion.slerp(0.25, conform=conform), [none, none])
    assert np.abs(both["w"]).max() <= 2 * length
    traced = jax.grad(lambda t: pf.fuse(fusion.slerp(t, conform=conform), [none, other])["w"].sum())(jnp.float32(0.5))
    assert np.isfinite(traced)


def test_slerp_is_between_two():
    with pytest.raises(ValueError, match="between two trees, but got 3"):
        pf.fuse(fusion.slerp(), tasks(3))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(count):
    given = tasks(count)
    got = pf.fuse(fusion.model_stock(), given)
    for name in ("w", "b"):
        leaves = [np.asarray(tree[name], np.float64).ravel() for tree in given.values()]
        pairs = [
            leaves[i] @ leaves[j] / np.linalg.norm(leaves[i]) / np.linalg.norm(leaves[j])
            for i in range(count)
            for j in range(count)
            if i != j
        ]
        cosine = max(np.mean(pairs), 0)
        ratio = count * cosine / ((count - 1) * cosine + 1)
        np.testing.assert_allclose(np.ravel(got[name]), ratio * np.mean(leaves, axis=0), atol=2e-6)
    assert np.abs(got["b"]).max() > 0.1


def test_model_stock_at_its_limits():
    tree = tasks(1)["t0"]
    for count in (1, 2, 4):  # equal trees come back
        got = pf.fuse(fusion.model_stock(), [tree] * count)
        np.testing.assert_allclose(flat(got), flat(tree), rtol=1e-5)
    right_angles = [{"w": jnp.asarray(row, jnp.float32)} for row in np.eye(3)]
    np.testing.assert_allclose(pf.fuse(fusion.model_stock(), right_angles)["w"], 0, atol=1e-7)
    zero = jax.tree.map(jnp.zeros_like, tree)
    assert np.isfinite(flat(pf.fuse(fusion.model_stock(), [tree, zero]))).all()
