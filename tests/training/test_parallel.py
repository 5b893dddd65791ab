"""The mapping changes no number, moves adapter gradients only, and compiles once."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.tasks import train_batch
from pefusion_jax.training import finetune, load_adapters, parallel
from pefusion_jax.training.step import init_state, make_step

EIGHT = jax.devices()[:8]
ONE = EIGHT[:1]


def relative(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(y).max() for _, y in pairs)


@pytest.mark.parametrize("mode", ["adapters", "linearized"])
def test_eight_devices_equal_one_and_both_mappings_agree(mode):
    adapted, params = toy.make_model()
    task = toy.make_task()
    if mode == "linearized":
        adapted = pf.linearize(adapted, adapted.init(jax.random.key(1), params, np.ones((1, toy.FEATURES), np.float32)))
    # Plain gradient descent: Adam would turn a difference in the last bit of a tiny gradient into one of an update.
    settings = dict(steps=6, batch_size=16, optimizer=toy.SGD)
    runs = {
        (mapping, len(devices)): finetune(adapted, params, task, mapping=mapping, devices=devices, **settings)
        for mapping in parallel.MAPPINGS
        for devices in (ONE, EIGHT)
    }
    for other in runs.values():
        assert relative(other, runs["pmap", 1]) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, runs["pmap", 8], runs["shard_map", 8])


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_adapter_gradients_and_three_scalars_cross_the_wire(mapping, accumulate):
    model, params = toy.Net(), toy.make_model()[1]
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets="up|down", freeze_a=True))
    tree = adapted.init(jax.random.key(0), params, np.ones((1, toy.FEATURES), np.float32))
    trained, held = trees.split(tree, adapted.trainable(tree))
    optimizer = optax.adamw(1e-3)
    step = make_step(adapted, optimizer, toy.features, toy.logits, toy.loss, accumulate=accumulate)
    mapped = parallel.map_step(step, mapping, EIGHT)
    task = toy.make_task()
    arguments = parallel.replicate((init_state(trained, optimizer, 0), params, held, task.head.params), EIGHT)
    batch = parallel.place_batch(train_batch(task, 0, 16, 0), mapping, EIGHT)
    compiled = mapped.lower(*arguments, batch).compile()
    assert parallel.allreduce_elements(compiled) == trees.size(trained) + 3
    assert trees.size(trained) == 2 * (8 + 4)
    assert not any(name in compiled.as_text() for name in ("all-gather(", "all-to-all(", "reduce-scatter("))


def test_all_reduced_elements_are_read_from_the_program():
    text = """
      %all-reduce.1 = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1, replica_groups=[1,8]<=[8]
      %all-reduce-start.2 = bf16[10]{0:T(128)} all-reduce-start(%c), channel_id=2
      %all-reduce-done.2 = bf16[10]{0:T(128)} all-reduce-done(%all-reduce-start.2)
      %get-tuple-element = f32[2,3]{1,0} get-tuple-element(%all-reduce.1), index=0
      ROOT %add = f32[100] add(%x, %y), metadata={op_name="all-reduce(fake"}
    """
    assert parallel.allreduce_elements(text) == 6 + 1 + 10


def test_equal_shapes_compile_once_over_tasks_and_calls():
    model, params = toy.Net(), toy.make_model()[1]
    traced = []

    class Counting(toy.Net):
        def __call__(self, x):
            traced.append(x.shape)
            return super().__call__(x)

    adapted = pf.adapt(Counting(), pf.LoRA(rank=2, targets="up|down"))
    start = pf.adapt(model, pf.LoRA(rank=2, targets="up|down")).init(jax.random.key(0), params, np.ones((1, 6), np.float32))
    settings = dict(adapters=start, steps=4, batch_size=8, devices=ONE, validate_every=2)
    finetune(adapted, params, toy.make_task("first"), **settings)
    once = len(traced)
    assert once > 0
    finetune(adapted, params, toy.make_task("second", seed=1), seed=5, **settings)
    finetune(adapted, params, toy.make_task("first"), **settings)
    assert len(traced) == once
    finetune(adapted, params, toy.make_task("first"), **{**settings, "batch_size": 16})
    assert len(traced) > once


def test_base_parameters_are_placed_once():
    _, params = toy.make_model()
    there = parallel.replicate(params, EIGHT)
    again = parallel.replicate(there, EIGHT)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(again), strict=True):
        assert a.sharding.is_fully_replicated and a.sharding.device_set == set(EIGHT)
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert x.data.unsafe_buffer_pointer() == y.data.unsafe_buffer_pointer()
    # A single device keeps the caller's memory too, unless the tree is to be donated.
    leaf = jnp.arange(3.0)
    assert parallel.replicate(leaf, ONE).unsafe_buffer_pointer() == leaf.unsafe_buffer_pointer()
    assert parallel.replicate(leaf, ONE, copy=True).unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
def test_no_step_moves_anything_but_the_batch(mapping):
    adapted, params = toy.make_model()
    task = toy.make_task()
    optimizer = toy.SGD
    tree = adapted.init(jax.random.key(0), params, np.ones((1, toy.FEATURES), np.float32))
    run = parallel.map_step(make_step(adapted, optimizer, toy.features, toy.logits, toy.loss), mapping, EIGHT)
    state = parallel.replicate(init_state(tree, optimizer, 0), EIGHT, copy=True)
    fixed = parallel.replicate((params, {}, task.head.params), EIGHT)
    split = parallel.split_rows if mapping == "shard_map" else lambda batch, devices: parallel.shard_batch(batch, 8)
    batches = [split(train_batch(task, i, 16, 0), EIGHT) for i in range(3)]
    state, _ = run(state, *fixed, batches[0])
    if mapping == "pmap":
        mesh = parallel.data_mesh(EIGHT)
        batches = jax.device_put(batches, jax.sharding.NamedSharding(mesh, jax.P(parallel.AXIS)))
    with jax.transfer_guard("disallow"):
        for batch in batches[1:]:
            state, metrics = run(state, *fixed, batch)
    assert int(jax.device_get(state.step)) == 3


def test_round_trip_of_placing():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3)}
    back = parallel.unreplicate(parallel.replicate(tree, EIGHT))
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert isinstance(back["a"], np.ndarray)
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    rows = {"x": np.arange(48).reshape(16, 3)}
    assert parallel.shard_batch(rows, 8)["x"].shape == (8, 2, 3)
    np.testing.assert_array_equal(parallel.shard_batch(rows, 8)["x"].reshape(16, 3), rows["x"])


def test_sizes_that_do_not_split_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="batch_size=20 does not split evenly over 8 devices x accumulate=1.*16, 24"):
        parallel.check_batch_size(20, 8, 1)
    with pytest.raises(ValueError, match="nearest sizes that do: 16$"):
        parallel.check_batch_size(7, 8, 2)
    with pytest.raises(ValueError, match="accumulate=0"):
        parallel.check_batch_size(8, 8, 0)
    with pytest.raises(ValueError, match="20 rows cannot be split over 8 devices"):
        parallel.shard_batch({"x": np.zeros((20, 2))}, 8)
    with pytest.raises(ValueError, match="choose one of 'pmap', 'shard_map'"):
        parallel.held_devices("jit", EIGHT)
    with pytest.raises(ValueError, match="devices must hold"):
        parallel.held_devices("pmap", ())


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    repository = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(port), str(tmp_path)]
    workers = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)

    adapted, params = toy.make_model()
    settings = dict(steps=40, batch_size=16, optimizer=toy.SGD, devices=ONE)
    alone = {
        "pmap": finetune(adapted, params, toy.make_task(), **settings),
        "shard_map": finetune(adapted, params, toy.make_task(), validate_every=20, **settings),
    }
    for mapping, expected in alone.items():
        (first, _), (second, _) = (load_adapters(tmp_path / f"{mapping}{i}.safetensors") for i in range(2))
        jax.tree.map(np.testing.assert_array_equal, first, second)
        assert relative(first, expected) < 1e-5  # the last bits of 40 updates add up
    # A signal to one process stopped both at one step, and they went on from there. The first process alone writes.
    said = [(tmp_path / f"stopped{i}").read_text() for i in range(2)]
    assert said[0] == said[1] and 3 <= int(re.search(r"after step (\d+) of 40", said[0])[1]) < 40
    steps = [json.loads(line)["step"] for line in (tmp_path / "log0.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)) and not (tmp_path / "log1.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "state").iterdir() if path.is_dir()) == ["30", "40"]
