"""Our RoBERTa against transformers: tiny random models of every kind."""

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

from pefusion_jax.backbones import Roberta, RobertaConfig, roberta
from pefusion_jax.backbones.encoder import positions_after_padding
from pefusion_jax.backbones.family import params_from_hf
from pefusion_jax.interop import load_pretrained, load_safetensors

HEADLESS, LM, CLASSIFIER = (
    transformers.RobertaModel,
    transformers.RobertaForMaskedLM,
    transformers.RobertaForSequenceClassification,
)
# Name -> (class, changes of the configuration).
VARIANTS = {
    "plain": (HEADLESS, dict(type_vocab_size=2)),
    "odd heads": (HEADLESS, dict(hidden_size=30, num_attention_heads=3, num_hidden_layers=1)),
    "one head, large eps": (HEADLESS, dict(num_attention_heads=1, layer_norm_eps=0.05, num_hidden_layers=1)),
    "gelu_new": (HEADLESS, dict(hidden_act="gelu_new", num_hidden_layers=1)),
    "no pooler": (HEADLESS, dict(hidden_act="silu", num_hidden_layers=1)),
    "short positions": (HEADLESS, dict(max_position_embeddings=9, num_hidden_layers=1)),
    "masked LM": (LM, {}),
    "masked LM, relu": (LM, dict(hidden_act="relu", num_hidden_layers=1)),
    "classes": (CLASSIFIER, dict(num_labels=5)),
    "regression": (CLASSIFIER, dict(num_labels=1, num_hidden_layers=1, pad_token_id=0)),
    "pad 0": (HEADLESS, dict(pad_token_id=0, num_hidden_layers=1)),
    "pad 5": (LM, dict(pad_token_id=5, max_position_embeddings=13, num_hidden_layers=1)),
}
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))


@functools.cache
def tiny(variant):
    kind, changes = VARIANTS[variant]
    options = {"add_pooling_layer": False} if variant == "no pooler" else {}
    config = transformers.RobertaConfig(**(BASE | {"type_vocab_size": 1} | changes))
    return randomize(kind(config, **options), list(VARIANTS).index(variant))


def inputs_of(variant):
    config = tiny(variant).config
    inputs = {"input_ids": ids(config.pad_token_id), "attention_mask": MASK}
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = (np.arange(7) > 3).astype(np.int32)[None, :].repeat(3, 0)
    return inputs


@variants
def test_tiny_models_agree_with_transformers(variant, folder):
    model, params = load_pretrained(folder(variant))
    got = encoders.assert_same_outputs(model, params, tiny(variant), inputs_of(variant))
    if VARIANTS[variant][0] is CLASSIFIER:
        assert got.logits.shape == (3, tiny(variant).config.num_labels)


@variants
def test_names_round_trip_bit_for_bit(variant, folder):
    assert_round_trip(roberta.FAMILY, folder(variant), tiny(variant).config.to_diff_dict() | {"model_type": "roberta"})


@pytest.mark.parametrize("variant", ["plain", "no pooler", "masked LM, relu", "classes", "regression", "pad 5"])
def test_transformers_reads_what_we_write(variant, folder, tmp_path):
    options = {"add_pooling_layer": False} if variant == "no pooler" else {}
    encoders.assert_transformers_reads_what_we_write(
        roberta.FAMILY, VARIANTS[variant][0], folder(variant), tmp_path, inputs_of(variant), **options
    )


def test_positions_skip_padding_wherever_it_is():
    tokens = np.array([[1, 1, 7, 8, 1, 9, 1], [7, 8, 9, 7, 8, 9, 7], [1] * 7], np.int32)
    for pad in (0, 1, 7):
        want = transformers.models.roberta.modeling_roberta.RobertaEmbeddings.create_position_ids_from_input_ids(
            torch.tensor(tokens), pad
        )
        np.testing.assert_array_equal(positions_after_padding(jnp.asarray(tokens), pad), want)


def test_positions_and_defaults(folder):
    model, params = load_pretrained(folder("plain"))
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    tokens = ids(1)
    positions = np.array([[5, 4, 3, 2, 1, 0, 9]], np.int32)
    want = theirs(tiny("plain"), input_ids=tokens, position_ids=positions)
    assert furthest(apply(tokens, position_ids=positions).last_hidden_state, want[0]) <= 1e-5
    # Without a mask padding is attended to, but still stands at its own position.
    bare = apply(tokens)
    assert furthest(bare.last_hidden_state, theirs(tiny("plain"), input_ids=tokens)[0]) <= 1e-5
    everything = apply(tokens, np.ones_like(tokens), np.zeros_like(tokens))
    np.testing.assert_allclose(bare.last_hidden_state, everything.last_hidden_state, atol=1e-5, rtol=0)


def test_layouts_agree_and_have_the_gradients_of_torch(folder):
    encoders.assert_layouts_agree(roberta.FAMILY, folder("masked LM"), tiny("masked LM"), inputs_of("masked LM"), pad=1)


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": True}])
def test_jvp_is_the_finite_difference(options, folder, key):
    encoders.assert_jvp_is_the_finite_difference(folder("classes"), options, inputs_of("classes"), key)


@pytest.mark.parametrize("variant", ["masked LM", "classes"])
def test_bfloat16_computes_in_bfloat16(variant, folder):
    encoders.assert_computes_in_bfloat16(folder(variant), tiny(variant), inputs_of(variant), scan_layers=variant == "classes")


