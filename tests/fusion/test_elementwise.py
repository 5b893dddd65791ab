"""The element-wise methods against hand-computed cases, NumPy in float64, PEFT, and algebraic laws."""

import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import fusion

CASES = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


def task_trees(seed: int, count: int = 4, dtype=np.float32) -> dict[str, dict]:
    rng = np.random.default_rng(seed)
    return {
        f"task{t}": {
            "block": {
                "kernel": rng.normal(size=(6, 5)).astype(dtype),
                "bias": (0.1 * rng.normal(size=5)).astype(dtype),
            },
            "scale": rng.normal(size=(3, 1, 2)).astype(dtype),
        }
        for t in range(count)
    }


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def leaves64(trees: dict) -> list[list[np.ndarray]]:
    return [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees.values()]


def numpy_trim(vector: np.ndarray, kept: int) -> np.ndarray:
    order = np.argsort(-np.abs(vector), kind="stable")  # stable: of equal magnitudes the first stay
    out = np.zeros_like(vector)
    out[order[:kept]] = vector[order[:kept]]
    return out


def numpy_ties(trees: dict, density: float, scale: float, elect="sum", reduce="mean", trim="global") -> np.ndarray:
    rows = []
    for leaves in leaves64(trees):
        if trim == "global":
            vector = np.concatenate([leaf.ravel() for leaf in leaves])
            rows.append(numpy_trim(vector, int(density * vector.size)))
        else:
            rows.append(np.concatenate([numpy_trim(leaf.ravel(), max(1, int(density * leaf.size))) for leaf in leaves]))
    stacked = np.stack(rows)
    vote = np.sign(stacked.sum(0) if elect == "sum" else np.sign(stacked).sum(0))
    vote[vote == 0] = 1.0 if vote.sum() >= 0 else -1.0
    agree = (np.sign(stacked) == vote) & (stacked != 0)
    total = np.where(agree, stacked, 0.0).sum(0)
    return scale * (total / np.maximum(agree.sum(0), 1) if reduce == "mean" else total)


# --- by hand ---


def test_ties_by_hand():
    # Two tensors of one task vector: x = [4, -3, 0.1, 1], y = [2].   density 0.6 keeps 3 of 5 in all.
    trees = {
        "a": {
            "x": np.array([4.0, -3.0, 0.1, 1.0], np.float32),
            "y": np.array([2.0], np.float32),
        },  # keeps 4 -3 . . 2
        "b": {
            "x": np.array([2.0, 5.0, 0.2, 0.3], np.float32),
            "y": np.array([-3.0], np.float32),
        },  # keeps 2 5 . . -3
        "c": {
            "x": np.array([-1.0, 2.0, 3.0, 0.0], np.float32),
            "y": np.array([0.5], np.float32),
        },  # keeps -1 2 3 . .
    }
    # Sums: 5, 4, 3, 0, -1. Agreeing: {4, 2}, {5, 2}, {3}, none, {-3}.
    fused = fusion.fuse(fusion.ties(density=0.6, scale=2.0), trees)
    np.testing.assert_array_equal(fused["x"], np.array([6.0, 7.0, 6.0, 0.0], np.float32))
    np.testing.assert_array_equal(fused["y"], np.array([-6.0], np.float32))
    summed = fusion.fuse(fusion.ties(density=0.6, reduce="sum"), trees)
    np.testing.assert_array_equal(summed["x"], np.array([6.0, 7.0, 3.0, 0.0], np.float32))
    # By count the last coordinate is a draw (+2, -3); most coordinates elected plus, so it takes plus.
    counted = fusion.fuse(fusion.ties(density=0.6, elect="count"), trees)
    np.testing.assert_array_equal(counted["y"], np.array([2.0], np.float32))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0)])
