"""Loads pretrained models and tokenizers from folders in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones import FAMILIES, Family, stack_layers
from pefusion_jax.backbones.family import canonical, require_equal
from pefusion_jax.backbones.names import Report, Table, compare, parameter_shape, require_fit
from pefusion_jax.interop import hub
from pefusion_jax.interop.headers import WeightFileError, decode_json
from pefusion_jax.interop.weights import Place, Weights, contained, open_weights, place_parameters, placing

MAX_CONFIG_BYTES = 2**20
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")


class Checkpoint(NamedTuple):
    """What the files of a model say about themselves, from their headers alone.

    Attributes:
      folder: where they lie.
      family: the kind of model.
      config: the backbone's configuration.
      weights: the open files.
      origin: ``{canonical name: name in the file}`` of the tensors that are parameters.
      copies: ``{canonical name of a copy: canonical name of its original}`` for tied tensors that the file repeats.
      report: matched, missing and unexpected names.
    """

    folder: Path
    family: Family
    config: Any
    weights: Weights
    origin: dict[str, str]
    copies: dict[str, str]
    report: Report


def open_checkpoint(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Reads ``config.json`` and the headers of the weights, and compares them; reads no weights.

    Args:
      name_or_path: a folder, or a Hub id (see ``hub.locate``).
      revision: branch, tag or commit on the Hub.

    Raises:
      FileNotFoundError: if the folder, its ``config.json`` or its weights are not there.
      ValueError: if the configuration asks for something that is not implemented, or a file is damaged.
    """
    folder = hub.locate(name_or_path, revision).path
    raw = read_config(folder)
    family = family_of(raw, folder)
    weights = open_weights(folder)
    try:
        origin = canonical(family, {name: name for name in weights})
        config = family.read_config(raw, _ByCanonicalName(weights, origin))
        copies = {copy: original for copy, original in family.copies(config).items() if copy in origin and original in origin}
        table = family.table(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    report = compare({name: weights.infos[file] for name, file in origin.items() if name not in copies}, table)
    return Checkpoint(folder, family, config, weights, origin, copies, report)


class _ByCanonicalName(Mapping[str, np.ndarray]):
    """The tensors of a file under canonical names, read when a configuration depends on a value.

    Attributes:
      infos: ``{canonical name: TensorInfo}``, for what depends on a shape alone.
    """

    def __init__(self, weights: Weights, origin: Mapping[str, str]):
        self._weights, self._origin = weights, origin
        self.infos = {name: weights.infos[file] for name, file in origin.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[self._origin[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._origin)

    def __len__(self) -> int:
        return len(self._origin)

    def __contains__(self, name: object) -> bool:
        return name in self._origin  # see Weights


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = None,
    sharding: Any = None,
    strict: bool = True,
    scan_layers: bool = False,
    remat: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model: ``model.apply({"params": params}, **inputs)`` gives its outputs.

    Tensors are read one by one and placed at once: on the host there is never more than one beside the model.

    Args:
      name_or_path: a folder with ``config.json`` and safetensors weights (one file, or shards with an index), or a Hub id
        (see ``hub.locate``).
      revision: branch, tag or commit on the Hub.
      dtype: of parameters and computation, such as ``"bfloat16"``; float32 by default, whatever the file holds;
        ``"auto"`` for the dtype of the file.
      sharding: where parameters go: a device, a ``jax.sharding.Sharding``, or a function ``(path, shape) -> `` one of
        these; the default device if not given.
      strict: every tensor of the file must be used and every parameter be in the file. Otherwise unexpected tensors are
        left out and missing parameters drawn (normal with deviation 0.02; norms one, biases zero), with a warning that
        names them; a file without a single match is an error in any case.
      scan_layers: layers stacked on a leading axis and scanned, which compiles faster for deep models.
      remat: recompute each layer in the backward pass, which saves memory.

    Returns:
      The module and its parameters, a nested dictionary of arrays.

    Raises:
      FileNotFoundError: if the folder, its ``config.json`` or its weights are not there.
      ValueError: if the configuration asks for something that is not implemented, or if the weights are damaged,
        not finite, or another model's.
    """
    found = open_checkpoint(name_or_path, revision=revision)
    dtype = _dtype(dtype, found)
    what = f"this {found.family.name} configuration"
    try:
        require_fit(found.report, what, strict)
        for copy, original in found.copies.items():
            require_equal(copy, found.weights[found.origin[copy]], original, found.weights[found.origin[original]])
        table = found.family.table(found.config)
        place = placing(sharding)
        origin, missing = dict(found.origin), found.report.missing
        if missing or found.report.unexpected:
            warnings.warn(f"{found.folder}: {found.report}", stacklevel=2)
        if missing:  # no stacking leaf by leaf where layers are incomplete
            params = place_parameters(found.weights, table, origin, place, dtype)
            params = trees.merge(params, _drawn({p: e for p, e in table.items() if e.name in set(missing)}, place, dtype))
            params = stack_layers(params) if scan_layers else params
        else:
            params = place_parameters(found.weights, table, origin, place, dtype, stacked=scan_layers)
        return found.family.build(found.config, dtype=dtype, scan_layers=scan_layers, remat=remat), params
    except WeightFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{found.folder}: {error}") from error


def stored_dtypes(found: Checkpoint) -> set[np.dtype]:
    """The dtypes in which the files hold the parameters."""
    return {found.weights.infos[found.origin[name]].dtype for name in found.report.matched}


def _dtype(dtype: Any, found: Checkpoint) -> jnp.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        stored = stored_dtypes(found)
        if len(stored) != 1:
            names = ", ".join(sorted(str(kind) for kind in stored))
            raise ValueError(f"{found.folder}: dtype='auto', but the file holds {names or 'no weights'}; name one")
        dtype = stored.pop()
    try:
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r} is not a dtype: {error}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as bfloat16, not {dtype}")
    return dtype


def _drawn(table: Table, place: Place, dtype: jnp.dtype) -> dict[str, Any]:
    """Parameters that a file lacks, drawn from a key of their own path each."""
    made = {}
    for path, entry in table.items():
        shape, leaf = parameter_shape(entry), path.rpartition("/")[2]
        if leaf in ("scale", "bias"):
            array = np.full(shape, 1.0 if leaf == "scale" else 0.0, np.float32)
        else:
            array = np.random.default_rng(zlib.crc32(path.encode())).normal(0.0, 0.02, shape).astype(np.float32)
        made[path] = place(path, array.astype(dtype))
    return trees.nest(made)


def family_of(raw: Mapping[str, Any], folder: Path) -> Family:
    """The family of a ``config.json``.

    Raises:
      ValueError: naming the ``model_type`` or the architecture that is not implemented, and those that are.
    """
    model_type = raw.get("model_type")
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise ValueError(f"{folder / hub.CONFIG}: model_type={model_type!r} is not implemented; implemented: {known}")
    architectures = raw.get("architectures") or ()
    if not isinstance(architectures, (list, tuple)):
        raise ValueError(f"{folder / hub.CONFIG}: architectures must be a list, not {architectures!r}")
    for architecture in architectures:
        if architecture not in family.architectures:
            raise ValueError(
                f"{folder}: architecture {architecture!r} is not implemented; implemented: "
                f"{', '.join(family.architectures)}. To use the encoder of a model with another head, save it alone: "
                "model.base_model.save_pretrained(NEW_FOLDER)"
            )
    return family


def load_tokenizer(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Loads the fast tokenizer of a model through transformers, from local files and without running its code.

    Args:
      name_or_path: a folder, or a Hub id (see ``hub.locate``).
      revision: branch, tag or commit on the Hub.

    Raises:
      FileNotFoundError: if the folder or its tokenizer files are not there.
      ImportError: if transformers is not installed.
    """
    folder = hub.locate(name_or_path, revision, needs=_TOKENIZERS).path
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise FileNotFoundError(f"{folder} has no tokenizer (tokenizer.json): copy it beside the weights")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True, trust_remote_code=False)


def fingerprint(params: Mapping[str, Any]) -> str:
    """The SHA-256 of a tree: its paths in order, with dtypes, shapes and bytes. Ties a checkpoint to its base weights.

    Args:
      params: a nested dictionary of arrays. The loop and the scan layout of a model have different fingerprints.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(trees.flat(params).items()):
        array = np.require(np.asarray(leaf), requirements="C")
        digest.update(f"{path}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` of a model's folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a JSON object of reasonable size.
    """
    path = folder / hub.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {hub.CONFIG}: this is not a model's folder in Hugging Face's layout")
    contained(path, folder)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
    return decode_json(path.read_bytes(), path, "the configuration")
