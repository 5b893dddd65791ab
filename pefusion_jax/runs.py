"""Adapters on disk with all that is needed to use them again: which model, which method, which linearization.

A run is a folder with one safetensors file (see ``training.checkpoint.save_adapters``) whose metadata says how it was made:

    FOLDER/adapter.safetensors     tree/...       adapters, a displacement, or a weight-space change
                                   adapters0/...  the point of expansion, for linearized models
    FOLDER/config.json             the same metadata for people, with whatever else the caller records
    FOLDER/statistics.safetensors  second moments of the task's data, if there are any: see ``pf.save_statistics``
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.files import write_json
from pefusion_jax.generators import MPT, Attempt, CondLoRA, HyperDecoder, HyperNetwork, PerTask, generate
from pefusion_jax.interop import fingerprint, load_pretrained
from pefusion_jax.linearize import linearize
from pefusion_jax.methods import Bottleneck, FullFineTuning, LoRA, PromptTuning
from pefusion_jax.training.checkpoint import load_adapters, save_adapters

FILE = "adapter.safetensors"
STATISTICS = "statistics.safetensors"
_METHODS = {method.__name__: method for method in (LoRA, FullFineTuning, Bottleneck, PromptTuning)}
_GENERATORS = {made.__name__: made for made in (CondLoRA, HyperNetwork, HyperDecoder, PerTask, MPT, Attempt)}
# What the metadata must hold, by type.
_TEXT = {"kind": str, "model": str, "base_fingerprint": str}
_SPEC: dict[str, Any] = {**_TEXT, "methods": list, "mode": (str, type(None)), "dtype": (str, type(None))}


class Run(NamedTuple):
    """What a folder holds, ready to use.

    Attributes:
      model: the base model.
      params: its parameters.
      adapted: the adapted, perhaps linearized, model.
      tree: adapters, displacement or :class:`Delta`, for ``adapted.apply`` or ``adapted.apply_deltas``.
      adapters0: the point of expansion or the common start, or ``None``.
      spec: the metadata.
    """

    model: Any
    params: Any
    adapted: Adapted
    tree: Any
    adapters0: Any
    spec: dict[str, Any]


def save_run(
    folder: str | os.PathLike[str],
    tree: Any,
    *,
    model: str,
    params: Any,
    methods: Any,
    generator: Any = None,
    mode: str | None = None,
    adapters0: Any = None,
    **notes: Any,
) -> None:
    """Writes a run, both files or neither.

    Args:
      folder: made if needed; files of an earlier run in it are replaced.
      tree: adapters, a displacement, or a :class:`Delta`.
      model: what ``load_pretrained`` took.
      params: the base parameters, whose fingerprint is recorded.
      methods: the method or methods given to ``adapt``.
      generator: given to ``generate``, or ``None``; the names of its tasks and their order are kept with it.
      mode: of ``linearize``, or ``None``.
      adapters0: the point of expansion; also worth keeping for fusing plain adapters in adapter space.
      **notes: JSON-compatible values to record: task names, settings, scores.

    Raises:
      ValueError: if a leaf is not finite, naming it.
    """
    methods = list(methods) if isinstance(methods, Sequence) else [methods]
    spec: dict[str, Any] = {
        "kind": "delta" if isinstance(tree, Delta) else "adapters",
        "model": str(model),
        "base_fingerprint": fingerprint(params),
        "dtype": next(str(leaf.dtype) for leaf in jax.tree.leaves(params)),
        "methods": [{"type": type(method).__name__, **dataclasses.asdict(method)} for method in methods],
        **({} if generator is None else {"generator": {"type": type(generator).__name__, **dataclasses.asdict(generator)}}),
        "mode": mode,
        **notes,
    }
    stored: dict[str, Any] = {"tree": tree}
    if isinstance(tree, Delta):
        pairs = {path: leaf for path, leaf in tree.leaves.items() if isinstance(leaf, LowRank)}
        spec["pairs"] = {path: {"shape": leaf.shape, "axes": leaf.axes} for path, leaf in pairs.items()}
        stored["tree"] = trees.nest(
            {path: {"a": leaf.a, "b": leaf.b} if path in pairs else leaf for path, leaf in tree.leaves.items()}
        )
    if adapters0 is not None:
        stored["adapters0"] = adapters0
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_adapters(Path(folder) / FILE, stored, spec)
    write_json(Path(folder) / "config.json", spec)


def load_run(folder: str | os.PathLike[str], base: tuple[Any, Any] | None = None) -> Run:
    """Reads a run and loads the base model it was made for.

    Args:
      folder: as given to :func:`save_run`.
      base: ``(model, params)`` that are loaded already, to be used in place of loading them again.

    Raises:
      FileNotFoundError: if the folder holds no run.
      ValueError: if the file is damaged, names an unknown method, or was made for other base weights.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        if (Path(folder) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is a PEFT adapter; make a run of it first: pefusion convert {folder} --to run --out DIR"
            )
        raise FileNotFoundError(f"{folder} holds no {FILE}; give the folder that 'pefusion finetune' or 'pefusion fuse' wrote")
    stored, spec = load_adapters(path)
    given, held = {"dtype": None, **spec}, {"tree": None, **stored}
    lacking = [name for name, kind in _SPEC.items() if name not in given or not isinstance(given[name], kind)]
    lacking += [name for name in ("tree", "adapters0") if not isinstance(held.get(name, {}), Mapping)]
    if lacking or spec["kind"] not in ("adapters", "delta"):
        what = ", ".join(lacking) or f"a kind that is known, and has {spec['kind']!r}"
        raise ValueError(f"{path} was not written by save_run: it lacks {what}; train the adapter again")
    model, params = load_pretrained(spec["model"], dtype=spec.get("dtype")) if base is None else base
    found = fingerprint(params)
    if found != spec["base_fingerprint"]:
        raise ValueError(
            f"{path} was made for other base weights: {spec['model']} with fingerprint {spec['base_fingerprint'][:12]}, but "
            f"the model that was loaded has {found[:12]}; load the model that it was trained on"
        )
    adapters0, tree = stored.get("adapters0"), stored["tree"]
    if spec["mode"] is not None and adapters0 is None:
        raise ValueError(f"{path} is linearized but holds no adapters0, the point of expansion; train it again")
    try:
        adapted = adapt(model, methods_of(spec))
        if (generator := generator_of(spec)) is not None:
            adapted = generate(adapted, generator)
        if spec["mode"] is not None:
            adapted = linearize(adapted, adapters0, spec["mode"])
        if spec["kind"] == "delta":
            tree = Delta(_changes(tree, spec.get("pairs", {})))
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # a damaged setting shows in many ways
        raise ValueError(f"{path} cannot be used: {'it lacks ' if isinstance(error, KeyError) else ''}{error}") from error
    return Run(model, params, adapted, tree, adapters0, spec)


