r"""First-order expansions of an adapted model, in three kinds that are never the same thing.

With base weights :math:`\theta`, adapters :math:`\phi_0` and a displacement :math:`\tau`:

============ ============================================================================= ======== ===================
mode         :math:`f_{lin}(x; \tau)`                                                      affine   at inference
============ ============================================================================= ======== ===================
``network``  :math:`f(x; \theta, \phi_0) + J_\phi f(x; \theta, \phi_0)\,\tau`               in tau   2 forwards, for ever
``layer``    every adapted layer expanded on its own, the network between them unchanged    no       folds into W
``weight``   :math:`f(x; W_0) + J_W f(x; W_0)\,[\Delta W(\phi_0 + \tau) - \Delta W(\phi_0)]`  in dW  2 forwards
============ ============================================================================= ======== ===================

``network`` is the formula of the paper and literally ``jax.jvp`` over the adapter subtree. ``layer`` is what the authors
released; at :math:`B_0 = 0` it is LoRA with A frozen. ``weight`` is linear in the weights while both low-rank factors learn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, Expansions
from pefusion_jax.deltas import Change, Delta, LowRank, dense, fold, located, tangent, weighted_sum, wide

MODES = ("network", "layer", "weight")


def linearize(adapted: Adapted, adapters0: Any, mode: str = "network") -> Adapted:
    r"""Expands an adapted model to first order around ``adapters0``.

    The trainable tree of the result is the displacement :math:`\tau` (``init`` gives zeros, float32), not the adapters:
    :math:`\phi = \phi_0 + \tau`. Its :attr:`~Adapted.trainable` part leaves out what cannot move the model, such as LoRA's A
    at :math:`B_0 = 0`, whose gradient is identically zero. A tree with or without these leaves may be applied.

    Cost in forward passes of the base model, LoRA: ``network`` forward 2.05 and gradient 3.08; ``layer`` 1.02 and 2.06;
    ``weight`` 2.05 and 3.1.

    A generated model's ``auxiliary`` loss is not a part of the expansion, whose retriever stands still: train with it first.

    Args:
      adapted: the model to expand; not itself linearized.
      adapters0: the point of expansion, as from ``adapted.init``. It becomes part of the returned functions, in float32 if it
        is of less.
      mode: ``"network"``, ``"layer"`` or ``"weight"``; see the module docstring.

    Returns:
      An :class:`Adapted` whose ``apply(params, tau, *inputs)`` is the expansion. ``network`` and ``weight`` have a
      ``pushforward``; ``layer`` folds. ``deltas`` are weight-space changes relative to ``fold(params, deltas(adapters0))``.

    Raises:
      ValueError: for an unknown mode, non-finite ``adapters0``, a model that was linearized already, or ``mode="weight"`` of
        adapters that are no change of the weights.

    Example::

      llora = linearize(lora, lora.init(key, params, batch))
      tau = llora.init(key, params, batch)
      outputs = llora.apply(params, tau, batch)

    Reference: A. Tang et al., Parameter Efficient Multi-task Model Fusion with Partial Linearization, 2024 (``network`` the
    formula, ``layer`` the released code); G. Ortiz-Jimenez et al., Task Arithmetic in the Tangent Space, 2023.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
    if adapted.expand is None:
        raise ValueError("the model is linearized already: an expansion of an expansion is itself; pass adapt()'s result")
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(adapters0)):
        trees.require_finite(adapters0, "adapters0")
    crooked = [] if adapted.origin is None else [m for m in adapted.origin.methods if not getattr(m, "folds", True)]
    if mode == "weight" and crooked:
        raise ValueError(
            f"mode='weight' is a tangent in the weights, but {type(crooked[0]).__name__} is no change of the weights; use "
            "mode='network', or mode='layer'"
        )
    adapters0 = trees.nest({path: _at_least_float32(leaf) for path, leaf in trees.flat(adapters0).items()})
    moving = trees.paths(adapted.moving(adapters0))

    def init(key: Any, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        del key, params, inputs, kwargs  # the displacement starts at zero, whatever they are
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), adapters0)

    def full(tau: Any) -> Any:
        """``tau`` in the dtypes of ``adapters0``, with zeros for the leaves that it leaves out."""
        given = trees.paths(tau)
        known = trees.paths(adapters0)
        for path, leaf in given.items():
            if path not in known:
                raise ValueError(f"the displacement has a leaf {path!r}, adapters0 has none{trees.did_you_mean(path, known)}")
            if leaf.shape != known[path].shape:
                raise ValueError(
                    f"the displacement's leaf {path!r} has the shape {tuple(leaf.shape)}, and {tuple(known[path].shape)} in "
                    "adapters0: it belongs to another point of expansion"
                )
        return trees.map_paths(
            lambda path, leaf: given[path].astype(leaf.dtype) if path in given else jnp.zeros_like(leaf), adapters0
        )

    def pick(tree: Any) -> Any:
        """The leaves of a displacement that can move the model."""
        return trees.split(tree, trees.nest({path: None for path in trees.paths(tree) if path in moving}))[0]

    def materialise(params: Any, tau: Any, task: Any = None, inputs: Any = None) -> Any:
        """The adapters to first order."""
        moved = _jvp(lambda theta: adapted.materialise(params, theta, task, inputs), adapters0, full(tau))  # type: ignore[misc]
        return jax.tree.map(jnp.add, *moved)

    def start(params: Any) -> Any:
        """Base parameters with the change of ``adapters0`` written into them."""
        return fold(params, adapted.deltas(params, adapters0))

    build = {"network": _network, "layer": _layer, "weight": _weight}[mode]
    apply, pushforward, deltas = build(adapted, adapted.expand, adapters0, full, pick)

    def apply_deltas(params: Any, delta: Delta, *inputs: Any, **kwargs: Any) -> Any:
        if mode == "layer":
            return adapted.base(fold(start(params), delta), *inputs, **kwargs)
        # The same first-order model, in the weights that change: partitioned first, so that all others stay constants.
        started = start(params)
        here = trees.flat(started)
        moved = {path: wide(leaf) for path, leaf in located(started, delta).items()}

        def of_weights(weights: dict[str, Any]) -> Any:
            return adapted.base(trees.nest({**here, **weights}), *inputs, **kwargs)

        primals = {path: here[path] for path in moved}
        primal, out = jax.jvp(of_weights, (primals,), ({path: moved[path].astype(w.dtype) for path, w in primals.items()},))
        return jax.tree.map(jnp.add, primal, out)

    return Adapted(
        init=init,
        apply=apply,
        base=adapted.base,
        deltas=deltas,
        apply_deltas=apply_deltas,
        trainable=pick if mode != "weight" else lambda tau: adapted.trainable(tau),
        moving=pick,
        pushforward=pushforward,
        expand=None,
        folds=adapted.folds and mode == "layer",
        origin=None
        if adapted.origin is None
        else dataclasses.replace(adapted.origin, mode=mode, adapters0=adapters0, plain=adapted),
        tasks=adapted.tasks,
        materialise=None if adapted.materialise is None else materialise,
    )


