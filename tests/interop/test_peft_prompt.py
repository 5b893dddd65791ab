"""Prompts against peft itself, both ways, and all that is no prompt for a model, refused by name."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from peft_cases import assert_same, base, quiet, write

import pefusion_jax as pf
from pefusion_jax import checkpoints, trees
from pefusion_jax.backbones.names import Entry
from pefusion_jax.interop import load_safetensors, peft_prompt, read_peft
from pefusion_jax.interop.saving import family_of_model

N = 3
TASKS = {"bert": "FEATURE_EXTRACTION", "bert_classifier": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def prompted(home, task_type, **settings):
    """A peft model with a random prompt, and a random head if it trains one."""
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=N, **settings)
    model = peft.get_peft_model(home.hf(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def loaded(folder, home):
    """What peft reads, without a word but transformers' about a name of its own."""
    hf = home.hf()
    with quiet() as said:
        model = peft.PeftModel.from_pretrained(hf, folder).eval()
    assert [str(warning.message) for warning in said if "is_gradient_checkpointing" not in str(warning.message)] == []
    return model


def theirs(model, inputs):
    with torch.no_grad(), quiet():
        out = model(**{name: torch.tensor(array).long() for name, array in inputs.items()})
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def ours(home, adapted, adapters, params=None, **inputs):
    run = jax.jit(lambda p, a, i: adapted.apply(p, a, **i))
    out = run(home.params if params is None else params, adapters, home.inputs | inputs)
    return np.asarray(out.last_hidden_state if out.logits is None else out.logits)


def close(mine, other):
    """Their outputs begin with the prompt's positions, where there are such."""
    other = other[:, -mine.shape[1] :]
    assert mine.shape == other.shape
    np.testing.assert_allclose(mine, other, atol=1e-5 * max(1.0, np.abs(other).max()), rtol=0)


class Doubled:
    """A generator of one set of adapters."""

    tasks = ()

    def init(self, key, adapters, params, layout):
        return trees.nest(adapters)

    def make(self, tree, params, layout, task):
        return {path: 2 * leaf for path, leaf in trees.flat(tree).items()}

    def trained(self, tree):
        return tree

    moving = trained


def save(folder, home, adapted, tree, **options):
    return pf.save_peft(folder, adapted, tree, **({"params": home.params, "base": str(home.folder)} | options))


