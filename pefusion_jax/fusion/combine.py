"""``fuse``: checks task trees, brings them to the space where they are combined, applies a fusion method."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax import deltas
from pefusion_jax import trees as tree_tools
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.fusion.elementwise import require_tasks
from pefusion_jax.fusion.parts import Fusion
from pefusion_jax.layerwise import join, separate, stacked_layers

Tree = Any


def fuse(
    method: Fusion,
    trees: Mapping[str, Tree] | Sequence[Tree],
    *,
    adapted: Any = None,
    params: Any = None,
    space: Literal["weight", "adapter"] = "weight",
    init: Tree = None,
    stacks: Collection[str] = STACKS,
) -> Tree:
    r"""Combines task trees into one.

    .. math:: \tau = \mathrm{method}(\tau_1, \dots, \tau_T) \qquad\text{or, with init,}\qquad
       \phi = \phi_0 + \mathrm{method}(\phi_1 - \phi_0, \dots, \phi_T - \phi_0)

    What is combined depends on what is given:

    * plain trees alone: their leaves, as they are (displacements ``tau`` of linearized models, task vectors);
    * trees with ``adapted`` and ``params``: the weight changes ``adapted.deltas(params, tree)``; the result
      is a :class:`~pefusion_jax.deltas.Delta` for ``adapted.apply_deltas`` or
      :func:`~pefusion_jax.deltas.fold`. This is the right space for adapters that enter as a product, such as
      LoRA: averaging A and B apart is not averaging AB;
    * ``space="adapter"``: the adapter leaves, with ``init`` relative to the common start, which is what
      papers on fused adapters did;
    * :class:`~pefusion_jax.deltas.Delta` objects: their changes. A parameter that a Delta does not mention is
      one that it leaves unchanged, so tasks may have adapted different layers, at different ranks. Linear
      and spectral methods keep low-rank changes as factor pairs; element-wise methods work on, and return,
      dense changes. :func:`~pefusion_jax.compression.compress` brings either to a rank of your choice.

    The result does not depend on the order of a mapping: trees are taken by sorted name. A sequence is taken
    as it comes. Nor does it depend on whether a change is a pair or dense, but for convolution kernels: a pair is the matrix
    that a LoRA makes of one, while dense ones are no matrices to the spectral methods, which average them. Nor does it
    depend on whether layers are stacked by a scan: methods that look at whole tensors see one layer at a time. Everything
    may be traced, so that ``jax.jit(lambda scale, trees: fuse(task_arithmetic(scale), trees))`` compiles once for all scales;
    leaves that are traced are not checked for NaN.

    Args:
      method: a fusion method, such as ``pefusion_jax.fusion.ties()``.
      trees: task name -> tree, or a sequence of trees; all of one structure.
      adapted: the model that the trees are adapters of; only for weight space.
      params: that model's base parameters; only with ``adapted``.
      space: where the arithmetic happens; see above.
      init: the adapters that all tasks started from; only for ``space="adapter"``.
      stacks: names of the nodes whose leaves may be stacked layers (see ``layerwise``); ``()`` for none.

    Returns:
      A tree of the given structure, shapes and dtypes, or a Delta.

    Raises:
      ValueError: if nothing is given, structures differ (naming both trees, the path and both shapes), a leaf
        holds NaN or infinity (naming the tree and the path), is not floating point or is sharded over explicit mesh
        axes (linear methods take those too), or per-task weights are for other tasks.
    """
    names, given = _named(trees)
    if method.bind is not None:
        method = method.bind(tuple(names))
    require_tasks(method, names if isinstance(trees, Mapping) else None)
    if space not in ("weight", "adapter"):
        raise ValueError(f"space must be 'weight' or 'adapter', not {space!r}")
    if init is not None and space != "adapter":
        raise ValueError("init is the common start of adapters that are fused in space='adapter'; pass it, or no init")
    if (adapted is None) != (params is None) and space == "weight":
        raise ValueError("weight space needs both adapted and params; pass both, or neither for the trees' own leaves")

    by_name = dict(zip(names, given, strict=True))
    if any(isinstance(tree, Delta) for tree in given):
        if space == "adapter":
            raise ValueError("a Delta is a weight change and cannot be fused in space='adapter'; leave space at 'weight'")
        for name, tree in by_name.items():
            if not isinstance(tree, Delta):
                raise ValueError(f"{name!r} is a {type(tree).__name__} but other trees are Deltas; pass one kind")
        return _fuse_deltas(method, by_name, stacks)

    for name, tree in by_name.items():
        if any(isinstance(leaf, LowRank) for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, LowRank))):
            raise ValueError(f"{name!r} holds low-rank pairs, whose factors cannot be combined apart: pass pf.Delta(leaves)")
    tree_tools.require_same_structure(by_name)
    for name, tree in by_name.items():
        _check(name, tree_tools.paths(tree))
    if adapted is not None and space == "weight":
        return _fuse_deltas(method, {name: adapted.deltas(params, tree) for name, tree in by_name.items()}, stacks)
    if init is None:
        return _fuse_trees(method, by_name, stacks)
    tree_tools.require_same_structure({"init": init, **by_name})
    # Differences of narrow floats would be rounded to narrow floats.
    start = jax.tree.map(_wide, init)
    moved = {name: jax.tree.map(jnp.subtract, jax.tree.map(_wide, tree), start) for name, tree in by_name.items()}
    ends = jax.tree.map(jnp.add, start, _fuse_trees(method, moved, stacks))
    return jax.tree.map(lambda end, leaf: end.astype(jnp.result_type(leaf)), ends, init)


def _named(trees: Mapping[str, Tree] | Sequence[Tree]) -> tuple[list[str], list[Tree]]:
    """Names and trees in the order in which they are combined."""
    if isinstance(trees, Delta):
        raise ValueError("fuse takes a mapping name -> tree or a sequence of trees, but was given one Delta")
    if not trees:
        raise ValueError("there is nothing to fuse: no trees were given; pass a mapping name -> tree with at least one")
    if isinstance(trees, Mapping):
        names = sorted(trees)
        return names, [trees[name] for name in names]
    return [f"tree {i}" for i in range(len(trees))], list(trees)


def _check(name: str, leaves: dict[str, Any]) -> None:
    """Checks that leaves are floating point, and finite as far as they are known now."""
    if not leaves:
        raise ValueError(f"{name!r} has no leaves; there is nothing to combine")
    known = {}
    for path, leaf in leaves.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{name!r}: {path!r} is {jnp.result_type(leaf)}; only floating-point leaves can be combined")
        if not isinstance(leaf, jax.core.Tracer):
            known[path] = leaf
    if known:
        # Under jit the known leaves would be traced like the others; evaluating them now keeps the check.
        with jax.ensure_compile_time_eval():
            if not bool(jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in known.values()]))):
                tree_tools.require_finite(known, repr(name))


def _fuse_trees(method: Fusion, by_name: Mapping[str, Tree], stacks: Collection[str]) -> Tree:
    stacked = tree_tools.stack(by_name)
    if method.weights is not None:
        return method.apply(stacked)
    leaves = tree_tools.paths(stacked)
    tree_tools.require_auto_axes(stacked, "the trees")
    by_path = {path: tuple(leaf) for path, leaf in leaves.items() if leaf.size}
    counts = stacked_layers(by_path, stacks)
    if not counts and len(by_path) == len(leaves):
        return method.apply(stacked)
    separated = {path: jnp.stack(of_tasks) for path, of_tasks in separate(by_path, counts).items()}
    fused = join(method.apply(separated), counts) if separated else {}
    return tree_tools.map_paths(lambda path, leaf: fused[path] if leaf.size else leaf[0], stacked)


def _fuse_deltas(method: Fusion, deltas_by_name: dict[str, Delta], stacks: Collection[str]) -> Delta:
    specs: dict[str, tuple[str, Any]] = {}
    for name, delta in deltas_by_name.items():
        _check(name, tree_tools.paths(delta.leaves))
        for path, change in delta.leaves.items():
            first, known = specs.setdefault(path, (name, change))
            if (known.shape, known.dtype) != (change.shape, change.dtype):
                raise ValueError(
                    f"the change of {path!r} is {known.dtype}{list(known.shape)} in {first!r} but "
                    f"{change.dtype}{list(change.shape)} in {name!r}; they cannot be combined"
                )
    if method.weights is not None:
        weights = method.weights(len(deltas_by_name))
        return Delta({path: _combine(path, weights, deltas_by_name) for path in sorted(specs)})

    for name, delta in deltas_by_name.items():
        tree_tools.require_auto_axes(delta.leaves, repr(name))
    # What has no entries has no largest one and no singular values: it passes through.
    out = {path: change for path, (_, change) in specs.items() if 0 in change.shape}
    by_path = {path: _aligned(path, deltas_by_name, method.changes is not None) for path in sorted(specs) if path not in out}
    if not by_path:
        return Delta(out)
    counts = stacked_layers(by_path, stacks)
    separated = separate(by_path, counts)
    if method.changes is None:
        fused = method.apply({path: jnp.stack(of_tasks) for path, of_tasks in separated.items()})
    else:
        fused = method.changes(separated)
    return Delta(out | {path: _cast(change, specs[path][1].dtype) for path, change in join(fused, counts).items()})


def _aligned(path: str, deltas_by_name: Mapping[str, Delta], as_pairs: bool) -> tuple[Any, ...]:
    """One change per task, in float32 or wider: all pairs of one shape, or all dense; nothing where a task has none."""
    present = [delta.leaves[path] for delta in deltas_by_name.values() if path in delta.leaves]
    like = present[0]
    wide = tree_tools.wide_dtype(like.dtype)
    if as_pairs and isinstance(like, LowRank) and all(isinstance(c, LowRank) and c.axes == like.axes for c in present):
        nothing: Any = dataclasses.replace(like, a=like.a[..., :0], b=like.b[..., :0, :])
    else:
        nothing = jnp.zeros(like.shape, like.dtype)
    found = [delta.leaves.get(path, nothing) for delta in deltas_by_name.values()]
    # Pairs are multiplied out after they were widened: entries that a narrow product rounds alike would be ranked by chance.
    return tuple(_cast(change, wide) if isinstance(nothing, LowRank) else deltas.wide(change) for change in found)


def _combine(path: str, weights: jax.Array, deltas_by_name: Mapping[str, Delta]) -> Any:
    """The weighted sum of one parameter's changes, in float32 or wider, stored as the changes were."""
    present = [(weights[t], delta.leaves[path]) for t, delta in enumerate(deltas_by_name.values()) if path in delta.leaves]
    dtype = present[0][1].dtype
    wide = tree_tools.wide_dtype(dtype)
    factors = [weight.astype(wide) for weight, _ in present]
    total = deltas.weighted_sum([_cast(change, wide) for _, change in present], factors)
    return _cast(total, dtype)


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, tree_tools.wide_dtype(jnp.result_type(leaf)))


def _cast(change: Any, dtype: Any) -> Any:
    if isinstance(change, LowRank):
        return dataclasses.replace(change, a=change.a.astype(dtype), b=change.b.astype(dtype))
    return change.astype(dtype)