def test_taps_are_those_of_bert(folder):
    model, params = load_pretrained(folder("plain"))
    seen, out = encoders.taps(model, params, inputs_of("plain"))
    names = """attention/self/tap_query attention/self/tap_key attention/self/tap_value attention/self/tap_context
    intermediate/tap_hidden output/tap_output tap_block""".split()
    assert set(seen) == {f"encoder/layer/{layer}/{name}" for layer in range(2) for name in names}
    for layer in range(2):
        np.testing.assert_array_equal(seen[f"encoder/layer/{layer}/tap_block"], out.hidden_states[layer + 1])


@pytest.mark.parametrize("heads", [{}, {"masked_lm": True, "pooler": False}, {"classes": 3, "pooler": False}])
def test_init_makes_the_tree_of_the_table(heads, key):
    shape = {name: value for name, value in BASE.items() if name != "attn_implementation"}
    config = RobertaConfig(**shape, **heads)
    encoders.assert_init_makes_the_tree_of_the_table(Roberta, config, roberta.name_table(config), ids(1), key)


def test_the_classifiers_dropout_has_its_own_rate(folder, key):
    model, params = load_pretrained(folder("classes"))
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    raw = model.config.to_dict() | quiet | {"classifier_dropout": 0.5}
    model = model.clone(config=RobertaConfig.from_dict(raw))
    noisy = jax.jit(lambda key: model.apply({"params": params}, ids(1), MASK, deterministic=False, rngs={"dropout": key}))
    one, two = (noisy(jax.random.fold_in(key, i)) for i in range(2))
    np.testing.assert_array_equal(one.last_hidden_state, two.last_hidden_state)
    assert jnp.abs(one.logits - two.logits).max() > 0.1


def test_old_and_headless_names_are_read(folder):
    tensors = load_safetensors(folder("masked LM") / "model.safetensors")
    config = load_pretrained(folder("masked LM"))[0].config
    want = params_from_hf(roberta.FAMILY, tensors, config)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tensors.items()
    }
    old["roberta.embeddings.position_ids"] = np.arange(16)[None]
    old["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"].copy()
    old["lm_head.decoder.bias"] = tensors["lm_head.bias"].copy()
    headless = {name.removeprefix("roberta."): array for name, array in old.items()}
    for given in (old, headless):
        jax.tree.map(np.testing.assert_array_equal, params_from_hf(roberta.FAMILY, given, config), want)
    old["lm_head.decoder.bias"] += 1
    with pytest.raises(ValueError, match="untied"):
        params_from_hf(roberta.FAMILY, old, config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (({"ids": ids(1)},), "Roberta takes a mapping with input_ids"),
        (({"input_ids": ids(1)}, MASK), "either one mapping or single arrays"),
        ((ids(1)[0],), r"must be \[batch, seq\]"),
        ((ids(1), MASK[:, :3]), "attention_mask has shape"),
        ((np.ones((1, 15), np.int32),), "15 tokens, the model at most 14"),
        ((np.ones((1, 17), np.int32), None, None, np.ones((1, 17), np.int32)), "17 tokens, the model at most 16"),
    ],
)
def test_wrong_inputs_are_named(args, message, folder):
    model, params = load_pretrained(folder("plain"))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, *args)


RAW = {"model_type": "roberta", "hidden_size": 24, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "xlm-roberta"}, "model_type='xlm-roberta'"),
        ({"position_embedding_type": "relative_key_query"}, "position_embedding_type='relative_key_query'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"adapter_reduction_factor": 2}, "adapter_reduction_factor=2 .unknown field"),
        ({"hidden_size": 25}, "not a multiple of"),
        ({"hidden_act": ["gelu"]}, "hidden_act must be a string"),
        ({"pad_token_id": None}, "pad_token_id must be an integer from 0 to 511, not NoneType"),
        ({"pad_token_id": -1}, "pad_token_id must be an integer"),
        ({"pad_token_id": 512}, "pad_token_id must be an integer"),
        ({"pad_token_id": True}, "pad_token_id must be an integer"),
        ({"architectures": "RobertaModel"}, "architectures must be a list"),
        ({"architectures": ["RobertaForSequenceClassification"], "num_labels": 0}, "classes must be a positive integer"),
        ({"architectures": ["RobertaForSequenceClassification"], "id2label": ["a"]}, "id2label must be a mapping"),
        ({"classifier_dropout": 1.0}, "classifier_dropout must lie in"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RobertaConfig.from_dict(RAW | change)


def test_configurations():
    assert RobertaConfig.from_dict(transformers.RobertaConfig().to_dict()) == RobertaConfig()
    by_name = RobertaConfig.from_dict(
        RAW | {"architectures": ["RobertaForSequenceClassification"], "id2label": dict.fromkeys("abc", "")}
    )
    assert by_name.classes == 3 and not by_name.pooler and not by_name.masked_lm
    assert RobertaConfig.from_dict(RAW | {"architectures": ["RobertaForMaskedLM"]}).masked_lm
    with pytest.raises(ValueError, match="two heads"):
        RobertaConfig(masked_lm=True, classes=2)
    encoders.assert_hostile_configurations_give_value_errors(roberta.FAMILY, RobertaConfig().to_dict())
