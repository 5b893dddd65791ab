"""Task vectors in weight space against NumPy on changes that are multiplied out, one layer at a time."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import trees
from pefusion_jax.deltas import Delta, LowRank, dense
from pefusion_jax.evaluation import cosine, layer_norms, sign_conflicts, subspace_overlap

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def pair(inputs, outputs, rank):
    return LowRank(array(inputs, rank), array(rank, outputs), (inputs, outputs))


Q, K = (tuple(f"encoder/layer/{i}/{name}/kernel" for i in (2, 10)) for name in ("query", "key"))
# Different ranks, different targets, pairs beside dense changes, and a vector.
DELTAS = {
    "a": Delta({Q[0]: pair(8, 5, 2), Q[1]: pair(8, 5, 2), K[0]: pair(6, 4, 3), "bias": array(5)}),
    "b": Delta({Q[0]: pair(8, 5, 3), Q[1]: pair(8, 5, 1), K[0]: array(6, 4), K[1]: array(6, 4)}),
    "c": Delta({Q[0]: pair(8, 5, 2), K[0]: array(6, 4), K[1]: array(6, 4), "bias": array(5)}),
}
SHAPES = {"bias": (5,), K[0]: (6, 4), Q[0]: (8, 5), K[1]: (6, 4), Q[1]: (8, 5)}


def numpy_changes(deltas=DELTAS):
    """path -> [task, ...], zeros where a task changes nothing."""
    return {
        path: np.stack([np.asarray(dense(d.leaves[path]) if path in d.leaves else np.zeros(shape)) for d in deltas.values()])
        for path, shape in SHAPES.items()
    }


def numpy_cosine(rows):
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
        return rows @ rows.T / np.outer(lengths, lengths)


def test_cosine_and_norms():
    found, norms, changes = cosine(DELTAS), layer_norms(DELTAS), numpy_changes()
    assert found.layers == norms.layers == ("bias", K[0], Q[0], K[1], Q[1])  # 2 before 10
    for place, path in enumerate(found.layers):
        rows = changes[path].reshape(3, -1).astype(np.float64)
        np.testing.assert_allclose(found.by_layer[place], numpy_cosine(rows), atol=1e-6)  # NaN at the same places
        np.testing.assert_allclose(norms.by_layer[place], np.linalg.norm(rows, axis=1), rtol=1e-6)
    whole = np.concatenate([change.reshape(3, -1) for change in changes.values()], axis=1)
    np.testing.assert_allclose(found.overall, numpy_cosine(whole), atol=1e-6)
    np.testing.assert_allclose(norms.overall, np.linalg.norm(whole, axis=1), rtol=1e-6)
    assert np.isnan(found.by_layer[found.layers.index(Q[1]), 0, 2]) and found.names == ("a", "b", "c")


def test_pairs_are_never_multiplied_out(monkeypatch):
    wide = {name: Delta({"kernel": pair(3000, 3000, 2)}) for name in "ab"}
    matmul = np.matmul

    def small(a, b):
        product = matmul(a, b)
        assert product.size < 3000 * 10
        return product

    monkeypatch.setattr(np, "matmul", small)
    monkeypatch.setattr(LowRank, "dense", None)
    assert cosine(wide).overall[0, 0] == pytest.approx(1) and layer_norms(wide).overall[0] > 0
    assert subspace_overlap(wide, k=2).inputs.overall[0, 1] < 0.1


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_sign_conflicts(scope):
    density, changes = 0.3, numpy_changes()
    found = sign_conflicts(DELTAS, density=density, scope=scope)
    kept = {}
    sizes = {path: change[0].size for path, change in changes.items()}
    for t in range(3):
        if scope == "global":
            order = np.argsort(-np.abs(np.concatenate([changes[path][t].reshape(-1) for path in sorted(changes)])))
            chosen = np.zeros(sum(sizes.values()), bool)
            chosen[order[: int(density * len(order))]] = True
            parts = np.split(chosen, np.cumsum([sizes[path] for path in sorted(changes)])[:-1])
            kept[t] = dict(zip(sorted(changes), parts, strict=True))
        else:
            kept[t] = {}
            for path, change in changes.items():
                mask = np.zeros(sizes[path], bool)
                mask[np.argsort(-np.abs(change[t].reshape(-1)), kind="stable")[: max(1, int(density * sizes[path]))]] = True
                kept[t][path] = mask
    against, both = np.zeros((len(found.layers), 3, 3)), np.zeros((len(found.layers), 3, 3))
    for place, path in enumerate(found.layers):
        flat = changes[path].reshape(3, -1)
        for i in range(3):
            for j in range(3):
                shared = kept[i][path] & kept[j][path] & (flat[i] != 0) & (flat[j] != 0)
                both[place, i, j] = shared.sum()
                against[place, i, j] = (shared & (np.sign(flat[i]) != np.sign(flat[j]))).sum()
    assert against.sum() > 0
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.by_layer, against / both)
        np.testing.assert_allclose(found.overall, against.sum(0) / both.sum(0))
    np.testing.assert_array_equal(found.baseline, np.full((5, 3, 3), 0.5))


@pytest.mark.parametrize("k", [2, 8])
def test_subspace_overlap(k):
    found, changes = subspace_overlap(DELTAS, k=k), numpy_changes()
    assert found.inputs.layers == (K[0], Q[0], K[1], Q[1])  # the vector is no matrix
    for side, result in enumerate(found):
        for place, path in enumerate(result.layers):
            spaces = []
            for matrix in changes[path].astype(np.float64):
                u, s, v = np.linalg.svd(matrix, full_matrices=False)
                rank = min(k, int((s > 1e-5 * max(s.max(), 1e-30)).sum()))
                spaces.append((u if side == 0 else v.T)[:, :rank])
            for i, one in enumerate(spaces):
                for j, other in enumerate(spaces):
                    smaller, larger = sorted((one.shape[1], other.shape[1]))
                    expected = np.sum((one.T @ other) ** 2) / smaller if smaller else np.nan
                    chance = larger / one.shape[0] if smaller else np.nan
                    np.testing.assert_allclose(result.by_layer[place, i, j], expected, atol=1e-5)
                    np.testing.assert_allclose(result.baseline[place, i, j], chance, atol=1e-12)
        np.testing.assert_allclose(result.overall, np.nanmean(result.by_layer, axis=0))


def test_random_subspaces_have_the_baseline():
    rng = np.random.default_rng(3)
    many = {str(t): Delta({"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)}) for t in range(12)}
    found = subspace_overlap(many, k=6)
    off = ~np.eye(12, dtype=bool)
    for result, size in zip(found, (40, 30), strict=True):
        assert result.baseline[0, 0, 1] == pytest.approx(6 / size)
        assert result.by_layer[0][off].mean() == pytest.approx(6 / size, rel=0.08)


def test_scanned_layers_are_looked_at_one_by_one():
    loop = {name: Delta({f"m/layer/{i}/q/kernel": pair(6, 4, rank) for i in range(3)}) for name, rank in (("a", 2), ("b", 3))}
    scanned = {}
    for name, delta in loop.items():
        leaves = list(delta.leaves.values())
        factors = [jnp.stack([getattr(leaf, part) for leaf in leaves]) for part in "ab"]
        scanned[name] = Delta({"m/layer/q/kernel": LowRank(*factors, (3, 6, 4))})
    plain = [{name: delta.dense().leaves for name, delta in of.items()} for of in (loop, scanned)]
    assert trees.paths(plain[1]["a"])  # plain trees of displacements: the same numbers
    for measure in (cosine, sign_conflicts, layer_norms, lambda v: subspace_overlap(v, k=2).outputs):
        one, *others = (measure(vectors) for vectors in (loop, scanned, *plain))
        for other in others:
            assert one.layers == other.layers == tuple(f"m/layer/{i}/q/kernel" for i in range(3))
            np.testing.assert_allclose(one.by_layer, other.by_layer, atol=1e-5)


def test_interleaved_axes():
    """An einsum's weight [heads, in, size] whose change is a pair over (in, heads * size)."""
    change = LowRank(array(6, 2), array(2, 12), (3, 6, 4), axes=(1, 0, 2))
    vectors = {"a": Delta({"w": change}), "b": Delta({"w": array(3, 6, 4)})}
    matrices = [np.asarray(dense(v.leaves["w"])).transpose(1, 0, 2).reshape(6, 12) for v in vectors.values()]
    assert cosine(vectors).overall[0, 1] == pytest.approx(numpy_cosine(np.stack(matrices).reshape(2, -1))[0, 1], abs=1e-6)
    found = subspace_overlap(vectors, k=2)
    u, v = (np.linalg.svd(matrix)[0][:, :2] for matrix in matrices)
    assert found.inputs.by_layer[0, 0, 1] == pytest.approx(np.sum((u.T @ v) ** 2) / 2, abs=1e-5)


