"""Generators that look at the instance, against their equations in NumPy float64: HyperDecoder and ATTEMPT."""

import functools
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import generators, trees
from pefusion_jax.backbones import T5, Bert, BertConfig, T5Config

TASKS = ("low", "high")
IDS = jnp.arange(24).reshape(4, 6) % 20
# The last row is all padding, as rows that fill up a batch may be.
MASK = jnp.array([[1] * n + [0] * (6 - n) for n in (6, 3, 1, 0)])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
SOURCES = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float32)
GENERATORS = {
    "hyperdecoder": (pf.LoRA(rank=2, alpha=4, targets=r"layer_\d"), generators.hyperdecoder(features=8, hidden=16)),
    "attempt": (
        pf.PromptTuning(length=2, init="unit"),
        generators.Attempt(sources=("mnli", "qqp"), tasks=TASKS, width=4, temperature=2.0, prompts=SOURCES),
    ),
}
NAMES = tuple(GENERATORS)


class Outputs(NamedTuple):
    last_hidden_state: Any


class Tiny(nn.Module):
    """Words, two layers that see the mean of the words too, and nothing else: it compiles in a moment."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, deterministic=True):
        if isinstance(input_ids, dict):
            input_ids, attention_mask = input_ids["input_ids"], input_ids["attention_mask"]
        x = nn.Embed(20, 8, name="word_embeddings", embedding_init=nn.initializers.normal(1.0))(input_ids)
        kept = jnp.ones(x.shape[:2]) if attention_mask is None else attention_mask.astype(jnp.float32)
        for number in range(2):
            mean = jnp.einsum("bsd,bs->bd", x, kept) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)[:, None]
            x = x + nn.Dense(8, name=f"layer_{number}")(jnp.tanh(x + mean[:, None, :]))
        return Outputs(nn.Dropout(0.5, deterministic=deterministic)(x))


MODEL = Tiny()
ONE = {"devices": jax.devices()[:1], "progress": False}

# Compiled once each: eager calls compile every operation anew.
jit = functools.cache(jax.jit)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(1), IDS)["params"]


@functools.cache
def model(name):
    method, generator = GENERATORS[name]
    return pf.generate(pf.adapt(MODEL, method), generator)


@functools.cache
def started(name):
    made = model(name)
    return jax.jit(lambda key, params: made.init(key, params, **INPUTS)), made


def start_of(name, params):
    init, _ = started(name)
    return init(jax.random.key(0), params)


def point_of(name, params):
    """A tree with entries as large as after training."""
    generator = np.random.default_rng(5)
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.2 * generator.normal(size=leaf.shape), start_of(name, params))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), moved)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_hyperdecoder_makes_what_its_equations_say(params):
    made, tree = model("hyperdecoder"), point_of("hyperdecoder", params)
    got = jit(made.materialise)(params, tree, None, INPUTS)
    hidden = np.asarray(jit(made.base)(params, **INPUTS).last_hidden_state, np.float64)
    exact, mask = float64(tree), np.asarray(MASK, np.float64)
    mean = (hidden * mask[:, :, None]).sum(1) / np.maximum(mask.sum(1), 1)[:, None]
    reader, kind = exact["reader"], exact["kinds"]["0"]
    middle = np.maximum(mean @ reader["in"]["kernel"] + reader["in"]["bias"], 0)
    u = middle @ reader["out"]["kernel"] + reader["out"]["bias"]
    (layers,) = trees.paths(kind["sites"]).values()
    assert layers.shape == (2, 10)
    for number, layer in enumerate(layers):
        joined = np.concatenate([u, np.repeat(layer[None], 4, axis=0)], axis=1)
        g = np.maximum(joined @ kind["code"]["kernel"] + kind["code"]["bias"], 0)
        leaves = got[f"layer_{number}"]
        assert set(leaves) == {"lora_a", "lora_b"}
        for leaf, array in leaves.items():
            expected = np.tensordot(g, kind["heads"][leaf]["kernel"], 1) + kind["heads"][leaf]["bias"]
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_attempt_makes_what_its_equations_say(params):
    made, tree = model("attempt"), point_of("attempt", params)
    got = jit(made.materialise)(params, tree, jnp.array([1, 0]), INPUTS)["word_embeddings"]["prompt"]
    exact = float64(tree)
    net, targets = exact["attention"], exact["target"]["word_embeddings"]["prompt"]
    table = np.asarray(params["word_embeddings"]["embedding"], np.float64)
    for row, task in enumerate((1, 1, 0, 0)):
        words = table[np.asarray(IDS[row])][np.asarray(MASK[row]) > 0]
        x = words.max(0) if len(words) else np.zeros(8)
        down = x @ net["down"]
        raw = (down / (1 + np.exp(-down))) @ net["up"]
        q = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-5) * net["norm"]["scale"] + net["norm"]["bias"]
        prompts = [*exact["sources"], targets[task]]
        scores = np.array([prompt.max(0) @ q for prompt in prompts]) / 2.0
        a = np.exp(scores) / np.exp(scores).sum()
        assert a.min() > 1e-4, "a source that gets nothing is not compared"
        expected = targets[task] + sum(share * prompt for share, prompt in zip(a, prompts, strict=True))
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=2e-6)


def test_attempt_divides_by_e_times_the_width_and_sums_to_one():
    generator = generators.Attempt(sources=("a", "b"), prompts=SOURCES)
    net = {"down": np.eye(8, 100), "up": np.eye(100, 8), "norm": {"scale": np.ones(8), "bias": np.zeros(8)}}
    tree = {"attention": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), net)}
    x = np.linspace(-1, 2, 8)
    raw = x / (1 + np.exp(-x))
    q = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-5)
    scores = np.exp(SOURCES.astype(np.float64).max(1) @ q / (np.e * 8))
    a = jit(generator.attention)(tree, jnp.asarray(x, jnp.float32), jnp.asarray(SOURCES))
    np.testing.assert_allclose(a, scores / scores.sum(), rtol=1e-6)
    assert abs(np.e * 768 - 2087) < 1


@pytest.mark.parametrize("name", NAMES)
def test_a_row_gets_what_it_gets_alone_whatever_the_others_are(name, params):
    made, tree = model(name), point_of(name, params)
    task = {"task": jnp.array([1, 0])} if made.tasks else {}
    whole = jit(made.apply)(params, tree, **INPUTS, **task).last_hidden_state
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in INPUTS.items()}
        number = {"task": jnp.int32(1 - row // 2)} if made.tasks else {}
        got = jit(made.apply)(params, tree, **alone, **number).last_hidden_state
        np.testing.assert_allclose(got, whole[row : row + 1], atol=5e-6)
    rolled = {key: jnp.roll(value, 1, axis=0) for key, value in INPUTS.items()}
    one = {"task": jnp.array([1, 1])} if made.tasks else {}  # the same shapes, so the same program
    moved = jit(made.apply)(params, tree, **rolled, **one).last_hidden_state
    np.testing.assert_allclose(moved[1:3], whole[:2], atol=5e-6)


def test_inputs_may_come_by_place_by_name_or_as_a_dictionary(params):
    seen = []

    class Spy(generators.HyperDecoder):
        def observe(self, tree, params, inputs, base):
            seen.append({name: array.dtype.name for name, array in inputs.items()})
            return super().observe(tree, params, inputs, base)

    made = pf.generate(model("hyperdecoder").origin.inner, Spy(features=8))
    mask = MASK.astype(bool)
    tree = jax.eval_shape(lambda key: made.init(key, params, IDS, mask), jax.random.key(0))
    for inputs in ((IDS, mask), ({"input_ids": IDS, "attention_mask": mask},)):
        jax.eval_shape(lambda tree, inputs=inputs: made.apply(params, tree, *inputs), tree)
    jax.eval_shape(lambda tree: made.apply(params, tree, IDS, attention_mask=mask), tree)
    assert seen == 4 * [{"input_ids": "int32", "attention_mask": "bool"}]
    with pytest.raises(TypeError, match="too many positional arguments"):
        made.apply(params, tree, *[IDS] * 9)


def test_what_is_observed_has_no_dropout(params):
    """The hyper-network sees the base model as it is, and rows keep their adapters while the model's own dropout is on."""
    made = model("hyperdecoder")
    tree = point_of("hyperdecoder", params)

    def run(params, tree, key):
        return made.apply(params, tree, **INPUTS, deterministic=False, rngs={"dropout": key}).last_hidden_state

    dropped = jax.jit(run)(params, tree, jax.random.key(0))
    still = jit(made.apply)(params, tree, **INPUTS).last_hidden_state
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0.0, 2 * still), rtol=1e-4, atol=1e-5)
    assert 0.2 < float(jnp.mean(dropped == 0)) < 0.8


