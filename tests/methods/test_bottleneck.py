"""Bottleneck adapters beside AdapterHub's library, on every backbone, on taps, and where they are refused."""

import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import pefusion_jax as pf
from pefusion_jax import backbones, trees
from pefusion_jax.backbones import stack_layers
from pefusion_jax.interop import save_safetensors

GOLDEN = Path(__file__).parents[1] / "golden" / "adapters_bert.safetensors"
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
IDS = np.array([[5, 7, 9, 11, 13, 2], [3, 8, 21, 6, 2, 1]], np.int32)


@functools.cache
def golden():
    with safe_open(GOLDEN, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, {k: json.loads(v) for k, v in file.metadata().items()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """AdapterHub's base model, loaded by us in either layout."""
    tensors, metadata = golden()
    folder = tmp_path_factory.mktemp("bert")
    base = {name.removeprefix("base/"): tensor for name, tensor in tensors.items() if name.startswith("base/")}
    save_safetensors(folder / "model.safetensors", base)
    (folder / "config.json").write_text(json.dumps(metadata["config"]))
    return functools.cache(lambda **options: pf.load_pretrained(folder, **options))


LEAVES = {
    "adapter_down": "adapter_down.0.weight",
    "adapter_down_bias": "adapter_down.0.bias",
    "adapter_up": "adapter_up.weight",
    "adapter_up_bias": "adapter_up.bias",
    "adapter_norm_scale": "adapter_norm_after.weight",
    "adapter_norm_bias": "adapter_norm_after.bias",
}


def from_golden(case, created):
    """The case's adapters in the structure of ours; every one of theirs is used."""
    tensors, _ = golden()
    left = {name for name in tensors if name.startswith(case + "/") and name != f"{case}/output"}

    def find(path, leaf):
        site, _, name = path.rpartition("/")
        theirs = f"{case}/{site.rpartition('/')[0].replace('/', '.')}.adapters.tested.{LEAVES[name]}"
        left.remove(theirs)
        assert tensors[theirs].T.shape == leaf.shape, path
        return jnp.asarray(tensors[theirs].T)

    found = trees.map_paths(find, created)
    assert not left
    return found


def inputs():
    tensors, _ = golden()
    return {"input_ids": tensors["ids"].astype(np.int32), "attention_mask": tensors["mask"].astype(np.int32)}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("houlsby", pf.houlsby(bottleneck=4)),
        ("houlsby_norm", pf.houlsby(bottleneck=4, activation="gelu", norm=True)),
        ("pfeiffer_plain", pf.pfeiffer(bottleneck=4)),
        ("parallel", pf.parallel(bottleneck=4)),
    ],
)
def test_outputs_equal_adapterhubs(bert, case, method):
    tensors, metadata = golden()
    settings = metadata["cases"][case]
    assert settings["non_linearity"] == method.activation and settings["scaling"] == method.scale
    model, params = bert()
    adapted = pf.adapt(model, method)
    created = jax.eval_shape(functools.partial(adapted.init, jax.random.key(0), params), inputs())
    adapters = from_golden(case, created)
    ours = jax.jit(adapted.apply)(params, adapters, inputs()).last_hidden_state
    np.testing.assert_allclose(ours, tensors[f"{case}/output"], atol=1e-5)
    if case != "parallel":
        return
    scanned, stacked = bert(scan_layers=True)
    again = jax.jit(pf.adapt(scanned, method).apply)(stacked, stack_layers(adapters), inputs()).last_hidden_state
    np.testing.assert_allclose(again, tensors[f"{case}/output"], atol=1e-5)


def test_what_adapterhubs_pfeiffer_reads_is_the_normed_sum(bert):
    """The departure that the docstring of ``pfeiffer`` names: LN(x + y + A(LN(x + y)))."""
    tensors, _ = golden()
    model, params = bert()
    adapted = pf.adapt(model, pf.pfeiffer(bottleneck=4))
    created = jax.eval_shape(functools.partial(adapted.init, jax.random.key(0), params), inputs())
    adapters = trees.paths(from_golden("pfeiffer", created))

    def twice(next_fun, args, kwargs, context):
        path = "/".join(context.module.path)
        if not path.endswith("output/LayerNorm") or "attention" in path:
            return next_fun(*args, **kwargs)
        own = trees.paths(params)
        centred = args[0] - args[0].mean(-1, keepdims=True)
        normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + model.config.layer_norm_eps)
        normed = normed * own[path + "/scale"][None, None] + own[path + "/bias"][None, None]
        site = path.replace("LayerNorm", "dense/adapter_")
        hidden = jax.nn.relu(normed @ adapters[site + "down"] + adapters[site + "down_bias"][None, None])
        added = hidden @ adapters[site + "up"] + adapters[site + "up_bias"][None, None]
        return next_fun(args[0] + added)

    @jax.jit
    def theirs():
        with nn.intercept_methods(twice):
            return model.apply({"params": params}, inputs()).last_hidden_state

    np.testing.assert_allclose(theirs(), tensors["pfeiffer/output"], atol=1e-5)


