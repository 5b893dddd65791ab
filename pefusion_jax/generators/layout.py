"""Which layers a model has, and under which names: so that a generator's tree fits the looped and the scanned model alike.

    encoder/layer/3/query/lora_a    [in, rank]           looped     its role: encoder/layer/*/query/lora_a
    encoder/layer/query/lora_a      [layer, in, rank]    scanned    the same role

A *role* is a path with a star for the number of the layer. What all layers have under a role is one array with the layers in
front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.layerwise import stacked_layers


class Layout(NamedTuple):
    """The layers of a model.

    Attributes:
      scanned: path of a node whose leaves are stacked layers -> number of layers.
      looped: what stands before a layer's number, such as ``encoder/layer/`` -> number of layers. A number that has no second
        beside it, as in Linen's ``Encoder_0``, is a part of a name, but for that of the only layer of a stack.
      adapted: path of an adapter leaf -> whether the model has it.
      modules: (what stands before the number, the module behind it) -> numbers of the layers that have the module; none where
        its parameters differ in shape, as those of ``Dense_0`` and ``Dense_1`` of a module of one's own: these are no layers of
        one kind, though they may be for the modules beside it.
    """

    scanned: dict[str, int]
    looped: dict[str, int]
    adapted: Callable[[str], bool]
    modules: Mapping[tuple[str, str], frozenset[int]] = {}

    def role(self, path: str) -> tuple[str, int | None]:
        """The role of a path, and the number of its layer; ``None`` for a leaf of no layer, or of all that a scan stacked."""
        for node in self.scanned:
            if path.startswith(node + "/"):
                return f"{node}/*{path[len(node) :]}", None
        for before, number, rest in _numbered(path):
            if before in self.looped and number in self._numbers(before, rest):
                return f"{before}*{rest}", number
        return path, None

    def _numbers(self, before: str, rest: str) -> frozenset[int]:
        """Of the layers with a leaf's module; one without parameters, such as a tap, goes by what it stands in."""
        found = (self.modules.get((before, module)) for module in _modules(rest))
        return next((numbers for numbers in found if numbers is not None), frozenset())

    def layers(self, role: str) -> int | None:
        """The number of layers of a role; ``None`` if it has no star."""
        before, star, _ = role.partition("*")
        if not star:
            return None
        count = self.scanned.get(before.rstrip("/"), self.looped.get(before))
        if count is None:
            known = sorted({f"{node}/*" for node in self.scanned} | {f"{prefix}*" for prefix in self.looped})
            raise ValueError(
                f"the generator's tree has a leaf of {role!r}, but the base parameters have no such layers; they have "
                f"{', '.join(known) or 'none'}: was it made for another model?"
            )
        return count

    def gather(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Path -> leaf becomes role -> ``[layer, ...]``, or the leaf itself where there are no layers.

        Raises:
          ValueError: if the layers of a role have leaves of different shapes.
        """
        found: dict[str, dict[int | None, Any]] = {}
        for path, leaf in leaves.items():
            role, number = self.role(path)
            found.setdefault(role, {})[number] = leaf
        out: dict[str, Any] = {}
        for role, by_number in sorted(found.items()):
            if None in by_number:
                out[role] = by_number[None]
                continue
            shapes = {leaf.shape for leaf in by_number.values()}
            if len(shapes) > 1:
                raise ValueError(
                    f"the layers have adapters of different shapes at {role!r}: {', '.join(map(str, sorted(shapes)))}; one "
                    "generator makes one shape, so give all layers the same rank or bottleneck"
                )
            out[role] = jnp.stack([by_number[number] for number in sorted(by_number)])  # type: ignore[type-var]
        return out

    def spread(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Role -> ``[layer, ...]`` becomes path -> leaf, in the model's own form; layers that are not adapted are left out."""
        out: dict[str, Any] = {}
        for role, leaf in leaves.items():
            before, star, rest = role.partition("*")
            if not star or before.rstrip("/") in self.scanned:
                out[before.rstrip("/") + rest if star else role] = leaf
            else:
                paths = [f"{before}{layer}{rest}" for layer in range(self.layers(role) or 0)]
                there = self._numbers(before, rest)
                kept = {path: leaf[layer] for layer, path in enumerate(paths) if layer in there and self.adapted(path)}
                # Where no layer at all has the leaf, the caller's check of every path is to say so.
                out |= kept or {path: leaf[layer] for layer, path in enumerate(paths)}
        return out


def layout_of(params: Mapping[str, Any], adapted: Callable[[str], bool]) -> Layout:
    """The layout of a model with these base parameters.

    Args:
      params: nested dictionary of the base parameters.
      adapted: see :class:`Layout`.
    """
    flat = trees.flat(params)
    scanned = stacked_layers({path: (leaf,) for path, leaf in flat.items()}, STACKS)
    loose = {path: leaf for path, leaf in flat.items() if not any(path.startswith(node + "/") for node in scanned)}
    found: dict[str, set[int]] = {}
    shapes: dict[tuple[str, str], dict[str, set[tuple[int, ...]]]] = {}  # of a module, leaf by leaf
    there: dict[tuple[str, str], set[int]] = {}
    for path, leaf in loose.items():
        for before, number, rest in _numbered(path):
            found.setdefault(before, set()).add(number)
            for module in _modules(rest):
                shapes.setdefault((before, module), {}).setdefault(rest, set()).add(leaf.shape)
                there.setdefault((before, module), set()).add(number)
    looped = {
        before: max(numbers) + 1
        for before, numbers in found.items()
        if len(numbers) > 1 or before[:-1].rpartition("/")[2] in STACKS
    }
    unlike = {place for place, by_leaf in shapes.items() if any(len(of) > 1 for of in by_leaf.values())}
    modules = {place: frozenset(() if place in unlike else of) for place, of in there.items() if place[0] in looped}
    return Layout(scanned, looped, adapted, modules)


def _numbered(path: str) -> Iterator[tuple[str, int, str]]:
    """What stands before each number of a path that may be a layer's (``layer/3/``, ``layer_3/``), the number, and the rest."""
    for match in re.finditer(r"(?:^|(?<=[/_]))(\d+)(?=/)", path):
        yield path[: match.start()], int(match[1]), path[match.end() :]


def _modules(rest: str) -> Iterator[str]:
    """The modules that a leaf stands in, from the innermost: ``/attention/query``, ``/attention``, and the layer itself."""
    while rest:
        rest = rest.rpartition("/")[0]
        yield rest
