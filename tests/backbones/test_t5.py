"""Our T5 against transformers: tiny random models of every kind."""

import dataclasses
import functools
import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from parity import assert_hidden_states, assert_round_trip, furthest, randomize, run, theirs

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones import stack_layers, t5
from pefusion_jax.backbones.family import canonical, params_from_hf, params_to_hf
from pefusion_jax.backbones.t5_blocks import relative_buckets
from pefusion_jax.interop import load_pretrained, load_safetensors, save_safetensors

BASE = dict(
    vocab_size=61,
    d_model=24,
    d_kv=6,
    d_ff=40,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    attn_implementation="eager",
)
V11 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
GENERATOR, BARE, ENCODER = transformers.T5ForConditionalGeneration, transformers.T5Model, transformers.T5EncoderModel
# Name -> (class, changes of the configuration, whether the head is a matrix of its own).
VARIANTS = {
    "v1.0": (GENERATOR, {}, False),
    "v1.1": (GENERATOR, V11, True),
    # As Flan-T5: heads * d_kv is not d_model.
    "flan": (GENERATOR, V11 | dict(d_model=20, d_kv=7, num_heads=3, d_ff=33), True),
    "tied and unscaled": (GENERATOR, V11 | dict(num_layers=1), False),
    "untied and scaled": (GENERATOR, dict(num_layers=1), True),
    "one odd head": (GENERATOR, dict(num_heads=1, d_kv=5, num_layers=1), False),
    "few buckets": (
        GENERATOR,
        dict(relative_attention_num_buckets=7, relative_attention_max_distance=5, num_layers=1),
        False,
    ),
    "deeper decoder": (GENERATOR, V11 | dict(num_layers=1, num_decoder_layers=3), True),
    "shallower decoder": (GENERATOR, dict(num_layers=3, num_decoder_layers=1), False),
    "gated-silu": (GENERATOR, V11 | dict(feed_forward_proj="gated-silu", num_layers=1), True),
    "gated-relu": (GENERATOR, dict(feed_forward_proj="gated-relu", num_layers=1), False),
    "gelu": (GENERATOR, dict(feed_forward_proj="gelu", num_layers=1), False),
    "large eps": (GENERATOR, dict(layer_norm_epsilon=0.05, num_layers=1), False),
    "no head": (BARE, V11, False),
    "encoder": (ENCODER, {}, False),
    "gated encoder": (ENCODER, V11 | dict(num_layers=1, relative_attention_max_distance=9), False),
}
IDS = np.random.default_rng(0).integers(2, 61, (3, 9)).astype(np.int32)
TARGET = np.random.default_rng(1).integers(2, 61, (3, 7)).astype(np.int32)
TARGET[:, 0] = 0
# Padding on the right, on the left, and none.
MASK = np.array([[1] * 5 + [0] * 4, [0] * 3 + [1] * 6, [1] * 9], np.int32)
TARGET_MASK = np.array([[1] * 4 + [0] * 3, [0] * 2 + [1] * 5, [1] * 7], np.int32)


@functools.cache
def tiny(variant):
    """A random transformers model; its own initialisation would give attention next to nothing to do."""
    kind, changes, untied = VARIANTS[variant]
    model = kind(transformers.T5Config(**(BASE | changes)))
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model = randomize(model, list(VARIANTS).index(variant))
    with torch.no_grad():  # position biases as large as scores
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.mul_(5)
    return model


def inputs_of(variant):
    inputs = dict(input_ids=IDS, attention_mask=MASK)
    if VARIANTS[variant][0] is not ENCODER:
        inputs |= dict(decoder_input_ids=TARGET, decoder_attention_mask=TARGET_MASK)
    return inputs


def assert_same(got, want):
    """Every output of ours against those of transformers."""
    if "decoder_hidden_states" not in want:
        assert_hidden_states(got.hidden_states, want.hidden_states)
        assert furthest(got.last_hidden_state, want.last_hidden_state) <= 1e-5
        assert got.logits is None and got.encoder_last_hidden_state is None
        return
    assert_hidden_states(got.hidden_states, want.decoder_hidden_states)
    np.testing.assert_array_equal(got.last_hidden_state, got.hidden_states[-1])
    assert furthest(got.encoder_last_hidden_state, want.encoder_last_hidden_state) <= 1e-5
    if got.encoder_hidden_states is not None:
        assert_hidden_states(got.encoder_hidden_states, want.encoder_hidden_states)
    if "logits" in want:
        assert furthest(got.logits, want.logits) <= 1e-5
    else:
        assert got.logits is None


