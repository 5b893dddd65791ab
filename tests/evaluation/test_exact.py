"""Exact fusion: solutions and their certificates against SciPy on the model written once more in NumPy and float64."""

import dataclasses

import evaluation_fakes as fakes
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.evaluation import (
    best_combination,
    cache_groups,
    cache_outputs,
    evaluate,
    fits,
    predict,
    solve_coefficients,
    solve_subsets,
    subset_grid,
    sweep,
)
from pefusion_jax.evaluation.newton import frank_wolfe_gap, minimise, project
from pefusion_jax.tasks.heads import linear_logits
from pefusion_jax.tasks.metrics import pearson, squared_error
from pefusion_jax.tasks.task import Head

PARAMS = fakes.params()


def linear_task(name, seed, **options):
    """A task whose logits are linear in the features; the last two of five classes are padding."""
    made = fakes.task(name, seed, **options)
    kernel = jnp.asarray(2.0 * np.random.default_rng(50 + seed).normal(size=(fakes.WIDTH, 5)), jnp.float32)
    head = Head({"kernel": kernel, "bias": made.head.params["bias"]}, fakes.features, linear_logits)
    return dataclasses.replace(made, head=head)


TASKS = [linear_task("x", 1, size=40), linear_task("y", 2, size=31), linear_task("z", 3)]
TAUS = {name: fakes.tau(seed) for seed, name in enumerate("zxy")}
CACHED = cache_outputs(fakes.Model(), PARAMS, TAUS, TASKS)


def pooled(task, name=None):
    """Features of the base model, or those along one displacement, in NumPy."""
    inputs = fakes.encode(task.validation)
    x, mask = inputs["x"].astype(np.float64), inputs["mask"].astype(np.float64)
    hidden = np.tanh(x @ np.asarray(PARAMS["kernel"], np.float64))
    if name is not None:
        hidden = (1 - hidden**2) * (x @ np.asarray(TAUS[name]["kernel"], np.float64))
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None] + (0.25 if name is None else 0.0)


def numpy_loss(c, tasks=TASKS, l2=0.0, center=0.0):
    total = 0.0
    for task in tasks:
        features = pooled(task) + sum(value * pooled(task, name) for value, name in zip(c, "xyz", strict=True))
        kernel = np.asarray(task.head.params["kernel"], np.float64)
        if task.classes:
            logits = (features @ kernel + np.asarray(task.head.params["bias"]))[:, :3]
            picked = logits[np.arange(len(logits)), fakes.labels(task, "validation")]
            total += np.mean(np.log(np.exp(logits).sum(1)) - picked)
        else:
            total += np.mean((features @ kernel[:, 0] - fakes.labels(task, "validation")) ** 2)
    return total / len(tasks) + l2 / 2 * np.sum((np.asarray(c) - center) ** 2)


REGRESSION = [*TASKS[:2], dataclasses.replace(linear_task("z", 5, classes=(), metric=pearson), loss=squared_error)]


@pytest.mark.parametrize(("l2", "center"), [(0.0, 0.0), (1e-3, 0.0), (0.3, 0.5)])
@pytest.mark.parametrize("tasks", [TASKS, REGRESSION], ids=["classes", "regression"])
def test_cross_entropy_is_solved_and_certified(tasks, l2, center):
    cached = CACHED if tasks is TASKS else cache_outputs(fakes.Model(), PARAMS, TAUS, tasks)
    solution = solve_coefficients(cached, tasks, l2=l2, center=center)
    best = scipy.optimize.minimize(numpy_loss, np.zeros(3), args=(tasks, l2, center), tol=1e-10)
    assert solution.names == ("x", "y", "z") and solution.gap <= 1e-6
    np.testing.assert_allclose(solution.objective, best.fun, atol=1e-5)
    np.testing.assert_allclose(numpy_loss(solution.coefficients, tasks, l2, center), solution.objective, atol=1e-5)
    np.testing.assert_allclose(solution.loss, numpy_loss(solution.coefficients, tasks), atol=1e-5)
    np.testing.assert_allclose(solution.coefficients, best.x, atol=2e-3)
    # The same wherever it starts: the problem is convex.
    again = solve_coefficients(cached, tasks, l2=l2, center=center, start=[3.0, -2.0, 1.0])
    np.testing.assert_allclose(again.coefficients, solution.coefficients, atol=1e-3)


