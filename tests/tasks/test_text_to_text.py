"""Text-to-text tasks: losses as in transformers, classes ranked and texts written, training of one task and of several."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

import pefusion_jax as pf
from pefusion_jax import generators
from pefusion_jax.backbones import Llama, LlamaConfig
from pefusion_jax.fusion.objectives import objective
from pefusion_jax.tasks import eval_batches, target_features, text_to_text, token_f1, train_batch
from pefusion_jax.tasks.metrics import smoothed_token_cross_entropy, token_cross_entropy
from pefusion_jax.tasks.targets import _materialised, _number, _ranking
from pefusion_jax.tasks.task import inputs_for
from pefusion_jax.training import Preempted
from pefusion_jax.training.losses import loss_of, smooths

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import parity

ONE = jax.devices()[:1]
WORDS = "<pad> </s> <unk> task : text red green blue cold warm very not it is no yes 0.0 0.2 1.4 3.0 a b".split()
CLASSES = ("not very warm", "cold", "not warm")
LORA = pf.LoRA(rank=8, alpha=32.0, targets=r".*/(v|wo)")
BATCH = dict(batch_size=8, devices=ONE)


@functools.cache
def tokenizer(pad="<pad>", eos="</s>", ends=True):
    """One token a word; ends a text as T5 does."""
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if ends:
        built.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, pad_token=pad, eos_token=eos, unk_token="<unk>")


@functools.cache
def theirs():
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=24,
        d_kv=6,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return parity.randomize(transformers.T5ForConditionalGeneration(config), 3)


@functools.cache
def small(module):
    return pf.adapt(module, pf.LoRA(rank=4, alpha=32.0, targets=r".*/wo"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An adapted T5, its parameters, and adapters that change what it says."""
    folder = tmp_path_factory.mktemp("t5")
    theirs().save_pretrained(folder)
    module, params = pf.load_pretrained(folder)
    lora = pf.adapt(module, LORA)
    start = lora.init(jax.random.key(0), params, **classes().batch(rows()[:2])["inputs"])
    noise = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + noise.normal(0, 0.1, leaf.shape).astype(np.float32), start)
    return module, lora, params, start, moved


