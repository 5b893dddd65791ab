import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax.compression import compress, lora_of
from pefusion_jax.deltas import Delta, LowRank


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair(seed, shape, rank):
    return LowRank(normal(seed, shape[0], rank), normal(seed + 1, rank, shape[1]), shape)


def test_compression_is_the_best_approximation():
    stacked = LowRank(normal(0, 2, 6, 3), normal(1, 2, 3, 5), (2, 6, 5))
    given = Delta(
        {
            "pair": pair(2, (7, 6), 4),
            "thin": pair(4, (7, 6), 2),
            "dense": normal(6, 5, 8),
            "bias": normal(7, 5),
            "layers": stacked,
        }
    )
    got = jax.jit(lambda delta: compress(delta, 2))(given)
    lost = whole = 0.0
    for path, leaf in given.leaves.items():
        exact = leaf
        if isinstance(leaf, LowRank):
            exact = np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
        exact = np.asarray(exact, np.float64)
        want = exact
        if path != "bias":
            u, s, vt = np.linalg.svd(exact, full_matrices=False)
            want = u[..., :2] * s[..., None, :2] @ vt[..., :2, :]
            assert got.delta.leaves[path].rank == 2 and got.delta.leaves[path].shape == leaf.shape
        np.testing.assert_allclose(pf.deltas.dense(got.delta.leaves[path]), want, atol=1e-5)
        error = np.linalg.norm(exact - want) / np.linalg.norm(exact)
        np.testing.assert_allclose(got.residuals[path], error, rtol=1e-5, atol=1e-7)
        lost, whole = lost + np.sum((exact - want) ** 2), whole + np.sum(exact**2)
    np.testing.assert_allclose(got.residual, np.sqrt(lost / whole), rtol=1e-5)
    for path in ("thin", "bias"):  # nothing to be gained
        jax.tree.map(np.testing.assert_array_equal, got.delta.leaves[path], given.leaves[path])
        assert got.residuals[path] == 0
    with pytest.raises(ValueError, match="rank of at least 1"):
        compress(given, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1.0, 1e-23, 1e30])
@pytest.mark.parametrize("rank", [3, 8])
def test_the_residual_is_that_of_the_factors_as_stored(dtype, size, rank):
    """Of a pair of rank 8 that has twice the columns it needs, and of a dense matrix; rounding counts."""
    root = size**0.5
    a, b = (root * normal(0, 24, 8)).astype(dtype), (root * normal(1, 8, 20)).astype(dtype)
    twice = LowRank(jnp.concatenate([a, a], -1), jnp.concatenate([b, b], -2), (24, 20))
    given = Delta(
        {"pair": twice, "stacked": LowRank(twice.a[None], twice.b[None], (1, 24, 20)), "dense": (a @ b).astype(dtype)}
    )
    got = jax.jit(lambda delta: compress(delta, rank))(given)

    def exact(leaf):
        if isinstance(leaf, LowRank):
            return np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
        return np.asarray(leaf, np.float64)

    lost = whole = 0.0
    for path, leaf in given.leaves.items():
        off = np.linalg.norm(exact(leaf) - exact(got.delta.leaves[path]))
        np.testing.assert_allclose(got.residuals[path], off / np.linalg.norm(exact(leaf)), rtol=1e-3, atol=1e-6)
        lost, whole = lost + off**2, whole + np.linalg.norm(exact(leaf)) ** 2
    np.testing.assert_allclose(got.residual, np.sqrt(lost / whole), rtol=1e-3, atol=1e-6)
    assert (got.residual > 1e-4) == (rank == 3 or dtype != jnp.float32)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("rank", [2, 9])
def test_what_is_not_finite_shows(wrong, rank):
    good = pair(0, (6, 5), 4)
    bad = {
        "pair": LowRank(good.a.at[0, 0].set(wrong), good.b, good.shape),
        "dense": good.dense().at[0, 0].set(wrong),
        "bias": jnp.asarray([1.0, wrong], jnp.float32),
    }
    for name, leaf in bad.items():
        got = compress(Delta({"good": good, name: leaf}), rank)
        assert np.isnan(got.residuals[name]) and np.isnan(got.residual) and np.isfinite(got.residuals["good"]), name


def test_a_dense_change_of_scanned_layers_is_a_matrix_a_layer():
    stacked = normal(0, 3, 6, 5)
    got = compress(Delta({"layer/up/kernel": stacked, "layer/up/bias": normal(1, 3, 5), "conv/kernel": normal(2, 3, 6, 5)}), 2)
    pair = got.delta.leaves["layer/up/kernel"]
    assert pair.a.shape == (3, 6, 2) and pair.shape == (3, 6, 5)
    assert not any(isinstance(got.delta.leaves[path], LowRank) for path in ("layer/up/bias", "conv/kernel"))
    for layer, change in enumerate(stacked):
        alone = compress(Delta({"w": change}), 2).delta.leaves["w"]
        np.testing.assert_allclose(pair.dense()[layer], alone.dense(), atol=1e-5)


