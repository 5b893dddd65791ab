r"""How task vectors lie to each other in weight space, layer by layer: no model and no data needed.

Every function takes task name -> tree, where a tree is a :class:`~pefusion_jax.deltas.Delta` (low-rank pairs or dense
leaves, of any targets: a parameter that a task leaves alone has changed by zero) or a plain tree of displacements. Layers
that a scan has stacked are looked at one by one. The arithmetic is NumPy in float64, on the host.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees as tree_tools
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.evaluation.analysis import table, write_table
from pefusion_jax.fusion.parts import trim
from pefusion_jax.layerwise import separate, stacked_layers

Vectors = Mapping[str, Any]


class Pairwise(NamedTuple):
    """A measure of every pair of tasks, in each layer and overall.

    Attributes:
      measure: what it is, for labels.
      names: the tasks.
      layers: slash paths, one for each layer.
      overall: ``[task, task]``.
      by_layer: ``[layer, task, task]``; NaN where a pair has no such value, as where one of the tasks leaves the layer alone.
      baseline: what random vectors would have, of the shape of ``by_layer``, or ``None``.
    """

    measure: str
    names: tuple[str, ...]
    layers: tuple[str, ...]
    overall: np.ndarray
    by_layer: np.ndarray
    baseline: np.ndarray | None = None

    def pairs(self) -> dict[tuple[str, str], np.ndarray]:
        """Values in each layer, ``[layer]``, of each pair of different tasks."""
        count = len(self.names)
        return {(self.names[i], self.names[j]): self.by_layer[:, i, j] for i in range(count) for j in range(i + 1, count)}

    def csv(self) -> str:
        """One line a layer and pair; the layer ``overall`` comes first."""
        count = len(self.names)
        cells = [(i, j) for i in range(count) for j in range(count)]
        rows = [["overall", self.names[i], self.names[j], self.overall[i, j], float("nan")] for i, j in cells]
        for place, layer in enumerate(self.layers):
            chance = np.full((count, count), np.nan) if self.baseline is None else self.baseline[place]
            rows += [[layer, self.names[i], self.names[j], self.by_layer[place, i, j], chance[i, j]] for i, j in cells]
        return table(["layer", "task", "other task", self.measure, "random baseline"], rows)

    def write(self, folder: str | os.PathLike[str], name: str | None = None) -> Path:
        """Writes ``name.csv`` into a folder, atomically; it is named after the measure if no name is given."""
        # A measure may hold a path with stars. Each sign becomes one underscore, so that few names fall together.
        return write_table(folder, name or re.sub(r"[^\w.-]", "_", self.measure), self.csv())


class LayerNorms(NamedTuple):
    """Frobenius norms of task vectors.

    Attributes:
      names: the tasks.
      layers: slash paths.
      by_layer: ``[layer, task]``.
      overall: ``[task]``.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    by_layer: np.ndarray
    overall: np.ndarray

    def csv(self) -> str:
        """One line a layer, one column a task; the layer ``overall`` comes first."""
        rows = [["overall", *self.overall], *([layer, *line] for layer, line in zip(self.layers, self.by_layer, strict=True))]
        return table(["layer", *self.names], rows)

    def write(self, folder: str | os.PathLike[str], name: str = "layer_norms") -> Path:
        """Writes ``name.csv`` into a folder, atomically."""
        return write_table(folder, name, self.csv())


class Overlap(NamedTuple):
    """Overlaps of dominant subspaces: of inputs (left singular vectors) and of outputs (right ones)."""

    inputs: Pairwise
    outputs: Pairwise


def cosine(vectors: Vectors, *, stacks: Collection[str] = STACKS) -> Pairwise:
    r"""Cosine similarities of task vectors.

    .. math:: \frac{\langle \tau_i, \tau_j \rangle}{\lVert \tau_i \rVert \, \lVert \tau_j \rVert}

    For low-rank pairs :math:`\langle A_i B_i, A_j B_j \rangle = \langle A_i^\top A_j, B_i B_j^\top \rangle` needs no product of
    the size of the layer.

    Args:
      vectors: task name -> Delta or tree of displacements.
      stacks: names of the nodes whose leaves may be stacked layers; ``()`` for none.

    Returns:
      Cosines; NaN for a layer where one of the two has no length, 0 overall.

    Raises:
      ValueError: if there is no task, kinds are mixed, shapes differ, or a leaf is not finite.
    """
    names, layers = _layers(vectors, stacks)
    grams = np.stack([_gram(changes) for changes in layers.values()])
    return Pairwise("cosine similarity", names, tuple(layers), np.nan_to_num(_unit(grams.sum(axis=0))), _unit(grams))


def layer_norms(vectors: Vectors, *, stacks: Collection[str] = STACKS) -> LayerNorms:
    """Frobenius norm of each task's vector in each layer; arguments and errors as in :func:`cosine`."""
    names, layers = _layers(vectors, stacks)
    squares = np.stack([np.diagonal(_gram(changes)) for changes in layers.values()])
    return LayerNorms(names, tuple(layers), np.sqrt(squares), np.sqrt(squares.sum(axis=0)))


