"""Path-keyed tools for nested dictionaries of arrays.

A tree is a nested ``dict`` whose leaves are arrays. A path is the keys to a leaf joined by slashes
(``encoder/layer/0/attention/self/query/lora_a``). Arithmetic that JAX or optax already offers (``jax.tree.map``,
``optax.tree.add``) is not repeated here; what is here checks structure first, because ``jax.tree.map`` broadcasts leaves
of different shape without a word.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def paths(tree: Tree) -> dict[str, Any]:
    """Flattens a tree into ``{slash path: leaf}``, in the order of JAX's own flattening.

    Args:
      tree: any pytree; dictionary keys, attribute names and sequence indices become path segments.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the nested dictionary whose leaves are ``flat``'s, the inverse of :func:`paths` for nested dictionaries.

    Raises:
      ValueError: if one path runs through another path's leaf.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for depth, key in enumerate(parents):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} runs through the leaf {'/'.join(parents[: depth + 1])!r}")
        if last in node:
            raise ValueError(f"{path!r} stands twice, once as a leaf and once as a parent of leaves")
        node[last] = leaf
    return tree


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dictionaries only: what is not a mapping is a leaf, whatever pytree it may be itself."""
    out: dict[str, Any] = {}

    def walk(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            path = f"{prefix}/{key}" if prefix else str(key)
            if isinstance(value, Mapping):
                walk(path, value)
            else:
                out[path] = value

    walk("", tree)
    return out


def merge(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Joins nested dictionaries that share no leaf.

    Raises:
      ValueError: if two trees hold the same leaf, naming it.
    """
    joined = flat(first)
    for other in others:
        for path, leaf in flat(other).items():
            if path in joined:
                raise ValueError(f"both trees hold the leaf {path!r}; rename one of them")
            joined[path] = leaf
    return nest(joined)


def split(tree: Mapping[str, Any], picked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits ``tree`` into the leaves whose paths ``picked`` has and the rest, so that :func:`merge` undoes it.

    Args:
      tree: the whole tree.
      picked: any tree with a subset of ``tree``'s leaf paths; its leaves are not looked at.

    Raises:
      ValueError: if ``picked`` names a path that ``tree`` does not have.
    """
    leaves, wanted = flat(tree), flat(picked)
    for path in wanted:
        if path not in leaves:
            raise ValueError(f"no leaf {path!r} in the tree{did_you_mean(path, leaves)}")
    return (
        nest({p: v for p, v in leaves.items() if p in wanted}),
        nest({p: v for p, v in leaves.items() if p not in wanted}),
    )


def did_you_mean(path: str, known: Iterable[str], count: int = 3) -> str:
    """Says which known paths are nearest to ``path``, for the end of an error text."""
    known = list(known)
    close = difflib.get_close_matches(path, known, n=count, cutoff=0.0) or known[:count]
    return f"; nearest: {', '.join(repr(c) for c in close)}" if close else "; the tree is empty"


def require_same_structure(trees: Mapping[str, Tree]) -> None:
    """Checks that trees have the same paths, shapes and dtypes.

    Args:
      trees: name -> tree; the names appear in the error.

    Raises:
      ValueError: naming the first path that is missing, or whose shape or dtype differs, with both sides.
    """
    if not trees:
        raise ValueError("no trees were given; pass at least one")
    (first, reference), *rest = ((name, paths(tree)) for name, tree in trees.items())
    for name, leaves in rest:
        for path in sorted(reference.keys() - leaves.keys()):
            raise ValueError(f"{name!r} lacks the leaf {path!r} that {first!r} has{did_you_mean(path, leaves)}")
        for path in sorted(leaves.keys() - reference.keys()):
            raise ValueError(f"{name!r} has the leaf {path!r} that {first!r} lacks{did_you_mean(path, reference)}")
        for path, leaf in leaves.items():
            ours, theirs = (_spec(reference[path]), _spec(leaf))
            if ours != theirs:
                raise ValueError(f"{path!r} is {ours} in {first!r} but {theirs} in {name!r}; they cannot be combined")


def _spec(leaf: Any) -> str:
    array = jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
    return f"{array.dtype}{list(array.shape)}"


def require_finite(tree: Tree, what: str) -> None:
    """Checks that every floating leaf is finite.

    Raises:
      ValueError: naming ``what``, the first bad path and how many of its elements are NaN or infinite.
    """
    for path, leaf in paths(tree).items():
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            if bad:
                raise ValueError(
                    f"{what}: {path!r} holds {bad} NaN or infinite elements of {leaf.size}; "
                    "train it again with a smaller learning rate, or leave it out"
                )


def require_auto_axes(tree: Tree, what: str) -> None:
    """Checks that no leaf is sharded over explicit mesh axes, which most fusion methods have no sharding rules for.

    Raises:
      ValueError: naming ``what``, the first such path and how to make another mesh.
    """
    for path, leaf in paths(tree).items():
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        if sharding is not None and any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types):
            raise ValueError(
                f"{what}: {path!r} is sharded over a mesh with explicit axes, as jax.make_mesh makes by default, but this "
                "needs automatic ones: make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * (number of its axes)"
            )


def stack(trees: Mapping[str, Tree] | Sequence[Tree]) -> Tree:
    """Stacks trees of one structure on a new leading axis: leaf ``[...]`` -> ``[tree, ...]``.

    Raises:
      ValueError: if the structures differ (see :func:`require_same_structure`).
    """
    named = dict(trees) if isinstance(trees, Mapping) else {f"tree {i}": t for i, t in enumerate(trees)}
    require_same_structure(named)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *named.values())


def unstack(tree: Tree) -> list[Tree]:
    """Undoes :func:`stack`."""
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which leaves of ``dtype`` are added up: float32, or float64 if they are float64."""
    # Not jnp.promote_types, which refuses bfloat16 with float32 under strict dtype promotion.
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def size(tree: Tree) -> int:
    """Number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm of all leaves taken as one vector, accumulated in float32."""
    return jnp.sqrt(vdot(tree, tree))


def vdot(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two trees of one structure, accumulated in float32."""
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def cosine(trees: Mapping[str, Tree] | Sequence[Tree]) -> jax.Array:
    """Cosine similarities between trees taken as vectors.

    Returns:
      ``[trees, trees]`` float32; a zero tree has similarity 0 to every other.
    """
    stacked = jax.tree.leaves(stack(trees))
    rows = [leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in stacked]
    gram = jnp.sum(jnp.stack([r @ r.T for r in rows]), axis=0)
    lengths = jnp.sqrt(jnp.diagonal(gram))
    return gram / jnp.maximum(lengths[:, None] * lengths[None, :], jnp.finfo(jnp.float32).tiny)


def map_paths(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """``jax.tree.map`` whose function also gets the slash path of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )
