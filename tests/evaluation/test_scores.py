"""Scores against NumPy in float64, one compilation for everything, and the errors."""

import json

import evaluation_fakes as fakes
import jax
import numpy as np
import pytest

from pefusion_jax.evaluation import Scores, evaluate, evaluate_base, predict
from pefusion_jax.evaluation.scores import head_logits
from pefusion_jax.tasks.metrics import pearson


def numpy_accuracy(task, split, kernel, tangent=None):
    return float(np.mean(fakes.numpy_logits(task, split, kernel, tangent).argmax(1) == fakes.labels(task, split)))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_scores_equal_numpy(batch_size, split):
    model, params, tasks = fakes.Model(), fakes.params(), [fakes.task("p", 1), fakes.task("q", 2, size=31)]
    kernel, tau, delta = params["kernel"], fakes.tau(0), fakes.delta(1)
    for task in tasks:
        expected = {
            "apply": numpy_accuracy(task, split, kernel, tau["kernel"]),
            "delta": numpy_accuracy(task, split, kernel + delta.leaves["kernel"]),
            "base": numpy_accuracy(task, split, kernel),
        }
        assert len(set(expected.values())) > 1  # the three are told apart
        got = {
            "apply": evaluate(model, params, tau, [task], split=split, batch_size=batch_size),
            "delta": evaluate(model, params, delta, {"any": task}, split=split, batch_size=batch_size),
            "base": evaluate_base(model, params, [task], split=split, batch_size=batch_size),
        }
        assert {kind: scores[task.name] for kind, scores in got.items()} == pytest.approx(expected)
        assert got["base"].counts == {task.name: len(getattr(task, split))}


def test_predict_gives_the_real_rows_in_order():
    model, params, task = fakes.Model(), fakes.params(), fakes.task("p", 1)
    features, labels = predict(model, params, fakes.tau(0), task, split="validation", batch_size=10)
    assert features.shape == (23, fakes.WIDTH)
    np.testing.assert_array_equal(labels, fakes.labels(task, "validation"))
    expected = fakes.numpy_logits(task, "validation", params["kernel"], fakes.tau(0)["kernel"])
    for rows in (7, 256):
        logits = head_logits(task.head, features, rows=rows)
        np.testing.assert_allclose(logits[:, :3], expected[:, :3], rtol=1e-4, atol=1e-5)


def test_one_compilation_for_all_tasks_and_trees():
    model, params, tasks = fakes.Model(), fakes.params(), [fakes.task("p", 1), fakes.task("q", 2, size=31)]
    for seed in range(3):
        evaluate(model, params, fakes.tau(seed), tasks, batch_size=8)
        evaluate(model, jax.tree.map(lambda leaf: 2.0 * leaf, params), fakes.tau(seed), tasks, batch_size=8)
    assert model.traces == ["apply"]


def test_standard_errors():
    model, params, task = fakes.Model(), fakes.params(), fakes.task("p", 1)
    scores = evaluate(model, params, fakes.tau(0), [task])
    p = scores["p"]
    assert scores.stderr["p"] == pytest.approx(np.sqrt(p * (1 - p) / 27))
    # Another metric: the bootstrap, near the textbook value (1 - r^2) / sqrt(n - 1), and the same each time.
    regression = fakes.task("r", 3, size=400, metric=pearson, classes=())
    first, second = (evaluate(model, params, fakes.tau(0), [regression]) for _ in range(2))
    assert first.stderr == second.stderr
    assert first.stderr["r"] == pytest.approx((1 - first["r"] ** 2) / np.sqrt(403), rel=0.25)


def test_summary_of_scores():
    scores = Scores({"b": 0.5, "a": 0.8}, {"b": 0.03, "a": 0.04}, {"b": 100, "a": 200})
    assert list(scores) == ["b", "a"] and scores == {"a": 0.8, "b": 0.5}
    assert scores.mean == pytest.approx(0.65) and scores.worst == 0.5 and scores.worst_task == "b"
    assert scores.mean_stderr == pytest.approx(0.025)
    relative = scores.normalized(Scores({"a": 0.8, "b": 1.0, "c": 0.1}))
    assert relative == {"b": 0.5, "a": 1.0} and relative.stderr == pytest.approx({"b": 0.03, "a": 0.05})
    assert json.loads(json.dumps(scores.to_dict()))["mean"] == pytest.approx(0.65)
    assert str(scores).splitlines() == [
        "b      0.5000  ± 0.0300  n=100",
        "a      0.8000  ± 0.0400  n=200",
        "mean   0.6500  ± 0.0250",
        "worst  0.5000            b",
    ]
    assert Scores({"a": 1.0}).mean_stderr is None and "a      1.0000" in str(Scores({"a": 1.0}))
    with pytest.raises(ValueError, match="no score for 'a'"):
        scores.normalized({"b": 1.0})
    with pytest.raises(ValueError, match="'b' is 0.0"):
        scores.normalized({"b": 0.0, "a": 1.0})


def test_errors_name_what_is_wrong():
    model, params, task = fakes.Model(), fakes.params(), fakes.task("p", 1, size=0)
    with pytest.raises(ValueError, match="'p' has no validation examples"):
        evaluate(model, params, fakes.tau(0), [task], split="validation")
    with pytest.raises(ValueError, match="'p' has no validation examples"):
        predict(model, params, fakes.tau(0), task, split="validation")
    with pytest.raises(ValueError, match="no tasks were given"):
        evaluate(model, params, fakes.tau(0), [])
    with pytest.raises(ValueError, match="two tasks are named 'p'"):
        evaluate(model, params, fakes.tau(0), [task, fakes.task("p", 2)])
