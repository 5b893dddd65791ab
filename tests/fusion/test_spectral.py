"""Spectral methods against the papers' formulas in numpy float64, of full and of deficient rank, as pairs and dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.fusion.matrices import polar

INPUTS, OUTPUTS = 10, 8
RANKS = {"alike": (2, 2, 2), "different": (1, 3, 2), "frozen a": (2, 2, 2), "one absent": (2, 0, 2), "wide": (4, 4, 4)}


@functools.cache
def full(count=3, seed=0, shape=(INPUTS, OUTPUTS)):
    """Task -> tree with a matrix of full rank and a vector."""
    rng = np.random.default_rng(seed)
    return {
        f"t{t}": {
            "x/kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "x/bias": jnp.asarray(rng.normal(size=8), jnp.float32),
        }
        for t in range(count)
    }


@functools.cache
def pairs(kind, seed=0):
    """Task -> Delta of one low-rank pair and a vector."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(INPUTS, 2))
    out = {}
    for t, rank in enumerate(RANKS[kind]):
        a = shared if kind == "frozen a" else rng.normal(size=(INPUTS, rank))
        b = rng.normal(size=(rank, OUTPUTS))
        pair = LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (INPUTS, OUTPUTS))
        out[f"t{t}"] = Delta({"x/bias": jnp.asarray(rng.normal(size=8), jnp.float32)} | ({"x/kernel": pair} if rank else {}))
    return out


def matrices(given):
    """The matrices of pairs or trees in float64, in the order of the tasks; zeros where a task has none."""
    out = []
    for tree in given.values():
        leaf = (tree.leaves if isinstance(tree, Delta) else tree).get("x/kernel", np.zeros((INPUTS, OUTPUTS)))
        exact = isinstance(leaf, LowRank)
        out.append(np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64) if exact else np.asarray(leaf, np.float64))
    return out


def vectors(given):
    return np.stack([np.asarray((t.leaves if isinstance(t, Delta) else t)["x/bias"], np.float64) for t in given.values()])


# The papers' formulas, for matrices as stored here, [inputs, outputs]; their W is the transpose.


def leading(x, count):
    """Leading triplets, without those of singular values that are zero."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    count = min(count, int(np.sum(s > 1e-9 * max(s[0], 1e-300))))
    return u[:, :count], s[:count], vt[:count]


def orthogonal(x):
    """X (X'X)^(-1/2), the inverse square root as a pseudo-inverse."""
    values, vectors = np.linalg.eigh(x.T @ x)
    inverse = np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-9)), 0)
    return x @ vectors @ np.diag(inverse) @ vectors.T


