import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import deltas, trees
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.methods.lora import factor_pair


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("a", "b", "shape", "equation"),
    [
        ((5, 2), (2, 7), (5, 7), "ir,ro->io"),
        ((5, 2), (2, 3, 4), (5, 3, 4), "ir,rnh->inh"),
        ((3, 4, 2), (2, 5), (3, 4, 5), "nhr,ro->nho"),
        ((6, 5, 2), (6, 2, 7), (6, 5, 7), "bir,bro->bio"),
        ((3, 3, 5, 2), (2, 7), (3, 3, 5, 7), "hwir,ro->hwio"),
    ],
)
def test_factor_pairs_multiply_out_as_the_layer_contracts(a, b, shape, equation):
    a, b = normal(0, *a), normal(1, *b)
    expected = np.einsum(equation, np.asarray(a, np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(factor_pair(a, b, shape).dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [(), (6,)])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_weight_with_its_inputs_between_its_outputs(layers, rank):
    a, b = normal(0, *layers, 5, rank), normal(1, *layers, rank, 3, 1, 4)
    expected = np.einsum("...dr,...rnh->...ndh", np.asarray(a, np.float64), np.asarray(b[..., 0, :], np.float64))
    np.testing.assert_allclose(factor_pair(a, b, (*layers, 3, 5, 4)).dense(), expected, rtol=1e-5, atol=1e-6)


def test_weighted_sum_keeps_pairs_and_is_exact():
    pairs = [LowRank(normal(i, 5, 2), normal(i + 9, 2, 7), (5, 7)) for i in range(3)]
    total = deltas.weighted_sum(pairs, jnp.array([0.5, -1.0, 2.0]))
    assert total.rank == 6
    expected = 0.5 * pairs[0].dense() - pairs[1].dense() + 2.0 * pairs[2].dense()
    np.testing.assert_allclose(total.dense(), expected, atol=1e-5)
    mixed = deltas.weighted_sum([pairs[0], pairs[1].dense(), pairs[2]], (0.5, -1.0, 2.0))
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_tangent_is_the_derivative_of_the_product():
    primal, direction = LowRank(normal(0, 5, 2), normal(1, 2, 7), (5, 7)), LowRank(normal(2, 5, 2), normal(3, 2, 7), (5, 7))
    _, expected = jax.jvp(lambda a, b: a @ b, (primal.a, primal.b), (direction.a, direction.b))
    np.testing.assert_allclose(deltas.tangent(primal, direction).dense(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fold_adds_in_float32_and_keeps_dtype_and_identity(dtype):
    params = {"x": {"kernel": normal(0, 5, 7).astype(dtype), "bias": jnp.zeros(7, dtype)}}
    pair = LowRank(normal(1, 5, 2), normal(2, 2, 7), (5, 7))
    folded = deltas.fold(params, Delta({"x/kernel": pair}))
    expected = (params["x"]["kernel"].astype(jnp.float32) + pair.dense()).astype(dtype)
    np.testing.assert_array_equal(folded["x"]["kernel"], expected)
    assert folded["x"]["bias"] is params["x"]["bias"]
    nested = deltas.fold({"params": params, "batch_stats": {}}, {"x": {"kernel": pair.dense()}})
    np.testing.assert_array_equal(nested["params"]["x"]["kernel"], expected)


def test_fold_errors_name_the_parameter():
    params = {"x": {"kernel": jnp.zeros((5, 7))}}
    with pytest.raises(ValueError, match="no parameter 'x/kernle' to fold into; nearest: 'x/kernel'"):
        deltas.fold(params, Delta({"x/kernle": jnp.zeros((5, 7))}))
    with pytest.raises(ValueError, match=r"'x/kernel' has shape \(5, 7\), its change has \(7, 5\)"):
        deltas.fold(params, Delta({"x/kernel": jnp.zeros((7, 5))}))


def test_deltas_are_pytrees():
    delta = Delta({"x/kernel": LowRank(normal(1, 5, 2), normal(2, 2, 7), (5, 7)), "y": normal(3, 4)})
    doubled = jax.jit(lambda d: d * 2.0)(delta)
    np.testing.assert_allclose(doubled.dense().leaves["x/kernel"], 2 * delta.leaves["x/kernel"].dense(), atol=1e-5)
    assert len(trees.paths(delta)) == 3
    for two in (2.0, np.float32(2.0), jnp.float32(2.0)):
        jax.tree.map(np.testing.assert_array_equal, (two * delta).leaves, (delta * 2.0).leaves)
        jax.tree.map(np.testing.assert_array_equal, two * delta.leaves["x/kernel"], delta.leaves["x/kernel"] * 2.0)


def test_pairs_in_half_precision_are_multiplied_in_float32():
    pair = LowRank(normal(1, 64, 8).astype(jnp.bfloat16), normal(2, 8, 64).astype(jnp.bfloat16), (64, 64))
    expected = np.asarray(pair.a, np.float64) @ np.asarray(pair.b, np.float64)
    folded = deltas.fold({"w": jnp.zeros((64, 64))}, Delta({"w": pair}))["w"]
    np.testing.assert_allclose(folded, expected, atol=1e-5)


def test_changes_that_a_parameter_cannot_hold_are_refused():
    change = Delta({"x": jnp.full(3, 1e5)})
    with pytest.raises(ValueError, match="'x' is int8, which would lose its change"):
        deltas.fold({"x": jnp.zeros(3, jnp.int8)}, change)
    with pytest.raises(ValueError, match="the change: 'x' holds 3 NaN"):
        deltas.fold({"x": jnp.zeros(3)}, change * jnp.nan)
    with pytest.raises(ValueError, match="'x' is float16, for which its change is too large; cast it to float32"):
        deltas.fold({"x": jnp.zeros(3, jnp.float16)}, change)
    masked = deltas.fold({"x": jnp.asarray([0.0, 0.0, -jnp.inf])}, change)  # as the base has it
    np.testing.assert_array_equal(masked["x"], [1e5, 1e5, -np.inf])
