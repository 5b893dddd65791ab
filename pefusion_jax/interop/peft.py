"""Reads adapters that PEFT wrote: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT itself does quietly is an error here: tensors that no module takes, modules that get no tensors, names of another
version of transformers that match nothing. The result is ordinary: methods for ``adapt``, and a tree of adapters for them.

FusionBench's ``linearized_adapter_model.safetensors`` (LoRA layers expanded to first order one by one, the ``layer`` mode of
``linearize``) is read too, exactly: such a layer is affine in its weight, so it is a plain LoRA,

.. math:: \\Delta W = s\\,(A_0 B + A B_0 - A_0 B_0) = s\\,[A_0 \\mid A - A_0]\\,[B ; B_0]

of rank r where :math:`B_0 = 0` (then A plays no part), and of rank 2r otherwise.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.backbones import Family
from pefusion_jax.backbones.names import Entry, convert
from pefusion_jax.interop import peft_config
from pefusion_jax.interop.peft_config import Selection
from pefusion_jax.interop.peft_names import Column, Module, Parameters, columns_of, layer_counts, rule, scanned
from pefusion_jax.interop.safetensors import check_finite, load_safetensors
from pefusion_jax.interop.saving import family_of_model
from pefusion_jax.methods import FullFineTuning, LoRA

WEIGHTS, LINEARIZED = "adapter_model.safetensors", "linearized_adapter_model.safetensors"
PREFIX = "base_model.model."

# Names of tensors behind the name of their module -> what they are to us.
_LEAVES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
}
_LINEARIZED_LEAVES = {
    "model.lora_A.default.weight": "a",
    "model.lora_B.default.weight": "b",
    "model.base_layer.weight": "weight",
    "model.base_layer.bias": "bias",
    **{f"params0_values.{i}": f"start {i}" for i in range(4)},
}


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


class _Pair(NamedTuple):
    """A LoRA of one of our modules, in our layout."""

    a: np.ndarray
    b: np.ndarray
    alpha: float


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
      ``adapt``'s result for the methods that the adapter describes (LoRA; full fine-tuning for biases and
      ``modules_to_save``), and the tree of adapters: ``adapted.apply(params, adapters, **inputs)``.

    Raises:
      FileNotFoundError: if the folder, a file, or safetensors weights are not there; pickles are never read.
      ValueError: if the adapter asks for something that is not implemented, is damaged or not finite, or is not for this model.
    """
    adapter = read_peft(folder, model, params, strict=strict)
    if adapter.heads:
        text = (
            f"{folder} also holds a head that {type(model).__name__} does not have: {', '.join(adapter.heads)}; read_peft gives "
            "it as .heads"
        )
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
    path = _file(folder)
    tensors = load_safetensors(path)
    check_finite(tensors, path)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # reported by name when all is assembled
            return _read(config, family, model.config, base, tensors, path, strict)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _file(folder: Path) -> Path:
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
    leaves, plain, unexpected = _grouped(tensors, _LINEARIZED_LEAVES if path.name == LINEARIZED else _LEAVES)
    selection = Selection(config, family.model_types)
    column, selected = _column(columns_of(family, shape), selection, set(leaves))
    matched = [name for name in column.modules if name in leaves and name in selected]
    unexpected += [f"{PREFIX}{name}" for name in leaves if name not in matched]
    missing = sorted(selected - set(leaves))

    reader = _Reader(config, family, shape, base, selection, column, path)
    for name in matched:
        reader.pair(name, leaves[name])
    heads = {}
    for name, array in plain.items():
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
    if missing or unexpected:
        if strict:
            raise ValueError(f"the adapter does not fit this {family.name} model: {report}. strict=False takes what matches")
        warnings.warn(f"{path.parent}: {report}", stacklevel=4)
    methods, adapters = _assembled(config, family.table(shape), reader.pairs, reader.changes, base.stacked)
    stored = Counter(str(array.dtype) for name, array in tensors.items())
    return PeftAdapter(config, methods, adapters, heads, report, stored.most_common(1)[0][0])


