"""The interference penalty: its value and gradient by hand, and what training with it does to the other task."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest
import statistics_models as models

import pefusion_jax as pf
from pefusion_jax.deltas import dense
from pefusion_jax.moments import dense_moment
from pefusion_jax.penalty import interference_penalty
from pefusion_jax.statistics import statistics
from pefusion_jax.training import parallel
from pefusion_jax.training.step import init_state, make_step

SGD = optax.sgd(0.1)


@functools.cache
def other(scan=False):
    adapted, params, _, point = models.build(scan)
    return statistics(adapted, params, point, [models.BATCH], head=models.HEAD)


def by_hand(stats, changes):
    total = 0.0
    for path, change in changes.items():
        d = np.asarray(dense(change), np.float64)
        for s in stats:
            g, o = (np.asarray(dense_moment(m), np.float64) for m in (s.moments[path].inputs, s.moments[path].outputs))
            total += 0.5 * np.trace(d.T @ g @ d @ o)
    return total


def test_value_and_gradient():
    adapted, params, _, point = models.build()
    function, arrays = interference_penalty({"o": other()}, weight=3.0)
    delta = adapted.deltas(params, point)
    value, gradient = jax.jit(jax.value_and_grad(lambda tree: function(arrays, adapted, params, tree)))(point)
    np.testing.assert_allclose(value, 3 * by_hand([other()], delta.leaves), rtol=1e-5)
    moments = other().moments["layer/1/up/kernel"]
    pair = delta.leaves["layer/1/up/kernel"]
    # d/dB of tr(B' A' G A B S) / 2 = A' G A B S; the scale of LoRA is 2 here.
    expected = 3 * 2 * pair.a.T @ moments.inputs @ pair.a @ pair.b @ moments.outputs
    np.testing.assert_allclose(gradient["layer"]["1"]["up"]["lora_b"], expected, rtol=1e-4, atol=1e-6)


def test_tasks_add_up_and_accumulated_factors_keep_the_trace():
    adapted, params, _, point = models.build()
    stats = {"o": other(), "p": jax.tree.map(lambda leaf: 2.0 * leaf, other())}
    changes = adapted.deltas(params, point).leaves
    function, arrays = interference_penalty(stats, accumulate=False)
    cost = jax.jit(function, static_argnums=1)
    np.testing.assert_allclose(cost(arrays, adapted, params, point), by_hand(stats.values(), changes), rtol=1e-5)
    # The tasks' factors are proportional here, so that nothing is lost.
    function, arrays = interference_penalty(stats)
    scaled = cost(arrays, adapted, params, point)
    np.testing.assert_allclose(scaled, by_hand(stats.values(), changes), rtol=1e-5)
    assert all(len(of_tasks) == 1 for of_tasks in arrays["moments"].values())
    scan, scan_params, _, scan_point = models.build(scan=True)
    np.testing.assert_allclose(cost(arrays, scan, scan_params, scan_point), scaled, rtol=1e-5)


def finetuned(mapping, penalty):
    adapted, params, start, _ = models.build()
    task = models.make_task("t", 1)
    return pf.finetune(
        adapted, params, task, adapters=start, steps=12, batch_size=8, learning_rate=0.03, mapping=mapping, penalty=penalty
    )


def test_training_with_it_spares_the_other_task():
    adapted, params, _, _ = models.build()
    penalty = interference_penalty({"o": other()}, weight=3.0)

    def harm(tree):
        return by_hand([other()], adapted.deltas(params, tree).leaves)

    # At weight 0 it is the same program as without one, plus zero.
    free, spared = finetuned("pmap", interference_penalty({"o": other()}, weight=0.0)), finetuned("pmap", penalty)
    assert harm(spared) < 0.5 * harm(free)
    mapped = finetuned("shard_map", penalty)
    for one, two in zip(jax.tree.leaves(spared), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_added_once_for_all_devices_and_crosses_no_wire():
    adapted, params, _, point = models.build()
    function, arrays = interference_penalty({"o": other()})
    task = models.make_task("t", 1)
    batch = pf.tasks.train_batch(task, 0, 8, 0)
    devices = jax.devices()
    after, programs = {}, {}
    for name, penalty in (("with", function), ("without", None)):
        step = make_step(adapted, SGD, models.features, models.logits, models.loss, clip=None, penalty=penalty)
        state = parallel.replicate(init_state(point, SGD, 0), devices, copy=True)
        of_loss = task.head.params if penalty is None else (task.head.params, arrays)
        placed = parallel.replicate((params, {}, of_loss), devices)
        mapped = parallel.map_step(step, "shard_map", devices)
        placed_batch = parallel.place_batch(batch, "shard_map", devices)
        programs[name] = mapped.lower(state, *placed, placed_batch).compile()
        after[name] = jax.device_get(programs[name](state, *placed, placed_batch)[0].adapters)
    expected = jax.jit(jax.grad(lambda tree: function(arrays, adapted, params, tree)))(point)
    for one, two, g in zip(*map(jax.tree.leaves, (after["with"], after["without"], expected)), strict=True):
        np.testing.assert_allclose((two - one) / 0.1, g, rtol=1e-3, atol=1e-4)
    assert parallel.allreduce_elements(programs["with"]) == parallel.allreduce_elements(programs["without"]) > 0


def test_statistics_of_other_parameters_are_refused():
    adapted, params, _, point = models.build()
    function, arrays = interference_penalty({"o": other()})
    arrays = {**arrays, "moments": {f"encoder/{path}": moments for path, moments in arrays["moments"].items()}}
    with pytest.raises(
        ValueError, match="the statistics know none of the parameters that change: embed/embedding, .* encoder/embed/embedding"
    ):
        function(arrays, adapted, params, point)
