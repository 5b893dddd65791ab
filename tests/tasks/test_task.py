import dataclasses

import numpy as np
import pytest
from fake import FakeTokenizer, texts

from pefusion_jax.tasks import (
    Examples,
    Head,
    Task,
    TextEncoder,
    accuracy,
    cross_entropy,
    eval_batches,
    linear_logits,
    mean_pool_features,
    train_batch,
)

HEAD = Head({}, mean_pool_features, linear_logits)


def make(train=10, encode=None, **options):
    rows = texts(train)
    settings = {"classes": ("a", "b", "c"), "validation": texts(7, seed=1), "test": (), **options}
    encode = encode or TextEncoder(FakeTokenizer(), buckets=(8, 16))
    return Task("toy", train=rows, encode=encode, head=HEAD, metric=accuracy, loss=cross_entropy, **settings)


def by_index(train):
    """A task whose input is the number of the example."""
    rows = [{"label": 0, "number": i} for i in range(train)]
    return dataclasses.replace(
        make(), train=rows, encode=lambda examples: {"x": np.asarray([e["number"] for e in examples], np.int32)}
    )


@pytest.mark.parametrize("examples, batch_size", [(10, 4), (10, 5), (3, 8), (7, 7), (1, 5), (5, 23)])
def test_every_epoch_holds_each_example_once(examples, batch_size):
    task = by_index(examples)
    steps = 3 * examples
    stream = np.concatenate([train_batch(task, step, batch_size, seed=5)["inputs"]["x"] for step in range(steps)])
    epochs = stream[: len(stream) // examples * examples].reshape(-1, examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(examples), (len(epochs), 1)))


def test_a_batch_is_a_function_of_seed_and_step():
    one, two = by_index(50), by_index(50)
    later = [train_batch(one, step, 8, seed=1)["inputs"]["x"] for step in reversed(range(20))][::-1]
    sooner = [train_batch(two, step, 8, seed=1)["inputs"]["x"] for step in range(20)]
    np.testing.assert_array_equal(later, sooner)
    other = [train_batch(two, step, 8, seed=2)["inputs"]["x"] for step in range(20)]
    assert np.any(np.asarray(other) != np.asarray(sooner))
    epochs = np.concatenate(sooner)[:150].reshape(3, 50)
    assert np.any(epochs[0] != epochs[1]) and np.any(epochs[0] != np.arange(50))


def test_the_order_is_the_documented_one():
    # Recomputed here from the definition: ranks of raw Philox bits, keyed by seed and epoch.
    bits = np.random.Philox(key=np.asarray([9, 0], np.uint64)).random_raw(6)
    expected = sorted(range(6), key=lambda i: bits[i])
    np.testing.assert_array_equal(train_batch(by_index(6), 0, 6, seed=9)["inputs"]["x"], expected)


def test_eval_batches_keep_order_and_fill_up_with_weight_zero():
    task = by_index(10)
    batches = list(eval_batches(task, "train", 4))
    assert [b["inputs"]["x"].shape for b in batches] == [(4,)] * 3
    weights = np.concatenate([b["weights"] for b in batches])
    numbers = np.concatenate([b["inputs"]["x"] for b in batches])
    np.testing.assert_array_equal(weights, [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(numbers[weights > 0], np.arange(10))
    assert numbers[10:].tolist() == [9, 9]


def test_types_and_cached_rows():
    task = make()
    batch = task.batch(task.train[:3])
    again = next(iter(eval_batches(task, "train", 3)))
    calls = task.encode.tokenizer.calls
    train_batch(task, 0, 4, 0), train_batch(task, 7, 4, 0), list(eval_batches(task, "train", 2))
    assert task.encode.tokenizer.calls == calls  # one call for the whole split
    for name, value in batch["inputs"].items():
        assert value.dtype == np.int32
        np.testing.assert_array_equal(value, again["inputs"][name])
    assert batch["labels"].dtype == np.int32 and batch["labels"].tolist() == [0, 1, 2]
    assert batch["weights"].dtype == np.float32 and batch["weights"].tolist() == [1, 1, 1]


def test_labels_by_name_by_function_and_for_regression():
    rows = [{"text": "a b", "label": "c"}, {"text": "a", "label": np.int64(1)}]
    assert make().batch(rows)["labels"].tolist() == [2, 1]
    task = make(label=lambda example: len(example["text"]))
    assert task.batch([{"text": "ab"}])["labels"].tolist() == [2]
    regression = make(classes=())
    labels = regression.batch([{"text": "a", "label": 2.5}, {"text": "b", "label": 1}])["labels"]
    assert labels.dtype == np.float32 and labels.tolist() == [2.5, 1.0]


@pytest.mark.parametrize("label", [3, -1, 1.0, True, "d", None])
def test_a_label_outside_the_classes_names_file_and_line(label):
    rows = Examples([{"text": "x", "label": 0}, {"text": "y", "label": label}], "data/train.jsonl", [1, 5])
    task = dataclasses.replace(make(), train=rows)
    with pytest.raises(ValueError, match=r"data/train.jsonl, line 5: label .* from 0 to 2 .*'a', 'b', 'c'") as error:
        train_batch(task, 0, 1, 0)
    assert ("hidden test label" in str(error.value)) == (label == -1)


def test_bad_rows_and_empty_splits_are_explained():
    rows = Examples([{"text": "x", "label": 0}, {"txt": "y", "label": 1}], "train.csv", [2, 3])
    with pytest.raises(ValueError, match=r"train.csv, line 3: no field 'text', there are \['label', 'txt'\].*fields"):
        train_batch(dataclasses.replace(make(), train=rows), 0, 1, 0)
    with pytest.raises(ValueError, match=r"train, example 0: no field 'label'"):
        train_batch(dataclasses.replace(make(), train=[{"text": "x"}]), 0, 1, 0)
    with pytest.raises(ValueError, match="train, example 0: field 'text' is int"):
        train_batch(dataclasses.replace(make(), train=[{"text": 3, "label": 0}]), 0, 1, 0)
    with pytest.raises(ValueError, match="label nan is not a finite number"):
        make(classes=()).batch([{"text": "x", "label": float("nan")}])
    with pytest.raises(ValueError, match="has no test examples"):
        eval_batches(make(), "test", 2)
    with pytest.raises(ValueError, match="split='dev' is not one of"):
        eval_batches(make(), "dev", 2)
    for step, size, seed in ((-1, 1, 0), (0, 0, 0), (0, 1, -1)):
        with pytest.raises(ValueError, match="must be"):
            train_batch(make(), step, size, seed)
    with pytest.raises(ValueError, match="batch_size=0"):
        eval_batches(make(), "train", 0)


def test_inputs_alone_need_no_labels():
    labelled, hidden = make(), dataclasses.replace(make(), train=[{"text": row["text"]} for row in texts(10)])
    trained, read = (
        [batch(task) for task in (labelled, hidden)]
        for batch in (
            lambda task: train_batch(task, 0, 4, 1, labels=False),
            lambda task: next(eval_batches(task, "train", 4, labels=False)),
        )
    )
    for one, two in (trained, read):
        assert set(one) == set(two) == {"inputs", "weights"}
        for name, value in one["inputs"].items():
            np.testing.assert_array_equal(two["inputs"][name], value)
    np.testing.assert_array_equal(train_batch(labelled, 0, 4, 1)["inputs"]["input_ids"], trained[0]["inputs"]["input_ids"])
    with pytest.raises(ValueError, match="no field 'label'"):
        train_batch(hidden, 0, 4, 1)
