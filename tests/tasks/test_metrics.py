import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from pefusion_jax.tasks import (
    accuracy,
    cross_entropy,
    exact_match,
    macro_f1,
    matthews,
    pearson,
    smoothed_cross_entropy,
    spearman,
    squared_error,
    token_f1,
)


@pytest.mark.parametrize("classes, seed", [(2, 0), (5, 1), (26, 2)])
def test_classification_metrics_agree_with_scikit_learn(classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 60)
    logits = rng.normal(size=(60, 32)).astype(np.float32) + 1.5 * np.eye(32, dtype=np.float32)[labels]
    logits[:, classes:] = -1e9
    predicted = logits.argmax(1)
    assert accuracy(logits, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert macro_f1(logits, labels) == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert matthews(logits, labels) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predicted))


def test_correlations_agree_with_scipy_also_with_ties():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40).astype(np.float32)
    scores = np.round(labels + rng.normal(size=40), 1).astype(np.float32)
    logits = np.stack([scores, np.full(40, -1e9)], axis=1)
    assert pearson(logits, labels) == pytest.approx(scipy.stats.pearsonr(scores, labels).statistic, rel=1e-5)
    assert spearman(logits, labels) == pytest.approx(scipy.stats.spearmanr(scores, labels).statistic)
    assert pearson(scores, labels) == pearson(logits, labels)


def test_constant_predictions_score_zero_not_nan():
    logits = np.tile([1.0, 0.0], (4, 1))
    assert matthews(logits, np.array([0, 1, 0, 1])) == 0
    assert pearson(np.ones((4, 1)), np.arange(4.0)) == 0 and spearman(np.ones(4), np.arange(4.0)) == 0


def test_cross_entropy_agrees_with_scikit_learn_and_ignores_padding():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(9, 4)).astype(np.float32)
    labels = np.arange(9) % 4
    padded = np.concatenate([logits, np.full((9, 28), -1e9, np.float32)], axis=1)
    losses = cross_entropy(jnp.asarray(padded), jnp.asarray(labels, jnp.int32))
    assert losses.shape == (9,) and losses.dtype == jnp.float32
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    assert float(losses.mean()) == pytest.approx(sklearn.metrics.log_loss(labels, probabilities, labels=range(4)), rel=1e-6)
    gradient = jax.grad(lambda z: cross_entropy(z, jnp.asarray(labels, jnp.int32)).sum())(jnp.asarray(padded))
    onehot = np.eye(4)[labels]
    np.testing.assert_allclose(gradient[:, :4], probabilities - onehot, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 4:], 0)


def test_label_smoothing_spreads_over_the_real_classes_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 7))
    labels = rng.integers(0, 5, 6)
    logits[:, 5:] -= 1e9
    real = logits[:, :5] - logits[:, :5].max(1, keepdims=True)
    nll = np.log(np.exp(real).sum(1, keepdims=True)) - real
    expected = 0.9 * nll[np.arange(6), labels] + 0.1 / 5 * nll.sum(1)
    loss = smoothed_cross_entropy(0.1)
    found, gradient = jax.value_and_grad(lambda z: jnp.sum(loss(z, jnp.asarray(labels))))(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-6)
    targets = 0.9 * np.eye(5)[labels] + 0.02
    np.testing.assert_allclose(gradient[:, :5], np.exp(-nll) - targets, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 5:], 0)
    assert smoothed_cross_entropy(0.1) is loss


def test_squared_error_takes_the_first_column():
    logits = jnp.asarray([[1.0, -1e9], [3.0, -1e9]])
    np.testing.assert_array_equal(squared_error(logits, jnp.asarray([0.0, 5.0])), [1.0, 4.0])


def test_shapes_and_nan_are_errors():
    with pytest.raises(ValueError, match=r"\[n, classes\]"):
        accuracy(np.zeros((3, 2)), np.zeros(4, int))
    with pytest.raises(ValueError, match="n > 0"):
        accuracy(np.zeros((0, 2)), np.zeros(0, int))
    with pytest.raises(ValueError, match="1 of 2 examples are not numbers"):
        macro_f1(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1]))
    numbers = np.arange(4.0)
    bad = np.where(numbers == 2, np.nan, numbers)
    for metric in (pearson, spearman):
        with pytest.raises(ValueError, match="predictions of 1 of 4 examples are not finite"):
            metric(bad[:, None], numbers)
        with pytest.raises(ValueError, match="labels of 1 of 4 examples are not finite"):
            metric(numbers, bad)


def test_texts_are_compared_as_by_squad():
    pairs = [
        ("The Cat!", "cat"),
        ("a an the", ""),
        ("two cats", "cats two"),
        ("x y y", "y y z w"),
        ("", "the end"),
        ("e.g. 5", "eg 5"),
    ]
    found, wanted = zip(*pairs, strict=True)
    assert exact_match(found, wanted) == pytest.approx(3 / 6)
    # Two of three words found, two of four wanted.
    assert token_f1(found, wanted) == pytest.approx((1 + 1 + 1 + 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4) + 0 + 1) / 6)
    for metric in (exact_match, token_f1):
        with pytest.raises(ValueError, match="2 predictions and 1 references"):
            metric(["a", "b"], ["a"])
