"""Searched coefficients: they go where the loss says, per group, on trees, on pairs, in scanned models, and reproducibly."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank, dense
from pefusion_jax.fusion import Objective, Term
from pefusion_jax.tasks.heads import linear_logits
from pefusion_jax.tasks.metrics import accuracy, cross_entropy, squared_error
from pefusion_jax.tasks.task import Head, Task

NAMES = ("a", "b")
TARGET = {"enc/layer/0/kernel": (0.9, -0.4), "enc/layer/1/kernel": (0.2, 0.6)}


def pairs():
    rng = np.random.default_rng(0)

    def pair(rank):
        a, b = rng.normal(size=(4, rank)), rng.normal(size=(rank, 3))
        return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (4, 3))

    return {name: Delta({path: pair(rank) for path in TARGET}) for rank, name in enumerate(NAMES, start=1)}


def as_trees():
    return {name: {path: dense(change) for path, change in delta.leaves.items()} for name, delta in pairs().items()}


def distance(arrays, fused, batch):
    """Squared distance to a combination that is known; ``batch`` scales it."""
    leaves = fused.leaves if isinstance(fused, Delta) else fused
    off = sum(jnp.sum(jnp.square(dense(leaves[path]) - want)) for path, want in arrays.items())
    return batch * off, jnp.float32(2.0)


def known_target(batches=(1.0,)):
    given = as_trees()
    arrays = {path: sum(c * given[name][path] for c, name in zip(TARGET[path], NAMES, strict=True)) for path in TARGET}
    return Objective((Term("known", distance, arrays, [jnp.float32(x) for x in batches]),))


@pytest.mark.parametrize("given", [pairs(), as_trees()], ids=["pairs", "trees"])
def test_layer_coefficients_are_found(given):
    reports = []
    method = fusion.atlas(known_target(), steps=400, learning_rate=3e-2, report=reports.append)
    fused = pf.fuse(method, given)
    (found,) = reports
    assert found.losses.shape == (400,) and found.losses[-1] < 1e-4 * found.losses[0]
    for path, expected in TARGET.items():
        np.testing.assert_allclose([found.coefficients[path][name] for name in NAMES], expected, atol=0.02)
    if isinstance(fused, Delta):
        assert {path: change.rank for path, change in fused.leaves.items()} == dict.fromkeys(TARGET, 3)  # still pairs
    # What was found, without the search; and the search again: the same bits.
    for again in (pf.fuse(found.fusion, given), pf.fuse(method, dict(reversed(given.items())))):
        jax.tree.map(np.testing.assert_array_equal, again, fused)


def test_first_steps_equal_optax_and_numpy():
    """Three steps of Adam on three different batches, from gradients written by hand."""
    given, objective, reports = as_trees(), known_target((1.0, 2.0, 0.5)), []
    pf.fuse(fusion.adamerging(objective, layerwise=False, steps=3, learning_rate=0.1, report=reports.append), given)
    a, b = (np.concatenate([np.asarray(given[name][path], np.float64).ravel() for path in TARGET]) for name in NAMES)
    arrays = objective.terms[0].arrays
    want = np.concatenate([np.asarray(arrays[path], np.float64).ravel() for path in TARGET])
    point, optimizer = jnp.full((1, 2), 0.3), optax.adam(0.1)
    state, losses = optimizer.init(point), []
    for scale in (1.0, 2.0, 0.5):
        off = float(point[0, 0]) * a + float(point[0, 1]) * b - want
        losses.append(scale * off @ off / 2)
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.update(jnp.asarray([[scale * off @ a, scale * off @ b]], jnp.float32), state)
        point = jnp.clip(point + update, 0.0, 1.0)
    np.testing.assert_allclose(reports[0].losses, losses, rtol=1e-4)
    np.testing.assert_allclose(list(reports[0].coefficients["all"].values()), point[0], rtol=1e-4, atol=1e-6)


def test_groups_bounds_and_starts():
    given, reports = pairs(), []
    pf.fuse(fusion.lora_soups(known_target(), steps=0, report=reports.append), given)
    assert reports[0].coefficients == {f"enc/layer/{i}": {"a": 0.5, "b": 0.5} for i in (0, 1)}
    pf.fuse(fusion.adamerging(known_target(), steps=60, learning_rate=0.05, report=reports.append), given)
    values = np.array([list(row.values()) for row in reports[1].coefficients.values()])
    assert values.min() == 0.0 and values.max() <= 1.0 and set(reports[1].coefficients) == set(TARGET)
    # One tree, at coefficient 1 and without a step, comes back bit for bit.
    one = {"a": given["a"]}
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(fusion.atlas(known_target(), steps=0, start=1.0), one), one["a"])
    assert fusion.by_layer("encoder/block/3/layer/0/q") == "encoder/block/3" and fusion.by_layer("pooler/kernel") == "pooler"


def test_per_group():
    given = pairs()
    table = {path: dict(zip(NAMES, values, strict=True)) for path, values in TARGET.items()}
    for trees in (given, as_trees()):
        fused = pf.fuse(fusion.per_group(table, fusion.by_tensor), trees)
        for path, want in known_target().terms[0].arrays.items():
            np.testing.assert_allclose(
                dense((fused.leaves if isinstance(fused, Delta) else fused)[path]), want, rtol=1e-5, atol=1e-6
            )
    with pytest.raises(ValueError, match="no coefficients for 'enc/layer/0'"):
        pf.fuse(fusion.per_group(table), given)
    with pytest.raises(ValueError, match="coefficients for a, b, but the trees are a"):
        pf.fuse(fusion.per_group(table), {"a": given["a"]})
    with pytest.raises(ValueError, match="no coefficients"):
        fusion.per_group({})


def test_lorahub_finds_the_task_coefficients():
    given, reports = pairs(), []
    method = fusion.lorahub(known_target((1.0, 2.0)), budget=60, l1=0.02, report=reports.append)
    fused = pf.fuse(method, given)
    found = reports[0]
    arrays = known_target().terms[0].arrays
    dense_trees = as_trees()

    def cost(c):
        off = [
            sum(x * np.asarray(dense_trees[n][p], np.float64) for x, n in zip(c, NAMES, strict=True)) - arrays[p]
            for p in TARGET
        ]
        return 3.0 * sum(np.sum(np.square(o)) for o in off) / 4 + 0.02 * np.mean(np.abs(c))  # all batches count

    best = scipy.optimize.minimize(cost, [0.1, 0.1], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    point = [found.coefficients["all"][name] for name in NAMES]
    assert len(found.losses) == 60 and found.losses[0] == pytest.approx(cost([0, 0]), rel=1e-5)  # starts at the base model
    assert min(found.losses) == pytest.approx(cost(point), rel=1e-4)
    np.testing.assert_allclose(point, best.x, atol=0.05)
    assert all(change.rank == 3 for change in fused.leaves.values())
    jax.tree.map(np.testing.assert_array_equal, pf.fuse(method, given), fused)
    pf.fuse(fusion.lorahub(known_target(), budget=12, bound=0.1, report=reports.append), {"a": given["a"]})
    assert abs(reports[-1].coefficients["all"]["a"]) <= np.float32(0.1)


def test_lorahub_without_nevergrad(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ImportError, match=r"pip install 'pefusion-jax\[search\]'"):
        pf.fuse(fusion.lorahub(known_target()), pairs())


class Layers(nn.Module):
    """Two layers, stacked by a scan."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return {"hidden": stack(name="layer")(x, None)[0]}


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(4, name="dense")(x)), None


