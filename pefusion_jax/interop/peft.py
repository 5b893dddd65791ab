"""Reads adapters that PEFT wrote: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT itself does quietly is an error here: tensors that no module takes, modules that get no tensors, names of another
version of transformers that match nothing. The result is ordinary: methods for ``adapt``, and a tree of adapters for them.

FusionBench's ``linearized_adapter_model.safetensors`` (LoRA layers expanded to first order one by one, the ``layer`` mode of
``linearize``) is read too, exactly: such a layer is affine in its weight, so it is a plain LoRA,

.. math:: \\Delta W = s\\,(A_0 B + A B_0 - A_0 B_0) = s\\,[A_0 \\mid A - A_0]\\,[B ; B_0]

of rank r where :math:`B_0 = 0` (then A plays no part), and of rank 2r otherwise.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.backbones import Family
from pefusion_jax.interop import peft_config
from pefusion_jax.interop.peft_config import Selection
from pefusion_jax.interop.peft_names import Column, Parameters, columns_of
from pefusion_jax.interop.peft_prompt import KIND, read_prompt
from pefusion_jax.interop.peft_tensors import LEAVES, LINEARIZED_LEAVES, PREFIX, Reader, grouped, unwrapped
from pefusion_jax.interop.peft_tree import assembled
from pefusion_jax.interop.safetensors import check_finite, load_safetensors
from pefusion_jax.interop.saving import family_of_model

WEIGHTS, LINEARIZED = "adapter_model.safetensors", "linearized_adapter_model.safetensors"


class PeftReport(NamedTuple):
    """How an adapter's file and a model meet.

    Attributes:
      matched: modules that are adapted, by their names in the file.
      missing: modules that the configuration selects in the model and the file has no tensors for.
      unexpected: tensors of the file that no module of the model takes.
      column: whose names they are: the version of transformers, and the prefix.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    column: str

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} modules match (names of {self.column})"]
        for found, where in ((self.missing, "in the model only"), (self.unexpected, "in the file only")):
            if found:
                more = f" and {len(found) - 6} more" if len(found) > 6 else ""
                lines.append(f"{len(found)} {where}: {', '.join(found[:6])}{more}")
        return "; ".join(lines)


class PeftAdapter(NamedTuple):
    """An adapter that was read.

    Attributes:
      config: ``adapter_config.json`` with all fields of its type.
      methods: for ``adapt``.
      adapters: the tree, float32, in the layout of the parameters.
      heads: tensors of ``modules_to_save`` for parts that the model does not have, such as ``classifier.weight``.
      report: what matched.
      dtype: in which the file holds the adapter.
    """

    config: dict[str, Any]
    methods: tuple[Any, ...]
    adapters: dict[str, Any]
    heads: dict[str, np.ndarray]
    report: PeftReport
    dtype: str


def load_peft(
    folder: str | os.PathLike[str], model: nn.Module, params: Mapping[str, Any], *, strict: bool = True
) -> tuple[Adapted, dict[str, Any]]:
    """Loads a PEFT adapter for one of our backbones.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or FusionBench's linearized file).
      model: the backbone, as from ``load_pretrained``.
      params: its parameters, in the loop or the scan layout.
      strict: every module that the configuration selects must be in the file, every tensor of the file in the model.
        Otherwise these are warnings; an adapter without a single match is an error in any case.

    Returns:
      ``adapt``'s result for the methods that the adapter describes (LoRA or prompt tuning; full fine-tuning for biases and
      ``modules_to_save``), and the tree of adapters: ``adapted.apply(params, adapters, **inputs)``. Of a prompt for T5 with
      ``num_transformer_submodules=2`` the encoder's half is read: PEFT saves the decoder's as well, and never uses it.

    Raises:
      FileNotFoundError: if the folder, a file, or safetensors weights are not there; pickles are never read.
      ValueError: if the adapter asks for something that is not implemented, is damaged or not finite, or is not for this model.
    """
    adapter = read_peft(folder, model, params, strict=strict)
    if adapter.heads:
        names = ", ".join(adapter.heads)
        text = f"{folder} also holds a head that {type(model).__name__} does not have: {names}; read_peft gives it as .heads"
        if strict:
            raise ValueError(text + ", and strict=False leaves it out")
        warnings.warn(text, stacklevel=2)
    return adapt(model, adapter.methods), adapter.adapters