def _grouped(
    tensors: Mapping[str, np.ndarray], known: Mapping[str, str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], list[str]]:
    """Tensors by module and leaf, whole parameters by name, and the names of tensors that are neither."""
    leaves: dict[str, dict[str, np.ndarray]] = {}
    plain: dict[str, np.ndarray] = {}
    strange: list[str] = []
    for key, array in tensors.items():
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in known if name.endswith("." + suffix)), None)
        if name == key:
            strange.append(key)
        elif suffix is not None:
            found = leaves.setdefault(name[: -len(suffix) - 1], {})
            if known[suffix] in found:
                raise ValueError(f"{key} stands beside another tensor for the same factor")
            found[known[suffix]] = array
        elif "lora_" in name:
            strange.append(key)
        else:
            plain[name] = array
    for name, found in leaves.items():
        if not {"a", "b"} <= found.keys():
            lacking = "A" if "a" not in found else "B"
            raise ValueError(
                f"the tensors of {name} ({', '.join(sorted(found))}) lack LoRA's factor {lacking}: the file is incomplete"
            )
    return leaves, plain, strange


def _column(columns: list[Column], selection: Selection, names: set[str]) -> tuple[Column, set[str]]:
    """The column that the file's names are from: most of them match, and then most of what is selected does."""
    ranked, problem = [], None
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