def sign_conflicts(
    vectors: Vectors,
    *,
    density: float = 0.2,
    scope: Literal["global", "per_tensor"] = "global",
    stacks: Collection[str] = STACKS,
) -> Pairwise:
    r"""Share of coordinates on which two tasks disagree in sign, among those that both keep.

    What a task keeps are its largest entries by magnitude, exactly those that :func:`~pefusion_jax.fusion.ties` keeps.
    Independent vectors disagree on one half. Pairs are multiplied out: signs are not to be had from factors.

    Args:
      vectors: task name -> Delta or tree of displacements.
      density: share of entries that a task keeps.
      scope: over which entries magnitudes are compared, as in :func:`~pefusion_jax.fusion.trim`.
      stacks: as in :func:`cosine`.

    Returns:
      Shares; NaN where no coordinate is kept by both.

    Raises:
      ValueError: as :func:`cosine`, and for a density outside (0, 1].

    Reference: P. Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023.
    """
    names, layers = _layers(vectors, stacks)
    dense = {path: jnp.stack([jnp.asarray(_dense(c), jnp.float32) for c in changes]) for path, changes in layers.items()}
    kept = trim(density, scope)(dense)
    against, both = [], []
    for path in layers:  # JAX hands dictionaries back in another order
        signs = np.sign(np.asarray(kept[path], np.float64)).reshape(len(names), -1)
        agreement, shared = signs @ signs.T, np.abs(signs) @ np.abs(signs).T
        against.append((shared - agreement) / 2)
        both.append(shared)
    shares = _ratio(np.stack(against), np.stack(both))
    overall = _ratio(np.sum(against, axis=0), np.sum(both, axis=0))
    return Pairwise("sign conflicts", names, tuple(layers), overall, shares, np.full(shares.shape, 0.5))


def subspace_overlap(vectors: Vectors, *, k: int = 8, stacks: Collection[str] = STACKS) -> Overlap:
    r"""How far the dominant input and output directions of two tasks coincide, layer by layer.

    .. math:: \frac{1}{\min(k_i, k_j)} \lVert U_i^\top U_j \rVert_F^2

    is the mean squared cosine of the principal angles between the spans of the first :math:`k` singular vectors;
    :math:`k_t < k` where a change has a lower rank. Random subspaces have :math:`\max(k_i, k_j) / d`. Singular vectors of pairs
    come from QR of the factors and a core of the size of the rank.

    Args:
      vectors: task name -> Delta or tree of displacements. Matrices are looked at; vectors and other leaves are left out.
      k: number of singular vectors.
      stacks: as in :func:`cosine`.

    Returns:
      Overlaps of inputs and of outputs, in [0, 1], with the random baselines; ``overall`` is the mean over layers. NaN where a
      task has no change.

    Raises:
      ValueError: as :func:`cosine`, and if k < 1 or nothing is a matrix.
    """
    if k < 1:
        raise ValueError(f"k={k} singular vectors do not span a subspace; pass 1 or more")
    names, layers = _layers(vectors, stacks)
    matrices = {path: changes for path, changes in layers.items() if _is_matrix(changes[0])}
    if not matrices:
        raise ValueError("no leaf is a matrix, so there are no singular vectors; pass weight-space changes (adapted.deltas)")
    found: list[tuple[list[np.ndarray], list[np.ndarray]]] = []  # (overlaps, baselines) of each layer, [side] each
    for changes in matrices.values():
        bases = [_singular(change, k) for change in changes]  # [task][batch entry] of (left, right)
        entries = [_overlaps([of_task[entry] for of_task in bases]) for entry in range(len(bases[0]))]
        # The experts of a layer count alike.
        found.append(
            ([_nanmean([e[0][s] for e in entries]) for s in (0, 1)], [_nanmean([e[1][s] for e in entries]) for s in (0, 1)])
        )
    sides = []
    for side, what in enumerate(("input subspace overlap", "output subspace overlap")):
        values = np.stack([overlaps[side] for overlaps, _ in found])
        chance = np.stack([baselines[side] for _, baselines in found])
        sides.append(Pairwise(what, names, tuple(matrices), _nanmean(list(values)), values, chance))
    return Overlap(*sides)


