"""Our CLIP against transformers, on tiny random models of every kind: both towers together and each alone."""

import functools
import json

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
    raw_config,
    taps_of,
)

from pefusion_jax import trees
from pefusion_jax.backbones import (
    ClipConfig,
    ClipTextConfig,
    ClipVisionConfig,
    image_embeds_features,
    zero_shot_classifier,
)
from pefusion_jax.interop import load_pretrained
from pefusion_jax.tasks import heads
from pefusion_jax.tasks.task import Head

TEXT = dict(
    vocab_size=37,
    hidden_size=20,
    intermediate_size=28,
    projection_dim=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=32,
    projection_dim=10,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=12,
    patch_size=4,
)
ONE = dict(num_hidden_layers=1)
# Class, changes to the text and to the vision configuration, or to the one there is.
VARIANTS = {
    "clip": ("CLIPModel", {}, {}),
    "clip, later eos": ("CLIPModel", dict(eos_token_id=30, **ONE), ONE),
    "clip, gelu": ("CLIPModel", dict(hidden_act="gelu", **ONE), dict(hidden_act="gelu", num_channels=1, **ONE)),
    "clip, large eps": ("CLIPModel", dict(layer_norm_eps=0.03, **ONE), dict(layer_norm_eps=0.02, **ONE)),
    "vision": ("CLIPVisionModel", VISION, None),
    "vision, odd heads": ("CLIPVisionModel", VISION | ONE | dict(hidden_size=30, num_attention_heads=5), None),
    "vision, ragged edge": ("CLIPVisionModel", VISION | ONE | dict(image_size=14, hidden_act="gelu"), None),
    "vision with projection": ("CLIPVisionModelWithProjection", VISION | dict(projection_dim=7), None),
    "text": ("CLIPTextModel", TEXT, None),
    "text, odd heads": ("CLIPTextModel", TEXT | ONE | dict(hidden_size=21, num_attention_heads=3), None),
    "text, later eos": ("CLIPTextModel", TEXT | ONE | dict(eos_token_id=30, hidden_act="gelu_new"), None),
    "text, short": ("CLIPTextModel", TEXT | ONE | dict(max_position_embeddings=7, num_attention_heads=1), None),
    "text with projection": ("CLIPTextModelWithProjection", TEXT | dict(projection_dim=7, eos_token_id=30), None),
}
# The end of text is 30; highest id only in the first row, twice in the second, followed by padding in the third.
IDS = np.array([[0, 5, 9, 30, 1, 1, 1], [0, 30, 36, 4, 30, 8, 8], [0, 6, 7, 8, 9, 30, 30]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [0, 0, 1, 1, 1, 1, 1]], np.int32)


@functools.cache
def tiny(variant):
    kind, one, two = VARIANTS[variant]
    seed = list(VARIANTS).index(variant)
    if two is not None:
        parts = dict(text_config=TEXT | one, vision_config=VISION | two, projection_dim=11)
        return make(kind, "CLIPConfig", seed, parts)
    return make(kind, "CLIPVisionConfig" if "Vision" in kind else "CLIPTextConfig", seed, one)