def test_nothing_compresses_to_nothing():
    zero = Delta({"w": LowRank(jnp.zeros((4, 3)), jnp.zeros((3, 5)), (4, 5)), "v": jnp.zeros((4, 5))})
    got = jax.jit(lambda delta: compress(delta, 1))(zero)
    assert got.residual == 0 and got.residuals == {"w": 0, "v": 0}
    np.testing.assert_array_equal(got.delta.leaves["w"].dense(), 0)


class Block(nn.Module):
    """One layer of each kind, among them an einsum whose weight has its inputs between its outputs."""

    @nn.compact
    def __call__(self, x, _=None):
        v = nn.Einsum((2, 6, 4), "btd,ndh->btnh", name="value", use_bias=False)(x)
        x = x + nn.DenseGeneral(6, axis=(-2, -1), name="out")(v)
        return x + nn.Dense(6, name="dense")(nn.Conv(6, kernel_size=(3,), name="conv")(x)), None


class Model(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(9, 6, name="embed")(ids)
        if not self.scanned:
            return Block(name="layer")(x)[0]
        return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(x, None)[0]


def changes(scanned, rank_of):
    """A delta of every kind of layer, and the model with its parameters."""
    model = Model(scanned)
    ids = jnp.zeros((1, 3), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)

    def drawn(shapes):
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3, jnp.float32), shapes)

    params = drawn(shapes)
    lora = pf.adapt(model, pf.LoRA(rank=3, targets=r".*(value|out|conv|dense|embed)"))
    tree = drawn(jax.eval_shape(lambda: lora.init(jax.random.key(1), params, ids)))
    delta = lora.deltas(params, tree)
    cut = {
        path: LowRank(leaf.a[..., : rank_of(path)], leaf.b[..., : rank_of(path), :], leaf.shape, leaf.axes)
        for path, leaf in delta.leaves.items()
    }
    return model, params, ids, Delta(cut)


@pytest.mark.parametrize("scanned", [False, True])
def test_pairs_become_a_lora(scanned):
    model, params, ids, delta = changes(scanned, lambda path: 1 if "value" in path else 2 if "out" in path else 3)
    method, tree = lora_of(delta)
    assert method.rank == 3 and sorted(method.rank_pattern.values()) == [1, 2]
    adapted = pf.adapt(model, method)
    again = adapted.deltas(params, tree)
    assert set(again.leaves) == set(delta.leaves)
    for path, leaf in delta.leaves.items():
        assert again.leaves[path].axes == leaf.axes or leaf.axes is None
        np.testing.assert_array_equal(again.leaves[path].dense(), leaf.dense(), err_msg=path)
    # Same tree as the method makes itself, and the same outputs as the folded weights.
    made = jax.eval_shape(lambda: adapted.init(jax.random.key(0), params, ids))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, tree)
    tokens = jnp.asarray([[1, 4, 7]])
    one = jax.jit(adapted.apply)(params, tree, tokens)
    two = jax.jit(model.apply)({"params": pf.fold(params, delta)}, tokens)
    np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_fused_change_becomes_a_lora_of_the_rank_of_choice():
    model, params, _, delta = changes(False, lambda path: 3)
    small = jax.jit(lambda delta: compress(pf.fuse(pf.fusion.concat(), {"a": delta, "b": delta}), 3))(delta)
    assert float(small.residual) < 1e-6  # both are the same change
    method, tree = lora_of(small.delta)
    assert method.rank == 3 and not method.rank_pattern
    got = pf.adapt(model, method).deltas(params, tree)
    for path, leaf in delta.leaves.items():
        np.testing.assert_allclose(got.leaves[path].dense(), 2 * leaf.dense(), atol=1e-5)


def test_a_pair_of_rank_0_and_names_with_dots():
    empty = LowRank(jnp.zeros((4, 0)), jnp.zeros((0, 5)), (4, 5))
    method, tree = lora_of(Delta({"a.b/kernel": empty, "kernel": pair(0, (4, 5), 1)}))
    assert method.targets == r"a\.b|" and tree["a.b"]["lora_a"].shape == (4, 1) and tree["lora_b"].shape == (1, 5)


def test_what_no_lora_stores():
    ambiguous = LowRank(jnp.zeros((3, 2)), jnp.zeros((2, 5)), (3, 1, 5))
    for delta, message in (
        ({}, "is empty"),
        ({"x/kernel": jnp.zeros((4, 5))}, r"'x/kernel' is a dense array of shape \(4, 5\).*compress"),
        ({"x/scale": pair(0, (4, 5), 1)}, "'x/scale' is not the kernel or embedding"),
        ({"x/kernel": ambiguous}, r"\(3, 1, 5\) of 'x/kernel' cannot be told apart"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_of(Delta(delta))
