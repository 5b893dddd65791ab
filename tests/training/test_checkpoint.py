"""What is saved comes back bit for bit, what belongs elsewhere is refused, and a killed run loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from orbax.checkpoint import v1 as ocp

from pefusion_jax.training import checkpoint, finetune, load_adapters, save_adapters

ONE = jax.devices()[:1]


def states(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir())


def example_state(seed=0):
    rng = np.random.default_rng(seed)
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(seed)), optax.adam(1e-3))
    adapters = {"a": {"b": rng.normal(size=(2, 3)).astype(np.float32)}, "empty": {}, "half": jnp.ones(3, jnp.bfloat16)}
    return adapters, optimizer.init(adapters), np.asarray(seed, np.int32), jax.random.key(seed, impl="rbg")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_state_comes_back_bit_for_bit_with_its_keys(tmp_path):
    state = example_state(3)
    assert checkpoint.restore_latest(tmp_path / "none", state, {}) is None
    checkpoint.save(tmp_path, 7, state, {"seed": 3})
    step, restored = checkpoint.restore_latest(tmp_path, example_state(0), {"seed": 3})
    assert step == 7
    assert_same(restored, state)
    draw = [jax.random.normal(s[3], (4,)) for s in (state, restored)]
    np.testing.assert_array_equal(*draw)


def test_only_the_newest_are_kept_and_debris_is_removed(tmp_path):
    for name in ("12.orbax-checkpoint-tmp", "3.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, step, example_state(step), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "notes.txt"]
    assert_same(checkpoint.restore_latest(tmp_path, example_state(), {})[1], example_state(11))
    checkpoint.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 1, example_state(), {}, keep=0)


def test_unfinished_state_is_not_taken_for_a_state(tmp_path):
    checkpoint.save(tmp_path, 5, example_state(5), {})
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.restore_latest(tmp_path, example_state(), {})[0] == 5


# One leaf only: Orbax gives up on damaged data with its other reads still under way, and their complaint, from a thread of
# its own at any later moment, would fail another test.
def test_damaged_state_is_an_error_that_says_what_to_do(tmp_path):
    state = {"only": np.arange(6, dtype=np.float32)}
    checkpoint.save(tmp_path, 5, state, {})
    damaged = [path for path in (tmp_path / "5").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert damaged
    for path in damaged:
        path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"5 cannot be read: .*remove .*, pass resume=False"):
        checkpoint.restore_latest(tmp_path, state, {})


def test_state_of_another_run_is_refused_and_says_what_differs(tmp_path):
    adapted, params = toy.make_model()
    task = toy.make_task()
    settings = dict(steps=2, batch_size=8, devices=ONE, checkpoint_dir=tmp_path)
    tree = finetune(adapted, params, task, **settings)
    assert states(tmp_path) == [2]
    assert_same(finetune(adapted, params, task, **settings), tree)

    def refused(match, *, adapted=adapted, params=params, task=task, **other):
        with pytest.raises(ValueError, match=match) as caught:
            finetune(adapted, params, task, **{**settings, **other})
        assert "pass resume=False" in str(caught.value)

    refused("base weights is '.*' there", params=jax.tree.map(lambda x: x * 2, params))
    refused("seed is 0 there and 1 now", seed=1)
    refused("config: batch_size is 8 there and 16 now", batch_size=16)
    refused("config: learning_rate is 0.001 there and 0.1 now", learning_rate=0.1)
    refused("config: steps is 2 there and 5 now", steps=5)
    refused("config: optimizer is 'adamw' there and 'given by the caller' now", optimizer=toy.SGD)
    refused("task: name is 'toy' there and 'other' now", task=toy.make_task("other"))
    start = adapted.init(jax.random.key(9), params, np.ones((1, toy.FEATURES), np.float32))
    refused("initial adapters is", adapters=start)
    narrow = toy.pf.adapt(toy.Net(), toy.pf.LoRA(rank=2, alpha=4, targets="up"))
    refused("adapters: down/lora_a is 'float32\\[8, 2\\]' there and absent now", adapted=narrow)

    other = finetune(adapted, params, task, seed=1, resume=False, **settings)
    assert states(tmp_path) == [2]
    assert_same(finetune(adapted, params, task, seed=1, **settings), other)


def test_state_of_another_model_expansion_head_or_data_is_refused(tmp_path):
    adapted, params = toy.make_model()
    one, two = (adapted.init(jax.random.key(k), params, np.ones((1, toy.FEATURES), np.float32)) for k in (1, 2))
    task = toy.make_task()
    settings = dict(steps=2, batch_size=8, devices=ONE, checkpoint_dir=tmp_path, adapters=jax.tree.map(jnp.zeros_like, one))
    tree = finetune(toy.pf.linearize(adapted, one), params, task, **settings)
    # A method, a task and a model that say the same are the same, whichever objects they are.
    assert_same(finetune(toy.pf.linearize(toy.make_model()[0], one), params, toy.make_task(), **settings), tree)

    def refused(match, adapted, task=task):
        with pytest.raises(ValueError, match=match):
            finetune(adapted, params, task, **settings)

    refused("point of expansion is", toy.pf.linearize(adapted, two))
    refused("mode is 'network' there and 'layer' now", toy.pf.linearize(adapted, one, "layer"))
    louder = toy.pf.adapt(toy.Net(), toy.pf.LoRA(rank=2, alpha=64, targets="up|down"))
    refused(r"methods is .*alpha=4,.* there and .*alpha=64,", toy.pf.linearize(louder, one))
    refused(r"model is .*dropout = 0.0.* there and .*dropout = 0.3", toy.pf.linearize(toy.make_model(0.3)[0], one))
    same = toy.pf.linearize(adapted, one)
    refused("task: head is", same, dataclasses.replace(task, head=toy.make_task(seed=1).head))
    refused("task: training labels is", same, dataclasses.replace(task, label=lambda example: (example["label"] + 1) % 3))
    refused("first inputs is", same, dataclasses.replace(task, encode=lambda e: {"x": 2 * toy.encode(e)["x"]}))
    refused(
        "task: loss is '<function loss>' there and '<function .*<lambda>>'", same, dataclasses.replace(task, loss=lambda *_: 0)
    )
    refused("task: metric is '<function accuracy>' there", same, dataclasses.replace(task, metric=lambda *_: 0.0))


def test_a_run_that_ended_between_validations_is_not_lengthened(tmp_path):
    adapted, params = toy.make_model()
    settings = dict(schedule="constant", warmup=0.0, batch_size=8, devices=ONE, validate_every=2)
    for folder, steps in (("on", 4), ("off", 3)):
        finetune(adapted, params, toy.make_task(), steps=steps, checkpoint_dir=tmp_path / folder, **settings)
    longer = finetune(adapted, params, toy.make_task(), steps=8, checkpoint_dir=tmp_path / "on", **settings)
    assert_same(longer, finetune(adapted, params, toy.make_task(), steps=8, **settings))
    with pytest.raises(ValueError, match="ends between validations is 3 there and absent now"):
        finetune(adapted, params, toy.make_task(), steps=8, checkpoint_dir=tmp_path / "off", **settings)


def test_run_with_constant_rate_may_be_lengthened(tmp_path):
    adapted, params = toy.make_model()
    settings = dict(schedule="constant", warmup=0.0, batch_size=8, devices=ONE)
    finetune(adapted, params, toy.make_task(), steps=3, checkpoint_dir=tmp_path, **settings)
    longer = finetune(adapted, params, toy.make_task(), steps=6, checkpoint_dir=tmp_path, **settings)
    assert_same(longer, finetune(adapted, params, toy.make_task(), steps=6, **settings))
    with pytest.raises(ValueError, match="state of step 6, beyond steps=3"):
        finetune(adapted, params, toy.make_task(), steps=3, checkpoint_dir=tmp_path, **settings)


def test_adapters_file_is_bit_for_bit(tmp_path):
    tree = {
        "layer": {"lora_a": np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32), "half": jnp.ones(5, jnp.bfloat16)},
        "count": np.asarray(3, np.int32),
    }
    metadata = {"task": "toy", "rank": 2, "scores": {"a": [1, 2.5, None]}}
    path = tmp_path / "new" / "adapters.safetensors"
    save_adapters(path, tree, metadata)
    loaded, read = load_adapters(path)
    assert_same(loaded, tree)
    assert read == metadata
    # Readable by the format's own library, under slash paths.
    from safetensors.numpy import load_file

    assert set(load_file(path)) == {"layer/lora_a", "layer/half", "count"}
    before = path.read_bytes()
    save_adapters(path, tree, metadata)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_adapters_that_cannot_be_stored_are_refused(tmp_path):
    path = tmp_path / "adapters.safetensors"
    bad = {"a": {"b": np.asarray([1.0, np.nan, np.inf], np.float32)}}
    with pytest.raises(ValueError, match="'a/b' holds 2 NaN or infinite elements of 3"):
        save_adapters(path, bad)
    with pytest.raises(ValueError, match="holds no adapters"):
        save_adapters(path, {"a": {}})
    with pytest.raises(ValueError, match="'a' is a float, not an array"):
        save_adapters(path, {"a": 1.0})
    with pytest.raises(ValueError, match="string keys without slashes"):
        save_adapters(path, {"a/b": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="adapters.safetensors: 'a' is float64, which JAX would make float32; cast it"):
        save_adapters(path, {"a": np.ones(2)})
    assert list(tmp_path.iterdir()) == []
    from safetensors.numpy import save_file

    save_file({"a/b": bad["a"]["b"]}, path)
    with pytest.raises(ValueError, match="'a/b' holds 2 NaN"):
        load_adapters(path)
    one = np.ones(2, np.float32)
    for tensors, metadata, match in (
        ({"a": np.asarray([2**40])}, None, "'a' is int64, which JAX would make int32"),
        ({"x": one, "x/y": one}, None, "'x/y' runs through the leaf 'x'"),
        ({"x": one}, {"kind": "[" * 100_000}, "the metadata 'kind' is nested too deeply"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=f"adapters.safetensors: {match}"):
            load_adapters(path)
    with pytest.raises(OSError):
        load_adapters(tmp_path / "absent.safetensors")


class Server:
    """Forks runs (see ``killed_run.py``) and hands out their process numbers."""

    def __init__(self, cache):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_run.py")), str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, folder, steps):
        self.process.stdin.write(f"{folder} {steps}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def close(self):
        self.process.kill()
        self.process.communicate()


def steps_logged(folder):
    path = folder / "log.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def test_run_killed_at_ten_random_moments_ends_with_the_bits_of_one_that_was_not(tmp_path):
    total = 96
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    draw = random.Random(0)
    server = Server(tmp_path / "cache")
    try:
        server.start(whole, total)
        assert server.wait() == 0, (whole / "output").read_text()
        # Seven kills when the run has reached a random step, a random moment later; three while it starts or loads.
        moments: list[int | None] = sorted(draw.sample(range(1, total - 32), 7))
        for _ in range(3):
            moments.insert(draw.randrange(len(moments)), None)
        for moment in moments:
            child = server.start(killed, total)
            if moment is None:
                time.sleep(draw.uniform(0, 0.5))
            else:
                deadline = time.monotonic() + 50
                while steps_logged(killed) < moment and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(draw.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL, (killed / "output").read_text()
        server.start(killed, total)
        assert server.wait() == 0, (killed / "output").read_text()
    finally:
        server.close()
    assert (killed / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    # Optimizer state, random keys (the run's and the optimizer's own) and the best adapters so far, too.
    last, other = (ocp.load(folder / "state" / str(total)) for folder in (killed, whole))
    assert len([path for path in last if path.endswith(("key", "rng_key"))]) == 2
    assert_same(last, other)
    assert states(killed / "state") == states(whole / "state") == [total - 4, total]
    # No step stands twice or is missing, and the losses are those of the uninterrupted run.
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (killed, whole)]
    for log in logs:
        for record in log:
            record.pop("examples_per_second", None)
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0] if "loss" in record] == list(range(1, total + 1))
