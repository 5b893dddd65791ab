"""Files and folders that appear whole or not at all."""

import errno
import os
import stat

import pytest

from pefusion_jax import files


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), files.new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(FileExistsError, match="is not empty.*--overwrite"), files.new_folder(tmp_path / "out"):
        pass
    with files.new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "other").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["other"]


def test_what_others_wrote_in_the_meantime_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="is not empty"), files.new_folder(out) as folder:
        (folder / "mine").write_text("x")
        out.mkdir()
        (out / "theirs").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_folder_that_cannot_be_replaced_is_refused_first_or_kept(tmp_path, monkeypatch):
    out, real, rename = tmp_path / "out", tmp_path / "real", os.rename
    out.mkdir()
    (out / "precious").write_text("x")
    for refused in ("new", "old"):  # the renaming of the new folder, or of both

        def busy(source, target, refused=refused):
            if str(source).endswith(".partial") or (refused == "old" and source == out):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
            rename(source, target)

        monkeypatch.setattr(os, "rename", busy)
        with pytest.raises(OSError, match="could not be replaced.*is complete in ") as caught:
            with files.new_folder(out, overwrite=True) as folder:
                (folder / "new").write_text("y")
        assert (folder / "new").exists() and str(folder) in str(caught.value) and (out / "precious").exists()
    monkeypatch.setattr(os, "rename", rename)

    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    with files.new_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("y")
    assert (real / "new").exists() and (tmp_path / "link").is_symlink()
    monkeypatch.chdir(real)
    for path, message in ((".", "the working directory"), (tmp_path, "the working directory"), ("/proc", "a mount point")):
        with pytest.raises(FileExistsError, match=message), files.new_folder(path, overwrite=True):
            raise AssertionError("begun")


def test_a_file_is_replaced_whole_and_gets_ordinary_permissions(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), files.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    files.write_json(tmp_path / "new", {"b": 1, "a": tmp_path})
    assert (tmp_path / "new").read_text().startswith('{\n  "a": "')
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def test_what_is_read_is_not_replaced(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for out in ("runs", "runs/a"):
        with pytest.raises(ValueError, match="runs/a, which is read here and would be replaced; name another folder"):
            files.require_apart(tmp_path / out, tmp_path / "elsewhere", tmp_path / "runs" / "a")
    files.require_apart(tmp_path / "runs" / "a" / "deeper", tmp_path / "runs" / "a")
    files.require_apart(tmp_path / "runs" / "ab", tmp_path / "runs" / "a")


def test_room_is_reserved_where_the_system_can(tmp_path, monkeypatch):
    with files.replacing(tmp_path / "file") as file:
        files.reserve(file, 5)
        file.write(b"12345")
    assert (tmp_path / "file").read_bytes() == b"12345"

    def refuse(error):
        def fallocate(*args):
            raise OSError(error, os.strerror(error))

        return fallocate

    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
    with files.replacing(tmp_path / "file") as file:
        files.reserve(file, 5)
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"), files.replacing(tmp_path / "other") as file:
        files.reserve(file, 5)
    assert not (tmp_path / "other").exists()
