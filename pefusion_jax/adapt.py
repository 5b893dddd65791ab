"""Adapters in Linen models: ``adapt(model, methods) -> Adapted``.

This is the only file that knows how adapters get into a model. A Linen method interceptor sees every layer call; where a
rule matches the layer's path, the interceptor adds the method's branch to the layer's output. The model is not edited and
does not have to be ours.

    base parameters                      adapters (a tree of their own)
    encoder/layer/0/query/kernel         encoder/layer/0/query/lora_a
    encoder/layer/0/query/bias           encoder/layer/0/query/lora_b

Adapter leaves are created in the ``params`` collection *while the model is traced* and split off again before anybody sees
them. So ``nn.scan(variable_axes={"params": 0})`` slices them and ``nn.remat`` passes them like any parameter of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.deltas import Delta, fold
from pefusion_jax.layers import Layer, describe, input_of
from pefusion_jax.rules import (
    Leaves,
    Method,
    around,
    check_called,
    check_paths,
    first,
    fitting,
    join,
    owner_on_layers,
    refuse_slashes,
    refuse_taken,
    require_whole,
    sees,
    sites,
    unmatched,
)


class Expansions(NamedTuple):
    """How ``linearize`` re-reads an adapted model: the forward pass and the weight changes, site by site.

    ``parts`` is one tree, or the point of expansion and a displacement. A generated model turns the pair into adapters and a
    displacement of adapters: to first order, or with ``exact`` the whole difference that the displacement makes.

    Attributes:
      forward: ``(branch, change, exact=False) -> apply(params, parts, *inputs)``: ``branch(rule, layer, leaves, x, y, key)`` is
        added to the output of each adapted layer, ``change(rule, site, leaves, weights)`` to each adapted parameter. ``leaves``
        has one dictionary for each of the adapter trees in ``parts``.
      changes: ``(params, parts, change, exact=False) -> Delta`` with the same ``change``.
    """

    forward: Callable[..., Any]
    changes: Callable[..., Delta]


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """What an :class:`Adapted` was made of; compared by identity, so that an Adapted stays hashable.

    Attributes:
      model: the Linen module that :func:`adapt` was given.
      methods: the adapter methods, in order.
      mode: of ``linearize``, or ``None``.
      adapters0: the point of expansion, or ``None``.
      plain: the model before it was linearized, or ``None``.
      generator: of ``generate``, or ``None``.
      inner: the model that was given to ``generate``, or ``None``.
    """

    model: nn.Module
    methods: tuple[Method, ...]
    mode: str | None = None
    adapters0: Any = None
    plain: Adapted | None = None
    generator: Any = None
    inner: Adapted | None = None


class Adapted(NamedTuple):
    """A tunable model: pure functions over base parameters and a tree of adapters. Hashable, by identity.

    ``params`` is the model's parameter dictionary, or a dictionary of Linen collections that has a ``params`` entry. It is
    never copied or edited. ``rngs`` in ``apply`` may hold ``{"dropout": key}``; without it nothing is random.

    Attributes:
      init: ``(key, params, *inputs, **kwargs) -> adapters``, float32 leaves.
      apply: ``(params, adapters, *inputs, rngs=None, **kwargs) -> outputs``.
      base: ``(params, *inputs, **kwargs) -> outputs`` of the model alone.
      deltas: ``(params, adapters) -> Delta``: the weight-space change that the adapters amount to.
      apply_deltas: ``(params, delta, *inputs, **kwargs) -> outputs`` of the same kind of model (plain or linearized) with a
        weight-space change in place of adapters.
      trainable: ``adapters -> `` nested dictionary of the leaves that are trained.
      moving: ``adapters -> `` nested dictionary of the trained leaves whose derivative at ``adapters`` is not identically 0.
      pushforward: for models affine in a displacement: ``(params, stacked, *inputs, **kwargs) -> (f0, J tau)``, the second
        with a leading axis over the stacked displacements. ``None`` for all others.
      expand: builds a forward pass that treats each adapted site in another way; ``linearize`` uses it and gives none.
      folds: whether ``apply(params, a)`` equals ``base(fold(params, deltas(params, a)))``.
      origin: model and methods, for those who write adapters to files; ``None`` where they are not enough to do so.
      tasks: names of the tasks that ``apply`` and ``base`` take the number of, as ``task``; none for models that make no
        difference between tasks. See :func:`~pefusion_jax.generators.generate`.
      materialise: for generated models: ``(params, tree, task=None, inputs=None) -> adapters`` of the model that was given to
        ``generate``; ``task`` is a name or a number. A generator that looks at the instance needs ``inputs``, the model's
        by name, and gives adapters with the rows in front.
      auxiliary: ``(params, tree, outputs, inputs) -> []`` float32, added to the training loss; ``None`` for most models.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    base: Callable[..., Any]
    deltas: Callable[..., Delta]
    apply_deltas: Callable[..., Any]
    trainable: Callable[[Any], Any]
    moving: Callable[[Any], Any]
    pushforward: Callable[..., Any] | None
    expand: Expansions | None
    folds: bool
    origin: Origin | None = None
    tasks: tuple[str, ...] = ()
    materialise: Callable[..., Any] | None = None
    auxiliary: Callable[..., jax.Array] | None = None


