"""Several tasks at once: losses under their own heads, generated and plain models, and what the loop promises for one task."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.generators import PerTask
from pefusion_jax.tasks import Head, cross_entropy, inputs_for, linear_logits, mixed_batch, squared_error, train_batch
from pefusion_jax.training import Preempted, finetune, finetune_together, parallel
from pefusion_jax.training.losses import stacked_heads
from pefusion_jax.training.step import init_state, make_step

EIGHT = jax.devices()[:8]
ONE = EIGHT[:1]
X = np.ones((1, toy.FEATURES), np.float32)
NAMES = ("one", "two", "three")
# Not too fast for the regression.
SGD, STILL = optax.sgd(0.05), optax.sgd(0.0)
SETTINGS = dict(batch_size=16, groups=8, optimizer=SGD, clip=None)


def pearson(scores, labels):
    return float(np.corrcoef(scores[:, 0], labels)[0, 1])


def make_tasks():
    """Two classifications, of two and three classes, and a regression."""
    one, two, three = (toy.make_task(name, seed, 24 * (seed + 1)) for seed, name in enumerate(NAMES))
    two = dataclasses.replace(two, loss=cross_entropy)
    targets = [[{"x": row["x"], "label": float(row["x"][0])} for row in split] for split in (three.train, three.validation)]
    three = dataclasses.replace(three, classes=(), train=targets[0], validation=targets[1], loss=squared_error, metric=pearson)
    return [one, two, three]


def generated():
    """A model with adapters for each task, which knows the tasks in another order, and one more."""
    adapted, params = toy.make_model()
    return pf.generate(adapted, PerTask(tasks=("three", "spare", "one", "two"))), params


MODEL = toy.make_model()
MADE = generated()


def start_of(adapted, params):
    tree = adapted.init(jax.random.key(3), params, X)
    return jax.tree.map(lambda leaf: leaf + 0.1, tree)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def relative(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(y).max() for _, y in pairs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numpy_losses(tasks, batch, outputs):
    """The loss of each row under its own task's head and loss, and its task."""
    owner = np.repeat(batch["inputs"]["task"], len(batch["labels"]) // len(batch["inputs"]["task"]))
    losses = []
    for row, number, label in zip(np.asarray(outputs, np.float64), owner, batch["labels"], strict=True):
        z = row @ np.asarray(tasks[number].head.params["kernel"], np.float64)
        losses.append((z[0] - label) ** 2 if not tasks[number].classes else np.log(np.exp(z).sum()) - z[int(label)])
    return np.asarray(losses), owner


@pytest.mark.parametrize("kind", ["plain", "generated"])
def test_losses_under_own_heads_agree_with_numpy(kind, tmp_path):
    adapted, params = MODEL if kind == "plain" else MADE
    tasks, start = make_tasks(), start_of(adapted, params)
    if kind == "generated":  # adapters of its own for each task
        start = jax.tree.map(lambda leaf: leaf * jnp.arange(1.0, 5.0).reshape(4, 1, 1), start)
    log = tmp_path / "log"
    settings = SETTINGS | dict(optimizer=STILL, adapters=start, log_file=log, log_every=2)  # three steps at one point
    finetune_together(adapted, params, tasks, steps=3, devices=ONE, **settings)
    found = {}
    apply = jax.jit(lambda adapters, x: MODEL[0].apply(params, adapters, x))
    of_task = [adapted.materialise(params, start, number) for number in range(len(adapted.tasks))]
    for step in range(3):
        batch = mixed_batch(tasks, step, 16, 0, groups=8)
        if kind == "plain":
            outputs = apply(start, batch["inputs"]["x"])
        else:
            numbers = [adapted.tasks.index(tasks[number].name) for number in batch["inputs"]["task"]]
            rows = np.arange(16)
            outputs = np.stack([apply(of_task[number], batch["inputs"]["x"]) for number in range(4)])
            outputs = outputs[np.repeat(numbers, 2), rows]
        found[step + 1] = numpy_losses(tasks, batch, outputs)
    records = lines(log)
    assert [record["step"] for record in records] == [2, 3]
    assert records[0]["loss"] == pytest.approx(found[2][0].mean(), rel=1e-5)
    # By task: since the line before.
    for record, steps in zip(records, ((1, 2), (3,)), strict=True):
        losses, owner = (np.concatenate([found[step][part] for step in steps]) for part in (0, 1))
        expected = {f"loss/{NAMES[n]}": losses[owner == n].mean() for n in set(owner)}
        assert {k: v for k, v in record.items() if k.startswith("loss/")} == pytest.approx(expected, rel=1e-5)


def test_one_task_together_is_one_task_alone():
    adapted, params = MODEL
    task = make_tasks()[0]
    together = finetune_together(adapted, params, [task], steps=4, devices=ONE, **SETTINGS)
    alone = finetune(adapted, params, task, steps=4, devices=ONE, batch_size=16, optimizer=SGD, clip=None)
    assert relative(together, alone) < 1e-6


def test_devices_and_accumulation_change_nothing():
    adapted, params = MADE
    tasks, start = make_tasks(), start_of(adapted, params)

    def train(**options):
        return finetune_together(adapted, params, tasks, adapters=start, steps=4, **SETTINGS, **options)

    one = train(devices=ONE)
    assert relative(one, start) > 1e-2
    eight = train(devices=EIGHT)
    assert relative(eight, one) < 1e-6
    assert relative(train(devices=ONE, accumulate=4), one) < 1e-6
    assert same(train(devices=EIGHT, mapping="shard_map"), eight)


def halved_logits(head_params, x):
    return x @ head_params["double"] / 2


def test_heads_of_other_kinds_and_widths_in_one_batch():
    adapted, params = MODEL
    tasks, start = make_tasks(), start_of(*MODEL)
    kernel = np.asarray(tasks[1].head.params["kernel"])
    padded = Head(
        {"kernel": np.pad(kernel, ((0, 0), (0, 29))), "bias": np.where(np.arange(32) < 3, 0, -1e9).astype(np.float32)},
        toy.features,
        linear_logits,
    )
    doubled = Head({"double": 2 * np.asarray(tasks[2].head.params["kernel"])}, toy.features, halved_logits)
    mixed = [tasks[0], *(dataclasses.replace(t, head=h) for t, h in zip(tasks[1:], (padded, doubled), strict=True))]
    assert [(each.stack, each.place) for each in stacked_heads(mixed)[0]] == [(0, 0), (1, 0), (2, 0)]
    assert [(each.stack, each.place) for each in stacked_heads(mixed + tasks)[0][3:]] == [(0, 1), (0, 2), (0, 3)]
    settings = dict(adapters=start, steps=3, devices=ONE, **SETTINGS)
    alike = finetune_together(adapted, params, tasks, **settings)
    assert relative(alike, start) > 1e-2
    assert relative(finetune_together(adapted, params, mixed, **settings), alike) < 1e-6


def test_adapters_of_a_task_move_by_its_rows_alone():
    adapted, params = MADE
    tasks, start = make_tasks(), start_of(adapted, params)
    tree = finetune_together(adapted, params, tasks, adapters=start, steps=1, devices=ONE, **SETTINGS)
    batch = mixed_batch(tasks, 0, 16, 0, groups=8)
    owner = np.repeat(batch["inputs"]["task"], 2)

    @jax.jit
    def gradient(adapters, head, x, labels):
        def loss(adapters):
            return jnp.sum(cross_entropy(toy.logits(head, MODEL[0].apply(params, adapters, x)), labels)) / 16

        return jax.grad(loss)(adapters)

    for number, task in enumerate(tasks[:2]):
        mine = owner == number
        at = adapted.materialise(params, start, task.name)
        grads = gradient(at, task.head.params, batch["inputs"]["x"][mine], batch["labels"][mine].astype(np.int32))
        expected = jax.tree.map(lambda leaf, g: leaf - 0.05 * g, at, grads)
        assert relative(adapted.materialise(params, tree, task.name), expected) < 1e-6
    assert same(adapted.materialise(params, tree, "spare"), adapted.materialise(params, start, "spare"))


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
def test_a_generated_model_is_trained_on_one_task(mapping):
    adapted, params = MADE
    task, start = make_tasks()[1], start_of(adapted, params)
    settings = dict(steps=3, batch_size=16, optimizer=SGD, devices=EIGHT, mapping=mapping)
    tree = finetune(adapted, params, task, adapters=start, **settings)
    of_task = adapted.materialise(params, start, "two")
    plain = finetune(MODEL[0], params, task, adapters=of_task, **settings | {"devices": ONE, "mapping": "pmap"})
    assert relative(adapted.materialise(params, tree, "two"), plain) < 1e-6
    assert same(adapted.materialise(params, tree, "one"), adapted.materialise(params, start, "one"))
    with pytest.raises(ValueError, match="'three', 'spare', 'one', 'two', not for 'tow'; nearest: 'two'"):
        finetune(adapted, params, dataclasses.replace(task, name="tow"), **settings)


def test_a_generated_model_is_evaluated_with_each_tasks_number():
    adapted, params = MADE
    tasks = make_tasks()
    tree = jax.tree.map(lambda leaf: leaf * jnp.arange(-2.0, 2.0).reshape(4, 1, 1), start_of(adapted, params))
    scores = pf.evaluate(adapted, params, tree, tasks[:2], split="validation")
    for task in tasks[:2]:
        of_task = adapted.materialise(params, tree, task.name)
        assert scores[task.name] == pf.evaluate(MODEL[0], params, of_task, [task], split="validation")[task.name]
        features, _ = pf.evaluation.predict(adapted, params, tree, task)
        plain, _ = pf.evaluation.predict(MODEL[0], params, of_task, task)
        np.testing.assert_allclose(features, plain, rtol=1e-5, atol=1e-6)
    both = pf.evaluation.evaluate_many(adapted, params, [tree, tree], tasks[:2], at_once=2)
    assert dict(both[1]) == dict(pf.evaluation.evaluate_many(adapted, params, [tree], tasks[:2], at_once=1)[0])
    np.testing.assert_array_equal(
        pf.evaluation.sweep_trees(adapted, params, lambda c: tree, [[0.0]], tasks[:2], split="validation")[0],
        list(both[0].values()),
    )
    spare = dataclasses.replace(tasks[0], name="other")
    for call in (pf.evaluate, pf.evaluation.predict):
        with pytest.raises(ValueError, match="not for 'other'; nearest: "):
            call(adapted, params, tree, [spare] if call is pf.evaluate else spare)
    assert set(pf.evaluation.evaluate_base(adapted, params, [spare])) == {"other"}  # no adapters, no difference
    assert inputs_for(MODEL[0], spare, {"x": X}) == {"x": X}


def test_a_linearized_generated_model_has_outputs_to_combine():
    adapted, params = MADE
    tasks, start = make_tasks()[:2], start_of(MADE[0], MADE[1])
    linear = pf.linearize(adapted, start)
    taus = {name: jax.tree.map(lambda leaf, s=sign: s * 0.1 * leaf, start) for name, sign in (("a", 1.0), ("b", -2.0))}
    cached = pf.evaluation.cache_outputs(linear, params, taus, tasks)
    fused = jax.tree.map(lambda a, b: 0.5 * a + 0.25 * b, taus["a"], taus["b"])
    scores = pf.evaluate(linear, params, fused, tasks, split="validation")
    np.testing.assert_allclose(pf.evaluation.sweep(cached, tasks, [[0.5, 0.25]])[0], list(scores.values()))


def test_searches_and_disentanglement_see_the_task():
    adapted, params = MADE
    tasks, start = make_tasks()[:2], start_of(MADE[0], MADE[1])
    objective = pf.fusion.objective(adapted, params, tasks, batch_size=24)
    for task, term in zip(tasks, objective.terms, strict=True):
        total, count = term.function(term.arrays, start, term.batches[0])
        plain = pf.fusion.objective(MODEL[0], params, [task], batch_size=24).terms[0]
        expected, _ = plain.function(plain.arrays, adapted.materialise(params, start, task.name), term_batch(term))
        assert float(total) == pytest.approx(float(expected), rel=1e-5) and count == 24
    # Adapters that belong to one task alone are never in another's way, wherever they are moved to.
    own = {name: jnp.asarray([name == known for known in adapted.tasks]).reshape(4, 1, 1) for name in NAMES[:2]}
    vectors = {name: jax.tree.map(lambda leaf, m=mine: jnp.where(m, 9.0 * leaf, leaf), start) for name, mine in own.items()}
    settings = dict(alphas=(0.0, 1.0), space="adapter", init=start)
    found = pf.evaluation.disentanglement_error(adapted, params, vectors, NAMES[:2], tasks, **settings)
    assert not found.error.any()
    shared = {name: adapted.materialise(params, vector, name) for name, vector in vectors.items()}
    settings["init"] = adapted.materialise(params, start, "one")
    found = pf.evaluation.disentanglement_error(MODEL[0], params, shared, NAMES[:2], tasks, **settings)
    assert found.error.any()


def term_batch(term):
    batch = term.batches[0]
    return {**batch, "inputs": {name: value for name, value in batch["inputs"].items() if name != "task"}}


def test_statistics_are_those_of_the_tasks_own_adapters():
    adapted, params = MADE
    task = make_tasks()[1]
    tree = jax.tree.map(lambda leaf: leaf * jnp.arange(-2.0, 2.0).reshape(4, 1, 1), start_of(adapted, params))
    settings = dict(examples=8, batch_size=8, kinds=("inputs",))
    found = pf.statistics(adapted, params, tree, task, **settings)
    plain = pf.statistics(MODEL[0], params, adapted.materialise(params, tree, "two"), task, **settings)
    np.testing.assert_array_equal(found.moments["down/kernel"].inputs, plain.moments["down/kernel"].inputs)
    with pytest.raises(ValueError, match="not for 'tow'; nearest: 'two'"):
        pf.statistics(adapted, params, tree, dataclasses.replace(task, name="tow"), **settings)


@pytest.mark.parametrize("mapping", parallel.MAPPINGS)
def test_one_number_for_each_task_crosses_the_wire_besides(mapping):
    adapted, params = MODEL
    tasks, tree = make_tasks(), start_of(*MODEL)
    table, stacks = stacked_heads(tasks)
    step = make_step(adapted, SGD, toy.features, toy.logits, table, accumulate=2)
    heads = {"stacks": stacks, "numbers": np.zeros(3, np.int32)}
    arguments = parallel.replicate((init_state(tree, SGD, 0), params, {}, heads), EIGHT)
    batch = parallel.place_batch(mixed_batch(tasks, 0, 32, 0, groups=16), mapping, EIGHT)
    compiled = parallel.map_step(step, mapping, EIGHT).lower(*arguments, batch).compile()
    assert parallel.allreduce_elements(compiled) == trees.size(tree) + 3 + 3


class Stopping:
    """A metric that raises SIGTERM at its n-th call: the run is asked to end after a validation."""

    def __init__(self, calls):
        self.left = calls

    def __repr__(self):
        return repr(toy.accuracy)  # a state belongs to this metric, not to how often it was called

    def __call__(self, scores, labels):
        import os
        import signal

        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.accuracy(scores, labels)


def test_a_stopped_run_goes_on_to_the_bits_of_one_that_was_not(tmp_path):
    params = MADE[1]
    model = toy.make_model(dropout=0.3)[0]
    adapted = pf.generate(model, PerTask(tasks=NAMES))
    tasks = make_tasks()
    settings = dict(
        steps=9,
        batch_size=12,
        groups=6,
        devices=ONE,
        validate_every=3,
        optimizer=SGD,
        log_every=1,
        temperature=float("inf"),
        label_smoothing=0.1,
    )
    tasks[0] = dataclasses.replace(tasks[0], loss=cross_entropy)
    whole = finetune_together(adapted, params, tasks, log_file=tmp_path / "whole", **settings)
    settings |= dict(log_file=tmp_path / "log", checkpoint_dir=tmp_path / "state")
    with pytest.raises(Preempted, match="the run over 3 tasks was asked to end after step 6 of 9"):
        stopping = [dataclasses.replace(tasks[0], metric=Stopping(2)), *tasks[1:]]
        finetune_together(adapted, params, stopping, **settings)
    with pytest.raises(ValueError, match="config: temperature is 'inf' there and '1.0' now"):
        finetune_together(adapted, params, tasks, **settings | {"temperature": 1.0})
    with pytest.raises(
        ValueError, match=r"belongs to another run: .*task 'three' is .* tasks is .* there and \['one', 'two'\] now"
    ):
        finetune_together(adapted, params, tasks[:2], **settings)
    assert same(finetune_together(adapted, params, tasks, **settings), whole)

    def told(path):
        return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines(path)]

    assert told(tmp_path / "log") == told(tmp_path / "whole")
    validations = [line for line in told(tmp_path / "log") if "validation" in line]
    assert [line["step"] for line in validations] == [3, 6, 9]
    for line in validations:
        assert line["validation"] == pytest.approx(np.mean([line[f"validation/{name}"] for name in NAMES]))