def test_buckets_are_those_of_the_table():
    distance = [-200, -128, -127, -64, -33, -32, -16, -15, -9, -8, -7, -1]
    distance = np.array([*distance, 0, 1, 7, 8, 9, 15, 16, 32, 64, 127, 128, 200])
    both = [15, 15, 15, 14, 12, 12, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 28, 30, 31, 31, 31]
    causal = [31, 31, 31, 26, 21, 21, 16, 15, 9, 8, 7, 1] + [0] * 12
    np.testing.assert_array_equal(relative_buckets(distance, True, 32, 128), both)
    np.testing.assert_array_equal(relative_buckets(distance, False, 32, 128), causal)


@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 128), (4, 3), (7, 5), (8, 20), (9, 128), (32, 17), (64, 1000), (128, 65)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(buckets, distance, bidirectional):
    positions = np.arange(-2100, 2101)
    attention = transformers.models.t5.modeling_t5.T5Attention
    want = attention._relative_position_bucket(torch.tensor(positions), bidirectional, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(positions, bidirectional, buckets, distance), want.numpy())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_tiny_models_agree_with_transformers(variant, folder):
    inputs = inputs_of(variant)
    want = theirs(tiny(variant), **inputs)
    model, params = load_pretrained(folder(variant))
    assert_same(run(model, params, inputs), want)
    assert (model.config.lm_head and not model.config.tied) == VARIANTS[variant][2]


def test_long_sequences_reach_the_last_bucket(folder):
    rng = np.random.default_rng(2)
    ids, target = (rng.integers(2, 61, (1, length)).astype(np.int32) for length in (150, 140))
    model, params = load_pretrained(folder("v1.0"))
    want = theirs(tiny("v1.0"), input_ids=ids, decoder_input_ids=target)
    assert_same(run(model, params, ids, None, target), want)


def test_a_row_without_a_kept_token_is_finite_and_as_in_transformers(folder):
    mask = MASK.copy()
    mask[1] = 0
    model, params = load_pretrained(folder("v1.0"))
    want = theirs(tiny("v1.0"), input_ids=IDS, attention_mask=mask, decoder_input_ids=TARGET)
    assert_same(run(model, params, IDS, mask, TARGET), want)


def test_inputs_may_be_a_mapping_or_arrays_and_the_encoder_may_be_skipped(folder):
    model, params = load_pretrained(folder("v1.1"))
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    want = apply(inputs_of("v1.1"))
    outputs = want.encoder_last_hidden_state
    for got in (
        apply(IDS, MASK, TARGET, TARGET_MASK),
        apply({"input_ids": IDS, "attention_mask": MASK.astype(bool)}, None, TARGET, TARGET_MASK.astype(bool)),
        apply(None, MASK, TARGET, TARGET_MASK, encoder_outputs=outputs),
    ):
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-5, rtol=0)
    ones = apply(IDS, np.ones_like(IDS), TARGET, np.ones_like(TARGET))
    np.testing.assert_allclose(apply(IDS, None, TARGET).logits, ones.logits, atol=1e-5, rtol=0)
    # Tokens that a mask hides, and tokens to come, cannot change the others.
    moved = apply(np.where(MASK == 1, IDS, 7), MASK, np.where(TARGET_MASK == 1, TARGET, 9), TARGET_MASK)
    kept = TARGET_MASK[..., None] == 1
    np.testing.assert_array_equal(np.where(kept, moved.logits, 0), np.where(kept, want.logits, 0))
    later = TARGET.copy()
    later[:, 5:] = 8
    later = apply(IDS, MASK, later, TARGET_MASK).logits
    np.testing.assert_array_equal(np.where(kept, later, 0)[:, :5], np.where(kept, want.logits, 0)[:, :5])


@pytest.mark.parametrize(
    ("variant", "args", "kwargs", "message"),
    [
        ("v1.0", ({"ids": IDS},), {}, "takes a mapping of input_ids"),
        ("v1.0", (inputs_of("v1.0"), MASK), {}, "attention_mask twice"),
        ("v1.0", (IDS, MASK), {}, r"decoder_input_ids is missing.*shift_right"),
        ("v1.0", (None, MASK, TARGET), {}, "input_ids is missing"),
        ("v1.0", (IDS[0], None, TARGET), {}, r"input_ids must be \[batch, source\]"),
        ("v1.0", (IDS, None, TARGET[0]), {}, r"decoder_input_ids must be \[batch, seq\]"),
        ("v1.0", (IDS, MASK[:, :3], TARGET), {}, r"attention_mask has shape \(3, 3\)"),
        ("v1.0", (IDS, MASK, TARGET, MASK), {}, "decoder_attention_mask has shape"),
        ("v1.0", (IDS[:2], None, TARGET), {}, "2 rows, the decoder 3"),
        ("v1.0", (IDS, None, TARGET), {"encoder_outputs": np.zeros((3, 9, 24), np.float32)}, "not both"),
        ("v1.0", (None, None, TARGET), {"encoder_outputs": np.zeros((3, 9, 23), np.float32)}, "width 23"),
        ("v1.0", (None, None, TARGET), {"encoder_outputs": np.zeros((3, 24), np.float32)}, r"\[batch, source, d_model\]"),
        ("encoder", (IDS, MASK, TARGET), {}, "an encoder alone takes .* got also decoder_input_ids"),
    ],
)
def test_wrong_inputs_are_named(variant, args, kwargs, message, folder):
    model, params = load_pretrained(folder(variant))
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, *args, **kwargs)


