"""Exact sweeps: every point equals the model run at that point, and nothing but T + 1 passes is paid."""

import evaluation_fakes as fakes
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.evaluation import (
    best_coefficients,
    cache_outputs,
    evaluate,
    subset_grid,
    sweep,
    sweep_trees,
)
from pefusion_jax.tasks.metrics import macro_f1

TASKS = [fakes.task("p", 1), fakes.task("q", 2, size=31), fakes.task("f1", 3, metric=macro_f1)]
TAUS = {name: fakes.tau(seed) for seed, name in enumerate(["z", "x", "y"])}


def fused(point):
    return fusion.fuse(fusion.task_arithmetic(point), TAUS)


def test_subset_grid():
    np.testing.assert_array_equal(
        subset_grid(2, [0.5, 1.0]),
        np.array([[0.5, 0], [1, 0], [0, 0.5], [0, 1], [0.5, 0.5], [1, 1]], np.float32),
    )
    assert subset_grid(4, np.linspace(0, 1, 21)).shape == (15 * 21, 4)
    with pytest.raises(ValueError, match="at least one"):
        subset_grid(0, [1.0])


def test_every_point_is_exact():
    model, params = fakes.Model(), fakes.params()
    grid = subset_grid(3, [0.0, 0.3, 1.0])
    cached = cache_outputs(model, params, TAUS, TASKS, batch_size=8)
    scores = sweep(cached, TASKS, grid)
    assert cached.names == ("x", "y", "z") and scores.shape == (21, 3)
    assert len(np.unique(scores[:, 0])) > 3  # the coefficients matter
    for point, row in zip(grid, scores, strict=True):
        tangent = sum(c * np.asarray(TAUS[name]["kernel"]) for c, name in zip(point, cached.names, strict=True))
        for task, score in zip(TASKS, row, strict=True):
            logits = fakes.numpy_logits(task, "validation", params["kernel"], tangent)
            assert score == pytest.approx(task.metric(logits, fakes.labels(task, "validation")), abs=1e-12)
    # The ordinary way says the same.
    np.testing.assert_allclose(sweep_trees(model, params, fused, grid[::5], TASKS), scores[::5], atol=1e-12)
    # Order and choice of tasks are the caller's.
    np.testing.assert_array_equal(sweep(cached, TASKS[::-2], grid), scores[:, ::-2])


def test_cached_features_are_the_linear_part():
    params = fakes.params()
    cached = cache_outputs(fakes.Model(), params, TAUS, TASKS[:1], batch_size=8)
    inputs = fakes.encode(TASKS[0].validation)
    x, mask = inputs["x"].astype(np.float64), inputs["mask"].astype(np.float64)
    slope = 1 - np.tanh(x @ np.asarray(params["kernel"], np.float64)) ** 2
    for t, name in enumerate(cached.names):
        hidden = slope * (x @ np.asarray(TAUS[name]["kernel"], np.float64))
        expected = (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]  # without the features' constant
        np.testing.assert_allclose(cached.moved["p"][t], expected, rtol=1e-4, atol=1e-5)


def test_it_costs_one_pushforward_a_batch_and_nothing_after():
    model = fakes.Model()
    cached = cache_outputs(model, fakes.params(), TAUS, TASKS, batch_size=8)
    assert cached.batches == 3 + 4 + 3 and cached.forwards == 3 * (3 + 1)
    assert model.ran_counts() == {"pushforward": cached.batches} and model.traces == ["pushforward"]
    sweep(cached, TASKS, subset_grid(3, np.linspace(0, 1, 21)))
    assert model.ran_counts() == {"pushforward": cached.batches} and model.traces == ["pushforward"]


def test_ordinary_sweep_compiles_once():
    model = fakes.Model(affine=False)
    grid = subset_grid(3, [0.5])
    scores = sweep_trees(model, fakes.params(), fused, grid, TASKS, batch_size=8)
    assert model.traces == ["apply"] and model.ran_counts() == {"apply": len(grid) * 10}
    expected = evaluate(model, fakes.params(), fused(grid[2]), TASKS, split="validation")
    np.testing.assert_allclose(scores[2], list(expected.values()))


def test_chunks_do_not_change_the_scores():
    cached = cache_outputs(fakes.Model(), fakes.params(), TAUS, TASKS)
    grid = subset_grid(3, np.linspace(0, 1, 5))
    whole = sweep(cached, TASKS, grid)
    for chunk in (1, 4, 1000):
        np.testing.assert_array_equal(sweep(cached, TASKS, grid, chunk=chunk), whole)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        hidden = nn.gelu(nn.Dense(8, name="up")(x))
        return {"hidden": x + nn.Dense(fakes.WIDTH, name="down")(hidden * mask[:, :, None])}