def count(made, params, inputs):
    tree = jax.eval_shape(lambda key: made.init(key, params, **inputs), jax.random.key(0))
    trained = trees.paths(made.trainable(tree))
    return tree, sum(leaf.size for leaf in trained.values())


def test_attempt_counts_at_the_released_size():
    """The target, the attention network and its normalisation: 232K, without the sources."""
    config = BertConfig(
        vocab_size=5,
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=128,
    )
    wide = Bert(config)
    ids = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(wide.init, jax.random.key(0), ids)["params"]
    adapted = pf.adapt(wide, pf.PromptTuning(length=100))
    sources = tuple("mnli qnli qqp sst2 squad record".split())
    prompts = np.zeros((6, 100, 768), np.float32)
    made = pf.generate(adapted, generators.Attempt(sources=sources, prompts=prompts))
    tree, trained = count(made, params, {"input_ids": ids})
    assert trained == 76_800 + 2 * 76_800 + 1_536 == 231_936
    assert tree["sources"].shape == (6, 100, 768) and made.tasks == ()
    several = pf.generate(adapted, generators.Attempt(sources=sources, tasks=("a", "b", "c"), prompts=prompts))
    assert count(several, params, {"input_ids": ids})[1] == 231_936 + 2 * 76_800


def test_hyperdecoder_makes_the_decoders_adapters_of_an_encoder_decoder_from_the_encoders_states():
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=2, num_heads=2)
    t5, ids = T5(config), jnp.zeros((2, 4), jnp.int32)
    inputs = {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids[:, :3]}
    params = jax.eval_shape(lambda key: t5.init(key, **inputs), jax.random.key(0))["params"]
    generator = generators.hyperdecoder(8, learned=r"encoder/.*")
    made = pf.generate(pf.adapt(t5, pf.parallel(bottleneck=3)), generator)
    tree, trained = count(made, params, inputs)
    heads = 128 * (2 * 8 * 3 + 3 + 8) + (2 * 8 * 3 + 3 + 8)
    assert trained == 2 * (8 * 8 + 8) + (8 + 10) * 128 + 128 + heads + 2 * 10 + (2 * 8 * 3 + 3 + 8)
    assert all(path.startswith("encoder/") for path in trees.paths(tree["learned"]))
    rows = trees.paths(jax.eval_shape(made.materialise, params, tree, None, inputs))
    assert all(leaf.shape[0] == 2 for leaf in rows.values()) and any(path.startswith("decoder/") for path in rows)
    states = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    outputs = type("Outputs", (), {"encoder_last_hidden_state": states, "last_hidden_state": None})
    seen = generator.observe(tree, {}, {"input_ids": ids}, lambda: outputs)
    np.testing.assert_allclose(seen, states.mean(1), rtol=1e-5, atol=1e-6)


