"""PEFT adapters against peft itself, both ways: what it writes means the same here, what we write means the same there."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from peft_cases import Base, assert_same, base, distance, load_back, quiet, run, write

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones import unstack_layers
from pefusion_jax.backbones.family import params_to_hf
from pefusion_jax.interop import load_safetensors, read_peft
from pefusion_jax.interop.saving import family_of_model

VARIANTS = {
    "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], "lora_dropout": 0.1},
    "default targets": {"r": 2},
    "rank-stabilized": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["query", "value"]},
    "rank pattern": {"r": 2, "target_modules": ["query", "dense"], "rank_pattern": {r"layer.0.*\.query": 5, "pooler.dense": 1}},
    "alpha pattern": {"r": 2, "target_modules": ["key", "query"], "alpha_pattern": {"1.attention.self.key": 5, "query": 3}},
    "both patterns, rank-stabilized": {
        "r": 4, "use_rslora": True, "target_modules": ["query", "key"],
        "rank_pattern": {"query": 2}, "alpha_pattern": {"key": 3},
    },
    "float alpha": {"r": 3, "lora_alpha": 2.5, "target_modules": ["query"]},
    "bias lora_only": {"r": 2, "bias": "lora_only", "target_modules": ["query", "output.dense"]},
    "bias all": {"r": 2, "bias": "all", "target_modules": ["value"]},
    "lora_bias": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["value", "intermediate.dense"]},
    "modules_to_save": {"r": 2, "modules_to_save": ["pooler", "output.LayerNorm"], "target_modules": ["value"]},
    "modules_to_save and biases": {"r": 2, "bias": "lora_only", "modules_to_save": ["pooler"], "target_modules": ["key"]},
    "modules_to_save and all biases": {"r": 2, "bias": "all", "modules_to_save": ["pooler"], "target_modules": ["key"]},
    "pattern": {"r": 2, "target_modules": r".*\.layer\.1\.attention\.(self\.(query|key)|output\.dense)"},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "exclude_modules": {"r": 2, "target_modules": ["dense"], "exclude_modules": r".*intermediate.*|pooler\.dense"},
    "layers_to_transform": {"r": 2, "target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    "embeddings": {"r": 2, "lora_alpha": 3, "target_modules": ["word_embeddings", "token_type_embeddings", "query"]},
    "bfloat16": {"r": 2, "target_modules": ["query"], "dtype": torch.bfloat16},
}  # fmt: skip
# Those that run as adapters; the others run with the adapters in the weights, which saves a compilation each.
COMPILED = {"plain", "both patterns, rank-stabilized", "bias all", "lora_bias", "modules_to_save", "embeddings"}
# What is written again as something else: alpha that is no integer goes into B, a branch's bias into the layer's own, biases
# beside whole modules go into whole modules.
REWRITTEN = {"float alpha", "lora_bias", "modules_to_save and all biases"}


def both_ways(home, made, folder, bound=1e-5, outputs_of=Base.ours):
    """peft -> ours -> peft, in outputs, merged weights and bytes; returns what was read."""
    with quiet():
        made.save_pretrained(folder / "theirs")
        if any(parameter.dtype == torch.bfloat16 for parameter in made.parameters()):
            made = peft.PeftModel.from_pretrained(home.hf(), folder / "theirs").eval()  # which computes in float32, as we do
        want = home.theirs(made)
    adapter = read_peft(folder / "theirs", home.model, home.params)
    adapted, adapters = pf.load_peft(folder / "theirs", home.model, home.params)
    assert distance(outputs_of(home, adapted, adapters), want) <= bound

    pf.save_peft(folder / "ours", adapted, adapters, params=home.params, base=str(home.folder), dtype=adapter.dtype)
    assert distance(home.theirs(load_back(folder / "ours", home)), want) <= bound

    again = pf.load_peft(folder / "ours", home.model, home.params)
    pf.save_peft(folder / "again", *again, params=home.params, base=str(home.folder), dtype=adapter.dtype)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (folder / "ours" / name).read_bytes() == (folder / "again" / name).read_bytes(), name

    with quiet():
        made.merge_and_unload().save_pretrained(folder / "merged")
    merged = pf.fold(home.params, adapted.deltas(home.params, adapters))
    ours, theirs = (
        params_to_hf(family_of_model(home.model), merged, home.model.config),
        load_safetensors(folder / "merged/model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=2e-6, rtol=0, err_msg=name)
    return adapter, adapted, adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_on_bert_both_ways(variant, tmp_path):
    home, settings = base("bert"), dict(VARIANTS[variant])
    with quiet():
        made = home.adapted(**settings)
    outputs_of = Base.ours if variant in COMPILED else Base.folded
    adapter, adapted, adapters = both_ways(home, made, tmp_path, outputs_of=outputs_of)
    assert not adapter.heads and not adapter.report.missing and not adapter.report.unexpected
    assert adapted.origin.methods[0].dropout == settings.get("lora_dropout", 0.0)
    assert adapter.dtype == ("bfloat16" if variant == "bfloat16" else "float32")
    fresh = jax.eval_shape(lambda params: adapted.init(jax.random.key(0), params, **home.inputs), home.params)
    assert {p: leaf.shape for p, leaf in trees.paths(fresh).items()} == {
        p: leaf.shape for p, leaf in trees.paths(adapters).items()
    }

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


def test_a_classifier_with_all_biases_both_ways(tmp_path):
    """PEFT saves its bias three times: as the original's, and as the trained one's under two names."""
    home = base("bert_classifier")
    with quiet():
        made = home.adapted(r=2, task_type="SEQ_CLS", bias="all", target_modules=["query"])
    adapter, _, _ = both_ways(home, made, tmp_path)
    assert not adapter.heads
    tensors = load_safetensors(tmp_path / "theirs/adapter_model.safetensors")
    name = "base_model.model.classifier.modules_to_save.bias"
    assert {name, "base_model.model.classifier.original_module.bias"} < tensors.keys()
    write(tmp_path / "torn", adapter.config, tensors | {name: tensors[name] + 1})
    with pytest.raises(ValueError, match="classifier.bias stands twice in the file, with different values"):
        pf.load_peft(tmp_path / "torn", home.model, home.params)
    del tensors["base_model.model.classifier.bias"]
    write(tmp_path / "once", adapter.config, tensors)
    assert_same(pf.load_peft(tmp_path / "once", home.model, home.params)[1], adapter.adapters)


OLD_VIT = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}


def test_vit_in_old_and_in_new_names_is_the_same(tmp_path):
    home = base("vit")
    with quiet():
        home.adapted(r=2, target_modules=["q_proj", "v_proj", "fc1"]).save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new/adapter_config.json").read_text()) | {
        "target_modules": ["query", "value", "intermediate.dense"]
    }
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
    other["encoder"]["layer"]["1"]["mlp"]["up_proj"]["lora_a"] = (
        other["encoder"]["layer"]["1"]["mlp"]["up_proj"]["lora_a"] + 1.0
    )
    done = pf.save_peft(tmp_path / "wide", adapted, other, **options)
    assert done.config["rank_pattern"] == {"encoder\\.layer\\.1\\.mlp\\.weights_in": 4}
    back = pf.load_peft(tmp_path / "wide", home.model, home.params)
    mine, theirs = adapted.deltas(home.params, other).dense().leaves, back[0].deltas(home.params, back[1]).dense().leaves
    for path, array in mine.items():
        np.testing.assert_allclose(theirs[path], array, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "variant", ["rank pattern", "both patterns, rank-stabilized", "bias all", "layers_to_transform", "embeddings"]
)
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


def test_a_head_that_the_model_lacks_is_not_lost(tmp_path):
    home, headless = base("bert_classifier"), base("bert")
    with quiet():
        home.adapted(r=2, task_type="SEQ_CLS", target_modules=["query"]).save_pretrained(tmp_path / "a")
    adapter = read_peft(tmp_path / "a", headless.model, headless.params)
    assert {name: array.shape for name, array in adapter.heads.items()} == {
        "classifier.weight": (3, 16),
        "classifier.bias": (3,),
    }
    with pytest.raises(ValueError, match=r"head that Bert does not have: classifier.*read_peft gives it as \.heads"):
        pf.load_peft(tmp_path / "a", headless.model, headless.params)
    with pytest.warns(UserWarning, match="strict=False|read_peft gives it"):
        pf.load_peft(tmp_path / "a", headless.model, headless.params, strict=False)