def test_wrong_caches_are_named(folder):
    model, params = load_pretrained(folder("v1.0"))
    for batch, length in ((2, 9), (3, 6)):
        with pytest.raises(ValueError, match=f"the cache is for {batch} rows of {length} tokens"):
            model.apply({"params": params}, IDS, None, TARGET, cache=model.init_cache(batch, length, 9))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.apply({"params": params}, None, np.ones((3, 10)), TARGET, cache=model.init_cache(3, 9, 9))
    model, _ = load_pretrained(folder("encoder"))
    with pytest.raises(ValueError, match="no cache"):
        model.init_cache(1, 1, 1)


@pytest.mark.parametrize(("variant", "scan_layers"), [("flan", False), ("deeper decoder", True)])
def test_step_by_step_with_a_cache_is_the_whole_sequence(variant, scan_layers, folder):
    """Two tokens first, then one at a time, with padding on the left; the cache is longer than what is decoded."""
    want = theirs(tiny(variant), **inputs_of(variant))
    model, params = load_pretrained(folder(variant), scan_layers=scan_layers)
    length = 10
    mask = np.concatenate([TARGET_MASK, np.ones((3, length - 7), np.int32)], 1)
    cache = model.init_cache(3, length, 9)
    structure = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache)
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    got = apply(IDS, MASK, TARGET[:, :2], mask, cache=cache)
    logits = [got.logits]
    for i in range(2, 7):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), got.cache) == structure and int(got.cache["index"]) == i
        if i == 4:  # the encoder's output may be given again instead of what is stored
            kept = want.encoder_last_hidden_state.numpy()
            again = apply(None, MASK, TARGET[:, i : i + 1], mask, encoder_outputs=kept, cache=got.cache)
        got = apply(None, MASK, TARGET[:, i : i + 1], mask, cache=got.cache)
        if i == 4:
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), again.cache, got.cache)
        logits.append(got.logits)
    whole = np.concatenate(logits, axis=1)
    kept = TARGET_MASK[..., None] == 1
    assert furthest(whole * kept, want.logits * torch.tensor(kept)) <= 1e-5
    assert np.abs(np.asarray(got.cache["key"][..., 7:, :])).max() == 0


def outputs(model, params):
    # No padding on the left of the decoder: where nothing is kept, torch's additive mask passes on a gradient of scores.
    inputs = inputs_of("v1.1") | {"decoder_attention_mask": TARGET_MASK[[0, 2, 2]]}
    out = model.apply({"params": params}, inputs, output_hidden_states=True)
    return sum(jnp.sum(jnp.sin(x)) for x in (out.logits, *out.hidden_states, *out.encoder_hidden_states)), out