def _network(adapted: Adapted, expand: Expansions, phi0: Any, full: Any, pick: Any) -> tuple[Any, Any, Any]:
    """The derivative of the whole network along the leaves that are present in the displacement, and no others.

    A leaf that is left out gets no tangent at all, which costs nothing; a tangent of zeros would cost a whole pass.
    """

    def along(params: Any, inputs: Any, rngs: Any, kwargs: Any, tau: Any) -> tuple[Any, Any]:
        moved, _ = trees.split(full(tau), tau)
        given, fixed = trees.split(phi0, moved)

        def of_adapters(at: Any) -> Any:
            return adapted.apply(params, trees.merge(at, fixed), *inputs, rngs=rngs, **kwargs)

        return _jvp(of_adapters, given, moved)

    def apply(params: Any, tau: Any, *inputs: Any, rngs: Any = None, **kwargs: Any) -> Any:
        primal, out = along(params, inputs, rngs, kwargs, tau)
        return jax.tree.map(jnp.add, primal, out)

    def pushforward(params: Any, stacked: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        moving = pick(stacked)
        return jax.vmap(lambda tau: along(params, inputs, None, kwargs, tau), out_axes=(None, 0))(moving)

    def deltas(params: Any, tau: Any) -> Delta:
        return _tangent_deltas(expand, phi0, params, full(tau))

    return apply, pushforward, deltas


def _layer(adapted: Adapted, expand: Expansions, phi0: Any, full: Any, pick: Any) -> tuple[Any, Any, Any]:
    """Each adapted layer's branch expanded on its own, at the layer's actual input."""

    def branch(rule: Any, layer: Any, leaves: Any, x: Any, y: Any, key: Any) -> Any:
        value, out = jax.jvp(lambda at: rule.branch(layer, at, x, y, key), (leaves[0],), (leaves[1],))
        return value + out

    def change(rule: Any, site: str, leaves: Any, weights: Any) -> Any:
        value, out = jax.jvp(lambda at: rule.change(site, at, weights), (leaves[0],), (leaves[1],))
        return {name: weighted_sum([value[name], tangent(value[name], out[name])], (1.0, 1.0)) for name in value}

    forward = expand.forward(branch, change)

    def apply(params: Any, tau: Any, *inputs: Any, rngs: Any = None, **kwargs: Any) -> Any:
        return forward(params, (phi0, full(tau)), *inputs, rngs=rngs, **kwargs)

    return apply, None, lambda params, tau: _tangent_deltas(expand, phi0, params, full(tau))


def _weight(adapted: Adapted, expand: Expansions, phi0: Any, full: Any, pick: Any) -> tuple[Any, Any, Any]:
    """A tangent in the weights, parametrised by the adapters, taken as a derivative in a scalar at zero.

    :math:`J_W f\\,[\\Delta W] = \\partial_t f(W_0 + t\\,\\Delta W)` at ``t = 0``. The product with ``t`` is written so that its
    value is a constant zero: the primal pass then does not depend on the displacement, and a training gradient transposes
    the tangent pass alone.
    """

    def forward_at(t: jax.Array) -> Any:
        def branch(rule: Any, layer: Any, leaves: Any, x: Any, y: Any, key: Any) -> Any:
            moved = jax.tree.map(jnp.add, leaves[0], leaves[1])
            value = rule.branch(layer, leaves[0], x, y, key)
            return value + _direction(t, rule.branch(layer, moved, x, y, key) - value)

        def change(rule: Any, site: str, leaves: Any, weights: Any) -> Any:
            moved = jax.tree.map(jnp.add, leaves[0], leaves[1])
            before, after = rule.change(site, leaves[0], weights), rule.change(site, moved, weights)
            return {n: dense(before[n]) + _direction(t, dense(after[n]) - dense(before[n])) for n in before}

        return expand.forward(branch, change, exact=True)

    def along(params: Any, inputs: Any, rngs: Any, kwargs: Any, tau: Any) -> tuple[Any, Any]:
        parts = (phi0, full(tau))
        zero = jnp.zeros((), jnp.float32)
        return _jvp(lambda t: forward_at(t)(params, parts, *inputs, rngs=rngs, **kwargs), zero, jnp.ones_like(zero))

    def apply(params: Any, tau: Any, *inputs: Any, rngs: Any = None, **kwargs: Any) -> Any:
        primal, out = along(params, inputs, rngs, kwargs, tau)
        return jax.tree.map(jnp.add, primal, out)

    def pushforward(params: Any, stacked: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        return jax.vmap(lambda tau: along(params, inputs, None, kwargs, tau), out_axes=(None, 0))(stacked)

    def deltas(params: Any, tau: Any) -> Delta:
        def change(rule: Any, site: str, leaves: Any, weights: Any) -> Any:
            moved = jax.tree.map(jnp.add, leaves[0], leaves[1])
            before, after = rule.change(site, leaves[0], weights), rule.change(site, moved, weights)
            return {n: after[n] if _is_zero(before[n]) else weighted_sum([after[n], before[n]], (1.0, -1.0)) for n in before}

        return expand.changes(params, (phi0, full(tau)), change, exact=True)

    return apply, pushforward, deltas


def _tangent_deltas(expand: Expansions, phi0: Any, params: Any, tau: Any) -> Delta:
    """The weight-space change of a displacement to first order: :math:`dA\\,B_0 + A_0\\,dB`."""

    def change(rule: Any, site: str, leaves: Any, weights: Any) -> Any:
        value, out = jax.jvp(lambda at: rule.change(site, at, weights), (leaves[0],), (leaves[1],))
        return {
            # With B0 = 0 the first product vanishes and the pair keeps its rank.
            n: LowRank(value[n].a, out[n].b, value[n].shape, value[n].axes) if _is_zero(value[n]) else tangent(value[n], out[n])
            for n in value
        }

    return expand.changes(params, (phi0, tau), change)


def _at_least_float32(leaf: Any) -> Any:
    """Small steps would be lost in half precision; and the derivative along a displacement wants one dtype of both."""
    return leaf.astype(trees.wide_dtype(leaf.dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _is_zero(change: Change) -> bool:
    """Whether a pair is known to be zero because its second factor is; never so while that is being traced."""
    return isinstance(change, LowRank) and not isinstance(change.b, jax.core.Tracer) and not bool(jnp.any(change.b))


def _jvp(fn: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    try:
        return jax.jvp(fn, (primals,), (tangents,))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "the model has an operation with a hand-written reverse rule (jax.custom_vjp) and no forward rule, so it cannot be "
            "linearized; such are fused attention and fused normalisation kernels. Choose the plain implementation, for "
            "example jax.nn.dot_product_attention(implementation='xla'), or mode='layer', which differentiates adapters only"
        ) from error


@jax.custom_jvp
def _direction(t: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.zeros_like(value)


@_direction.defjvp
def _direction_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (_, value), (speed, _) = primals, tangents
    return jnp.zeros_like(value), speed.astype(value.dtype) * value
