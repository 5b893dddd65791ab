"""Writes models as folders in Hugging Face's layout, which transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from pefusion_jax import files, trees
from pefusion_jax.backbones import FAMILIES, Family, unstack_layers
from pefusion_jax.backbones.configs import num_labels
from pefusion_jax.backbones.family import on_disk
from pefusion_jax.backbones.names import Pending, pending
from pefusion_jax.interop import manifest
from pefusion_jax.interop.hub import CONFIG, INDEX, WEIGHTS, locate
from pefusion_jax.interop.pretrained import read_config
from pefusion_jax.interop.safetensors import write_safetensors
from pefusion_jax.interop.weights import contained, write_index

MAX_SHARD_BYTES = 5 * 10**9
# What belongs to a model beside its weights and configuration.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template.jinja",
)


def family_of_model(model: nn.Module) -> Family:
    """The family of one of our backbones.

    Raises:
      ValueError: if the module is not one of them.
    """
    for family in FAMILIES:
        if type(model) is family.build and family.write_config(model.config)["model_type"] in family.model_types:
            return family
    known = ", ".join(sorted({family.build.__name__ for family in FAMILIES}))
    raise ValueError(f"{type(model).__name__} has no table of Hugging Face names; backbones that have: {known}")


def save_pretrained(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    like: str | os.PathLike[str] | None = None,
    card: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model's folder, all of it or nothing: weights, ``config.json``, ``manifest.json``.

    Tensors are converted and written one at a time. The bytes depend on the arguments alone.

    Args:
      folder: to make; it must be empty or not exist.
      model: one of our backbones.
      params: its parameters, in the loop or the scan layout, for example ``pf.fold(params, delta)``.
      dtype: of the file, such as ``"bfloat16"``; that of the parameters if not given.
      max_shard_bytes: where one file would become larger, shards and an index are written.
      like: a model's folder or Hub id from which tokenizer and processor files are copied, and what its classes are.
      card: text of a README.md, see ``card.model_card``.
      inputs: what the model was made from, for the manifest: ``{name: manifest.describe_input(source, folder)}``.
      settings: resolved configuration, for the manifest.
      overwrite: replace a folder that is not empty.

    Raises:
      ValueError: if the parameters are not the model's, or not finite (also: not in ``dtype``).
      FileExistsError: if the folder is not empty.
      FileNotFoundError: if ``like`` is not there.
    """
    source = None if like is None else locate(like).path
    raw, kinds, make = _planned(model, params, dtype)
    if source is not None:
        raw |= _class_names(source, raw.get("num_labels"))
    with files.new_folder(folder, overwrite) as made:
        _write_weights(made, kinds, make, max_shard_bytes)
        files.write_atomically(made / CONFIG, (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode())
        if source is not None:
            copy_companions(source, made)
        if card is not None:
            files.write_atomically(made / "README.md", card.encode())
        manifest.write_manifest(made, inputs=inputs, settings=settings)


def _planned(
    model: nn.Module, params: Mapping[str, Any], dtype: Any
) -> tuple[dict[str, Any], dict[str, tuple[np.dtype, tuple[int, ...]]], Callable[[str], np.ndarray]]:
    """The dictionary of config.json, the kinds of the tensors by their names in the file, and what makes and checks one."""
    family = family_of_model(model)
    table = family.table(model.config)
    names = on_disk(family, table, model.config)
    rows: dict[str, Pending] = {
        names[name]: row for name, row in pending(unstack_layers(params), table, f"this {family.name} model").items()
    }
    kinds = {name: (np.dtype(dtype) if dtype is not None else row.dtype, row.shape) for name, row in rows.items()}
    for name, (kind, _) in kinds.items():
        if not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(f"{name} would be written as {kind}; name a floating dtype")
    stored = {kind for kind, _ in kinds.values()}
    raw = {**family.write_config(model.config), "dtype": stored.pop().name if len(stored) == 1 else "float32"}
    trees.require_finite(params, "parameters to be saved")

    def make(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            array = rows[name].make().astype(kinds[name][0], copy=False)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite in {kinds[name][0]}; write it as bfloat16 or float32")
        return array

    return raw, kinds, make


def planned_files(
    model: nn.Module, params: Mapping[str, Any], *, dtype: Any = None, max_shard_bytes: int, like: Path
) -> tuple[str, ...]:
    """The names of the files that :func:`save_pretrained` with a card would write, after all of its checks."""
    _, kinds, make = _planned(model, params, dtype)
    for name in kinds:
        make(name)
    shards = list(plan_shards(kinds, max_shard_bytes))
    index = [INDEX] if len(shards) > 1 else []
    return tuple(sorted([*shards, *index, CONFIG, "README.md", manifest.NAME, *companions(like)]))


def _class_names(source: Path, count: Any) -> dict[str, Any]:
    """``id2label``, ``label2id`` and ``problem_type`` of a folder's ``config.json``, if they are for so many classes."""
    if count is None or not (source / CONFIG).is_file():
        return {}
    raw = read_config(source)
    found = {key: raw[key] for key in ("id2label", "label2id") if isinstance(raw.get(key), dict) and len(raw[key]) == count}
    found = found if "id2label" in found else {}
    if isinstance(raw.get("problem_type"), str) and num_labels(raw) == count:
        found["problem_type"] = raw["problem_type"]
    return found


def companions(source: Path) -> list[str]:
    """The tokenizer and processor files that a folder has."""
    return [name for name in _COMPANIONS if (source / name).is_file()]


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies tokenizer and processor files that exist in ``source``; returns their names.

    Raises:
      WeightFileError: if one is a link that leads out of its folder: what it points to is not ours to pass on.
    """
    found = companions(source)
    for name in found:
        contained(source / name, source)
        shutil.copyfile(source / name, folder / name)
    return found


def plan_shards(kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_shard_bytes: int) -> dict[str, dict[str, int]]:
    """``{file: {tensor: bytes}}``: tensors in order, a new file where the limit would be passed.

    A tensor that is larger than the limit gets a file of its own.

    Raises:
      ValueError: if the limit is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    shards: list[dict[str, int]] = [{}]
    for name, (dtype, shape) in kinds.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_weights(
    folder: Path,
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    make: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    shards = plan_shards(kinds, max_shard_bytes)
    for file, tensors in shards.items():
        write_safetensors(folder / file, {name: kinds[name] for name in tensors}, make)
    if len(shards) > 1:
        write_index(folder / INDEX, shards)
