"""``fuse``: the spaces, low-rank changes, and the errors."""

from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import fusion, trees
from pefusion_jax.compression import compress
from pefusion_jax.deltas import Delta, LowRank, dense

WEIGHTS = {"a": 0.5, "b": -1.0, "c": 2.0}


def low_rank(seed: int, rank: int, inputs: int = 6, outputs: int = 4, dtype=np.float32, batch=()) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = (
        rng.normal(size=(*batch, inputs, rank)).astype(dtype),
        rng.normal(size=(*batch, rank, outputs)).astype(dtype),
    )
    return LowRank(jnp.asarray(a), jnp.asarray(b), (*batch, inputs, outputs))


def changes(dtype=np.float32) -> dict[str, Delta]:
    """Three tasks of different ranks; the bias is dense; only one of them adapted ``value``."""
    out = {}
    for seed, (name, rank) in enumerate([("a", 1), ("b", 2), ("c", 3)]):
        leaves = {
            "enc/query/kernel": low_rank(seed, rank, dtype=dtype),
            "scan/query/kernel": low_rank(seed + 10, rank, dtype=dtype, batch=(2,)),
            "enc/query/bias": jnp.asarray(np.random.default_rng(seed).normal(size=4).astype(dtype)),
        }
        if name == "b":
            leaves["enc/value/kernel"] = low_rank(5, 2, dtype=dtype)
        out[name] = Delta(leaves)
    return out


def dense64(delta: Delta) -> dict[str, np.ndarray]:
    def leaf(change):
        if isinstance(change, LowRank):
            return np.asarray(change.a, np.float64) @ np.asarray(change.b, np.float64)
        return np.asarray(change, np.float64)

    return {path: leaf(change) for path, change in delta.leaves.items()}


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (fusion.average(), {name: 1 / 3 for name in WEIGHTS}),
        (fusion.task_arithmetic(0.3), {name: 0.3 for name in WEIGHTS}),
        (fusion.weighted_average(WEIGHTS), WEIGHTS),
    ],
)
def test_linear_methods_keep_low_rank_pairs_and_equal_the_dense_sum(method, weights):
    given = changes()
    fused = fusion.fuse(method, given)
    assert isinstance(fused, Delta)
    assert fused.leaves["enc/query/kernel"].rank == 6
    assert fused.leaves["scan/query/kernel"].a.shape == (2, 6, 6)
    assert fused.leaves["enc/value/kernel"].rank == 2
    known = {name: dense64(delta) for name, delta in given.items()}
    for path, change in fused.leaves.items():
        expected = sum(weights[name] * known[name][path] for name in known if path in known[name])
        np.testing.assert_allclose(dense(change), expected, rtol=1e-5, atol=1e-5, err_msg=path)


def test_other_methods_work_on_dense_changes():
    given = changes()
    fused = fusion.fuse(fusion.ties(0.3, 0.8), given)
    assert all(isinstance(leaf, jax.Array) for leaf in fused.leaves.values())
    # The same arithmetic on plain trees; a parameter that a task did not adapt is unchanged there.
    absent = {"enc/value/kernel": np.zeros((6, 4), np.float32)}
    plain = {name: absent | {p: np.asarray(dense(leaf)) for p, leaf in d.leaves.items()} for name, d in given.items()}
    expected = fusion.fuse(fusion.ties(0.3, 0.8), plain)
    assert fused.leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(fused.leaves[path], leaf)


def test_one_low_rank_delta_comes_back_bit_for_bit():
    delta = changes()["b"]
    jax.tree.map(np.testing.assert_array_equal, fusion.fuse(fusion.average(), {"b": delta}), delta)


def test_bfloat16_deltas_keep_their_dtype():
    fused = fusion.fuse(fusion.task_arithmetic(0.3), changes(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(fused)} == {jnp.dtype(jnp.bfloat16)}


def test_deltas_jit_with_a_traced_scale():
    given, traces = changes(), []

    @jax.jit
    def point(scale, given):
        traces.append(1)
        return fusion.fuse(fusion.task_arithmetic(scale), given), fusion.fuse(fusion.ties(0.3, scale), given)

    for scale in (0.2, 0.9):
        for ours, method in zip(
            point(jnp.float32(scale), given),
            (fusion.task_arithmetic(scale), fusion.ties(0.3, scale)),
            strict=True,
        ):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                ours,
                fusion.fuse(method, given),
            )
    assert len(traces) == 1


def lora_like():
    """Just enough of an Adapted: a LoRA on one kernel, with scaling 2."""
    return SimpleNamespace(
        deltas=lambda params, tree: Delta({"kernel": LowRank(tree["a"], 2.0 * tree["b"], params["kernel"].shape)})
    )


