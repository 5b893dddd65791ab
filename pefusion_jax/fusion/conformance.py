"""PEFT's ``add_weighted_adapter`` on LoRA trees, with what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pefusion_jax import trees as tree_tools
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.elementwise import ties, weighted_average
from pefusion_jax.fusion.masked import dare, magnitude_prune
from pefusion_jax.fusion.parts import Fusion
from pefusion_jax.layerwise import join, separate, stacked_layers

Tree = Any
Combination = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]


def peft_weighted_adapter(
    trees: Mapping[str, Tree] | Sequence[Tree],
    weights: Mapping[str, Any] | Sequence[Any],
    combination_type: Combination = "svd",
    *,
    scaling: float | Mapping[str, float] | Sequence[float] = 1.0,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    svd_rank: int | None = None,
    key: jax.Array | int = 0,
) -> Tree:
    r"""Combines LoRA adapters as PEFT's ``add_weighted_adapter`` does, to compare with it or to repeat what was done with it.

    With :math:`c_t = w_t s_t` and the scalings :math:`s_t = \alpha_t / r_t`, for each adapted layer:

    * ``linear``: :math:`A = \sum_t \operatorname{sgn}(c_t) \sqrt{|c_t|} A_t,\; B = \sum_t \sqrt{|c_t|} B_t`;
    * ``cat``: :math:`A = [c_1 A_1 \dots c_T A_T],\; B = [B_1; \dots; B_T]`, which is exact;
    * ``svd``: the best product of rank ``svd_rank`` for :math:`\sum_t w_t \Delta_t`, :math:`\Delta_t = s_t A_t B_t`;
    * ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: that rule on the A and on the B, with the weights of
      ``linear``;
    * ``ties_svd`` and the like: that rule on the :math:`\Delta_t` with the weights :math:`w_t`, then the best product.

    For a merge that means what it says use :func:`~pefusion_jax.fusion.fuse` in weight space, and
    :func:`~pefusion_jax.compression.compress` if it must stay small. What is wrong here, and reproduced:

    * every type that works on A and B apart has cross terms :math:`A_i B_j`, and depends on how the product is split;
    * the random types scale A and B by :math:`1/p` each, with masks of their own;
    * one tree alone is taken as ``linear`` whatever the type.

    What is not reproduced: with rank-stabilized adapters PEFT's result is :math:`\sqrt r` too large, because it is stored with
    their setting; bias, DoRA and KaSA parts, which PEFT passes over, are refused; ``svd_clamp``, which depends on the arbitrary
    signs of singular vectors; an existing name, which makes PEFT do nothing.

    Args:
      trees: task name -> tree, or trees, whose leaves are ``lora_a`` ``[..., inputs, rank]`` and ``lora_b``
        ``[..., rank, outputs]``. A layer that a tree does not adapt is left to the others.
      weights: task name -> weight, or weights in the order of the trees; may be negative, and traced.
      combination_type: see above.
      scaling: the scale :math:`s_t` that each tree was trained with, one for all or one for each, as for weights.
      density: fraction kept; for the types that prune.
      majority_sign_method: for TIES: by the sum of values (``"total"``) or the count of tasks (``"frequency"``).
      svd_rank: rank of ``..._svd``; ``None`` is the largest among the trees.
      key: a key or the seed of one, for DARE's masks.

    Returns:
      A tree of ``lora_a`` and ``lora_b`` that is to be used at scale 1: ``LoRA(rank, alpha=None)``. Ranks are the largest among
      the trees, for ``cat`` the sum.

    Raises:
      ValueError: if an option is unknown or a density is missing; if trees and weights do not match; if a leaf is neither
        ``lora_a`` nor ``lora_b``; if ranks differ where they must not; for ``..._svd`` of anything but matrices.

    Reference:
      PEFT 0.21, ``peft/tuners/lora/model.py``; tested against it.
    """
    if combination_type not in get_args(Combination):
        raise ValueError(f"combination_type must be one of {', '.join(get_args(Combination))}, not {combination_type!r}")
    names = sorted(trees) if isinstance(trees, Mapping) else [f"{place:04d}" for place in range(len(trees))]
    if not names:
        raise ValueError("there is nothing to combine: no trees were given")
    given = dict(zip(names, [trees[name] for name in names] if isinstance(trees, Mapping) else trees, strict=True))
    by_weight = _one_each(weights, names, isinstance(trees, Mapping), "weights")
    scales = _one_each(scaling, names, isinstance(trees, Mapping), "scaling")
    kind = "linear" if len(names) == 1 else combination_type
    rule = kind.removesuffix("_svd")
    if rule in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        if density is None:
            raise ValueError(f"{kind!r} needs a density, the fraction of entries kept")
    kept = 1.0 if density is None else density
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', not {majority_sign_method!r}")

    flat = {name: tree_tools.flat(tree) for name, tree in given.items()}
    counts = stacked_layers({path: (leaf,) for leaves in flat.values() for path, leaf in leaves.items()}, STACKS)
    per_layer = {name: _pairs(name, _unstacked(leaves, counts)) for name, leaves in flat.items()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in sorted({site for pairs in per_layer.values() for site in pairs}):
        groups.setdefault(tuple(name for name in names if site in per_layer[name]), []).append(site)

    def method(weights: dict[str, Any]) -> Fusion:
        elect: Literal["sum", "count"] = "sum" if majority_sign_method == "total" else "count"
        if rule in ("linear", "svd"):
            return weighted_average(weights)
        if rule == "ties":
            return ties(kept, elect=elect, weights=weights, conform="peft")
        if rule == "magnitude_prune":
            return magnitude_prune(kept, weights=weights, conform="peft")
        then: Literal["ties", "task_arithmetic"] = "ties" if rule == "dare_ties" else "task_arithmetic"
        return dare(kept, then=then, elect=elect, weights=weights, conform="peft", key=key)

    ranks = [max(pair[0].shape[-1] for pair in pairs.values()) for pairs in per_layer.values()]
    out: dict[str, jax.Array] = {}
    for present, sites in groups.items():
        pairs = {name: {site: per_layer[name][site] for site in sites} for name in present}
        if kind == "cat":
            found = _concatenated(pairs, by_weight, scales, sum(ranks))
        elif kind == "svd" or kind.endswith("_svd"):
            rank = svd_rank or max(ranks)
            found = _truncated(method({name: by_weight[name] for name in present}), pairs, scales, rank)
        else:
            found = _apart(method, pairs, {name: by_weight[name] * scales[name] for name in present})
        out.update(found)
    return tree_tools.nest(join(out, counts))


def _one_each(given: Any, names: list[str], named: bool, what: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        if sorted(given) != names or not named:
            raise ValueError(f"{what} are given for {', '.join(sorted(given))}, but the trees are {', '.join(names)}")
        return dict(given)
    if not isinstance(given, Sequence) and jnp.ndim(given) == 0:
        if what == "weights":
            raise ValueError(f"weights must be one for each tree, not {given}")
        return dict.fromkeys(names, given)
    if named or len(given) != len(names):
        raise ValueError(f"{what} must be given like the trees: by name for a mapping, {len(names)} in order for a sequence")
    return dict(zip(names, given, strict=True))


def _unstacked(leaves: Mapping[str, jax.Array], counts: Mapping[str, int]) -> dict[str, jax.Array]:
    return {path: of_one[0] for path, of_one in separate({path: (leaf,) for path, leaf in leaves.items()}, counts).items()}


def _pairs(name: str, leaves: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Path of a layer -> its A and B."""
    sites: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in leaves.items():
        site, _, last = path.rpartition("/")
        if last not in ("lora_a", "lora_b"):
            raise ValueError(f"{name!r} has the leaf {path!r}; only lora_a and lora_b can be combined as PEFT does")
        sites.setdefault(site, {})[last] = jnp.asarray(leaf)
    for site, both in sites.items():
        if len(both) != 2:
            raise ValueError(f"{name!r} has only {next(iter(both))} at {site!r}; both factors are needed")
    return {site: (both["lora_a"], both["lora_b"]) for site, both in sites.items()}