TEXT = SIZES | dict(vocab_size=29, max_position_embeddings=12)
VISION = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=(8, 8), patch_size=(4, 4))
PIXELS = np.zeros((1, 3, 8, 8), np.float32)
DECODER = TEXT | dict(num_key_value_heads=2)
T5 = dict(vocab_size=29, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=3)
CLIP = dict(
    text=backbones.ClipTextConfig(**TEXT, eos_token_id=2, projection_dim=6),
    vision=backbones.ClipVisionConfig(**VISION, intermediate_size=24, projection_dim=6),
    projection_dim=6,
)
BACKBONES = {
    "bert": (backbones.Bert, backbones.BertConfig(**TEXT), {"input_ids": IDS}),
    "roberta": (backbones.Roberta, backbones.RobertaConfig(**TEXT, masked_lm=True), {"input_ids": IDS}),
    "mpnet": (backbones.MPNet, backbones.MPNetConfig(**TEXT | dict(vocab_size=33)), {"input_ids": IDS}),
    "vit": (backbones.Vit, backbones.VitConfig(**VISION, intermediate_size=24), {"pixel_values": PIXELS}),
    "dinov2": (backbones.Dinov2, backbones.Dinov2Config(**VISION), {"pixel_values": PIXELS}),
    "dinov2 swiglu": (backbones.Dinov2, backbones.Dinov2Config(**VISION, use_swiglu_ffn=True), {"pixel_values": PIXELS}),
    "clip": (backbones.Clip, backbones.ClipConfig(**CLIP), {"input_ids": IDS, "pixel_values": PIXELS}),
    "llama": (backbones.Llama, backbones.LlamaConfig(**DECODER), {"input_ids": IDS}),
    "t5": (backbones.T5, backbones.T5Config(**T5), {"input_ids": IDS, "decoder_input_ids": IDS}),
}
ATTENTION = {
    "mpnet": "attention/attn/o",
    "clip": "self_attn/out_proj",
    "llama": "self_attn/o_proj",
    "t5": "layer/0/SelfAttention/o",
}
FEED_FORWARD = {
    "dinov2": ("mlp/fc2",),
    "dinov2 swiglu": ("mlp/down_proj",),
    "clip": ("mlp/fc2",),
    "llama": ("mlp/down_proj",),
    "t5": ("layer/1/DenseReluDense/wo", "layer/2/DenseReluDense/wo"),
}
STACKS = {
    "clip": {"text_model/encoder/layers": 2, "vision_model/encoder/layers": 2},
    "llama": {"layers": 2},
    "t5": {"encoder/block": 2, "decoder/block": 3},
}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", BACKBONES)
def test_default_targets_are_the_ends_of_the_sublayers(name, scan):
    kind, config, given = BACKBONES[name]
    model = kind(config, scan_layers=scan)
    params = jax.eval_shape(model.init, jax.random.key(0), given)["params"]
    methods = [pf.houlsby(bottleneck=3), pf.parallel(bottleneck=3)]
    created = trees.paths(jax.eval_shape(pf.adapt(model, methods).init, jax.random.key(0), params, given))
    found = {path.removesuffix("/adapter_up_bias"): leaf.shape for path, leaf in created.items() if path.endswith("up_bias")}
    stacks = STACKS.get(name, {"encoder/layer": 2})
    attention = ATTENTION.get(name, "attention/output/dense")
    ends = FEED_FORWARD.get(name, ("output/dense",))

    def expected(*parts):
        found = {}
        for index, (stack, count) in enumerate(stacks.items()):
            for part in parts:
                if part in ends and len(ends) > 1:  # T5's decoder has one sublayer more
                    part = ends[index]
                for number in [""] if scan else [f"/{i}" for i in range(count)]:
                    found[f"{stack}{number}/{part}"] = (count, 16) if scan else (16,)
        return found

    networks = expected(ends[0])
    taps = {path.rpartition("/")[0] + "/tap_output": shape for path, shape in networks.items()}
    assert found == expected(attention, ends[0]) | taps
    layers = {path.rpartition("/")[0] for path in trees.paths(params)}
    assert {path for path in layers if re.fullmatch(pf.pfeiffer().targets, path)} == networks.keys()


