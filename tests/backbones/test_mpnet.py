"""Our MPNet against transformers: tiny random models of every kind, then the real all-mpnet-base-v2."""

import functools

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoders import BASE, MASK, ids
from parity import assert_round_trip, furthest, randomize, theirs
from real_models import fetched

from pefusion_jax.backbones import MPNet, MPNetConfig, mpnet
from pefusion_jax.backbones.family import params_from_hf, params_to_hf
from pefusion_jax.interop import load_pretrained, load_safetensors, load_tokenizer, locate, save_safetensors
from pefusion_jax.tasks import base_apply, embedded_tasks, features_of

HEADLESS, LM, CLASSIFIER = (
    transformers.MPNetModel,
    transformers.MPNetForMaskedLM,
    transformers.MPNetForSequenceClassification,
)
# Name -> (class, changes of the configuration).
VARIANTS = {
    "plain": (HEADLESS, {}),
    "odd heads": (HEADLESS, dict(hidden_size=30, num_attention_heads=3, num_hidden_layers=1)),
    "one head, large eps": (HEADLESS, dict(num_attention_heads=1, layer_norm_eps=0.05, num_hidden_layers=1)),
    "gelu_new": (HEADLESS, dict(hidden_act="gelu_new", num_hidden_layers=1)),
    "no pooler": (HEADLESS, dict(hidden_act="silu", num_hidden_layers=1)),
    "short positions": (HEADLESS, dict(max_position_embeddings=9, num_hidden_layers=1)),
    # A larger table has rows that nothing looks up, and another id of padding in the configuration changes nothing.
    "more buckets, another pad": (HEADLESS, dict(relative_attention_num_buckets=40, pad_token_id=3, num_hidden_layers=1)),
    "masked LM": (LM, {}),
    "masked LM, relu": (LM, dict(hidden_act="relu", num_hidden_layers=1)),
    "classes": (CLASSIFIER, dict(num_labels=5)),
    "regression": (CLASSIFIER, dict(num_labels=1, num_hidden_layers=1)),
}
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
INPUTS = {"input_ids": ids(1), "attention_mask": MASK}


@functools.cache
def tiny(variant):
    """A random transformers model; position biases are as large as scores."""
    kind, changes = VARIANTS[variant]
    options = {"add_pooling_layer": False} if variant == "no pooler" else {}
    model = randomize(kind(transformers.MPNetConfig(**(BASE | changes)), **options), list(VARIANTS).index(variant))
    with torch.no_grad():
        model.base_model.encoder.relative_attention_bias.weight.mul_(5)
    return model


@variants
def test_tiny_models_agree_with_transformers(variant, folder):
    model, params = load_pretrained(folder(variant))
    got = encoders.assert_same_outputs(model, params, tiny(variant), INPUTS)
    if VARIANTS[variant][0] is CLASSIFIER:
        assert got.logits.shape == (3, tiny(variant).config.num_labels)


@variants
def test_names_round_trip_bit_for_bit(variant, folder):
    assert_round_trip(mpnet.FAMILY, folder(variant), tiny(variant).config.to_diff_dict() | {"model_type": "mpnet"})


@pytest.mark.parametrize(
    "variant", ["plain", "no pooler", "more buckets, another pad", "masked LM, relu", "classes", "regression"]
)
def test_transformers_reads_what_we_write(variant, folder, tmp_path):
    options = {"add_pooling_layer": False} if variant == "no pooler" else {}
    encoders.assert_transformers_reads_what_we_write(
        mpnet.FAMILY, VARIANTS[variant][0], folder(variant), tmp_path, INPUTS, **options
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_far_positions_fall_into_the_same_buckets(scan_layers, tmp_path):
    """Longer than the last bucket's 128, where the logarithm decides."""
    config = transformers.MPNetConfig(
        **(BASE | dict(max_position_embeddings=302, num_hidden_layers=1, hidden_size=8, num_attention_heads=2))
    )
    reference = randomize(transformers.MPNetModel(config), 0)
    reference.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path, scan_layers=scan_layers)
    tokens = np.random.default_rng(2).integers(2, 61, (1, 300)).astype(np.int32)
    encoders.assert_same_outputs(model, params, reference, {"input_ids": tokens})
    ahead = np.arange(-300, 301)
    want = transformers.models.mpnet.modeling_mpnet.MPNetEncoder.relative_position_bucket(torch.tensor(ahead))
    np.testing.assert_array_equal(mpnet.relative_buckets(ahead, True, 32, 128), want)