def test_weight_space_is_not_adapter_space():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((5, 3))}
    init = {"a": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32), "b": jnp.zeros((2, 3))}
    trees = {
        name: {k: leaf + jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for k, leaf in init.items()}
        for name in ("s", "t")
    }
    in_weights = fusion.fuse(fusion.average(), trees, adapted=lora_like(), params=params)
    expected = sum(np.asarray(tree["a"], np.float64) @ np.asarray(tree["b"], np.float64) for tree in trees.values())
    np.testing.assert_allclose(dense(in_weights.leaves["kernel"]), expected, rtol=1e-5, atol=1e-5)

    factors = fusion.fuse(fusion.average(), trees, adapted=lora_like(), params=params, space="adapter", init=init)
    for key, leaf in factors.items():
        np.testing.assert_allclose(leaf, np.mean([tree[key] for tree in trees.values()], axis=0), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(2.0 * factors["a"] @ factors["b"]) - expected).max() > 0.1

    scaled = fusion.fuse(fusion.task_arithmetic(0.3), trees, space="adapter", init=init)
    for key, leaf in scaled.items():
        moved = sum(np.asarray(tree[key] - init[key], np.float64) for tree in trees.values())
        np.testing.assert_allclose(leaf, init[key] + 0.3 * moved, rtol=1e-5, atol=1e-6)


def test_the_result_has_the_structure_of_the_trees():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    nested = {"enc": {"layer": {"q": {"kernel": kernel}}}, "head": {"kernel": kernel[0]}}
    numbered = {"layer": {"q": {"kernel": kernel}}, "heads": {0: kernel[0], 1: kernel[1]}}
    for tree in (nested, trees.paths(nested), numbered, flax.core.freeze(nested)):
        assert jax.tree.structure(fusion.fuse(fusion.tsv_m(), [tree, tree])) == jax.tree.structure(tree)
        moved = jax.tree.map(lambda leaf: leaf + 1, tree)
        found = fusion.fuse(fusion.ties(1.0), [moved, moved], space="adapter", init=tree)
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), found, moved)


@pytest.mark.parametrize(
    "method",
    [
        fusion.della(), fusion.della(conform="mergekit"), fusion.breadcrumbs(), fusion.breadcrumbs(conform="mergekit"),
        fusion.pcb(), fusion.dare(), fusion.ties(), fusion.ties(conform="peft"), fusion.tsv_m(), fusion.knots(), fusion.wudi(),
        fusion.model_stock(), fusion.core_space(), fusion.match_norm(fusion.svd(2)),
    ],
)  # fmt: skip
def test_leaves_without_entries_pass_through(method):
    full = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    empty = {f"empty {n}": np.zeros(shape, np.float32) for n, shape in enumerate([(0,), (0, 3), (3, 0), (2, 0, 3)])}
    alone = fusion.fuse(method, [{"w": leaf} for leaf in full])
    trees = [{"w": leaf} | empty for leaf in full]
    for found in (fusion.fuse(method, trees), fusion.fuse(method, [Delta(tree) for tree in trees]).leaves):
        np.testing.assert_allclose(dense(found["w"]), alone["w"], rtol=1e-5, atol=1e-6)
        assert {path: found[path].shape for path in empty} == {path: leaf.shape for path, leaf in empty.items()}
    assert fusion.fuse(method, [empty, empty]).keys() == empty.keys()


def test_leaves_without_entries_pass_through_in_any_container():
    full = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    for method in (fusion.della(), fusion.pcb(), fusion.core_space()):
        alone = fusion.fuse(method, [{"0": leaf} for leaf in full])
        found = fusion.fuse(method, [[leaf, np.zeros((0, 3), np.float32)] for leaf in full])
        np.testing.assert_allclose(found[0], alone["0"], rtol=1e-5, atol=1e-6)
        assert found[1].shape == (0, 3)


@pytest.mark.parametrize("method", [fusion.ties(0.3), fusion.magmax(), fusion.magnitude_prune(0.3)])
def test_narrow_pairs_are_ranked_as_what_their_factors_are(method):
    narrow = {name: Delta({"w": low_rank(seed, 3, 40, 30, jnp.bfloat16)}) for seed, name in enumerate("abc")}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    found, wanted = (fusion.fuse(method, given).leaves["w"] for given in (narrow, wide))
    np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16))