def test_inputs_of_every_task_and_what_chooses_the_best_state_belong_to_a_run(tmp_path):
    adapted, params = MODEL
    tasks = make_tasks()
    settings = dict(steps=1, batch_size=4, groups=1, optimizer=STILL, devices=ONE, validate_every=1, checkpoint_dir=tmp_path)
    tree = finetune_together(adapted, params, tasks, **settings)
    assert same(finetune_together(adapted, params, make_tasks(), **settings), tree)
    assert 0 != mixed_batch(tasks, 0, 4, 0, groups=1)["inputs"]["task"][0], "the first batch has nothing of the task"
    one = tasks[0]
    for split, rows, what in (
        ("train", [{**row, "x": row["x"] + 1} for row in one.train], "training inputs"),
        ("validation", one.validation[1:], "validation examples"),
        ("validation", [{**row, "label": (row["label"] + 1) % 3} for row in one.validation], "validation labels"),
    ):
        with pytest.raises(ValueError, match=f"task 'one': {what} is .* there and .* now"):
            finetune_together(adapted, params, [dataclasses.replace(one, **{split: rows}), *tasks[1:]], **settings)


def test_numbers_of_tasks_belong_to_a_run(tmp_path):
    """The order of a generator's tasks says what the rows of its tree are."""
    task, params = make_tasks()[1], MADE[1]
    settings = dict(steps=1, batch_size=16, optimizer=STILL, devices=ONE, checkpoint_dir=tmp_path)
    for order in (("one", "two"), ("two", "one")):
        adapted = pf.generate(MODEL[0], PerTask(tasks=order))
        tree = start_of(MADE[0], params)
        tree = jax.tree.map(lambda leaf: leaf[:2], tree)
        if order == ("one", "two"):
            finetune(adapted, params, task, adapters=tree, **settings)
            continue
        with pytest.raises(ValueError, match=r"belongs to another run: .*numbers of tasks"):
            finetune(adapted, params, task, adapters=tree, **settings)


