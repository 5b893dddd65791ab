"""Loads pretrained models and tokenizers from folders in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones import FAMILIES, Family, stack_layers
from pefusion_jax.backbones.family import canonical, params_from_hf
from pefusion_jax.interop import hub
from pefusion_jax.interop.safetensors import WeightFileError, check_finite, load_safetensors

MAX_CONFIG_BYTES = 2**20


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = None,
    scan_layers: bool = False,
    remat: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model: ``model.apply({"params": params}, **inputs)`` gives its outputs.

    Args:
      name_or_path: a folder with ``config.json`` and ``model.safetensors``, or a Hub id (see ``hub.locate``).
      revision: branch, tag or commit on the Hub.
      dtype: of parameters and computation; float32 by default, whatever the file holds.
      scan_layers: layers stacked on a leading axis and scanned, which compiles faster for deep models.
      remat: recompute each layer in the backward pass, which saves memory.

    Returns:
      The module and its parameters, a nested dictionary of arrays.

    Raises:
      FileNotFoundError: if the folder, its ``config.json`` or its weights are not there.
      ValueError: if the configuration asks for something that is not implemented, or if the weights are damaged,
        not finite, or another model's.
    """
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as bfloat16, not {dtype}")
    folder = hub.locate(name_or_path, revision).path
    raw = read_config(folder)
    family = family_of(raw, folder)
    path = weights_path(folder)
    tensors = load_safetensors(path)
    check_finite(tensors, path)
    try:
        config = family.read_config(raw, canonical(family, tensors))
        with np.errstate(over="ignore"):  # overflow is reported by name below
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params_from_hf(family, tensors, config))
        model = family.build(config, dtype=dtype, scan_layers=scan_layers, remat=remat)
        params = stack_layers(params) if scan_layers else params
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    overflown = [name for name, leaf in trees.flat(params).items() if not bool(jnp.isfinite(leaf).all())]
    if overflown:
        raise WeightFileError(
            path,
            f"weights are not finite in {dtype}, but are as stored",
            tensor=overflown[0],
            expected=f"at most {jnp.finfo(dtype).max}",
            remedy="load with dtype=bfloat16 or float32",
        )
    return model, params


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
    folder = hub.locate(name_or_path, revision).path
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
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
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object but {type(config).__name__}")
    return config


def weights_path(folder: Path) -> Path:
    """The one safetensors file of a model's folder.

    Raises:
      FileNotFoundError: if there is none, saying what is there instead.
    """
    path = folder / hub.WEIGHTS
    if path.is_file():
        return path
    if (folder / hub.INDEX).is_file():
        raise WeightFileError(
            folder / hub.INDEX,
            "weights in several files are not implemented",
            expected=hub.WEIGHTS,
            remedy="save the model with a larger max_shard_size",
        )
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    hint = f"; {', '.join(pickles)} is a pickle, which is never read: convert it to safetensors" if pickles else ""
    raise FileNotFoundError(f"{folder} has no {hub.WEIGHTS}{hint}")
