import math

import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax.generators import instance_loss, prototype_loss


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_instance_loss_is_the_sum_written_out():
    generator = np.random.default_rng(0)
    z, tasks = generator.normal(size=(7, 5)), np.array([0, 1, 0, 2, 1, 0, 3])
    scores = unit(z) @ unit(z).T / 0.1
    losses = []
    for i in range(7):
        positives = [j for j in range(7) if j != i and tasks[j] == tasks[i]]
        if positives:
            whole = math.log(sum(math.exp(scores[i, a]) for a in range(7) if a != i))
            losses.append(-np.mean([scores[i, j] - whole for j in positives]))
    assert len(losses) == 5, "rows without a partner are left out"
    got = instance_loss(jnp.asarray(z, jnp.float32), jnp.asarray(tasks))
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-5)


def test_the_prototype_loss_leaves_the_positive_out_of_the_denominator():
    generator = np.random.default_rng(1)
    z, prototypes, tasks = generator.normal(size=(6, 5)), generator.normal(size=(4, 5)), np.array([0, 1, 2, 3, 0, 1])
    q = unit(z) @ unit(prototypes).T / 0.1
    for inside in (False, True):
        expected = np.mean(
            [-q[i, y] + math.log(sum(math.exp(q[i, t]) for t in range(4) if inside or t != y)) for i, y in enumerate(tasks)]
        )
        arrays = (jnp.asarray(z, jnp.float32), jnp.asarray(prototypes, jnp.float32), jnp.asarray(tasks))
        np.testing.assert_allclose(prototype_loss(*arrays, positive_in_denominator=inside), expected, rtol=1e-5)


def test_the_losses_reach_the_floors_of_perfect_separation():
    """Eight tasks on orthonormal points, 16 instances each; the weight of the losses is 0.1."""
    points = np.eye(8, 64, dtype=np.float32)
    z, tasks = np.repeat(points, 16, axis=0), np.repeat(np.arange(8), 16)
    # exp(-10) of the other tasks is left in the denominator: 112 instances at cosine 0 beside 15 at cosine 1.
    floor = math.log(15 + 112 * math.exp(-10))
    assert 0.1 * float(instance_loss(jnp.asarray(z), jnp.asarray(tasks))) == pytest.approx(0.1 * floor, abs=1e-6)
    assert 0.1 * math.log(15) == pytest.approx(0.271, abs=5e-4)
    value = 0.1 * float(prototype_loss(jnp.asarray(z), jnp.asarray(points), jnp.asarray(tasks)))
    assert value == pytest.approx(0.1 * (-10 + math.log(7)), abs=1e-6) and value == pytest.approx(-0.805, abs=5e-4)


def test_a_batch_without_a_pair_gives_zero_and_finite_gradients():
    import jax

    z = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)), jnp.float32)
    value, gradient = jax.value_and_grad(lambda z: instance_loss(z, jnp.arange(3)))(z)
    assert value == 0 and np.isfinite(gradient).all() and not np.any(gradient)
    gradient = jax.grad(lambda z: instance_loss(z, jnp.zeros(3, jnp.int32)) + prototype_loss(z, z[:2], jnp.arange(3) % 2))(
        z * 0
    )
    assert np.isfinite(gradient).all()


def test_one_prototype_has_none_to_be_told_from():
    z, tasks = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="needs two or more prototypes"):
        prototype_loss(z, z[:1], tasks)
    assert prototype_loss(z, z[:1], tasks, positive_in_denominator=True) == pytest.approx(0.0, abs=1e-6)