def test_one_task_has_nothing_to_contrast():
    adapted, params = MODEL
    with pytest.raises(ValueError, match="instances of two or more tasks in a batch, and there is 'one' alone"):
        finetune_together(adapted._replace(auxiliary=auxiliary), params, make_tasks()[:1], steps=1, devices=ONE)


def test_patience_ends_a_run_and_survives_a_restart(tmp_path):
    adapted, params = MODEL
    settings = dict(steps=40, batch_size=8, devices=ONE, validate_every=2, optimizer=SGD)
    asked = []

    def train(scores, steps=40, **options):
        def metric(*_):
            asked.append(1)
            return next(scores)

        asked.clear()
        task = dataclasses.replace(toy.make_task(), metric=metric)
        return finetune(adapted, params, task, **settings | {"steps": steps} | options)

    four = finetune(adapted, params, toy.make_task(), **settings | {"steps": 4, "validate_every": 0})
    # Better at 2 and 4; of 6 to 10, no score is better than that of 4.
    assert same(train(iter([0.1, 0.5, 0.5, 0.2, 0.4, 0.9]), patience=3), four)
    assert len(asked) == 5
    folder = dict(patience=3, checkpoint_dir=tmp_path)
    train(iter([0.1, 0.5, 0.5, 0.2]), steps=8, **folder)
    assert same(train(iter([0.4, 0.9]), **folder), four)
    assert len(asked) == 1
    # A run that has ended so is over.
    assert same(train(iter([]), **folder), four)
    assert not asked
    with pytest.raises(ValueError, match="patience=3 counts validations, but there are none"):
        finetune(adapted, params, toy.make_task(), patience=3)


