"""Merges of folders: against ``fuse`` on loaded tensors, against mergekit's output, in bounded memory, whole or not at all."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import merging
from pefusion_jax.backbones import Bert, BertConfig
from pefusion_jax.cli import main
from pefusion_jax.fusion import named, streamed
from pefusion_jax.fusion.recipe import parse_recipe
from pefusion_jax.interop.manifest import verify
from pefusion_jax.interop.safetensors import load_safetensors, save_safetensors
from pefusion_jax.interop.weights import open_weights
from pefusion_jax.merging import merge_files

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("make_merge", GOLDEN / "make_merge.py")
make_merge = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_merge)
TASKS = ("one", "two", "three")


def write(folder, tensors, config=make_merge.CONFIG):
    folder.mkdir(parents=True)
    save_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def read(folder):
    weights = open_weights(folder)
    return {name: weights[name] for name in weights}


@pytest.fixture(scope="module")
def models():
    return make_merge.models()


@pytest.fixture(scope="module")
def root(models, tmp_path_factory):
    """Tiny Llamas: a base and three others, in float32, and the base and one of them in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    for name, tensors in models.items():
        write(folder / name, tensors)
        half = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in tensors.items()}
        write(folder / f"{name}_bf16", half, {**make_merge.CONFIG, "dtype": "bfloat16"})
    return folder


def recipe(root, head, parameters="", models=TASKS, base="base", each=""):
    listed = "".join(
        f"- {{model: '{os.path.join(root, name)}'{f', parameters: {{{each}}}' if each else ''}}}\n" for name in models
    )
    first = f"base_model: '{root / base}'\n" if base else ""
    return parse_recipe(f"{head}\n{first}models:\n{listed}parameters: {{{parameters}}}\n")


def ours(name, leaf):
    """Matrices as ``[inputs, outputs]``, as everywhere in the library; tables of embeddings as they are."""
    return (f"{name}/embedding", leaf) if "embed" in name else (name, leaf.T)


def by_fuse(method, models, tasks=TASKS, based=True):
    """The merge of loaded models: ``fuse`` on the task vectors of each tensor, or on the tensors."""
    out = {}
    for name, base in models["base"].items():
        trees = []
        for task in tasks:
            path, leaf = ours(name, models[task][name] - base if based else models[task][name])
            trees.append({path: jnp.asarray(leaf)})
        change = np.asarray(pf.fuse(method, trees)[path])
        out[name] = (base if based else 0) + (change if "embed" in name else change.T)
    return out


def same(found, wanted, rtol=2e-6, atol=2e-6):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)


OURS = [
    ("average", "", lambda: pf.fusion.average()),
    ("weighted_average", "normalize: true, weights: 0.5", lambda: pf.fusion.weighted_average([0.5] * 3, normalize=True)),
    ("task_arithmetic", "scale: 0.4", lambda: pf.fusion.task_arithmetic(0.4)),
    ("ties", "trim: per_tensor, density: 0.3, scale: 0.9", lambda: pf.fusion.ties(0.3, 0.9, trim="per_tensor")),
    (
        "ties",
        "trim: per_tensor, elect: count, reduce: sum",
        lambda: pf.fusion.ties(trim="per_tensor", elect="count", reduce="sum"),
    ),
    ("ties", "conform: mergekit, density: 0.5", lambda: pf.fusion.ties(0.5, conform="mergekit")),
    ("magmax", "scale: 0.7", lambda: pf.fusion.magmax(0.7)),
    ("consensus", "threshold: 0.5, agree: 2", lambda: pf.fusion.consensus(0.5, agree=2)),
    ("dare", "density: 0.5", lambda: pf.fusion.dare(0.5, key=3)),
    ("tsv_m", "", lambda: pf.fusion.tsv_m()),
]


@pytest.mark.parametrize(("name", "parameters", "method"), OURS, ids=[f"{name}-{given}" for name, given, _ in OURS])
def test_our_methods_by_name_are_fuse_on_each_tensor(name, parameters, method, models, root, tmp_path):
    if name == "weighted_average":
        given = recipe(root, f"method: {name}", "normalize: true", each="weight: 0.5")
    else:
        given = recipe(root, f"method: {name}", parameters)
    merge_files(given, tmp_path / "out", seed=3)
    # Singular vectors of float32 matrices are as exact as their gaps allow.
    same(read(tmp_path / "out"), by_fuse(method(), models), **({"rtol": 1e-4, "atol": 1e-5} if name == "tsv_m" else {}))


