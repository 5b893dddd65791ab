"""A fused change of the task vectors' mean length: the formula, pairs, names, and what has no length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank


def pair(rng, rank, batch=()):
    a, b = rng.normal(size=(*batch, 6, rank)), rng.normal(size=(*batch, rank, 4))
    return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (*batch, 6, 4))


def tasks():
    rng = np.random.default_rng(0)
    return {
        name: Delta(
            {"w": pair(rng, rank), "stack": pair(rng, rank, (3,)), "bias": jnp.asarray(rng.normal(size=5), jnp.float32)}
        )
        for name, rank in (("a", 1), ("b", 3), ("c", 2))
    }


def norm(delta):
    """In float64, of the multiplied-out change."""
    return np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in delta.dense().leaves.values()))


@pytest.mark.parametrize("inner", [fusion.task_arithmetic(0.3), fusion.ties(0.5), fusion.iso_c(), fusion.dare(0.5)])
def test_direction_and_length(inner):
    given = tasks()
    plain = pf.fuse(inner, given)
    found = jax.jit(lambda given: pf.fuse(fusion.match_norm(inner, 0.8), given))(given)
    wanted = 0.8 * np.mean([norm(delta) for delta in given.values()])
    np.testing.assert_allclose(norm(found), wanted, rtol=1e-5)
    assert abs(wanted / norm(plain) - 1) > 0.05
    for path, leaf in plain.dense().leaves.items():
        np.testing.assert_allclose(found.dense().leaves[path], leaf * (wanted / norm(plain)), rtol=1e-4, atol=1e-5)
    for path, change in plain.leaves.items():
        assert type(found.leaves[path]) is type(change)


def test_the_inner_scale_is_lost():
    given = tasks()
    one, other = (pf.fuse(fusion.match_norm(fusion.task_arithmetic(scale)), given) for scale in (0.1, 5.0))
    for path, leaf in one.dense().leaves.items():
        np.testing.assert_allclose(other.dense().leaves[path], leaf, rtol=1e-5, atol=1e-6)


def test_tasks_that_cancel_out_give_zeros():
    (given,) = list(tasks().values())[:1]
    found = pf.fuse(fusion.match_norm(fusion.average()), {"a": given.dense(), "b": given.dense() * -1.0})
    assert all(not np.any(leaf) for leaf in found.leaves.values())


@pytest.mark.parametrize("jitted", [False, True])
def test_factors_that_nearly_cancel(jitted):
    rng = np.random.default_rng(0)
    a, b, rest = rng.normal(size=(64, 4)), 1e6 * rng.normal(size=(4, 64)), rng.normal(size=(4, 64))

    def low(b):
        return Delta({p: LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (64, 64)) for p in ("x", "y")})

    def fuse(given):
        return pf.fuse(fusion.match_norm(fusion.task_arithmetic(1.0)), given)

    # What is left has a length of its own, far above rounding: it is the one that is measured.
    given = {"one": low(b), "other": low(100 * rest - b)}
    found = (jax.jit(fuse) if jitted else fuse)(given)
    np.testing.assert_allclose(norm(found), np.mean([norm(delta) for delta in given.values()]), rtol=1e-2)
    # What is rounding alone is not made longer.
    exact = {"one": low(b), "other": low(rest), "sum": low(-b - rest)}
    found = (jax.jit(fuse) if jitted else fuse)(exact)
    assert norm(found) < 1e-5 * norm(exact["one"])


def test_names_reach_the_inner_method():
    given = tasks()
    weights = {"a": 1.0, "b": 0.0, "c": 0.0}
    found = pf.fuse(fusion.match_norm(fusion.weighted_average(weights)), dict(reversed(given.items())))
    own = given["a"].leaves["bias"]
    cosine = jnp.vdot(found.leaves["bias"], own) / jnp.linalg.norm(found.leaves["bias"]) / jnp.linalg.norm(own)
    assert cosine > 1 - 1e-6
