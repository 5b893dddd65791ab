"""A folder's manifest: what it holds, from what it was made, with what.

``manifest.json`` beside the files::

    {"format": "pefusion-manifest-1",
     "files":    {NAME: {"sha256": HEX, "bytes": N}},       every file of the folder but the manifest itself
     "inputs":   {NAME: {"source": TEXT, "sha256": {FILE: HEX}}},
     "versions": {"pefusion_jax": "0.1.0", "jax": ...},
     "settings": {...}}                                     the resolved configuration of what wrote it

Names are plain relative paths; a manifest never makes us read outside its folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pefusion_jax import files
from pefusion_jax.interop.headers import WeightFileError, decode_json

NAME = "manifest.json"
FORMAT = "pefusion-manifest-1"
MAX_BYTES = 16 * 2**20
_PACKAGES = ("pefusion_jax", "jax", "flax", "numpy", "transformers")


class Verdict(NamedTuple):
    """How a folder compares with its manifest; each a list of file names.

    Attributes:
      intact: their bytes are those of the manifest.
      changed: there, with other bytes.
      missing: in the manifest only.
      unlisted: in the folder only.
    """

    intact: list[str]
    changed: list[str]
    missing: list[str]
    unlisted: list[str]

    @property
    def ok(self) -> bool:
        """Whether every file is intact and there are no others."""
        return not (self.changed or self.missing or self.unlisted)


def write_manifest(
    folder: Path,
    *,
    inputs: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Writes the manifest of everything that is in a folder now.

    Args:
      folder: the folder.
      inputs: ``{name: {"source": text, "sha256": {file: digest}}}``, see :func:`describe_input`.
      settings: JSON-compatible resolved configuration.
      known: SHA-256 of files whose digests were taken while they were written; they are not read again.
    """
    digests = {name: (known or {}).get(name) or sha256(folder / name) for name in _listed(folder)}
    content = {
        "format": FORMAT,
        "files": {name: {"sha256": digest, "bytes": (folder / name).stat().st_size} for name, digest in digests.items()},
        "inputs": dict(inputs or {}),
        "versions": versions(),
        "settings": dict(settings or {}),
    }
    files.write_json(folder / NAME, content)


def verify(folder: str | os.PathLike[str]) -> Verdict:
    """Recomputes the digests of a folder and compares them with its manifest.

    Raises:
      FileNotFoundError: if there is no manifest.
      WeightFileError: if the manifest is damaged or names something outside the folder.
    """
    folder = Path(folder)
    stated = read_manifest(folder)["files"]
    here = list(_listed(folder))
    intact: list[str] = []
    changed: list[str] = []
    for name in stated:
        if name in here:
            same = (folder / name).stat().st_size == stated[name]["bytes"] and sha256(folder / name) == stated[name]["sha256"]
            (intact if same else changed).append(name)
    return Verdict(
        intact=intact,
        changed=changed,
        missing=[name for name in stated if name not in here],
        unlisted=[name for name in here if name not in stated],
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a folder. Raises as :func:`verify`."""
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {NAME}: it was not written by 'pefusion convert' or 'merge', save_pretrained or save_peft, "
            "or the manifest was lost"
        )
    if path.stat().st_size > MAX_BYTES:
        raise WeightFileError(path, "the manifest is too large", expected=f"{MAX_BYTES} bytes", found=path.stat().st_size)
    content = decode_json(path.read_bytes(), path, "the manifest")
    if content.get("format") != FORMAT:
        raise WeightFileError(
            path, "unknown format", expected=FORMAT, found=content.get("format"), remedy="update pefusion_jax to read it"
        )
    stated = content.get("files")
    if not isinstance(stated, dict):
        raise WeightFileError(path, "files must map names to digests", found=stated)
    for name, entry in stated.items():
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or "\\" in name or "\0" in name or str(plain) != name or name == NAME:
            raise WeightFileError(
                path, "a file name leads out of the folder or is not plain", found=name, remedy="do not use it"
            )
        if not name.isprintable():
            raise WeightFileError(path, "a file name has characters that cannot be printed", found=name, remedy="do not use it")
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or type(entry.get("bytes")) is not int:
            raise WeightFileError(path, "an entry must have sha256 and bytes", tensor=name, found=entry)
    return content


def describe_input(source: str, folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """The entry of an input: where it was said to come from, and digests of its configurations and, if wanted, its weights."""
    suffixes = ("config.json", ".safetensors") if weights else ("config.json",)
    return {
        "source": source,
        "sha256": {name: sha256(folder / name) for name in _listed(folder) if name.endswith(suffixes)},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> Iterator[str]:
    """Files below a folder in order, without the manifest; links to folders are not followed."""
    found = []
    for root, _, names in os.walk(folder, followlinks=False):
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if relative != NAME and path.is_file():
                found.append(relative)
    return iter(sorted(found))