def tsv_m(given, scale=1.0, directions=None):
    kept = max(1, min(INPUTS, OUTPUTS) // len(given)) if directions is None else directions
    parts = [leading(x, kept) for x in given]
    u = orthogonal(np.concatenate([p[0] for p in parts], 1))
    v = orthogonal(np.concatenate([p[2].T for p in parts], 1))
    return scale * u @ np.diag(np.concatenate([p[1] for p in parts])) @ v.T


def iso_c(given, scale=1.0):
    u, s, vt = leading(sum(given), 99)
    return scale * s.mean() * u @ vt


def iso_cts(given, scale=1.0, common=0.8):
    count, total = len(given), [x.T for x in given]
    rank = len(leading(sum(total), 99)[1])
    own = min(round((rank - int(rank * common)) / count), rank // count)
    u, s, vt = leading(sum(total), rank - own * count)
    us, ss, vs = [u], [s], [vt.T]
    for x in total:
        projected = x - u @ u.T @ x
        if np.linalg.norm(projected) > 1e-9 * np.linalg.norm(x):
            part = leading(projected, own)
            us, ss, vs = [*us, part[0]], [*ss, part[1]], [*vs, part[2].T]
    return (scale * np.concatenate(ss).mean() * orthogonal(np.concatenate(us, 1)) @ orthogonal(np.concatenate(vs, 1)).T).T


def truncated(given, rank, weights):
    u, s, vt = leading(sum(w * x for w, x in zip(weights, given, strict=True)), rank)
    return u @ np.diag(s) @ vt


def svc(given, fused, floor=None):
    floor = 1 / len(given) if floor is None else floor
    u, s, vt = leading(fused.T, 99)
    values = []
    for r in range(len(s)):
        ours, total = u[:, r] @ fused.T, 0.0
        for x in given:
            response = u[:, r] @ x.T
            square = response @ response
            total += max(floor, ours @ response / square if square > 1e-18 else 0.0)
        values.append(s[r] * len(given) / total)
    return (u @ np.diag(values) @ vt).T


def wudi(given, steps, rate, moments):
    """In the papers' layout, the gradient spelled out term by term."""
    tasks = [x.T for x in given if np.linalg.norm(x)]
    fused = sum(tasks)
    first, second = np.zeros_like(fused), np.zeros_like(fused)
    for i in range(1, steps + 1):
        gradient = sum(2 * (fused - x) @ x.T @ x / np.sum(x**2) for x in tasks)
        square = gradient**2 if moments == "entry" else np.full_like(gradient, np.mean(gradient**2))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * square
        fused = fused - rate * (first / (1 - 0.9**i)) / (np.sqrt(second / (1 - 0.999**i)) + 1e-8)
    return fused.T


def cart(given, share, strength):
    mean = sum(given) / len(given)
    kept = max(1, int(share * min(INPUTS, OUTPUTS)))
    out = mean.copy()
    for x in given:
        u, s, vt = np.linalg.svd(x - mean, full_matrices=False)
        out += strength * (u[:, :kept] * s[:kept]) @ vt[:kept]
    return out


METHODS = {
    "tsv_m": (fusion.tsv_m(0.7), lambda given: tsv_m(given, 0.7), 0.7),
    "tsv_m, 1": (fusion.tsv_m(directions=1), lambda given: tsv_m(given, 1.0, 1), 1.0),
    "iso_c": (fusion.iso_c(1.3), lambda given: iso_c(given, 1.3), 1.3),
    "iso_cts": (fusion.iso_cts(), iso_cts, 1.0),
    "iso_cts, half": (fusion.iso_cts(1.5, common=0.4), lambda given: iso_cts(given, 1.5, 0.4), 1.5),
    "cart": (fusion.cart(0.4, 0.5), lambda given: cart(given, 0.4, 0.5), 1.0),
    "wudi": (fusion.wudi(20, 1e-2), lambda given: wudi(given, 20, 1e-2, "matrix"), 1.0),
}


def close(got, want, tolerance=2e-5):
    got = np.asarray(got.dense() if isinstance(got, LowRank) else got, np.float64)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < tolerance, error


@functools.cache
def compiled(name):
    return jax.jit(lambda given: pf.fuse(METHODS[name][0], given))


@pytest.mark.parametrize("name", METHODS)
def test_matrices_of_full_rank(name):
    _, reference, scale = METHODS[name]
    given = full(3)
    got = compiled(name)(given)
    close(got["x/kernel"], reference(matrices(given)))
    close(got["x/bias"], scale * vectors(given).mean(0))


COMBINATIONS = {
    "tsv_m": RANKS,
    "iso_c": ("frozen a", "wide"),
    "iso_cts": ("different", "frozen a", "wide"),
    "tsv_m, 1": ("different",),
    "iso_cts, half": ("different",),
    "cart": ("different",),
    "wudi": ("one absent",),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in COMBINATIONS.items() for kind in kinds])
def test_pairs_are_fused_in_their_cores(name, kind):
    _, reference, scale = METHODS[name]
    given = pairs(kind)
    dense = {task: {"x/bias": delta.leaves["x/bias"]} for task, delta in given.items()}
    for tree, x in zip(dense.values(), matrices(given), strict=True):
        tree["x/kernel"] = jnp.asarray(x, jnp.float32)
    want = reference(matrices(given))
    got = compiled(name)(given)
    pair = got.leaves["x/kernel"]
    assert isinstance(pair, LowRank) and pair.rank <= sum(RANKS[kind])
    close(pair, want)
    close(compiled(name)(dense)["x/kernel"], want)
    close(got.leaves["x/bias"], scale * vectors(given).mean(0))


def test_the_polar_factor():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 4))
    x[:, 3] = x[:, 0]
    x[:, 2] = 0
    got = np.asarray(jax.jit(polar)(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, orthogonal(x), atol=1e-6)
    np.testing.assert_allclose(got[:, 2], 0, atol=1e-7)
    full_rank = np.asarray(jax.jit(polar)(jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)))
    np.testing.assert_allclose(full_rank.T @ full_rank, np.eye(4), atol=1e-6)