def hidden(outputs, inputs):
    return outputs["hidden"]


def encode(examples):
    return {"x": np.stack([example["x"] for example in examples])}


def task(name, seed, size=11, **options):
    rng = np.random.default_rng(seed)
    examples = [{"x": rng.normal(size=4).astype(np.float32), "label": int(rng.integers(3))} for _ in range(size)]
    kernel = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    head = Head({"kernel": kernel, "bias": jnp.asarray([0, 0, 0, -1e9, -1e9], jnp.float32)}, hidden, linear_logits)
    settings = {"classes": ("p", "q", "r"), "loss": cross_entropy} | options
    return Task(name, settings["classes"], examples, examples, [], encode, head, accuracy, settings["loss"])


TASKS = [task("a", 1), task("b", 2, size=6)]


@functools.cache
def real_model():
    model = Layers()
    params = model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    lora = pf.adapt(model, pf.LoRA(rank=2, targets=r".*dense"))
    rng = np.random.default_rng(3)
    phi0 = lora.init(jax.random.key(1), params, x=jnp.zeros((1, 4)))
    trees = {
        n: jax.tree.map(lambda leaf: leaf + jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), phi0) for n in NAMES
    }
    return lora, params, phi0, trees


def mean_loss(lora, params, fused, kind, tasks=TASKS):
    total = 0.0
    for each in tasks:
        batch = each.batch(each.validation)
        delta = isinstance(fused, Delta)
        outputs = (lora.apply_deltas if delta else lora.apply)(params, fused, **batch["inputs"])
        logits = np.asarray(linear_logits(each.head.params, outputs["hidden"]), np.float64)[:, :3]
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        labels = batch["labels"]
        total -= np.mean(np.sum(np.exp(log_p) * log_p, 1) if kind == "entropy" else log_p[np.arange(len(labels)), labels])
    return total / len(tasks)


