"""Reading weights: shards and their index, dtypes, placement, strictness, and the memory that it takes."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pefusion_jax import trees
from pefusion_jax.backbones import Bert, BertConfig, stack_layers
from pefusion_jax.interop import WeightFileError, load_pretrained, load_safetensors, save_pretrained, save_safetensors
from pefusion_jax.interop.pretrained import open_checkpoint

CONFIG = BertConfig(
    vocab_size=24, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8
)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def made(params, tmp_path_factory):
    """``(single file, shards)``, to be copied before they are damaged."""
    root = tmp_path_factory.mktemp("weights")
    save_pretrained(root / "single", Bert(CONFIG), params)
    save_pretrained(root / "shards", Bert(CONFIG), params, max_shard_bytes=2500)
    return root


@pytest.fixture
def shards(made, tmp_path):
    return shutil.copytree(made / "shards", tmp_path / "model")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in trees.paths(a).items():
        np.testing.assert_array_equal(leaf, trees.paths(b)[path], err_msg=path)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", ["single", "shards"])
def test_one_file_and_shards_are_the_same_model(kind, scan_layers, made, params):
    if kind == "shards":
        assert len(list((made / kind).glob("model-*.safetensors"))) >= 3
    model, loaded = load_pretrained(made / kind, scan_layers=scan_layers)
    assert model == Bert(CONFIG, scan_layers=scan_layers)
    same(loaded, stack_layers(params) if scan_layers else params)


def test_transformers_reads_our_shards_and_we_read_theirs(made, tmp_path):
    reference, report = transformers.BertModel.from_pretrained(made / "shards", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    reference.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / INDEX).is_file()
    same(load_pretrained(tmp_path)[1], load_pretrained(made / "single")[1])


def test_a_folder_of_the_hugging_face_cache_is_made_of_links(made, tmp_path, params):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((made / "shards").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    same(load_pretrained(snapshot)[1], params)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/out.safetensors", "sub/out.safetensors", "..\\out.safetensors", "out.bin", "", ".."]
)
def test_names_of_shards_stay_in_the_folder(name, shards):
    shutil.copy(next(shards.glob("model-*.safetensors")), shards.parent / "out.safetensors")

    def point_outside(index):
        for tensor in index["weight_map"]:
            index["weight_map"][tensor] = name

    edit_index(shards, point_outside)
    with pytest.raises(WeightFileError, match="not a plain file name") as caught:
        load_pretrained(shards)
    assert INDEX in str(caught.value)


@pytest.mark.parametrize("file", ["model-00001-of-", "config.json", INDEX])
def test_links_that_lead_out_of_the_folder(file, shards):
    path = next(path for path in shards.iterdir() if path.name.startswith(file))
    outside = shards.parent / ("out" + path.suffix)
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(WeightFileError, match="link that leads out of its folder"):
        load_pretrained(shards)


def test_broken_shards_and_indexes(shards, made):
    def fails(match, change=None):
        if change is not None:
            edit_index(shards, change)
        with pytest.raises(WeightFileError, match="(?s)" + match):
            load_pretrained(shards)
        shutil.copy(made / "shards" / INDEX, shards / INDEX)

    fails("total_size", lambda index: index["metadata"].update(total_size=7))
    fails("weight_map must map", lambda index: index.update(weight_map=[]))
    fails("weight_map must map", lambda index: index.update(weight_map={"a": 3}))
    of_first = sorted(shards.glob("model-*"))[0].name
    fails("does not hold.*no.such", lambda index: index["weight_map"].update({"no.such": of_first}))
    fails("does not name.*tensor: embeddings", lambda index: index["weight_map"].pop("embeddings.LayerNorm.bias"))
    (shards / INDEX).write_text('{"weight_map": {}, "weight_map": {}}')
    fails("stands twice")
    shard = sorted(shards.glob("model-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    fails("cut short")
    shard.unlink()
    fails("a shard is missing.*" + shard.name)
    shard.write_bytes(whole)
    first = sorted(shards.glob("model-*"))[0]
    save_safetensors(shard, load_safetensors(first))
    fails("stands in two shards")


def test_tensors_that_do_not_fit(shards):
    shard = sorted(shards.glob("model-*"))[0]
    tensors = load_safetensors(shard)
    name = "embeddings.LayerNorm.bias" if "embeddings.LayerNorm.bias" in tensors else next(iter(tensors))
    save_safetensors(shard, {**tensors, name: tensors[name].astype(np.int32)})
    with pytest.raises(ValueError, match=f"{name} is int32"):
        load_pretrained(shards)
    save_safetensors(shard, {**tensors, name: np.full_like(tensors[name], np.inf)})
    with pytest.raises(WeightFileError, match=f"NaN or infinite.*\n.*{name}"):
        load_pretrained(shards)


def test_not_strict_says_what_it_left_out_and_what_it_drew(made, tmp_path, params):
    folder = shutil.copytree(made / "single", tmp_path / "model")
    tensors = load_safetensors(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"], tensors["encoder.layer.1.output.LayerNorm.weight"]
    save_safetensors(folder / "model.safetensors", {**tensors, "other.extra": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"2 missing: .*\n.*1 unexpected: other.extra"):
        load_pretrained(folder)
    report = open_checkpoint(folder).report
    assert len(report.matched) == len(trees.paths(params)) - 2 and report.unexpected == ["other.extra"]
    for scan_layers in (False, True):
        with pytest.warns(UserWarning, match="2 missing: encoder.layer.1.output"):
            _, loaded = load_pretrained(folder, strict=False, scan_layers=scan_layers)
        layers = loaded["encoder"]["layer"]
        layer = jax.tree.map(lambda leaf: leaf[1], layers) if scan_layers else layers["1"]
        np.testing.assert_array_equal(layer["output"]["LayerNorm"]["scale"], np.ones(8))
        assert 0.005 < float(layer["output"]["dense"]["kernel"].std()) < 0.04
        known = trees.paths(stack_layers(params) if scan_layers else params)
        np.testing.assert_array_equal(trees.paths(loaded)["pooler/dense/kernel"], known["pooler/dense/kernel"])
    save_safetensors(folder / "model.safetensors", {"other": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="0 of .* names match"):
        load_pretrained(folder, strict=False)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_auto_is_the_dtype_of_the_file(stored, params, tmp_path):
    save_pretrained(tmp_path / "model", Bert(CONFIG), params, dtype=stored)
    model, loaded = load_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == jnp.dtype(stored) and {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(stored)}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == stored


def test_auto_needs_one_dtype(made, tmp_path):
    folder = shutil.copytree(made / "single", tmp_path / "model")
    tensors = load_safetensors(folder / "model.safetensors")
    tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"].astype(np.float16)
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="float16, float32; name one"):
        load_pretrained(folder, dtype="auto")
    with pytest.raises(ValueError, match="dtype='int4x' is not a dtype"):
        load_pretrained(folder, dtype="int4x")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_leaves_are_placed_with_the_sharding_that_is_asked_for(scan_layers, made, params):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())

    def sharding(path, shape):
        return rows if path.endswith("word_embeddings/embedding") else whole

    _, loaded = load_pretrained(made / "shards", sharding=sharding, scan_layers=scan_layers)
    table = loaded["embeddings"]["word_embeddings"]["embedding"]
    assert table.sharding == rows and table.addressable_shards[0].data.shape == (3, 8)
    assert loaded["pooler"]["dense"]["kernel"].sharding == whole
    same(loaded, stack_layers(params) if scan_layers else params)
    _, on_third = load_pretrained(made / "single", sharding=jax.devices()[3])
    assert {leaf.device for leaf in jax.tree.leaves(on_third)} == {jax.devices()[3]}
    with pytest.raises(ValueError, match=r"embeddings/.* does not go with the sharding"):
        load_pretrained(made / "single", sharding=NamedSharding(mesh, PartitionSpec(None, None, "x")))


def test_loading_is_silent(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(made / "shards", scan_layers=True)


@pytest.mark.parametrize("options", ["", "dtype='bfloat16'"])
def test_peak_memory_is_the_model_and_one_tensor(options, made, tmp_path):
    """A process loads 384 MB in many tensors of 16 MB or less; its peak grows by the model and the largest tensor."""
    config = BertConfig(
        vocab_size=4096, hidden_size=1024, num_hidden_layers=7, num_attention_heads=4, intermediate_size=4096, pooler=False
    )
    shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    save_pretrained(tmp_path / "model", Bert(config), ones, max_shard_bytes=10**8)
    script = f"""
        import jax, numpy as np
        from pefusion_jax import load_pretrained
        load_pretrained({os.fspath(made / "single")!r}, {options})  # imports
        def high():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
        before = high()
        model, params = load_pretrained({os.fspath(tmp_path / "model")!r}, {options})
        jax.block_until_ready(params)
        leaves = jax.tree.leaves(params)
        print(high() - before, sum(leaf.nbytes for leaf in leaves), max(leaf.size for leaf in leaves) * 4)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    grown, model_bytes, largest = map(int, done.stdout.split())
    assert model_bytes > (150e6 if options else 3e8)
    # 4 MB are for what Python and JAX themselves allocate on the way: headers, tables, threads.
    assert grown <= model_bytes + largest + 4 * 2**20, (grown, model_bytes, largest)
