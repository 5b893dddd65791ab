"""The step against a reference that is written out plainly: one device, one batch, ``jax.grad`` of the mean."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.tasks import train_batch
from pefusion_jax.training import NonFiniteError, finetune, parallel
from pefusion_jax.training.step import Rate, default_optimizer, describe_bad, init_state, learning_rate, make_step, with_rate

ONE = jax.devices()[:1]


def reference(adapted, params, task, start, steps, batch_size, optimizer, clip):
    """Trains without any of the library's training code."""

    def mean_loss(tree, batch):
        outputs = adapted.apply(params, tree, **batch["inputs"])
        losses = toy.loss(toy.logits(task.head.params, outputs), batch["labels"])
        return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

    gradient = jax.jit(jax.value_and_grad(mean_loss))
    tree, state, losses = start, optimizer.init(start), []
    for step in range(steps):
        value, grads = gradient(tree, train_batch(task, step, batch_size, 0))
        norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
        if clip is not None and norm > clip:
            grads = jax.tree.map(lambda g, n=norm: g * (clip / n), grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        losses.append(float(value))
    return tree, losses


def largest_difference(a, b):
    """Relative to the largest element."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(y).max() for _, y in pairs)


def run_once(adapted, params, tree, task, batch, *, optimizer=None, **settings):
    """One step through the public pieces, on one device."""
    optimizer = optimizer or optax.sgd(0.1)
    trained, held = trees.split(tree, adapted.trainable(tree))
    step = make_step(adapted, optimizer, toy.features, toy.logits, toy.loss, **settings)
    state = parallel.replicate(init_state(trained, optimizer, 0), ONE, copy=True)
    placed = parallel.replicate((params, held, task.head.params), ONE)
    after, metrics = parallel.map_step(step, "pmap", ONE)(state, *placed, parallel.place_batch(batch, "pmap", ONE))
    return after, jax.device_get(metrics)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_finetune_equals_a_plain_loop(clip):
    adapted, params = toy.make_model()
    task = toy.make_task()
    start = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    settings = dict(steps=7, batch_size=8, learning_rate=0.02, clip=clip, weight_decay=0.1, schedule="cosine", warmup=0.3)
    optimizer = optax.adamw(lambda k: learning_rate("cosine", rate_at(k, 0.02, 2, 7)), weight_decay=0.1)
    expected, _ = reference(adapted, params, task, start, 7, 8, optimizer, clip)
    actual = finetune(adapted, params, task, adapters=start, devices=ONE, **settings)
    assert largest_difference(actual, expected) < 2e-5
    assert largest_difference(expected, start) > 1e-2
    for leaf in jax.tree.leaves(start):
        assert not leaf.is_deleted()


def test_accumulation_makes_the_update_of_one_big_batch():
    adapted, params = toy.make_model()
    task = toy.make_task()
    settings = dict(steps=5, batch_size=24, devices=ONE, optimizer=optax.sgd(0.5))
    whole = finetune(adapted, params, task, **settings)
    for accumulate in (2, 6):
        assert largest_difference(finetune(adapted, params, task, accumulate=accumulate, **settings), whole) < 1e-6


def test_rows_of_weight_zero_change_nothing():
    adapted, params = toy.make_model()
    task = toy.make_task()
    tree = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    batch = train_batch(task, 0, 8, 0)
    batch["weights"][5:] = 0
    other = jax.tree.map(np.copy, batch)
    other["inputs"]["x"][5:] = 3.0
    other["labels"][5:] = 0
    (a, metrics), (b, _) = (run_once(adapted, params, tree, task, rows) for rows in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, a.adapters, b.adapters)
    assert metrics["examples"] == 5


def test_metrics_report_the_norm_before_clipping_and_the_rate():
    adapted, params = toy.make_model()
    task = toy.make_task()
    tree = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    batch = train_batch(task, 0, 8, 0)
    after, metrics = run_once(adapted, params, tree, task, batch, clip=1e-3, rate=lambda state: 0.25)
    moved = jax.tree.map(lambda new, old: (np.asarray(old) - np.asarray(new)) / 0.1, after.adapters, tree)
    assert float(trees.norm(jax.tree.map(jnp.asarray, moved))) == pytest.approx(1e-3, rel=1e-2)
    assert metrics["grad_norm"] > 1e-2
    assert metrics["learning_rate"] == 0.25
    assert metrics["finite"] and metrics["bad"] == -1
    assert int(after.step) == 1


def test_held_leaves_have_no_optimizer_state_and_keep_their_bits():
    model, params = toy.Net(), toy.make_model()[1]
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets="up|down", freeze_a=True))
    tree = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    trained, held = trees.split(tree, adapted.trainable(tree))
    state = init_state(trained, optax.adamw(1e-3), 0)
    moments = [path for path in trees.paths(state.opt_state) if "lora" in path]
    assert len(moments) == 2 * len(trees.paths(trained)) and not any("lora_a" in path for path in moments)
    after = finetune(adapted, params, toy.make_task(), adapters=tree, steps=3, devices=ONE)
    for path, leaf in trees.paths(after).items():
        same = np.array_equal(leaf, trees.paths(tree)[path])
        assert same == (path in trees.paths(held)), path


def test_adapters_are_float32_over_a_bfloat16_base():
    adapted, params = toy.make_model(dtype=jnp.bfloat16)
    before = jax.tree.map(np.asarray, params)
    tree = finetune(adapted, params, toy.make_task(), steps=3, batch_size=8, devices=ONE)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_dropout_follows_the_seed_and_can_be_switched_off():
    dropped, params = toy.make_model(dropout=0.5)
    plain, _ = toy.make_model()
    settings = dict(steps=3, batch_size=8, devices=ONE)
    task = toy.make_task()
    tree = dropped.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    first, again = (finetune(dropped, params, task, adapters=tree, **settings) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    without = finetune(plain, params, task, adapters=tree, **settings)
    assert largest_difference(first, without) > 1e-3
    off = finetune(dropped, params, task, adapters=tree, stochastic=False, **settings)
    jax.tree.map(np.testing.assert_array_equal, off, without)


def test_dropout_masks_differ_between_devices_and_micro_batches():
    dropped, params = toy.make_model(dropout=0.5)
    task = toy.make_task()
    tree = dropped.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    tree = jax.tree.map(lambda x: x + 0.1, tree)
    row = task.batch(task.train[:1])
    batch = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), row)
    # The same row twice: if both drew one mask, the mean over both would be that of either.
    settings = dict(adapters=tree, steps=1, clip=None, optimizer=optax.sgd(1.0), seed=3)

    def repeated(task, step, size, seed):
        return jax.tree.map(lambda x: x[:size], batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pefusion_jax.training.loop.train_batch", repeated)
        alone = finetune(dropped, params, task, batch_size=1, devices=ONE, **settings)
        devices = finetune(dropped, params, task, batch_size=2, devices=jax.devices()[:2], **settings)
        micro = finetune(dropped, params, task, batch_size=2, devices=ONE, accumulate=2, **settings)
    assert largest_difference(devices, alone) > 1e-3
    assert largest_difference(micro, alone) > 1e-3


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(where):
    adapted, params = toy.make_model()
    task = toy.make_task()
    tree = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    batch = train_batch(task, 0, 8, 0)
    optimizer = optax.sgd(0.1)
    if where == "gradient":
        batch["inputs"]["x"][3, 2] = np.inf
    else:
        optimizer = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u / 0.0, updates))
    after, metrics = run_once(adapted, params, tree, task, batch, optimizer=optimizer)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, after.adapters, tree)
    text = describe_bad(tree, metrics)
    assert ("gradient:" in text) == (where == "gradient") and "'down/lora_" in text


def test_finetune_stops_at_the_first_step_that_is_not_finite():
    adapted, params = toy.make_model()
    task = toy.make_task()
    encoded = 0

    def encode(examples):
        nonlocal encoded
        encoded += 1
        inputs = toy.encode(examples)
        return inputs if encoded <= 5 else {"x": np.full_like(inputs["x"], np.nan)}

    tree = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    with pytest.raises(NonFiniteError, match=r"task 'toy': step 6 is not finite: loss nan.*gradient: 'down/lora_a'"):
        finetune(adapted, params, dataclasses.replace(task, encode=encode), adapters=tree, steps=40, batch_size=8, devices=ONE)


@pytest.mark.parametrize(
    "tree, message",
    [({}, "no trained leaf"), ({"a": {"ids": np.zeros(3, np.int32)}}, "'a/ids' is int32")],
)
def test_what_cannot_be_trained_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        init_state(tree, optax.sgd(0.1), 0)


def rate_at(count, peak, rising, steps):
    return Rate(jnp.asarray(count, jnp.int32), *(jnp.float32(value) for value in (peak, rising, steps)))


def test_schedule_is_the_formula():
    w = 10
    falling = {"cosine": lambda p: 0.5 * (1 + np.cos(np.pi * p)), "linear": lambda p: 1 - p, "constant": lambda p: 1.0}
    for schedule, curve in falling.items():
        for k in range(0, 50, 7):
            expected = 0.5 * min((k + 1) / (w + 1), curve(max(k - w, 0) / (50 - w)))
            assert float(learning_rate(schedule, rate_at(k, 0.5, w, 50))) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert float(learning_rate("constant", rate_at(90, 0.5, 0, 50))) == 0.5
    assert default_optimizer("cosine", 0.0) is default_optimizer("cosine", 0.0)
    with pytest.raises(ValueError, match="choose one of 'cosine', 'linear', 'constant'"):
        default_optimizer("step", 0.0)
    state = init_state({"a": np.zeros(2, np.float32)}, default_optimizer("linear", 0.0), 0)
    rate = with_rate(state, 0.5, 0.2, 50).opt_state[-1]
    assert [float(value) for value in rate] == [0, 0.5, 10, 50]
    with pytest.raises(ValueError, match="warmup=1.5"):
        with_rate(state, 0.5, 1.5, 50)


def test_other_rates_and_lengths_run_the_same_program():
    adapted, params = toy.make_model()
    task = toy.make_task()
    settings = dict(batch_size=8, devices=ONE, stochastic=False)
    start = adapted.init(jax.random.key(5), params, np.ones((1, toy.FEATURES), np.float32))
    first = finetune(adapted, params, task, adapters=start, steps=3, learning_rate=0.02, **settings)
    before = parallel.compiled_step.cache_info().misses
    second = finetune(adapted, params, task, adapters=start, steps=4, learning_rate=0.05, **settings)
    assert parallel.compiled_step.cache_info().misses == before
    assert largest_difference(first, second) > 1e-3
