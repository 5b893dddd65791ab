"""Retrieval among prototypes, and new tasks from known ones, on inputs whose retriever is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import generators, trees
from pefusion_jax.backbones import Bert, BertConfig
from pefusion_jax.generators import contrastive

TASKS = ("low", "high")
CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8
)


def task(name, ids, count=10):
    """Texts of the given token ids only."""
    generator = np.random.default_rng(len(name))
    rows = [{"ids": generator.choice(ids, size=5), "label": int(i % 2)} for i in range(count)]
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32)
    head = pf.tasks.Head({"kernel": kernel, "bias": jnp.zeros(2)}, pf.tasks.cls_features, pf.tasks.linear_logits)

    def encode(examples):
        return {"input_ids": np.stack([e["ids"] for e in examples]).astype(np.int32)}

    return pf.tasks.Task(name, ("a", "b"), rows, rows, rows, encode, head, pf.tasks.accuracy, pf.tasks.cross_entropy)


LOW, HIGH, LIKE_HIGH = task("low", [1, 2, 3]), task("high", [15, 16, 17]), task("like_high", [16, 17, 18])


@pytest.fixture(scope="module")
def trained():
    model = Bert(CONFIG)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 5), jnp.int32))["params"]
    made = pf.generate(pf.adapt(model, pf.parallel(bottleneck=2)), generators.pha(TASKS, features=8, instances="base"))
    tree = pf.finetune_together(
        made, params, [LOW, HIGH], steps=60, batch_size=8, learning_rate=2e-2, devices=jax.devices()[:1], progress=False
    )
    return made, params, tree


def test_instances_can_be_told_by_their_words():
    model = Bert(CONFIG)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 5), jnp.int32))["params"]
    made = pf.generate(pf.adapt(model, pf.parallel(bottleneck=2)), generators.pha(TASKS, features=8, instances="words"))
    how = {"steps": 60, "batch_size": 8, "learning_rate": 2e-2, "devices": jax.devices()[:1], "progress": False}
    tree = pf.finetune_together(made, params, [LOW, HIGH], **how)
    table = generators.retrieval_table(made, params, tree, [LOW, HIGH])
    assert table["low"]["low"] == 1.0 and table["high"]["high"] == 1.0
    ids, mask = np.asarray([[3, 1, 0], [2, 2, 2]]), np.asarray([[1, 1, 0], [0, 0, 0]])
    embedding = params["embeddings"]["word_embeddings"]["embedding"]
    found = contrastive.word_features(trees.flat(params), {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(found, [(embedding[3] + embedding[1]) / 2, np.zeros(8)], rtol=1e-6)
    with pytest.raises(ValueError, match="looks the input_ids up.*the inputs have 'x', the base parameters 1 such"):
        contrastive.word_features(trees.flat(params), {"x": ids})


def test_trained_prototypes_are_found(trained):
    made, params, tree = trained
    table = generators.retrieval_table(made, params, tree, [LOW, HIGH])
    assert table["low"]["low"] == 1.0 and table["high"]["high"] == 1.0
    z = generators.instance_codes(made, params, tree, LOW, most=3)
    assert z.shape == (3, 64)
    found = generators.retrieve(made, params, tree, LIKE_HIGH, most=4)
    assert found.nearest == "high" and found.cosines.shape == (4, 2) and found.votes["high"] > 0.5
    expected = found.cosines.mean(0)
    assert found.scores == pytest.approx(dict(zip(TASKS, expected, strict=True)))
    shares = np.exp(expected / 0.1) / np.exp(expected / 0.1).sum()
    np.testing.assert_allclose(found.shares(), shares, rtol=1e-5)


def test_a_new_task_starts_from_what_it_is_like_and_its_prototype_alone_can_be_tuned(trained):
    made, params, tree = trained
    found = generators.retrieve(made, params, tree, LIKE_HIGH)
    grown, more = generators.add_task(made, tree, "like_high", found)
    assert grown.tasks == (*TASKS, "like_high") and grown.auxiliary is None
    for path, leaf in trees.paths(grown.materialise(params, more, "like_high")).items():
        np.testing.assert_array_equal(leaf, trees.paths(made.materialise(params, tree, "high"))[path])
    _, mixed = generators.add_task(made, tree, "new", np.array([0.25, 0.75]))
    np.testing.assert_allclose(mixed["tasks"][2], 0.25 * tree["tasks"][0] + 0.75 * tree["tasks"][1], rtol=1e-5)

    generator = grown.origin.generator
    assert set(pf.generate(made.origin.inner, dataclasses.replace(generator, tune="hypernetwork")).trainable(more)) == {
        "tasks",
        "kinds",
    }
    tunable = pf.generate(made.origin.inner, dataclasses.replace(generator, tune="prototypes"))
    options = {"steps": 3, "batch_size": 8, "devices": jax.devices()[:1], "progress": False}
    after = pf.finetune(tunable, params, LIKE_HIGH, adapters=more, **options)
    changed = {p.split("/")[0] for p, leaf in trees.paths(after).items() if np.any(leaf != trees.paths(more)[p])}
    assert changed == {"tasks"}, "and of these the new one alone"
    np.testing.assert_array_equal(after["tasks"][:2], more["tasks"][:2])


def test_labels_are_not_looked_at(trained):
    made, params, tree = trained
    expected = generators.retrieve(made, params, tree, LIKE_HIGH).cosines
    hidden = dataclasses.replace(LIKE_HIGH, train=[{**row, "label": -1} for row in LIKE_HIGH.train])
    missing = dataclasses.replace(LIKE_HIGH, train=[{"ids": row["ids"]} for row in LIKE_HIGH.train])
    for unlabelled in (hidden, missing):
        np.testing.assert_array_equal(generators.retrieve(made, params, tree, unlabelled).cosines, expected)


def test_errors_say_what_to_pass(trained):
    made, params, tree = trained
    for most in (0, -1):
        with pytest.raises(ValueError, match=f"most={most} instances; look at one or more"):
            generators.retrieve(made, params, tree, LOW, most=most)
    with pytest.raises(ValueError, match="knows a task 'low' already"):
        generators.add_task(made, tree, "low", "high")
    with pytest.raises(ValueError, match="not one of the known tasks low, high"):
        generators.add_task(made, tree, "new", "middle")
    with pytest.raises(ValueError, match="one finite share for each of 2 tasks"):
        generators.add_task(made, tree, "new", np.ones(3))
    plain = pf.generate(made.origin.inner, generators.task_embeddings(TASKS))
    with pytest.raises(ValueError, match="has no retriever"):
        generators.retrieve(plain, params, tree, LOW)
    with pytest.raises(ValueError, match=r"pass a model from generate\(\) with a hyper-network"):
        generators.retrieve(made.origin.inner, params, tree, LOW)