def rows(count=24, seed=0):
    """The color decides; the rest is noise of different lengths."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        words = [*rng.choice(["it", "is", "a", "b"], rng.integers(0, 9)), ("red", "green", "blue")[i % 3]]
        made.append({"text": " ".join(rng.permutation(words)), "label": i % 3, "number": (0.04, 1.37, 2.96)[i % 3]})
    return made


def classes(name="color", **options):
    """A task of three classes, whose texts differ in length."""
    settings = {"source": ("text",), "classes": CLASSES, "buckets": (16,), "labels_at_once": 2}
    splits = {"train": rows(), "validation": rows(12, 1), "test": rows(9, 2)}
    return text_to_text(name, tokenizer(), **{**settings, **splits, **options})


@functools.cache
def compiled_losses(adapted):
    def run(params, tree, inputs):
        logits = target_features(adapted.apply(params, tree, **inputs), inputs)
        return [loss(logits, None) for loss in (token_cross_entropy, smoothed_token_cross_entropy(0.3))]

    return jax.jit(run)


def test_batches_hold_the_texts():
    batch = classes().batch([{"text": "red it", "label": "cold"}, {"text": "blue", "label": 2}])
    inputs = {name: value.tolist() for name, value in batch["inputs"].items()}
    at = {word: place for place, word in enumerate(WORDS)}
    # "color", "text:" are no words of this tokenizer.
    assert inputs["input_ids"][0][:6] == [2, 2, at["red"], at["it"], 1, 0] and len(inputs["input_ids"][0]) == 16
    assert inputs["decoder_input_ids"] == [[0, at["cold"], 1, 0], [0, at["not"], at["warm"], 1]]
    assert inputs["decoder_attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert batch["labels"].tolist() == [1, 2] and batch["labels"].dtype == np.int32
    # A tokenizer that does not end texts is helped; the end token is not doubled.
    again = classes("other", source=lambda e: e["text"], buckets=(4, 16))
    assert again.batch([{"text": "red", "label": 1}])["inputs"]["input_ids"].shape == (1, 4)
    plain = text_to_text("x", tokenizer(ends=False), source=("text",), classes=CLASSES, train=rows())
    np.testing.assert_array_equal(
        plain.batch(rows()[:3])["inputs"]["decoder_input_ids"], classes().batch(rows()[:3])["inputs"]["decoder_input_ids"]
    )


def test_losses_are_those_of_transformers(model):
    _, lora, params, start, _ = model
    batch = classes().batch(rows()[:6])
    inputs = batch["inputs"]
    plain, smoothed = compiled_losses(lora)(params, start, inputs)
    labels = np.where(inputs["decoder_attention_mask"] > 0, inputs["decoder_input_ids"], -100)[:, 1:]
    for row in range(6):
        given = {name: torch.tensor(inputs[name][row : row + 1]) for name in ("input_ids", "attention_mask")}
        target = torch.tensor(labels[row : row + 1]).long()
        with torch.no_grad():
            out = theirs()(**given, labels=target)
        assert float(plain[row]) == pytest.approx(float(out.loss), rel=1e-5)
        want = torch.nn.functional.cross_entropy(out.logits[0], target[0], label_smoothing=0.3)
        assert float(smoothed[row]) == pytest.approx(float(want), rel=1e-5)


def summed(logits):
    losses = token_cross_entropy(logits, None)
    return losses.sum(), losses


def test_a_model_that_gives_all_tokens_one_logit_still_learns():
    margins = jnp.zeros((2, 3, 5)).at[1, 0, 1].set(1.0)
    (_, loss), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(margins)
    np.testing.assert_allclose(loss, [np.log(5), np.log(4 + np.e)], rtol=1e-6)
    assert np.abs(gradient[0]).min() > 0 and not gradient[1, 1:].any()


def test_classes_are_ranked_as_by_score_labels(model):
    _, lora, params, _, moved = model
    normalized = classes("normalized", length_normalize=True)
    tasks = [classes("ranked"), normalized]
    tokens = [normalized.encode.targets.tokens(text) for text in CLASSES]
    assert [len(each) for each in tokens] == [4, 2, 3]
    found = pf.evaluate(lora, params, moved, tasks, batch_size=8)
    for task, normalize in zip(tasks, (False, True), strict=True):
        right = []
        for batch in eval_batches(task, "test", 8):
            given = {name: batch["inputs"][name] for name in ("input_ids", "attention_mask")}
            want = np.asarray(pf.score_labels(lora, params, given, tokens, adapters=moved, length_normalize=normalize))
            np.testing.assert_allclose(task.predict("adapters", lora, params, moved, batch["inputs"]), want, rtol=1e-5)
            right += (want.argmax(axis=1) == batch["labels"])[batch["weights"] > 0].tolist()
        share = np.mean(right)
        assert found[task.name] == share and found.counts[task.name] == 9
        assert found.stderr[task.name] == pytest.approx(np.sqrt(share * (1 - share) / 9))


def test_the_encoder_reads_an_example_once_for_all_classes(model):
    _, lora, params, start, _ = model
    task = classes()
    inputs = task.batch(rows()[:2])["inputs"]
    inputs |= {name: np.tile(inputs[name], (1, 16)) for name in ("input_ids", "attention_mask")}

    def flops(count):
        candidates = {name: value[:count] for name, value in task.predict.candidates.items()}
        return _ranking(lora, "adapters", 8).lower(params, start, inputs, candidates).cost_analysis()["flops"]

    assert flops(3) < 1.2 * flops(1)


def test_lora_learns_a_task_and_a_run_that_was_stopped_ends_with_the_same_bits(model, tmp_path, monkeypatch):
    _, lora, params, start, _ = model
    task = classes()
    settings = dict(steps=60, learning_rate=1e-2, warmup=0.0, adapters=start, validate_every=60, **BATCH)
    tree = pf.finetune(lora, params, task, log_file=tmp_path / "log", **settings)
    assert pf.evaluate(lora, params, tree, [task], batch_size=8)["color"] == 1.0
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert records[-1]["validation"] == 1.0
    with monkeypatch.context() as patched:
        patched.setattr("pefusion_jax.training.run.agreed", lambda asked: True)  # after one step
        with pytest.raises(Preempted):
            pf.finetune(lora, params, task, checkpoint_dir=tmp_path / "states", **settings)
    resumed = pf.finetune(lora, params, task, checkpoint_dir=tmp_path / "states", **settings)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


def test_several_kinds_of_tasks_are_learned_together(model, tmp_path):
    module, _, params, _, _ = model
    lora = small(module)
    number = classes("number", classes=(), label="number", max_target_length=4)
    text = classes("text", classes=None, target=lambda e: CLASSES[e["label"]], max_target_length=4)
    tasks = [classes(), number, text]
    assert text.classes == CLASSES and number.classes == ()
    made = pf.generate(lora, generators.pha([task.name for task in tasks], features=24, learned="encoder/.*"))
    start = jax.jit(made.init)(jax.random.key(0), params, **tasks[0].batch(rows()[:2])["inputs"])
    settings = dict(batch_size=12, groups=6, devices=ONE, log_every=1, log_file=tmp_path / "log", learning_rate=1e-2)
    tree = pf.finetune_together(made, params, tasks, adapters=start, steps=20, label_smoothing=0.1, **settings)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log").read_text().splitlines()]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    found = pf.evaluate(made, params, tree, tasks, batch_size=9)
    # A generated model writes what the model with the adapters for this task writes.
    adapters = _materialised(made)(params, tree, jnp.int32(2))
    alone = pf.evaluate(lora, params, adapters, [text], batch_size=9)
    assert alone["text"] == found["text"]
    inputs = next(eval_batches(text, "test", 9))["inputs"]
    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = pf.generate_tokens(lora, params, read, adapters=adapters, max_new_tokens=4, eos_token_id=1, pad_token_id=0)
    written = [" ".join(WORDS[token] for token in row if token > 2) for row in np.asarray(ids)]
    assert text.predict("adapters", lora, params, adapters, inputs).tolist() == written
    right = np.mean([one == CLASSES[row["label"]] for one, row in zip(written, rows(9, 2), strict=True)])
    assert found["text"] == right


def test_targets_that_are_numbers_are_smoothed_like_all_texts():
    number = classes("number", classes=(), label="number", max_target_length=4)
    assert smooths(number) and loss_of(number, 0.0) is token_cross_entropy
    assert loss_of(number, 0.1) is smoothed_token_cross_entropy(0.1)


@pytest.mark.parametrize("name", ["hyperdecoder", "attempt"])
def test_rows_with_adapters_of_their_own_are_written_with_them(model, name):
    module, _, params, _, _ = model
    text = classes("text", classes=None, target=lambda e: CLASSES[e["label"]], max_target_length=4)
    inputs = next(eval_batches(text, "test", 3))["inputs"]
    if name == "hyperdecoder":
        inner, generator = small(module), generators.hyperdecoder(24, learned=r"encoder/.*")
    else:
        inner = pf.adapt(module, pf.PromptTuning(length=2))
        generator = generators.Attempt(sources=("a",), tasks=("other", "text"), prompts=jnp.ones((1, 2, 24)))
    made = pf.generate(inner, generator)
    named = inputs_for(made, text, inputs)
    tree = jax.jit(made.init)(jax.random.key(0), params, **inputs)
    noise = np.random.default_rng(7)
    tree = jax.tree.map(lambda leaf: leaf + noise.normal(0, 0.3, leaf.shape).astype(np.float32), tree)
    found = text.predict("adapters", made, params, tree, named).tolist()
    rows_of = jax.jit(made.materialise)(params, tree, named.get("task"), inputs)
    for row in range(3):
        own = jax.tree.map(lambda leaf, row=row: leaf[row], rows_of)
        alone = text.predict("adapters", inner, params, own, {k: v[row : row + 1] for k, v in inputs.items()})
        assert alone.tolist() == [found[row]]
    if name == "hyperdecoder":  # a change of the weights is the same for all rows
        unchanged = text.predict("base", made, params, None, inputs)
        assert text.predict("delta", made, params, pf.deltas.Delta({}), inputs).tolist() == unchanged.tolist()


def test_features_of_a_linearized_model_add_up(model):
    _, lora, params, start, moved = model
    llora = pf.linearize(lora, start)
    inputs = classes().batch(rows()[:2])["inputs"]
    tau = jax.tree.map(jnp.subtract, moved, start)

    @jax.jit
    def run(params, tau, inputs):
        base, change = llora.pushforward(params, jax.tree.map(lambda leaf: leaf[None], tau), **inputs)
        whole = llora.apply(params, tau, **inputs)
        change = jax.tree.map(lambda leaf: leaf[0], change)
        return [target_features(outputs, inputs) for outputs in (base, change, whole)]

    base, change, whole = run(params, tau, inputs)
    np.testing.assert_allclose(base + change, whole, atol=1e-4)
    assert np.abs(change).max() > 0.1 and not np.asarray(whole)[1, 1:, 1:].any(axis=-1).all()


def test_statistics_are_those_of_the_tokens(model):
    module, _, params, _, _ = model
    site = "decoder/block/0/layer/2/DenseReluDense/wo"
    lora = pf.adapt(module, pf.LoRA(rank=1, targets=site))
    task = classes("number", classes=(), label="number")
    batch = task.batch(rows()[:2])
    adapters = lora.init(jax.random.key(0), params, **batch["inputs"])
    found = pf.statistics(lora, params, adapters, task, kinds=("fisher",), examples=2, batch_size=2, seed=5)
    batch = train_batch(task, 0, 2, 5)

    @jax.jit
    def squares(change, key):
        def score(change, row, key):
            inputs = jax.tree.map(lambda value: value[row][None], batch["inputs"])
            outputs = lora.base(pf.fold(params, pf.Delta({site + "/kernel": change})), **inputs)
            each = jax.nn.log_softmax(outputs.logits[0, :-1], axis=-1)
            drawn = jax.random.categorical(key, target_features(outputs, inputs)[0])
            picked = jnp.take_along_axis(each, jax.lax.stop_gradient(drawn)[:, None], axis=-1)[:, 0]
            return jnp.sum(picked * inputs["decoder_attention_mask"][0, 1:].astype(jnp.float32))

        keys = [jax.random.fold_in(key, row) for row in range(2)]
        return sum(jnp.square(jax.grad(score)(change, row, keys[row])) for row in range(2)) / 2

    want = squares(jnp.zeros((32, 24)), jax.random.key(5))
    np.testing.assert_allclose(found.fisher[site + "/kernel"], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0"), (-0.04, "0.0"), (1.37, "1.4"), (2.96, "3.0"), (3.3, "3.2"), (np.float32(5), "5.0")]
)
def test_numbers_are_written_as_t5_does(value, text):
    answer = classes(classes=(), label="number").encode.answer
    assert answer({"number": value}) == text
    assert float(text) == pytest.approx(round(round(float(value) * 5) / 5, 1))


def test_texts_that_are_no_numbers_are_wrong():
    assert [_number(text, -1.0) for text in ("3.2", "nan", "inf", "", "3.2 3", "-4")] == [3.2, -1, -1, -1, -1, -4]
    assert classes(classes=(), label="number", nearest=0.25).encode.answer({"number": 1.3}) == "1.25"
    assert classes(classes=(), label="number", nearest=5).encode.answer({"number": 13}) == "15"


def test_a_metric_of_ones_own_gets_the_texts():
    task = classes(classes=None, target=lambda e: CLASSES[e["label"]], metric=token_f1)
    # Two of the three words, and all.
    assert task.metric(np.asarray(["Not warm!", "cold"], object), np.asarray([0, 1])) == pytest.approx((0.8 + 1) / 2)


def test_functions_that_need_a_head_refuse(model):
    _, lora, params, start, _ = model
    for call in (
        lambda task: pf.evaluation.evaluate_many(lora, params, [start], [task]),
        lambda task: pf.evaluation.predict(lora, params, start, task),
    ):
        with pytest.raises(ValueError, match="'color' is scored by its own predict.*pf.evaluate"):
            call(classes())
    with pytest.raises(ValueError, match="'color' is scored by its own predict"):
        objective(lora, params, [classes()], kind="entropy")
    decoder = pf.adapt(Llama(LlamaConfig(vocab_size=23)), LORA)
    with pytest.raises(ValueError, match="'color': Llama takes no decoder_input_ids: .* encoder-decoders such as T5"):
        pf.finetune(decoder, params, classes(), steps=1)
    with pytest.raises(ValueError, match="language-model head"):
        target_features(jnp.zeros(3), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("cold", "")}, "the target '' has no tokens"),
        ({"classes": ("cold", "warm", "cold")}, "the classes 'cold' and 'cold' have the same tokens"),
        ({"classes": ("cold", "sad", "bad")}, "the classes 'sad' and 'bad' have the same tokens"),
        ({"classes": ("cold",)}, "it needs two or more"),
        ({"max_target_length": 3}, "'not very warm' has 4 tokens with the end token, more than max_target_length=3"),
        ({"classes": "cold"}, "must be sequences of texts"),
        ({"classes": None}, "give either classes="),
        ({"target": str}, "give either classes="),
        ({"classes": (), "nearest": 0.0}, "nearest=0.0 must be finite and above 0"),
        ({"labels_at_once": 0}, "labels_at_once=0 must be 1 or more"),
        (
            {"classes": None, "target": lambda e: e["answer"]},
            r"task 'color': train, example 0: no field 'answer', there are \['label', 'number', 'text'\]",
        ),
        ({"classes": None, "target": lambda e: e["label"]}, "train, example 0: the target is int, not text"),
    ],
)
def test_settings_that_cannot_work_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        classes(**settings)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"label": 0}, {}, r"no field 'text', there are \['label'\]"),
        ({"text": "a"}, {}, "no field 'label'"),
        ({"text": "a", "label": "hot"}, {}, "label 'hot' is neither a number from 0 to 2 nor one of the classes"),
        ({"text": "a", "label": 0, "raw": 5}, {"source": lambda e: e.get("raw", "a")}, "the source is int, not text"),
        ({"text": "a", "label": "a"}, {"classes": ()}, "label 'a' is not a finite number"),
        (
            {"text": "a a a a", "label": 0},
            {"classes": None, "target": lambda e: e["text"], "max_target_length": 4},
            "the target 'a a a a' has 5 tokens with the end token, more than max_target_length=4",
        ),
    ],
)
def test_bad_rows_are_named_with_their_place(row, settings, message):
    good = {"text": "a", "label": 0}
    task = classes(train=[good, good, row], validation=(), test=(), **settings)
    with pytest.raises(ValueError, match=r"task 'color': train, example 2: " + message):
        train_batch(task, 0, 2, 0)
    with pytest.raises(ValueError, match=r"example 0: " + message):
        task.encode([row])


def test_tokenizers_without_ends_and_unknown_targets_are_errors():
    with pytest.raises(ValueError, match="no end token"):
        text_to_text("x", tokenizer(eos=None), source=("text",), classes=CLASSES, train=rows())
    with pytest.raises(ValueError, match="no padding token"):
        text_to_text("x", tokenizer(pad=None), source=("text",), classes=CLASSES, train=rows())
    task = classes(classes=None, target=lambda e: e["text"], train=[{"text": "a"}], validation=(), test=())
    with pytest.raises(ValueError, match="the target 'b' is that of no example"):
        task.batch([{"text": "b"}])