@pytest.mark.parametrize(("l2", "simplex"), [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_the_gap_bounds_the_distance_to_the_optimum(l2, simplex):
    """Stopped early, the certificate must still hold: not less than what was left to gain, and not vacuous."""
    limits = {"bounds": [(0, 1)] * 3, "constraints": {"type": "eq", "fun": lambda c: c.sum() - 1}} if simplex else {}
    best = scipy.optimize.minimize(numpy_loss, np.full(3, 1 / 3), args=(TASKS, l2, 0.0), tol=1e-12, **limits)
    gaps = []
    for tolerance in (1e3, 10.0, 0.5, 1e-2, 1e-8):
        found = solve_coefficients(CACHED, TASKS, l2=l2, simplex=simplex, tolerance=tolerance, start=[0.8, 0.1, 0.1])
        assert found.objective - best.fun <= found.gap + 1e-6
        assert found.gap <= tolerance
        gaps.append(found.gap)
        if simplex:
            assert found.coefficients.min() >= 0 and found.coefficients.sum() == pytest.approx(1)
    assert gaps[-1] < 1e-8 < gaps[0]
    np.testing.assert_allclose(found.objective, best.fun, atol=1e-5)


def test_least_squares_is_the_closed_form():
    rows, targets = [], []
    for task in TASKS:
        along = np.stack([pooled(task, name).ravel() for name in "xyz"], axis=1)
        own = along[:, "xyz".index(task.name)]
        rows.append(along / np.linalg.norm(own))
        targets.append(own / np.linalg.norm(own))
    a, b = np.concatenate(rows), np.concatenate(targets)
    for l2 in (0.0, 0.2):
        expected = np.linalg.solve(a.T @ a / 3 + l2 / 2 * np.eye(3), a.T @ b / 3)
        solution = solve_coefficients(CACHED, TASKS, loss="least_squares", l2=l2)
        np.testing.assert_allclose(solution.coefficients, expected, atol=1e-4)
        np.testing.assert_allclose(solution.loss, np.sum((a @ expected - b) ** 2) / 3, atol=1e-5)
        assert solution.gap <= 1e-6 and solution.iterations <= 2
    # Convex with any head, as it does not look at logits.
    cosine = [fakes.task(name, seed) for seed, name in enumerate("xyz")]
    assert solve_coefficients(cache_outputs(fakes.Model(), PARAMS, TAUS, cosine), cosine, loss="least_squares").gap <= 1e-6


@pytest.mark.parametrize("loss", ["cross_entropy", "entropy"])
def test_without_convexity_a_local_minimum_and_no_certificate(loss):
    tasks = [fakes.task("x", 1), fakes.task("y", 2, size=31)]
    cached = cache_outputs(fakes.Model(), PARAMS, TAUS, tasks)
    start = np.array([0.3, 0.1, -0.2])

    def reference(c):
        total = 0.0
        for task in tasks:
            tangent = sum(value * np.asarray(TAUS[name]["kernel"]) for value, name in zip(c, "xyz", strict=True))
            logits = fakes.numpy_logits(task, "validation", PARAMS["kernel"], tangent)[:, :3]
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            picked = log_p[np.arange(len(log_p)), fakes.labels(task, "validation")]
            total -= np.mean(picked if loss == "cross_entropy" else np.sum(np.exp(log_p) * log_p, axis=1))
        return total / 2 + 0.05 / 2 * np.sum(np.square(c))

    solution = solve_coefficients(cached, tasks, loss=loss, l2=0.05, start=start)
    assert solution.gap is None and solution.iterations > 0
    np.testing.assert_allclose(solution.objective, reference(solution.coefficients), atol=1e-5)
    assert solution.objective < reference(start) - 1e-3
    slope = scipy.optimize.approx_fprime(solution.coefficients, reference, 1e-6)
    assert np.abs(slope).max() < 1e-3
    # Linear logits do not make an entropy convex.
    assert solve_coefficients(CACHED, TASKS, loss="entropy", l2=0.05).gap is None


class Stacked(nn.Module):
    """Two numbered layers."""

    @nn.compact
    def __call__(self, x, mask):
        for i in range(2):
            x = x + nn.tanh(nn.Dense(fakes.WIDTH, name=f"layer_{i}")(x)) * mask[:, :, None]
        return {"hidden": x}


def layer(path):
    return path.split("/")[0]


@pytest.mark.parametrize("mode", ["network", "weight"])
def test_coefficients_for_each_layer(mode):
    model, tasks = Stacked(), [dataclasses.replace(task, head=TASKS[0].head) for task in TASKS[:2]]
    inputs = fakes.encode(tasks[0].test[:2])
    params = model.init(jax.random.key(0), **inputs)["params"]
    lora = pf.adapt(model, pf.LoRA(rank=2, targets="layer_."))
    linear = pf.linearize(lora, lora.init(jax.random.key(1), params, **inputs), mode)
    rng = np.random.default_rng(0)
    zero = linear.init(jax.random.key(0), params, **inputs)
    taus = {name: jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), zero) for name in "yx"}
    grouped = cache_groups(linear, params, taus, tasks, layer, at_once=3)
    assert grouped.groups == ("layer_0", "layer_1") and grouped.names == ("x", "y")
    assert grouped.cached.names == ("layer_0:x", "layer_0:y", "layer_1:x", "layer_1:y")
    # The fused model has the features that the cache promises.
    c = np.array([0.5, -1.0, 2.0, 0.25], np.float32)
    where = {} if mode == "network" else {"adapted": linear, "params": params}
    tree = fusion.fuse(grouped.fusion(c), taus, **where)
    for task in tasks:
        features, _ = predict(linear, params, tree, task, split="validation")
        promised = grouped.cached.base[task.name] + np.einsum("j,jnd->nd", c, grouped.cached.moved[task.name])
        np.testing.assert_allclose(features, promised, rtol=1e-4, atol=1e-4)
    solution = solve_coefficients(grouped, tasks, l2=1e-2)
    assert solution.gap <= 1e-4 and solution.names == grouped.cached.names
    # More freedom, no higher loss.
    shared = solve_coefficients(cache_outputs(linear, params, taus, tasks), tasks, l2=0.0)
    assert solve_coefficients(grouped, tasks, l2=0.0).loss <= shared.loss + 1e-6
    rows = solve_coefficients(grouped, tasks, simplex=True).coefficients.reshape(2, 2)
    np.testing.assert_allclose(rows.sum(1), 1.0)
    # Both layers at 1 for the task's own displacement would give its own outputs.
    assert solve_coefficients(grouped, tasks[:1], loss="least_squares", l2=0.0).loss == pytest.approx(0.0, abs=1e-6)
    if mode == "weight":
        with pytest.raises(ValueError, match="'layer_0' are in two groups"):
            cache_groups(linear, params, taus, tasks, lambda path: path)


