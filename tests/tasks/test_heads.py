import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake import FakeTokenizer, Outputs, fake_apply, fake_params, texts
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

import pefusion_jax as pf
from pefusion_jax.tasks import (
    TextEncoder,
    accuracy,
    base_features,
    cls_features,
    linear_head,
    mean_pool_features,
    zero_shot_head,
)

KEY = jax.random.key(0)


def test_mean_pool_is_the_mean_over_real_tokens_and_linear():
    hidden = jax.random.normal(KEY, (3, 5, 4))
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    pooled = mean_pool_features(Outputs(hidden), {"attention_mask": mask})
    np.testing.assert_allclose(pooled[0], hidden[0, :3].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled[1], hidden[1, 0], rtol=1e-6)
    np.testing.assert_array_equal(pooled[2], 0)
    for features in (mean_pool_features, cls_features):
        # The tangent of a linear function is the function itself.
        tangent = jax.random.normal(jax.random.key(1), hidden.shape)
        _, out = jax.jvp(lambda h: features(Outputs(h), {"attention_mask": mask}), (hidden,), (tangent,))  # noqa: B023
        np.testing.assert_allclose(out, features(Outputs(tangent), {"attention_mask": mask}), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cls_features(Outputs(hidden), {}), hidden[:, 0])
    assert mean_pool_features(Outputs(hidden.astype(jnp.bfloat16)), {"attention_mask": mask}).dtype == jnp.float32


def test_base_features_are_in_order_and_do_not_depend_on_batches():
    encoder = TextEncoder(FakeTokenizer(), buckets=(4, 8, 16))
    rows = texts(11)
    got = base_features(fake_apply, fake_params(), encoder, rows, batch_size=4)
    for row, feature in zip(rows, got, strict=True):
        inputs = encoder([row])
        expected = mean_pool_features(fake_apply(fake_params(), **inputs), inputs)[0]
        np.testing.assert_allclose(feature, expected, rtol=1e-5, atol=1e-6)


def test_zero_shot_logits_are_scaled_cosines():
    encoder = TextEncoder(FakeTokenizer(), fields=("one", "two"), buckets=(8, 16))
    descriptions = ["a bb", "cccc", "dd ddddd"]
    head = zero_shot_head(fake_apply, fake_params(), encoder, descriptions, pad_to=8, scale=20.0)
    features = np.asarray(jax.random.normal(KEY, (4, 6)))
    classes = []
    for text in descriptions:
        inputs = encoder.texts([text])
        classes.append(np.asarray(mean_pool_features(fake_apply(fake_params(), **inputs), inputs))[0])
    classes = np.stack(classes)
    cosine = features @ classes.T / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(classes, axis=1)
    logits = jax.jit(head.logits)(head.params, features)
    np.testing.assert_allclose(logits[:, :3], 20 * cosine, rtol=1e-4, atol=1e-4)
    assert logits.shape == (4, 8) and np.all(np.asarray(logits[:, 3:]) < -1e8)
    assert np.isfinite(np.asarray(head.logits(head.params, jnp.zeros((1, 6)))[:, :3])).all()


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_head_is_the_logistic_regression_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 70)
    x = (rng.normal(size=(70, 6)) * [1, 5, 0.1, 1, 2, 1] + 3 + rng.normal(size=(classes, 6))[labels]).astype(np.float32)
    x[:, 5] = 2.0  # a feature that never changes
    l2 = 0.05
    head = linear_head(x, labels, classes, pad_to=8, l2=l2)
    standard = StandardScaler().fit_transform(x)
    # Its penalty is on the sum of losses, ours on the mean; with more than two classes it is multinomial, as ours always is.
    reference = LogisticRegression(C=1 / (l2 * 70 * (2 if classes == 2 else 1)), tol=1e-10, max_iter=5000).fit(standard, labels)
    logits = np.asarray(head.logits(head.params, jnp.asarray(x)))
    probabilities = np.asarray(jax.nn.softmax(logits, axis=1))
    if classes == 2:
        # Two columns of weights, +w/2 and -w/2, are penalised half as much as its one column w.
        reference = LogisticRegression(C=2 / (l2 * 70), tol=1e-10, max_iter=5000).fit(standard, labels)
    np.testing.assert_allclose(probabilities[:, :classes], reference.predict_proba(standard), atol=2e-4)
    assert logits.shape == (70, 8) and np.all(logits[:, classes:] < -1e8)