def test_loop_scan_and_remat_are_one_model_with_the_gradients_of_torch(folder):
    reference = tiny("deeper decoder")
    reference.zero_grad()
    inputs = inputs_of("v1.1") | {"decoder_attention_mask": TARGET_MASK[[0, 2, 2]]}
    out = reference(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
    sum(x.sin().sum() for x in (out.logits, *out.decoder_hidden_states, *out.encoder_hidden_states)).backward()
    torch_grad = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    plain, params = load_pretrained(folder("deeper decoder"))
    _, want = jax.jit(lambda p: outputs(plain, p))(params)
    for scan_layers, remat in ((False, False), (False, True), (True, False), (True, True)):
        model, own = load_pretrained(folder("deeper decoder"), scan_layers=scan_layers, remat=remat)
        assert jax.tree.structure(own) == jax.tree.structure(stack_layers(params) if scan_layers else params)
        if remat:
            (_, got), grad = jax.jit(jax.value_and_grad(lambda p, model=model: outputs(model, p), has_aux=True))(own)
            ours = params_to_hf(t5.FAMILY, grad, model.config)
            assert ours.keys() == torch_grad.keys()
            for name, array in torch_grad.items():
                bound = 2e-5 * max(1.0, float(np.abs(array).max()))
                np.testing.assert_allclose(ours[name], array, atol=bound, rtol=0, err_msg=name)
        else:
            _, got = jax.jit(lambda p, model=model: outputs(model, p))(own)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_jvp_is_the_finite_difference(folder, key):
    model, params = load_pretrained(folder("v1.1"), scan_layers=True, remat=True)  # the loop: with LoRA, below
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = structure.unflatten([0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])

    def logits(params):
        return model.apply({"params": params}, inputs_of("v1.1")).logits

    apply = jax.jit(logits)
    f = lambda scale: apply(jax.tree.map(lambda p, t: p + scale * t, params, tangent))  # noqa: E731
    got = jax.jit(lambda p, t: jax.jvp(logits, (p,), (t,))[1])(params, tangent)
    step = 4e-3
    # Fourth-order central difference: float32 rounding limits it to about 1e-4.
    fd = (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)
    np.testing.assert_allclose(got, fd, atol=1e-3 * float(jnp.abs(got).max()), rtol=0)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bfloat16_computes_in_bfloat16(scan_layers, folder):
    want = theirs(tiny("untied and scaled"), **inputs_of("untied and scaled"))
    model, params = load_pretrained(folder("untied and scaled"), dtype=jnp.bfloat16, scan_layers=scan_layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    cache = model.init_cache(3, 7, 9)
    apply = jax.jit(model.apply)
    for tree in (params, wide):  # parameters may stay float32 under a bfloat16 computation
        got = apply({"params": tree}, inputs_of("untied and scaled"), cache=cache)
        assert got.last_hidden_state.dtype == got.logits.dtype == got.cache["key"].dtype == jnp.bfloat16
        assert furthest(got.logits, want.logits) < 0.1


def test_dropout_is_off_by_default_and_needs_a_key(folder):
    model, params = load_pretrained(folder("gelu"), scan_layers=True)
    inputs, key = inputs_of("gelu"), jax.random.key(0, impl="rbg")  # which compiles in a tenth of the time

    @jax.jit
    def noisy(params, key):
        return model.apply({"params": params}, inputs, deterministic=False, rngs={"dropout": key}).last_hidden_state

    still = jax.jit(model.apply)({"params": params}, inputs).last_hidden_state
    one, again, two = (noisy(params, jax.random.fold_in(key, i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - two).max() > 0.1 and jnp.abs(one - still).max() > 0.1
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        model.apply({"params": params}, inputs, deterministic=False)


ATTENTION = [f"SelfAttention/tap_{name}" for name in ("query", "key", "value", "context")]
FEED_FORWARD = ["DenseReluDense/tap_hidden", "DenseReluDense/tap_output"]
TAPS = {
    "encoder": [f"layer/0/{tap}" for tap in ATTENTION] + [f"layer/1/{tap}" for tap in FEED_FORWARD] + ["tap_block"],
    "decoder": [f"layer/0/{tap}" for tap in ATTENTION]
    + [f"layer/1/{tap.replace('Self', 'EncDec')}" for tap in ATTENTION]
    + [f"layer/2/{tap}" for tap in FEED_FORWARD]
    + ["tap_block"],
}


def test_taps_stand_where_they_say(folder):
    model, params = load_pretrained(folder("flan"))

    @jax.jit
    def tapped(params):
        seen = {}

        def record(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            if type(context.module).__name__ == "Tap":
                seen["/".join(context.module.path)] = out
            return out

        with nn.intercept_methods(record):
            return model.apply({"params": params}, inputs_of("flan"), output_hidden_states=True), seen

    got, seen = tapped(params)
    assert set(seen) == {f"{stack}/block/{layer}/{tap}" for stack in TAPS for layer in range(2) for tap in TAPS[stack]}
    np.testing.assert_array_equal(seen["encoder/block/0/tap_block"], got.encoder_hidden_states[1])
    np.testing.assert_array_equal(seen["decoder/block/0/tap_block"], got.hidden_states[1])
    own = params["decoder"]["block"]["1"]["layer"]
    at = {tap: seen[f"decoder/block/1/{tap}"] for tap in TAPS["decoder"]}
    cross = own["1"]["EncDecAttention"]
    want = got.encoder_last_hidden_state @ cross["k"]["kernel"]
    np.testing.assert_allclose(at["layer/1/EncDecAttention/tap_key"], want, atol=1e-5)
    np.testing.assert_allclose(
        at["layer/2/DenseReluDense/tap_output"],
        at["layer/2/DenseReluDense/tap_hidden"] @ own["2"]["DenseReluDense"]["wo"]["kernel"],
        atol=1e-5,
    )
    q, k, v = (np.asarray(at[f"layer/1/EncDecAttention/tap_{n}"]).reshape(3, -1, 3, 7) for n in ("query", "key", "value"))
    scores = np.where(MASK[:, None, None] == 1, np.einsum("bqhd,bkhd->bhqk", q, k), -1e30)
    weights = np.asarray(jax.nn.softmax(scores))
    context = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(3, 7, 21)
    np.testing.assert_allclose(at["layer/1/EncDecAttention/tap_context"], context, atol=1e-5)


def test_taps_on_key_and_value_may_prepend_positions(folder):
    """As prefix tuning in transformers: a past of two positions, with their position biases; also with a cache."""
    model, params = load_pretrained(folder("flan"), scan_layers=True)
    rng = np.random.default_rng(1)
    prefix = {name: rng.normal(size=(3, 2, 21)).astype(np.float32) for name in ("key", "value")}

    def prepend(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        path, name = context.module.path, context.module.name or ""
        ours = name in ("tap_key", "tap_value") and path[0] == "decoder" and path[-2] == "SelfAttention"
        return jnp.concatenate([prefix[name[4:]], out], axis=1) if ours else out

    heads = {name: torch.tensor(array).unflatten(-1, (3, 7)).transpose(1, 2) for name, array in prefix.items()}
    past = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    for layer in range(2):
        past.self_attention_cache.update(heads["key"], heads["value"], layer)
    with torch.no_grad():
        want = tiny("flan")(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK),
            decoder_input_ids=torch.tensor(TARGET),
            decoder_attention_mask=torch.tensor(np.concatenate([np.ones((3, 2), np.int32), TARGET_MASK], 1)),
            past_key_values=past,
        ).logits
    with nn.intercept_methods(prepend):
        apply = functools.partial(jax.jit(model.apply), {"params": params})
        got = apply(inputs_of("flan")).logits
        first = apply(IDS, MASK, TARGET[:, :4], TARGET_MASK, cache=model.init_cache(3, 7, 9))
        rest = apply(None, MASK, TARGET[:, 4:], TARGET_MASK, cache=first.cache)
    assert furthest(got, want) <= 1e-5
    assert furthest(jnp.concatenate([first.logits, rest.logits], 1), want) <= 1e-5


@pytest.mark.parametrize("variant", ["v1.0", "flan", "deeper decoder", "no head", "encoder"])
def test_names_round_trip_bit_for_bit(variant, folder):
    assert_round_trip(t5.FAMILY, folder(variant), json.loads((folder(variant) / "config.json").read_text()))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_dtypes_round_trip_bit_for_bit(dtype, folder):
    tensors = {k: v.astype(dtype) for k, v in load_safetensors(folder("v1.1") / "model.safetensors").items()}
    config = load_pretrained(folder("v1.1"))[0].config
    back = params_to_hf(t5.FAMILY, stack_layers(params_from_hf(t5.FAMILY, tensors, config)), config)
    assert {k: (v.dtype, v.tobytes()) for k, v in back.items()} == {k: (v.dtype, v.tobytes()) for k, v in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_transformers_loads_what_we_write(variant, folder, tmp_path):
    model, params = load_pretrained(folder(variant))
    save_safetensors(tmp_path / "model.safetensors", params_to_hf(t5.FAMILY, params, model.config))
    written = t5.FAMILY.write_config(model.config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    kind = VARIANTS[variant][0]
    assert written["architectures"] == [kind.__name__]
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {name: torch.tensor(array) for name, array in inputs_of(variant).items()}
    with torch.no_grad():
        mine, original = loaded(**inputs), tiny(variant)(**inputs)
    assert torch.equal(mine[0], original[0])
    # What transformers 4 goes by: a head of its own or not, and the scaling that goes with it.
    if variant in ("v1.0", "v1.1", "flan", "no head", "encoder", "gated encoder"):
        assert written["tie_word_embeddings"] == written["scale_decoder_outputs"]
        assert written["tie_word_embeddings"] == ("tie_word_embeddings" not in VARIANTS[variant][1])
    tensors = canonical(t5.FAMILY, load_safetensors(tmp_path / "model.safetensors"))
    assert t5.T5Config.from_dict(written, tensors) == model.config


def legacy(variant, folder, **changes):
    """The configuration as transformers 4 wrote it."""
    raw = json.loads((folder(variant) / "config.json").read_text())
    scaled = raw.pop("scale_decoder_outputs")
    raw.pop("dtype", None)
    raw |= {"torch_dtype": "float32", "output_past": True, "n_positions": 512, "transformers_version": "4.30.0"}
    raw["tie_word_embeddings"] = scaled
    return {name: value for name, value in (raw | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("v1.0", {}),
        ("v1.0", {"tie_word_embeddings": None, "is_gated_act": None, "dense_act_fn": None, "architectures": None}),
        ("v1.0", {"architectures": ["T5WithLMHeadModel"], "relative_attention_max_distance": None}),
        ("v1.1", {}),
        ("v1.1", {"architectures": None, "num_decoder_layers": None}),
        ("no head", {}),
        ("encoder", {"architectures": None}),
    ],
)
def test_configurations_of_transformers_4_are_read(variant, changes, folder):
    tensors = canonical(t5.FAMILY, load_safetensors(folder(variant) / "model.safetensors"))
    config = t5.T5Config.from_dict(legacy(variant, folder, **changes), tensors)
    want = load_pretrained(folder(variant))[0].config
    if changes.get("num_decoder_layers", 1) is None:
        assert config.num_decoder_layers is None and config.decoder_layers == want.decoder_layers
        config = dataclasses.replace(config, num_decoder_layers=config.num_layers)
    assert config == want


def test_a_head_that_should_be_there_and_copies_that_differ_are_refused(folder):
    tensors = load_safetensors(folder("v1.0") / "model.safetensors")
    config = t5.T5Config.from_dict(legacy("v1.0", folder, tie_word_embeddings=False), tensors)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        params_from_hf(t5.FAMILY, tensors, config)
    config = t5.T5Config.from_dict(legacy("v1.0", folder), tensors)
    want = params_from_hf(t5.FAMILY, tensors, config)
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    full = tensors | {name: tensors["shared.weight"].copy() for name in copies} | {unread: np.zeros((32, 4))}
    assert t5.T5Config.from_dict(legacy("v1.0", folder), canonical(t5.FAMILY, full)) == config
    jax.tree.map(np.testing.assert_array_equal, params_from_hf(t5.FAMILY, full, config), want)
    for name in copies:
        bad = full | {name: full[name] + 1}
        with pytest.raises(ValueError, match=f"'{name}' differs"):
            params_from_hf(t5.FAMILY, bad, config)
    # A head of other values is a head of its own, whatever transformers 5 says in the file.
    untied = t5.T5Config.from_dict(legacy("v1.0", folder), canonical(t5.FAMILY, bad))
    assert not untied.tied and untied.scale_decoder_outputs


def test_init_makes_the_tree_of_the_table(key):
    for variant in ("v1.0", "deeper decoder", "no head", "encoder"):
        raw = {k: v for k, v in tiny(variant).config.to_dict().items() if v is not None}
        kind, _, untied = VARIANTS[variant]
        raw |= {"architectures": [kind.__name__], "tie_word_embeddings": not untied}
        config = t5.T5Config.from_dict(raw)
        made = jax.eval_shape(t5.T5(config).init, key, inputs_of(variant))["params"]
        table = t5.name_table(config)
        for path, leaf in trees.paths(made).items():
            row = table.pop(path)
            assert leaf.shape == (row.shape if row.axes is None else row.shape[::-1]), path
            renamed = path.replace("/kernel", "/weight").replace("/scale", "/weight").replace("/embedding", "/weight")
            if "relative" in renamed:
                renamed = renamed.replace("relative", "block/0/layer/0/SelfAttention/relative", 1)
            assert renamed.replace("/", ".") == row.name
        assert not table
        stacked = jax.eval_shape(t5.T5(config, scan_layers=True).init, key, inputs_of(variant))["params"]
        assert stacked == jax.eval_shape(stack_layers, made)


def test_a_fresh_model_has_the_deviations_of_transformers():
    config = t5.T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=6, tied=False)
    key = jax.random.key(0, impl="rbg")  # compiles in a tenth of the time
    params = jax.jit(t5.T5(config).init)(key, IDS, None, TARGET)["params"]
    theirs_ = transformers.T5Model(transformers.T5Config(**{k: getattr(config, k) for k in BASE if hasattr(config, k)}))
    ours = params_to_hf(t5.FAMILY, params, config)
    for name, parameter in theirs_.named_parameters():
        want = float(parameter.detach().std(correction=0))
        assert ours[name].std() == pytest.approx(want, rel=0.2), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mt5"}, "model_type='mt5'"),
        ({"model_type": ["t5"]}, "model_type="),
        ({"feed_forward_proj": "gated-geglu"}, "feed_forward_proj='gated-geglu' is not implemented"),
        ({"feed_forward_proj": "gated-gated-relu"}, "feed_forward_proj"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj must be a string"),
        ({"feed_forward_proj": "x" * 100_000}, "feed_forward_proj"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "dense_act_fn contradicts"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act contradicts"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder=True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"scale_decoder_outputs": 1}, "scale_decoder_outputs=1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 128}, "hidden_size=128 .unknown field"),
        ({"architectures": 7}, "architectures must be a list"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"num_layers": 10**6}, "num_layers must be a positive integer up to 1024"),
        ({"num_decoder_layers": 10**6}, "num_decoder_layers must be a positive integer up to 1024"),
        ({"num_decoder_layers": "6"}, "num_decoder_layers must be"),
        ({"d_kv": 6.0}, "d_kv must be a positive integer"),
        ({"num_heads": True}, "num_heads must be a positive integer"),
        ({"vocab_size": 10**30}, "vocab_size must be a positive integer"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon must be a number"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must lie in"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number"),
        ({"dropout_rate": 1.0}, "dropout"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id must be a token id"),
        ({"pad_token_id": [0]}, "pad_token_id must be a token id"),
        ({"eos_token_id": [1, {}]}, "eos_token_id must be a token id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be a token id"),
        ({"eos_token_id": True}, "eos_token_id must be a token id"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets must be at least 4"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance must exceed 16"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        t5.T5Config.from_dict({"model_type": "t5", "d_model": 24} | change)
    assert len(str(caught.value)) < 2000
    with pytest.raises(ValueError, match="model_type is missing"):
        t5.T5Config.from_dict({})


def test_configurations_of_transformers_are_read():
    ours = t5.T5Config.from_dict(transformers.T5Config().to_dict())
    assert ours == t5.T5Config(num_decoder_layers=6)
    assert t5.T5Config.from_dict({"model_type": "t5"}) == t5.T5Config()
    assert not t5.T5Config.from_dict({"model_type": "t5", "architectures": ["T5EncoderModel"]}).decoder
    tokens = {"eos_token_id": [5, 6], "pad_token_id": 3, "decoder_start_token_id": 4}
    written = t5.T5Config.from_dict({"model_type": "t5", **tokens}).to_dict()
    assert {name: written[name] for name in tokens} == tokens
    hash(t5.T5Config.from_dict({"model_type": "t5", **tokens}))
    hash(ours)


def test_shift_right_is_that_of_transformers():
    labels = np.array([[5, 6, 1, -100, -100], [7, 8, 9, 10, 1]], np.int32)
    want = tiny("v1.0")._shift_right(torch.tensor(labels)).numpy()
    np.testing.assert_array_equal(t5.shift_right(labels, 0, 0), want)
    np.testing.assert_array_equal(t5.shift_right(labels[:, :2], 3, 4), [[3, 5], [3, 7]])


def test_lora_and_its_linearization(folder, key):
    """Folded weights are the adapted model, and the linearized one is affine in its displacement."""
    model, params = load_pretrained(folder("v1.1"))
    lora = pf.adapt(model, pf.LoRA(rank=2, alpha=4, targets=r".*(SelfAttention|EncDecAttention)/(q|v)"))
    inputs = inputs_of("v1.1")
    adapters = lora.init(key, params, inputs)
    sites = {path.rpartition("/")[0] for path in trees.paths(adapters)}
    assert len(sites) == 2 * 2 + 2 * 2 * 2
    scanned = pf.adapt(model.clone(scan_layers=True), pf.LoRA(rank=2, alpha=4, targets=r".*Attention/q"))
    found = trees.paths(jax.eval_shape(scanned.init, key, stack_layers(params), inputs))
    assert {path.rpartition("/")[0] for path in found} == {
        "encoder/block/layer/0/SelfAttention/q",
        "decoder/block/layer/0/SelfAttention/q",
        "decoder/block/layer/1/EncDecAttention/q",
    }
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), adapters)
    compiled = jax.jit(lambda params, tree: lora.apply(params, tree, inputs).logits)
    apply = functools.partial(compiled, params)
    folded = pf.fold(params, lora.deltas(params, adapters))
    base = jax.jit(lambda tree: model.apply({"params": tree}, inputs).logits)
    np.testing.assert_allclose(apply(adapters), base(folded), atol=2e-5, rtol=0)
    assert jnp.abs(apply(adapters) - base(params)).max() > 0.1

    linear = pf.linearize(lora, adapters)
    tau = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(key, leaf.shape), adapters)
    expansion = jax.jit(lambda params, tau: linear.apply(params, tau, inputs).logits)
    f = lambda scale: expansion(params, jax.tree.map(lambda leaf: scale * leaf, tau))  # noqa: E731
    start, slope = f(0.0), f(1.0) - f(0.0)
    np.testing.assert_allclose(start, apply(adapters), atol=1e-5, rtol=0)
    np.testing.assert_allclose(f(2.0), start + 2 * slope, atol=1e-4, rtol=0)
    moved = lambda scale: apply(jax.tree.map(lambda a, t: a + scale * t, adapters, tau))  # noqa: E731
    np.testing.assert_allclose(slope, (moved(0.01) - moved(-0.01)) / 0.02, atol=5e-3 * float(jnp.abs(slope).max()), rtol=0)


def test_lora_decodes_with_a_cache_as_without(folder, key):
    model, params = load_pretrained(folder("v1.1"))
    lora = pf.adapt(model, pf.LoRA(rank=2, alpha=4, targets=r".*Attention/(q|k|v|o)"))
    adapters = lora.init(key, params, inputs_of("v1.1"))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), adapters)
    apply = functools.partial(jax.jit(lora.apply), params, adapters)
    want = apply(IDS, MASK, TARGET).logits
    got = apply(IDS, MASK, TARGET[:, :6], cache=model.init_cache(3, 7, 9))
    last = apply(None, MASK, TARGET[:, 6:], cache=got.cache)
    np.testing.assert_allclose(jnp.concatenate([got.logits, last.logits], 1), want, atol=1e-5, rtol=0)


# Small models for generation, other weights for each seed.
GENERATORS = {"v1.0": dict(num_layers=1), "v1.1": V11 | dict(num_layers=1), "flan": VARIANTS["flan"][1] | dict(num_layers=1)}


@functools.cache
def generator(name, seed):
    """A random model that does not repeat itself, and ours with its weights."""
    changes = GENERATORS[name]
    reference = GENERATOR(transformers.T5Config(**(BASE | changes | dict(eos_token_id=1, pad_token_id=0))))
    if name != "v1.0":
        reference.lm_head.weight = torch.nn.Parameter(torch.zeros_like(reference.lm_head.weight))
    reference = randomize(reference, seed)
    tensors = {key: array.numpy().copy() for key, array in reference.state_dict().items() if "embed_tokens" not in key}
    if name == "v1.0":
        del tensors["lm_head.weight"]
    raw = reference.config.to_dict() | {"architectures": ["T5ForConditionalGeneration"]}
    raw = {key: value for key, value in raw.items() if value is not None}
    config = t5.T5Config.from_dict(raw, tensors)
    return reference, t5.T5(config), params_from_hf(t5.FAMILY, tensors, config)


def generated(reference, new, **options):
    tensors = dict(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several cost these small products most of their time
    try:
        with torch.no_grad():
            out = reference.generate(**tensors, max_new_tokens=new, do_sample=False, **options)[:, 1:].numpy()
    finally:
        torch.set_num_threads(threads)
    # Transformers fills up beams with the end token where the padding token is 0 ("pad_token_id or eos_token_id").
    eos = options.get("eos_token_id", 1)
    over = (np.cumsum(out == eos, axis=1) - (out == eos)) > 0
    return np.pad(np.where(over, 0, out), ((0, 0), (0, new - out.shape[1])))


PROMPT = {"input_ids": IDS, "attention_mask": MASK}


@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_tokens_are_those_of_transformers(name):
    # These models repeat themselves before 1 comes: the end is a token that they do choose.
    eos = int(generated(generator(name, 0)[0], 3)[0, 2])
    assert eos != 0
    ends = set()
    for seed in range(3):
        reference, model, params = generator(name, seed)
        got = pf.generate_tokens(model, params, PROMPT, max_new_tokens=64, eos_token_id=eos, pad_token_id=0)
        want = generated(reference, 64, eos_token_id=eos)
        np.testing.assert_array_equal(got, want)
        ends |= set((want != 0).sum(1).tolist())
    assert len(ends) > 1  # of different lengths


@pytest.mark.parametrize("options", [dict(length_penalty=0.6), dict(length_penalty=2.0, early_stopping=True)])
def test_beams_are_those_of_transformers(options):
    for seed in range(3):
        reference, model, params = generator("flan", seed)
        got = pf.generate_tokens(
            model, params, PROMPT, max_new_tokens=12, num_beams=4, eos_token_id=1, pad_token_id=0, **options
        )
        np.testing.assert_array_equal(got, generated(reference, 12, num_beams=4, **options))


@pytest.mark.parametrize("name", ["v1.0", "flan"])
def test_likelihoods_of_labels_are_those_of_torch(name):
    reference, model, params = generator(name, 0)
    labels = [[5, 6, 7, 1], [9, 1], [60]]
    got = pf.score_labels(model, params, PROMPT, labels)
    want = np.zeros((3, 3))
    for i, label in enumerate(labels):
        target = torch.tensor([label] * 3)
        with torch.no_grad():
            logits = reference(
                input_ids=torch.tensor(IDS),
                attention_mask=torch.tensor(MASK),
                decoder_input_ids=reference._shift_right(target),
            ).logits.double()
        want[:, i] = logits.log_softmax(-1).gather(2, target[:, :, None]).sum((1, 2)).numpy()
    np.testing.assert_allclose(got, want, atol=3e-5, rtol=0)


def test_adapted_and_linearized_models_generate(key):
    """With a cache as the folded weights do, and linearized what a plain loop over its logits chooses."""
    _, model, params = generator("v1.1", 0)
    lora = pf.adapt(model, pf.LoRA(rank=2, alpha=4, targets=r".*Attention/(q|v)"))
    adapters = lora.init(key, params, IDS, MASK, TARGET)
    adapters = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(key, leaf.shape), adapters)
    options = dict(max_new_tokens=4, eos_token_id=1, pad_token_id=0)
    got = pf.generate_tokens(lora, params, PROMPT, adapters=adapters, **options)
    folded = pf.fold(params, lora.deltas(params, adapters))
    np.testing.assert_array_equal(got, pf.generate_tokens(model, folded, PROMPT, **options))

    linear = pf.linearize(lora, adapters)
    tau = jax.tree.map(lambda leaf: 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    got = pf.generate_tokens(linear, params, PROMPT, adapters=tau, **options)
    apply = jax.jit(lambda target: linear.apply(params, tau, IDS, MASK, target).logits)
    written = np.zeros((3, 5), np.int32)
    done = np.zeros(3, bool)
    for step in range(4):
        best = np.asarray(apply(written))[:, step].argmax(-1)
        written[:, step + 1] = np.where(done, 0, best)
        done |= best == 1
    np.testing.assert_array_equal(got, written[:, 1:])
