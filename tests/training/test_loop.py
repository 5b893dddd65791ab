"""What the loop promises around the numbers: seeds, validation, signals, arguments."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import pefusion_jax as pf
from pefusion_jax.tasks import eval_batches
from pefusion_jax.training import NonFiniteError, Preempted, finetune

ONE = jax.devices()[:1]
BASE = dict(batch_size=8, devices=ONE)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def accuracy(adapted, params, tree, task, split):
    scores, labels = [], []
    for batch in eval_batches(task, split, 24):
        scores.append(toy.logits(task.head.params, adapted.apply(params, tree, **batch["inputs"])))
        labels.append(batch["labels"])
    return toy.accuracy(np.concatenate(scores), np.concatenate(labels))


def test_it_learns_the_task():
    adapted, params = toy.make_model()
    task = toy.make_task()
    start = adapted.init(jax.random.key(0), params, np.ones((1, toy.FEATURES), np.float32))
    tree = finetune(adapted, params, task, steps=200, learning_rate=0.1, batch_size=32, devices=ONE)
    assert accuracy(adapted, params, tree, task, "test") > accuracy(adapted, params, start, task, "test") + 0.3


def test_one_seed_gives_one_result():
    adapted, params = toy.make_model(dropout=0.3)
    task = toy.make_task()
    first, again, other = (finetune(adapted, params, task, steps=12, seed=seed, **BASE) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    # The seed makes the initial adapters, too.
    start = adapted.init(jax.random.key(3), params, np.ones((8, toy.FEATURES), np.float32))
    assert same(finetune(adapted, params, task, steps=12, seed=3, adapters=start, **BASE), first)


def test_result_is_ordinary_and_works_with_arrays_anywhere():
    adapted, params = toy.make_model()
    tree = finetune(adapted, params, toy.make_task(), steps=2, batch_size=16)
    x = np.ones((2, toy.FEATURES), np.float32)
    adapted.apply(params, tree, x)
    elsewhere = jax.device_put(params, jax.devices()[3])
    assert adapted.apply(elsewhere, tree, x).devices() == {jax.devices()[3]}
    assert same(finetune(adapted, params, toy.make_task(), adapters=tree, steps=1, optimizer=optax.sgd(0.0), **BASE), tree)


def test_best_adapters_on_the_validation_split_are_returned(tmp_path):
    adapted, params = toy.make_model()
    task = toy.make_task()
    seen = []

    def metric(scores, labels):
        assert len(scores) == len(labels) == 24
        seen.append(float(np.sum(scores)))
        return [0.1, 0.9, 0.9, 0.2][len(seen) - 1]

    judged = dataclasses.replace(task, metric=metric)
    best = finetune(adapted, params, judged, steps=7, validate_every=2, optimizer=toy.SGD, log_file=tmp_path / "log", **BASE)
    assert len(seen) == 4  # after steps 2, 4, 6 and the last
    assert same(best, finetune(adapted, params, task, steps=4, optimizer=toy.SGD, **BASE))
    assert '{"step": 4, "validation": 0.9}' in (tmp_path / "log").read_text()
    # The score is the metric of the adapters at that step.
    (batch,) = eval_batches(task, "validation", 24)
    scores = toy.logits(task.head.params, adapted.apply(params, best, **batch["inputs"]))
    assert seen[1] == pytest.approx(float(np.sum(scores)), rel=1e-5)
    unclear = dataclasses.replace(task, metric=lambda scores, labels: float("nan"))
    with pytest.raises(NonFiniteError, match="validation score is nan"):
        finetune(adapted, params, unclear, steps=2, validate_every=1, **BASE)
    hidden = [{**task.validation[0], "label": -1}]
    for split, match in (([], "no validation examples"), (hidden, "-1 marks a hidden test label")):
        # Up front: the training split, which would be wanted next, is not there either.
        with pytest.raises(ValueError, match=match):
            none = dataclasses.replace(task, validation=split, train=[])
            finetune(adapted, params, none, steps=2, validate_every=1, **BASE)


def test_best_adapters_survive_a_restart(tmp_path):
    adapted, params = toy.make_model()
    scores = iter([0.9, 0.1, 0.2, 0.3])
    task = dataclasses.replace(toy.make_task(), metric=lambda *_: next(scores))
    settings = dict(validate_every=2, schedule="constant", warmup=0.0, checkpoint_dir=tmp_path, **BASE)
    first = finetune(adapted, params, task, steps=2, **settings)
    assert same(finetune(adapted, params, task, steps=8, **settings), first)


class Signalling:
    """An encoder that raises SIGTERM in this process at its n-th batch."""

    def __init__(self, n):
        self.left = n

    def __call__(self, examples):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.encode(examples)


def test_sigterm_saves_and_the_same_call_goes_on(tmp_path):
    adapted, params = toy.make_model(dropout=0.3)
    task = toy.make_task()
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        settings = dict(steps=10, checkpoint_dir=tmp_path, checkpoint_every=100, **BASE)
        # The first two batches are for init and for what the state belongs to.
        with pytest.raises(Preempted, match="after step 4 of 10; its state is saved"):
            finetune(adapted, params, dataclasses.replace(task, encode=Signalling(6)), **settings)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert [path.name for path in tmp_path.iterdir()] == ["4"]
        resumed = finetune(adapted, params, task, **settings)
        assert same(resumed, finetune(adapted, params, task, steps=10, **BASE))
        assert received == []
        # Without a place to save, the signal is not ours.
        finetune(adapted, params, dataclasses.replace(task, encode=Signalling(3)), steps=4, **BASE)
        assert received == [1]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_sigterm_that_comes_too_late_is_passed_on(tmp_path):
    adapted, params = toy.make_model()
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))

    def metric(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return float("nan")  # ends the run with an error before the signal is looked at

    try:
        task = dataclasses.replace(toy.make_task(), metric=metric)
        with pytest.raises(NonFiniteError):
            finetune(adapted, params, task, steps=1, validate_every=1, checkpoint_dir=tmp_path, **BASE)
        assert received == [1]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_it_runs_outside_the_main_thread(tmp_path):
    adapted, params = toy.make_model()
    results = []
    thread = threading.Thread(
        target=lambda: results.append(finetune(adapted, params, toy.make_task(), steps=3, checkpoint_dir=tmp_path, **BASE))
    )
    thread.start()
    thread.join()
    assert same(results[0], finetune(adapted, params, toy.make_task(), steps=3, **BASE))


@pytest.mark.parametrize("mode", ["network", "layer", "weight"])
def test_it_trains_every_linearization(mode):
    adapted, params = toy.make_model()
    start = adapted.init(jax.random.key(1), params, np.ones((1, toy.FEATURES), np.float32))
    start = jax.tree.map(lambda x: x + 0.1, start)
    tau = finetune(pf.linearize(adapted, start, mode), params, toy.make_task(), steps=3, **BASE)
    assert jax.tree.structure(tau) == jax.tree.structure(start)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(tau))


def test_own_schedule_and_weight_decay():
    adapted, params = toy.make_model()
    start = jax.tree.map(jnp.ones_like, adapted.init(jax.random.key(1), params, np.ones((1, toy.FEATURES), np.float32)))
    still = finetune(adapted, params, toy.make_task(), adapters=start, steps=2, schedule=lambda k: 0.0 * k, **BASE)
    assert same(still, start)
    settings = dict(adapters=start, steps=1, weight_decay=1e6, learning_rate=1e-7, warmup=0)
    decayed = finetune(adapted, params, toy.make_task(), **settings, **BASE)
    for leaf in jax.tree.leaves(decayed):
        np.testing.assert_allclose(leaf, 0.9, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"log_every": 0}, "log_every=0"),
        ({"keep": 0}, "keep=0"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"validate_every": -1}, "validate_every=-1"),
        ({"clip": 0.0}, "clip=0.0 must be above 0"),
        ({"clip": -1.0}, "clip=-1.0 must be above 0"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be a finite number, 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"batch_size": 12, "devices": jax.devices()[:8]}, "nearest sizes that do: 8, 16"),
        ({"mapping": "vmap"}, "choose one of 'pmap', 'shard_map'"),
        ({"schedule": "step"}, "choose one of 'cosine', 'linear', 'constant'"),
        ({"adapters": {"up": {}}}, "no trained leaf"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    adapted, params = toy.make_model()
    with pytest.raises(ValueError, match=message):
        finetune(adapted, params, toy.make_task(), **{**BASE, **settings})