@pytest.mark.parametrize("kind", ["cross_entropy", "entropy"])
def test_a_real_scanned_model(kind):
    lora, params, _, trees = real_model()
    objective, reports = fusion.objective(lora, params, TASKS, kind, batch_size=16), []
    assert len({term.function for term in objective.terms}) == 1  # one program for both tasks
    method = fusion.atlas(objective, groups=fusion.by_layer, steps=25, learning_rate=0.05, start=0.3, report=reports.append)
    fused = pf.fuse(method, trees, adapted=lora, params=params)
    found = reports[0]
    assert set(found.coefficients) == {"layer/0", "layer/1"}  # scanned layers have coefficients of their own
    start = pf.fuse(fusion.task_arithmetic(0.3), trees, adapted=lora, params=params)
    assert found.losses[0] == pytest.approx(mean_loss(lora, params, start, kind), rel=1e-4)
    assert mean_loss(lora, params, fused, kind) < found.losses[0] - 0.01
    assert fused.leaves["layer/dense/kernel"].rank == 4
    # Batches that are not full weigh examples right.
    small = fusion.objective(lora, params, TASKS, kind, batch_size=4)
    assert [len(term.batches) for term in small.terms] == [3, 2]
    pf.fuse(fusion.lorahub(small, budget=1, l1=0.0, report=reports.append), trees, adapted=lora, params=params)
    base = Delta({path: 0.0 * change for path, change in start.dense().leaves.items()})
    assert reports[1].losses[0] == pytest.approx(mean_loss(lora, params, base, kind), rel=1e-4)


def test_adapter_space_with_its_start():
    lora, params, phi0, trees = real_model()
    reports = []
    method = fusion.adamerging(
        fusion.objective(lora, params, TASKS, init=phi0, batch_size=16), layerwise=False, steps=2, report=reports.append
    )
    pf.fuse(method, trees, space="adapter", init=phi0)
    start = pf.fuse(fusion.task_arithmetic(0.3), trees, space="adapter", init=phi0)
    assert reports[0].losses[0] == pytest.approx(mean_loss(lora, params, start, "cross_entropy"), rel=1e-4)
    with pytest.raises(ValueError, match="space='adapter', but weight changes"):
        pf.fuse(method, trees, adapted=lora, params=params)


def test_few_examples():
    lora, params, _, _ = real_model()
    objective = fusion.objective(lora, params, TASKS, split="train", batch_size=2, examples=3)
    for term in objective.terms:
        assert len(term.batches) == 2
        weights = np.concatenate([batch["weights"] for batch in term.batches])
        np.testing.assert_array_equal(weights, [1, 1, 1, 0])
    again = fusion.objective(lora, params, TASKS, split="train", batch_size=2, examples=3)
    other = fusion.objective(lora, params, TASKS, split="train", batch_size=2, examples=3, seed=1)
    xs = [np.concatenate([b["inputs"]["x"] for b in o.terms[0].batches]) for o in (objective, again, other)]
    np.testing.assert_array_equal(xs[0], xs[1])
    assert np.abs(xs[0] - xs[2]).max() > 0


def test_errors():
    lora, params, _, _ = real_model()
    with pytest.raises(ValueError, match="kind='accuracy'"):
        fusion.objective(lora, params, TASKS, "accuracy")
    with pytest.raises(ValueError, match="no tasks were given"):
        fusion.objective(lora, params, [])
    with pytest.raises(ValueError, match="two tasks are named 'a'"):
        fusion.objective(lora, params, [TASKS[0], TASKS[0]])
    with pytest.raises(ValueError, match="'r' is a regression"):
        fusion.objective(lora, params, [task("r", 1, classes=(), loss=squared_error)], "entropy")
    with pytest.raises(ValueError, match="no test examples"):
        fusion.objective(lora, params, TASKS, split="test")
    with pytest.raises(ValueError, match="batch_size=0"):
        fusion.objective(lora, params, TASKS, batch_size=0)
    with pytest.raises(ValueError, match="cannot run under jit"):
        jax.jit(lambda trees: pf.fuse(fusion.atlas(known_target()), trees))(as_trees())
    with pytest.raises(ValueError, match="losses of 3 that are not finite"):
        pf.fuse(fusion.atlas(known_target((np.nan,)), steps=3), as_trees())
    with pytest.raises(ValueError, match="steps=-1"):
        fusion.atlas(known_target(), steps=-1)
    with pytest.raises(ValueError, match="budget=0"):
        fusion.lorahub(known_target(), budget=0)