def test_iso_has_one_singular_value_and_tsv_directions_do_not_interfere():
    s = np.linalg.svd(np.asarray(compiled("iso_c")(full(3))["x/kernel"]), compute_uv=False)
    np.testing.assert_allclose(s, s[0], rtol=1e-5)
    # Tasks whose singular vectors are orthogonal anyway are simply added.
    tasks = {f"t{t}": {"w": jnp.zeros((6, 6)).at[2 * t, 2 * t].set(t + 1.0)} for t in range(3)}
    got = jax.jit(lambda tasks: pf.fuse(fusion.tsv_m(), tasks))(tasks)
    np.testing.assert_allclose(got["w"], sum(tree["w"] for tree in tasks.values()), atol=1e-6)


@pytest.mark.parametrize("rank", [3, 7])
def test_svd_and_concat(rank):
    weights = {"t0": 0.5, "t1": -1.0, "t2": 2.0}
    method = fusion.svd(rank, weights, scale=0.5)
    low, dense, whole = jax.jit(
        lambda *trees: [*(pf.fuse(method, t) for t in trees), pf.fuse(fusion.concat(weights, 0.5), trees[0])]
    )(pairs("alike"), full(3))
    for given, leaves in ((pairs("alike"), low.leaves), (full(3), dense)):
        close(leaves["x/kernel"], 0.5 * truncated(matrices(given), rank, weights.values()))
        close(leaves["x/bias"], 0.5 * np.tensordot(list(weights.values()), vectors(given), 1))
    assert low.leaves["x/kernel"].rank == min(rank, 6) and whole.leaves["x/kernel"].rank == 6
    close(whole.leaves["x/kernel"], 0.5 * sum(w * x for w, x in zip(weights.values(), matrices(pairs("alike")), strict=True)))
    with pytest.raises(ValueError, match="no tree for the task 't2'"):
        pf.fuse(method, full(2))


@pytest.mark.parametrize("floor", [None, 1.0])
def test_svc(floor):
    inner = fusion.task_arithmetic(0.8) if floor is None else fusion.tsv_m()
    calibrated, through_dense = fusion.svc(inner, floor), fusion.svc(fusion.ties(1.0), floor)
    given = (pairs("different"), full(3))
    *got, dense, plain = jax.jit(
        lambda low, full: (
            pf.fuse(calibrated, low),
            pf.fuse(calibrated, full),
            pf.fuse(through_dense, low),
            pf.fuse(fusion.ties(1.0), low),
        )
    )(*given)
    for trees, result in zip(given, got, strict=True):
        leaves = result.leaves if isinstance(result, Delta) else result
        fused = 0.8 * sum(matrices(trees)) if floor is None else tsv_m(matrices(trees))
        close(leaves["x/kernel"], svc(matrices(trees), fused, floor))
        close(leaves["x/bias"], 0.8 * vectors(trees).sum(0) if floor is None else vectors(trees).mean(0))
        assert isinstance(leaves["x/kernel"], LowRank) == isinstance(result, Delta)
    # Element-wise methods have no pairs to keep.
    close(dense.leaves["x/kernel"], svc(matrices(given[0]), np.asarray(plain.leaves["x/kernel"], np.float64), floor))