def adapt(model: nn.Module, methods: Any) -> Adapted:
    r"""Inserts adapter methods into a Linen model by rule.

    Args:
      model: any Linen module: with Python loops, ``nn.remat``, ``nn.scan`` or shared submodules. Layers that can be adapted
        are ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum``, ``nn.Conv`` and ``nn.Embed`` and their subclasses.
      methods: one method or a sequence. Each has ``targets``, a regular expression that must match the *whole* slash path
        (``re.fullmatch``) of a layer, or of a parameter for methods that act on parameters. For layers the first method
        that matches wins, and so for parameters.

    Returns:
      An :class:`Adapted`. Its functions raise ValueError when a rule matches nothing, naming the nearest paths.

    Example::

      lora = adapt(model, LoRA(rank=8, targets=r".*/(query|value)"))
      adapters = lora.init(jax.random.key(0), params, input_ids)
      outputs = lora.apply(params, adapters, input_ids)

    Reference: E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, for the first of the methods; the
    insertion by interception is ours.
    """
    rules: tuple[Method, ...] = tuple(methods) if isinstance(methods, Sequence) else (methods,)
    if not rules:
        raise ValueError("adapt(model, methods) got no method; pass one, for example pf.LoRA(rank=8, targets=r'.*/query')")
    for rule in rules:
        if not isinstance(rule.targets, str):
            raise ValueError(f"targets={rule.targets!r} must be one string; join several with |, as in r'.*/(query|value)'")
        for regex in (rule.targets, *getattr(rule, "patterns", ())):
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"{type(rule).__name__}: {regex!r} is not a regular expression: {error}") from error
    on_layers = tuple(rule for rule in rules if rule.acts_on == "layers")
    on_parameters = tuple(rule for rule in rules if rule.acts_on == "parameters")

    def init(key: jax.Array, params: Any, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        refuse_slashes(_collections(params)["params"])
        tree = _init_layers(model, on_layers, key, params, inputs, kwargs) if on_layers else {}
        parameters = trees.flat(_collections(params)["params"])
        for rule in on_parameters:
            matched = [path for path in parameters if first(on_parameters, path) is rule]
            if not matched:
                raise ValueError(unmatched(rule, parameters, "parameter"))
        for path, weight in parameters.items():
            rule = first(on_parameters, path)
            if rule is not None:
                site = path.rpartition("/")[0]
                leaves = {join(site, name): how for name, how in rule.leaves((path, weight)).items()}
                refuse_taken(leaves, parameters)
                made = {
                    # A key of its own for each leaf, whatever else is adapted.
                    leaf: make(jax.random.fold_in(key, zlib.crc32(leaf.encode())), shape, jnp.float32)
                    for leaf, (make, shape) in leaves.items()
                }
                tree = trees.merge(tree, trees.nest(made))
        return tree

    def base(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return model.apply(_collections(params), *inputs, **kwargs)

    def expand(branch: Callable[..., Any], change: Callable[..., Any], exact: bool = False) -> Callable[..., Any]:
        def forward(params: Any, parts: Sequence[Any], *inputs: Any, rngs: Any = None, **kwargs: Any) -> Any:
            variables = _collections(params)
            check_paths(parts, variables["params"], rules)
            edited = {"params": variables["params"]}
            for rule, site, leaves, weights in sites(on_parameters, parts, variables["params"], parameters=True):
                named = change(rule, site, leaves, weights)
                # Not fold(): that accepts collections too, and the tree of a model may have a module named "params".
                edited = fold(edited, Delta({join(site, name): value for name, value in named.items()}))
            weights = trees.flat(edited["params"])
            for part, suffix in zip(parts, _suffixes(len(parts)), strict=True):
                for path, leaf in trees.flat(part).items():
                    if owner_on_layers(on_layers, path) is not None:
                        weights[path + suffix] = leaf
            merged = {**variables, "params": trees.nest(weights)}
            called: set[str] = set()
            call = around(rules, functools.partial(model.apply, merged, **({} if rngs is None else {"rngs": rngs})))
            with nn.intercept_methods(_interceptor(on_layers, branch, len(parts), rngs is not None, called)):
                outputs = call(*inputs, **kwargs)
            check_called(parts, variables["params"], called)
            return outputs

        return forward

    plain = expand(
        lambda rule, layer, leaves, x, y, key: rule.branch(layer, leaves[0], x, y, key),
        lambda rule, site, leaves, weights: rule.change(site, leaves[0], weights),
    )

    def apply(params: Any, adapters: Any, *inputs: Any, rngs: Any = None, **kwargs: Any) -> Any:
        return plain(params, (adapters,), *inputs, rngs=rngs, **kwargs)

    def deltas(params: Any, adapters: Any) -> Delta:
        return changes(params, (adapters,), lambda rule, site, leaves, weights: rule.change(site, leaves[0], weights))

    def changes(params: Any, parts: Sequence[Any], change: Callable[..., Any], exact: bool = False) -> Delta:
        weights = _collections(params)["params"]
        check_paths(parts, weights, rules)
        found: dict[str, Any] = {}
        for kind, rules_of_kind in (("layers", on_layers), ("parameters", on_parameters)):
            for rule, site, leaves, here in sites(rules_of_kind, parts, weights, parameters=kind == "parameters"):
                with fitting(site, leaves):
                    changed = change(rule, site, leaves, here)
                for name, value in changed.items():
                    path = join(site, name)
                    if path in found:
                        raise ValueError(
                            f"two methods change the parameter {path!r}; narrow the targets of one of them so that the "
                            "weight-space change is theirs alone"
                        )
                    found[path] = value
        return Delta(found)

    def apply_deltas(params: Any, delta: Delta, *inputs: Any, **kwargs: Any) -> Any:
        return base(fold(params, delta), *inputs, **kwargs)

    def picked(names: Callable[[Any, Leaves], tuple[str, ...]]) -> Callable[[Any], Any]:
        def pick(adapters: Any) -> Any:
            keep: dict[str, Any] = {}
            for acting, parameters in ((on_layers, False), (on_parameters, True)):
                for rule, site, (leaves,), _ in sites(acting, (adapters,), None, parameters=parameters):
                    keep |= {join(site, name): leaves[name] for name in names(rule, leaves)}
            return trees.nest(keep)

        return pick

    return Adapted(
        init=init,
        apply=apply,
        base=base,
        deltas=deltas,
        apply_deltas=apply_deltas,
        trainable=picked(lambda rule, leaves: rule.trained(leaves)),
        moving=picked(lambda rule, leaves: rule.moving(leaves)),
        pushforward=None,
        expand=Expansions(forward=expand, changes=changes),
        folds=all(getattr(rule, "folds", True) for rule in rules),
        origin=Origin(model, rules),
    )


def _collections(params: Any) -> dict[str, Any]:
    """Wraps a bare parameter dictionary, or passes a dictionary of Linen collections on."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be a nested dictionary of arrays, got {type(params).__name__}")
    if isinstance(params.get("params"), Mapping):
        return dict(params)
    return {"params": params}


def _suffixes(count: int) -> list[str]:
    """Names under which the leaves of the first, second, ... adapter tree travel through the model."""
    return ["", *(f"__part{i}" for i in range(1, count))]


def _init_layers(
    model: nn.Module, rules: Sequence[Method], key: jax.Array, params: Any, inputs: Any, kwargs: Any
) -> dict[str, Any]:
    """Creates the adapter leaves by tracing the model once; XLA drops the forward pass, whose outputs nobody uses."""
    matched: dict[int, set[str]] = {}
    seen: dict[str, Layer] = {}
    normalised: dict[str, str] = {}  # what a SpectralNorm wraps -> the wrapper

    def create(next_fn: Callable[..., Any], args: Any, call_kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.SpectralNorm) and context.method_name == "__call__":
            normalised["/".join(context.module.layer_instance.path)] = "/".join(context.module.path)
        y = next_fn(*args, **call_kwargs)
        layer = describe(context.module, context.method_name, args, call_kwargs)
        if layer is None:
            return y
        seen[layer.path] = layer
        rule = first([rule for rule in rules if sees(rule, layer)], layer.path)
        if rule is not None:
            matched.setdefault(rules.index(rule), set()).add(layer.path)
            within = next((path for path in normalised if f"{layer.path}/".startswith(f"{path}/")), None)
            if within is not None:
                raise ValueError(
                    f"targets={rule.targets!r} matches {layer.path!r}, whose weight {normalised[within]!r}, a SpectralNorm, "
                    f"normalises in every call, so that {type(rule).__name__} beside it would change another weight; narrow "
                    "the targets"
                )
            module = context.module
            leaves = rule.leaves(layer)
            refuse_taken([join(layer.path, name) for name in leaves], taken)
            for name, (make, shape) in leaves.items():
                if not module.has_variable("params", name):
                    module.put_variable("params", name, make(module.make_rng("params"), shape, jnp.float32))
        return y

    variables = _collections(params)
    taken = trees.flat(variables["params"])
    flat_inputs, structure = jax.tree.flatten((inputs, kwargs))
    is_array = [hasattr(leaf, "dtype") or isinstance(leaf, (int, float)) and not isinstance(leaf, bool) for leaf in flat_inputs]

    @jax.jit
    def run(key: jax.Array, variables: Any, arrays: list[Any]) -> dict[str, Any]:
        given = iter(arrays)
        leaves = [next(given) if array else leaf for leaf, array in zip(flat_inputs, is_array, strict=True)]
        args, call_kwargs = jax.tree.unflatten(structure, leaves)
        after: dict[str, Any] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            outputs, made = model.apply(variables, *args, rngs={"params": key}, mutable=["params"], **kwargs)
            after.update(trees.flat(made["params"]))
            return outputs

        with nn.intercept_methods(create):
            around(rules, call)(*args, **call_kwargs)
        return {path: leaf for path, leaf in after.items() if path not in taken}

    created = run(key, variables, [leaf for leaf, array in zip(flat_inputs, is_array, strict=True) if array])
    for index, rule in enumerate(rules):
        if index not in matched:
            own = [path for path, layer in seen.items() if sees(rule, layer)]
            tap = next((path for path in seen if path not in own and re.fullmatch(rule.targets, path)), None)
            if tap is not None:
                raise ValueError(
                    f"targets={rule.targets!r} matches {tap!r}, a tap: an activation without a weight, which "
                    f"{type(rule).__name__} cannot adapt; aim at a layer, or use a method for taps, such as Bottleneck"
                )
            raise ValueError(unmatched(rule, own, "layer"))
        for regex in getattr(rule, "patterns", ()):
            if not any(re.fullmatch(regex, path) for path in matched[index]):
                raise ValueError(
                    f"the pattern {regex!r} of {type(rule).__name__} matches none of its layers"
                    f"{trees.did_you_mean(regex, matched[index])}. The whole path must match"
                )
    return trees.nest(created)


def _interceptor(
    rules: Sequence[Method], branch: Callable[..., Any], parts: int, stochastic: bool, called: set[str]
) -> Callable[..., Any]:
    suffixes = _suffixes(parts)

    def intercept(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fn(*args, **kwargs)
        called.add("/".join(context.module.path))
        layer = describe(context.module, context.method_name, args, kwargs)
        rule = first([rule for rule in rules if sees(rule, layer)], layer.path) if layer is not None else None
        if layer is None or rule is None:
            return y
        module = context.module
        leaves = []
        for suffix in suffixes:
            present = [name for name in rule.names if module.has_variable("params", name + suffix)]
            leaves.append({name: module.get_variable("params", name + suffix) for name in present})
        if not leaves[0]:
            raise ValueError(
                f"{type(rule).__name__} matches the layer {layer.path!r}, for which the adapters hold no leaves; make the "
                "adapters with init() and the same kind of call as this one"
            )
        for part in leaves:
            require_whole(rule, layer.path, part)
        key = None
        if stochastic and rule.stochastic:
            if not module.has_rng("dropout"):
                raise ValueError(
                    f"{layer.path!r} got no 'dropout' key: pass rngs={{'dropout': key}}, and where the model scans its "
                    "layers with nn.scan, list 'dropout' in its split_rngs"
                )
            key = module.make_rng("dropout")
        x = input_of(module, args, kwargs)
        with fitting(layer.path, leaves):
            base = rule.beneath(x, y) if hasattr(rule, "beneath") else y
            return base + branch(rule, layer, tuple(leaves), x, y, key).astype(y.dtype)

    return intercept
