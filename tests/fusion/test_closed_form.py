"""Closed forms against dense float64 algebra and against the definition of what they minimise."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statistics_models as models

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank, dense
from pefusion_jax.moments import Moments, Statistics, compress_statistics, dense_moment, diagonal_moment
from pefusion_jax.statistics import statistics
from pefusion_jax.trees import nest

NAMES = ("a", "b", "c")
IN, OUT = 5, 4
LOW, FULL, BIAS, TABLE = "x/kernel", "y/kernel", "y/bias", "e/embedding"


def moment(rng, n, decay=2.0):
    """Badly conditioned, as those of real layers are: one direction holds most of the trace."""
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    x = basis * np.logspace(0, -decay, n)
    return jnp.asarray(x @ x.T * rng.uniform(0.5, 2), jnp.float32)


@functools.cache
def problem():
    """(deltas, statistics) of three tasks: a pair of different ranks, a dense matrix, a bias, a table, and a norm's scale."""
    deltas, found = {}, {}
    for t, name in enumerate(NAMES):
        rng = np.random.default_rng(t)

        def draw(*shape, rng=rng):
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        low = LowRank(draw(IN, t + 1), draw(t + 1, OUT), (IN, 2, 2))
        leaves = {LOW: low, FULL: draw(IN, OUT), BIAS: draw(OUT), TABLE: draw(6, OUT), "norm/scale": draw(3)}
        s = moment(rng, OUT)
        deltas[name] = Delta(leaves)
        found[name] = Statistics(
            {
                LOW: Moments(moment(rng, IN), moment(rng, OUT)),
                FULL: Moments(moment(rng, IN), s),
                BIAS: Moments(jnp.ones((1, 1)), s),
                TABLE: Moments(diagonal_moment(jnp.asarray(rng.uniform(0.1, 1, 6), jnp.float32)), moment(rng, OUT)),
            },
            {path: jnp.square(draw(*leaf.shape)) for path, leaf in leaves.items()},
        )
    return deltas, found


SHAPES = {LOW: (IN, OUT), FULL: (IN, OUT), BIAS: (1, OUT), TABLE: (6, OUT)}


def matrix(change, path):
    return np.asarray(dense(change), np.float64).reshape(SHAPES[path])


def hat(value, off_diagonal, damping):
    m = np.asarray(dense_moment(value), np.float64)
    m = off_diagonal * m + (1 - off_diagonal) * np.diag(np.diag(m))
    return m + damping * np.trace(m) / len(m) * np.eye(len(m))


def system(path, stats, off_diagonal, damping, normalize):
    out = []
    for name in NAMES:
        g, s = stats[name].moments[path].inputs, stats[name].moments[path].outputs
        traces = np.trace(dense_moment(g)).astype(np.float64) * np.trace(dense_moment(s)) if normalize else 1.0
        out.append((hat(g, off_diagonal, damping) / traces, hat(s, off_diagonal, damping)))
    return out


def exact_gram(path, deltas, stats, off_diagonal=0.95, damping=1e-3, normalize=True):
    terms = system(path, stats, off_diagonal, damping, normalize)
    left = sum(np.kron(g, s) for g, s in terms)
    right = sum(
        (g @ matrix(deltas[name].leaves[path], path) @ s).reshape(-1) for (g, s), name in zip(terms, NAMES, strict=True)
    )
    return np.linalg.solve(left, right).reshape(SHAPES[path]), terms


def cost(x, path, deltas, terms):
    total = 0.0
    for (g, s), name in zip(terms, NAMES, strict=True):
        d = x - matrix(deltas[name].leaves[path], path)
        total += np.trace(d.T @ g @ d @ s)
    return total


