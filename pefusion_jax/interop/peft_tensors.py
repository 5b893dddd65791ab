"""The tensors of an adapter's file, checked one by one against the modules of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pefusion_jax.backbones import Family
from pefusion_jax.backbones.names import Entry, convert
from pefusion_jax.interop import peft_config
from pefusion_jax.interop.peft_config import Selection
from pefusion_jax.interop.peft_names import Column, Module, Parameters
from pefusion_jax.interop.peft_tree import Pair, displacement

PREFIX = "base_model.model."
_WRAPPER = re.compile(r"\.modules_to_save(\.default)?\.")

# Names of tensors behind the name of their module -> what they are to us.
LEAVES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
}
LINEARIZED_LEAVES = {
    "model.lora_A.default.weight": "a",
    "model.lora_B.default.weight": "b",
    "model.base_layer.weight": "weight",
    "model.base_layer.bias": "bias",
    **{f"params0_values.{i}": f"start {i}" for i in range(4)},
}


def grouped(
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


def unwrapped(plain: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole parameters by name, each once.

    With ``bias="all"`` peft stores, of a module in ``modules_to_save``, every tensor with "bias" in its name three times: the
    original, which is the base model's and has no effect, and the trained one with and without the wrapper's name.
    """
    out: dict[str, np.ndarray] = {}
    for key, array in plain.items():
        if ".original_module." in key:
            continue
        name = _WRAPPER.sub(".", key)
        if name in out and not np.array_equal(out[name], array):
            raise ValueError(f"{name} stands twice in the file, with different values: save the adapter again with peft")
        out[name] = array
    return out


class Reader:
    """Turns the tensors of a file into pairs and displacements of our modules."""

    def __init__(
        self,
        config: Mapping[str, Any],
        family: Family,
        shape: Any,
        base: Parameters,
        selection: Selection,
        column: Column,
        linearized: bool,
    ):
        self.config, self.base, self.selection, self.column = config, base, selection, column
        self.table: Mapping[str, Entry] = family.table(shape)
        self.copies = family.copies(shape)
        self.linearized = linearized
        self.pairs: dict[str, Pair] = {}
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
            self.pairs[module.path] = Pair(a, np.ascontiguousarray(b[:, i * outputs : (i + 1) * outputs]), alpha)
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
        a_shape: tuple[int, ...] = (rank, *inputs)
        b_shape: tuple[int, ...] = (outputs, rank)
        if module.kind == "conv":
            *window, channels = inputs
            a_shape, b_shape = (rank, channels, *window), (outputs, rank, 1, 1)
        for factor, array, shape in (("A", a, a_shape), ("B", b, b_shape)):
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
                f"{name}: the {parameter} stored with the adapter is not this model's; load the base that it was trained on"
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