def auxiliary(params, tree, outputs, inputs):
    """Depends on the adapters, and on the rows that it is called with."""
    return 0.5 * jnp.sum(jnp.square(tree["up"]["lora_a"])) * jnp.mean(jnp.square(outputs))


def reference(tree, adapted, params, tasks, batch, owner, parts):
    """Mean loss of rows under their own heads, and the mean of the auxiliary losses of the parts."""
    heads = jnp.stack([jnp.asarray(task.head.params["kernel"]) for task in tasks])[owner]
    x = jnp.asarray(batch["inputs"]["x"])
    z = jnp.einsum("rd,rdc->rc", adapted.apply(params, tree, x), heads)
    labels = jnp.asarray(batch["labels"])
    picked = jnp.take_along_axis(z, labels.astype(jnp.int32)[:, None] % 3, axis=1)[:, 0]
    classified = np.asarray([bool(task.classes) for task in tasks])[owner]
    squares = jnp.square(z[:, 0] - labels.astype(jnp.float32))
    losses = jnp.where(classified, jax.nn.logsumexp(z, axis=1) - picked, squares)
    added = [auxiliary(params, tree, adapted.apply(params, tree, piece), None) for piece in jnp.split(x, parts)]
    return jnp.mean(losses) + sum(added) / parts