def test_phas_encoder_adapters_have_the_released_number_of_parameters():
    model = backbones.T5(backbones.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12), scan_layers=True)
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    params = jax.eval_shape(model.init, jax.random.key(0), given)["params"]
    method = pf.parallel(targets=r"encoder/.*/tap_output", bottleneck=64, scale=1.0, init="xavier")
    shapes = jax.eval_shape(pf.adapt(model, method).init, jax.random.key(0), params, given)
    assert trees.size(shapes) == 1_189_632 == 12 * (768 * 64 + 64 + 64 * 768 + 768)


def made(name, method, **options):
    """A tiny backbone with random weights and random adapters."""
    kind, config, given = BACKBONES[name]
    model = kind(config, **options)
    adapted = pf.adapt(model, method)
    rng = np.random.default_rng(2)

    def drawn(shapes):
        return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)

    params = drawn(jax.eval_shape(model.init, jax.random.key(1), given)["params"])
    return adapted, params, drawn(jax.eval_shape(adapted.init, jax.random.key(0), params, given)), given


@pytest.mark.parametrize(("name", "block"), [("t5", "DenseReluDense"), ("llama", "mlp")])
def test_a_parallel_adapter_reads_the_normed_input_of_the_feed_forward_network(name, block):
    """PHA's placement: x + FFN(RMS(x)) + A(RMS(x)), evaluated outside."""
    adapted, params, point, given = made(name, pf.parallel(bottleneck=3, scale=1.0, init="xavier"))

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.module.name in ("wo", "down_proj"):
            seen.setdefault(path.rpartition("/")[0], []).append(out)
        elif context.module.name == block and context.method_name == "__call__":
            seen[path] += [args[0], out]
        return out

    @jax.jit
    def run():
        seen.clear()
        with nn.intercept_methods(record):
            adapted.apply(params, point, given)
        return seen

    seen: dict[str, list] = {}
    leaves = trees.paths(point)
    networks = run()
    assert len(networks) == (5 if name == "t5" else 2)
    for path, (y, v, out) in networks.items():
        y, v = (np.asarray(array, np.float64) for array in (y, v))
        down, down_bias, up, up_bias = (
            np.asarray(leaves[f"{path}/tap_output/adapter_{leaf}"], np.float64)
            for leaf in ("down", "down_bias", "up", "up_bias")
        )
        np.testing.assert_allclose(out, y + np.maximum(v @ down + down_bias, 0) @ up + up_bias, atol=1e-5)


def test_adapters_of_an_encoder_that_a_step_does_not_call_are_no_mistake():
    """A step with a cache runs T5's decoder alone: taps of the encoder are not visited then."""
    adapted, params, point, _ = made("t5", pf.parallel(bottleneck=3))
    cache = adapted.origin.model.init_cache(2, 4, 6)
    first = {"input_ids": IDS, "decoder_input_ids": IDS[:, :1]}
    out = jax.eval_shape(adapted.apply, params, point, first, cache=cache)
    then = jax.eval_shape(adapted.apply, params, point, {"decoder_input_ids": IDS[:, :1]}, cache=out.cache)
    assert then.logits.shape == (2, 1, 29)


class Net(nn.Module):
    """A dense layer with a tap behind it, told its source or not."""

    told: bool = True

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(5, name="first")(x)
        return nn.Dense(2, name="last")(backbones.Tap(name="tap")(y, source=x) if self.told else backbones.Tap(name="tap")(y))


X = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)), jnp.float32)


