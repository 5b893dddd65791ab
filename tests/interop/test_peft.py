"""PEFT adapters against peft itself, both ways: what it writes means the same here, what we write means the same there."""

import copy
import json

import flax
import jax
import numpy as np
import peft
import pytest
import torch
from peft_cases import base, distance, outputs, quiet, run, write

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones import unstack_layers
from pefusion_jax.backbones.family import params_to_hf
from pefusion_jax.interop import load_safetensors, read_peft
from pefusion_jax.interop.peft_config import Selection, validate
from pefusion_jax.interop.peft_names import columns_of
from pefusion_jax.interop.saving import family_of_model

VARIANTS = {
    "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], "lora_dropout": 0.1},
    "default targets": {"r": 2},
    "rank-stabilized": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["query", "value"]},
    "rank pattern": {"r": 2, "target_modules": ["query", "dense"], "rank_pattern": {r"layer.0.*\.query": 5, "pooler.dense": 1}},
    "alpha pattern": {"r": 2, "target_modules": ["key", "query"], "alpha_pattern": {"1.attention.self.key": 5, "query": 3}},
    "both patterns, rank-stabilized": {
        "r": 4, "use_rslora": True, "target_modules": ["query", "key"], "rank_pattern": {"query": 2}, "alpha_pattern": {"key": 3},
    },
    "float alpha": {"r": 3, "lora_alpha": 2.5, "target_modules": ["query"]},
    "bias lora_only": {"r": 2, "bias": "lora_only", "target_modules": ["query", "output.dense"]},
    "bias all": {"r": 2, "bias": "all", "target_modules": ["value"]},
    "lora_bias": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["value", "intermediate.dense"]},
    "modules_to_save": {"r": 2, "modules_to_save": ["pooler", "output.LayerNorm"], "target_modules": ["value"]},
    "modules_to_save and biases": {"r": 2, "bias": "lora_only", "modules_to_save": ["pooler"], "target_modules": ["key"]},
    "pattern": {"r": 2, "target_modules": r".*\.layer\.1\.attention\.(self\.(query|key)|output\.dense)"},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "exclude_modules": {"r": 2, "target_modules": ["dense"], "exclude_modules": r".*intermediate.*|pooler\.dense"},
    "layers_to_transform": {"r": 2, "target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    "embeddings": {"r": 2, "lora_alpha": 3, "target_modules": ["word_embeddings", "token_type_embeddings", "query"]},
    "bfloat16": {"r": 2, "target_modules": ["query"], "dtype": torch.bfloat16},
}  # fmt: skip
# What is written again as something else: alpha that is no integer goes into B, a branch's bias into the layer's own.
REWRITTEN = {"float alpha", "lora_bias"}


def load_back(folder, home):
    """peft's own reading, which must not say anything about keys, with every B in use."""
    with quiet() as said:
        model = peft.PeftModel.from_pretrained(home.hf(), folder).eval()
    about_keys = [str(w.message) for w in said if any(word in str(w.message).lower() for word in ("key", "missing", "unexpected"))]
    assert about_keys == []
    factors = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    assert factors and all(bool(p.any()) for p in factors)
    return model