def test_zero_votes_take_the_majority_sign_of_the_whole_tree(sign, expected):
    # The only undecided coordinate is in another leaf than the majority.
    trees = {
        "a": {"draw": np.array([1.0], np.float32), "rest": sign * np.array([1.0, 1.0], np.float32)},
        "b": {"draw": np.array([-1.0], np.float32), "rest": sign * np.array([1.0, 1.0], np.float32)},
    }
    fused = fusion.fuse(fusion.ties(density=1.0), trees)
    np.testing.assert_array_equal(fused["draw"], np.array([expected], np.float32))


def test_full_draw_takes_plus():
    trees = [{"x": np.array([1.0, -2.0], np.float32)}, {"x": np.array([-1.0, 2.0], np.float32)}]
    np.testing.assert_array_equal(fusion.fuse(fusion.ties(density=1.0), trees)["x"], np.array([1.0, 2.0], np.float32))


def test_trim_keeps_the_exact_number_and_the_first_of_equals():
    stacked = {"b": jnp.array([[1.0, -1.0, 1.0, 0.5]]), "a": jnp.array([[-1.0, 2.0]])}
    kept = fusion.chain(fusion.trim(0.5), lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)).apply(stacked)
    # 3 of 6: the 2, then of the four magnitudes 1 the first two in path order: a[0] and b[0].
    np.testing.assert_array_equal(kept["a"], np.array([-1.0, 2.0], np.float32))
    np.testing.assert_array_equal(kept["b"], np.array([1.0, 0.0, 0.0, 0.0], np.float32))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("values", ["normal", "rounded", "zeros", "tiny"])
def test_trim_keeps_the_largest(dtype, density, values):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 101))
    x = {"normal": x, "rounded": np.round(2 * x), "zeros": 0 * x, "tiny": x * 1e-4}[values].astype(dtype)
    trimmed = fusion.chain(fusion.trim(density)).apply({"x": jnp.asarray(x)})["x"]
    assert trimmed.dtype == dtype
    trimmed = np.asarray(trimmed, np.float64)
    for row, got in zip(np.asarray(x, np.float64), trimmed, strict=True):
        np.testing.assert_array_equal(got, numpy_trim(row, max(1, int(density * row.size))))


def test_linear_methods_by_hand():
    trees = {"b": {"x": jnp.array([1.0, 2.0])}, "a": {"x": jnp.array([10.0, -4.0])}}
    expect = {
        "average": (fusion.average(), [5.5, -1.0]),
        "task arithmetic": (fusion.task_arithmetic(0.5), [5.5, -1.0]),
        "per task": (fusion.task_arithmetic({"a": 0.5, "b": 2.0}), [7.0, 2.0]),
        "an array, by name": (fusion.task_arithmetic(jnp.array([0.5, 2.0])), [7.0, 2.0]),
        "weighted": (fusion.weighted_average({"b": 3.0, "a": 1.0}), [13.0, 2.0]),
        "normalized": (fusion.weighted_average({"b": 3.0, "a": 1.0}, normalize=True), [3.25, 0.5]),
        "default scale": (fusion.task_arithmetic(), [3.3, -0.6]),
    }
    for name, (method, value) in expect.items():
        fused = fusion.fuse(method, trees)["x"]
        np.testing.assert_allclose(fused, np.array(value), rtol=1e-6, atol=1e-7, err_msg=name)


# --- against NumPy ---


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("trim", ["global", "per_tensor"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_equals_numpy(elect, reduce, trim, density):
    trees = task_trees(1, count=5)
    method = fusion.ties(density, 0.7, elect=elect, reduce=reduce, trim=trim)
    expected = numpy_ties(trees, density, 0.7, elect, reduce, trim)
    np.testing.assert_allclose(flat(fusion.fuse(method, trees)), expected, rtol=1e-6, atol=1e-7)


def test_global_and_per_tensor_trimming_differ():
    trees = task_trees(1)
    a = flat(fusion.fuse(fusion.ties(0.2), trees))
    b = flat(fusion.fuse(fusion.ties(0.2, trim="per_tensor"), trees))
    assert np.count_nonzero(a != b) > 3


def test_linear_methods_equal_numpy():
    trees = task_trees(2, count=3)
    weights = np.array([0.5, -1.0, 2.0])
    stacked = np.stack([flat(tree) for tree in trees.values()])
    for method, expected in [
        (fusion.average(), stacked.mean(0)),
        (fusion.task_arithmetic(0.4), 0.4 * stacked.sum(0)),
        (fusion.weighted_average(list(weights)), weights @ stacked),
        (fusion.weighted_average(list(weights), normalize=True), weights @ stacked / weights.sum()),
    ]:
        np.testing.assert_allclose(flat(fusion.fuse(method, trees)), expected, rtol=2e-6, atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    # 256 + 1 + 1 is 258, but in bfloat16 256 + 1 rounds back to 256.
    trees = [{"x": jnp.array([v], jnp.bfloat16)} for v in (256.0, 1.0, 1.0)]
    fused = fusion.fuse(fusion.task_arithmetic(1.0), trees)["x"]
    assert fused.dtype == jnp.bfloat16 and float(fused[0]) == 258.0


# --- against PEFT ---


@pytest.fixture(scope="module")
def peft_merge():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from peft.utils import merge_utils

    def tensors(trees):
        per_task = [[torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)] for tree in trees.values()]
        return list(zip(*per_task, strict=True))

    return torch, merge_utils, tensors


@pytest.mark.parametrize(("elect", "theirs"), [("sum", "total"), ("count", "frequency")])
def test_per_tensor_ties_equals_peft(peft_merge, elect, theirs):
    torch, merge_utils, tensors = peft_merge
    # Every tensor has more than 1 / density entries.
    trees, scale = task_trees(3, count=3), 0.6
    expected = [
        merge_utils.ties(list(group), torch.full((3,), scale), density=0.4, majority_sign_method=theirs)
        for group in tensors(trees)
    ]
    fused = fusion.fuse(fusion.ties(0.4, scale, elect=elect, trim="per_tensor"), trees)
    for ours, peft, group in zip(jax.tree.leaves(fused), expected, tensors(trees), strict=True):
        # Trimmed entries do not vote, so by count two voters may draw: there PEFT takes plus, not the
        # majority.
        kept = [np.sign(numpy_trim(x.numpy().ravel(), int(0.4 * x.numel()))) for x in group]
        votes = np.sum(kept, 0).reshape(ours.shape) if elect == "count" else np.ones(ours.shape)
        decided = (votes != 0) | (np.abs(kept).sum(0).reshape(ours.shape) == 0)
        assert decided.mean() > 0.5
        np.testing.assert_allclose(np.asarray(ours)[decided], peft.numpy()[decided], rtol=1e-6, atol=1e-7)


def test_where_peft_differs_from_the_paper(peft_merge):
    torch, merge_utils, _ = peft_merge
    ours = fusion.ties(1.0, trim="per_tensor")
    # 1. Undecided coordinates take plus in PEFT; the paper gives them the majority sign, here minus.
    pair = [np.array([1.0, -1.0, -1.0], np.float32), np.array([-1.0, -1.0, -1.0], np.float32)]
    with pytest.warns(UserWarning, match="no pruning"):
        peft = merge_utils.ties([torch.tensor(x) for x in pair], torch.ones(2), density=1.0).numpy()
    np.testing.assert_array_equal(peft, np.array([1.0, -1.0, -1.0], np.float32))
    np.testing.assert_array_equal(fusion.fuse(ours, [{"x": x} for x in pair])["x"], np.array([-1.0, -1.0, -1.0], np.float32))
    # 2. PEFT trims a tensor of fewer than 1 / density entries away; here one entry always stays.
    small = [np.array([1.0, 3.0], np.float32)]
    np.testing.assert_array_equal(merge_utils.ties([torch.tensor(small[0])], torch.ones(1), density=0.2), np.zeros(2))
    np.testing.assert_array_equal(fusion.fuse(fusion.ties(0.2), [{"x": small[0]}])["x"], np.array([0.0, 3.0], np.float32))


def test_linear_equals_peft_task_arithmetic(peft_merge):
    torch, merge_utils, tensors = peft_merge
    trees, weights = task_trees(4, count=3), [0.3, -0.5, 1.2]
    fused = fusion.fuse(fusion.weighted_average(dict(zip(trees, weights, strict=True))), trees)
    for ours, group in zip(jax.tree.leaves(fused), tensors(trees), strict=True):
        expected = merge_utils.task_arithmetic(list(group), torch.tensor(weights)).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


# --- laws ---

METHODS = {
    "average": fusion.average(),
    "task arithmetic": fusion.task_arithmetic(0.3),
    "weighted": fusion.weighted_average({"task0": 0.1, "task1": 0.2, "task2": 0.5, "task3": -0.4}),
    "ties": fusion.ties(0.3, 0.8),
    "ties count sum": fusion.ties(0.3, elect="count", reduce="sum"),
    "ties per tensor": fusion.ties(0.3, trim="per_tensor"),
}


@pytest.mark.parametrize("name", METHODS)
def test_order_of_a_mapping_does_not_matter(name):
    trees = task_trees(5)
    shuffled = {task: trees[task] for task in ["task2", "task0", "task3", "task1"]}
    a, b = fusion.fuse(METHODS[name], trees), fusion.fuse(METHODS[name], shuffled)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", METHODS)
def test_jit_equals_eager_and_vmap_equals_loop(name):
    trees = jax.tree.map(jnp.asarray, task_trees(6))
    fused = fusion.fuse(METHODS[name], trees)
    jitted = jax.jit(lambda trees: fusion.fuse(METHODS[name], trees))(trees)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), fused, jitted)
    double = jax.tree.map(lambda leaf: jnp.stack([leaf, -2.0 * leaf]), trees)
    batched = jax.vmap(lambda trees: fusion.fuse(METHODS[name], trees))(double)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-6, atol=1e-7), batched, fused)