def test_linear_head_for_regression_is_ridge_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype(np.float32) * 3 + 1
    y = (x @ [1, -2, 0, 0.5, 0] + 4 + rng.normal(size=40)).astype(np.float32)
    head = linear_head(x, y, 0, pad_to=4, l2=0.3)
    reference = Ridge(alpha=0.3 / 2 * 40).fit(StandardScaler().fit_transform(x), y)
    logits = head.logits(head.params, jnp.asarray(x))
    np.testing.assert_allclose(logits[:, 0], reference.predict(StandardScaler().fit_transform(x)), rtol=1e-4, atol=1e-4)
    assert logits.shape == (40, 4)


def test_heads_of_all_tasks_share_their_functions_and_shapes():
    encoder = TextEncoder(FakeTokenizer())
    one = zero_shot_head(fake_apply, fake_params(), encoder, ["a", "bb"])
    two = zero_shot_head(fake_apply, fake_params(), encoder, ["a", "bb", "ccc"])
    assert one[1:] == two[1:] and jax.tree.map(jnp.shape, one.params) == jax.tree.map(jnp.shape, two.params)
    x = np.asarray(jax.random.normal(KEY, (12, 6)))
    three, four = linear_head(x, np.arange(12) % 2, 2), linear_head(x, np.arange(12) % 5, 5)
    assert three[1:] == four[1:] and jax.tree.map(jnp.shape, three.params) == jax.tree.map(jnp.shape, four.params)


def test_a_linear_head_learns():
    rows = texts(60)
    encoder = TextEncoder(FakeTokenizer(), buckets=(16,))
    features = base_features(fake_apply, fake_params(), encoder, rows)
    labels = np.asarray([row["label"] for row in rows])
    head = linear_head(features, labels, 3, l2=1e-3)
    assert accuracy(head.logits(head.params, features), labels) > 0.8


def test_bad_arguments_are_errors():
    encoder, x = TextEncoder(FakeTokenizer()), np.ones((4, 2), np.float32)
    for descriptions in (["one"], ["a", "a"]):
        with pytest.raises(ValueError, match="one for each class"):
            zero_shot_head(fake_apply, fake_params(), encoder, descriptions)
    with pytest.raises(ValueError, match="labels from 0 to 3 do not fit num_classes=3"):
        linear_head(x, np.arange(4), 3)
    with pytest.raises(ValueError, match="labels from 0.0 to 1.0 do not fit num_classes=2, whose labels are whole numbers"):
        linear_head(x, np.asarray([0, 0.5, 1, 1]), 2)
    for classes in (0, 4):
        with pytest.raises(ValueError, match="finite"):
            linear_head(x, np.asarray([0, 1, np.nan, 1]), classes)
    with pytest.raises(ValueError, match="finite"):
        linear_head(x * np.inf, np.arange(4), 4)
    with pytest.raises(ValueError, match="must be finite"):
        linear_head(x, np.arange(3), 3)
    with pytest.raises(ValueError, match="l2=0"):
        linear_head(x, np.arange(4), 4, l2=0)
    with pytest.raises(ValueError, match="pad_to=0"):
        linear_head(x, np.arange(4), 4, pad_to=0)
    with pytest.raises(ValueError, match="not finite"):
        base_features(fake_apply, {"table": jnp.full((128, 2), jnp.nan)}, encoder, texts(2))


def test_whitened_prototypes_are_cosines_after_a_shift_and_a_linear_map_that_makes_the_covariance_the_identity():
    generator = np.random.default_rng(2)
    labels = np.arange(60) % 3
    mixing = generator.normal(size=(5, 5)) * [5.0, 1, 1, 1, 0.2]
    rows = (generator.normal(size=(60, 5)) + 2 * np.eye(3, 5)[labels]) @ mixing + 100
    plain = pf.tasks.prototype_head(rows.astype(np.float32), labels, 3)
    head = pf.tasks.prototype_head(rows.astype(np.float32), labels, 3, scale=20.0, whiten=1e-6)
    centred = rows - rows.mean(0)
    lengths, directions = np.linalg.eigh(centred.T @ centred / 60)
    white = centred @ directions / np.sqrt(lengths + 1e-6 * lengths.mean()) @ directions.T
    unit = white / np.linalg.norm(white, axis=1, keepdims=True)
    sums = np.stack([unit[labels == c].sum(0) for c in range(3)])
    expected = 20 * unit @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
    logits = np.asarray(head.logits(head.params, jnp.asarray(rows, jnp.float32)))
    np.testing.assert_allclose(logits[:, :3], expected, atol=2e-2)
    assert head.logits is pf.tasks.whitened_logits and (logits[:, 3:] < -1e8).all()
    before = np.asarray(plain.logits(plain.params, jnp.asarray(rows, jnp.float32)))
    assert np.mean(logits.argmax(1) == labels) > np.mean(before.argmax(1) == labels) + 0.2
    for ridge in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="whiten="):
            pf.tasks.prototype_head(rows, labels, 3, whiten=ridge)
