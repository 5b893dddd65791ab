"""LoRA sites and moved parameters in PEFT's layout, and the fields of the configuration that describe them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pefusion_jax.interop.peft_names import Module, Parameters, containers, scanned

MERGED = "write the merged model instead: save_pretrained(FOLDER, model, pf.fold(params, adapted.deltas(params, adapters)))"
# Layers of heads that a model of transformers may have and ours does not: targets that we write must not select them.
_FOREIGN = """classifier classifier.dense classifier.out_proj score lm_head lm_head.dense lm_head.decoder qa_outputs
pre_classifier pooler.dense cls.predictions.transform.dense cls.predictions.decoder cls.seq_relationship head
vocab_projector""".split()


class Site(NamedTuple):
    """A LoRA in the layout of the parameters: factors, scale, and alpha where PEFT can express the scale by it."""

    a: jax.Array
    b: jax.Array
    scale: float
    stabilized: bool
    dropout: float


class Row(NamedTuple):
    """A LoRA of one PEFT module, in PEFT's layout."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    stabilized: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def alpha(self, stabilized: bool) -> float:
        return self.scale * (math.sqrt(self.rank) if stabilized else self.rank)


class Content(NamedTuple):
    """What a folder is to hold: an adapter type, its tensors by name, its fields, and the modules it is for."""

    kind: str
    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]
    modules: tuple[str, ...]


def rows_of(named: Mapping[str, tuple[Module, ...]], sites: Mapping[str, Site], stacked: bool) -> dict[str, Row]:
    """The sites by PEFT's names and in PEFT's layout: layers apart, fused modules together."""
    rows: dict[str, Row] = {}
    used: set[str] = set()
    for name, modules in named.items():
        parts: list[Row | None] = []
        for module in modules:
            stored, layer = scanned(module.path) if stacked else (module.path, None)
            site = sites.get(stored)
            if site is None or module.kind == "other":
                parts.append(None)
                continue
            used.add(stored)
            a, b = (np.asarray(leaf, np.float32) for leaf in (site.a, site.b))
            parts.append(_row(module, site, a, b, False) if layer is None else _row(module, site, a[layer], b[layer], True))
        row = _fused(modules, parts)
        if row is not None:
            rows[name] = row
    unknown = sorted(set(sites) - used)
    if unknown:
        raise ValueError(f"{unknown[0]} is no layer that Hugging Face's model has, so that PEFT cannot name it; {MERGED}")
    return rows


def _row(module: Module, site: Site, a: np.ndarray, b: np.ndarray, padded: bool) -> Row | None:
    rank = a.shape[-1]
    a, b = a.reshape(-1, rank), b.reshape(rank, -1)
    if padded:  # layers of other ranks are padded with zeros where layers are stacked
        kept = a.any(0) | b.any(1)
        if not kept.any():
            return None
        a, b, rank = a[:, kept], b[kept], int(kept.sum())
    if module.kind == "conv":
        *window, channels, outputs = module.shape
        a_out = a.reshape(*window, channels, rank).transpose(3, 2, 0, 1)
        return Row(a_out, b.T.reshape(outputs, rank, 1, 1), site.scale, site.stabilized)
    return Row(a.T, b.T, site.scale, site.stabilized)


def _fused(modules: tuple[Module, ...], parts: list[Row | None]) -> Row | None:
    """One LoRA for modules that are one layer in files: their outputs side by side, B block-diagonal."""
    if len(parts) == 1:
        return parts[0]
    present = [part for part in parts if part is not None]
    if not present:
        return None
    same = all(part.scale == present[0].scale and np.array_equal(part.a, present[0].a) for part in present)
    if same and len(present) == len(parts):
        return present[0]._replace(b=np.concatenate([part.b for part in present], 0))
    outputs = modules[0].shape[-1]
    b = np.zeros((outputs * len(parts), sum(part.rank for part in present)), np.float32)
    column = 0
    for i, part in enumerate(parts):
        if part is not None:
            b[i * outputs : (i + 1) * outputs, column : column + part.rank] = part.b * np.float32(part.scale)
            column += part.rank
    return Row(np.concatenate([part.a for part in present], 0), b, 1.0, False)


def fits(alpha: float) -> bool:
    """Whether PEFT's integer field can hold it."""
    return abs(alpha) < 2**53 and abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha))