@pytest.mark.parametrize("several", [False, True])
def test_the_auxiliary_loss_is_added_as_a_weighted_mean(several, tmp_path):
    adapted, params = MODEL
    tasks, start = make_tasks(), start_of(*MODEL)
    model = adapted._replace(auxiliary=auxiliary)
    settings = dict(adapters=start, steps=1, optimizer=SGD, clip=None, batch_size=16, log_every=1)
    settings |= dict(devices=EIGHT[:2], accumulate=2, log_file=tmp_path / "log")
    if several:
        tree = finetune_together(model, params, tasks, **settings)
        # Batches of a model with an auxiliary loss have two tasks in each of the four parts.
        batch = mixed_batch(tasks, 0, 16, 0, groups=8, parts=4)
        owner = np.repeat(batch["inputs"]["task"], 2)
        assert all(len(set(part)) > 1 for part in owner.reshape(4, -1).tolist())
    else:
        tree = finetune(model, params, tasks[1], **settings)
        batch, owner = train_batch(tasks[1], 0, 16, 0), np.ones(16, np.int32)
    value, grads = jax.jit(jax.value_and_grad(lambda tree: reference(tree, *MODEL, tasks, batch, owner, 4)))(start)
    assert lines(tmp_path / "log")[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    assert relative(tree, jax.tree.map(lambda leaf, g: leaf - 0.05 * g, start, grads)) < 1e-6


def test_equal_shapes_compile_once_whatever_the_tasks():
    traced = []

    class Counting(toy.Net):
        def __call__(self, x):
            traced.append(x.shape)
            return super().__call__(x)

    adapted = pf.adapt(Counting(), pf.LoRA(rank=2, targets="up|down"))
    settings = dict(adapters=start_of(*MODEL), steps=6, devices=ONE, validate_every=3, **SETTINGS)
    tasks = make_tasks()
    finetune_together(adapted, MODEL[1], tasks, **settings)
    once = len(traced)
    finetune_together(
        adapted, MODEL[1], [dataclasses.replace(task, name=task.name + "!") for task in tasks], seed=5, **settings
    )
    assert 0 < once == len(traced)


@pytest.mark.parametrize(
    "groups, batch, devices, accumulate, contrasts, expected",
    [(None, 16, 1, 1, False, 8), (None, 12, 1, 1, False, 6), (None, 4, 1, 1, False, 4), (None, 48, 8, 2, False, 16)]
    + [(None, 32, 8, 1, False, 8), (None, 32, 8, 1, True, 16), (None, 8, 8, 1, True, 8), (4, 16, 2, 2, False, 4)],
)
def test_the_default_number_of_groups(groups, batch, devices, accumulate, contrasts, expected):
    from pefusion_jax.training.multitask import _groups

    class Fixed:
        parts, batch_size, everywhere = devices * accumulate, batch, EIGHT[:devices]

    assert _groups(groups, Fixed, contrasts) == expected


def other_features(outputs, inputs):
    return toy.features(outputs, inputs)


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (None, {"groups": 3}, r"groups=3 blocks do not split evenly over 1 devices x accumulate=1 .*: 1, 2, 4, 8, 16"),
        (None, {"accumulate": 2, "groups": 1}, r"numbers that do: 2, 4, 8, 16"),
        (None, {"batch_size": 15, "accumulate": 2}, "does not split evenly over 1 devices x accumulate=2"),
        (None, {"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        (None, {"label_smoothing": 0.1}, "task 'one' has a loss of its own"),
        (None, {"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        (lambda t: [t[0], t[0]], {}, "two tasks are named 'one'"),
        (
            lambda t: [t[0], dataclasses.replace(t[1], train=[], validation=[])],
            {"validate_every": 1},
            "task 'two' has no validation examples",
        ),
        (lambda t: [t[2]], {"label_smoothing": 0.1}, "all tasks are regressions"),
        (
            lambda t: [t[0], dataclasses.replace(t[1], head=t[1].head._replace(features=other_features))],
            {},
            "different features functions, features and other_features",
        ),
        (
            lambda t: [t[0], dataclasses.replace(t[1], encode=lambda rows: {"y": np.stack([row["x"] for row in rows])})],
            {},
            "the inputs of 'one' are x, but those of 'two' y",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(change, settings, message):
    tasks = make_tasks() if change is None else change(make_tasks())
    with pytest.raises(ValueError, match=message):
        finetune_together(*MODEL, tasks, **{"steps": 2, "batch_size": 16, "devices": ONE, **settings})
    with pytest.raises(ValueError, match="is for classes, but task 'three' is a regression"):
        finetune(*MODEL, make_tasks()[2], label_smoothing=0.1, devices=ONE)