MERGEKIT = {
    "dare_linear": ("density: 0.5, weight: 0.6", lambda: pf.fusion.dare(0.5, weights=[0.6] * 3, key=1, conform="mergekit")),
    "dare_ties": (
        "density: 0.5, weight: 0.6, lambda: 0.5",
        lambda: pf.fusion.dare(0.5, 0.5, then="ties", weights=[0.6] * 3, key=1, conform="mergekit"),
    ),
    "breadcrumbs_ties": (
        "density: 0.5, weight: 0.6, gamma: 0.1",
        lambda: pf.fusion.breadcrumbs(0.5, 0.1, 1.0, then="ties", weights=[0.6] * 3, conform="mergekit"),
    ),
    "della": (
        "density: 0.6, weight: 0.6, epsilon: 0.2",
        lambda: pf.fusion.della(0.6, 0.4, 1.0, weights=[0.6] * 3, key=1, conform="mergekit"),
    ),
    "della_linear": (
        "density: 0.6, weight: 0.6, epsilon: 0.2",
        lambda: pf.fusion.della(0.6, 0.4, 1.0, then="task_arithmetic", weights=[0.6] * 3, key=1, conform="mergekit"),
    ),
}


@pytest.mark.parametrize("name", MERGEKIT)
def test_mergekits_methods_are_ours_in_its_conform_mode(name, models, root, tmp_path):
    parameters, method = MERGEKIT[name]
    merge_files(recipe(root, f"merge_method: {name}", parameters), tmp_path / "out", seed=1)
    same(read(tmp_path / "out"), by_fuse(method(), models))


@pytest.mark.parametrize("case", make_merge.RECIPES)
def test_mergekits_own_results(case, root, tmp_path):
    """Gradients, filters, weights of each model and slices included; see tests/golden/make_merge.py."""
    given = parse_recipe(make_merge.resolved(make_merge.RECIPES[case], root))
    merge_files(given, tmp_path / "out")
    found = read(tmp_path / "out")
    flat = np.concatenate([found[name].reshape(-1) for name in sorted(found)])
    wanted = load_safetensors(GOLDEN / "merge.safetensors", [case])[case]
    np.testing.assert_allclose(flat, wanted, rtol=2e-6, atol=2e-6)
    if case == "passthrough":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
        assert pf.load_pretrained(tmp_path / "out")[0].config.num_hidden_layers == 6


def test_passthrough_copies_one_model_whatever_the_base(models, root, tmp_path):
    """A base_model names whose configuration is copied: mergekit ignores it in slices, and counts it among models."""
    merge_files(recipe(root, "merge_method: passthrough", models=["base"]), tmp_path / "base")
    same(read(tmp_path / "base"), models["base"], 0, 0)
    for models_given in (["one"], ["base", "one"]):
        with pytest.raises(ValueError, match="passthrough copies one model"):
            merge_files(recipe(root, "merge_method: passthrough", models=models_given), tmp_path / "out")
    slices = "".join(f"- sources: [{{model: '{root / name}', layer_range: [0, 2]}}]\n" for name in ("one", "two"))
    for number, base in enumerate(("", f"base_model: '{root / 'one'}'\n", f"base_model: '{root / 'three'}'\n")):
        merge_files(parse_recipe(f"merge_method: passthrough\n{base}slices:\n{slices}"), tmp_path / f"{number}")
        found = read(tmp_path / f"{number}")
        layer = "model.layers.{}.mlp.up_proj.weight".format
        for name, task, own in (
            ("model.embed_tokens.weight", "one", None), (layer(1), "one", layer(1)), (layer(2), "two", layer(0)),
            ("lm_head.weight", "two", None),
        ):  # fmt: skip
            np.testing.assert_array_equal(found[name], models[task][own or name])