def test_every_subset_from_one_cache():
    subsets = solve_subsets(CACHED, TASKS, l2=1e-2)
    assert [len(names) for names in subsets.members] == [1, 1, 1, 2, 2, 2, 3] and subsets.tasks == ("x", "y", "z")
    for names, solution, row in zip(subsets.members, subsets.solutions, subsets.scores, strict=True):
        assert solution.gap <= 1e-4
        assert {n for n, c in solution.by_name().items() if c} == set(names)
        own = [task for task in TASKS if task.name in names]
        free = ["xyz".index(name) for name in names]

        def loss(c, free=free, own=own):
            return numpy_loss(np.bincount(free, c, minlength=3), own, 1e-2)

        best = scipy.optimize.minimize(loss, np.zeros(len(names)))
        np.testing.assert_allclose(solution.objective, best.fun, atol=1e-5)
        np.testing.assert_array_equal(row, sweep(CACHED, TASKS, solution.coefficients[None])[0])
    table = str(subsets.comparison({"x": 1.0, "y": 1.0, "z": 1.0}))
    assert "x + y + z" in table and "3 adapters" in table
    alone = solve_subsets(CACHED, TASKS, sizes=[2], over="all").solutions[0]
    assert alone.objective == pytest.approx(solve_coefficients(CACHED, TASKS, members=["x", "y"]).objective)


@pytest.mark.parametrize("reference", [None, {"x": 0.9, "y": 0.5, "z": 0.7}])
def test_best_combination_is_never_worse_than_the_grid(reference):
    won, batches, model = 0, 0, fakes.Model()
    for seed in range(4):
        tasks = [linear_task(name, 10 * seed + i, size=31) for i, name in enumerate("xyz")]
        cached = cache_outputs(model, PARAMS, TAUS, tasks)
        best = best_combination(cached, tasks, losses=("cross_entropy", "least_squares"), reference=reference)
        uniform = np.linspace(0, 1, 21)[:, None] * np.ones((1, 3))
        scores = sweep(cached, tasks, uniform) / np.array(list(reference.values()) if reference else [1.0])
        assert best.grid_score == pytest.approx(scores.mean(1).max()) and best.score >= best.grid_score
        assert all(solution.gap <= 1e-4 for solution in best.solutions.values()) and len(best.solutions) == 8
        won += best.score > best.grid_score
        batches += cached.batches
        assert model.ran_counts()["pushforward"] == batches and model.ran.count("apply") == 3 * seed  # nothing more was run
        tree = fusion.fuse(fusion.task_arithmetic(best.by_name()), TAUS)
        real = evaluate(model, PARAMS, tree, tasks, split="validation")
        assert (real.normalized(reference) if reference else real).mean == pytest.approx(best.score)
    assert won
    # With a grid that no solution can beat, its point is what comes back.
    tasks = [linear_task(name, 7 + i, size=5) for i, name in enumerate("xyz")]
    cached = cache_outputs(fakes.Model(), PARAMS, TAUS, tasks)
    grid = subset_grid(3, np.linspace(-3, 3, 13))
    best = best_combination(cached, tasks, l2=(1e6,), grid=grid)
    assert best.source == "grid" and best.score == sweep(cached, tasks, grid).mean(1).max()


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
@pytest.mark.parametrize("radius", [1e-6, 100.0])
def test_what_the_gap_is_against(radius, l2):
    found = solve_coefficients(CACHED, TASKS, l2=l2, radius=radius, tolerance=1e-3)
    best = solve_coefficients(CACHED, TASKS, l2=l2, tolerance=1e-14)
    everywhere = found.gap <= 2 * l2 * radius**2
    assert everywhere == (radius == 100.0)
    if everywhere:
        assert found.objective - best.objective <= found.gap + 1e-12
    else:  # the minimum is farther away, and lower
        assert np.linalg.norm(found.coefficients - best.coefficients) > radius
        assert found.objective - best.objective > found.gap