@pytest.mark.parametrize(
    "method",
    [
        lambda value: fusion.task_arithmetic(value),
        lambda value: fusion.task_arithmetic(jnp.stack([value, 2.0 * value, value, value])),
        lambda value: fusion.weighted_average({f"task{t}": value for t in range(4)}, normalize=True),
        lambda value: fusion.ties(0.3, value),
        lambda value: fusion.ties(value, 1.0),
        lambda value: fusion.ties(value, 1.0, trim="per_tensor"),
    ],
)
def test_a_sweep_compiles_once_and_equals_the_single_points(method):
    trees, traces = jax.tree.map(jnp.asarray, task_trees(7)), []

    @jax.jit
    def point(value, trees):
        traces.append(1)
        return fusion.fuse(method(value), trees)

    for value in (0.25, 0.5, 1.0):
        expected = fusion.fuse(method(jnp.float32(value)), trees)
        got = point(jnp.float32(value), trees)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, expected)
    assert len(traces) == 1


def test_scale_zero_is_zero_and_average_of_identical_is_itself():
    trees = task_trees(8, count=3)
    for method in (fusion.task_arithmetic(0.0), fusion.ties(0.5, 0.0)):
        assert not flat(fusion.fuse(method, trees)).any()
    same = {name: trees["task0"] for name in ("a", "b", "c")}
    for method in (
        fusion.average(),
        fusion.ties(1.0),
        fusion.weighted_average([1.0, 2.0, 3.0], normalize=True),
    ):
        np.testing.assert_allclose(flat(fusion.fuse(method, same)), flat(trees["task0"]), rtol=3e-7)


@pytest.mark.parametrize("method", [fusion.average(), fusion.task_arithmetic(1.0), fusion.ties(1.0)])
def test_one_tree_comes_back_bit_for_bit(method):
    tree = {"x": np.array([1.1, 0.0, 3e-38, -7.0], np.float32), "y": jnp.array([0.1, -3.0], jnp.bfloat16)}
    fused = fusion.fuse(method, {"only": tree})
    for ours, given in zip(jax.tree.leaves(fused), jax.tree.leaves(tree), strict=True):
        assert ours.dtype == given.dtype and np.asarray(ours).tobytes() == np.asarray(given).tobytes()