class _Reader:
    """Turns the tensors of a file into pairs and displacements of our modules."""

    def __init__(
        self,
        config: Mapping[str, Any],
        family: Family,
        shape: Any,
        base: Parameters,
        selection: Selection,
        column: Column,
        path: Path,
    ):
        self.config, self.base, self.selection, self.column = config, base, selection, column
        self.table: Mapping[str, Entry] = family.table(shape)
        self.copies = family.copies(shape)
        self.linearized = path.name == LINEARIZED
        self.pairs: dict[str, _Pair] = {}
        self.changes: dict[str, np.ndarray] = {}

    def pair(self, name: str, leaves: Mapping[str, np.ndarray]) -> None:
        """Reads the LoRA of a module, and what is stored beside it."""
        modules = self.column.modules[name]
        first = modules[0]
        for module in modules:
            if any(
                f"{module.name}.{parameter}" in self.copies.values() for parameter in module.weights if parameter == "weight"
            ):
                raise ValueError(
                    f"{name} shares its weight with another layer, which peft then leaves unadapted: not implemented; load the "
                    "encoder without its head, or merge the adapter with peft"
                )
        rank = self.selection.value("rank_pattern", name, self.config["r"])
        alpha = float(self.selection.value("alpha_pattern", name, self.config["lora_alpha"]))
        a, b = self._factors(name, first, len(modules), rank, leaves["a"], leaves["b"])
        if self.linearized:
            a, b = self._expanded(name, first, len(modules), rank, leaves, a, b)
            alpha *= (a.shape[-1] / rank) ** (0.5 if self.config["use_rslora"] else 1.0)
        outputs = first.shape[-1]
        for i, module in enumerate(modules):
            self.pairs[module.path] = _Pair(a, np.ascontiguousarray(b[:, i * outputs : (i + 1) * outputs]), alpha)
        for parameter in ("weight", "bias"):
            if parameter in leaves:
                self._beside(name, modules, parameter, leaves[parameter])
        if "b_bias" in leaves:
            self._branch_bias(name, modules, leaves["b_bias"], alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank))

    def _factors(
        self, name: str, module: Module, parts: int, rank: int, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Checks the shapes of A and B and brings them to our layout."""
        *inputs, outputs = module.shape
        outputs *= parts
        if module.kind == "conv":
            *window, channels = inputs
            wanted = (rank, channels, *window), (outputs, rank, 1, 1)
        else:
            wanted = (rank, *inputs), (outputs, rank)
        for factor, array, shape in (("A", a, wanted[0]), ("B", b, wanted[1])):
            if array.shape == shape:
                continue
            axis = 0 if factor == "A" else 1
            found = array.shape[axis] if array.ndim > axis else None
            if found != rank and array.ndim == len(shape):
                raise ValueError(
                    f"{name}: {factor} has rank {found}, but r and rank_pattern in {peft_config.CONFIG} give rank {rank}; "
                    "the two files are not of the same adapter"
                )
            raise ValueError(f"{name}: {factor} has the shape {list(array.shape)}, this model's layer needs {list(shape)}")
        a, b = a.astype(np.float32), b.astype(np.float32)
        if module.kind == "conv":
            return np.ascontiguousarray(a.transpose(2, 3, 1, 0)), np.ascontiguousarray(b[:, :, 0, 0].T)
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)

    def _expanded(
        self, name: str, module: Module, parts: int, rank: int, leaves: Mapping[str, np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The factors of a layer that FusionBench linearized, from those at the start and those trained."""
        first = 1 + ("bias" in module.weights)  # positions count the base layer's weight and bias
        if not {f"start {first}", f"start {first + 1}"} <= leaves.keys():
            raise ValueError(f"{name} lacks params0_values.{first} and .{first + 1}, the factors at the point of expansion")
        for i, parameter in enumerate(("weight", "bias")[:first]):
            if f"start {i}" in leaves:
                self._require_base(name, module, parameter, leaves[f"start {i}"])
        a0, b0 = self._factors(name, module, parts, rank, leaves[f"start {first}"], leaves[f"start {first + 1}"])
        if not b0.any():
            return a0, b
        return np.concatenate([a0, a - a0], -1), np.concatenate([b, b0], 0)

    def _beside(self, name: str, modules: tuple[Module, ...], parameter: str, array: np.ndarray) -> None:
        """A parameter of the base layer that is stored along with the adapter."""
        if parameter == "bias" and self.config["bias"] != "none" and not self.linearized:
            self._change(f"{name}.bias", modules, "bias", array)
            return
        for module in modules:
            self._require_base(name, module, parameter, array)

    def _require_base(self, name: str, module: Module, parameter: str, array: np.ndarray) -> None:
        """A stored base parameter must be the model's own: nothing is taken from it."""
        path = module.weights.get(parameter)
        here = None if path is None else np.asarray(self.base[path])
        entry = None if path is None else self.table[path]
        if entry is None or here is None or array.shape != entry.shape:
            raise ValueError(f"{name}: the stored {parameter} has the shape {list(array.shape)}, which is not this model's")
        if not np.allclose(convert(entry, array.astype(np.float32)), here, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{name}: the {parameter} stored with the adapter is not this model's; load the base model that it was trained on"
            )

    def _branch_bias(self, name: str, modules: tuple[Module, ...], array: np.ndarray, scale: float) -> None:
        """``lora_bias``: B's own bias, scaled as the branch is, which comes to the same as another bias of the layer."""
        outputs = modules[0].shape[-1]
        for i, module in enumerate(modules):
            path = module.weights.get("bias")
            if path is None:
                raise ValueError(
                    f"{name} has a bias in its branch (lora_bias), but the layer has none to take it: merge with peft"
                )
            if array.shape != (outputs * len(modules),):
                raise ValueError(f"{name}: lora_B.bias has the shape {list(array.shape)}, not {[outputs * len(modules)]}")
            part = array[i * outputs : (i + 1) * outputs].astype(np.float32) * np.float32(scale)
            self.changes[path] = self.changes.get(path, np.zeros_like(part)) + part

    def plain(self, name: str, array: np.ndarray) -> str:
        """Takes a whole parameter; ``used``, or else ``head`` (of a part that we do not have) or ``unexpected``."""
        module, _, parameter = name.rpartition(".")
        if not (self.selection.saves_weights(module) or (self.config["bias"] == "all" and parameter == "bias")):
            return "unexpected"
        modules = self.column.modules.get(module)
        if modules is None or parameter not in modules[0].weights:
            original = next((o for copy, o in self.copies.items() if name == copy or name.endswith("." + copy)), None)
            return "head" if original is None else "used"  # a tied bias stands twice in the file
        if modules[0].path in self.pairs:
            return "unexpected"
        if parameter == "weight" and f"{modules[0].name}.weight" in self.copies.values():
            raise ValueError(
                f"modules_to_save names {module}, whose weight another layer shares: not implemented; merge with peft"
            )
        self._change(name, modules, parameter, array)
        return "used"

    def _change(self, name: str, modules: tuple[Module, ...], parameter: str, array: np.ndarray) -> None:
        for module in modules:
            path = module.weights.get(parameter)
            if path is None or array.shape != self.table[path].shape:
                wanted = "no such parameter" if path is None else f"the shape {list(self.table[path].shape)}"
                raise ValueError(f"{name} has the shape {list(array.shape)} in the file, this model has {wanted}")
            saved = np.ascontiguousarray(convert(self.table[path], array.astype(np.float32)))
            self.changes[path] = displacement(saved, np.asarray(self.base[path]))

    def missing(self, matched: set[str]) -> list[str]:
        """Parameters that the configuration promises and the file does not have."""
        bias, out = self.config["bias"], []
        for name, modules in self.column.modules.items():
            for module in modules:
                for parameter, path in module.weights.items():
                    promised = self.selection.saves_weights(name) and name not in matched
                    if parameter == "bias" and not self.linearized:
                        promised |= bias == "all" or (bias == "lora_only" and name in matched)
                    if promised and path not in self.changes:
                        out.append(f"{name}.{parameter}")
        return out


def displacement(saved: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The float32 array that takes ``base`` to ``saved``: nearest to their difference among those whose sum is exact."""
    change = saved - base
    for neighbour in (np.nextafter(change, np.float32(np.inf)), np.nextafter(change, np.float32(-np.inf))):
        change = np.where((base + change != saved) & (base + neighbour == saved), neighbour, change)
    return change


def _assembled(
    config: Mapping[str, Any],
    table: Mapping[str, Entry],
    pairs: Mapping[str, _Pair],
    changes: Mapping[str, np.ndarray],
    stacked: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The methods that describe pairs and displacements, and their tree, in the layout of the parameters."""
    stabilized = config["use_rslora"]
    paths = list(table)
    if stacked:
        counts = layer_counts(paths)
        sites = {scanned(path)[0].rpartition("/")[0]: count for path in paths if (count := counts.get(scanned(path)[0], 0))}
        pairs = _stacked_pairs(pairs, sites, stabilized)
        changes = _stacked_changes(changes, counts)
        paths = list(dict.fromkeys(scanned(path)[0] for path in paths))
    ranks = {path: pair.a.shape[-1] for path, pair in pairs.items()}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks.values(), (pair.alpha for pair in pairs.values())))
    methods: list[Any] = [
        LoRA(
            targets=rule(pairs, dict.fromkeys(path.rpartition("/")[0] for path in paths)),
            rank=rank,
            alpha=alpha,
            rank_stabilized=stabilized,
            dropout=float(config["lora_dropout"]),
            rank_pattern=_deviating(ranks, rank),
            alpha_pattern=_deviating({path: pair.alpha for path, pair in pairs.items()}, alpha),
        )
    ]
    leaves: dict[str, np.ndarray] = {}
    for path, pair in pairs.items():
        leaves |= {f"{path}/lora_a": pair.a, f"{path}/lora_b": pair.b}
    if changes:
        methods.append(FullFineTuning(targets=rule(changes, paths)))
        leaves |= {f"{path}_delta": change for path, change in changes.items()}
    for path, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise ValueError(
                f"{path} overflows float32, although the tensors of the file are finite; is it the right base model?"
            )
    return tuple(methods), jax.tree.map(jnp.asarray, trees.nest(leaves))