def inputs_of(variant):
    kind = VARIANTS[variant][0]
    inputs = {}
    if kind != "CLIPVisionModel" and "Vision" not in kind:
        inputs |= {"input_ids": IDS, "attention_mask": MASK}
    if "Text" not in kind:
        config = getattr(tiny(variant).config, "vision_config", tiny(variant).config)
        inputs["pixel_values"] = pixels(config.image_size, config.image_size, channels=config.num_channels)
    return inputs


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_tiny_models_agree_with_transformers(variant, folder):
    inputs = inputs_of(variant)
    model, params = load_pretrained(folder(variant))
    got = run(model, params, inputs)
    outputs = compare(got, theirs(tiny(variant), **inputs))
    if variant.startswith("clip"):
        assert outputs >= {"logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "text_model_output"}
        assert len(got.vision_model_output.hidden_states) == model.config.vision.num_hidden_layers + 1
    else:
        assert outputs >= {"last_hidden_state", "hidden_states"} and outputs & {"pooler_output", "text_embeds", "image_embeds"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_names_and_configuration_go_both_ways(variant, folder, tmp_path):
    check_export(folder(variant), tmp_path, tiny(variant), inputs_of(variant))
    check_memory_names(folder(variant), tiny(variant))


def test_the_pooled_token_is_the_highest_id_or_the_first_end_of_text(folder):
    for variant, end in (("text", [3, 2, 5]), ("text, later eos", [3, 1, 5])):
        model, params = load_pretrained(folder(variant))
        got = jax.jit(model.apply)({"params": params}, IDS, MASK)
        # Two outputs of one program, each of which XLA may fuse, and so round, in its own way.
        np.testing.assert_allclose(got.pooler_output, got.last_hidden_state[np.arange(3), np.array(end)], rtol=0, atol=1e-6)


def test_text_is_causal_and_takes_positions_and_masks(folder):
    model, params = load_pretrained(folder("text"))
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    positions = np.array([[5, 4, 3, 2, 1, 0, 8]], np.int32)
    with torch.no_grad():
        want = tiny("text")(torch.tensor(IDS), position_ids=torch.tensor(positions))
    assert furthest(apply(IDS, position_ids=positions).last_hidden_state, want.last_hidden_state) <= 1e-5
    changed = IDS.copy()
    changed[:, 5:] = 3
    a, b = apply(IDS).last_hidden_state, apply(changed).last_hidden_state
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    everything = apply(IDS, np.ones_like(IDS), np.arange(7, dtype=np.int32)[None].repeat(3, 0))
    for args in ((IDS,), ({"input_ids": IDS},), (IDS.astype(np.int64), np.ones(IDS.shape, bool))):
        np.testing.assert_allclose(apply(*args).last_hidden_state, everything.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(20, 20), (9, 16)], ids=str)
def test_positions_are_resized_as_in_transformers(size, folder):
    x = pixels(*size)
    model, params = load_pretrained(folder("vision"))
    got = jax.jit(functools.partial(model.apply, interpolate_pos_encoding=True))({"params": params}, x)
    with torch.no_grad():
        want = tiny("vision")(torch.tensor(x), interpolate_pos_encoding=True)
    compare(got, want)


def test_one_tower_is_enough(folder):
    model, params = load_pretrained(folder("clip"))
    inputs = inputs_of("clip")
    both = jax.jit(model.apply)({"params": params}, inputs)
    seen = jax.jit(model.apply)({"params": params}, {"pixel_values": inputs["pixel_values"]})
    read = jax.jit(model.apply)({"params": params}, {"input_ids": IDS, "attention_mask": MASK})
    np.testing.assert_allclose(seen.image_embeds, both.image_embeds, atol=1e-6)
    np.testing.assert_allclose(read.text_embeds, both.text_embeds, atol=1e-6)
    assert seen.text_embeds is None and seen.logits_per_image is None and read.vision_model_output is None


def test_a_prefixed_file_of_a_tower_alone_is_read(folder):
    """Transformers 4 wrote these with a prefix, and with the constant positions."""
    for variant, prefix in (("vision", "vision_model."), ("text", "text_model.")):
        ids = {f"{prefix}embeddings.position_ids": np.arange(9)[None]}
        assert_canonical(folder(variant), lambda tensors, p=prefix, i=ids: {p + name: t for name, t in tensors.items()} | i)


def old_configuration(folder):
    """As the first files had it: the towers twice, and every default of the time in them."""
    raw = raw_config(folder("clip"))
    legacy = dict(
        add_cross_attention=False, bad_words_ids=None, cross_attention_hidden_size=None, diversity_penalty=0.0, do_sample=False,
        dropout=0.0, early_stopping=False, is_decoder=False, is_encoder_decoder=False, length_penalty=1.0, max_length=20,
        min_length=0, num_beams=1, pruned_heads={}, repetition_penalty=1.0, temperature=1.0, tie_word_embeddings=True, top_k=50,
        top_p=1.0, torch_dtype=None, typical_p=1.0, use_bfloat16=False, id2label={"0": "LABEL_0"}, architectures=None,
    )  # fmt: skip
    return raw | {"text_config": raw["text_config"] | legacy, "vision_config": raw["vision_config"] | legacy}


def test_old_configurations_are_read(folder):
    config = load_pretrained(folder("clip"))[0].config
    old = old_configuration(folder)
    assert ClipConfig.from_dict(old | {"text_config_dict": None, "vision_config_dict": None}) == config
    wrong = old["vision_config"] | {"hidden_size": 48}
    again = ClipConfig.from_dict(old | {"vision_config": wrong, "vision_config_dict": VISION})
    assert again == config
    assert ClipConfig.from_dict({"model_type": "clip"}) == ClipConfig()


def loss(out):
    return jnp.sum(jnp.sin(out.logits_per_image)) + out.text_model_output.hidden_states[1].sum()


def test_loop_scan_and_remat_are_one_model(folder):
    check_layouts(folder("clip"), inputs_of("clip"), loss)


def test_jvp_is_the_finite_difference(folder, key):
    variant = "clip, later eos"
    check_jvp(folder(variant), inputs_of(variant), lambda out: out.image_embeds @ out.text_embeds.T, key)


def test_bfloat16_computes_in_bfloat16(folder):
    inputs = inputs_of("clip")
    want = theirs(tiny("clip"), **inputs)
    model, params = load_pretrained(folder("clip"), dtype=jnp.bfloat16)
    got = jax.jit(model.apply)({"params": params}, inputs)
    # The towers compute in bfloat16; cosines and logits are float32.
    assert got.vision_model_output.last_hidden_state.dtype == got.text_model_output.pooler_output.dtype == jnp.bfloat16
    assert got.logits_per_image.dtype == got.image_embeds.dtype == jnp.float32
    assert furthest(got.image_embeds, want.image_embeds) < 0.05 and furthest(got.text_embeds, want.text_embeds) < 0.05
    want = theirs(tiny("vision with projection"), **inputs_of("vision with projection")).image_embeds
    inputs = inputs_of("vision with projection")
    check_bfloat16(folder("vision with projection"), inputs, lambda out: out.image_embeds, want, bound=0.3)


def test_init_makes_the_tree_of_the_table(folder, key):
    for variant in ("clip", "vision with projection", "text"):
        check_init(folder(variant), inputs_of(variant), key)
    model, params = load_pretrained(folder("clip"))
    made = jax.eval_shape(model.init, key, pixel_values=inputs_of("clip")["pixel_values"])["params"]
    assert jax.tree.structure(made) == jax.tree.structure(params)


def test_dropout(folder, key):
    check_dropout(folder("vision"), inputs_of("vision"), lambda out: out.pooler_output, key, attention_dropout=0.5)


def test_taps_stand_where_they_say(folder):
    model, params = load_pretrained(folder("clip"))
    seen, got = taps_of(model, params, inputs_of("clip"))
    taps = [f"self_attn/tap_{name}" for name in ("query", "key", "value", "context")]
    taps += ["mlp/tap_hidden", "mlp/tap_output", "tap_block"]
    towers = ("text_model", "vision_model")
    assert set(seen) == {f"{tower}/encoder/layers/{layer}/{tap}" for tower in towers for layer in range(2) for tap in taps}
    for tower, out in zip(towers, (got.text_model_output, got.vision_model_output), strict=True):
        at = {tap: seen[f"{tower}/encoder/layers/1/{tap}"] for tap in taps}
        own = params[tower]["encoder"]["layers"]["1"]
        linear = lambda p, y: y @ p["kernel"] + p["bias"][None, None]  # noqa: E731
        y = out.hidden_states[1] + linear(own["self_attn"]["out_proj"], at["self_attn/tap_context"])
        np.testing.assert_allclose(at["mlp/tap_output"], linear(own["mlp"]["fc2"], at["mlp/tap_hidden"]), atol=1e-5)
        np.testing.assert_allclose(at["tap_block"], y + at["mlp/tap_output"], atol=1e-5)
        np.testing.assert_array_equal(at["tap_block"], out.hidden_states[2])


def class_weights(model, variant, ids, masks):
    """The same by transformers, one class at a time."""
    rows = []
    for prompts, mask in zip(ids, masks, strict=True):
        with torch.no_grad():
            arrays = dict(input_ids=torch.tensor(prompts), attention_mask=torch.tensor(mask))
            if variant == "clip":
                embeds = model.get_text_features(**arrays).pooler_output
            else:
                embeds = model(**arrays).text_embeds
        mean = torch.nn.functional.normalize(embeds, dim=-1).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("variant", ["clip", "text with projection"])
def test_zero_shot_weights_are_averages_of_prompts(variant, folder):
    ids, masks = [IDS, IDS[:1], IDS[1:]], [MASK, MASK[:1], MASK[1:]]
    model, params = load_pretrained(folder(variant))
    want = class_weights(tiny(variant), variant, ids, masks)
    for batch_size in (4, 64):
        got = zero_shot_classifier(model, params, ids, masks, batch_size=batch_size)
        assert got.dtype == np.float32 and furthest(got, want) <= 1e-5
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    # An array [classes, prompts, seq] will do, and no mask keeps everything.
    square = zero_shot_classifier(model, params, np.stack([IDS, IDS[::-1]]))
    np.testing.assert_allclose(square[0], square[1], atol=1e-6)
    assert furthest(square[:1], class_weights(tiny(variant), variant, [IDS], [np.ones_like(MASK)])) <= 1e-5


def test_zero_shot_weights_are_a_head(folder):
    """With one prompt a class, the head's logits are the model's own."""
    model, params = load_pretrained(folder("clip"))
    inputs = inputs_of("clip")
    weights = zero_shot_classifier(model, params, IDS[:, None], MASK[:, None])
    fixed = {"classes": weights, "scale": jnp.exp(params["logit_scale"]), "bias": jnp.zeros(3)}
    head = Head(fixed, image_embeds_features, heads.cosine_logits)
    outputs = jax.jit(model.apply)({"params": params}, {"pixel_values": inputs["pixel_values"]})
    got = head.logits(head.params, head.features(outputs, inputs))
    assert furthest(got, theirs(tiny("clip"), **inputs).logits_per_image) <= 1e-5


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([], None, "at least one prompt"),
        ([IDS, IDS[:0]], None, "at least one prompt"),
        ([IDS, IDS[:, :4]], None, "shapes are"),
        ([IDS], [MASK[:2]], "a mask of the same shapes"),
        (IDS, None, "shapes are"),
    ],
)
def test_prompts_that_do_not_fit(ids, mask, message, folder):
    model, params = load_pretrained(folder("clip"))
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(model, params, ids, mask)