def _layers(vectors: Vectors, stacks: Collection[str]) -> tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]:
    """One layer a leaf: slash path -> the change in each task, all pairs or all dense, in host memory as float64."""
    if isinstance(vectors, Delta) or not isinstance(vectors, Mapping) or not vectors:
        raise ValueError(f"pass a mapping task name -> tree or Delta with at least one entry, not {type(vectors).__name__}")
    kinds = {isinstance(tree, Delta) for tree in vectors.values()}
    if len(kinds) > 1:
        raise ValueError("some trees are Deltas and others are not; turn all into Deltas by adapted.deltas(params, tree)")
    if kinds == {False}:
        tree_tools.require_same_structure(vectors)
    by_name = {n: dict(tree.leaves) if isinstance(tree, Delta) else tree_tools.paths(tree) for n, tree in vectors.items()}
    by_path: dict[str, tuple[Any, ...]] = {}
    for path in dict.fromkeys(path for leaves in by_name.values() for path in leaves):
        present = {name: leaves[path] for name, leaves in by_name.items() if path in leaves}
        first = next(iter(present))
        for name, change in present.items():
            if change.shape != present[first].shape:
                raise ValueError(f"the change of {path!r} is {present[first].shape} in {first!r}, {change.shape} in {name!r}")
        host = {name: _host(change, f"{name!r}: {path!r}") for name, change in present.items()}
        like = next((change for change in host.values() if isinstance(change, LowRank)), None)
        if like is None:
            by_path[path] = tuple(host.get(name, np.zeros(present[first].shape)) for name in by_name)
            continue
        # Where one task has a pair, all are read as the matrices that its factors span.
        if all(isinstance(change, LowRank) and change.axes == like.axes for change in host.values()):
            none: Any = LowRank(like.a[..., :0], like.b[..., :0, :], like.shape, like.axes)
            by_path[path] = tuple(host.get(name, none) for name in by_name)
        else:
            inputs, outputs = like.a.shape[-2], like.b.shape[-1]
            zero = np.zeros((*like.a.shape[:-2], inputs, outputs))
            axes = range(len(like.shape)) if like.axes is None else like.axes
            by_path[path] = tuple(
                _dense(host[name]).transpose(*axes).reshape(zero.shape) if name in host else zero for name in by_name
            )
    if not by_path:
        raise ValueError("the trees have no leaves; there is nothing to compare")
    separated = separate(by_path, stacked_layers(by_path, stacks))
    return tuple(vectors), {path: separated[path] for path in sorted(separated, key=_by_number)}


def _by_number(path: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in path.split("/")]


def _host(change: Any, where: str) -> Any:
    if isinstance(change, LowRank):
        return LowRank(_host(change.a, where), _host(change.b, where), change.shape, change.axes)
    found = np.asarray(change).astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{where} holds {int((~np.isfinite(found)).sum())} NaN or infinite elements; leave this tree out")
    return found


def _dense(change: Any) -> np.ndarray:
    if not isinstance(change, LowRank):
        return change
    product = np.matmul(change.a, change.b)
    if change.axes is None:
        return product.reshape(change.shape)
    ordered = product.reshape([change.shape[axis] for axis in change.axes])
    return ordered.transpose([change.axes.index(axis) for axis in range(len(change.axes))])


def _gram(changes: tuple[Any, ...]) -> np.ndarray:
    """Inner products of the tasks' changes of one layer, ``[task, task]``."""
    count = len(changes)
    gram = np.zeros((count, count))
    for i, one in enumerate(changes):
        for j in range(i, count):
            other = changes[j]
            if isinstance(one, LowRank):
                inner = np.matmul(np.swapaxes(one.a, -1, -2), other.a) * np.matmul(one.b, np.swapaxes(other.b, -1, -2))
                gram[i, j] = gram[j, i] = inner.sum()
            else:
                gram[i, j] = gram[j, i] = np.vdot(one, other)
    return np.maximum(gram, np.where(np.eye(count, dtype=bool), 0.0, -np.inf))


def _unit(gram: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    return _ratio(gram, lengths[..., :, None] * lengths[..., None, :])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _is_matrix(change: Any) -> bool:
    return isinstance(change, LowRank) or change.ndim == 2


def _singular(change: Any, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first singular vectors ``[d, <= k]``, left and right, of each batch entry's matrix."""
    if not isinstance(change, LowRank):
        return [_top(*np.linalg.svd(change, full_matrices=False), k)]
    entries = int(np.prod(change.a.shape[:-2]))  # said, because a rank of 0 leaves it open
    factors = zip(change.a.reshape(entries, *change.a.shape[-2:]), change.b.reshape(entries, *change.b.shape[-2:]), strict=True)
    out = []
    for a, b in factors:
        (left, upper), (right, lower) = np.linalg.qr(a), np.linalg.qr(b.T)
        u, s, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
        out.append(_top(left @ u, s, v @ right.T, k))
    return out


def _top(u: np.ndarray, s: np.ndarray, v: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    # Stored in float32 or less, so that what is smaller than its rounding is no direction of the change.
    noise = s.max(initial=0.0) * max(u.shape[0], v.shape[1]) * np.finfo(np.float32).eps
    rank = min(k, int(np.sum(s > noise)))
    return u[:, :rank], v[:rank].T


def _overlaps(bases: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Overlap and random baseline of all pairs, ``[task, task]``, of the left and of the right bases."""
    values, chances = [], []
    for side in (0, 1):
        ranks = np.asarray([basis[side].shape[1] for basis in bases], np.float64)
        squares = np.asarray([[np.sum(np.square(one[side].T @ other[side])) for other in bases] for one in bases])
        smaller, larger = np.minimum(ranks[:, None], ranks[None]), np.maximum(ranks[:, None], ranks[None])
        values.append(_ratio(squares, smaller))
        chances.append(np.where(smaller > 0, larger / bases[0][side].shape[0], np.nan))
    return values, chances


def _nanmean(values: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    return _ratio(np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))
