"""The layers of our backbones under the names that PEFT adapters use for them.

PEFT names a layer as transformers holds it in memory, after ``base_model.model.``. That name depends on the class that was
adapted (``BertModel`` has no prefix, ``BertForSequenceClassification`` has ``bert.``) and on transformers' version (5 renamed
the layers of ViT, DeiT and DINOv2 in memory, but not in files). A :class:`Column` is one such way of naming; an adapter is
read in the column that its names are from, and written in the one that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.backbones import Family
from pefusion_jax.backbones.family import in_memory, on_disk
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.backbones.names import Entry, parameter_shape

TARGETS = ("transformers>=5", "transformers<5")


class Module(NamedTuple):
    """One module of a backbone.

    Attributes:
      path: slash path, in the loop layout.
      name: dotted name in files, without the prefix of headed models.
      memory: the same in the memory of transformers 5.
      kind: ``linear``, ``conv`` or ``embedding``, which can be adapted, or ``other``.
      weights: parameter name in files (``weight``, ``bias``) -> slash path of the parameter.
      shape: of the kernel or table, in our layout; empty for ``other``.
      part: ``(i, n)`` if it is the i-th of n modules that are one in files (and in transformers 4).
    """

    path: str
    name: str
    memory: str
    kind: str
    weights: dict[str, str]
    shape: tuple[int, ...]
    part: tuple[int, int] | None


class Column(NamedTuple):
    """One way of naming the modules.

    Attributes:
      label: for messages.
      modules: name -> the modules that it means; several where files hold them fused.
    """

    label: str
    modules: dict[str, tuple[Module, ...]]


def modules_of(family: Family, config: Any) -> list[Module]:
    """The modules of a backbone, in the order of its table."""
    found: dict[str, Module] = {}
    for path, entry in family.table(config).items():
        site, _, leaf = path.rpartition("/")
        name, _, parameter = entry.name.rpartition(".")
        module = found.get(site)
        if module is None:
            # Where our name differs from the one in files (a fused tensor, split), memory has ours. Where the place differs
            # too (what only the first layer has stands outside of the layers here), it has that of files.
            dotted = site.replace("/", ".")
            beside = dotted.rpartition(".")[0] == name.rpartition(".")[0]
            memory = in_memory(family, dotted if beside else name)
            module = found[site] = Module(site, name, memory, "other", {}, (), entry.part)
        module.weights[parameter] = path
        kind, shape = _kind(leaf, entry)
        if kind != "other":
            found[site] = module._replace(kind=kind, shape=shape)
    return list(found.values())


def _kind(leaf: str, entry: Entry) -> tuple[str, tuple[int, ...]]:
    shape = parameter_shape(entry)
    if leaf == "embedding":
        return "embedding", shape
    if leaf == "kernel" and len(shape) in (2, 4):
        return ("linear" if len(shape) == 2 else "conv"), shape
    return "other", ()


def columns_of(family: Family, config: Any) -> list[Column]:
    """Every way in which an adapter may name the modules, without repetition; what we write by default comes first."""
    modules = modules_of(family, config)
    found: list[Column] = []
    for target in TARGETS:
        for prefix in dict.fromkeys((default_prefix(family, config), "", family.prefix)):
            made = column(family, modules, target, prefix)
            if made.modules.keys() not in [known.modules.keys() for known in found]:
                found.append(made)
    return found


def default_prefix(family: Family, config: Any) -> str:
    """What the class that fits the backbone best puts in front: the prefix of headed models if the backbone has a head."""
    names = on_disk(family, family.table(config), config)
    return family.prefix if any(stored != name for name, stored in names.items()) else ""


def column(family: Family, modules: Iterable[Module], target: str, prefix: str) -> Column:
    """The names of ``modules`` for one version of transformers and one prefix.

    Raises:
      ValueError: for a target that is not in ``TARGETS``.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {', '.join(map(repr, TARGETS))}")
    named: dict[str, tuple[Module, ...]] = {}
    for module in modules:
        name = module.memory if target == TARGETS[0] else module.name
        if not (family.heads and (module.name + ".").startswith(family.heads)):
            name = prefix + name
        named[name] = (*named.get(name, ()), module)
    return Column(f"{target}" + (f", prefix {prefix!r}" if prefix else ", no prefix"), named)


def containers(names: Iterable[str]) -> set[str]:
    """The modules that hold others, from the names of those that hold parameters."""
    return {name[:i] for name in names for i in (match.start() for match in re.finditer(r"\.", name))}


def scanned(path: str) -> tuple[str, int | None]:
    """The path in the scan layout, and the layer; the path itself and None outside the layers."""
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if part in STACKS and parts[i + 1].isdigit():
            return "/".join(parts[: i + 1] + parts[i + 2 :]), int(parts[i + 1])
    return path, None


class Parameters:
    """Base parameters of either layout, asked for by their path in the loop layout.

    Args:
      params: nested dictionary, or a dictionary of collections with an entry ``params``.
      family: of the model.
      config: of the model.

    Attributes:
      stacked: whether the layers are stacked on a leading axis.

    Raises:
      ValueError: if these are not the parameters of the model.
    """

    def __init__(self, params: Mapping[str, Any], family: Family, config: Any):
        if isinstance(params.get("params"), Mapping):
            params = params["params"]
        self._flat = trees.flat(params)
        table = family.table(config)
        self.stacked = any(path not in self._flat and scanned(path)[0] in self._flat for path in table)
        for path, entry in table.items():
            stored, layer = scanned(path) if self.stacked else (path, None)
            leaf = self._flat.get(stored)
            shape = None if leaf is None else tuple(leaf.shape)[0 if layer is None else 1 :]
            if shape != parameter_shape(entry):
                raise ValueError(
                    f"these are not the parameters of this {family.name} model: {stored} should have the shape "
                    f"{parameter_shape(entry)} and " + ("is missing" if leaf is None else f"has {shape}")
                )

    def __getitem__(self, path: str) -> Any:
        if path in self._flat:
            return jnp.asarray(self._flat[path]).astype(jnp.float32)
        stored, layer = scanned(path)
        return jnp.asarray(self._flat[stored][layer]).astype(jnp.float32)


def layer_counts(paths: Iterable[str]) -> dict[str, int]:
    """Scan path -> number of layers, for parameters that stand in layers."""
    counts: dict[str, int] = {}
    for path in paths:
        stored, layer = scanned(path)
        if layer is not None:
            counts[stored] = max(counts.get(stored, 0), layer + 1)
    return counts


def rule(paths: Iterable[str], known: Iterable[str]) -> str:
    """A regular expression that matches ``paths`` and nothing else of ``known``, with layer numbers left open if it may.

    Args:
      paths: slash paths.
      known: all slash paths that there are.
    """
    wanted = set(paths)
    shapes: dict[str, list[str]] = {}
    for path in known:
        shapes.setdefault(re.sub(r"(?<=/)\d+(?=/|$)", "#", path), []).append(path)
    out = []
    for shape, members in shapes.items():
        picked = [path for path in members if path in wanted]
        if picked and len(picked) == len(members) > 1:
            out.append(r"\d+".join(re.escape(piece) for piece in shape.split("#")))
        else:
            out += [re.escape(path) for path in picked]
    return "|".join(out)