def test_prompts_need_a_projection(folder):
    model, params = load_pretrained(folder("text"))
    with pytest.raises(ValueError, match="has no text projection"):
        zero_shot_classifier(model, params, [IDS])


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("clip", {}, "needs pixel_values, input_ids or both"),
        ("clip", {"input_ids": IDS, "images": 0}, "takes a mapping with input_ids"),
        ("clip", {"pixel_values": pixels(12, 16)}, "12 x 16"),
        ("text", {"input_ids": IDS[0]}, r"must be integers \[batch, seq\]"),
        ("text", {"input_ids": IDS.astype(np.float32)}, "not float32"),
        ("text", {"input_ids": IDS, "attention_mask": MASK[:, :3]}, "attention_mask has shape"),
        ("text", {"input_ids": np.ones((1, 10), np.int32)}, "10 tokens, the model at most 9"),
        ("vision", {"pixel_values": pixels(12, 16)}, "pass interpolate_pos_encoding=True"),
    ],
)
def test_wrong_inputs_are_named(variant, given, message, folder):
    model, params = load_pretrained(folder(variant))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, given)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ClipTextConfig, {"eos_token_id": [3, 4]}, "eos_token_id must be a positive integer"),
        (ClipTextConfig, {"hidden_act": "mish"}, "hidden_act='mish' is not implemented"),
        (ClipTextConfig, {"is_decoder": True}, "is_decoder=True"),
        (ClipVisionConfig, {"image_size": [64, 96]}, "image_size must be square"),
        (ClipVisionConfig, {"rope": 1}, "rope=1 .unknown field"),
        (ClipConfig, {"text_config": 3}, "text_config must be an object, not int"),
        (ClipConfig, {"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        (ClipConfig, {"vision_config": {"patch_size": 500}}, "larger than image_size"),
    ],
)
def test_what_is_not_implemented_is_named(kind, changes, message):
    model_type = {ClipTextConfig: "clip_text_model", ClipVisionConfig: "clip_vision_model", ClipConfig: "clip"}[kind]
    with pytest.raises(ValueError, match=message):
        kind.from_dict({"model_type": model_type} | changes)
    with pytest.raises(ValueError, match="no projection of their own"):
        ClipConfig(text=ClipTextConfig(projection=True))


def test_hostile_configurations_raise_nothing_but_value_errors(folder):
    for variant, kind in (("clip", ClipConfig), ("vision", ClipVisionConfig), ("text", ClipTextConfig)):
        garbage(kind, json.loads((folder(variant) / "config.json").read_text()))
    raw = raw_config(folder("clip"))
    garbage(text_tower_of(raw), raw["text_config"])


def text_tower_of(raw):
    """A class whose from_dict puts the dictionary where the text tower's is."""

    class Nested:
        @staticmethod
        def from_dict(tower):
            return ClipConfig.from_dict(raw | {"text_config": tower})

    return Nested


def test_the_scale_is_a_scalar(folder):
    _, params = load_pretrained(folder("clip"))
    assert params["logit_scale"].shape == () and trees.paths(params)["logit_scale"].ndim == 0
