"""Every generator, every guarantee: the result of ``generate`` is an Adapted like any other."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generators_table import CONFIG, GENERATORS, IDS, LAYOUTS, build, hidden, materialised, stacked

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones import Bert

NAMES = [row.name for row in GENERATORS]
traces: collections.Counter = collections.Counter()


@pytest.fixture(scope="module", params=[(name, layout) for name in NAMES for layout in LAYOUTS], ids="-".join)
def case(request):
    return build(*request.param)


@pytest.fixture(scope="module", params=NAMES)
def loop(request):
    return build(request.param, "loop")


# One compiled program for each model, however many tests call it.
@functools.cache
def run(adapted):
    apply = hidden(adapted.apply)

    def counted(params, tree, inputs):
        traces[adapted] += 1
        return apply(params, tree, inputs)

    return jax.jit(counted)


@functools.cache
def base_output(layout):
    case = build("cond_lora", layout)
    return np.asarray(jax.jit(lambda params: case.made.base(params, IDS).last_hidden_state)(case.params))


@functools.cache
def expansion(name, layout, mode):
    case = build(name, layout)
    return pf.linearize(case.made, case.point, mode)


def layout_of(case):
    return "scan" if case is build(case.row.name, "scan") else "loop"


def test_start_is_the_base_model_or_documented_to_be_near_it(case):
    gap = np.abs(run(case.made)(case.params, case.start, case.inputs) - base_output(layout_of(case))).max()
    assert gap <= case.row.start and (gap > 0) == (case.row.start > 0)


def test_model_is_the_one_below_with_the_adapters_that_were_made(loop):
    expected = []
    for adapters, rows in materialised(loop):
        expected.append(run(loop.inner)(loop.params, adapters, {"input_ids": IDS})[rows])
    got = run(loop.made)(loop.params, loop.point, loop.inputs)
    np.testing.assert_allclose(got, np.concatenate(expected), atol=5e-6)
    assert np.abs(got - base_output("loop")).max() > 1e-2, "the adapters changed nothing, so nothing was compared"


def test_looped_and_scanned_models_share_one_tree(loop):
    scan = build(loop.row.name, "scan")
    created = jax.eval_shape(lambda key: scan.made.init(key, scan.params, IDS), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in trees.paths(created).items()}
    assert shapes == {path: leaf.shape for path, leaf in trees.paths(stacked(loop.start)).items()}
    got = run(scan.made)(scan.params, stacked(loop.point), scan.inputs)
    np.testing.assert_allclose(got, run(loop.made)(loop.params, loop.point, loop.inputs), atol=5e-6)


def test_other_trees_and_other_tasks_do_not_recompile(loop):
    first = run(loop.made)(loop.params, loop.point, loop.inputs)
    other = {**loop.inputs, "task": jnp.array([1, 1])} if loop.made.tasks else loop.inputs
    second = run(loop.made)(loop.params, jax.tree.map(lambda leaf: 0.5 * leaf, loop.point), other)
    assert traces[loop.made] == 1 and np.abs(first - second).max() > 0


def test_gradients_are_finite_and_zero_exactly_where_documented(loop):
    # The mean square of a normalised output is constant, so each number has a weight of its own.
    weights = jax.random.normal(jax.random.key(8), (*IDS.shape, CONFIG.hidden_size))
    loss = lambda tree: jnp.sum(weights * loop.made.apply(loop.params, tree, **loop.inputs).last_hidden_state)  # noqa: E731
    gradient = trees.paths(jax.jit(jax.grad(loss))(loop.start))
    for path, leaf in gradient.items():
        assert np.isfinite(leaf).all(), path
        assert (not np.any(leaf)) == bool(re.fullmatch(loop.row.zero_gradient, path)), path


def first_order(case, mode):
    linear = expansion(case.row.name, layout_of(case), mode)
    at_zero = run(linear)(case.params, linear.init(None, case.params), case.inputs)
    here = run(case.made)(case.params, case.point, case.inputs)
    np.testing.assert_allclose(at_zero, here, atol=5e-6)
    gaps = []
    for size in (0.01, 0.005):
        tau = jax.tree.map(lambda leaf, s=size: s * leaf, case.direction)
        there = run(case.made)(case.params, jax.tree.map(jnp.add, case.point, tau), case.inputs)
        gaps.append(np.abs(there - run(linear)(case.params, tau, case.inputs)).max())
    assert gaps[0] < 0.3 * np.abs(there - here).max(), "to first order it is the model"
    assert gaps[1] < 0.35 * gaps[0] + 5e-6, "the gap shrinks with the square of the displacement"
    return linear


def test_network_linearization_is_the_first_order_term_and_affine(case):
    linear = first_order(case, "network")
    one, two = case.direction, jax.tree.map(jnp.flip, case.direction)
    zero, both = jax.tree.map(jnp.zeros_like, one), jax.tree.map(lambda a, b: 0.7 * a - 1.3 * b, one, two)
    f0, f1, f2, sum_ = (np.asarray(run(linear)(case.params, t, case.inputs), np.float64) for t in (zero, one, two, both))
    np.testing.assert_allclose(sum_, f0 + 0.7 * (f1 - f0) - 1.3 * (f2 - f0), atol=1e-5 * np.abs(sum_).max())


@pytest.mark.parametrize("mode", ["layer", "weight"])
@pytest.mark.parametrize("name", ["cond_lora", "task_embeddings", "hyperdecoder"])
def test_other_linearizations_see_the_generator_through(name, mode):
    first_order(build(name, "loop"), mode)


def test_weight_linearization_of_what_does_not_fold_is_refused():
    case = build("pha", "loop")
    with pytest.raises(ValueError, match="weight"):
        pf.linearize(case.made, case.point, "weight")


def test_what_is_made_fuses_and_folds_like_any_adapter(loop):
    adapters = [adapters for adapters, _ in materialised(loop)]
    fused = pf.fuse(pf.fusion.average(), adapters)
    assert trees.paths(fused).keys() == trees.paths(adapters[0]).keys()
    if loop.inner.folds:
        folded = pf.fold(loop.params, loop.inner.deltas(loop.params, fused))
        expected = run(loop.inner)(loop.params, fused, {"input_ids": IDS})
        zero = jax.tree.map(jnp.zeros_like, fused)
        np.testing.assert_allclose(run(loop.inner)(folded, zero, {"input_ids": IDS}), expected, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="nonlinear"):
            loop.inner.deltas(loop.params, fused)


def test_save_and_load_is_bit_for_bit_and_keeps_the_order_of_the_tasks(loop, tmp_path):
    pf.save_run(tmp_path, loop.point, model="tiny", params=loop.params, methods=loop.row.methods, generator=loop.row.generator)
    found = pf.load_run(tmp_path, base=(Bert(CONFIG), loop.params))
    assert found.adapted.tasks == loop.made.tasks and found.adapted.origin.generator == loop.row.generator
    assert trees.paths(found.tree).keys() == trees.paths(loop.point).keys()
    for path, leaf in trees.paths(loop.point).items():
        np.testing.assert_array_equal(trees.paths(found.tree)[path], leaf)
