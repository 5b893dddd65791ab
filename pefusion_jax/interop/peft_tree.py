"""From LoRA pairs and displaced parameters of single modules to methods and a tree of adapters, in either layout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones.names import Entry
from pefusion_jax.interop.peft_names import layer_counts, rule, scanned
from pefusion_jax.methods import FullFineTuning, LoRA


class Pair(NamedTuple):
    """A LoRA of one of our modules, in our layout."""

    a: np.ndarray
    b: np.ndarray
    alpha: float


def displacement(saved: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The float32 array that takes ``base`` to ``saved``: nearest to their difference among those whose sum is exact."""
    change = saved - base
    for neighbour in (np.nextafter(change, np.float32(np.inf)), np.nextafter(change, np.float32(-np.inf))):
        change = np.where((base + change != saved) & (base + neighbour == saved), neighbour, change)
    return change


def assembled(
    config: Mapping[str, Any],
    table: Mapping[str, Entry],
    pairs: Mapping[str, Pair],
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
    moved, displacements = displaced(table, changes, stacked)
    return (*methods, *moved), nested(leaves | displacements)


def displaced(
    table: Mapping[str, Entry], changes: Mapping[str, np.ndarray], stacked: bool
) -> tuple[list[FullFineTuning], dict[str, np.ndarray]]:
    """The method that describes displacements, if there are any, and its leaves by path."""
    paths = list(table)
    if stacked:
        changes = _stacked_changes(changes, layer_counts(paths))
        paths = list(dict.fromkeys(scanned(path)[0] for path in paths))
    methods = [FullFineTuning(targets=rule(changes, paths))] if changes else []
    return methods, {f"{path}_delta": change for path, change in changes.items()}


def nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree of these leaves, which must be finite."""
    for path, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise ValueError(
                f"{path} overflows float32, although the tensors of the file are finite; is it the right base model?"
            )
    return jax.tree.map(jnp.asarray, trees.nest(leaves))


def _deviating(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Pattern -> value, for the paths whose value is not the usual one."""
    found: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != usual:
            found.setdefault(value, []).append(path)
    return {rule(paths, values): value for value, paths in found.items()}


def _stacked_pairs(pairs: Mapping[str, Pair], sites: Mapping[str, int], stabilized: bool) -> dict[str, Pair]:
    """Pairs of all layers as one, padded with zeros where ranks differ or a layer has none: exact, and never trained."""
    grouped: dict[str, dict[int | None, Pair]] = {}
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
        out[stored] = Pair(a, b, alpha)
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