def test_explicit_mesh_axes_are_refused_with_a_remedy():
    def sharded(kind):
        mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        return [{"w": jax.device_put(np.full((4, 3), value, np.float32), spec)} for value in (1, 2)]

    given = sharded(jax.sharding.AxisType.Explicit)
    np.testing.assert_array_equal(fusion.fuse(fusion.average(), given)["w"], 1.5)
    for call in (fusion.fuse, jax.jit(fusion.fuse, static_argnums=0)):
        with pytest.raises(ValueError, match="'w' is sharded over a mesh with explicit axes.*axis_types="):
            call(fusion.ties(), given)
    with pytest.raises(ValueError, match="'tree 0': 'w' is sharded over"):
        fusion.fuse(fusion.tsv_m(), [Delta(tree) for tree in given])
    with pytest.raises(ValueError, match="the change: 'w' is sharded over"):
        compress(Delta(given[0]), 1)
    np.testing.assert_array_equal(fusion.fuse(fusion.ties(1.0), sharded(jax.sharding.AxisType.Auto))["w"], 1.5)


def test_structures_are_checked():
    one = {"enc": {"kernel": np.zeros((2, 3), np.float32)}}
    with pytest.raises(ValueError, match=r"'enc/kernel'.*\[2, 3\].*'a'.*\[3, 2\].*'b'"):
        fusion.fuse(fusion.average(), {"a": one, "b": {"enc": {"kernel": np.zeros((3, 2), np.float32)}}})
    with pytest.raises(ValueError, match="'b' lacks the leaf 'enc/kernel'"):
        fusion.fuse(fusion.average(), {"a": one, "b": {"enc": {"kernels": one["enc"]["kernel"]}}})
    with pytest.raises(ValueError, match=r"'kernel'.*\[6, 4\].*'a'.*\[6, 5\].*'b'"):
        fusion.fuse(
            fusion.average(),
            {"a": Delta({"kernel": low_rank(0, 2)}), "b": Delta({"kernel": low_rank(0, 2, outputs=5)})},
        )
    with pytest.raises(ValueError, match="'b' is a dict but other trees are Deltas"):
        fusion.fuse(fusion.average(), {"a": Delta({"kernel": low_rank(0, 2)}), "b": one})
    with pytest.raises(ValueError, match="'init'"):
        fusion.fuse(fusion.average(), {"a": one}, space="adapter", init={"other": np.zeros(2, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_numbers_are_named(value):
    good, bad = (
        {"enc": {"b": np.ones(3, np.float32)}},
        {"enc": {"b": np.array([1.0, value, 2.0], np.float32)}},
    )
    with pytest.raises(ValueError, match="'rte'.*'enc/b' holds 1 NaN or infinite"):
        fusion.fuse(fusion.average(), {"mnli": good, "rte": bad})
    with pytest.raises(ValueError, match="'rte'.*'kernel/a' holds 1 NaN"):
        pair = low_rank(0, 2)
        broken = LowRank(pair.a.at[0, 0].set(value), pair.b, pair.shape)
        fusion.fuse(fusion.ties(), {"mnli": Delta({"kernel": pair}), "rte": Delta({"kernel": broken})})
    # Under jit, too, for the leaves that are known; traced ones are not looked at.
    with pytest.raises(ValueError, match="'rte'"):
        jax.jit(lambda scale: fusion.fuse(fusion.task_arithmetic(scale), {"rte": bad}))(0.5)
    traced = jax.jit(lambda trees: fusion.fuse(fusion.average(), trees))({"rte": bad})
    assert not np.isfinite(np.asarray(traced["enc"]["b"])).all()


def test_wrong_arguments():
    tree = {"x": np.ones(2, np.float32)}
    for empty in ({}, []):
        with pytest.raises(ValueError, match="nothing to fuse"):
            fusion.fuse(fusion.average(), empty)
    with pytest.raises(ValueError, match="no leaves"):
        fusion.fuse(fusion.average(), {"a": {}})
    with pytest.raises(ValueError, match="only floating-point"):
        fusion.fuse(fusion.average(), {"a": {"ids": np.arange(3, dtype=np.int32)}})
    with pytest.raises(ValueError, match="space must be"):
        fusion.fuse(fusion.average(), {"a": tree}, space="weights")
    with pytest.raises(ValueError, match="space='adapter'"):
        fusion.fuse(fusion.average(), {"a": tree}, init=tree)
    with pytest.raises(ValueError, match="both adapted and params"):
        fusion.fuse(fusion.average(), {"a": tree}, adapted=lora_like())
    with pytest.raises(ValueError, match="'a' holds low-rank pairs.*pass pf.Delta"):
        fusion.fuse(fusion.average(), {"a": {"w": low_rank(0, 2)}, "b": {"w": low_rank(1, 2)}})
    with pytest.raises(ValueError, match="one Delta"):
        fusion.fuse(fusion.average(), Delta({"x": tree["x"]}))
    with pytest.raises(ValueError, match="a Delta is a weight change"):
        fusion.fuse(fusion.average(), {"a": Delta({"x": tree["x"]})}, space="adapter")