@pytest.mark.parametrize("normalize, off_diagonal, damping", [(True, 0.95, 1e-3), (False, 0.9, 1e-3)])
def test_gram_solves_the_kronecker_system(normalize, off_diagonal, damping):
    deltas, stats = problem()
    settings = dict(normalize=normalize, off_diagonal=off_diagonal, damping=damping)
    merged = pf.fuse(fusion.gram(stats, tolerance=1e-7, iterations=300, **settings), deltas)
    for path in SHAPES:
        expected, _ = exact_gram(path, deltas, stats, **settings)
        error = np.linalg.norm(matrix(merged.leaves[path], path) - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, (path, error)
        assert merged.leaves[path].shape == deltas["a"].leaves[path].shape
    np.testing.assert_allclose(merged.leaves["norm/scale"], sum(deltas[n].leaves["norm/scale"] for n in NAMES) / 3, rtol=1e-6)
    residual = fusion.gram_residual(stats, deltas, merged, **settings)
    assert set(residual) == set(SHAPES) and max(residual.values()) < 1e-4
    assert min(fusion.gram_residual(stats, deltas, pf.fuse(fusion.average(), deltas), **settings).values()) > 1e-2


def test_gram_at_its_defaults_costs_next_to_nothing_more_than_the_optimum():
    deltas, stats = problem()
    merged = pf.fuse(fusion.gram(stats), deltas)
    averaged = pf.fuse(fusion.average(), deltas)
    for path in SHAPES:
        expected, terms = exact_gram(path, deltas, stats)
        least = cost(expected, path, deltas, terms)
        assert cost(matrix(merged.leaves[path], path), path, deltas, terms) - least <= 1e-5 * least
        assert cost(matrix(averaged.leaves[path], path), path, deltas, terms) > 1.1 * least


def test_compressed_moments_are_used_as_what_they_multiply_out_to():
    deltas, stats = problem()
    small = {name: compress_statistics(s, rank=1) for name, s in stats.items()}
    deltas = {name: Delta({FULL: delta.leaves[FULL]}) for name, delta in deltas.items()}
    assert small["a"].size() < stats["a"].size()

    def multiplied_out(moments):
        return dataclasses.replace(moments, inputs=dense_moment(moments.inputs), outputs=dense_moment(moments.outputs))

    whole = {name: Statistics({FULL: multiplied_out(s.moments[FULL])}) for name, s in small.items()}
    for method in (fusion.gram, fusion.regmean):
        one, two = pf.fuse(method(small), deltas), pf.fuse(method(whole), deltas)
        np.testing.assert_allclose(one.leaves[FULL], two.leaves[FULL], rtol=2e-3, atol=2e-4)


def test_a_low_rank_result_is_the_nearest_in_the_metric():
    deltas, stats = problem()
    deltas = {name: Delta({path: delta.leaves[path] for path in (LOW, BIAS)}) for name, delta in deltas.items()}
    whole = pf.fuse(fusion.gram(stats), deltas)
    pair = pf.fuse(fusion.gram(stats, rank=2), deltas)
    assert isinstance(pair.leaves[LOW], LowRank) and pair.leaves[LOW].rank == 2
    assert not isinstance(pair.leaves[BIAS], LowRank)
    # Each of trace one, as the solver scales them.
    g = sum(hat(stats[n].moments[LOW].inputs, 0.95, 1e-3) / np.trace(stats[n].moments[LOW].inputs) for n in NAMES)
    s = sum(hat(stats[n].moments[LOW].outputs, 0.95, 1e-3) / np.trace(stats[n].moments[LOW].outputs) for n in NAMES)

    def root(m):
        values, vectors = np.linalg.eigh(m)
        return vectors * np.sqrt(values) @ vectors.T

    x = root(g) @ matrix(whole.leaves[LOW], LOW) @ root(s)
    p, values, q = np.linalg.svd(x)
    nearest = (p[:, :2] * values[:2]) @ q[:2]
    np.testing.assert_allclose(root(g) @ matrix(pair.leaves[LOW], LOW) @ root(s), nearest, atol=1e-4 * np.abs(x).max())


def test_regmean_is_the_formula():
    deltas, stats = problem()
    merged = pf.fuse(fusion.regmean(stats, off_diagonal=0.9, damping=1e-4), deltas)
    for path in SHAPES:
        terms = [(hat(stats[n].moments[path].inputs, 0.9, 1e-4), matrix(deltas[n].leaves[path], path)) for n in NAMES]
        expected = np.linalg.solve(sum(g for g, _ in terms), sum(g @ d for g, d in terms))
        np.testing.assert_allclose(matrix(merged.leaves[path], path), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_regmean_without_any_data_is_the_plain_average(kind):
    deltas, _ = problem()
    leaves = {name: Delta({FULL: delta.leaves[FULL]}) for name, delta in deltas.items()}
    nothing = jnp.zeros((IN, IN)) if kind == "dense" else diagonal_moment(jnp.zeros(IN))
    merged = pf.fuse(fusion.regmean({name: Statistics({FULL: Moments(nothing)}) for name in NAMES}), leaves)
    expected = np.mean([delta.leaves[FULL] for delta in leaves.values()], axis=0)
    np.testing.assert_allclose(merged.leaves[FULL], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rank", "off_diagonal"), [(4, 1.0), (64, 1.0), (4, 0.9)])
def test_regmean_is_the_formula_also_where_moments_have_hardly_any_directions(rank, off_diagonal):
    rng, n = np.random.default_rng(0), 64
    g = {name: scale * (x := rng.normal(size=(n, rank))) @ x.T / rank for name, scale in zip(NAMES, (1, 3, 0.2), strict=True)}
    for moment in g.values():
        moment[5] = moment[:, 5] = 0  # an input that is always zero
    d = {name: rng.normal(size=(n, 3)) for name in NAMES}

    def formula(alpha):
        hats = {t: hat(g[t], alpha, 1e-6) for t in NAMES}
        return np.linalg.solve(sum(hats.values()), sum(hats[t] @ d[t] for t in NAMES))

    expected = formula(off_diagonal)
    stats = {t: Statistics({p: Moments(jnp.asarray(g[t], jnp.float32)) for p in ("x/kernel", "y/kernel")}) for t in NAMES}
    deltas = {t: Delta({p: jnp.asarray(d[t], jnp.float32) for p in ("x/kernel", "y/kernel")}) for t in NAMES}
    merged = jax.jit(lambda deltas: pf.fuse(fusion.regmean(stats, off_diagonal=off_diagonal), deltas))(deltas)
    for leaf in merged.leaves.values():
        assert np.linalg.norm(leaf - expected) < 2e-5 * np.linalg.norm(expected)
    a = jnp.eye(n + 1, n)
    pairs = {t: Delta({"x/kernel": LowRank(a, jnp.asarray(d[t], jnp.float32), (n + 1, 3))}) for t in NAMES}
    shared = pf.fuse(fusion.regmean_shared(stats), pairs).leaves["x/kernel"].b
    expected = formula(1.0)
    assert np.linalg.norm(shared - expected) < 2e-5 * np.linalg.norm(expected)


def test_regmean_in_a_shared_space_is_the_least_squares_optimum_of_its_rank():
    _, stats = problem()
    rng = np.random.default_rng(8)
    a = jnp.asarray(rng.normal(size=(IN, 2)), jnp.float32)
    bs = {name: jnp.asarray(rng.normal(size=(2, OUT)), jnp.float32) for name in NAMES}
    deltas = {name: Delta({LOW: LowRank(a, b, (IN, 2, 2))}) for name, b in bs.items()}
    merged = pf.fuse(fusion.regmean_shared(stats), deltas).leaves[LOW]
    assert merged.rank == 2 and np.array_equal(merged.a, a)

    def cost_of(b):
        return sum(
            np.trace((b - bs[n]).T @ (a.T @ stats[n].moments[LOW].inputs @ a) @ (b - bs[n])).astype(np.float64) for n in NAMES
        )

    least = cost_of(merged.b)
    for _ in range(5):
        assert cost_of(merged.b + 0.05 * rng.normal(size=(2, OUT)).astype(np.float32)) > least
    assert cost_of(sum(bs.values()) / 3) > least
    # r x r moments are all that it needs.
    small = {name: fusion.project(stats[name], deltas[name]) for name in NAMES}
    assert small["a"].moments[LOW].inputs.shape == (2, 2)
    np.testing.assert_allclose(pf.fuse(fusion.regmean_shared(small), deltas).leaves[LOW].b, merged.b, rtol=1e-4, atol=1e-5)
    other = deltas | {"b": Delta({LOW: LowRank(a + 1, bs["b"], (IN, 2, 2))})}
    with pytest.raises(ValueError, match=f"different factors A at '{LOW}'"):
        pf.fuse(fusion.regmean_shared(stats), other)


def test_fisher_is_the_weighted_average():
    deltas, stats = problem()
    merged = pf.fuse(fusion.fisher(stats, normalize=False, floor=0.0), deltas)
    for path in (*SHAPES, "norm/scale"):
        f = [np.asarray(stats[n].fisher[path], np.float64) for n in NAMES]
        d = [np.asarray(dense(deltas[n].leaves[path]), np.float64) for n in NAMES]
        expected = sum(a * b for a, b in zip(f, d, strict=True)) / sum(f)
        np.testing.assert_allclose(dense(merged.leaves[path]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_fisher_information_weighs_alike_in_every_unit(unit):
    deltas, stats = problem()
    scaled = dataclasses.replace(stats["a"], fisher={path: f * unit for path, f in stats["a"].fisher.items()})
    expected = pf.fuse(fusion.fisher(stats), deltas)
    merged = pf.fuse(fusion.fisher(stats | {"a": scaled}), deltas)
    for path, leaf in expected.leaves.items():
        np.testing.assert_allclose(dense(merged.leaves[path]), dense(leaf), rtol=1e-4, atol=1e-5)


METHODS = {
    "fisher": fusion.fisher,
    "regmean": fusion.regmean,
    "gram": fusion.gram,
}


@pytest.mark.parametrize("name", METHODS)
def test_one_task_comes_back_bit_for_bit_and_scales(name):
    deltas, stats = problem()
    one = pf.fuse(METHODS[name](stats), {"b": deltas["b"]})
    for path, leaf in pf.trees.paths(deltas["b"].leaves).items():
        assert np.asarray(leaf).tobytes() == np.asarray(pf.trees.paths(one.leaves)[path]).tobytes(), path
    half = pf.fuse(METHODS[name](stats, scale=0.5), {"b": deltas["b"]})
    np.testing.assert_allclose(dense(half.leaves[LOW]), 0.5 * dense(one.leaves[LOW]), rtol=1e-6)


def test_a_task_that_leaves_a_parameter_alone_and_has_no_moments_there_has_no_say():
    deltas, stats = problem()
    deltas = {name: Delta({path: delta.leaves[path] for path in (LOW, BIAS)}) for name, delta in deltas.items()}
    without = Delta({BIAS: deltas["c"].leaves[BIAS]})
    blind = dataclasses.replace(stats["c"], moments={p: m for p, m in stats["c"].moments.items() if p != LOW})
    merged = pf.fuse(fusion.gram(stats | {"c": blind}), deltas | {"c": without})
    two = pf.fuse(fusion.gram(stats), {name: deltas[name] for name in "ab"})
    np.testing.assert_allclose(dense(merged.leaves[LOW]), dense(two.leaves[LOW]), rtol=1e-4, atol=1e-5)
    # With moments, it holds the change back.
    held = pf.fuse(fusion.gram(stats), deltas | {"c": without})
    assert float(jnp.linalg.norm(dense(held.leaves[LOW]))) < float(jnp.linalg.norm(dense(two.leaves[LOW])))


def test_refusals_name_task_and_parameter():
    deltas, stats = problem()
    with pytest.raises(ValueError, match="no statistics for the task 'd'"):
        pf.fuse(fusion.gram(stats), deltas | {"d": deltas["a"]})
    with pytest.raises(ValueError, match="go.* by the names|no statistics for the task 'tree 0'"):
        pf.fuse(fusion.gram(stats), list(deltas.values()))
    blind = dataclasses.replace(stats["c"], moments={p: m for p, m in stats["c"].moments.items() if p != FULL})
    with pytest.raises(ValueError, match=f"statistics of 'c' lack '{FULL}'"):
        pf.fuse(fusion.regmean(stats | {"c": blind}), deltas)
    wrong = dataclasses.replace(stats["c"], moments=stats["c"].moments | {FULL: stats["c"].moments[TABLE]})
    with pytest.raises(ValueError, match=rf"'c' at '{FULL}' are of a matrix \[6, 4\]"):
        pf.fuse(fusion.gram(stats | {"c": wrong}), deltas)
    with pytest.raises(ValueError, match="of other parameters"):
        pf.fuse(fusion.gram(stats), {name: Delta({"q/kernel": deltas[name].leaves[FULL]}) for name in NAMES})
    for bad in ({"off_diagonal": 1.5}, {"damping": -1.0}, {"rank": 0}, {"iterations": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fusion.gram(stats, **bad)
    with pytest.raises(ValueError, match="kinds="):
        fusion.fisher({"a": dataclasses.replace(stats["a"], fisher={})})


def test_regmean_pp_uses_the_inputs_that_merged_blocks_give():
    """Scanned or not; by hand: the second block's moments after the embedding and the first block are merged."""
    results = []
    for scan in (False, True):
        adapted, params, start, point = models.build(scan)
        trees = {"a": point, "b": jax.tree.map(lambda s, p: s + 0.5 * (s - p), start, point)}
        data = {name: [models.BATCH] for name in trees}
        method = fusion.regmean_pp(adapted, params, data, head=models.HEAD)
        results.append(pf.fuse(method, trees, adapted=adapted, params=params))
    loop, scanned = results
    np.testing.assert_allclose(scanned.leaves["layer/up/kernel"][1], loop.leaves["layer/1/up/kernel"], rtol=1e-3, atol=1e-5)

    adapted, params, start, point = models.build()
    trees = {"a": point, "b": jax.tree.map(lambda s, p: s + 0.5 * (s - p), start, point)}
    own = {name: adapted.deltas(params, tree) for name, tree in trees.items()}
    last = "layer/1/up/kernel"
    stats = {}
    for name in trees:
        mixed = Delta({p: loop.leaves[p] if not p.startswith("layer/1") else c for p, c in own[name].leaves.items()})
        stats[name] = statistics(adapted, params, mixed, [models.BATCH], head=models.HEAD, kinds=("inputs",))
    expected = pf.fuse(fusion.regmean(stats), own).leaves[last]
    np.testing.assert_allclose(dense(loop.leaves[last]), dense(expected), rtol=1e-4, atol=1e-6)
    plain = {n: statistics(adapted, params, trees[n], [models.BATCH], head=models.HEAD, kinds=("inputs",)) for n in trees}
    differently = pf.fuse(fusion.regmean(plain), own).leaves[last]
    assert float(jnp.abs(dense(differently) - dense(expected)).max()) > 1e-3


def test_regmean_pp_merges_encoders_first_and_averages_what_has_no_moments(monkeypatch):
    kernels = ["decoder/block/0/up/kernel", "encoder/block/0/up/kernel"]
    shapes = dict.fromkeys(kernels, (3, 2)) | {"norm/scale": (3,)}
    draw = np.random.default_rng(0).normal
    own = {name: Delta({p: jnp.asarray(draw(size=s), jnp.float32) for p, s in shapes.items()}) for name in "ab"}
    seen = []

    def collected(adapted, params, delta, data, **options):
        seen.append(delta.leaves)
        return Statistics({path: Moments(jnp.eye(3)) for path in kernels}, {}, 1)

    monkeypatch.setattr(sys.modules["pefusion_jax.statistics"], "statistics", collected)
    params = nest({path: jnp.zeros(shape) for path, shape in shapes.items()})
    got = pf.fuse(fusion.regmean_pp(None, params, {"a": [], "b": []}), own)
    for path in shapes:
        np.testing.assert_allclose(got.leaves[path], sum(d.leaves[path] for d in own.values()) / 2, atol=1e-6)
    np.testing.assert_array_equal(seen[-1][kernels[1]], got.leaves[kernels[1]])
    np.testing.assert_array_equal(seen[-1][kernels[0]], own["b"].leaves[kernels[0]])