def read_peft(
    folder: str | os.PathLike[str], model: nn.Module, params: Mapping[str, Any], *, strict: bool = True
) -> PeftAdapter:
    """Reads a PEFT adapter with all that is known about it; Args and Raises as :func:`load_peft`, but heads are no error."""
    folder = Path(folder)
    config = peft_config.read_config(folder)
    family = family_of_model(model)
    base = Parameters(params, family, model.config)
    path = weights_file(folder)
    tensors = load_safetensors(path)
    check_finite(tensors, path)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # reported by name when all is assembled
            return _read(config, family, model.config, base, tensors, path, strict)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def weights_file(folder: Path) -> Path:
    """The safetensors file of an adapter's folder.

    Raises:
      FileNotFoundError: if there is none, naming the pickles that are there instead.
    """
    for name in (WEIGHTS, LINEARIZED):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    hint = f"; {', '.join(pickles)} is a pickle, which is never read: load and save it once with peft" if pickles else ""
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}{hint}")


def _read(
    config: dict[str, Any],
    family: Family,
    shape: Any,
    base: Parameters,
    tensors: dict[str, np.ndarray],
    path: Path,
    strict: bool,
) -> PeftAdapter:
    for name, array in tensors.items():
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize not in (2, 4):
            raise ValueError(f"{name} is {array.dtype}; adapters are float32, float16 or bfloat16")
    dtype = Counter(str(array.dtype) for array in tensors.values()).most_common(1)[0][0] if tensors else "float32"
    if config["peft_type"] == KIND:
        found = read_prompt(config, family, shape, base, tensors)
        report = PeftReport(found.matched, found.missing, found.unexpected, found.column)
        _require_fit(report, family.name, path, strict)
        return PeftAdapter(config, found.methods, found.adapters, found.heads, report, dtype)
    leaves, plain, unexpected = grouped(tensors, LINEARIZED_LEAVES if path.name == LINEARIZED else LEAVES)
    selection = Selection(config, family.model_types)
    column, selected = _column(columns_of(family, shape), selection, set(leaves))
    matched = [name for name in column.modules if name in leaves and name in selected]
    unexpected += [f"{PREFIX}{name}" for name in leaves if name not in matched]
    missing = sorted(selected - set(leaves))

    reader = Reader(config, family, shape, base, selection, column, path.name == LINEARIZED)
    for name in matched:
        reader.pair(name, leaves[name])
    heads = {}
    for name, array in (unwrapped(plain) if config["bias"] == "all" else plain).items():
        where = reader.plain(name, array)
        if where == "head":
            heads[name] = array
        elif where == "unexpected":
            unexpected.append(PREFIX + name)
    missing += reader.missing(set(matched))

    report = PeftReport(tuple(matched), tuple(missing), tuple(unexpected), column.label)
    if not matched:
        known = [name for name, modules in column.modules.items() if modules[0].kind != "other"]
        first = next(iter(leaves), next(iter(tensors), "nothing"))
        raise ValueError(
            f"no module of this {family.name} model is adapted: {report}. The file has {first!r}"
            f"{trees.did_you_mean(first.removeprefix(PREFIX), known)}. Is it for another model?"
        )
    _require_fit(report, family.name, path, strict)
    methods, adapters = assembled(config, family.table(shape), reader.pairs, reader.changes, base.stacked)
    return PeftAdapter(config, methods, adapters, heads, report, dtype)


def _require_fit(report: PeftReport, family: str, path: Path, strict: bool) -> None:
    if report.missing or report.unexpected:
        if strict:
            raise ValueError(f"the adapter does not fit this {family} model: {report}. strict=False takes what matches")
        warnings.warn(f"{path.parent}: {report}", stacklevel=5)


def _column(columns: list[Column], selection: Selection, names: set[str]) -> tuple[Column, set[str]]:
    """The column that the file's names are from: most of them match, and then most of what is selected does."""
    ranked: list[tuple[int, int, int, Column, set[str]]] = []
    problem = None
    for column in columns:
        try:
            selected = selection.modules(column)
        except ValueError as error:  # a pattern can select too much under names that are not the file's
            problem = error
            continue
        ranked.append((-len(names & column.modules.keys()), len(selected ^ names), len(ranked), column, selected))
    if not ranked:
        raise problem or ValueError("the model has no modules")
    best = min(ranked, key=lambda entry: entry[:3])
    return best[3], best[4]