@pytest.mark.parametrize("mode", ["network", "weight"])
def test_a_real_linearized_model(mode):
    model, tasks = Encoder(), TASKS[:2]
    inputs = fakes.encode(tasks[0].test[:2])
    params = model.init(jax.random.key(0), **inputs)["params"]
    lora = pf.adapt(model, pf.LoRA(rank=2, targets=r"up|down"))
    phi0 = lora.init(jax.random.key(1), params, **inputs)
    linear = pf.linearize(lora, phi0, mode=mode)
    zero = linear.init(jax.random.key(0), params, **inputs)
    rng = np.random.default_rng(0)
    taus = {name: jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), zero) for name in "abc"}
    cached = cache_outputs(linear, params, taus, tasks, batch_size=16)
    grid = np.array([[0, 0, 0], [1, 0, 0], [0.3, 0.3, 0.3], [1, -1, 0.5]], np.float32)
    scores = sweep(cached, tasks, grid)

    def fuse(point):
        # In weight mode the tree is not what the model is affine in, the change of weights is.
        where = {} if mode == "network" else {"adapted": linear, "params": params}
        return fusion.fuse(fusion.task_arithmetic(point), taus, **where)

    np.testing.assert_allclose(scores, sweep_trees(linear, params, fuse, grid, tasks), atol=1e-12)
    assert len(np.unique(scores)) > 3


def test_best_coefficients():
    grid = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    scores = np.array([[0.1, 0.1], [0.9, 0.2], [0.6, 0.5], [0.6, 0.5]])
    # Of equal means the smaller coefficients win: rows 1, 2 and 3 all have the mean 0.55.
    best = best_coefficients(grid, scores)
    assert best.point == 1 and best.score == pytest.approx(0.55)
    assert best_coefficients(grid[2:], scores[2:]).point == 0
    # Relative to what each task can reach, the second task counts more.
    best = best_coefficients(grid, scores, [0.9, 0.5])
    assert best.point == 2 and best.score == pytest.approx((0.6 / 0.9 + 1) / 2)
    np.testing.assert_array_equal(best.coefficients, np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="columns of scores have no names"):
        best_coefficients(grid, scores, {"q": 0.5, "p": 0.9})
    for bad in ([0.0, 1.0], [1.0]):
        with pytest.raises(ValueError, match="reference scores must be positive"):
            best_coefficients(grid, scores, bad)
    with pytest.raises(ValueError, match="not finite"):
        best_coefficients(grid, np.where(scores == 0.9, np.nan, scores))
    with pytest.raises(ValueError, match="same number of points"):
        best_coefficients(grid, scores[:2])


@pytest.mark.parametrize("features", [fakes.cosine_features, fakes.rectified_features])
def test_non_linear_features_are_refused(features):
    with pytest.raises(ValueError, match="'p': its head's features are not finite or not linear"):
        cache_outputs(fakes.Model(), fakes.params(), TAUS, [fakes.task("p", 1, features=features)])


def test_errors():
    params = fakes.params()
    with pytest.raises(ValueError, match="not affine.*sweep_trees"):
        cache_outputs(fakes.Model(affine=False), params, TAUS, TASKS)
    with pytest.raises(ValueError, match="no validation examples"):
        cache_outputs(fakes.Model(), params, TAUS, [fakes.task("p", 1, size=0)])
    cached = cache_outputs(fakes.Model(), params, TAUS, TASKS[:1])
    with pytest.raises(ValueError, match=r"\[point, 3\].*x, y, z"):
        sweep(cached, TASKS[:1], [[0.1, 0.2]])
    with pytest.raises(ValueError, match="no outputs are cached for 'q'"):
        sweep(cached, TASKS, subset_grid(3, [1.0]))
    with pytest.raises(ValueError, match="finite"):
        sweep(cached, TASKS[:1], [[np.nan, 0.0, 0.0]])
    with pytest.raises(ValueError, match="point, k"):
        sweep_trees(fakes.Model(), params, fused, np.zeros((0, 3)), TASKS)


def test_logits_that_are_not_numbers_are_refused_as_evaluate_refuses_them():
    model, params = fakes.Model(), fakes.params()
    cached = cache_outputs(model, params, TAUS, TASKS)
    far = np.float32([3e38, 3e38, 3e38])  # features are infinite, cosines are not numbers
    for task in TASKS:  # accuracies are counted on the device, other metrics are not
        with pytest.raises(ValueError, match="logits of .* examples are not numbers"):
            evaluate(model, params, fused(far), [task], split="validation")
        with pytest.raises(ValueError, match="logits of .* examples are not numbers"):
            sweep(cached, [task], [[0.5, 0.5, 0.5], far], chunk=1)
    with pytest.raises(ValueError, match=r"'p': .* of 23 examples .* at the coefficients \[[23][.0-9]*e\+38, .*smaller"):
        sweep(cached, TASKS, [[0.5, 0.5, 0.5], far])
    with pytest.raises(ValueError, match="point, k"):
        sweep_trees(fakes.Model(), params, fused, np.zeros((0, 3)), TASKS)
