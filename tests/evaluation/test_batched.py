"""Several trees in one forward pass: the same scores as one by one, compiled once."""

import evaluation_fakes as fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.evaluation import evaluate, evaluate_many, subset_grid, sweep_trees
from pefusion_jax.tasks.metrics import macro_f1

TASKS = [fakes.task("p", 1), fakes.task("f1", 3, size=31, metric=macro_f1)]


def pair(seed, rank):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(fakes.WIDTH, rank)), rng.normal(size=(rank, fakes.WIDTH))
    return Delta({"kernel": LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (fakes.WIDTH, fakes.WIDTH))})


@pytest.mark.parametrize("trees", [[fakes.tau(i) for i in range(3)], [pair(i, 1 + i) for i in range(3)]], ids=["taus", "pairs"])
def test_the_same_scores_as_one_by_one(trees):
    model, params = fakes.Model(), fakes.params()
    expected = [evaluate(model, params, tree, TASKS, split="validation", batch_size=8) for tree in trees]
    assert len({scores["p"] for scores in expected}) > 1
    for at_once in (None, 2, 8):
        got = evaluate_many(model, params, trees, TASKS, batch_size=8, at_once=at_once)
        for ours, theirs in zip(got, expected, strict=True):
            assert dict(ours) == pytest.approx(dict(theirs)) and ours.counts == theirs.counts
            assert ours.stderr == pytest.approx(theirs.stderr)


def test_one_program_for_every_chunk():
    model, params = fakes.Model(), fakes.params()
    evaluate_many(model, params, [fakes.tau(i) for i in range(5)], TASKS, batch_size=8, at_once=2)
    assert model.traces == ["apply"]


def test_sweeps_use_it():
    taus = {name: fakes.tau(seed) for seed, name in enumerate("xy")}
    grid = subset_grid(2, [0.3, 1.0])[:5]
    model, params = fakes.Model(), fakes.params()

    def fused(point):
        return fusion.fuse(fusion.task_arithmetic(point), taus)

    one_by_one = sweep_trees(model, params, fused, grid, TASKS, batch_size=8)
    np.testing.assert_allclose(sweep_trees(model, params, fused, grid, TASKS, batch_size=8, at_once=3), one_by_one)
    with pytest.raises(ValueError, match="at_once=0"):
        sweep_trees(model, params, fused, grid, TASKS, at_once=0)


def test_errors():
    model, params = fakes.Model(), fakes.params()
    with pytest.raises(ValueError, match="sequence of one or more"):
        evaluate_many(model, params, [], TASKS)
    with pytest.raises(ValueError, match="sequence of one or more"):
        evaluate_many(model, params, fakes.delta(0), TASKS)
    with pytest.raises(ValueError, match="at_once=0"):
        evaluate_many(model, params, [fakes.tau(0)], TASKS, at_once=0)
    with pytest.raises(ValueError, match="'tree 1' lacks the leaf 'kernel'"):
        evaluate_many(model, params, [fakes.tau(0), {"bias": jnp.zeros(3)}], TASKS, at_once=2)
    mixed = [pair(0, 2), fakes.delta(1)]
    with pytest.raises(ValueError):
        evaluate_many(model, params, mixed, TASKS, at_once=2)
    assert jax.tree.structure(mixed[0]) != jax.tree.structure(mixed[1])
