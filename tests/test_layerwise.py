"""Layers that a scan has stacked are taken apart and put back without a change, for dense leaves and for pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.layerwise import join, separate, stacked_layers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_layers_come_apart_and_together_again():
    pair = pf.LowRank(normal(0, 3, 4, 2), normal(1, 3, 2, 5), (3, 4, 5))
    permuted = pf.LowRank(normal(2, 3, 6, 1), normal(3, 3, 1, 2), (3, 2, 6), (0, 2, 1))
    leaves = {
        "encoder/layer/query/kernel": (pair,),
        "encoder/layer/value/kernel": (permuted,),
        "encoder/layer/norm/bias": (normal(4, 3, 4),),
        "head/kernel": (normal(5, 4, 4),),
    }
    counts = stacked_layers(leaves, STACKS)
    assert counts == {"encoder/layer": 3}
    apart = separate(leaves, counts)
    rests = ("query/kernel", "value/kernel", "norm/bias")
    assert set(apart) == {f"encoder/layer/{i}/{rest}" for i in range(3) for rest in rests} | {"head/kernel"}
    one = apart["encoder/layer/1/value/kernel"][0]
    np.testing.assert_array_equal(one.dense(), permuted.dense()[1])
    back = join({path: of_tasks[0] for path, of_tasks in apart.items()}, counts)
    assert list(back) == sorted(leaves)
    for path, (given,) in leaves.items():
        chex_equal(back[path], given)


def chex_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "path",
    [
        "encoder/layer/0/query/kernel",  # numbered layers
        "block/0/layer/1/query/kernel",  # the outermost node decides
        "layer/kernel",  # a layer that happens to have the name
        "tower/kernel",
    ],
)
def test_what_is_no_stack_is_left_alone(path):
    assert stacked_layers({path: (jnp.zeros((3, 4)),)}, STACKS) == {}


def test_a_matrix_of_a_module_in_layers_is_no_stack_of_vectors():
    assert stacked_layers({"layers/dense/kernel": (jnp.zeros((3, 4)),)}, STACKS) == {}
    assert stacked_layers({"layers/dense/kernel": (pf.LowRank(normal(0, 3, 1), normal(1, 1, 4), (3, 4)),)}, STACKS) == {}
    assert stacked_layers({"layers/dense/kernel": (jnp.zeros((3, 4, 5)),)}, STACKS) == {"layers": 3}


def test_leaves_that_disagree_on_the_number_of_layers_are_no_stack():
    leaves = {"layer/a/kernel": (jnp.zeros((3, 4)),), "layer/b/kernel": (jnp.zeros((2, 4)),)}
    assert stacked_layers(leaves, STACKS) == {}


def test_ranks_of_layers_that_differ_are_filled_up_with_zeros():
    pairs = {f"layer/{i}/q/kernel": pf.LowRank(normal(i, 4, i + 1), normal(9 + i, i + 1, 5), (4, 5)) for i in range(2)}
    together = join(pairs, {"layer": 2})["layer/q/kernel"]
    assert together.shape == (2, 4, 5) and together.rank == 2
    expected = np.stack([pair.dense() for pair in pairs.values()])
    np.testing.assert_allclose(together.dense(), expected, rtol=1e-6)


def test_other_names_can_be_given():
    trees = [{"stack": {"q": {"kernel": normal(seed, 3, 4, 5)}}} for seed in (1, 2)]
    cut = pf.fusion.ties(density=0.25, trim="per_tensor")
    layers = [{f"q{i}": tree["stack"]["q"]["kernel"][i] for i in range(3)} for tree in trees]
    expected = pf.fuse(cut, layers)
    # Signs that are tied are settled over the whole tree, so both see the same leaves.
    fused = pf.fuse(cut, trees, stacks=("stack",))["stack"]["q"]["kernel"]
    for i in range(3):
        np.testing.assert_array_equal(fused[i], expected[f"q{i}"])
    assert not np.array_equal(fused, pf.fuse(cut, trees)["stack"]["q"]["kernel"])