def _deviating(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Pattern -> value, for the paths whose value is not the usual one."""
    found: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != usual:
            found.setdefault(value, []).append(path)
    return {rule(paths, values): value for value, paths in found.items()}


def _stacked_pairs(pairs: Mapping[str, _Pair], sites: Mapping[str, int], stabilized: bool) -> dict[str, _Pair]:
    """Pairs of all layers as one, padded with zeros where ranks differ or a layer has none: exact, and never trained."""
    grouped: dict[str, dict[int | None, _Pair]] = {}
    for path, pair in pairs.items():
        stored, layer = scanned(path)
        grouped.setdefault(stored, {})[layer] = pair

    def scale(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if stabilized else rank)

    out = {}
    for stored, layers in grouped.items():
        if None in layers:
            out[stored] = layers[None]
            continue
        rank = max(pair.a.shape[-1] for pair in layers.values())
        alpha = max((pair.alpha for pair in layers.values()), key=abs)
        like = next(iter(layers.values()))
        a = np.zeros((sites[stored], *like.a.shape[:-1], rank), np.float32)
        b = np.zeros((sites[stored], rank, *like.b.shape[1:]), np.float32)
        for layer, pair in layers.items():
            own = pair.a.shape[-1]
            factor = scale(pair.alpha, own) / scale(alpha, rank) if alpha else 1.0
            a[layer, ..., :own] = pair.a
            b[layer, :own] = pair.b * np.float32(factor)
        out[stored] = _Pair(a, b, alpha)
    return out


def _stacked_changes(changes: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for path, change in changes.items():
        stored, layer = scanned(path)
        if layer is None:
            out[stored] = change
        else:
            out.setdefault(stored, np.zeros((counts[stored], *change.shape), np.float32))[layer] = change
    return out