def test_svc_takes_back_what_equal_tasks_have_paid_several_times():
    tree = full(1)["t0"]
    got = jax.jit(lambda tree: pf.fuse(fusion.svc(fusion.task_arithmetic(1.0)), [tree] * 3))(tree)
    close(got["x/kernel"], np.asarray(tree["x/kernel"], np.float64))


def test_wudi_with_ordinary_adam_is_the_authors_and_dense():
    given = pairs("alike")
    method = fusion.wudi(10, 1e-2, moments="entry")
    got = jax.jit(lambda given: pf.fuse(method, given))(given).leaves["x/kernel"]
    close(got, wudi(matrices(given), 10, 1e-2, "entry"))


def test_wudi_disturbs_less_than_the_sum():
    given = matrices(full(3))

    def disturbance(fused):
        return sum(np.linalg.norm((fused - x).T @ x) ** 2 / np.linalg.norm(x) ** 2 for x in given)

    hessian = sum(x @ x.T / np.sum(x**2) for x in given)
    best = np.linalg.solve(hessian, sum(x @ x.T @ x / np.sum(x**2) for x in given))
    got = jax.jit(lambda given: pf.fuse(fusion.wudi(1000, 1e-2), given))(full(3))
    got = np.asarray(got["x/kernel"], np.float64)
    assert disturbance(best) < disturbance(got) < 1.05 * disturbance(best) < 0.5 * disturbance(sum(given))


@pytest.mark.parametrize(
    "method",
    [
        fusion.tsv_m(),
        fusion.svd(9),
        fusion.concat(),
        fusion.wudi(5),
        fusion.cart(),
        fusion.svc(fusion.task_arithmetic(1.0)),
        fusion.svc(fusion.average()),
    ],
)
def test_one_task_alone_comes_back_bit_for_bit(method):
    tree = full(1)
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(method, tree), tree["t0"])
    delta = pairs("alike")["t0"]
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(method, {"t0": delta}), delta)


def test_experts_and_other_shapes_are_fused_one_by_one():
    rng = np.random.default_rng(3)

    def pair(rank):
        a, b = rng.normal(size=(2, 6, rank)), rng.normal(size=(2, rank, 4))
        return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (2, 6, 2, 2))

    given = {"x": Delta({"experts": pair(1)}), "y": Delta({"experts": pair(2)})}
    got = jax.jit(lambda given: pf.fuse(fusion.tsv_m(), given))(given).leaves["experts"]
    assert got.shape == (2, 6, 2, 2)
    for i in range(2):
        stored = [delta.leaves["experts"] for delta in given.values()]
        want = tsv_m([np.asarray(p.a[i], np.float64) @ np.asarray(p.b[i], np.float64) for p in stored], directions=2)
        close(got.dense()[i].reshape(6, 4), want)


def test_the_scale_may_be_traced():
    given, traces = pairs("alike"), []

    @jax.jit
    def run(scale, given):
        traces.append(1)
        return [pf.fuse(make(scale), given).dense() for make in (fusion.tsv_m, fusion.iso_c)]

    twice, once = run(jnp.float32(2.0), given), run(jnp.float32(1.0), given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y, atol=1e-5), twice, once)
    assert len(traces) == 1


def test_wrong_settings():
    for make, message in (
        (lambda: fusion.tsv_m(directions=0), "at least 1 direction"),
        (lambda: fusion.iso_cts(common=1.2), "share of directions"),
        (lambda: fusion.svd(0), "rank of at least 1"),
        (lambda: fusion.svc(fusion.average(), 0.0), "floor above 0"),
        (lambda: fusion.wudi(-1), "-1 steps"),
        (lambda: fusion.wudi(moments="row"), "'entry' or of the 'matrix'"),
        (lambda: fusion.cart(0.0), "part of the directions"),
        (lambda: pf.fuse(fusion.concat([1.0]), full(2)), "1 weights but got 2 trees"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