def moved(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 0.5 * rng.normal(size=leaf.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def net():
    shapes = jax.eval_shape(Net().init, jax.random.key(0), X)["params"]
    return Net(), moved(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), 5)


@pytest.mark.parametrize("targets", ["tap", "first"])
def test_at_the_tap_and_at_the_layer_before_it_an_adapter_does_the_same(net, targets):
    model, params = net
    for placement, width in (("sequential", 5), ("parallel", 4)):
        adapted = pf.adapt(
            model, pf.Bottleneck(targets=targets, bottleneck=3, placement=placement, scale=0.5, activation="tanh")
        )
        point = moved(adapted.init(jax.random.key(0), params, X))
        d, db, u, ub = (np.asarray(point[targets][f"adapter_{name}"]) for name in ("down", "down_bias", "up", "up_bias"))
        assert d.shape == (width, 3)
        y = np.asarray(X) @ np.asarray(params["first"]["kernel"])
        y = y + np.asarray(params["first"]["bias"])
        v = y if placement == "sequential" else np.asarray(X)
        y = y + 0.5 * (np.tanh(v @ d + db) @ u + ub)
        want = y @ np.asarray(params["last"]["kernel"]) + np.asarray(params["last"]["bias"])
        np.testing.assert_allclose(jax.jit(adapted.apply)(params, point, X), want, atol=1e-5)


class Kinds(nn.Module):
    """Layers whose axes an adapter has to flatten."""

    @nn.compact
    def __call__(self, x):  # [batch, time, 4]
        return (
            nn.DenseGeneral((2, 3), name="general")(x),
            # The weight's input axis between its output axes; in the result the outputs around an axis of positions.
            nn.Einsum((2, 4, 3), "btd,ndh->bnth", name="einsum")(x),
            nn.Conv(6, kernel_size=(3,), name="conv")(x),
        )


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_every_kind_of_layer_is_adapted_over_its_flattened_axes(placement):
    x = np.random.default_rng(4).normal(size=(2, 5, 4)).astype(np.float32)
    shapes = jax.eval_shape(Kinds().init, jax.random.key(0), x)["params"]
    params = moved(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    adapted = pf.adapt(Kinds(), pf.Bottleneck(targets=r".*", bottleneck=3, placement=placement, scale=2.0, activation="tanh"))
    point = moved(adapted.init(jax.random.key(0), params, x), 1)
    before, after = jax.jit(adapted.base)(params, x), jax.jit(adapted.apply)(params, point, x)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    patches = np.concatenate([padded[:, i : i + 5] for i in range(3)], axis=-1)
    for name, y, got, read in zip(("general", "einsum", "conv"), before, after, (x, x, patches), strict=True):
        rows = np.asarray(y)
        if name == "einsum":
            rows = rows.transpose(0, 2, 1, 3)
        rows = rows.reshape(2, 5, 6)
        d, db, u, ub = (np.asarray(point[name][f"adapter_{leaf}"]) for leaf in ("down", "down_bias", "up", "up_bias"))
        want = rows + 2.0 * (np.tanh((rows if placement == "sequential" else read) @ d + db) @ u + ub)
        if name == "einsum":
            got = np.asarray(got).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(np.asarray(got).reshape(2, 5, 6), want, atol=2e-5)


def test_methods_that_need_a_weight_do_not_see_taps(net):
    model, params = net
    every = pf.adapt(model, pf.LoRA(rank=1, targets=r".*")).init(jax.random.key(0), params, X)
    assert every.keys() == {"first", "last"}
    with pytest.raises(ValueError, match=r"targets='t\[a-z\]p' matches 'tap', a tap: .*LoRA cannot adapt.*Bottleneck"):
        pf.adapt(model, pf.LoRA(targets="t[a-z]p")).init(jax.random.key(0), params, X)
    with pytest.raises(ValueError, match="matches no layer that LoRA can adapt; nearest: 'last', 'first'"):
        pf.adapt(model, pf.LoRA(targets="tab")).init(jax.random.key(0), params, X)
    with pytest.raises(ValueError, match="matches no layer that Bottleneck can adapt; nearest: 'tap'"):
        pf.adapt(model, pf.Bottleneck(targets="tab")).init(jax.random.key(0), params, X)


def test_a_method_in_front_that_matches_a_tap_and_does_not_see_it_leaves_it_to_the_next(net):
    model, params = net
    adapted = pf.adapt(model, [pf.LoRA(rank=1, targets=r".*"), pf.Bottleneck(targets="tap", bottleneck=2)])
    point = moved(adapted.init(jax.random.key(0), params, X))
    assert point.keys() == {"first", "last", "tap"}
    assert trees.paths(adapted.trainable(point)).keys() == trees.paths(point).keys()
    without = {**point, "tap": jax.tree.map(jnp.zeros_like, point["tap"])}
    apply = jax.jit(adapted.apply)
    assert np.abs(apply(params, point, X) - apply(params, without, X)).max() > 1e-2
    assert not adapted.folds
    with pytest.raises(ValueError, match="the Bottleneck at 'tap' is no change of the weights"):
        adapted.deltas(params, point)


def test_misspelled_taps_are_an_error(bert):
    model, params = bert()
    method = pf.parallel(targets=r".*/tap_.*put", bottleneck=2)
    adapted = pf.adapt(model, method)
    layer = adapted.init(jax.random.key(0), params, inputs())["encoder"]["layer"]["0"]
    good = {"0": layer, "1": layer}
    jax.eval_shape(adapted.apply, params, {"encoder": {"layer": good}}, inputs())
    for wrong in (
        {**good, "9": layer},
        {**good, "1": {"output": layer["output"] | {"tap_outptu": layer["output"]["tap_output"]}}},
        {**good, "1": {"output": layer["output"] | {"tap_xoutput": layer["output"]["tap_output"]}}},
    ):
        with pytest.raises(ValueError, match=r"layer/(9|1)/output/tap_(output|outptu|xoutput)/.*no such module"):
            jax.eval_shape(adapted.apply, params, {"encoder": {"layer": wrong}}, inputs())


def test_sites_that_have_no_place_for_an_adapter_are_refused(net):
    _, params = net
    with pytest.raises(
        ValueError, match=r"the tap 'tap', which is not told the input .*placement='sequential'.*tap\(x, source\)"
    ):
        pf.adapt(Net(told=False), pf.Bottleneck(targets="tap", placement="parallel")).init(jax.random.key(0), params, X)

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(7, 4, name="table")(ids)
            return nn.Einsum((2, 4, 3), "ebd,edf->ebf", name="experts")(x)

    ids = jnp.zeros((2, 3), jnp.int32)
    params = Odd().init(jax.random.key(0), ids)["params"]
    for targets, why in (("table", "an embedding"), ("experts", "several inputs")):
        with pytest.raises(ValueError, match=f"matches '{targets}'.*{why}.*narrow the targets"):
            pf.adapt(Odd(), pf.Bottleneck(targets=targets)).init(jax.random.key(0), params, ids)


def test_settings_are_checked():
    for wrong, message in (
        (dict(bottleneck=0), "bottleneck must be a positive integer, got 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(activation="rleu"), "activation='rleu' is not one of .*'relu'"),
        (dict(placement="before"), "placement='before' is not one of 'sequential', 'parallel'"),
        (dict(init="zero"), "init='zero' is not one of 'lora', 'houlsby'"),
    ):
        with pytest.raises(ValueError, match=message):
            pf.Bottleneck(targets=".*", **wrong)


class Five(nn.Module):
    """A dense layer for each start."""

    @nn.compact
    def __call__(self, x):
        return {init: nn.Dense(300, name=init)(x) for init in ("lora", "houlsby", "bert", "normal", "xavier")}


@pytest.mark.parametrize("norm", [False, True])
def test_starts(norm):
    """Standard deviation, largest entry, and whether the model starts unchanged."""
    inputs, outputs, b = 400, 300, 50
    xavier = lambda n, m: (1e-4 * np.sqrt(2 / (n + m)), 1e-4 * np.sqrt(6 / (n + m)))  # noqa: E731
    uniform = lambda n: (1 / np.sqrt(3 * n), 1 / np.sqrt(n))  # noqa: E731
    expected = {  # of down and of up
        "lora": (uniform(inputs), uniform(b) if norm else (0.0, 0.0)),
        "houlsby": ((0.01 * 0.8796, 0.02),) * 2,  # the deviation of a normal number that is cut off at two deviations
        "bert": ((0.02, None),) * 2,
        "normal": ((0.01, None),) * 2,
        "xavier": (xavier(inputs, b), xavier(b, outputs)),
    }
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, inputs)), jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(Five().init, jax.random.key(0), x)["params"])
    how = dict(bottleneck=b, placement="parallel", norm=norm)
    adapted = pf.adapt(Five(), [pf.Bottleneck(targets=init, init=init, **how) for init in expected])
    adapters = adapted.init(jax.random.key(0), params, x)
    before, after = jax.jit(adapted.base)(params, x), jax.jit(adapted.apply)(params, adapters, x)
    moving = adapted.moving(adapters)
    for init, of_both in expected.items():
        leaves = adapters[init]
        for name, (deviation, largest) in zip(("adapter_down", "adapter_up"), of_both, strict=True):
            leaf = np.asarray(leaves[name])
            np.testing.assert_allclose(leaf.std(), deviation, rtol=0.02)
            assert largest is None or 0.99 * largest <= np.abs(leaf).max() <= largest * (1 + 1e-6)
            assert not np.any(leaves[f"{name}_bias"])
        change = np.abs(after[init] - before[init]).max()
        still = set()
        if init == "lora":
            assert change == 0
            still = {"adapter_down", "adapter_down_bias"} | ({"adapter_up", "adapter_up_bias"} if norm else set())
        elif init != "xavier":  # which is too small for a norm to blow it up to its full size
            assert change > (1 if norm else 1e-3)
        assert moving[init].keys() == leaves.keys() - still