FLOATS = st.floats(-100, 100, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)
VECTORS = st.lists(st.lists(FLOATS, min_size=6, max_size=6), min_size=2, max_size=4)


@CASES
@hypothesis.given(VECTORS, st.sampled_from([0.25, 0.5, 1.0]))
def test_ties_laws(rows, density):
    trees = [{"x": np.array(row, np.float32)} for row in rows]
    fused = np.asarray(fusion.fuse(fusion.ties(density), trees)["x"])
    stacked = np.stack([tree["x"] for tree in trees])
    # Doubling the inputs doubles the result; each result lies between 0 and its largest agreeing entry.
    doubled = fusion.fuse(fusion.ties(density), [{"x": 2.0 * tree["x"]} for tree in trees])["x"]
    np.testing.assert_allclose(doubled, 2.0 * fused, rtol=1e-6)
    assert np.all(np.abs(fused) <= np.abs(stacked).max(0) * (1 + 1e-6))
    for column, value in zip(stacked.T, fused, strict=True):
        assert value == 0 or np.sign(value) in np.sign(column)
    assert np.count_nonzero(fused) <= len(rows) * max(1, int(density * 6))


@CASES
@hypothesis.given(VECTORS, st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_task_arithmetic_is_linear_in_its_scale(rows, first, second):
    trees = [{"x": np.array(row, np.float32)} for row in rows]
    apart = [np.asarray(fusion.fuse(fusion.task_arithmetic(s), trees)["x"], np.float64) for s in (first, second)]
    together = fusion.fuse(fusion.task_arithmetic(first + second), trees)["x"]
    np.testing.assert_allclose(together, apart[0] + apart[1], rtol=1e-4, atol=1e-2)


def test_a_new_method_is_a_chain_of_parts():
    trees = task_trees(9, count=3)
    prune_and_average = fusion.chain(fusion.trim(0.5), fusion.reduce_mean(), fusion.rescale(2.0))
    expected = 2.0 * np.mean([numpy_trim(flat(tree), int(0.5 * flat(tree).size)) for tree in trees.values()], axis=0)
    np.testing.assert_allclose(flat(fusion.fuse(prune_and_average, trees)), expected, rtol=1e-6, atol=1e-7)


# --- errors ---


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_density_outside_its_range(density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        fusion.ties(density)


@pytest.mark.parametrize("option", [{"elect": "mass"}, {"reduce": "max"}, {"trim": "layer"}])
def test_unknown_options(option):
    with pytest.raises(ValueError, match="not '"):
        fusion.ties(**option)


def test_weights_that_cannot_be_normalized_or_do_not_match():
    with pytest.raises(ValueError, match="sum to 0"):
        fusion.weighted_average([1.0, -1.0], normalize=True)
    with pytest.raises(ValueError, match="sum to 0"):  # 6e-8 in float32
        fusion.weighted_average([0.1, 0.6, -0.7], normalize=True)
    with pytest.raises(ValueError, match="empty"):
        fusion.weighted_average({})
    with pytest.raises(ValueError, match="empty"):
        fusion.weighted_average([])
    with pytest.raises(ValueError, match="2 weights but got 4 trees"):
        fusion.fuse(fusion.weighted_average([1.0, 2.0]), task_trees(0))
    with pytest.raises(ValueError, match=r"shape \[task\]"):
        fusion.weighted_average(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="no tree for the task 'task9'.*nearest.*'task"):
        fusion.fuse(fusion.task_arithmetic({"task0": 1.0, "task9": 1.0}), task_trees(0, count=2))
    with pytest.raises(ValueError, match="no weight for the task 'task1'"):
        fusion.fuse(fusion.task_arithmetic({"task0": 1.0}), task_trees(0, count=2))
    with pytest.raises(ValueError, match="sequence without names"):
        fusion.fuse(fusion.task_arithmetic({"task0": 1.0}), [task_trees(0)["task0"]])
