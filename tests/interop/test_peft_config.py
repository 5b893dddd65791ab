"""Which modules a configuration selects, against peft; and all that is refused, by name."""

import copy

import jax
import numpy as np
import peft
import pytest
from peft_cases import base, quiet, write

import pefusion_jax as pf
from pefusion_jax.interop import read_peft
from pefusion_jax.interop.peft_config import Selection, validate
from pefusion_jax.interop.peft_names import columns_of
from pefusion_jax.interop.saving import family_of_model

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
    {"layers_to_transform": [0], "target_modules": ["encoder.layer.1.attention.self.key", "value"]},
    {"layers_to_transform": [0], "target_modules": ["bert.encoder.layer.1.attention.self.key", "pooler.dense", "value"]},
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
        ("t5", ["q", "v"]), ("t5", ["SelfAttention.q", "wo"]), ("t5", r".*decoder.*EncDecAttention\.(q|k)"),
        ("t5", "all-linear"),
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
    "extra tensor": (
        lambda t: t | {"base_model.model.x.lora_A.weight": t[FIRST], "base_model.model.x.lora_B.weight": t[FIRST].T},
        "1 in the file only: base_model.model.x",
    ),
    "extra parameter": (lambda t: t | {"base_model.model.pooler.dense.bias": np.zeros(16, np.float32)}, "1 in the file only"),
    "path as a name": (lambda t: t | {"../../etc/passwd": t[FIRST]}, "1 in the file only: ../../etc/passwd"),
    "missing module": (
        lambda t: without(t, "layer.1.attention.self.key"),
        "1 in the model only: encoder.layer.1.attention.self.key",
    ),
    "missing B": (lambda t: without(t, "layer.1.attention.self.key.lora_B"), "lack LoRA's factor B"),
    "wrong inputs": (lambda t: t | {FIRST: np.zeros((2, 15), np.float32)}, r"A has the shape \[2, 15\].* needs \[2, 16\]"),
    "wrong rank": (lambda t: t | {FIRST: np.zeros((3, 16), np.float32)}, "A has rank 3, but .* give rank 2"),
    "three axes": (lambda t: t | {FIRST: np.zeros((2, 16, 1), np.float32)}, r"A has the shape \[2, 16, 1\]"),
    "transposed": (lambda t: t | {FIRST: t[FIRST].T}, "A has rank 16"),
    "no prefix": (
        lambda t: {key.removeprefix("base_model.model."): array for key, array in t.items()},
        "no module of this BERT model",
    ),
    "adapter's name in it": (lambda t: {key.replace("_A.", "_A.default."): array for key, array in t.items()}, "factor A"),
    "other model": (
        lambda t: {key.replace("encoder.layer", "h"): array for key, array in t.items()},
        "Is it for another model",
    ),
    "NaN": (
        lambda t: t | {FIRST: np.full((2, 16), np.nan, np.float32)},
        r"NaN or infinite\n.*layer.0.attention.self.query.lora_A",
    ),
    "integers": (lambda t: t | {FIRST: np.zeros((2, 16), np.int32)}, "is int32; adapters are float32"),
    "float64": (lambda t: t | {FIRST: np.zeros((2, 16))}, "is float64; adapters are float32"),
    "DoRA": (
        lambda t: t | {FIRST.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(16, np.float32)},
        "1 in the file only",
    ),
    "empty": (lambda t: {}, "no module of this BERT model is adapted"),
}


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
        ("[]", "not a JSON object"), ("{", "JSON"), ('{"r": 1, "r": 2}', "stands twice"), ('{"r": NaN}', "NaN is not JSON"),
        ("{" + ",".join(f'"{i}":0' for i in range(60_000)) + ',"59999":1}', "'59999' stands twice"),
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