def test_what_moves_is_what_has_a_gradient(net):
    model, params = net
    adapted = pf.adapt(model, pf.Bottleneck(targets="first", bottleneck=3, norm=True, activation="tanh"))
    gradient = jax.jit(jax.grad(lambda tree: jnp.sum(jnp.sin(adapted.apply(params, tree, X)))))
    whole = moved(adapted.init(jax.random.key(0), params, X))["first"]
    for zero in ((), ("up",), ("up", "up_bias"), ("norm_scale",)):
        point = {"first": whole | {f"adapter_{name}": jnp.zeros_like(whole[f"adapter_{name}"]) for name in zero}}
        nonzero = {name for name, leaf in gradient(point)["first"].items() if np.any(leaf)}
        assert adapted.moving(point)["first"].keys() == nonzero, zero


def test_dropout_acts_on_the_hidden_layer_only_with_a_key_and_keeps_the_mean(net):
    model, params = net
    adapted = pf.adapt(model, pf.Bottleneck(targets="tap", bottleneck=3, dropout=0.5))
    point = moved(adapted.init(jax.random.key(0), params, X))
    point["tap"]["adapter_up_bias"] = jnp.full((5,), 7.0)
    apply = jax.jit(adapted.apply)
    still = apply(params, point, X)
    keys = jax.random.split(jax.random.key(1), 2000)
    drawn = jax.jit(jax.vmap(lambda key: adapted.apply(params, point, X, rngs={"dropout": key})))(keys)
    assert np.abs(drawn - still[None]).max() > 0.1
    np.testing.assert_allclose(drawn.mean(0), still, atol=4 * float(drawn.std(0).max()) / np.sqrt(2000))
    # With every element dropped, the biases are left.
    least = {"tap": point["tap"] | {"adapter_down": jnp.zeros((5, 3)), "adapter_down_bias": jnp.zeros((3,))}}
    np.testing.assert_allclose(apply(params, least, X, rngs={"dropout": keys[0]}), apply(params, least, X))