def _leaf(site: str, last: str) -> str:
    return f"{site}/{last}" if site else last


def _apart(method: Any, pairs: dict[str, dict[str, Any]], products: dict[str, Any]) -> dict[str, jax.Array]:
    for site in next(iter(pairs.values())):
        ranks = {name: of_task[site][0].shape[-1] for name, of_task in pairs.items()}
        if len(set(ranks.values())) > 1:
            raise ValueError(f"the ranks at {site!r} differ ({ranks}); PEFT combines A and B apart only at one rank, use 'cat'")
    roots = {name: jnp.sqrt(jnp.abs(jnp.asarray(c, jnp.float32))) for name, c in products.items()}
    signed = {name: jnp.where(jnp.asarray(c) >= 0, roots[name], -roots[name]) for name, c in products.items()}
    out = {}
    for place, (last, weights) in enumerate((("lora_a", signed), ("lora_b", roots))):
        leaves = {name: {_leaf(site, last): pair[place] for site, pair in of_task.items()} for name, of_task in pairs.items()}
        out.update(fuse(method(weights), leaves, stacks=()))
    return out


def _concatenated(pairs: dict[str, Any], weights: dict[str, Any], scales: dict[str, Any], rank: int) -> dict[str, jax.Array]:
    out = {}
    for site in next(iter(pairs.values())):
        scaled = [pair[site][0] * jnp.asarray(weights[n] * scales[n], pair[site][0].dtype) for n, pair in pairs.items()]
        a = jnp.concatenate(scaled, axis=-1)
        b = jnp.concatenate([pair[site][1] for pair in pairs.values()], axis=-2)
        missing = rank - a.shape[-1]  # where a task has no pair, so that there is one rank everywhere
        out[_leaf(site, "lora_a")] = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        out[_leaf(site, "lora_b")] = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, missing), (0, 0)])
    return out


def _truncated(method: Fusion, pairs: dict[str, Any], scales: dict[str, Any], rank: int) -> dict[str, jax.Array]:
    def change(name: str, site: str) -> jax.Array:
        a, b = pairs[name][site]
        if a.ndim != 2:
            raise ValueError(f"lora_a at {site!r} has shape {list(a.shape)}; only products of matrices can be decomposed")
        wide = tree_tools.wide_dtype(a.dtype)
        product = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
        return product * jnp.asarray(scales[name], wide)

    changed = {name: {site or "-": change(name, site) for site in of_task} for name, of_task in pairs.items()}
    merged = fuse(method, changed, stacks=())
    out = {}
    for site in next(iter(pairs.values())):
        left, values, right = jnp.linalg.svd(merged[site or "-"], full_matrices=False)
        dtype = next(iter(pairs.values()))[site][0].dtype
        # PEFT puts the singular values into B, which in its layout stands on the left.
        out[_leaf(site, "lora_a")] = left[:, :rank].astype(dtype)
        out[_leaf(site, "lora_b")] = (values[:rank, None] * right[:rank]).astype(dtype)
    return out