def test_features_go_to_the_device_once(monkeypatch):
    tasks = [fakes.task("x", 1), fakes.task("y", 2, size=31)]
    cached = cache_outputs(fakes.Model(), PARAMS, TAUS, tasks)
    seen = []
    for name in ("_at", "_expanded_at"):
        made = getattr(fits, name)
        monkeypatch.setattr(fits, name, lambda logits, made=made: lambda h, *f: (seen.append(f[:2]), made(logits)(h, *f))[1])
    solve_coefficients(cached, tasks)
    assert len(seen) > 4 and len({id(array) for pair in seen for array in pair}) == 4
    assert all(isinstance(array, jax.Array) for pair in seen for array in pair)


def test_references_by_name_are_taken_by_name():
    reference = {"x": 0.1, "y": 0.5, "z": 0.9}
    wanted = best_combination(CACHED, TASKS, reference=list(reference.values()))
    found = best_combination(CACHED, TASKS, reference=dict(reversed(reference.items())))
    assert found.score == wanted.score and found.grid_score == wanted.grid_score
    with pytest.raises(ValueError, match="reference has scores of x, w; give one for each of x, y, z"):
        best_combination(CACHED, TASKS, reference={"x": 0.1, "w": 0.5})


def test_simplices():
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = 2 * rng.normal(size=6)
        ours = project(point, 2)
        assert ours.min() >= 0 and np.allclose(ours.reshape(2, 3).sum(1), 1)
        others = rng.dirichlet(np.ones(3), size=(200, 2)).reshape(200, 6)
        assert np.sum((ours - point) ** 2) <= np.sum((others - point) ** 2, axis=1).min()
        assert frank_wolfe_gap(ours, rng.normal(size=6), 2) >= 0
    # A linear function: the minimum is a vertex, and the gap there is 0.
    slope = np.array([1.0, -1.0, 0.5])
    found = minimise(lambda c: slope @ c, lambda c: (slope @ c, slope, np.zeros((3, 3))), np.zeros(3), blocks=1)
    np.testing.assert_allclose(found.point, [0, 1, 0], atol=1e-6)
    assert found.bound < 1e-6


def test_errors():
    with pytest.raises(ValueError, match="no outputs are cached for 'q'"):
        solve_coefficients(CACHED, [linear_task("q", 1)])
    with pytest.raises(ValueError, match="loss='accuracy' must be"):
        solve_coefficients(CACHED, TASKS, loss="accuracy")
    with pytest.raises(ValueError, match="members=.*some of the displacements x, y, z"):
        solve_coefficients(CACHED, TASKS, members=["w"])
    with pytest.raises(ValueError, match="needed are 3 finite"):
        solve_coefficients(CACHED, TASKS, start=[1.0])
    with pytest.raises(ValueError, match="l2=-1"):
        solve_coefficients(CACHED, TASKS, l2=-1)
    with pytest.raises(ValueError, match="is a regression"):
        cached = cache_outputs(fakes.Model(), PARAMS, TAUS, REGRESSION)
        solve_coefficients(cached, REGRESSION, loss="entropy")
    with pytest.raises(ValueError, match="has a loss of its own"):
        solve_coefficients(CACHED, [dataclasses.replace(TASKS[0], loss=lambda z, y: z[:, 0])])
    other = cache_outputs(fakes.Model(), PARAMS, {"a": TAUS["x"]}, TASKS[:1])
    with pytest.raises(ValueError, match="no displacement is named 'x'"):
        solve_coefficients(other, TASKS[:1], loss="least_squares")
    still = CACHED._replace(moved=CACHED.moved | {"y": CACHED.moved["y"] * np.float32([1, 0, 1])[:, None, None]})
    with pytest.raises(ValueError, match="the displacement of 'y' does nothing on its own examples"):
        best_combination(still, TASKS, losses=["least_squares"])
    with pytest.raises(ValueError, match="no tasks named a"):
        solve_subsets(other, TASKS[:1])
    with pytest.raises(ValueError, match="unknown options start_at"):
        solve_subsets(CACHED, TASKS, start_at=1)