def test_positions_and_defaults(folder):
    model, params = load_pretrained(folder("plain"))
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    positions = np.array([[5, 4, 3, 2, 1, 0, 9]], np.int32)
    want = theirs(tiny("plain"), input_ids=ids(1), position_ids=positions)
    assert furthest(apply(ids(1), position_ids=positions).last_hidden_state, want[0]) <= 1e-5
    # Without a mask padding is attended to, but still stands at its own position.
    bare = apply(ids(1)).last_hidden_state
    assert furthest(bare, theirs(tiny("plain"), input_ids=ids(1))[0]) <= 1e-5
    np.testing.assert_allclose(bare, apply(ids(1), np.ones_like(MASK)).last_hidden_state, atol=1e-5, rtol=0)
    typed = apply(ids(1), token_type_ids=MASK)  # there are no token types; transformers ignores them too
    np.testing.assert_array_equal(bare, typed.last_hidden_state)


def test_a_row_without_a_kept_token_is_finite_and_as_in_transformers(folder):
    mask = MASK.copy()
    mask[1] = 0
    model, params = load_pretrained(folder("plain"))
    got = jax.jit(model.apply)({"params": params}, ids(1), mask)
    assert furthest(got.last_hidden_state, theirs(tiny("plain"), input_ids=ids(1), attention_mask=mask)[0]) <= 1e-5


def test_layouts_agree_and_have_the_gradients_of_torch(folder):
    """The table of relative positions gets its gradient from all layers, scanned or not."""
    encoders.assert_layouts_agree(mpnet.FAMILY, folder("masked LM"), tiny("masked LM"), INPUTS, pad=1)


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": True}])
def test_jvp_is_the_finite_difference(options, folder, key):
    encoders.assert_jvp_is_the_finite_difference(folder("classes"), options, INPUTS, key)


@pytest.mark.parametrize("variant", ["masked LM", "classes"])
def test_bfloat16_computes_in_bfloat16(variant, folder):
    encoders.assert_computes_in_bfloat16(folder(variant), tiny(variant), INPUTS, scan_layers=variant == "classes")


