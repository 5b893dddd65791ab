"""DARE, Breadcrumbs, MagMax and consensus against their definitions in plain numpy, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank

SHAPES = {"a/kernel": (6, 5), "a/bias": (5,), "b/kernel": (4, 3, 2)}


def tasks(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"t{t}": {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
        for t in range(count)
    }


def stacked(given, path):
    return np.stack([np.asarray(tree[path], np.float64) for tree in given.values()])


def rows(leaf):
    """Rows of PyTorch's weight: all inputs of one output, which are our kernel's columns; a vector is one row."""
    return leaf.reshape(-1, leaf.shape[-1]).T if leaf.ndim > 1 else leaf[None]


def back(laid, shape):
    return laid.T.reshape(shape) if len(shape) > 1 else laid[0]


def without_extremes(values, density, outliers):
    order = np.argsort(-np.abs(values), kind="stable")
    cut = int(outliers * values.size)
    keep = order[cut : cut + max(1, int(density * values.size))]
    masked = np.zeros_like(values)
    masked[keep] = values[keep]
    return masked


@pytest.mark.parametrize(("density", "outliers"), [(0.2, 0.1), (0.5, 0.0), (0.5, 0.3), (1.0, 0.0)])
def test_breadcrumbs(density, outliers):
    given = tasks()
    got = pf.fuse(fusion.breadcrumbs(density, outliers, 0.4), given)
    whole = pf.fuse(fusion.breadcrumbs(density, outliers, 0.4, within="tensor"), given)
    for path in SHAPES:
        leaves = stacked(given, path)
        by_row = sum(
            back(np.stack([without_extremes(row, density, outliers) for row in rows(leaf)]), leaf.shape) for leaf in leaves
        )
        np.testing.assert_allclose(got[path], 0.4 * by_row, atol=1e-6, err_msg=path)
        flat = sum(without_extremes(leaf.ravel(), density, outliers).reshape(leaf.shape) for leaf in leaves)
        np.testing.assert_allclose(whole[path], 0.4 * flat, atol=1e-6, err_msg=path)


def test_rows_of_an_embedding_are_its_rows():
    table = {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)}
    got = pf.fuse(fusion.breadcrumbs(0.2, 0.0, 1.0), [table])["embedding"]
    np.testing.assert_array_equal((np.asarray(got) != 0).sum(1), np.ones(4))
    got = pf.fuse(fusion.breadcrumbs(0.25, 0.0, 1.0), [{"kernel": table["embedding"]}])["kernel"]
    np.testing.assert_array_equal((np.asarray(got) != 0).sum(0), np.ones(5))


def test_della_drops_by_rank_and_keeps_the_expectation():
    # One row of five ascending magnitudes, drawn 4,000 times.
    draws, sizes = 4000, np.array([1.0, -2.0, 3.0, -4.0, 5.0], np.float32)
    tree = {"kernel": jnp.asarray(np.repeat(sizes[:, None], draws, axis=1))}
    pruned = np.asarray(pf.fuse(fusion.della(0.5, 0.4, 1.0, then="task_arithmetic", key=1), [tree])["kernel"])
    chances = 0.5 + 0.4 * (np.arange(5) / 4 - 0.5)
    assert np.abs((pruned != 0).mean(1) - chances).max() < 5 * 0.5 / np.sqrt(draws)
    np.testing.assert_allclose(pruned.max(1)[2], 3 / chances[2], rtol=1e-6)
    assert np.abs(pruned.mean(1) / sizes - 1).max() < 5 / np.sqrt(draws * chances.min())
    run = jax.jit(lambda key, given: pf.fuse(fusion.della(key=key), given)["a/kernel"])
    one, other = (np.asarray(run(jax.random.key(seed), tasks())) for seed in (0, 1))
    assert np.any(one != other)


@pytest.mark.parametrize("conform", ["paper", "peft"])
def test_magnitude_prune(conform):
    given = tasks()
    weights = {"t0": 1.0, "t1": -0.5, "t2": 2.0}
    got = pf.fuse(fusion.magnitude_prune(0.15, 0.5, weights=weights, conform=conform), given)
    for path, shape in SHAPES.items():
        kept = int(0.15 * np.prod(shape)) if conform == "peft" else max(1, int(0.15 * np.prod(shape)))
        want = 0.0
        for weight, leaf in zip(weights.values(), stacked(given, path), strict=True):
            masked = without_extremes(leaf.ravel(), (kept + 0.5) / leaf.size, 0.0) * (kept > 0)
            want = want + 0.5 * weight * masked.reshape(shape)
        np.testing.assert_allclose(got[path], want, atol=1e-6)
    assert np.any(got["a/bias"]) == (conform == "paper")  # 0.15 of five entries is less than one


def test_magmax():
    given = tasks()
    got = pf.fuse(fusion.magmax(0.5), given)
    for path in SHAPES:
        leaves = stacked(given, path)
        want = 0.5 * np.take_along_axis(leaves, np.abs(leaves).argmax(0)[None], 0)[0]
        np.testing.assert_allclose(got[path], want, atol=1e-7)


def test_magmax_of_equal_magnitudes():
    pair = [{"x": jnp.array([1.0, -2.0])}, {"x": jnp.array([-1.0, 2.0])}]
    np.testing.assert_array_equal(pf.fuse(fusion.magmax(1.0), pair)["x"], [1, -2])
    np.testing.assert_array_equal(pf.fuse(fusion.magmax(1.0, conform="fusion_bench"), pair)["x"], [-1, 2])


@pytest.mark.parametrize("agree", [0, 1, 2, 3])
def test_consensus(agree):
    given = tasks()
    got = pf.fuse(fusion.consensus(0.4, 0.3, agree=agree), given)
    for path in SHAPES:
        leaves = stacked(given, path)
        total = leaves.sum(0)
        votes = (np.abs(leaves) >= 0.4 * np.abs(total - leaves)).sum(0)
        np.testing.assert_allclose(got[path], np.where(votes >= agree, 0.3 * total, 0), atol=1e-6)
    if agree == 0:
        linear = pf.fuse(fusion.task_arithmetic(0.3), given)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, linear)


@pytest.mark.parametrize("then", ["average", "task_arithmetic", "ties"])
def test_dare_is_its_masks_and_then_the_method(then):
    given = tasks()
    masked = fusion.drop(0.5, 7)(pf.trees.stack(given))
    share = np.mean([np.mean(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(masked)])
    assert 0.2 < share < 0.8
    trees = {name: jax.tree.map(lambda leaf, t=t: leaf[t], masked) for t, name in enumerate(given)}
    method = {
        "average": fusion.average(),
        "task_arithmetic": fusion.task_arithmetic(1.0),
        "ties": fusion.ties(density=1.0),
    }[then]
    want = pf.fuse(method, trees)
    got = pf.fuse(fusion.dare(0.5, then=then, key=7), given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
    whole = pf.fuse(fusion.dare(1.0, then=then), given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), whole, pf.fuse(method, given))


def test_dropping_keeps_the_expectation_and_the_share():
    leaf = jnp.ones((2, 400, 500))
    for density in (0.1, 0.5, 0.9):
        dropped = np.asarray(fusion.drop(density, 3)({"w": leaf})["w"])
        # 200,000 draws a task: five standard deviations.
        bound = 5 * np.sqrt(density * (1 - density) / 200_000)
        assert np.abs((dropped != 0).mean((1, 2)) - density).max() < bound
        assert np.abs(dropped.mean((1, 2)) - 1).max() < bound / density
        np.testing.assert_allclose(dropped[dropped != 0], 1 / density, rtol=1e-6)
        assert 0 < (dropped[0] != dropped[1]).mean() < 1  # tasks are drawn apart


def test_what_is_drawn_depends_on_the_path_and_the_key_alone():
    given = tasks()
    got = pf.fuse(fusion.dare(0.5, key=7), given)
    alone = pf.fuse(fusion.dare(0.5, key=7), {name: {"a/bias": tree["a/bias"]} for name, tree in given.items()})
    np.testing.assert_array_equal(alone["a/bias"], got["a/bias"])
    shuffled = pf.fuse(fusion.dare(0.5, key=jax.random.key(7)), dict(reversed(given.items())))
    jax.tree.map(np.testing.assert_array_equal, shuffled, got)
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(fusion.dare(0.5, key=np.int64(7)), given), got)
    other = pf.fuse(fusion.dare(0.5, key=8), given)
    assert any(np.any(other[path] != got[path]) for path in SHAPES)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: fusion.dare(0.5, x),
        lambda x: fusion.dare(x, 1.0, then="ties"),
        lambda x: fusion.breadcrumbs(x, 0.1, 1.0),
        lambda x: fusion.breadcrumbs(0.5, 0.1, x, conform="mergekit", weights=[1.0, 2.0, 3.0]),
        lambda x: fusion.della(x, 0.4),
        lambda x: fusion.magmax(x),
        lambda x: fusion.consensus(x, 0.3),
    ],
)
def test_one_program_for_every_coefficient(make):
    given, traces = tasks(), []

    @jax.jit
    def run(x, given):
        traces.append(1)
        return pf.fuse(make(x), given)

    for x in (0.5, 0.75):  # exact in float32, so that a count of entries cannot be off by one
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run(jnp.float32(x), given), pf.fuse(make(x), given)
        )
    assert len(traces) == 1


NEUTRAL = [fusion.della(1.0, 0.0, 1.0), fusion.magnitude_prune(1.0), fusion.dare(1.0, conform="mergekit")]


@pytest.mark.parametrize(
    "method",
    [fusion.dare(1.0), fusion.breadcrumbs(1.0, 0.0, 1.0), fusion.magmax(1.0), fusion.consensus(scale=1.0, agree=1), *NEUTRAL],
)
def test_one_tree_at_the_neutral_setting_comes_back(method):
    given = tasks(1)
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(method, given), given["t0"])


@pytest.mark.parametrize("method", [fusion.dare(0.5), fusion.breadcrumbs(), fusion.magmax(), fusion.consensus()])
def test_low_rank_changes_are_taken_as_what_they_are(method):
    rng = np.random.default_rng(1)

    def pair(rank):
        return LowRank(
            jnp.asarray(rng.normal(size=(6, rank)), jnp.float32), jnp.asarray(rng.normal(size=(rank, 5)), jnp.float32), (6, 5)
        )

    given = {"x": Delta({"w": pair(2)}), "y": Delta({"w": pair(3)})}
    dense = {name: {"w": delta.leaves["w"].dense()} for name, delta in given.items()}
    np.testing.assert_allclose(pf.fuse(method, given).leaves["w"], pf.fuse(method, dense)["w"], atol=1e-6)


def test_wrong_settings():
    for make, message in (
        (lambda: fusion.dare(0.0), "density must be in"),
        (lambda: fusion.dare(1.5), "density must be in"),
        (lambda: fusion.dare(then="slerp"), "'average', 'task_arithmetic' or 'ties'"),
        (lambda: fusion.breadcrumbs(0.95, 0.1), "more than all entries"),
        (lambda: fusion.breadcrumbs(0.2, 1.0), "add up to more|must be in"),
        (lambda: fusion.cut(-0.1), "fraction of entries to cut"),
        (lambda: fusion.della(0.95, 0.14), "probabilities from 0.88 to 1.02"),
        (lambda: fusion.della(then="average"), "della combines by 'task_arithmetic' or 'ties'"),
        (lambda: fusion.breadcrumbs(within="column"), "'row' or a 'tensor'"),
        (lambda: fusion.breadcrumbs(within="row", conform="mergekit"), "within only with conform='paper'"),
        (lambda: fusion.dare(then="average", conform="peft"), "peft has no average after DARE"),
        (lambda: fusion.dare(normalize=True), "normalize only with conform='mergekit'"),
        (lambda: pf.fuse(fusion.dare(weights={"x": 1.0}, conform="peft"), tasks()), "no tree for the task 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
