"""Fusion in common bases in numpy float64: nothing is lost, and the order of tasks and how pairs are factored do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank

SHAPES = {"x/kernel": (8, 7), "y/kernel": (8, 7)}


@functools.cache
def pairs(ranks=(2, 2, 2), seed=0):
    rng = np.random.default_rng(seed)

    def pair(shape, rank):
        a, b = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
        return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), shape)

    return {
        f"t{t}": Delta(
            {path: pair(shape, rank) for path, shape in SHAPES.items()}
            | {"x/bias": jnp.asarray(rng.normal(size=7), jnp.float32)}
        )
        for t, rank in enumerate(ranks)
    }


@functools.cache
def compiled(method):
    return jax.jit(lambda given: pf.fuse(method, given))


KNOTS, CORES = fusion.knots(fusion.ties(0.5), 0.7), fusion.core_space(fusion.ties(0.5), 0.7)


def dense(given):
    return {name: delta.dense().leaves for name, delta in given.items()}


def exact(given, path):
    return [np.asarray(d.leaves[path].a, np.float64) @ np.asarray(d.leaves[path].b, np.float64) for d in given.values()]


def basis(rows):
    """Right singular vectors that are not of zero, as columns."""
    _, s, vt = np.linalg.svd(rows)
    return vt[: int(np.sum(s > 1e-9 * s[0]))].T


def left_and_right(given, path):
    tasks = exact(given, path)
    return basis(np.concatenate([x.T for x in tasks])), basis(np.concatenate(tasks))


def ties(stacked, density):
    """Path -> [task, ...]: trimmed over the whole tree, elected, disjoint mean."""
    count = len(next(iter(stacked.values())))
    whole = [np.concatenate([leaf[t].ravel() for leaf in stacked.values()]) for t in range(count)]
    limits = [np.sort(np.abs(x))[::-1][max(1, int(density * x.size)) - 1] for x in whole]
    out = {}
    for path, leaf in stacked.items():
        kept = np.stack([np.where(np.abs(x) >= limit, x, 0) for x, limit in zip(leaf, limits, strict=True)])
        agreeing = np.where(np.sign(kept) == np.sign(kept.sum(0)), kept, 0)
        out[path] = agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)
    return out


def close(got, want, tolerance=2e-5):
    got = np.asarray(got.dense() if isinstance(got, LowRank) else got, np.float64)
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want), np.linalg.norm(got - want) / np.linalg.norm(want)


def of_ties(given, density, left):
    """Ties in KnOTS or Core Space coordinates."""
    bases = {path: left_and_right(given, path) for path in SHAPES}
    handed = {}
    for path, (u, v) in bases.items():
        handed[path] = np.stack([(u.T if left else np.eye(len(x))) @ x @ v for x in exact(given, path)])
    handed["x/bias"] = np.stack([np.asarray(d.leaves["x/bias"], np.float64) for d in given.values()])
    fused = ties(handed, density)
    out = {path: (u if left else np.eye(len(fused[path]))) @ fused[path] @ v.T for path, (u, v) in bases.items()}
    return out | {"x/bias": fused["x/bias"]}


@pytest.mark.parametrize(("method", "left"), [(KNOTS, False), (CORES, True)])
def test_ties_in_common_coordinates(method, left):
    given = pairs()
    want = of_ties(given, 0.5, left)
    got = compiled(method)(given).leaves
    whole = pf.fuse(method, dense(given))
    for path in want:
        close(got[path], 0.7 * want[path])
        close(whole[path], 0.7 * want[path])  # eagerly the rank of a dense change is known: the same entries are counted
    assert all(isinstance(got[path], LowRank) and got[path].rank <= 6 for path in SHAPES)


@pytest.mark.parametrize("make", [fusion.knots, fusion.core_space])
def test_a_linear_method_is_what_it_is_without_the_basis(make):
    inner = fusion.task_arithmetic({"t0": 0.5, "t1": -1.0, "t2": 2.0})
    got = compiled(make(inner))(pairs()).leaves
    want = pf.fuse(inner, pairs()).leaves
    for path in want:
        close(got[path], np.asarray(pf.deltas.dense(want[path]), np.float64))
    with pytest.raises(ValueError, match="no tree for the task 't2'"):
        pf.fuse(make(inner), pairs((1, 2)))


@pytest.mark.parametrize("method", [KNOTS, CORES])
def test_neither_order_nor_factors_matter(method):
    given = pairs()
    names = dict(zip(given, reversed(given), strict=True))
    turned = {}
    rng = np.random.default_rng(5)
    for name, delta in given.items():
        leaves = dict(delta.leaves)
        for path in SHAPES:
            pair = leaves[path]
            g = jnp.asarray(rng.normal(size=(pair.rank, pair.rank)), jnp.float32) + 2 * jnp.eye(pair.rank)
            leaves[path] = LowRank(pair.a @ g, jnp.linalg.inv(g) @ pair.b, pair.shape)
        turned[name] = Delta(leaves)
    want = compiled(method)(given)
    for other in (compiled(method)({names[name]: delta for name, delta in given.items()}), compiled(method)(turned)):
        for path in SHAPES:
            close(other.leaves[path], np.asarray(want.leaves[path].dense(), np.float64), 1e-4)


def test_isotropic_cores():
    method = fusion.core_space(isotropize=True)
    got = compiled(method)(pairs()).leaves
    want = compiled(fusion.iso_c())(pairs()).leaves
    for path in SHAPES:
        close(got[path], np.asarray(want[path].dense(), np.float64))
    close(got["x/bias"], 3 * np.asarray(want["x/bias"], np.float64))


def test_bases_of_the_factors_as_the_authors_take_them():
    given, path = pairs(), "x/kernel"
    got = compiled(fusion.core_space(fusion.ties(0.5, trim="per_tensor"), bases="factors"))(given).leaves[path]
    u = basis(np.concatenate([np.asarray(d.leaves[path].a, np.float64).T for d in given.values()]))
    v = basis(np.concatenate([np.asarray(d.leaves[path].b, np.float64) for d in given.values()]))
    fused = ties({path: np.stack([u.T @ x @ v for x in exact(given, path)])}, 0.5)[path]
    close(got, u @ fused @ v.T)
    with pytest.raises(ValueError, match="has no factors"):
        pf.fuse(fusion.core_space(bases="factors"), dense(given))


@pytest.mark.parametrize("sweeps", [0, 10])
def test_compress_then_merge(sweeps):
    given, rank = pairs(), 2
    method = fusion.compress_then_merge(rank, sweeps=sweeps)
    got = compiled(method)(given).leaves
    for path in SHAPES:
        tasks = exact(given, path)
        u, v = (x[:, :rank] for x in left_and_right(given, path))
        for _ in range(sweeps):
            u = np.linalg.svd(np.concatenate([x @ v for x in tasks], 1))[0][:, :rank]
            v = np.linalg.svd(np.concatenate([x.T @ u for x in tasks], 1))[0][:, :rank]
        close(got[path], u @ u.T @ sum(tasks) @ v @ v.T, 1e-4)
        assert got[path].rank == rank


def test_each_matrix_of_a_batch_is_a_matrix_to_the_inner_method():
    rng = np.random.default_rng(3)
    a, b = (jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32) for shape in ((3, 8, 2), (3, 2, 7)))
    batched = [Delta({"experts": LowRank(a[t], b[t], (3, 8, 7))}) for t in range(2)]
    apart = [Delta({f"{e}": LowRank(a[t, e], b[t, e], (8, 7)) for e in range(3)}) for t in range(2)]
    for method in (fusion.core_space(fusion.tsv_m(1.0)), fusion.compress_then_merge(2, fusion.iso_c(1.0))):
        found, one_each = compiled(method)(batched), compiled(method)(apart)
        close(found.leaves["experts"], np.stack([one_each.leaves[f"{e}"].dense() for e in range(3)]))


def test_one_task_alone_and_tasks_without_a_change():
    for make in (fusion.knots, fusion.core_space):
        given = {"t0": pairs()["t1"]}
        jax.tree.map(np.testing.assert_array_equal, pf.fuse(make(fusion.average()), given), given["t0"])
        tree = dense(given)
        jax.tree.map(np.testing.assert_array_equal, pf.fuse(make(fusion.average()), tree), tree["t0"])
    some = {"t0": pairs()["t1"], "t1": Delta({"x/bias": jnp.ones(7)})}
    got = compiled(fusion.core_space(fusion.ties(1.0)))(some).leaves
    for path in SHAPES:
        close(got[path], np.asarray(some["t0"].leaves[path].dense(), np.float64))


def test_inner_methods_are_bound_to_the_names():
    def bind(names):
        return fusion.weighted_average([float(name == "t1") for name in names])

    inner = fusion.Fusion(fusion.average().apply, bind=bind)
    given = {name: Delta({"w": delta.leaves["y/kernel"]}) for name, delta in pairs().items()}
    methods = (fusion.knots(inner), fusion.core_space(inner), fusion.compress_then_merge(7, inner))
    for got in jax.jit(lambda given: [pf.fuse(method, given) for method in methods])(given):
        close(got.leaves["w"], exact(pairs(), "y/kernel")[1])


def test_wrong_settings():
    for make, message in (
        (lambda: fusion.core_space(bases="rows"), "'changes' or 'factors'"),
        (lambda: fusion.compress_then_merge(0), "rank of at least 1"),
        (lambda: fusion.compress_then_merge(2, sweeps=-1), "-1 sweeps"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
