"""Conversion matrices: of CondLoRA's own adapters they are known, of random ones the overlap is."""

import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import evaluation, trees
from pefusion_jax.generators import CondLoRA
from pefusion_jax.generators.layout import layout_of

LAYERS, RANK = 4, 3


def drawn(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def base(width, out):
    return trees.nest({f"layer/{n}/query/kernel": drawn((width, out), n) for n in range(LAYERS)})


def made(params, orientation, width, out):
    read = out if orientation == "paper" else width
    theta = {"theta_a": drawn((read, RANK), 10), "theta_b": drawn((width, RANK), 11)}
    layout = layout_of(params, lambda path: True)
    tree = trees.nest({f"layer/*/query/{name}": leaf for name, leaf in theta.items()})
    return theta, trees.nest(CondLoRA(orientation=orientation).make(tree, trees.flat(params), layout, None))


@pytest.mark.parametrize("orientation", ["paper", "official"])
def test_of_generated_adapters_they_are_theta_in_every_layer(orientation):
    params = base(12, 12)
    theta, adapters = made(params, orientation, 12, 12)
    (found,) = evaluation.conversions(params, adapters, orientation).values()
    for layer in range(LAYERS):
        np.testing.assert_allclose(found.a[layer], theta["theta_a"], atol=2e-4)
        np.testing.assert_allclose(found.b[layer], theta["theta_b"], atol=2e-4)
    for factor in ("a", "b"):
        (same,) = evaluation.conversion_similarity(params, adapters, factor=factor, orientation=orientation).values()
        np.testing.assert_allclose(same.overall, 1.0, atol=1e-5)
        assert same.names == ("1", "2", "3", "4") and "layer/*/query" in same.measure


def test_of_random_adapters_they_overlap_as_random_subspaces_do():
    params = base(96, 96)
    adapters = trees.nest(
        {f"layer/{n}/query/lora_a": drawn((96, 6), 20 + n) for n in range(LAYERS)}
        | {f"layer/{n}/query/lora_b": drawn((6, 96), 30 + n) for n in range(LAYERS)}
    )
    (found,) = evaluation.conversion_similarity(params, adapters, k=6).values()
    apart = found.overall[~np.eye(LAYERS, dtype=bool)]
    assert abs(apart.mean() - 6 / 96) < 0.02 and apart.min() >= 0
    np.testing.assert_allclose(found.baseline[0][0, 1], 6 / 96)
    np.testing.assert_allclose(found.overall, found.overall.T, atol=1e-12)


def test_least_squares_for_kernels_that_are_not_square():
    """More outputs than inputs: the factor A is met exactly, by the matrix of smallest norm."""
    params = base(6, 10)
    _, adapters = made(params, "paper", 6, 10)
    (found,) = evaluation.conversions(params, adapters).values()
    assert found.a.shape == (LAYERS, 10, RANK) and found.b.shape == (LAYERS, 6, RANK)
    for layer in range(LAYERS):
        kernel = np.asarray(params["layer"][str(layer)]["query"]["kernel"], np.float64)
        np.testing.assert_allclose(kernel @ found.a[layer], adapters["layer"][str(layer)]["query"]["lora_a"], atol=1e-4)


def test_the_file_of_a_kind_of_module_has_a_plain_name(tmp_path):
    params = base(6, 6)
    _, adapters = made(params, "paper", 6, 6)
    (found,) = evaluation.conversion_similarity(params, adapters, k=2).values()
    path = found.write(tmp_path)
    assert path == tmp_path / "conversion_matrix_of_A__layer___query.csv" and list(tmp_path.iterdir()) == [path]
    assert found.write(tmp_path, "mine") == tmp_path / "mine.csv"


def test_errors():
    params = base(4, 4)
    with pytest.raises(ValueError, match="orientation='papr' must be 'paper' or 'official'"):
        evaluation.conversions(params, {}, "papr")
    with pytest.raises(ValueError, match="factor='c' must be 'a' or 'b'"):
        evaluation.conversion_similarity(params, {}, factor="c")
    with pytest.raises(ValueError, match="no leaf named lora_a"):
        evaluation.conversions(params, {"layer": {"0": {"query": {"other": jnp.zeros((4, 2))}}}})
    singular = trees.map_paths(lambda path, leaf: leaf * 0, params)
    _, adapters = made(params, "paper", 4, 4)
    with pytest.raises(ValueError, match="a kernel has no inverse"):
        evaluation.conversions(singular, adapters)
