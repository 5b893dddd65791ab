"""RegMean++: closed-form merging one block after the other, each with the inputs that the merged blocks before it give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from pefusion_jax import trees
from pefusion_jax.deltas import Change, Delta
from pefusion_jax.fusion.closed_form import regmean
from pefusion_jax.fusion.matching import averaged, check, fusion_of, require, scaled, unbound
from pefusion_jax.fusion.parts import Changes, Fusion
from pefusion_jax.layerwise import join


def regmean_pp(
    adapted: Any,
    params: Any,
    data: Mapping[str, Any],
    *,
    scale: float | jax.Array = 1.0,
    off_diagonal: float = 0.95,
    damping: float = 1e-6,
    **options: Any,
) -> Fusion:
    """RegMean block by block, with the input moments that each task has when all earlier blocks are merged already.

    A block is what shares a layer number. Layers come in the order of their numbers, stacks and what is in no layer in that of
    their paths, but what belongs to a ``decoder`` last. So a head outside the layers counts as early if its path comes first.
    The data is run through the model once for each block and task. For a model that is affine in its change
    (``network``, ``weight``) layers' inputs do not depend on earlier changes, and the result is :func:`regmean`'s.

    Args:
      adapted: the model that the trees belong to.
      params: its base parameters.
      data: task name -> task, or batches as a list.
      scale, off_diagonal, damping: as in :func:`regmean`. The scale is applied to the final result.
      **options: of :func:`~pefusion_jax.statistics.statistics`, such as ``examples`` and ``head``.

    Returns:
      A fusion for weight space. It runs the model, so that it cannot be traced.

    Raises:
      ValueError: as :func:`regmean`.

    Reference: T.-H. Nguyen et al., RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model
    Merging, 2025.
    """
    check(off_diagonal, damping)

    def bind(names: tuple[str, ...]) -> Fusion:
        require(data, names, "data")

        def changes(by_path: Changes) -> dict[str, Change]:
            # Not above: statistics needs the fusion package itself.
            from pefusion_jax.statistics import statistics

            counts = _stacked_counts(by_path, params)
            blocks: dict[Any, list[str]] = {}
            for path in by_path:
                blocks.setdefault(_block(path), []).append(path)
            merged: dict[str, Change] = {}
            for block in sorted(blocks):
                found = {}
                for t, name in enumerate(names):
                    now = {path: merged.get(path, of_tasks[t]) for path, of_tasks in by_path.items()}
                    found[name] = statistics(
                        adapted, params, Delta(join(now, counts)), data[name], kinds=("inputs",), **options
                    )
                own = {path: by_path[path] for path in blocks[block]}
                if not any(path in s.moments for s in found.values() for path in own):
                    merged |= {path: averaged(of_tasks) for path, of_tasks in own.items()}  # a norm outside the layers
                    continue
                method = regmean(found, off_diagonal=off_diagonal, damping=damping)
                merged |= method.bind(names).changes(own)  # type: ignore[misc]
            return {path: scaled(change, scale) for path, change in merged.items()}

        return fusion_of(changes)

    return Fusion(unbound, bind=bind)


def _block(path: str) -> tuple[Any, ...]:
    """Sorts parameters by the first layer number in their path, stacks and what has no number by path, decoders last."""
    segments = path.split("/")
    last = "decoder" in segments
    place = next((i for i, segment in enumerate(segments) if segment.isdigit()), None)
    return (last, path, -1) if place is None else (last, "/".join(segments[:place]), int(segments[place]))


def _stacked_counts(by_path: Iterable[str], params: Any) -> dict[str, int]:
    """The nodes that ``fuse`` has separated: numbered in the changes, not numbered in the parameters."""
    weights = trees.flat(params["params"] if isinstance(params.get("params"), Mapping) else params)
    counts: dict[str, int] = {}
    for path in by_path:
        segments = path.split("/")
        for place, segment in enumerate(segments):
            if path not in weights and segment.isdigit() and "/".join(segments[:place] + segments[place + 1 :]) in weights:
                node = "/".join(segments[:place])
                counts[node] = max(counts.get(node, 0), int(segment) + 1)
                break
    return counts
