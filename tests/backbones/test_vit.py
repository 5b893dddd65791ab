"""Our ViT and DeiT against transformers, on tiny random models of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import furthest, run, theirs
from vision_checks import (
    assert_canonical,
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

from pefusion_jax.backbones import VitConfig, patches
from pefusion_jax.interop import load_pretrained

BASE = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    image_size=12,
    patch_size=4,
)
# Class, changes to the configuration, options of the class.
VARIANTS = {
    "plain": ("ViTModel", {}, {}),
    "no pooler": ("ViTModel", dict(num_hidden_layers=1), dict(add_pooling_layer=False)),
    "odd heads": ("ViTModel", dict(hidden_size=30, num_attention_heads=3, num_hidden_layers=1), {}),
    "one head, large eps": ("ViTModel", dict(num_attention_heads=1, layer_norm_eps=0.05, num_hidden_layers=1), {}),
    "no qkv bias": ("ViTModel", dict(qkv_bias=False, num_hidden_layers=1), {}),
    "gelu_new": ("ViTModel", dict(hidden_act="gelu_new", pooler_act="relu", num_hidden_layers=1), {}),
    "relu, wide pooler": ("ViTModel", dict(hidden_act="relu", pooler_output_size=7, num_hidden_layers=1), {}),
    "oblong image": ("ViTModel", dict(image_size=[8, 20], num_hidden_layers=1), {}),
    "oblong patches": ("ViTModel", dict(image_size=[12, 16], patch_size=[6, 4], num_hidden_layers=1), {}),
    "grey, ragged edge": ("ViTModel", dict(num_channels=1, image_size=15, num_hidden_layers=1), {}),
    "classifier": ("ViTForImageClassification", dict(num_labels=5), {}),
    "deit": ("DeiTModel", {}, {}),
    "deit classifier": ("DeiTForImageClassification", dict(num_labels=3, hidden_act="silu", num_hidden_layers=1), {}),
    "deit teacher": ("DeiTForImageClassificationWithTeacher", dict(num_labels=4, qkv_bias=False), {}),
}


@functools.cache
def tiny(variant):
    kind, changes, options = VARIANTS[variant]
    return make(kind, kind[: kind.index("T") + 1] + "Config", list(VARIANTS).index(variant), BASE | changes, **options)


def images(variant, **options):
    config = tiny(variant).config
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
    return pixels(*size, channels=config.num_channels, **options)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_tiny_models_agree_with_transformers(variant, folder):
    x = images(variant)
    model, params = load_pretrained(folder(variant))
    got = run(model, params, x)
    outputs = compare(got, theirs(tiny(variant), pixel_values=x))
    assert "hidden_states" in outputs and outputs & {"logits", "last_hidden_state"}
    assert (got.pooler_output is None) == ("pooler_output" not in outputs)
    assert (got.logits is None) == ("logits" not in outputs) and (got.cls_logits is None) == ("cls_logits" not in outputs)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_names_and_configuration_go_both_ways(variant, folder, tmp_path):
    check_export(folder(variant), tmp_path, tiny(variant), {"pixel_values": images(variant)}, VARIANTS[variant][2])
    check_memory_names(folder(variant), tiny(variant))


@pytest.mark.parametrize("variant", ["plain", "deit teacher"])
@pytest.mark.parametrize("size", [(20, 20), (8, 24), (12, 16), (9, 14)], ids=str)
def test_positions_are_resized_as_in_transformers(variant, size, folder):
    x = pixels(*size)
    model, params = load_pretrained(folder(variant))
    resized = functools.partial(model.apply, interpolate_pos_encoding=True, output_hidden_states=True)
    got = jax.jit(resized)({"params": params}, x)
    compare(got, theirs_resized(tiny(variant), x))


def theirs_resized(model, x):
    with torch.no_grad():
        return model(torch.tensor(x), interpolate_pos_encoding=True, output_hidden_states=True)


def test_the_model_s_own_size_needs_no_resizing(folder):
    model, params = load_pretrained(folder("oblong image"))
    x = images("oblong image")
    a, b = (jax.jit(functools.partial(model.apply, interpolate_pos_encoding=on))({"params": params}, x) for on in (False, True))
    np.testing.assert_array_equal(a.last_hidden_state, b.last_hidden_state)
    with pytest.raises(ValueError, match="2 x 5 grid cannot be resized"):
        model.apply({"params": params}, pixels(12, 12), interpolate_pos_encoding=True)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(37, 7), (37, 16), (4, 9), (5, 5), (3, 1), (1, 4), (2, 3)])
def test_bicubic_weights_are_torch_s(old, new, antialias):
    want = torch.nn.functional.interpolate(
        torch.eye(old)[:, None, :, None].repeat(1, 1, 1, 2),
        size=(new, 2),
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )[:, 0, :, 0]
    # The second axis keeps its size, so its weights are the identity.
    np.testing.assert_allclose(patches.resize_matrix(old, new, antialias).T, want.numpy(), atol=2e-6)


def test_loop_scan_and_remat_are_one_model(folder):
    check_layouts(
        folder("deit teacher"), images("deit teacher"), lambda out: jnp.sum(jnp.sin(out.logits)) + out.hidden_states[1].sum()
    )


def test_gradients_are_torch_s(folder):
    reference, x = tiny("classifier"), images("classifier")
    reference.zero_grad()
    reference(torch.tensor(x)).logits.sin().sum().backward()
    model, params = load_pretrained(folder("classifier"))
    grad = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x).logits))))(params)
    memory = dict(reference.named_parameters())
    for ours, name in (
        (grad["embeddings"]["position_embeddings"], "vit.embeddings.position_embeddings"),
        (grad["encoder"]["layer"]["0"]["attention"]["attention"]["key"]["kernel"].T, "vit.layers.0.attention.k_proj.weight"),
        (grad["encoder"]["layer"]["1"]["output"]["dense"]["kernel"].T, "vit.layers.1.mlp.fc2.weight"),
        (grad["classifier"]["bias"], "classifier.bias"),
    ):
        assert furthest(ours, memory[name].grad) <= 2e-5, name


def test_jvp_is_the_finite_difference(folder, key):
    check_jvp(folder("classifier"), images("classifier"), lambda out: out.logits, key)


def test_bfloat16_computes_in_bfloat16(folder):
    x = images("plain")
    want = theirs(tiny("plain"), pixel_values=x).last_hidden_state
    check_bfloat16(folder("plain"), x, lambda out: out.last_hidden_state, want)


def test_init_makes_the_tree_of_the_table(folder, key):
    for variant in ("plain", "deit teacher"):
        check_init(folder(variant), images(variant), key)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout(field, folder, key):
    check_dropout(folder("plain"), images("plain"), lambda out: out.last_hidden_state, key, **{field: 0.4})


TAPS = """attention/attention/tap_query attention/attention/tap_key attention/attention/tap_value
attention/attention/tap_context intermediate/tap_hidden output/tap_output tap_block""".split()


def test_taps_stand_where_they_say(folder):
    model, params = load_pretrained(folder("plain"))
    seen, got = taps_of(model, params, images("plain"))
    assert set(seen) == {f"encoder/layer/{layer}/{tap}" for layer in range(2) for tap in TAPS}
    for layer in range(2):
        np.testing.assert_array_equal(seen[f"encoder/layer/{layer}/tap_block"], got.hidden_states[layer + 1])
    at = {tap: seen[f"encoder/layer/1/{tap}"] for tap in TAPS}
    own, x = params["encoder"]["layer"]["1"], got.hidden_states[1]
    linear = lambda p, y: y @ p["kernel"] + p["bias"][None, None]  # noqa: E731
    y = x + linear(own["attention"]["output"]["dense"], at["attention/attention/tap_context"])
    np.testing.assert_allclose(
        at["output/tap_output"], linear(own["output"]["dense"], at["intermediate/tap_hidden"]), atol=1e-5
    )
    np.testing.assert_allclose(at["tap_block"], y + at["output/tap_output"], atol=1e-5)


def test_positions_can_be_put_in_front_of_keys_and_values(folder):
    """A tap may lengthen keys and values; zeros as keys and values then only dilute the weights."""
    import flax.linen as nn

    model, params = load_pretrained(folder("no pooler"))

    def longer(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name in ("tap_key", "tap_value"):
            out = jnp.concatenate([jnp.full((out.shape[0], 3, out.shape[2]), 0.25), out], axis=1)
        return out

    with nn.intercept_methods(longer):
        got = model.apply({"params": params}, images("no pooler"))
    assert got.last_hidden_state.shape == (2, 10, 24)
    assert np.abs(got.last_hidden_state - model.apply({"params": params}, images("no pooler")).last_hidden_state).max() > 1e-3


def test_mapping_and_headless_names(folder):
    model, params = load_pretrained(folder("classifier"))
    x = images("classifier")
    a, b = (jax.jit(model.apply)({"params": params}, given) for given in (x, {"pixel_values": x}))
    np.testing.assert_array_equal(a.logits, b.logits)
    assert_canonical(folder("classifier"), lambda tensors: {name.removeprefix("vit."): t for name, t in tensors.items()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixels": pixels(12, 12)}, "takes a mapping with pixel_values"),
        ({}, "needs pixel_values"),
        (pixels(12, 12)[0], r"must be \[batch, 3, height, width\]"),
        (pixels(12, 12).transpose(0, 2, 3, 1), "channels come second"),
        (pixels(12, 16), r"12 x 16, the model's \(12, 12\); resize them, or pass interpolate"),
        ((pixels(12, 12) * 50).astype(np.int32), "int32; they must be floats"),
    ],
)
def test_wrong_inputs_are_named(given, message, folder):
    model, params = load_pretrained(folder("plain"))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, given)
    with pytest.raises(ValueError, match="smaller than a patch"):
        model.apply({"params": params}, pixels(3, 12), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, "VitConfig.hidden_act='mish' is not implemented"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"head_dim": 7}, "head_dim=7 .unknown field"),
        ({"hidden_size": 25}, "hidden_size=25 is not a multiple of num_attention_heads=4"),
        ({"image_size": [12]}, "image_size must be a positive integer or"),
        ({"patch_size": 13}, "larger than image_size"),
        ({"model_type": "beit"}, "model_type='beit'"),
        ({"num_hidden_layers": 10**6}, "up to 1024"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
    ],
)
def test_what_is_not_implemented_is_named(changes, message):
    raw = tiny("plain").config.to_dict() | {"model_type": "vit"}
    with pytest.raises(ValueError, match=message):
        VitConfig.from_dict(raw | changes)


def test_hostile_configurations_raise_nothing_but_value_errors():
    for variant in ("plain", "deit teacher"):
        raw = tiny(variant).config.to_dict()
        for heads in (["ViTModel"], ["DeiTForImageClassificationWithTeacher"]):
            garbage(VitConfig, raw | {"architectures": heads})


def test_configurations_that_contradict_themselves():
    with pytest.raises(ValueError, match="teacher=True needs"):
        VitConfig(teacher=True, labels=3)
    assert VitConfig(image_size=20, patch_size=[4, 5]).image_size == (20, 20)