def _changes(tree: Mapping[str, Any], pairs: Mapping[str, Any]) -> dict[str, Any]:
    leaves = trees.flat(tree)
    changes: dict[str, Any] = {}
    for path, pair in pairs.items():
        shape, axes = tuple(pair["shape"]), None if pair["axes"] is None else tuple(pair["axes"])
        a, b = leaves.pop(f"{path}/a"), leaves.pop(f"{path}/b")
        product = (*a.shape[:-1], b.shape[-1])
        if b.shape != (*a.shape[:-2], a.shape[-1], b.shape[-1]) or math.prod(product) != math.prod(shape):
            raise ValueError(f"the pair of {path!r}, {a.shape} and {b.shape}, does not multiply to {shape}; train it again")
        if axes is not None and sorted(axes) != list(range(len(shape))):
            raise ValueError(f"the axes of {path!r}, {axes}, are not an order of those of {shape}; train it again")
        changes[path] = LowRank(a, b, shape, axes)
    return changes | leaves


def methods_of(spec: Mapping[str, Any]) -> list[Any]:
    """The methods that a run's metadata describes, as they were given to ``adapt``.

    Raises:
      ValueError: for a method or a setting that is not known here.
    """
    return [_made(given, _METHODS, "method") for given in spec["methods"]]


def generator_of(spec: Mapping[str, Any]) -> Any:
    """The generator that a run's metadata describes, as it was given to ``generate``; ``None`` if there is none.

    Raises:
      ValueError: as :func:`methods_of`.
    """
    return _made(spec["generator"], _GENERATORS, "generator") if "generator" in spec else None


def _made(given: Mapping[str, Any], known: Mapping[str, Any], what: str) -> Any:
    fields = dict(given) if isinstance(given, Mapping) else {}
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"the {what} {name!r} is not one of {', '.join(known)}; update pefusion_jax")
    try:
        return known[name](**fields)
    except TypeError as error:
        raise ValueError(f"{name} does not take these settings: {error}; update pefusion_jax") from error
