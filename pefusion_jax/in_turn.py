"""Matrix decompositions one after the other, where running them side by side would stop everything.

On a CPU, jaxlib's LAPACK kernels hand their work to the threads that XLA runs a program's operations on, and wait for it on one
of them. Where a program has as many independent decompositions as there are threads, all threads may wait and none is left to
do the work: the program hangs. So decompositions are made to depend on each other. Other platforms, and operations that are
run one by one, are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def after(tree: Any, done: Any) -> Any:
    """The arrays of ``tree`` as they are, but no earlier than all arrays of ``done``."""
    first = [leaf for leaf in jax.tree.leaves(done) if isinstance(leaf, jax.core.Tracer) and leaf.size]
    leaves, structure = jax.tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
    if not first or not places:
        return tree

    def wait(arrays: list[jax.Array], first: list[jax.Array]) -> list[jax.Array]:
        # Nothing is above infinity, not even NaN, and XLA does not know it: arrays plus zero.
        above = jnp.any(jnp.stack([jnp.abs(leaf.reshape(-1)[0]) > jnp.inf for leaf in first]))
        return [array + above.astype(array.dtype) for array in arrays]

    waited = jax.lax.platform_dependent([leaves[n] for n in places], first, cpu=wait, default=lambda arrays, _: arrays)
    for place, array in zip(places, waited, strict=True):
        leaves[place] = array
    return jax.tree.unflatten(structure, leaves)


def in_turn(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """``[function(item) for item in items]``, each item, a pytree of arrays, after the result of the one before."""
    out: list[Any] = []
    for item in items:
        out.append(function(after(item, out[-1]) if out else item))
    return out
