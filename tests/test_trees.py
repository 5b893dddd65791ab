import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import trees

TREE = {"a": {"b": jnp.ones((2, 3)), "c": jnp.zeros(4)}, "d": jnp.full((1,), 2.0)}


def test_paths_nest_and_flat_agree():
    assert list(trees.paths(TREE)) == ["a/b", "a/c", "d"] == list(trees.flat(TREE))
    nested = trees.nest(trees.paths(TREE))
    assert jax.tree.structure(nested) == jax.tree.structure(TREE)


def test_nest_refuses_a_path_through_a_leaf():
    with pytest.raises(ValueError, match="runs through the leaf 'a'"):
        trees.nest({"a": 1, "a/b": 2})


def test_split_and_merge_are_inverse():
    picked, rest = trees.split(TREE, {"a": {"c": None}})
    assert list(trees.paths(picked)) == ["a/c"] and list(trees.paths(rest)) == ["a/b", "d"]
    assert jax.tree.structure(trees.merge(picked, rest)) == jax.tree.structure(TREE)
    with pytest.raises(ValueError, match="both trees hold the leaf 'd'"):
        trees.merge(TREE, {"d": 1})
    with pytest.raises(ValueError, match="no leaf 'a/x' in the tree; nearest: 'a/"):
        trees.split(TREE, {"a": {"x": None}})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"b": jnp.ones((2, 3)), "c": jnp.zeros(4)}}, r"'two' lacks the leaf 'd'"),
        ({**TREE, "e": jnp.ones(1)}, r"'two' has the leaf 'e'"),
        ({**TREE, "d": jnp.ones((2,))}, r"'d' is float32\[1\] in 'one' but float32\[2\] in 'two'"),
        ({**TREE, "d": jnp.ones((1,), jnp.bfloat16)}, r"'d' is float32\[1\] in 'one' but bfloat16\[1\]"),
    ],
)
def test_structure_errors_name_both_sides(other, message):
    with pytest.raises(ValueError, match=message):
        trees.require_same_structure({"one": TREE, "two": other})


def test_non_finite_leaves_are_named_and_counted():
    with pytest.raises(ValueError, match="my adapter: 'a/c' holds 2 NaN or infinite elements of 4"):
        trees.require_finite({"a": {"c": jnp.array([0.0, jnp.nan, jnp.inf, 1.0])}}, "my adapter")


def test_stack_and_unstack_are_inverse():
    double = jax.tree.map(lambda leaf: 2 * leaf, TREE)
    back = trees.unstack(trees.stack({"x": TREE, "y": double}))
    for tree, expected in zip(back, (TREE, double), strict=True):
        jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_cosine_is_that_of_the_concatenated_vectors(key):
    one, two = (jax.tree.map(lambda leaf, k=k: jax.random.normal(k, leaf.shape), TREE) for k in jax.random.split(key))
    rows = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]).astype(np.float64) for t in (one, two)]
    expected = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    matrix = trees.cosine([one, two, jax.tree.map(jnp.zeros_like, one)])
    np.testing.assert_allclose(matrix, [[1, expected, 0], [expected, 1, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(trees.norm(one), np.linalg.norm(rows[0]), rtol=1e-6)
    assert trees.size(one) == len(rows[0])
