"""What hyper-networks share: sites whose leaves have the same names and shapes are one *kind*, with the same matrices.

kinds/0/sites/ROLE/layer       [layer, layer_size]
kinds/0/heads/LEAF/kernel      [code, ...]; by layer below the site, [layer, ...] in front
kinds/0/heads/LEAF/bias        [...]
learned/PATH                   as in the adapters
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.generators.layout import Layout


def check_expression(name: str, expression: str) -> None:
    """Raises ValueError for a setting that is no regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name}={expression!r} is not a regular expression: {error}") from error


def split_learned(learned: str, adapters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves that are learned, as they are in the tree, and those that are made.

    Raises:
      ValueError: if all are learned, or none though there is an expression.
    """
    kept = {path: leaf for path, leaf in adapters.items() if re.fullmatch(learned, path)}
    if len(kept) == len(adapters):
        raise ValueError(f"learned={learned!r} matches every adapter leaf, so nothing is left to make")
    if learned != r"(?!)" and not kept:
        raise ValueError(f"learned={learned!r} matches no adapter leaf{trees.did_you_mean(learned, adapters)}")
    in_tree = {f"learned/{path}": jnp.asarray(leaf, jnp.float32) for path, leaf in kept.items()}
    return in_tree, {path: leaf for path, leaf in adapters.items() if path not in kept}


def kept(tree: Mapping[str, Any]) -> dict[str, str]:
    """Path in the tree -> path of the adapter leaf, of those that are learned."""
    return {f"learned/{path}": path for path in trees.flat(tree.get("learned", {}))}


def listed(
    made: Mapping[str, Any], layout: Layout, *, by_stack: bool = False, by_depth: bool = False
) -> list[tuple[list[str], dict[str, tuple[int, ...]]]]:
    """Sites (roles of modules) of one kind, with the shapes of a layer's leaves.

    Args:
      made: role -> ``[layer, ...]`` leaf.
      layout: of the model.
      by_stack: kinds of their own for each stack of layers.
      by_depth: and for each number of layers: of sites that share what all their layers have.
    """
    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    for role, leaf in made.items():
        site, _, name = role.rpartition("/")
        sites.setdefault(site, {})[name] = leaf.shape if layout.layers(role) is None else leaf.shape[1:]
    found: dict[Any, list[str]] = {}
    for site, leaves in sites.items():
        stack, depth = site.partition("*")[0] if by_stack else "", layout.layers(site) if by_depth else None
        found.setdefault((stack, depth, tuple(sorted(leaves.items()))), []).append(site)
    return [(of, dict(leaves)) for (_, _, leaves), of in sorted(found.items(), key=lambda kind: kind[1])]


def dense(path: str, keys: Iterator[jax.Array], inputs: int, outputs: int, start: str) -> dict[str, jax.Array]:
    """A layer ``[inputs, outputs]`` with a bias."""
    bound = 1 / math.sqrt(inputs)
    bias = jnp.zeros(outputs) if start == "normal" else _draw(next(keys), (outputs,), bound, start)
    return {f"{path}/kernel": _draw(next(keys), (inputs, outputs), bound, start), f"{path}/bias": bias}


def heads(
    path: str,
    keys: Iterator[jax.Array],
    leaves: Mapping[str, tuple[int, ...]],
    code: int,
    start: str,
    front: tuple[int, ...] = (),
) -> dict[str, jax.Array]:
    """The matrices that make leaves of these shapes from a code, so small that the adapters start near 0."""
    out: dict[str, jax.Array] = {}
    for name, shape in leaves.items():
        fan_in = math.prod(shape[:-1]) if len(shape) > 1 else 1
        bound = 1e-3 * math.sqrt(3 / (code * fan_in))
        out[f"{path}/{name}/kernel"] = _draw(next(keys), (*front, code, *shape), bound, start)
        out[f"{path}/{name}/bias"] = jnp.zeros((*front, *shape))
    return out


def leaves(kinds: Mapping[str, Any], codes: Mapping[str, jax.Array], by_layer: bool = False) -> dict[str, jax.Array]:
    """Role -> ``[layer, ...]`` adapter leaf, from the codes ``[layer, code]`` of each site (``[1, code]`` by layer)."""
    out: dict[str, jax.Array] = {}
    for kind in kinds.values():
        for site, own in sites_of(kind).items():
            for name, head in (own["heads"] if by_layer else kind["heads"]).items():
                if by_layer:
                    made = jnp.einsum("c,lc...->l...", codes[site][0], head["kernel"]) + head["bias"]
                else:
                    made = jnp.tensordot(codes[site], head["kernel"], 1) + head["bias"][None]
                out[f"{site}/{name}" if site else name] = made
    return out


def adapters(tree: Any, leaves: Mapping[str, jax.Array], layout: Layout) -> dict[str, Any]:
    """Path -> adapter leaf, learned ones among them, from those by role."""
    made = {role: leaf if layout.layers(role) is not None else leaf[0] for role, leaf in leaves.items()}
    return {**layout.spread(made), **trees.flat(tree.get("learned", {}))}


def sites_of(kind: Any) -> dict[str, dict[str, Any]]:
    """Role of each site of a kind -> its own leaves, nested."""
    out: dict[str, dict[str, Any]] = {}
    for path, leaf in sorted(trees.flat(kind["sites"]).items()):
        # The end says what a leaf is: a module of the model may be called heads too.
        found = re.fullmatch(r"(?:(.*?)/)??(heads/[^/]+/(?:kernel|bias)|[^/]+)", path)
        site, own = found[1] or "", found[2]  # type: ignore[index]
        out.setdefault(site, {})[own] = leaf
    return {site: trees.nest(own) for site, own in out.items()}


def affine(dense: Any, x: jax.Array) -> jax.Array:
    """``[rows, inputs] -> [rows, outputs]``."""
    return x @ dense["kernel"] + dense["bias"][None, :]


def _draw(key: jax.Array, shape: tuple[int, ...], bound: float, start: str) -> jax.Array:
    if start == "normal":
        return 0.01 * jax.random.normal(key, shape)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