def test_experts_count_alike():
    vectors = {n: Delta({"experts/w": LowRank(array(2, 6, 1), array(2, 1, 4), (2, 6, 4))}) for n in "ab"}
    a, b = (np.asarray(v.leaves["experts/w"].a, np.float64)[..., 0] for v in vectors.values())
    each = [np.dot(x, y) ** 2 / np.dot(x, x) / np.dot(y, y) for x, y in zip(a, b, strict=True)]
    assert subspace_overlap(vectors).inputs.by_layer[0, 0, 1] == pytest.approx(np.mean(each), abs=1e-6)


def test_tables(tmp_path):
    found = subspace_overlap(DELTAS, k=2).inputs
    rows = list(csv.reader(found.write(tmp_path).read_text().splitlines()))
    assert (tmp_path / "input_subspace_overlap.csv").is_file()
    assert rows[0] == ["layer", "task", "other task", "input subspace overlap", "random baseline"] and len(rows) == 1 + 5 * 9
    assert rows[2][:3] == ["overall", "a", "b"] and float(rows[2][3]) == found.overall[0, 1] and rows[2][4] == ""
    assert rows[-1][3] == ""  # task c leaves the last layer alone
    rows = list(csv.reader(layer_norms(DELTAS).write(tmp_path).read_text().splitlines()))
    assert rows[0] == ["layer", "a", "b", "c"] and rows[1][0] == "overall" and len(rows) == 7
    assert list(found.pairs()) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_errors():
    for message, vectors in {
        "at least one entry": {},
        "some trees are Deltas": {"a": DELTAS["a"], "b": {"w": array(2, 2)}},
        "'w' is .* in 'a', .* in 'b'": {"a": Delta({"w": array(2, 2)}), "b": Delta({"w": array(2, 3)})},
        "'b' lacks the leaf 'w'": {"a": {"w": array(2)}, "b": {"v": array(2)}},
        "'a': 'w' holds 1 NaN": {"a": Delta({"w": jnp.asarray([1.0, jnp.nan])})},
        "no leaves": {"a": Delta({})},
    }.items():
        with pytest.raises(ValueError, match=message):
            cosine(vectors)
    with pytest.raises(ValueError, match="not Delta"):
        cosine(DELTAS["a"])
    with pytest.raises(ValueError, match="no leaf is a matrix"):
        subspace_overlap({"a": Delta({"bias": array(5)})})
    with pytest.raises(ValueError, match="k=0"):
        subspace_overlap(DELTAS, k=0)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        sign_conflicts(DELTAS, density=0.0)