def test_densities_of_each_model_draw_as_one_density_would(models, root, tmp_path):
    text = make_merge.resolved(
        "merge_method: dare_linear\nbase_model: base\nmodels:\n- {model: one, parameters: {weight: 1, density: 0.5}}\n"
        "- {model: two, parameters: {weight: 1, density: 1}}\n- {model: three, parameters: {weight: 1, density: 0}}\n",
        root,
    )
    merge_files(parse_recipe(text), tmp_path / "out", seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    vectors = [jnp.asarray((models[task][name] - models["base"][name]).T) for task in TASKS]
    alone = pf.fusion.dare(0.5, weights=[1.0, 0.0, 0.0], key=1, conform="mergekit")
    wanted = models["base"][name] + np.asarray(pf.fuse(alone, [{name: v} for v in vectors])[name] + vectors[1]).T
    np.testing.assert_allclose(read(tmp_path / "out")[name], wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("head", ["merge_method: ties", "merge_method: task_arithmetic", "merge_method: model_stock"])
def test_shards_threads_and_chunks_do_not_matter(head, models, root, tmp_path, monkeypatch):
    parameters = "" if "stock" in head else "weight: 0.5, density: 0.5"
    merge_files(recipe(root, head, parameters), tmp_path / "plain")
    for name, tensors in models.items():
        write(tmp_path / "in" / name, {"x": np.zeros(1, np.float32)})
        (tmp_path / "in" / name / "model.safetensors").unlink()
        names = sorted(tensors, reverse=name == "one")
        weight_map = {path: f"model-{i % 3}.safetensors" for i, path in enumerate(names)}
        for file in set(weight_map.values()):
            save_safetensors(tmp_path / "in" / name / file, {path: tensors[path] for path in names if weight_map[path] == file})
        (tmp_path / "in" / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(streamed, "CHUNK", 32)
    merged = merge_files(recipe(tmp_path / "in", head, parameters), tmp_path / "cut", threads=3, shard_size=2000)
    assert sum(file.startswith("model-") for file in merged.files) > 3
    plain, cut = read(tmp_path / "plain"), read(tmp_path / "cut")
    assert plain.keys() == cut.keys() and all(np.array_equal(plain[name], cut[name]) for name in plain)


def test_half_precision_is_computed_in_float32_and_what_is_no_float_is_copied(models, root, tmp_path):
    halves = {task: read(root / f"{task}_bf16") for task in TASKS}
    for task in TASKS:
        counts = {
            "model.position_ids": np.arange(3) + 3,
            "model.flag": np.asarray([True, False]),
            "model.none": np.zeros((0, 2), np.float32),
        }
        write(tmp_path / task, halves[task] | counts)
    given = recipe(tmp_path, "merge_method: linear", base=None, each="weight: 0.3")
    merged = merge_files(given, tmp_path / "out")
    found = read(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = sum(halves[task][name].astype(np.float64) for task in TASKS) / 3
    np.testing.assert_array_equal(found[name], wanted.astype(np.float32).astype(ml_dtypes.bfloat16))
    assert found["model.position_ids"].tolist() == [3, 4, 5] and found["model.flag"].tolist() == [True, False]
    assert found["model.none"].shape == (0, 2) and merged.copied == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32", "one tensor is"


def test_what_is_written(root, tmp_path, capsys, monkeypatch):
    config = tmp_path / "recipe.yml"
    config.write_text(make_merge.resolved(make_merge.RECIPES["ties"], root))
    out = tmp_path / "out"
    assert main(["merge", str(config), str(out), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not out.exists() and planned["dry_run"] and planned["tensors"] == len(make_merge.shapes())
    assert planned["bytes_read"] == 4 * planned["bytes_written"] and planned["peak_bytes"] > 0
    assert main(["merge", str(config), str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{root / 'base'} (base)" in text and "method:      ties" in text
    assert {file.name for file in out.iterdir()} == set(planned["files"])
    assert (out / "tokenizer.json").read_text() == "{}"
    assert verify(out).ok
    stated = json.loads((out / "manifest.json").read_text())
    assert set(stated["inputs"]) == {str(root / name) for name in make_merge.MODELS}
    assert all(set(entry["sha256"]) == {"config.json"} for entry in stated["inputs"].values())
    card = (out / "README.md").read_text()
    assert "merge_method: ties" in card and "density: 0.4" in card and "sha256" in card
    assert main(["merge", str(config), str(out)]) == 1 and "not empty" in capsys.readouterr().err
    first = (out / "model.safetensors").read_bytes()
    assert main(["merge", str(config), str(out), "--overwrite", "--threads", "1", "--digest-inputs"]) == 0
    stated = json.loads((out / "manifest.json").read_text())
    assert all("model.safetensors" in entry["sha256"] for entry in stated["inputs"].values())
    assert (out / "model.safetensors").read_bytes() == first
    assert pf.load_pretrained(out)[0].config.num_hidden_layers == make_merge.LAYERS
    assert main(["merge", str(config), str(root), "--overwrite"]) == 1
    assert "would be replaced" in capsys.readouterr().err and (root / "base").is_dir()


@pytest.mark.parametrize("moment", ["progress", "write"])
def test_an_interrupted_merge_leaves_nothing(moment, root, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt if moment == "progress" else OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(merging.Writer, "_write", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        merge_files(recipe(root, "method: average"), tmp_path / "out", progress=stop if moment == "progress" else None)
    assert list(tmp_path.iterdir()) == []


def test_refusals_name_file_and_tensor(models, root, tmp_path):
    def refused(message, given, **options):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            merge_files(given, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    one = dict(models["one"])
    norm = one.pop("model.norm.weight")
    write(tmp_path / "short", one)
    write(tmp_path / "long", one | {"model.norm.weight": norm, "score.weight": norm})
    write(tmp_path / "vocabulary", one | {"model.norm.weight": norm, "lm_head.weight": np.zeros((9, 8), np.float32)})
    write(tmp_path / "nan", one | {"model.norm.weight": norm * np.float32("nan")})
    write(tmp_path / "heads", models["one"], {**make_merge.CONFIG, "num_attention_heads": 4})
    write(tmp_path / "eight", one | {"model.norm.weight": norm.astype(ml_dtypes.float8_e4m3fn)})
    linear = "merge_method: task_arithmetic"

    def beside(name):
        return recipe(root, linear, "weight: 1", models=["one", tmp_path / name])

    refused(r"short/model.safetensors: a tensor is missing that .*base has.*model.norm.weight", beside("short"))
    refused(r"base/model.safetensors: a tensor is missing that .*long has.*score.weight", beside("long"))
    refused(
        r"vocabulary/model.safetensors: a tensor has another shape than in .*base.*lm_head.*\[8, 8\].*\[9, 8\].*resize_token",
        beside("vocabulary"),
    )
    refused(r"nan/model.safetensors: weights are NaN or infinite.*model.norm.weight", beside("nan"))
    refused(
        r"nan/model.safetensors: weights are NaN", recipe(root, "merge_method: model_stock", models=["one", tmp_path / "nan"])
    )
    for method, parameters in (("merge_method: ties", "weight: 1, density: 0.5"), ("method: consensus", "")):
        refused(r"nan/model.safetensors: weights are NaN", recipe(root, method, parameters, models=["one", tmp_path / "nan"]))
    refused("differ in num_attention_heads of config.json: 2 and 4", beside("heads"))
    refused("eight/model.safetensors.*float8", beside("eight"))
    refused(
        "not finite in float16.*out_dtype",
        parse_recipe(
            make_merge.resolved(make_merge.RECIPES["linear"].replace("0.6", "1e7"), root).replace(
                "dtype: float32", "parameters: {normalize: false}\nout_dtype: float16"
            )
        ),
    )
    refused("ties compares tensors with each other.*set trim: per_tensor", recipe(root, "method: ties"))
    refused("slerp compares tensors.*merge_method: slerp", recipe(root, "method: slerp", models=["one", "two"]))
    refused("svd needs rank", recipe(root, "method: svd"))
    for method in ("magmax", "ties", "wudi", "task_arithmetic"):
        bad = recipe(root, f"method: {method}", "scale: abc" + (", trim: per_tensor" if method == "ties" else ""))
        refused(rf"{method}\(scale=abc.*\): ", bad, dry_run=True)
    refused("knots takes inner as a pf.fusion.Fusion, not by name", recipe(root, "method: knots", "inner: ties"))
    refused("tall_masks: no tree has the name 'a'; nearest: '.*one'", recipe(root, "method: tall_masks", "task: a"))
    refused("magmax combines changes from a base model", recipe(root, "method: magmax", base=None))
    refused("weight of .*one is missing", recipe(root, "merge_method: ties"))
    refused("normalize must be true or false", recipe(root, "merge_method: ties", "weight: 1, normalize: 1"))
    refused("linear .* has no base_model", recipe(root, "merge_method: linear", "weight: 1"))
    refused("slerp is between", recipe(root, "merge_method: slerp", "t: 0.5"))
    refused("threads must be at least 1", recipe(root, "method: average"), threads=0)


def test_packed_numbers_are_not_merged(models, root, tmp_path):
    """GPTQ's checkpoints hold their weights as int32; a mean of those, or the first one's beside averaged scales, is noise."""
    packed = np.arange(6, dtype=np.int32).reshape(2, 3)
    write(tmp_path / "marked", models["one"], {**make_merge.CONFIG, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match="marked/config.json: quantization_config is set.*dequantize the model first"):
        merge_files(recipe(root, "method: average", models=["one", tmp_path / "marked"]), tmp_path / "out")
    for task, own in (("base", packed), ("one", packed), ("two", packed + np.eye(2, 3, 2, np.int32)), ("three", packed + 0.0)):
        write(tmp_path / task, models[task] | {"model.layers.0.qweight": own})
    write(tmp_path / "wide", models["one"] | {"model.layers.0.qweight": packed.astype(np.int64)})
    merge_files(recipe(tmp_path, "method: average", models=["one"]), tmp_path / "same")
    np.testing.assert_array_equal(read(tmp_path / "same")["model.layers.0.qweight"], packed)
    for other, message in (
        ("two", "a tensor of int32 is not that of .*base.*qweight.*packed weights have to be dequantized"),
        ("three", "not of a kind that goes with int32 in .*base.*expected: int32.*found: .*float"),
        ("wide", "not of a kind that goes with int32 in .*base.*expected: int32.*found: int64"),
    ):
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=f"(?s){other}/model.safetensors: .*{message}"):
                merge_files(recipe(tmp_path, "method: average", models=["one", other]), tmp_path / "out", dry_run=dry_run)
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_a_model_is_one_however_its_folder_is_written(models, root, tmp_path):
    (tmp_path / "link").symlink_to(root / "one")
    linear = "merge_method: task_arithmetic"
    for again in (root / "one", f"{root / 'one'}/", f"{root}/./two/../one", tmp_path / "link"):
        with pytest.raises(ValueError, match=rf"recipe, line 6: models\[2\]: {again} is named twice"):
            merge_files(recipe(root, linear, "weight: 1", models=["one", "two", again]), tmp_path / "out")
    # The base is known by its folder, too; what stands at it has no effect in mergekit.
    for number, base in enumerate(("base", f"{root / 'base'}/")):
        merge_files(recipe(root, linear, "weight: 0.5, normalize: true", models=[base, "one", "two"]), tmp_path / f"{number}")
        same(read(tmp_path / f"{number}"), by_fuse(pf.fusion.task_arithmetic(0.5), models, TASKS[:2]))
    # Slices may take layers of one model again, but a slice may not.
    given = "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources:\n"
    given += f"  - {{model: '{root / 'one'}', layer_range: [0, 2]}}\n"
    merged = merge_files(
        parse_recipe(given + f"- sources: [{{model: '{root / 'one'}/', layer_range: [1, 3]}}]\n"), tmp_path / "cut"
    )
    assert merged.models == (str(root / "one"),)
    with pytest.raises(ValueError, match=r"line 6: slices\[0\].sources\[1\]: .*one/ is named twice \(.*one, as .*one\)"):
        merge_files(parse_recipe(given + f"  - {{model: '{root / 'one'}/', layer_range: [1, 3]}}\n"), tmp_path / "out")


@pytest.mark.parametrize("base", ["base", "base/"])
def test_parameters_at_the_base_of_a_method_of_ours_are_refused(base, root, tmp_path):
    text = f"method: weighted_average\nbase_model: '{root / 'base'}'\nmodels:\n"
    text += f"- {{model: '{root / 'one'}', parameters: {{weight: 1}}}}\n"
    listed = f"- {{model: '{root}/{base}', parameters: {{weight: 0.5}}}}\n"
    with pytest.raises(ValueError, match=r"recipe, line 5: models\[1\]: parameters of base_model \(weight\) have no effect"):
        merge_files(parse_recipe(text + listed), tmp_path / "out")
    merge_files(parse_recipe(text + listed.partition(", parameters")[0] + "}\n"), tmp_path / "out")


GPT2 = ("wte.weight", "wpe.weight", "h.0.attn.weight", "h.1.attn.weight", "ln_f.weight")
NEOX = ("gpt_neox.embed_in.weight", "gpt_neox.layers.0.w", "gpt_neox.layers.1.w", "gpt_neox.final_norm", "embed_out.weight")
OPT = (
    "decoder.embed_tokens.weight",
    "decoder.project_in.weight",
    "decoder.layers.0.w",
    "decoder.layers.1.w",
    "project_out.weight",
)


@pytest.mark.parametrize(("names", "before"), [(GPT2, 3), (NEOX, 2), (OPT, 3)], ids=["gpt2", "neox", "opt"])
def test_slices_take_what_is_before_the_layers_from_the_first_and_the_head_from_the_last(names, before, tmp_path):
    for value, task in enumerate(("one", "two")):
        write(tmp_path / task, {name: np.full((2, 2), value, np.float32) for name in names}, {"num_hidden_layers": 2})
    first, second = (
        {"sources": [{"model": str(tmp_path / task), "layer_range": [i, i + 1]}]} for i, task in enumerate(("one", "two"))
    )
    merge_files(parse_recipe(json.dumps({"merge_method": "passthrough", "slices": [first, second]})), tmp_path / "out")
    found = read(tmp_path / "out")
    assert [found[name].max() for name in names] == [0] * before + [1] * (len(names) - before)


def test_a_head_that_is_called_an_embedding_is_a_matrix():
    for name, shape, table in (
        ("embed_out.weight", (9, 4), False),
        ("unembed.weight", (9, 4), False),
        ("wte.weight", (9, 4), True),
        ("lm.wte_proj", (9, 4), False),
    ):
        path, to_ours, _ = merging._orientation(merging.Tensor(name, (), shape, np.dtype("float32"), None))
        assert path == (f"{name}/embedding" if table else name)
        assert to_ours(jnp.zeros(shape)).shape == (shape if table else shape[::-1])


def test_filters_in_slices_are_for_each_models_own_tensor_and_shared_ones_for_the_results(models, root, tmp_path):
    """Layers 1 of one, then 0 of one with 3 of two; what a layer is there or here decides, as in mergekit."""
    layer = "model.layers.{}.mlp.up_proj.weight".format
    weight = [{"filter": "layers.0.", "value": 4}, {"filter": "layers.3.", "value": 1}, {"value": 2}]
    own = {"parameters": {"weight": weight}}
    first = {"model": str(root / "one"), "layer_range": [1, 2]}
    second = [{"model": str(root / task), "layer_range": [n, n + 1]} for task, n in (("one", 0), ("two", 3))]
    given = {
        "merge_method": "linear",
        "parameters": {"weight": weight, "normalize": [{"filter": "layers.0.", "value": False}, {"value": True}]},
        "slices": [{"sources": [first]}, {"sources": second}],
    }
    merge_files(parse_recipe(json.dumps(given)), tmp_path / "out")
    found = read(tmp_path / "out")
    np.testing.assert_allclose(found[layer(0)], 2 * models["one"][layer(1)], rtol=1e-6)
    wanted = 0.8 * models["one"][layer(0)] + 0.2 * models["two"][layer(3)]
    np.testing.assert_allclose(found[layer(1)], wanted, atol=1e-6)
    given = {
        "method": "weighted_average",
        "parameters": {"normalize": True},
        "slices": [{"sources": [s | own for s in second]}],
    }
    merge_files(parse_recipe(json.dumps(given)), tmp_path / "ours")
    np.testing.assert_allclose(read(tmp_path / "ours")[layer(0)], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["lm_head.extra", "model.embed_tokens.extra", "model.layers.1.mlp.extra"])
def test_slices_refuse_what_only_another_source_has(name, models, root, tmp_path):
    write(tmp_path / "more", models["two"] | {name: models["two"]["model.norm.weight"]})
    first, second = ({"model": str(folder), "layer_range": [0, 4]} for folder in (root / "one", tmp_path / "more"))
    given = {"merge_method": "linear", "slices": [{"sources": [first, second]}], "parameters": {"weight": 1}}
    with pytest.raises(ValueError, match=f"(?s)one/model.safetensors: a tensor is missing that .*more has.*{name}"):
        merge_files(parse_recipe(json.dumps(given)), tmp_path / "out")
    # Layers of another range are not asked for: what they have more of is not lost.
    first["layer_range"], second["layer_range"] = [0, 2], [2, 4]
    if "layers" in name:
        merge_files(parse_recipe(json.dumps(given)), tmp_path / "out")


def test_one_tasks_model_is_had_by_the_name_of_its_folder(models, root, tmp_path):
    merge_files(recipe(root, "method: tall_masks", f"task: '{root / 'two'}'"), tmp_path / "out")
    same(read(tmp_path / "out"), by_fuse(pf.fusion.tall_masks("tree 1"), models))


def test_a_tokenizer_file_that_is_a_link_out_of_its_folder_is_not_passed_on(models, root, tmp_path):
    write(tmp_path / "linked", models["one"])
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "linked" / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="vocab.txt: this is a link that leads out of its folder"):
        merge_files(recipe(root, "method: average", models=["one", "two"], base=tmp_path / "linked"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture_and_a_method_that_needs_no_base(tmp_path):
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, pooler=False
    )
    trees = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), np.ones((1, 2), np.int32))["params"]
        tree = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        pf.save_pretrained(tmp_path / f"bert{seed}", Bert(config), tree)
        trees.append(tree)
    merge_files(recipe(tmp_path, "method: average", models=["bert0", "bert1"], base=None), tmp_path / "out")
    wanted = pf.trees.paths(pf.fuse(pf.fusion.average(), trees))
    found = pf.trees.paths(pf.load_pretrained(tmp_path / "out")[1])
    same({k: np.asarray(v) for k, v in found.items()}, {k: np.asarray(v) for k, v in wanted.items()})


def test_peak_memory_is_a_few_chunks(root, tmp_path):
    """A process merges two models of 200 MB, one tensor of which has 64 MB: its peak grows by a few chunks."""
    block = np.random.default_rng(0).normal(size=2**20).astype(np.float32)
    for number, task in enumerate(("base", "one")):
        moved = block + np.float32(0.001) * np.roll(block, number) if number else block
        tensors = {f"model.layers.{i}.up.weight": np.resize(moved, (4096, 2048)) for i in range(4)}
        write(tmp_path / task, tensors | {"model.embed_tokens.weight": np.resize(moved, (8192, 2048))})
    for size, folder in (("small", root), ("large", tmp_path)):
        for method in ("linear", "ties"):
            base = "" if method == "linear" else f"base_model: '{folder / 'base'}'\n"
            more = f", {{model: '{folder / 'base'}'}}" if method == "linear" else ""
            text = f"merge_method: {method}\n{base}models: [{{model: '{folder / 'one'}'}}{more}]\n"
            (tmp_path / f"{method}_{size}.yml").write_text(
                text + f"parameters: {{weight: 0.5{', density: 0.3' if base else ''}}}\n"
            )
    script = f"""
        from pefusion_jax.merging import merge_files
        def high():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
        for method in ("linear", "ties"):
            merge_files({os.fspath(tmp_path)!r} + f"/{{method}}_small.yml", {os.fspath(tmp_path)!r} + f"/{{method}}_a")
            before = high()
            merged = merge_files({os.fspath(tmp_path)!r} + f"/{{method}}_large.yml", {os.fspath(tmp_path)!r} + f"/{{method}}_b")
            print(high() - before, merged.bytes_written, merged.peak_bytes)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        grown, written, estimate = map(int, line.split())
        assert written > 190e6
        assert grown <= estimate <= 150e6, (grown, estimate)


def test_every_method_without_required_arguments_is_accepted_or_refused_with_the_reason():
    """Names alone: what a recipe may say is what ``pefusion_jax.fusion`` has."""
    from pefusion_jax import fusion

    assert "chain" in fusion.__all__ and "scale" in named.our_parameters("magmax")
    with pytest.raises(ValueError, match="no fusion method 'chain'"):
        named.our_parameters("chain")
    with pytest.raises(ValueError, match="svc needs method; if a recipe cannot hold that"):
        named.our_job("svc", {}, {}, models=["one", "two"], based=True)