def task(name, ids, rows=8):
    """Texts of the given token ids, labelled by whether they begin with the first of them."""
    generator = np.random.default_rng(len(name))
    examples = [{"ids": generator.choice(ids, size=6), "label": 0} for _ in range(rows)]
    examples = [{**example, "label": int(example["ids"][0] == ids[0])} for example in examples]
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32)
    head = pf.tasks.Head({"kernel": kernel, "bias": jnp.zeros(2)}, pf.tasks.mean_pool_features, pf.tasks.linear_logits)

    def encode(examples):
        ids = np.stack([example["ids"] for example in examples]).astype(np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return pf.tasks.Task(
        name, ("a", "b"), examples, examples, examples, encode, head, pf.tasks.accuracy, pf.tasks.cross_entropy
    )


LOW, HIGH = task("low", [1, 2]), task("high", [15, 16])


@pytest.mark.parametrize(("name", "together"), [("hyperdecoder", False), ("attempt", True)])
def test_training_lowers_the_loss_and_holds_the_sources_still(name, together, params, tmp_path):
    made, start = model(name), start_of(name, params)
    options = dict(
        adapters=start,
        steps=12,
        learning_rate={"hyperdecoder": 3e-2, "attempt": 0.3}[name],
        log_file=tmp_path / "log",
        log_every=1,
        **ONE,
    )
    if together:
        tree = pf.finetune_together(made, params, [LOW, HIGH], batch_size=16, groups=2, **options)
    else:
        tree = pf.finetune(made, params, LOW, batch_size=8, **options)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    after, before = trees.paths(tree), trees.paths(start)
    still = {path for path in before if np.array_equal(after[path], before[path])}
    assert still == ({"sources"} if name == "attempt" else set())


@pytest.mark.parametrize("name", NAMES)
def test_mean_adapters_are_the_mean_of_what_the_instances_get(name, params):
    made, tree = model(name), point_of(name, params)
    inputs = HIGH.encode(list(HIGH.train)[:7])
    number = {"hyperdecoder": None, "attempt": jnp.int32(1)}[name]
    rows = jit(made.materialise)(params, tree, number, inputs)
    mean = generators.mean_adapters(made, params, tree, HIGH, most=7, batch_size=4)
    for path, leaf in trees.paths(mean).items():
        expected = np.asarray(trees.paths(rows)[path], np.float64).mean(0)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
    outputs = jit(made.origin.inner.apply)(params, mean, **inputs).last_hidden_state
    assert np.isfinite(outputs).all()


def test_errors_say_what_to_do(params):
    made, tree = model("hyperdecoder"), point_of("hyperdecoder", params)
    for call in (made.materialise, made.deltas):
        with pytest.raises(ValueError, match=r"generators.mean_adapters\(generated, params, tree, task_data, split="):
            call(params, tree)
    with pytest.raises(ValueError, match=r"generators.mean_adapters\("):
        pf.linearize(made, tree).materialise(params, tree)
    with pytest.raises(ValueError, match="leave out task="):
        made.apply(params, tree, **INPUTS, task=0)
    table = pf.generate(made.origin.inner, generators.PerTask(tasks=TASKS))
    with pytest.raises(ValueError, match="not linearized, whose generator looks at the instance.*materialise"):
        generators.mean_adapters(table, params, {}, LOW)
    with pytest.raises(ValueError, match="most=0 instances; take the mean over one or more"):
        generators.mean_adapters(made, params, tree, LOW, most=0)
    narrow = pf.generate(made.origin.inner, generators.hyperdecoder(features=7))
    with pytest.raises(ValueError, match=r"are 8 wide, the generator's features=7; make it with hyperdecoder\(8\)"):
        jax.eval_shape(lambda key: narrow.init(key, params, **INPUTS), jax.random.key(0))
    with pytest.raises(ValueError, match="features=0 must be 1 or more"):
        generators.hyperdecoder(0)
    with pytest.raises(ValueError, match="gives an array, without last_hidden_state or encoder_last_hidden_state"):
        generators.instance_features(jnp.ones((2, 8)), {})


def test_linearized_models_make_the_adapters_of_inputs(params):
    made, tree = model("hyperdecoder"), point_of("hyperdecoder", params)
    linear = pf.linearize(made, tree)
    found, expected = (
        of.materialise(params, at, None, INPUTS) for of, at in ((linear, linear.init(None, params)), (made, tree))
    )
    for path, leaf in trees.paths(expected).items():
        np.testing.assert_array_equal(trees.paths(found)[path], leaf)


def test_errors_of_attempt_say_what_to_do(params):
    made, tree = model("attempt"), point_of("attempt", params)
    with pytest.raises(ValueError, match="3 groups do not divide a batch of 4 rows"):
        made.apply(params, tree, **INPUTS, task=np.array([0, 1, 0]))
    with pytest.raises(ValueError, match="say which task"):
        made.apply(params, tree, **INPUTS)
    inner = made.origin.inner
    refused = [
        (generators.Attempt(sources=("a",)), inner, r"names of its sources and not their prompts; pass prompts=\[1, 2, 8\]"),
        (generators.Attempt(sources=("a",), prompts=SOURCES[:1, :1]), inner, r"are \(1, 8\), the model's \(2, 8\)"),
        (
            generators.Attempt(sources=("a", "b"), prompts=SOURCES),
            model("hyperdecoder").origin.inner,
            "one leaf of pf.PromptTun",
        ),
    ]
    for generator, adapted, message in refused:
        init = functools.partial(pf.generate(adapted, generator).init, params=params, **INPUTS)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(init, jax.random.key(0))
    fewer = pf.generate(inner, generators.Attempt(sources=("a",), tasks=TASKS))
    with pytest.raises(ValueError, match="the tree has 2 sources and 2 tasks, the generator 1 and 2"):
        fewer.apply(params, tree, **INPUTS, task=0)
    with pytest.raises(ValueError, match=r"must be \[1, n, d\], one for each of sources"):
        generators.Attempt(sources=("a",), prompts=SOURCES)
    with pytest.raises(ValueError, match="must be different names, of sources one or more"):
        generators.Attempt(sources=())
    with pytest.raises(ValueError, match="temperature=0.0 must be above 0"):
        generators.Attempt(sources=("a",), temperature=0.0)
    for names in ({"sources": "abc"}, {"sources": ("a",), "tasks": "rte"}):
        with pytest.raises(ValueError, match="is one name, whose letters"):
            generators.Attempt(**names)
    lookup = made.origin.generator.observe
    with pytest.raises(ValueError, match="'word_embeddings/embedding'; the inputs have 'pixel_values', and the base"):
        lookup(tree, {}, {"pixel_values": IDS}, None)
    table = {"word_embeddings/embedding": jnp.ones((20, 8))}
    with pytest.raises(ValueError, match=r"looks up 'input_ids' .*the inputs have 'tokens', and .*Attempt\(ids=...\)"):
        lookup(tree, table, {"tokens": IDS}, None)
    assert generators.Attempt(sources=("a",), ids="tokens").observe(tree, table, {"tokens": IDS}, None).shape == (4, 8)
