import json

import jax
import numpy as np
import pytest
from fake import FakeModel, FakeTokenizer, fake_apply, fake_params, texts

from pefusion_jax import tasks
from pefusion_jax.tasks import Head, Labelled, base_apply, embedded_tasks, eval_batches, folder_task, text_task

MODEL = FakeModel()


def labelled(**changes):
    rows = texts(30)
    names = ("short", "mid", "long")
    return Labelled("toy", names, ("a a", "aaaaaa", "a" * 10), ("text",), rows, rows[:8], ())._replace(**changes)


@pytest.mark.parametrize("head", ["zero_shot", "linear"])
def test_a_task_is_made_ready_to_use(head):
    # The descriptions themselves are the easiest texts for a zero-shot head: cosine 1 with their own class.
    easy = [{"text": text, "label": i} for i, text in enumerate(labelled().descriptions)]
    data = labelled(validation=easy) if head == "zero_shot" else labelled()
    task = text_task(data, MODEL, fake_params(), FakeTokenizer(), head=head, max_length=16)
    batch = next(iter(eval_batches(task, "validation", 8)))
    real = batch["weights"] > 0
    features = task.head.features(fake_apply(fake_params(), **batch["inputs"]), batch["inputs"])
    logits = task.head.logits(task.head.params, features)
    assert logits.shape == (8, 32)
    assert task.loss(logits, batch["labels"]).shape == (8,)
    score = task.metric(np.asarray(logits)[real], batch["labels"][real])
    assert score == 1 if head == "zero_shot" else score > 0.7


def test_the_training_split_is_tokenized_once_for_head_and_training():
    tokenizer = FakeTokenizer()
    task = text_task(labelled(), MODEL, fake_params(), tokenizer, head="linear")
    tasks.train_batch(task, 0, 4, 0)
    assert tokenizer.calls == 1


def test_regression_gets_its_own_loss_metric_and_head():
    rows = [{"text": row["text"], "label": float(len(row["text"]))} for row in texts(30)]
    data = labelled(classes=(), descriptions=(), train=rows)
    task = text_task(data, MODEL, fake_params(), FakeTokenizer(), head="linear")
    assert (task.loss, task.metric) == (tasks.squared_error, tasks.pearson)
    inputs, labels = task.arrays("train")
    features = task.head.features(fake_apply(fake_params(), **inputs), inputs)
    assert task.metric(np.asarray(task.head.logits(task.head.params, features)), labels) > 0.5
    with pytest.raises(ValueError, match="use head='linear'"):
        text_task(data, MODEL, fake_params(), FakeTokenizer())


def test_a_head_of_ones_own_and_a_wrong_name():
    own = Head({}, tasks.cls_features, tasks.linear_logits)
    assert text_task(labelled(), MODEL, fake_params(), FakeTokenizer(), head=own).head is own
    with pytest.raises(ValueError, match="must be 'zero_shot', 'linear' or a Head"):
        text_task(labelled(), MODEL, fake_params(), FakeTokenizer(), head="knn")


def test_a_folder_of_ones_own(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(12)))
    task = folder_task(tmp_path, MODEL, fake_params(), FakeTokenizer(), head="linear", classes=("x", "yy", "zzz"))
    assert task.classes == ("x", "yy", "zzz") and len(task.test) == 12
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 9}\n')
    with pytest.raises(ValueError, match="train.jsonl, line 2: label 9"):
        folder_task(tmp_path, MODEL, fake_params(), FakeTokenizer(), head="linear", classes=("x", "yy", "zzz"))


def test_all_embedded_tasks_share_one_program_per_bucket():
    suite = embedded_tasks(MODEL, fake_params(), FakeTokenizer(), buckets=(32,))
    assert [task.name for task in suite] == ["bible", "genre", "intents", "spam", "supersense", "wic"]
    shapes = set()
    for task in suite:
        batch = tasks.train_batch(task, 0, 8, 0)
        shapes.add(str(jax.tree.map(np.shape, (batch, task.head.params))))
    assert len(shapes) == 1
    assert len({(task.head.features, task.head.logits, task.loss) for task in suite}) == 1
    picked = embedded_tasks(MODEL, fake_params(), FakeTokenizer(), ("wic", "spam"))
    assert [task.name for task in picked] == ["wic", "spam"]
    with pytest.raises(ValueError, match=r"names=\('spam',\)"):
        embedded_tasks(MODEL, fake_params(), FakeTokenizer(), "spam")


def test_base_apply_takes_parameters_or_collections():
    inputs = tasks.TextEncoder(FakeTokenizer())([{"text": "a bb"}])
    apply = base_apply(MODEL)
    assert base_apply(MODEL) is apply
    one = apply(fake_params(), **inputs).last_hidden_state
    two = apply({"params": fake_params()}, **inputs).last_hidden_state
    np.testing.assert_array_equal(one, two)

    class Unhashable(FakeModel):
        __hash__ = None

    np.testing.assert_array_equal(base_apply(Unhashable())(fake_params(), **inputs).last_hidden_state, one)
