"""One layer a leaf: taking apart layers that a scan has stacked, and putting them back.

A scanned model keeps the weights of all its layers in one leaf, ``encoder/layer/query/kernel [layer, in, out]``, where an
unrolled one has ``encoder/layer/0/query/kernel [in, out]``. A method that ranks the entries of a tensor, takes its singular
values or draws by its path must not tell the two apart, so it sees the second form always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from pefusion_jax.deltas import Change, LowRank, dense


def stacked_layers(leaves: Mapping[str, tuple[Any, ...]], stacks: Collection[str]) -> dict[str, int]:
    """Finds the nodes whose leaves are stacked layers.

    A node counts if its name is one of ``stacks``, it is the outermost such node of its paths, what follows are modules and
    not layer numbers, and all leaves below it have the same leading axis; one beyond their own two, where a leaf is a pair or a
    kernel, an embedding or a LoRA factor by name.

    Args:
      leaves: slash path -> the leaf in each task.
      stacks: names of nodes, such as ``"layer"``.

    Returns:
      Path of the node -> its number of layers.
    """
    sizes: dict[str, set[int]] = {}
    for path, of_tasks in leaves.items():
        node = _node(path, stacks)
        if node is not None:
            sizes.setdefault(node, set()).add(_leading(path, of_tasks[0]))
    return {node: found.pop() for node, found in sizes.items() if len(found) == 1 and 0 not in found}


def separate(leaves: Mapping[str, tuple[Any, ...]], counts: Mapping[str, int]) -> dict[str, tuple[Any, ...]]:
    """Gives each layer below the nodes in ``counts`` leaves of its own: ``node/rest`` becomes ``node/0/rest``, ..."""
    out: dict[str, tuple[Any, ...]] = {}
    for path, of_tasks in leaves.items():
        node = _below(path, counts)
        if node is None:
            out[path] = of_tasks
        else:
            for layer in range(counts[node]):
                out[f"{node}/{layer}{path[len(node) :]}"] = tuple(_layer(change, layer) for change in of_tasks)
    return dict(sorted(out.items()))


def join(leaves: Mapping[str, Change], counts: Mapping[str, int]) -> dict[str, Any]:
    """Undoes :func:`separate` for what a method made of it."""
    out: dict[str, Change] = {}
    layers: dict[str, list[Any]] = {}
    for path, change in leaves.items():
        node = _below(path, counts)
        if node is None:
            out[path] = change
        else:
            number, _, rest = path[len(node) + 1 :].partition("/")
            layers.setdefault(f"{node}/{rest}", [None] * counts[node])[int(number)] = change
    return dict(sorted((out | {path: _stack(changes) for path, changes in layers.items()}).items()))


def _node(path: str, stacks: Collection[str]) -> str | None:
    segments = path.split("/")
    for place, segment in enumerate(segments):
        if segment in stacks and place + 1 < len(segments):
            # A module called "layer" that holds parameters itself is a layer, not a stack of them.
            return None if segments[place + 1].isdigit() or place + 2 == len(segments) else "/".join(segments[: place + 1])
    return None


def _leading(path: str, leaf: Any) -> int:
    """Size of the axis that may be that of layers; 0 where there is none to spare."""
    if isinstance(leaf, LowRank):
        return leaf.a.shape[0] if leaf.a.ndim > 2 else 0
    own = 2 if path.rpartition("/")[2] in ("kernel", "embedding", "lora_a", "lora_b") else 0
    return leaf.shape[0] if len(leaf.shape) > own else 0


def _below(path: str, counts: Mapping[str, int]) -> str | None:
    return next((node for node in counts if path.startswith(node + "/")), None)


def _layer(change: Change, layer: int) -> Change:
    if not isinstance(change, LowRank):
        return change[layer]
    axes = None if change.axes is None else tuple(axis - 1 for axis in change.axes[1:])
    return LowRank(change.a[layer], change.b[layer], change.shape[1:], axes)


def _stack(changes: list[Change]) -> Change:
    pairs = [change for change in changes if isinstance(change, LowRank)]
    if len(pairs) < len(changes):
        return jnp.stack([dense(change) for change in changes])
    rank = max(pair.rank for pair in pairs)
    first = pairs[0]
    return dataclasses.replace(
        first,
        a=jnp.stack([_padded(pair.a, -1, rank) for pair in pairs]),
        b=jnp.stack([_padded(pair.b, -2, rank) for pair in pairs]),
        shape=(len(pairs), *first.shape),
        axes=None if first.axes is None else (0, *(axis + 1 for axis in first.axes)),
    )


def _padded(factor: Any, axis: int, rank: int) -> Any:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return jnp.pad(factor, widths)