@pytest.mark.parametrize("kind", TASKS)
def test_peft_and_we_mean_the_same_both_ways(kind, tmp_path):
    home = base(kind)
    with quiet():
        model = prompted(home, TASKS[kind], num_transformer_submodules=1)
        model.save_pretrained(tmp_path / "theirs")
    adapted, adapters = pf.load_peft(tmp_path / "theirs", home.model, home.params)
    want = theirs(model, home.inputs)
    close(ours(home, adapted, adapters), want)

    headed = {"task_type": "SEQ_CLS"} if kind == "bert_classifier" else {}
    done = save(tmp_path / "ours", home, adapted, adapters, **headed)
    assert done.config["task_type"] == TASKS[kind] and len(done.modules) == 1
    np.testing.assert_array_equal(theirs(loaded(tmp_path / "ours", home), home.inputs), want)
    with quiet():
        stored = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=list))
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert written.keys() == stored.keys()
    different = {name for name in stored if written[name] != stored[name]}
    assert different <= {"inference_mode", "base_model_name_or_path", "peft_version", "modules_to_save"}
    first, second = (load_safetensors(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert_same(pf.load_peft(tmp_path / "ours", home.model, home.params)[1], adapters)


def test_the_decoders_half_that_peft_never_looks_at_is_left_out(tmp_path):
    home = base("t5")
    with quiet():
        model = prompted(home, "SEQ_2_SEQ_LM")  # two submodules, by default
        model.save_pretrained(tmp_path / "theirs")
    want = theirs(model, home.inputs)
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight[N:] += 9
    np.testing.assert_array_equal(theirs(model, home.inputs), want)
    (stored,) = load_safetensors(tmp_path / "theirs/adapter_model.safetensors").values()
    adapter = read_peft(tmp_path / "theirs", home.model, home.params)
    assert stored.shape == (2 * N, 16)
    np.testing.assert_array_equal(adapter.adapters["shared"]["prompt"], stored[:N])


def test_a_head_that_the_model_lacks_is_not_lost(tmp_path):
    home, headless = base("bert_classifier"), base("bert")
    with quiet():
        prompted(home, "SEQ_CLS").save_pretrained(tmp_path / "a")
    adapter = read_peft(tmp_path / "a", headless.model, headless.params)
    assert {name: head.shape for name, head in adapter.heads.items()} == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    assert adapter.methods == (pf.PromptTuning(length=N),) and adapter.dtype == "float32"
    assert adapter.report.matched == ("embeddings.word_embeddings",) or "bert." in adapter.report.matched[0]
    with pytest.raises(ValueError, match="head that Bert does not have: classifier"):
        pf.load_peft(tmp_path / "a", headless.model, headless.params)
    with pytest.raises(ValueError, match="trained head .classifier or score.*FEATURE_EXTRACTION"):
        tree = {"embeddings": adapter.adapters["embeddings"]}
        save(tmp_path / "b", headless, pf.adapt(headless.model, adapter.methods), tree, task_type="SEQ_CLS")


@pytest.fixture(scope="module")
def drawn():
    """A model with a prompt and, in the scan layout too, a moved pooler."""
    home = base("bert")
    methods = (pf.PromptTuning(length=N), pf.FullFineTuning(targets=r"(pooler/dense|encoder/.*/output/LayerNorm)/.*"))
    adapted = pf.adapt(home.model, methods)
    shapes = jax.eval_shape(lambda p: adapted.init(jax.random.key(0), p, **home.inputs), home.params)
    rng = np.random.default_rng(0)
    return home, adapted, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def test_whole_modules_beside_a_prompt_in_either_layout(drawn, tmp_path):
    home, adapted, tree = drawn
    done = save(tmp_path / "ours", home, adapted, tree)
    assert "pooler.dense" in done.config["modules_to_save"] and (tmp_path / "ours/README.md").is_file()
    model = loaded(tmp_path / "ours", home)
    loop = pf.load_peft(tmp_path / "ours", home.model, home.params)
    close(ours(home, *loop), theirs(model, home.inputs))
    assert_same(loop[1], tree, atol=1e-6)  # of a sum with the base there is no more
    stacked, params = home.scanned
    scan = pf.load_peft(tmp_path / "ours", stacked, params)
    save(tmp_path / "scan", home, *scan, params=params)
    weights = [load_safetensors(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "scan")]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_numbers_of_other_types_and_what_a_generator_makes(drawn, tmp_path):
    home = drawn[0]
    adapted = pf.adapt(home.model, pf.PromptTuning(length=N))
    prompt = {"embeddings": drawn[2]["embeddings"]}
    save(tmp_path / "half", home, adapted, prompt, dtype="bfloat16")
    adapter = read_peft(tmp_path / "half", home.model, home.params)
    assert adapter.dtype == "bfloat16" and jax.tree.leaves(adapter.adapters)[0].dtype == np.float32
    assert_same(adapter.adapters, prompt, atol=0.01)
    with pytest.raises(ValueError, match="prompt_embeddings is not finite in float16; write it as bfloat16"):
        save(tmp_path / "none", home, adapted, jax.tree.map(lambda leaf: leaf * 1e9, prompt), dtype="float16")

    one = pf.generate(adapted, Doubled())
    theta = one.init(jax.random.key(0), home.params, **home.inputs)
    save(tmp_path / "made", home, one, theta)
    assert_same(pf.load_peft(tmp_path / "made", home.model, home.params)[1], one.materialise(home.params, theta))
    shared = pf.generate(adapted, pf.generators.MPT(tasks=("a", "b")))
    tree = shared.init(jax.random.key(0), home.params, **home.inputs)
    with pytest.raises(ValueError, match=r"one: save_peft\(FOLDER, adapted, generated.materialise\(params, tree, 'a'\)"):
        save(tmp_path / "none", home, shared, tree)
    save(tmp_path / "a", home, adapted, shared.materialise(home.params, tree, "a"))
    assert_same(pf.load_peft(tmp_path / "a", home.model, home.params)[1], shared.materialise(home.params, tree, "a"))


def test_what_peft_cannot_store_is_refused_with_the_remedy(drawn, tmp_path):
    home, _, tree = drawn
    adapted, prompt = pf.adapt(home.model, pf.PromptTuning(length=N)), {"embeddings": tree["embeddings"]}

    def refused(match, model=adapted, tree=prompt, **options):
        with pytest.raises(ValueError, match=match):
            save(tmp_path / "none", home, model, tree, **options)

    mixed = pf.adapt(home.model, (pf.PromptTuning(length=N), pf.LoRA(rank=1, targets=r".*/query")))
    refused("one type of adapter in a folder, and this model has PromptTuning beside LoRA.*base=BASE", mixed)
    for mode in ("network", "layer"):
        linear = pf.linearize(adapted, prompt, mode)
        refused(rf"linearized in mode='{mode}'.*jax.tree.map\(jnp.add, adapters0, tree\)", linear, as_layer=True)
    refused("a Delta holds none: fuse prompts as trees", tree=pf.Delta({}))
    refused("adapters to be saved: .*NaN", tree=jax.tree.map(lambda leaf: leaf * np.nan, prompt))
    refused(r"\[3, 16\], where PromptTuning\(length=4\)", pf.adapt(home.model, pf.PromptTuning(length=4)))
    elsewhere = pf.PromptTuning(length=N, targets=r".*/token_type_embeddings")
    moved = {"embeddings": {"token_type_embeddings": tree["embeddings"]["word_embeddings"]}}
    refused("prompts at 'embeddings/token_type_embeddings'.*own targets", pf.adapt(home.model, elsewhere), moved)
    bare = pf.adapt(home.model, (pf.PromptTuning(length=N), pf.FullFineTuning(targets="embeddings/word_embeddings/.*")))
    table = {
        "embeddings": {"word_embeddings": {"embedding_delta": np.ones((31, 16)), **prompt["embeddings"]["word_embeddings"]}}
    }
    refused("word_embeddings. was moved beside the prompt, which PEFT stores but does not use.*fold", bare, table)
    refused("prompts at no place", tree={})
    refused("a leaf 'embeddings/word_embeddings/lora_a'", tree={"embeddings": {"word_embeddings": {"lora_a": np.ones(2)}}})
    refused("task_type='SEQ_TO_SEQ' is not one of FEATURE_EXTRACTION, CAUSAL_LM", task_type="SEQ_TO_SEQ")
    assert not list(tmp_path.iterdir())


CONFIG = {
    "peft_type": "PROMPT_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": N, "token_dim": 16,
    "num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2,
}  # fmt: skip
TABLE = "base_model.embeddings.word_embeddings.weight"
HEAD = "base_model.pooler.dense.weight"
BAD = [
    ({"token_dim": 32}, {}, "token_dim=32 in adapter_config.json, but the word embeddings of this BERT model are 16 wide"),
    ({}, {"prompt_embeddings": np.zeros((N, 8), np.float32)}, r"has the shape \[3, 8\], but .* need \[3, 16\]"),
    ({"num_virtual_tokens": 5}, {}, r"has the shape \[3, 16\], but num_virtual_tokens=5 and .*=1 in adapter_config.json"),
    ({"num_transformer_submodules": 2}, {}, "goes with task_type='SEQ_2_SEQ_LM'.*Train it with num_transformer_submodules=1"),
    ({"num_transformer_submodules": 2, "task_type": "SEQ_2_SEQ_LM"}, {}, r"need \[6, 16\]"),
    ({"num_transformer_submodules": 3}, {}, "num_transformer_submodules=3 should be 1, 2 or null"),
    ({"num_virtual_tokens": None}, {}, "num_virtual_tokens=None should be an integer"),
    ({"num_virtual_tokens": ...}, {}, "num_virtual_tokens is missing; it should be an integer"),
    ({"num_layers": 0}, {}, "num_layers=0 should be"),
    ({"prompt_tuning_init": 3}, {}, "prompt_tuning_init=3 should be a string"),
    ({"r": 8}, {}, "r=8 is not known here"),
    ({"modules_to_save": ["(x"]}, {}, "plain names"),
    ({"modules_to_save": ["pooler"]}, {}, "in the model only: pooler.dense.weight, pooler.dense.bias"),
    ({}, {"prompt_embeddings": None}, "no tensor prompt_embeddings, it has x; save"),
    ({}, {"prompt_embeddings": np.full((N, 16), np.nan, np.float32)}, "NaN|not finite"),
    ({}, {"prompt_embeddings": np.zeros((N, 16), np.int32)}, "is int32; adapters are float32"),
    ({}, {"encoder.prompt": np.zeros((N, 16), np.float32)}, "in the file only: encoder.prompt"),
    ({}, {HEAD: np.zeros((16, 16), np.float32)}, f"in the file only: {HEAD}"),
    ({"modules_to_save": ["word_embeddings"]}, {TABLE: np.zeros((31, 16), np.float32)}, "which PEFT stores but does not use"),
    ({"modules_to_save": ["pooler"]}, {HEAD: np.zeros((16, 8), np.float32)}, "pooler.dense.weight has the shape"),
]  # fmt: skip


@pytest.mark.parametrize("fields, tensors, match", BAD, ids=[case[2][:30] for case in BAD])
def test_a_folder_that_is_no_prompt_for_the_model_is_refused(fields, tensors, match, tmp_path):
    home = base("bert")
    config = {name: value for name, value in (CONFIG | fields).items() if value is not ...}
    arrays = {"prompt_embeddings": np.ones((N, 16), np.float32)} | tensors
    arrays = {
        name if array is not None else "x": np.ones((1,), np.float32) if array is None else array
        for name, array in arrays.items()
    }
    write(tmp_path, config, arrays)
    with pytest.raises(ValueError, match=match):
        pf.load_peft(tmp_path, home.model, home.params)


def test_a_model_without_one_table_of_words_is_refused(tmp_path):
    home = base("vit")
    write(tmp_path, CONFIG, {"prompt_embeddings": np.ones((N, 16), np.float32)})
    with pytest.raises(ValueError, match="word embeddings, of which this ViT model has none"):
        pf.load_peft(tmp_path, home.model, home.params)
    family = family_of_model(base("t5").model)
    table = family.table(base("t5").model.config)
    twice = table | {"decoder/embed_tokens/embedding": Entry("decoder.embed_tokens.weight", table["shared/embedding"].shape)}
    with pytest.raises(ValueError, match="has several: shared, decoder/embed_tokens"):
        peft_prompt.word_embeddings(family._replace(table=lambda config: twice), None)


def test_inspect_and_convert(tmp_path):
    home = base("bert")
    folder = write(tmp_path / "p", CONFIG, {"prompt_embeddings": np.ones((N, 16), np.float32)})
    found = checkpoints.inspect(folder)
    assert found["shapes"] == {"prompt_embeddings": [N, 16]} and found["config"]["num_virtual_tokens"] == N
    with pytest.raises(ValueError, match="has a prompt: positions in front of the tokens, which no weights put there.*LoRA"):
        checkpoints.convert(folder, tmp_path / "merged", base=str(home.folder))
    checkpoints.convert(folder, tmp_path / "run", to="run", base=str(home.folder))
    checkpoints.convert(tmp_path / "run", tmp_path / "again", to="peft")
    adapted, again = pf.load_peft(tmp_path / "again", home.model, home.params)
    assert trees.paths(again).keys() == {"embeddings/word_embeddings/prompt"} and np.all(jax.tree.leaves(again)[0] == 1)
    assert adapted.origin.methods == (pf.PromptTuning(length=N),)