def test_taps_stand_where_they_say(folder):
    model, params = load_pretrained(folder("plain"))
    seen, out = encoders.taps(model, params, INPUTS)
    names = """attention/attn/tap_query attention/attn/tap_key attention/attn/tap_value attention/attn/tap_context
    intermediate/tap_hidden output/tap_output tap_block""".split()
    assert set(seen) == {f"encoder/layer/{layer}/{name}" for layer in range(2) for name in names}
    for layer in range(2):
        np.testing.assert_array_equal(seen[f"encoder/layer/{layer}/tap_block"], out.hidden_states[layer + 1])
    at = {name: seen[f"encoder/layer/1/{name}"] for name in names}
    own, x = params["encoder"]["layer"]["1"], out.hidden_states[1]
    linear = lambda p, y: y @ p["kernel"] + p["bias"][None, None]  # noqa: E731
    for tap, name in (("query", "q"), ("key", "k"), ("value", "v")):
        np.testing.assert_allclose(at[f"attention/attn/tap_{tap}"], linear(own["attention"]["attn"][name], x), atol=1e-5)
    want = linear(own["output"]["dense"], at["intermediate/tap_hidden"])
    np.testing.assert_allclose(at["output/tap_output"], want, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_taps_on_key_and_value_may_prepend_positions(scan_layers, folder):
    """Two positions that every query attends to, with no relative position and so no bias."""
    model, params = load_pretrained(folder("plain"), scan_layers=scan_layers)
    rng = np.random.default_rng(1)
    prefix = {name: rng.normal(size=(3, 2, 24)).astype(np.float32) for name in ("key", "value")}
    got = encoders.prepended(model, params, INPUTS, prefix)

    reference = tiny("plain")
    keep = np.concatenate([np.ones((3, 2), np.int32), MASK], 1)[:, None, None]
    hidden = torch.tensor(np.where(keep == 1, 0, np.finfo(np.float32).min).astype(np.float32))
    split = lambda y: y.unflatten(-1, (4, 6)).transpose(1, 2)  # noqa: E731
    with torch.no_grad():
        x = reference.embeddings(torch.tensor(ids(1)))
        bias = torch.nn.functional.pad(reference.encoder.compute_position_bias(x), (2, 0))
        for layer in reference.encoder.layer:
            attn = layer.attention.attn
            q, k, v = (
                split(attn.q(x)),
                *(
                    split(torch.cat([torch.tensor(prefix[kind]), getattr(attn, name)(x)], 1))
                    for kind, name in (("key", "k"), ("value", "v"))
                ),
            )
            weights = (q @ k.transpose(-1, -2) / 6**0.5 + bias + hidden).softmax(-1)
            x = layer.attention.LayerNorm(attn.o((weights @ v).transpose(1, 2).flatten(2)) + x)
            x = layer.output(layer.intermediate(x), x)
    assert furthest(got, x) <= 1e-5


@pytest.mark.parametrize("heads", [{}, {"masked_lm": True, "pooler": False}, {"classes": 3, "pooler": False}])
def test_init_makes_the_tree_of_the_table(heads, key):
    shape = {name: value for name, value in BASE.items() if name != "attn_implementation"}
    config = MPNetConfig(**shape, **heads)
    encoders.assert_init_makes_the_tree_of_the_table(MPNet, config, mpnet.name_table(config), ids(1), key)


def test_old_and_headless_names_are_read(folder):
    tensors = load_safetensors(folder("masked LM") / "model.safetensors")
    config = load_pretrained(folder("masked LM"))[0].config
    want = params_from_hf(mpnet.FAMILY, tensors, config)
    old = dict(tensors)
    old["mpnet.embeddings.position_ids"] = np.arange(16)[None]
    old["lm_head.decoder.weight"] = tensors["mpnet.embeddings.word_embeddings.weight"].copy()
    old["lm_head.decoder.bias"] = tensors["lm_head.bias"].copy()
    headless = {name.removeprefix("mpnet."): array for name, array in old.items()}
    for given in (old, headless):
        jax.tree.map(np.testing.assert_array_equal, params_from_hf(mpnet.FAMILY, given, config), want)
    old["lm_head.decoder.weight"] += 1
    with pytest.raises(ValueError, match="untied"):
        params_from_hf(mpnet.FAMILY, old, config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (({"input_ids": ids(1), "labels": ids(1)},), "MPNet takes a mapping with input_ids and any of"),
        ((ids(1), None, MASK[:1]), "token_type_ids has shape"),
        ((ids(1)[0],), r"must be \[batch, seq\]"),
        ((ids(1), MASK[:, :3]), "attention_mask has shape"),
        ((np.ones((1, 15), np.int32),), "15 tokens, the model at most 14"),
    ],
)
def test_wrong_inputs_are_named(args, message, folder):
    model, params = load_pretrained(folder("plain"))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, *args)


