"""LiNeS around other methods: the scales, where the layers are found, pairs, scanned layers, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank, dense

LAYERS = 3


def tasks(count=3):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        f"t{t}": {"embeddings": {"w": leaf(4)}, "encoder": {"layer": {str(i): {"w": leaf(3, 2)} for i in range(LAYERS)}}}
        for t in range(count)
    }


def l1(tree):
    return sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))


def scaled(merged, alpha, beta):
    layers = {
        i: {"w": np.asarray(layer["w"]) * (alpha + beta * int(i) / (LAYERS - 1))}
        for i, layer in merged["encoder"]["layer"].items()
    }
    return {"embeddings": {"w": np.asarray(merged["embeddings"]["w"]) * alpha}, "encoder": {"layer": layers}}


def same(got, want, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=atol), got, want)


def test_the_formula_around_linear_and_other_methods():
    given = tasks()
    total = pf.fuse(fusion.task_arithmetic(1.0), given)
    same(pf.fuse(fusion.lines(fusion.task_arithmetic(1.0), beta=0.6), given), scaled(total, 1 / 3, 0.6))
    merged = pf.fuse(fusion.ties(0.5), given)
    alpha = l1(total) / l1(merged) / 3
    assert abs(alpha - 1 / 3) > 0.02
    same(pf.fuse(fusion.lines(fusion.ties(0.5), beta=0.6), given), scaled(merged, alpha, 0.6))
    same(pf.fuse(fusion.lines(fusion.ties(0.5), alpha=0.2, beta=0.6), given), scaled(merged, 0.2, 0.6))


def test_one_tree_at_the_neutral_setting_comes_back():
    given = tasks(1)
    got = pf.fuse(fusion.lines(fusion.average(), alpha=1.0, beta=0.0), given)
    jax.tree.map(np.testing.assert_array_equal, got, given["t0"])
    # Where alpha comes from the norms it is 1 for one tree, so that only the layers grow.
    same(pf.fuse(fusion.lines(fusion.average(), beta=0.5), given), scaled(given["t0"], 1.0, 0.5))


def deltas(dense_changes=False):
    rng = np.random.default_rng(1)
    made = {}
    for t, rank in enumerate((1, 2)):
        leaves = {
            f"layers/{i}/{name}/kernel": LowRank(
                jnp.asarray(rng.normal(size=(4, rank)), jnp.float32),
                jnp.asarray(rng.normal(size=(rank, 3)), jnp.float32),
                (4, 3),
            )
            for i in range(2)
            for name in ("q", "v")[: 2 - t]
        }
        made[f"t{t}"] = Delta(leaves)
    return {name: delta.dense() if dense_changes else delta for name, delta in made.items()}


def stacked(delta):
    """The same layers as one leaf a parameter, as a scan keeps them."""
    out = {}
    for name in ("q", "v"):
        layers = [delta.leaves.get(f"layers/{i}/{name}/kernel") for i in range(2)]
        if layers[0] is not None:
            a, b = (jnp.stack([getattr(layer, factor) for layer in layers]) for factor in "ab")
            out[f"layers/{name}/kernel"] = LowRank(a, b, (2, 4, 3))
    return Delta(out)


def test_pairs_stay_pairs_and_equal_the_dense_and_the_scanned_result():
    method = fusion.lines(fusion.task_arithmetic(0.5), beta=0.6)
    given = deltas()
    fuse = jax.jit(lambda given: pf.fuse(method, given))
    got, want = fuse(given), fuse(deltas(dense_changes=True))
    together = fuse({name: stacked(delta) for name, delta in given.items()})
    assert got.leaves["layers/1/q/kernel"].rank == 3 and got.leaves["layers/1/v/kernel"].rank == 1
    for path, change in got.leaves.items():
        np.testing.assert_allclose(dense(change), want.leaves[path], atol=2e-6)
        layer, name = path.split("/")[1:3]
        np.testing.assert_allclose(dense(change), dense(together.leaves[f"layers/{name}/kernel"])[int(layer)], atol=2e-6)
    assert isinstance(together.leaves["layers/q/kernel"], LowRank)
    # alpha is 1 / T / 0.5, the inner scale taken out; the deepest layer has alpha + beta.
    plain = sum(np.asarray(dense(delta.leaves["layers/1/q/kernel"])) for delta in given.values())
    np.testing.assert_allclose(dense(got.leaves["layers/1/q/kernel"]), 0.5 * (1 / 2 / 0.5 + 0.6) * plain, atol=2e-6)
    jitted = jax.jit(lambda beta, given: pf.fuse(fusion.lines(fusion.task_arithmetic(0.5), beta=beta), given))
    same(jitted(jnp.float32(0.6), given).dense().leaves, {path: dense(change) for path, change in got.leaves.items()})


def test_names_reach_the_inner_method():
    given = tasks(2)
    merged = pf.fuse(fusion.emr("t1"), given)
    same(pf.fuse(fusion.lines(fusion.emr("t1"), alpha=0.5, beta=1.0), given), scaled(merged, 0.5, 1.0))
    weighted = fusion.weighted_average({"t0": 1.0, "t1": 2.0})
    same(pf.fuse(fusion.lines(weighted, alpha=0.5, beta=1.0), given), scaled(pf.fuse(weighted, given), 0.5, 1.0))
    with pytest.raises(ValueError, match="no weight for the task 't1'"):
        pf.fuse(fusion.lines(fusion.weighted_average({"t0": 1.0})), given)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("transformer/h/2/attn/w", 1.0),
        ("visual/resblocks/1/w", 0.5),
        ("layers_1/w", 0.5),
        ("encoder/block/1/layer/0/w", 0.5),  # the outermost counts
        ("decoder/block/1/w", 1.0),  # a stack of its own, whose last layer this is
        ("player/1/w", 0.0),
        ("head/w", 0.0),
    ],
)
def test_where_layers_are_found(path, place):
    fixed = ["transformer/h/2/w", "visual/resblocks/2/w", "layers_2/w", "encoder/block/2/w", "decoder/block/0/w"]
    tree = {name: jnp.ones(1) for name in [*fixed, path]}
    got = fusion.lines(fusion.average(), alpha=2.0, beta=1.0).apply(jax.tree.map(lambda leaf: leaf[None], tree))
    assert float(got[path][0]) == 2.0 + place


def test_depth_and_other_names():
    tree = {"stage3/w": jnp.ones(1)}
    with pytest.raises(ValueError, match="no path is in a numbered layer.*'stage3/w'; pass layers"):
        pf.fuse(fusion.lines(fusion.average()), [tree])
    own = fusion.lines(fusion.average(), alpha=1.0, beta=1.0, layers=r"stage(\d+)/", depth=5)
    assert float(pf.fuse(own, [tree])["stage3/w"][0]) == 1.75
    with pytest.raises(ValueError, match="layer 3, but depth says that there are 2"):
        pf.fuse(fusion.lines(fusion.average(), layers=r"stage(\d+)/", depth=2), [tree])
    with pytest.raises(ValueError, match="must have a group that matches a number; in 'stage3/w': 'stage'"):
        pf.fuse(fusion.lines(fusion.average(), layers=r"([a-z]+)\d/"), [tree])
