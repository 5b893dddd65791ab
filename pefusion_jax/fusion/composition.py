"""Arithmetic of what models have learned: forget a task, carry a change over by analogy, add a task or take one out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.deltas import Change, Delta, LowRank
from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.elementwise import weighted_average
from pefusion_jax.fusion.parts import Fusion

Tree = Any


def negate(tree: Tree, *, adapted: Any = None, params: Any = None, displacement: bool = False) -> Tree:
    r"""The opposite change, :math:`-\tau`: a model moved by it forgets what :math:`\tau` had learned.

    Args:
      tree: a Delta; a displacement or another tree that is linear in its leaves; or adapters, with ``adapted`` and ``params``.
      adapted: the model that the tree belongs to; the result is then the Delta :math:`-\Delta W(\tau)`.
      params: its base parameters.
      displacement: says that a tree with pairs of factors is a displacement of a network-linear model.

    Raises:
      ValueError: for adapters that enter as a product, :math:`(-A)(-B) = AB`, without ``adapted`` and ``params``.

    Reference: Ilharco et al., *Editing Models with Task Arithmetic*, 2023, also for :func:`analogy`.
    """
    return _combine({"tree": (-1.0, tree)}, adapted, params, displacement)


def analogy(a: Tree, b: Tree, c: Tree, *, adapted: Any = None, params: Any = None, displacement: bool = False) -> Tree:
    r"""What is to ``c`` as ``b`` is to ``a``: :math:`\tau_c + (\tau_b - \tau_a)`.

    Args:
      a, b, c: three trees or Deltas; see :func:`negate` for their kinds and for the other arguments.
      adapted, params, displacement: see :func:`negate`.

    Raises:
      ValueError: if structures differ, or for adapters that enter as a product; see :func:`negate`.
    """
    return _combine({"a": (-1.0, a), "b": (1.0, b), "c": (1.0, c)}, adapted, params, displacement)


def add_task(
    fused: Tree, tree: Tree, method: Fusion, count: int, *, adapted: Any = None, params: Any = None, displacement: bool = False
) -> Tree:
    r"""What ``method`` makes of ``count`` trees and one more, from their fusion alone.

    .. math:: \tau' = \alpha \tau + w \tau_{n+1}, \qquad w_i(n+1) = \alpha\, w_i(n) \text{ for } i \le n

    The average has :math:`\alpha = n/(n+1)`, :math:`w = 1/(n+1)`; task arithmetic has :math:`\alpha = 1`, :math:`w = \lambda`.

    Args:
      fused: ``fuse(method, trees)`` of ``count`` trees.
      tree: the new tree, of the same kind; or adapters, with ``adapted`` and ``params``.
      method: ``average()``, ``task_arithmetic(scale)`` with one scale, or another linear method whose weights follow from the
        number of trees.
      count: how many trees ``fused`` was made of.
      adapted, params, displacement: see :func:`negate`.

    Raises:
      ValueError: for a method that is not linear, coefficients by name or by place, or trees that do not fit.
    """
    kept, own = _recursion(method, count)
    _require_weight_space(fused, adapted)
    return _combine({"fused": (kept, fused), "tree": (own, tree)}, adapted, params, displacement)


def remove_task(
    fused: Tree, tree: Tree, method: Fusion, count: int, *, adapted: Any = None, params: Any = None, displacement: bool = False
) -> Tree:
    r"""Undoes :func:`add_task`: what ``method`` makes of the ``count - 1`` other trees.

    .. math:: \tau' = \frac{1}{\alpha} (\tau - w \tau_n)

    Exact but for rounding. Where the factors of a low-rank ``tree`` stand in ``fused`` as ``fuse`` wrote them, they are taken
    out, so that nothing is left of them and the rank falls; otherwise they are subtracted, and the rank grows.

    Args:
      fused: ``fuse(method, trees)`` of ``count`` trees, ``tree`` among them. Whether it was is not known from the numbers.
      tree: the tree to take out.
      method: see :func:`add_task`.
      count: how many trees ``fused`` was made of; 2 or more.
      adapted, params, displacement: see :func:`negate`.

    Raises:
      ValueError: see :func:`add_task`; also if ``tree`` changes a parameter that ``fused`` leaves alone.
    """
    if count < 2:
        raise ValueError(f"count={count}: taking out the only tree leaves none; count is how many trees were fused, 2 or more")
    kept, own = _recursion(method, count - 1)
    if abs(kept) < 1e-12:
        raise ValueError("the method gives the other trees the weight 0, so they cannot be had back from the fusion")
    _require_weight_space(fused, adapted)
    if adapted is not None and not isinstance(tree, Delta):
        tree = _weight_change(tree, adapted, params)
    if isinstance(fused, Delta) and isinstance(tree, Delta):
        for path in tree.leaves:
            if path not in fused.leaves:
                near = trees.did_you_mean(path, fused.leaves)
                raise ValueError(f"the tree changes {path!r}, the fusion does not: it was not part of it{near}")
        rest = {path: _without(change, tree.leaves.get(path), own) for path, change in fused.leaves.items()}
        left = {path: change for path, change in tree.leaves.items() if rest[path] is None}
        known = Delta({path: fused.leaves[path] if change is None else change for path, change in rest.items()})
        if not left:
            return _combine({"fused": (1.0 / kept, known)}, None, None, True)
        return _combine({"fused": (1.0 / kept, known), "tree": (-own / kept, Delta(left))}, None, None, True)
    return _combine({"fused": (1.0 / kept, fused), "tree": (-own / kept, tree)}, None, None, displacement)


def _recursion(method: Fusion, count: int) -> tuple[float, float]:
    """What the fusion of ``count`` trees and the next tree are multiplied by."""
    if method.weights is None:
        raise ValueError(
            "trees can be added to and taken out of a linear fusion alone, such as average() or task_arithmetic(scale): the "
            "others look at all trees together; fuse again from the trees"
        )
    if method.tasks is not None:
        raise ValueError(
            f"the method has coefficients by name ({', '.join(method.tasks)}), which say nothing about other sets of trees; "
            "give task_arithmetic(w) with the coefficient w of the tree that comes or goes"
        )
    if count < 1:
        raise ValueError(f"count={count} is how many trees were fused, 1 or more")
    try:
        with jax.ensure_compile_time_eval():
            before, after = method.weights(count), method.weights(count + 1)
    except ValueError as error:
        raise ValueError(
            f"the method has coefficients by place, not for any number of trees ({error}); give task_arithmetic(w) with the "
            "coefficient w of the tree that comes or goes"
        ) from error
    if isinstance(before, jax.core.Tracer):
        raise ValueError("the method's weights are traced, so they cannot be compared; pass numbers")
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    largest = int(np.argmax(np.abs(old)))
    kept = new[largest] / old[largest] if old[largest] else 1.0
    if not np.allclose(new[:-1], kept * old, rtol=1e-6, atol=1e-12):
        raise ValueError("the method's weights for one tree more are no multiple of those before; fuse again from the trees")
    return float(kept), float(new[-1])


def _combine(weighted: Mapping[str, tuple[float, Tree]], adapted: Any, params: Any, displacement: bool) -> Tree:
    given = {name: tree for name, (_, tree) in weighted.items()}
    if adapted is not None:
        given = {n: tree if isinstance(tree, Delta) else _weight_change(tree, adapted, params) for n, tree in given.items()}
    elif not displacement:
        for name, tree in given.items():
            if not isinstance(tree, Delta):
                _refuse_factors(name, tree)
    return fuse(weighted_average({name: weight for name, (weight, _) in weighted.items()}), given)


def _require_weight_space(fused: Tree, adapted: Any) -> None:
    if adapted is not None and not isinstance(fused, Delta):
        raise ValueError("with adapted and params the fusion must be a Delta, as fuse(..., adapted=, params=) gives it")


def _weight_change(tree: Tree, adapted: Any, params: Any) -> Delta:
    if params is None:
        raise ValueError("weight changes need both adapted and params; pass both")
    return adapted.deltas(params, tree)


def _refuse_factors(name: str, tree: Tree) -> None:
    """Refuses trees that hold both factors of a product, for which arithmetic leaf by leaf means something else."""
    leaves = trees.paths(tree)
    for path, leaf in leaves.items():
        other = leaves.get(f"{path[:-2]}_b") if path.endswith("_a") else None
        if other is None or any(isinstance(x, jax.core.Tracer) for x in (leaf, other)):
            continue
        if bool(jnp.any(leaf)) and bool(jnp.any(other)):
            raise ValueError(
                f"{name!r} holds both factors {path!r} and {path[:-2] + '_b'!r}. As adapters they enter as a product, and leaf "
                "by leaf (-A)(-B) = AB: pass adapted and params for the change of weights, or displacement=True if it is a "
                "displacement of a network-linear model"
            )


def _without(change: Change, part: Change | None, weight: float) -> Change | None:
    """The change without the factors of ``part``; ``None`` if they do not stand in it as ``fuse`` wrote them."""
    if part is None:
        return change
    if (
        not isinstance(change, LowRank)
        or not isinstance(part, LowRank)
        or (change.shape, change.axes) != (part.shape, part.axes)
    ):
        return None
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((change, part))) or change.dtype != part.dtype:
        return None
    wide = trees.wide_dtype(part.dtype)
    written = (part.b.astype(wide) * jnp.asarray(weight, wide)).astype(part.dtype)
    a, b, own_a, own_b = (np.asarray(x) for x in (change.a, change.b, part.a, written))
    for at in range(change.rank - part.rank + 1):
        here = slice(at, at + part.rank)
        if np.array_equal(a[..., here], own_a) and np.array_equal(b[..., here, :], own_b):
            keep = np.delete(np.arange(change.rank), here)
            return dataclasses.replace(change, a=change.a[..., keep], b=change.b[..., keep, :])
    return None
