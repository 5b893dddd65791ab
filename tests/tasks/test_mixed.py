"""Mixed batches: shares, walks through the examples, and what is put together."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from fake import FakeTokenizer, texts

from pefusion_jax.tasks import (
    Head,
    Task,
    TextEncoder,
    accuracy,
    cross_entropy,
    linear_logits,
    mean_pool_features,
    mixed_batch,
    train_batch,
)
from pefusion_jax.tasks.mixed import blocks

HEAD = Head({}, mean_pool_features, linear_logits)


def numbers(examples):
    return {"x": np.asarray([e["number"] for e in examples], np.int32)}


def task(name, examples, first=0, **options):
    """A task whose input is the number of the example, counted from ``first``."""
    rows = [{"label": i % 2, "number": first + i} for i in range(examples)]
    settings = {"classes": ("a", "b"), "encode": numbers, **options}
    return Task(name, train=rows, validation=(), test=(), head=HEAD, metric=accuracy, loss=cross_entropy, **settings)


def schedule(sizes, groups, part, steps, temperature=1.0, seed=3):
    """[step, group] tasks, and the places of the blocks among those of their task."""
    found = [blocks(tuple(map(float, sizes)), temperature, groups, part, seed, step) for step in range(steps)]
    return np.stack([tasks for tasks, _ in found]), np.stack([places for _, places in found])


@pytest.mark.parametrize(
    "sizes, groups, temperature, expected",
    [
        ((90, 90, 90, 90), 4, 1.0, (0.25, 0.25, 0.25, 0.25)),
        ((10, 20, 30, 40), 8, 1.0, (0.1, 0.2, 0.3, 0.4)),
        ((16, 4, 1, 1), 4, 2.0, (0.5, 0.25, 0.125, 0.125)),
        ((1, 1000, 50), 2, math.inf, (1 / 3, 1 / 3, 1 / 3)),
        # A share is at most 1 - 1 / groups; what is too much goes to the others in their proportion.
        ((1, 1000, 3), 4, 1.0, (0.0625, 0.75, 0.1875)),
        ((5, 1), 2, 1.0, (0.5, 0.5)),
    ],
)
def test_every_window_has_the_shares_to_within_one_block(sizes, groups, temperature, expected):
    window = max(2, -(-2 * len(sizes) // groups))  # batches
    order, _ = schedule(sizes, groups, groups, 64 * window, temperature)
    counts = np.stack([np.bincount(rows, minlength=len(sizes)) for rows in order.reshape(64, -1)])
    shares = np.asarray(expected) * groups * window
    assert (np.abs(counts - shares) < 1).all()
    # So many windows have each share exactly, but for rounding, and all before them are near.
    off = np.cumsum(counts, axis=0) - shares * np.arange(1, 65)[:, None]
    assert np.abs(off).max() < 4 and np.abs(off[-1]).max() <= 1
    assert all(len(set(batch)) > 1 for batch in order.tolist())


def test_the_order_is_random_and_all_tasks_meet():
    order, _ = schedule((7,) * 4, 2, 2, 200)
    assert len({tuple(sorted(batch)) for batch in order.tolist()}) == 6
    assert np.any(order != schedule((7,) * 4, 2, 2, 200, seed=4)[0])


def test_each_part_holds_two_tasks():
    order, _ = schedule((1, 1, 60), 8, 2, 50)
    assert np.all(order.reshape(-1, 2)[:, 0] != order.reshape(-1, 2)[:, 1])
    order, _ = schedule((1, 1, 60), 8, 1, 50)
    assert np.mean(order == 2) > 0.9


@pytest.mark.parametrize("sizes, groups", [((3, 90, 14), 4), ((5,), 2), ((1, 1, 1, 1, 1), 3)])
def test_the_places_count_the_blocks_of_a_task(sizes, groups):
    order, places = schedule(sizes, groups, groups, 120)
    for number in range(len(sizes)):
        mine = places[order == number]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
    # Any step by itself, also very late ones.
    tasks, later = blocks(tuple(map(float, sizes)), 1.0, groups, groups, 3, 10**9)
    assert later.max() > 10**8 and len(tasks) == groups


def test_a_batch_is_a_pure_function_and_walks_through_epochs():
    of = [task("one", 5), task("two", 12, first=100), task("three", 30, first=200)]
    batches = [mixed_batch(of, step, 12, 7, groups=6) for step in range(40)]
    again = mixed_batch({t.name: t for t in of}, 31, 12, 7, groups=6)
    for key in ("x", "task"):
        np.testing.assert_array_equal(again["inputs"][key], batches[31]["inputs"][key])
    rows = np.concatenate([batch["inputs"]["x"] for batch in batches])
    owners = np.concatenate([np.repeat(batch["inputs"]["task"], 2) for batch in batches])
    np.testing.assert_array_equal(rows // 100, owners)
    for number, each in enumerate(of):
        mine = rows[owners == number] - 100 * number
        epochs = mine[: len(mine) // len(each.train) * len(each.train)].reshape(-1, len(each.train))
        assert len(epochs) >= 2
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(len(each.train)), (len(epochs), 1)))
    assert batches[0]["inputs"]["task"].dtype == np.int32 and batches[0]["labels"].dtype == np.int32
    np.testing.assert_array_equal(batches[0]["labels"], rows[:12] % 100 % 2)
    np.testing.assert_array_equal(batches[0]["weights"], np.ones(12, np.float32))


def test_one_task_alone_has_the_batches_of_train_batch():
    alone = task("one", 11)
    for step in range(5):
        mixed, plain = mixed_batch([alone], step, 6, 2, groups=3), train_batch(alone, step, 6, 2)
        np.testing.assert_array_equal(mixed["inputs"]["x"], plain["inputs"]["x"])
        np.testing.assert_array_equal(mixed["inputs"]["task"], [0, 0, 0])


def test_sizes_take_the_place_of_numbers_of_examples():
    of = [task("one", 100), task("two", 1)]
    drawn = [mixed_batch(of, step, 8, 0, groups=8, sizes=(1, 3))["inputs"]["task"] for step in range(32)]
    assert np.mean(np.concatenate(drawn)) == 0.75


def test_texts_are_padded_to_one_length():
    short = Task(
        "short",
        ("a", "b", "c"),
        train=texts(9),
        validation=(),
        test=(),
        encode=TextEncoder(FakeTokenizer(), buckets=(4,)),
        head=HEAD,
        metric=accuracy,
        loss=cross_entropy,
    )
    long = dataclasses.replace(short, name="long", encode=TextEncoder(FakeTokenizer(), buckets=(12, 16)))
    batch = mixed_batch([short, long], 0, 8, 0, groups=4)
    inputs = batch["inputs"]
    assert {name: value.shape for name, value in inputs.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (8, 12)),
        "task": (4,),
    }
    owner = np.repeat(inputs["task"], 2)
    assert set(owner) == {0, 1}
    assert np.all(inputs["input_ids"][owner == 0, 4:] == FakeTokenizer.pad_token_id)
    assert not inputs["attention_mask"][owner == 0, 4:].any() and not inputs["token_type_ids"][owner == 0, 4:].any()
    for number, each in enumerate((short, long)):
        plain = each.rows("train", np.arange(9), np.ones(9, np.float32))
        width = plain["inputs"]["input_ids"].shape[1]
        known = {(row.tobytes(), int(label)) for row, label in zip(plain["inputs"]["input_ids"], plain["labels"], strict=True)}
        mine = owner == number
        for row, label in zip(inputs["input_ids"][mine, :width], batch["labels"][mine], strict=True):
            assert (row.tobytes(), int(label)) in known


def test_labels_are_floats_in_all_batches_with_a_regression():
    of = [task("one", 40), task("two", 1, classes=()), task("three", 40)]
    for step in range(6):
        assert mixed_batch(of, step, 4, 0, groups=2)["labels"].dtype == np.float32


def other_input(examples):
    return {"y": np.zeros(len(examples), np.int32)}


def wide(examples):
    return {"x": np.zeros((len(examples), 2), np.float32)}


def wider(examples):
    return {"x": np.zeros((len(examples), 3), np.float32)}


@pytest.mark.parametrize(
    "tasks, settings, message",
    [
        ([], {}, "no tasks were given"),
        ([task("one", 3), task("one", 4)], {}, "two tasks are named 'one'"),
        ([task("one", 3)], {"groups": 3}, "groups=3 must divide batch_size=8 .* such numbers are 1, 2, 4, 8"),
        ([task("one", 3)], {"groups": 4, "parts": 3}, "a multiple of parts=3: .* such numbers are none"),
        ([task("one", 3)], {"step": -1}, "step=-1"),
        ([task("one", 3)], {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ([task("one", 3)], {"sizes": (1, 2)}, "one finite number above 0 for each of the 1 tasks"),
        ([task("one", 3), task("two", 0)], {}, "task 'two' has no train examples"),
        (
            [task("one", 3), task("two", 3, encode=other_input)],
            {},
            "the inputs of '(one|two)' are [xy], but those of '(one|two)'",
        ),
        ([task("one", 3, encode=wide), task("two", 3, encode=wider)], {}, r"'x' is float32\[[23]\] in '(one|two)' and float32"),
        ([task("one", 3), task("two", 3, encode=wide)], {}, r"'x' is .*encode the tasks alike"),
    ],
)
def test_what_does_not_fit_together_is_named(tasks, settings, message):
    with pytest.raises(ValueError, match=message):
        mixed_batch(tasks, **{"step": 0, "batch_size": 8, "seed": 0, "groups": 4, **settings})