def both_ways(home, made, folder, bound=1e-5):
    """peft -> ours -> peft, in outputs, merged weights and bytes; returns what was read."""
    with quiet():
        made.save_pretrained(folder / "theirs")
        if any(parameter.dtype == torch.bfloat16 for parameter in made.parameters()):
            made = peft.PeftModel.from_pretrained(home.hf(), folder / "theirs").eval()  # which computes in float32, as we do
        want = home.theirs(made)
    adapter = read_peft(folder / "theirs", home.model, home.params)
    adapted, adapters = pf.load_peft(folder / "theirs", home.model, home.params)
    assert distance(home.ours(adapted, adapters), want) <= bound

    pf.save_peft(folder / "ours", adapted, adapters, params=home.params, base=str(home.folder), dtype=adapter.dtype)
    assert distance(home.theirs(load_back(folder / "ours", home)), want) <= bound

    again = pf.load_peft(folder / "ours", home.model, home.params)
    pf.save_peft(folder / "again", *again, params=home.params, base=str(home.folder), dtype=adapter.dtype)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (folder / "ours" / name).read_bytes() == (folder / "again" / name).read_bytes(), name

    with quiet():
        made.merge_and_unload().save_pretrained(folder / "merged")
    merged = pf.fold(home.params, adapted.deltas(home.params, adapters))
    ours, theirs = params_to_hf(family_of_model(home.model), merged, home.model.config), load_safetensors(folder / "merged/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=2e-6, rtol=0, err_msg=name)
    return adapter, adapted, adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_on_bert_both_ways(variant, tmp_path):
    home, settings = base("bert"), dict(VARIANTS[variant])
    with quiet():
        made = home.adapted(**settings)
    adapter, adapted, adapters = both_ways(home, made, tmp_path)
    assert not adapter.heads and not adapter.report.missing and not adapter.report.unexpected
    assert adapted.origin.methods[0].dropout == settings.get("lora_dropout", 0.0)
    assert adapter.dtype == ("bfloat16" if variant == "bfloat16" else "float32")
    fresh = jax.eval_shape(lambda params: adapted.init(jax.random.key(0), params, **home.inputs), home.params)
    assert {p: leaf.shape for p, leaf in trees.paths(fresh).items()} == {p: leaf.shape for p, leaf in trees.paths(adapters).items()}

    if variant in REWRITTEN:
        return
    theirs, ours = (load_safetensors(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype and array.tobytes() == ours[name].tobytes(), name


FAMILY_CASES = {
    "bert_classifier": {"task_type": "SEQ_CLS", "target_modules": ["query", "attention.output.dense"]},
    "roberta": {"target_modules": ["value", "intermediate.dense"], "bias": "lora_only"},
    "mpnet": {"target_modules": ["q", "o"], "use_rslora": True},
    "llama": {"target_modules": "all-linear"},
    "qwen2": {"modules_to_save": ["input_layernorm"]},
    "t5": {"target_modules": ["q", "v", "wi_0", "relative_attention_bias"]},
    "vit": {"target_modules": ["q_proj", "fc2", "projection"], "rank_pattern": {"layers.1.attention.q_proj": 3}},
    "deit": {"target_modules": r".*\.(o_proj|fc1)"},
    "dinov2": {"target_modules": ["gate_proj", "up_proj", "down_proj", "k_proj"]},
    "clip": {"target_modules": ["q_proj", "visual_projection", "patch_embedding", "position_embedding"]},
    "clip_vision": {"target_modules": ["v_proj", "fc1"]},
}


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_every_family_both_ways(family, tmp_path):
    home = base(family)
    with quiet():
        made = home.adapted(r=2, lora_alpha=3, **FAMILY_CASES[family])
    adapter, _, _ = both_ways(home, made, tmp_path)
    assert not adapter.heads and adapter.report.column.startswith("transformers>=5")


OLD_VIT = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}


def test_vit_in_old_and_in_new_names_is_the_same(tmp_path):
    home = base("vit")
    with quiet():
        home.adapted(r=2, target_modules=["q_proj", "v_proj", "fc1"]).save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new/adapter_config.json").read_text()) | {"target_modules": ["query", "value", "intermediate.dense"]}
    old = {}
    for key, array in load_safetensors(tmp_path / "new/adapter_model.safetensors").items():
        key = key.replace("model.layers.", "model.encoder.layer.").replace("mlp.fc1", "intermediate.dense")
        for new, name in OLD_VIT.items():
            key = key.replace(f"attention.{new}", f"attention.{name}")
        old[key] = array
    write(tmp_path / "old", config, old)
    new = read_peft(tmp_path / "new", home.model, home.params)
    again = read_peft(tmp_path / "old", home.model, home.params)
    assert again.report.column.startswith("transformers<5") and again.methods == new.methods
    assert_same(again.adapters, new.adapters)

    adapted = pf.adapt(home.model, new.methods)
    options = {"params": home.params, "base": "x"}
    pf.save_peft(tmp_path / "written", adapted, new.adapters, target="transformers<5", **options)
    written = load_safetensors(tmp_path / "written/adapter_model.safetensors")
    assert written.keys() == old.keys() and all(np.array_equal(written[key], old[key]) for key in old)
    done = pf.save_peft(tmp_path / "headed", adapted, new.adapters, target="transformers<5", prefix="vit.", **options)
    assert done.modules[0] == "vit.encoder.layer.0.attention.attention.query"
    assert_same(pf.load_peft(tmp_path / "headed", home.model, home.params)[1], new.adapters)
    # An adapter of version 4 whose targets are version 5's is the one that peft loads without effect.
    write(tmp_path / "mixed", config | {"target_modules": ["q_proj", "v_proj", "fc1"]}, old)
    with pytest.raises(ValueError, match="does not fit|no module of this"):
        pf.load_peft(tmp_path / "mixed", home.model, home.params)
    with pytest.raises(ValueError, match="target='v5' is not one of"):
        pf.save_peft(tmp_path / "none", adapted, new.adapters, target="v5", **options)


def test_fused_swiglu_is_split_and_fused_again(tmp_path):
    """One LoRA on version 4's weights_in is two here with a common A; two that differ become one of twice the rank."""
    home = base("dinov2")
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["weights_in"]}
    hidden = home.params["encoder"]["layer"]["0"]["mlp"]["up_proj"]["bias"].size
    tensors = {}
    for layer in range(2):
        at = f"base_model.model.encoder.layer.{layer}.mlp.weights_in"
        tensors[f"{at}.lora_A.weight"] = rng.normal(size=(2, 16)).astype(np.float32)
        tensors[f"{at}.lora_B.weight"] = rng.normal(size=(2 * hidden, 2)).astype(np.float32)
    write(tmp_path / "old", config, tensors)
    adapted, adapters = pf.load_peft(tmp_path / "old", home.model, home.params)
    change = adapted.deltas(home.params, adapters).dense().leaves
    want = 2 * tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
    fused = np.concatenate([change[f"encoder/layer/1/mlp/{part}_proj/kernel"].T for part in ("gate", "up")])
    np.testing.assert_allclose(fused, want, atol=1e-5)
    options = {"params": home.params, "base": "x", "target": "transformers<5"}
    pf.save_peft(tmp_path / "again", adapted, adapters, **options)
    again = load_safetensors(tmp_path / "again/adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(np.array_equal(again[key], tensors[key]) for key in tensors)

    other = jax.tree.map(lambda leaf: leaf, adapters)
    other["encoder"]["layer"]["1"]["mlp"]["up_proj"]["lora_a"] = other["encoder"]["layer"]["1"]["mlp"]["up_proj"]["lora_a"] + 1.0
    done = pf.save_peft(tmp_path / "wide", adapted, other, **options)
    assert done.config["rank_pattern"] == {"encoder\\.layer\\.1\\.mlp\\.weights_in": 4}
    back = pf.load_peft(tmp_path / "wide", home.model, home.params)
    mine, theirs = adapted.deltas(home.params, other).dense().leaves, back[0].deltas(home.params, back[1]).dense().leaves
    for path, array in mine.items():
        np.testing.assert_allclose(theirs[path], array, atol=1e-5, err_msg=path)


PATTERNS = [
    ["query"], ["query", "value"], ["dense"], ["output.dense"], ["attention.output.dense"], ["self.query", "pooler.dense"],
    ["encoder.layer.0.attention.self.key"], ["layer.1.output.dense", "key"], ["uery", "value"], ["word_embeddings"],
    ["bert.encoder.layer.0.attention.self.key", "value"],
    "all-linear", "ALL-linear", r".*query", r".*\.(query|key)", r"encoder\.layer\.0\..*dense", r".*layer\.[1-9]\..*value",
    r"(?!.*pooler).*\.dense", r".*self\.(?:query|key|value)$", "encoder.layer.1.intermediate.dense", r".+\.\d+\.output\.dense",
    None,
]  # fmt: skip
NARROWED = [
    {"exclude_modules": ["dense"], "target_modules": ["dense", "query"]},
    {"exclude_modules": r".*\.0\..*", "target_modules": ["query", "dense"]},
    {"exclude_modules": ["layer.1.attention.self.query"], "target_modules": "all-linear"},
    {"exclude_modules": r"pooler.*", "target_modules": r".*dense"},
    {"layers_to_transform": 0, "target_modules": ["query", "dense"]},
    {"layers_to_transform": [1], "target_modules": ["query", "word_embeddings"]},
    {"layers_to_transform": [0, 1], "layers_pattern": ["layer"], "target_modules": ["key"]},
    {"layers_to_transform": [1], "layers_pattern": "layer", "target_modules": ["output.dense"]},
    {"layers_to_transform": [], "target_modules": ["value"]},
    {"modules_to_save": ["pooler"], "target_modules": ["dense"]},
    {"modules_to_save": ["attention"], "target_modules": "all-linear"},
    {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
    {"task_type": "TOKEN_CLS", "target_modules": "all-linear"},
    {"task_type": "SEQ_CLS", "target_modules": ["dense", "key"]},
]


def adapted_by_peft(model, **settings):
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    return {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("family", ["bert", "bert_classifier"])
def test_patterns_select_what_they_select_in_peft(family):
    home = base(family)
    column = columns_of(family_of_model(home.model), home.model.config)[0]
    with quiet():
        hf = home.hf()
    for settings in [{"target_modules": targets} for targets in PATTERNS] + NARROWED:
        with quiet():
            try:
                theirs = adapted_by_peft(copy.deepcopy(hf), **settings)
            except ValueError:
                theirs = None
        try:
            config = validate({"peft_type": "LORA", **settings}, "here")
            ours = Selection(config, ("bert",)).modules(column) or None
        except ValueError:
            ours = None
        assert ours == theirs, settings


def test_patterns_of_other_families_select_what_they_select_in_peft():
    for family, targets in [
        ("t5", ["q", "v"]), ("t5", ["SelfAttention.q", "wo"]), ("t5", r".*decoder.*EncDecAttention\.(q|k)"), ("t5", "all-linear"),
        ("llama", "all-linear"), ("llama", None), ("qwen2", r"model\.layers\.1\..*proj"), ("vit", ["q_proj", "projection"]),
        ("vit", "all-linear"), ("dinov2", "all-linear"), ("clip", r"text_model.*(q|v)_proj"), ("clip", "all-linear"),
        ("roberta", None), ("mpnet", ["attn.q", "dense"]), ("clip_vision", "all-linear"), ("deit", ["fc1"]),
    ]:  # fmt: skip
        home = base(family)
        with quiet():
            theirs = adapted_by_peft(home.hf(), target_modules=targets)
        columns = columns_of(family_of_model(home.model), home.model.config)
        config = validate({"peft_type": "LORA", "target_modules": targets}, "here")
        assert Selection(config, family_of_model(home.model).model_types).modules(columns[0]) == theirs, (family, targets)


@pytest.mark.parametrize("variant", ["rank pattern", "both patterns, rank-stabilized", "bias all", "layers_to_transform", "embeddings"])
def test_stacked_layers_hold_the_same_adapter(variant, tmp_path):
    home = base("bert")
    with quiet():
        home.adapted(**VARIANTS[variant]).save_pretrained(tmp_path / "theirs")
    model, params = home.scanned
    loop, scan = pf.load_peft(tmp_path / "theirs", home.model, home.params), pf.load_peft(tmp_path / "theirs", model, params)
    want = pf.fold(home.params, loop[0].deltas(home.params, loop[1]))
    assert_same(unstack_layers(pf.fold(params, scan[0].deltas(params, scan[1]))), want, atol=1e-6)
    if variant == "rank pattern":
        got = run(scan[0], params, scan[1], home.inputs)
        assert distance(got, home.ours(*loop)) <= 1e-5
    pf.save_peft(tmp_path / "scan", *scan, params=params, base="x")
    again = pf.load_peft(tmp_path / "scan", home.model, home.params)
    assert_same(pf.fold(home.params, again[0].deltas(home.params, again[1])), want, atol=1e-6)
    stored = load_safetensors(tmp_path / "scan/adapter_model.safetensors")
    assert stored.keys() == load_safetensors(tmp_path / "theirs/adapter_model.safetensors").keys()


class Linearized(torch.nn.Module):
    """A layer in its first-order expansion, written once more: value and derivative at the parameters it had."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.start = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}

    def forward(self, x):
        steps = {name: parameter - self.start[name] for name, parameter in self.layer.named_parameters()}
        with quiet():  # torch warns of its own compiler
            value, slope = torch.func.jvp(lambda at: torch.func.functional_call(self.layer, at, (x,)), (self.start,), (steps,))
        return value + slope


@pytest.mark.parametrize("at_zero", [True, False])
@pytest.mark.parametrize("family", ["clip_vision", "t5"])
def test_fusionbench_linearized_adapters_are_read_exactly(family, at_zero, tmp_path):
    home = base(family)
    targets = ["q_proj", "v_proj"] if family == "clip_vision" else ["q", "v"]  # T5's layers have no bias: other positions
    with quiet():
        made = home.adapted(r=2, lora_alpha=6, target_modules=targets)
        made.save_pretrained(tmp_path / "config")
    tensors, rng = {}, torch.Generator().manual_seed(1)
    for name, layer in list(made.named_modules()):
        if hasattr(layer, "lora_A"):
            if at_zero:
                layer.lora_B["default"].weight.data.zero_()
            parent, _, child = name.rpartition(".")
            wrapped = Linearized(layer)
            setattr(made.get_submodule(parent), child, wrapped)
            with torch.no_grad():
                for factor in (layer.lora_A, layer.lora_B):
                    factor["default"].weight.add_(torch.randn(factor["default"].weight.shape, generator=rng) * 0.3)
            for i, key in enumerate(wrapped.start):
                tensors[f"{name}.params0_values.{i}"] = wrapped.start[key].numpy()
            for factor in ("lora_A", "lora_B"):
                tensors[f"{name}.model.{factor}.default.weight"] = getattr(layer, factor)["default"].weight.detach().numpy()
    config = json.loads((tmp_path / "config/adapter_config.json").read_text())
    write(tmp_path / "l-lora", config, tensors, name="linearized_adapter_model.safetensors")
    adapted, adapters = pf.load_peft(tmp_path / "l-lora", home.model, home.params)
    assert adapted.origin.methods[0].rank == (2 if at_zero else 4)
    assert distance(home.ours(adapted, adapters), home.theirs(made)) <= 1e-5
    pf.save_peft(tmp_path / "plain", adapted, adapters, params=home.params, base=str(home.folder))
    assert distance(home.theirs(load_back(tmp_path / "plain", home)), home.theirs(made)) <= 1e-5

    name = next(key for key in tensors if key.endswith("values.0"))
    write(tmp_path / "other", config, tensors | {name: tensors[name] + 1}, name="linearized_adapter_model.safetensors")
    with pytest.raises(ValueError, match="stored with the adapter is not this model's"):
        pf.load_peft(tmp_path / "other", home.model, home.params)


@pytest.fixture(scope="module")
def llora():
    """An adapted model, a point of expansion away from zero, and a displacement."""
    home = base("bert")
    methods = [pf.LoRA(rank=2, alpha=3, targets=r".*/(query|value)"), pf.FullFineTuning(targets=r"pooler/.*")]
    adapted = pf.adapt(home.model, methods)
    start = adapted.init(jax.random.key(0), home.params, **home.inputs)
    rng = np.random.default_rng(0)
    away = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), start)
    tau = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), start)
    return home, adapted, start, away, tau


@pytest.mark.parametrize("at_zero", [True, False])
def test_layer_linearization_is_an_ordinary_lora(llora, at_zero, tmp_path):
    home, adapted, start, away, tau = llora
    linear = pf.linearize(adapted, start if at_zero else away, "layer")
    done = pf.save_peft(tmp_path / "out", linear, tau, params=home.params, base=str(home.folder))
    assert done.config["r"] == (2 if at_zero else 4) and done.config["modules_to_save"] == ["pooler.dense"]
    want = home.ours(linear, tau)
    assert distance(home.theirs(load_back(tmp_path / "out", home)), want) <= 1e-5
    delta = linear.deltas(home.params, tau)  # relative to the point of expansion; the pooler's is dense
    with pytest.raises(ValueError, match="is a dense matrix, and a LoRA stores pairs"):
        pf.save_peft(tmp_path / "dense", linear, delta, params=home.params, base="x")


@pytest.mark.parametrize("at_zero", [True, False])
def test_a_change_relative_to_the_point_of_expansion_is_written_relative_to_the_base(at_zero, tmp_path):
    home = base("bert")
    adapted = pf.adapt(home.model, pf.LoRA(rank=2, alpha=3, targets=r".*/0/.*/(query|value)"))
    start = adapted.init(jax.random.key(0), home.params, **home.inputs)
    if not at_zero:
        start = jax.tree.map(lambda leaf: leaf + 0.1, start)
    linear = pf.linearize(adapted, start, "layer")
    tau = jax.tree.map(lambda leaf: leaf * 0.0 + 0.2, start)
    done = pf.save_peft(tmp_path / "out", linear, linear.deltas(home.params, tau), params=home.params, base="x")
    assert done.config["r"] == (2 if at_zero else 6)
    loaded, adapters = pf.load_peft(tmp_path / "out", home.model, home.params)
    want = pf.fold(pf.fold(home.params, adapted.deltas(home.params, start)), linear.deltas(home.params, tau))
    assert_same(pf.fold(home.params, loaded.deltas(home.params, adapters)), want, atol=1e-6)


@pytest.mark.parametrize("mode", ["network", "weight"])
def test_other_linearizations_are_written_as_their_layer_counterpart_on_request_only(llora, mode, tmp_path):
    home, adapted, start, away, tau = llora
    linear = pf.linearize(adapted, away, mode)
    with pytest.raises(ValueError, match=f"mode='{mode}' is not a change of the weights.*as_layer=True"):
        pf.save_peft(tmp_path / "out", linear, tau, params=home.params, base="x")
    assert not (tmp_path / "out").exists()
    done = pf.save_peft(
        tmp_path / "out", linear, tau, params=home.params, base=str(home.folder), as_layer=True, inputs=home.inputs
    )
    said = max(float(np.abs(x - y).max()) for x, y in zip(home.ours(linear, tau), home.theirs(load_back(tmp_path / "out", home))))
    assert said > 1e-3
    pooled = done.difference  # over all outputs, of which the hidden states are one
    assert pooled >= said - 1e-5 and "largest difference" in (tmp_path / "out/README.md").read_text()


def test_an_adapter_of_theirs_and_one_of_ours_are_fused_and_written_for_peft(tmp_path):
    home = base("bert")
    with quiet():
        home.adapted(r=3, lora_alpha=6, target_modules=["query", "value"]).save_pretrained(tmp_path / "theirs")
    adapted, theirs = pf.load_peft(tmp_path / "theirs", home.model, home.params)
    mine = pf.adapt(home.model, pf.LoRA(rank=2, alpha=5, targets=r".*/(query|output/dense)"))
    tree = jax.tree.map(lambda leaf: leaf + 0.1, mine.init(jax.random.key(1), home.params, **home.inputs))
    fused = pf.fuse(
        pf.fusion.task_arithmetic(scale=0.5), {"theirs": adapted.deltas(home.params, theirs), "mine": mine.deltas(home.params, tree)}
    )
    done = pf.save_peft(tmp_path / "fused", adapted, fused, params=home.params, base=str(home.folder), task_type="FEATURE_EXTRACTION")
    assert done.config["rank_pattern"] and done.config["task_type"] == "FEATURE_EXTRACTION"
    want = outputs(jax.jit(lambda p, i: adapted.base(p, **i))(pf.fold(home.params, fused), home.inputs))
    assert distance(home.theirs(load_back(tmp_path / "fused", home)), want) <= 1e-5
    with pytest.raises(ValueError, match=r"dense matrix.*save_pretrained\(FOLDER, model, pf.fold\(params, delta\)\)"):
        pf.save_peft(tmp_path / "dense", adapted, fused.dense(), params=home.params, base="x")
    with pytest.raises(FileExistsError, match="not empty"):
        pf.save_peft(tmp_path / "fused", adapted, fused, params=home.params, base="x")
    with pytest.raises(ValueError, match="NaN or infinite"):
        pf.save_peft(tmp_path / "nan", adapted, jax.tree.map(lambda leaf: leaf * np.nan, theirs), params=home.params, base="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "theirs"]


def test_a_head_that_the_model_lacks_is_not_lost(tmp_path):
    home, headless = base("bert_classifier"), base("bert")
    with quiet():
        home.adapted(r=2, task_type="SEQ_CLS", target_modules=["query"]).save_pretrained(tmp_path / "a")
    adapter = read_peft(tmp_path / "a", headless.model, headless.params)
    assert {name: array.shape for name, array in adapter.heads.items()} == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    with pytest.raises(ValueError, match=r"head that Bert does not have: classifier.*read_peft gives it as \.heads"):
        pf.load_peft(tmp_path / "a", headless.model, headless.params)
    with pytest.warns(UserWarning, match="strict=False|read_peft gives it"):
        pf.load_peft(tmp_path / "a", headless.model, headless.params, strict=False)


def assert_same(ours, theirs, atol=0.0):
    ours, theirs = trees.paths(ours), trees.paths(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=atol, rtol=0, err_msg=path)


@pytest.fixture(scope="module")
def good():
    """A small adapter in the least that a configuration needs."""
    home = base("bert")
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "key"]}
    tensors = {}
    for layer in range(2):
        for name in ("query", "key"):
            at = f"base_model.model.encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{at}.lora_A.weight"] = rng.normal(size=(2, 16)).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = rng.normal(size=(16, 2)).astype(np.float32)
    return home, config, tensors


FIRST = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
REFUSED = [
    ({"peft_type": "LOKI"}, "peft_type='LOKI' is not implemented; implemented: LORA"),
    ({"peft_type": ["LORA"]}, "is not implemented; implemented: LORA"),
    ({"peft_type": "IA3"}, "peft_type='IA3' is not implemented"),
    ({"use_dora": True}, r"use_dora=True is not implemented.*DoRA.*merge"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True.*set it to false"),
    ({"layer_replication": [[0, 2]]}, "layer_replication.*another model"),
    ({"megatron_config": {"a": 1}}, "megatron_config.*Megatron"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config.*routing"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens.*tokens"),
    ({"use_qalora": True}, "use_qalora.*QALoRA"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora.*block-diagonal"),
    ({"kasa_config": {"beta": 1}}, "kasa_config.*base weights"),
    ({"monteclora_config": {"n": 1}}, "monteclora_config.*random"),
    ({"velora_config": {"scale": 1}}, "velora_config.*convert"),
    ({"target_parameters": ["x"]}, "target_parameters.*bare parameters"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices.*rows"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying.*tied"),
    *(({"init_lora_weights": name}, "relative to those.*path_initial_model_for_weight_conversion") for name in
      ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
    ({"shiny_new_field": {"a": 1}}, "shiny_new_field=.* is not known here"),
    ({"r": 0}, "r=0 should be an integer from 1"),
    ({"r": True}, "r=True should be an integer"),
    ({"r": "8"}, "r='8' should be an integer"),
    ({"r": 10**30}, "r=1000.* should be an integer"),
    ({"lora_alpha": "big"}, "lora_alpha='big' should be a number"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0 should be a number from 0"),
    ({"bias": "some"}, "bias='some' should be"),
    ({"bias": ["none"]}, r"bias=\['none'\] should be"),
    ({"use_rslora": 1}, "use_rslora=1 should be true or false"),
    ({"rank_pattern": {"query": 0}}, "rank_pattern=.* should be an object of ranks"),
    ({"rank_pattern": ["query"]}, "rank_pattern=.* should be an object"),
    ({"alpha_pattern": {"query": None}}, "alpha_pattern=.* should be an object"),
    ({"target_modules": 3}, "target_modules=3 should be a list of names"),
    ({"target_modules": [1]}, "target_modules=.* should be a list of names"),
    ({"target_modules": "(query"}, "not closed"),
    ({"target_modules": "(?<=x)query"}, "look-behind"),
    ({"target_modules": []}, "no module of this BERT model is adapted"),
    ({"target_modules": ["quarry"]}, "no module of this BERT model is adapted"),
    ({"target_modules": ".*"}, "selects .* which is not a linear layer"),
    ({"target_modules": ["query"]}, "4 modules|2 modules match.*2 in the file only: .*key"),
    ({"target_modules": ["query", "key", "value"]}, "2 in the model only: encoder.layer.0.attention.self.value"),
    ({"modules_to_save": ["(x"]}, "plain names"),
    ({"modules_to_save": ["pooler"]}, "in the model only: pooler.dense.weight, pooler.dense.bias"),
    ({"bias": "lora_only"}, "4 in the model only: .*query.bias"),
    ({"layers_pattern": "layer"}, "layers_pattern without layers_to_transform"),
    ({"layers_to_transform": 1.5}, "layers_to_transform=1.5 should be"),
    ({"layers_to_transform": 1, "target_modules": ".*query"}, "with a pattern as target_modules"),
    ({"r": 3}, "query: A has rank 2, but r and rank_pattern in adapter_config.json give rank 3"),
    ({"rank_pattern": {r"1\..*key": 4}}, "layer.1.attention.self.key: A has rank 2.* give rank 4"),
    ({"lora_alpha": 1e29, "rank_pattern": {}}, None),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "problem"), REFUSED)
def test_configurations_that_are_refused(good, changes, problem, tmp_path):
    home, config, tensors = good
    write(tmp_path, config | changes, tensors)
    if problem is None:
        pf.load_peft(tmp_path, home.model, home.params)
        return
    with pytest.raises(ValueError, match=problem):
        pf.load_peft(tmp_path, home.model, home.params)


def without(tensors, *parts):
    return {key: array for key, array in tensors.items() if not any(part in key for part in parts)}


DEFECTS = {
    "extra tensor": (lambda t: t | {"base_model.model.x.lora_A.weight": t[FIRST], "base_model.model.x.lora_B.weight": t[FIRST].T},
                     "1 in the file only: base_model.model.x"),
    "extra parameter": (lambda t: t | {"base_model.model.pooler.dense.bias": np.zeros(16, np.float32)}, "1 in the file only"),
    "path as a name": (lambda t: t | {"../../etc/passwd": t[FIRST]}, "1 in the file only: ../../etc/passwd"),
    "missing module": (lambda t: without(t, "layer.1.attention.self.key"), "1 in the model only: encoder.layer.1.attention.self.key"),
    "missing B": (lambda t: without(t, "layer.1.attention.self.key.lora_B"), "lack LoRA's factor B"),
    "wrong inputs": (lambda t: t | {FIRST: np.zeros((2, 15), np.float32)}, r"A has the shape \[2, 15\].* needs \[2, 16\]"),
    "wrong rank": (lambda t: t | {FIRST: np.zeros((3, 16), np.float32)}, "A has rank 3, but .* give rank 2"),
    "three axes": (lambda t: t | {FIRST: np.zeros((2, 16, 1), np.float32)}, r"A has the shape \[2, 16, 1\]"),
    "transposed": (lambda t: t | {FIRST: t[FIRST].T}, "A has rank 16"),
    "no prefix": (lambda t: {key.removeprefix("base_model.model."): array for key, array in t.items()}, "no module of this BERT model"),
    "adapter's name in it": (lambda t: {key.replace("_A.", "_A.default."): array for key, array in t.items()}, "factor A"),
    "other model": (lambda t: {key.replace("encoder.layer", "h"): array for key, array in t.items()}, "Is it for another model"),
    "NaN": (lambda t: t | {FIRST: np.full((2, 16), np.nan, np.float32)}, r"NaN or infinite\n.*layer.0.attention.self.query.lora_A"),
    "integers": (lambda t: t | {FIRST: np.zeros((2, 16), np.int32)}, "is int32; adapters are float32"),
    "float64": (lambda t: t | {FIRST: np.zeros((2, 16))}, "is float64; adapters are float32"),
    "DoRA": (lambda t: t | {FIRST.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(16, np.float32)}, "1 in the file only"),
    "empty": (lambda t: {}, "no module of this BERT model is adapted"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_the_tensors_are_named(good, defect, tmp_path):
    home, config, tensors = good
    change, problem = DEFECTS[defect]
    write(tmp_path, config, change(dict(tensors)))
    with pytest.raises(ValueError, match=problem):
        pf.load_peft(tmp_path, home.model, home.params)


def test_a_partial_match_is_a_warning_on_request_and_no_match_is_an_error_always(good, tmp_path):
    home, config, tensors = good
    write(tmp_path / "part", config, DEFECTS["missing module"][0](tensors))
    with pytest.warns(UserWarning, match="3 modules match.*1 in the model only"):
        adapter = read_peft(tmp_path / "part", home.model, home.params, strict=False)
    assert len(adapter.report.matched) == 3
    change = pf.adapt(home.model, adapter.methods).deltas(home.params, adapter.adapters)
    assert len(change.leaves) == 3
    write(tmp_path / "none", config, DEFECTS["other model"][0](tensors))
    with pytest.raises(ValueError, match="no module"):
        read_peft(tmp_path / "none", home.model, home.params, strict=False)


def test_folders_that_are_no_adapter(good, tmp_path):
    home, config, tensors = good
    write(tmp_path / "outer/inner", config, tensors)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json.*sub-folders inner"):
        pf.load_peft(tmp_path / "outer", home.model, home.params)
    (tmp_path / "outer/inner/adapter_model.safetensors").rename(tmp_path / "outer/inner/adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle, which is never read"):
        pf.load_peft(tmp_path / "outer/inner", home.model, home.params)
    write(tmp_path / "text", config, tensors)
    for text, problem in (
        ("[]", "not a JSON object"), ("{", "JSON"), ('{"r": 1, "r": 2}', "stands twice"), ('{"lora_alpha": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "JSON"), ('{"a": "' + "x" * 2**20 + '"}', "larger than"), ("{}", "peft_type=None is not implemented"),
    ):  # fmt: skip
        (tmp_path / "text/adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=problem):
            pf.load_peft(tmp_path / "text", home.model, home.params)


def test_weights_that_other_layers_share_are_refused_both_ways(tmp_path):
    home = base("qwen2")  # whose output embedding is its input embedding
    with quiet():
        home.adapted(r=2, target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="model.embed_tokens shares its weight with another layer"):
        pf.load_peft(tmp_path / "tied", home.model, home.params)
    adapted = pf.adapt(home.model, pf.LoRA(rank=2, targets=r"embed_tokens"))
    tree = adapted.init(jax.random.key(0), home.params, **home.inputs)
    with pytest.raises(ValueError, match="embed_tokens shares its weight.*write the merged model instead"):
        pf.save_peft(tmp_path / "out", adapted, tree, params=home.params, base="x")


def test_what_peft_cannot_store_is_refused_with_the_remedy(tmp_path):
    home = base("vit")

    def save(*methods, model=home.model, params=home.params):
        adapted = pf.adapt(model, methods)
        tree = jax.eval_shape(lambda p: adapted.init(jax.random.key(0), p, **home.inputs), params)
        pf.save_peft(tmp_path / "out", adapted, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), tree), params=params, base="x")

    lora = pf.LoRA(rank=1, targets=r".*/query")
    with pytest.raises(ValueError, match="there is no LoRA to be written.*write the merged model instead"):
        save(pf.FullFineTuning(targets=r".*/bias"))
    with pytest.raises(ValueError, match="cls_token is no module of its own"):
        save(lora, pf.FullFineTuning(targets="embeddings/cls_token"))
    with pytest.raises(ValueError, match="moved beside a LoRA on the same layer"):
        save(lora, pf.FullFineTuning(targets=r".*/query/kernel"))
    with pytest.raises(ValueError, match="these are not the parameters of this ViT model"):
        pf.save_peft(tmp_path / "out", pf.adapt(home.model, lora), {}, params={}, base="x")
    with pytest.raises(ValueError, match="has no table of Hugging Face names"):
        pf.save_peft(tmp_path / "out", pf.adapt(flax.linen.Dense(3), lora), {}, params={}, base="x")
    assert not list(tmp_path.iterdir())


def test_any_rank_and_scale_reaches_peft(tmp_path):
    """Scales that alpha can express are in alpha, with paths escaped; others are in B."""
    home = base("bert")
    method = pf.LoRA(
        rank=3, alpha=1.0, targets=r".*/(query|key|intermediate/dense)",
        rank_pattern={r".*/0/.*query": 5}, alpha_pattern={r".*/1/.*key": 0.7, r".*/dense": 6},
    )  # fmt: skip
    adapted = pf.adapt(home.model, method)
    tree = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(jax.random.key(0), home.params, **home.inputs))
    done = pf.save_peft(tmp_path / "out", adapted, tree, params=home.params, base=str(home.folder), dtype="float32")
    assert done.config["rank_pattern"] == {"encoder\\.layer\\.0\\.attention\\.self\\.query": 5}
    assert set(done.config["alpha_pattern"].values()) == {3, 6} and done.config["lora_alpha"] == 1
    assert done.config["target_modules"] == ["intermediate.dense", "key", "query"]
    want = home.ours(adapted, tree)
    assert distance(home.theirs(load_back(tmp_path / "out", home)), want) <= 1e-5
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    with quiet():
        known = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert written.keys() == known.keys() and list(written) == sorted(written)
    chosen = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "base_model_name_or_path", "inference_mode"}
    assert {name: written[name] for name in known if name not in chosen} == {n: v for n, v in known.items() if n not in chosen}