def test_there_is_no_change_of_weights_and_the_error_says_what_to_do(net):
    model, params = net
    adapted = pf.adapt(model, pf.Bottleneck(targets="tap", bottleneck=3))
    phi0 = adapted.init(jax.random.key(0), params, X)
    tasks = {name: moved(phi0, seed) for seed, name in enumerate(("a", "b"))}
    refused = r"the Bottleneck at 'tap' is no change of the weights: .*\(relu\).*space='adapter'.*linearize"
    linear = pf.linearize(adapted, phi0)
    assert not adapted.folds and not linear.folds and not pf.linearize(adapted, phi0, "layer").folds
    for call in (
        lambda: adapted.deltas(params, phi0),
        lambda: linear.deltas(params, linear.init(None, params)),
        lambda: pf.fuse(pf.fusion.average(), tasks, adapted=adapted, params=params),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.raises(
        ValueError, match="mode='weight' is a tangent in the weights, but Bottleneck is no change.*mode='network'"
    ):
        pf.linearize(adapted, phi0, "weight")
    fused = pf.fuse(pf.fusion.average(), tasks, space="adapter", init=phi0)
    half = jax.tree.map(lambda a, b: 0.5 * (a + b), *tasks.values())
    for path, leaf in trees.paths(half).items():
        np.testing.assert_allclose(trees.paths(fused)[path], leaf, atol=1e-6)


def test_low_precision_models_keep_their_dtype():
    adapted, params, point, given = made("bert", pf.houlsby(bottleneck=2, norm=True), dtype=jnp.bfloat16)
    out = jax.eval_shape(adapted.apply, params, point, given)
    assert out.last_hidden_state.dtype == jnp.bfloat16
