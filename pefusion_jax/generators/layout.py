"""Which layers a model has, and under which names: so that a generator's tree fits the looped and the scanned model alike.

    encoder/layer/3/query/lora_a    [in, rank]           looped     its role: encoder/layer/*/query/lora_a
    encoder/layer/query/lora_a      [layer, in, rank]    scanned    the same role

A *role* is a path with a star for the number of the layer. What all layers have under a role is one array with the layers in
front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.layerwise import stacked_layers


class Layout(NamedTuple):
    """The layers of a model.

    Attributes:
      scanned: path of a node whose leaves are stacked layers -> number of layers.
      looped: what stands before a layer's number, such as ``encoder/layer/`` -> number of layers. Numbered modules whose
        parameters differ in shape, such as ``Dense_0`` and ``Dense_1`` of a module of one's own, are no layers of one kind.
      adapted: path of an adapter leaf -> whether the model has it.
    """

    scanned: dict[str, int]
    looped: dict[str, int]
    adapted: Callable[[str], bool]

    def role(self, path: str) -> tuple[str, int | None]:
        """The role of a path, and the number of its layer; ``None`` for a leaf of no layer, or of all that a scan stacked."""
        for node in self.scanned:
            if path.startswith(node + "/"):
                return f"{node}/*{path[len(node) :]}", None
        before, number, rest = _numbered(path)
        return (path, None) if number is None or before not in self.looped else (f"{before}*{rest}", number)

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
                kept = {path: leaf[layer] for layer, path in enumerate(paths) if self.adapted(path)}
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
    looped: dict[str, int] = {}
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for path, leaf in flat.items():
        if not any(path.startswith(node + "/") for node in scanned):
            before, number, rest = _numbered(path)
            if number is not None:
                looped[before] = max(looped.get(before, 0), number + 1)
                shapes.setdefault((before, rest), set()).add(leaf.shape)
    unlike = {before for (before, _), found in shapes.items() if len(found) > 1}
    return Layout(scanned, {before: count for before, count in looped.items() if before not in unlike}, adapted)


def _numbered(path: str) -> tuple[str, int | None, str]:
    """What stands before the first layer number of a path (``layer/3/...`` or ``layer_3/...``), the number, and the rest."""
    match = re.match(r"(.*?(?:^|/|_))(\d+)(?=/)", path)
    return (path, None, "") if match is None else (match[1], int(match[2]), path[match.end() :])