def described(rows: Mapping[str, Row], named: Mapping[str, tuple[Module, ...]]) -> dict[str, Any]:
    """Ranks, alphas and targets as fields of the configuration. What alpha cannot express goes into B, at a scale of 1."""
    stabilized = all(row.stabilized and fits(row.alpha(True)) for row in rows.values())
    ranks = {name: row.rank for name, row in rows.items()}
    alphas = {name: round(row.alpha(stabilized)) if fits(row.alpha(stabilized)) else row.rank for name, row in rows.items()}
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())

    def escaped(name: str) -> str:
        return name.replace(".", "\\.")

    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilized,
        "rank_pattern": {escaped(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {escaped(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(set(rows), named),
    }


def _usual(values: Iterable[int]) -> int:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], -value))


def _targets(chosen: set[str], named: Mapping[str, tuple[Module, ...]]) -> list[str]:
    """The shortest ends of names that select these modules and no other; full names where there are none."""
    others = (set(named) | containers(named) | set(_FOREIGN)) - chosen
    avoid = {name[i:] for name in others for i in _starts(name)}
    out = set()
    for name in chosen:
        ends = [name[i:] for i in reversed(_starts(name))]
        out.add(next((end for end in ends if not end.split(".")[0].isdigit() and end not in avoid), name))
    return sorted(out)


def _starts(name: str) -> list[int]:
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]


def whole_parameters(
    named: Mapping[str, tuple[Module, ...]],
    rows: Mapping[str, Row],
    changes: Mapping[str, jax.Array],
    base: Parameters,
    tied: set[str],
    remedy: str = MERGED,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Whole parameters that moved, as PEFT stores them: as biases where these are all, else by whole modules."""
    moved: dict[str, np.ndarray] = {}
    unknown = set(changes)
    for modules in named.values():
        for module in modules:
            for path in module.weights.values():
                stored, layer = scanned(path) if base.stacked else (path, None)
                if stored in changes:
                    unknown.discard(stored)
                    change = np.asarray(changes[stored] if layer is None else changes[stored][layer], np.float32)
                    if change.any():
                        moved[path] = change
    if unknown:
        raise ValueError(f"{min(unknown)} is no parameter that Hugging Face's model has; {remedy}")
    if not moved:
        return {}, {"bias": "none", "modules_to_save": None}

    def value(name: str, parameter: str) -> np.ndarray:
        arrays = []
        for module in named[name]:
            path = module.weights[parameter]
            array = np.asarray(base[path]) + moved.get(path, np.float32(0))
            axes = {"linear": (1, 0), "conv": (3, 2, 0, 1)}.get(module.kind) if parameter == "weight" else None
            arrays.append(array if axes is None else array.transpose(axes))
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    of_lora = {m.weights["bias"] for name in rows for m in named[name] if "bias" in m.weights}
    only_biases = all(path.rpartition("/")[2] == "bias" for path in moved)
    tensors = {f"{name}.base_layer.bias": value(name, "bias") for name in rows if "bias" in named[name][0].weights}
    if moved.keys() <= of_lora:
        return tensors, {"bias": "lora_only", "modules_to_save": None}
    if only_biases and rows:
        tensors |= {f"{n}.bias": value(n, "bias") for n, m in named.items() if n not in rows and "bias" in m[0].weights}
        return tensors, {"bias": "all", "modules_to_save": None}
    saved, inner = [], containers(named)
    for name, modules in named.items():
        touched = [path for module in modules for path in module.weights.values() if path in moved and path not in of_lora]
        if not touched:
            continue
        if name in rows:
            raise ValueError(f"{touched[0]} moved beside a LoRA on the same layer, which PEFT cannot store; {remedy}")
        if name in inner or not modules[0].weights.keys() <= {"weight", "bias"} or any(m.name in tied for m in modules):
            raise ValueError(f"{touched[0]} is no module of its own, or is shared, so that PEFT cannot store it; {remedy}")
        saved.append(name)
    whole = {f"{name}.{parameter}": value(name, parameter) for name in saved for parameter in named[name][0].weights}
    with_biases = bool(moved.keys() & of_lora)
    return (tensors if with_biases else {}) | whole, {
        "bias": "lora_only" if with_biases else "none",
        "modules_to_save": sorted(saved),
    }