RAW = {"model_type": "mpnet", "hidden_size": 24, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"relative_attention_num_buckets": 31}, "looks up 32 buckets"),
        ({"relative_attention_num_buckets": "32"}, "relative_attention_num_buckets must be a positive integer"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"type_vocab_size": 2}, "type_vocab_size=2 .unknown field"),
        ({"hidden_size": 25}, "not a multiple of"),
        ({"vocab_size": 1}, "vocab_size=1 has no row for padding"),
        ({"layer_norm_eps": 2.0}, "layer_norm_eps must lie in"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MPNetConfig.from_dict(RAW | change)


def test_configurations():
    assert MPNetConfig.from_dict(transformers.MPNetConfig().to_dict()) == MPNetConfig()
    by_name = MPNetConfig.from_dict(RAW | {"architectures": ["MPNetForSequenceClassification"], "num_labels": 7})
    assert by_name.classes == 7 and not by_name.pooler
    encoders.assert_hostile_configurations_give_value_errors(mpnet.FAMILY, MPNetConfig().to_dict())


NAME = "sentence-transformers/all-mpnet-base-v2"
# Each sentence and, in the same place of the other half, one that says the same.
SENTENCES = [
    "A man is playing an acoustic guitar on the street.",
    "Shares fell.",
    "How do I reset my password, and why does it expire every ninety days? Nobody told us.",
    "The kitten sleeps on the sofa.",
    "Someone performs music with a guitar outdoors.",
    "The stock market lost value today.",
    "I forgot my login and need a new one.",
    "A young cat is taking a nap on the couch.",
]


@pytest.fixture(scope="module")
def real():
    """The real model: its parameters scanned, so that twelve layers compile as one."""
    return load_pretrained(fetched(NAME), scan_layers=True)


def test_the_real_model_agrees_with_transformers(real):
    batch = load_tokenizer(NAME)(SENTENCES, padding=True, return_tensors="np")
    inputs = {key: array.astype(np.int32) for key, array in batch.items()}
    assert 0 < inputs["attention_mask"].mean() < 1
    reference, report = transformers.AutoModel.from_pretrained(locate(NAME).path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    want = theirs(reference.eval(), **batch)
    model, params = real
    got = jax.jit(functools.partial(model.apply, output_hidden_states=True))({"params": params}, inputs)
    assert len(got.hidden_states) == 13
    for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert furthest(mine, other) <= 1e-5 * float(other.abs().max())
    assert furthest(got.pooler_output, want.pooler_output) <= 1e-5

    mask = inputs["attention_mask"][..., None]
    mean = (np.asarray(got.last_hidden_state) * mask).sum(1) / mask.sum(1)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    similar = unit @ unit.T - 2 * np.eye(8, dtype=np.float32)
    np.testing.assert_array_equal(similar.argmax(1), (np.arange(8) + 4) % 8)
    assert similar[0, 4] > 0.5 > 0.2 > similar[0, 1]


def test_the_real_model_serves_tasks(real):
    """Zero-shot on embedded text through the ordinary pipeline, which names token types for every encoder."""
    model, params = real
    (task,) = embedded_tasks(model, params, load_tokenizer(NAME), names=("intents",), buckets=(32,))
    inputs, labels = task.arrays("test")
    some = {key: value[:64] for key, value in inputs.items()}
    features = features_of(base_apply(model), params, some, task.encode.trim)
    logits = np.asarray(task.head.logits(task.head.params, jnp.asarray(features)))
    assert 0.6 < task.metric(logits, labels[:64]) < 1  # chance is 0.05


def test_the_real_model_round_trips(real, tmp_path):
    """HF -> ours -> HF bit for bit, and transformers loads what we wrote."""
    original = load_safetensors(locate(NAME).path / "model.safetensors")
    model, params = real
    written = params_to_hf(mpnet.FAMILY, params, model.config)
    original.pop("embeddings.position_ids", None)
    assert written.keys() == original.keys()
    for name, array in original.items():
        assert written[name].shape == array.shape and written[name].tobytes() == array.tobytes(), name
    save_safetensors(tmp_path / "model.safetensors", written)
    (tmp_path / "config.json").write_text((locate(NAME).path / "config.json").read_text())
    _, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
