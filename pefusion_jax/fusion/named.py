"""Fusion methods by the names that recipes give them: mergekit's, with its parameters and arithmetic, and our own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.fusion import parts, tool_parts
from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.geometric import model_stock, slerp
from pefusion_jax.fusion.parts import Fusion, Part, chain
from pefusion_jax.fusion.recipe import Scalar, nearest
from pefusion_jax.fusion.streamed import Job, Ties

_NUMBER, _FLAG = "number", "flag"
REQUIRED = object()


class Parameter(NamedTuple):
    """A parameter of one of mergekit's methods: whether each model has its own, what it is, and its default."""

    per_model: bool
    kind: str
    default: Any = REQUIRED


def _task_vectors(normalize: bool = False, rescale: bool = False, **more: float) -> dict[str, Parameter]:
    return {
        "weight": Parameter(True, _NUMBER),
        "density": Parameter(True, _NUMBER, 1.0),
        "normalize": Parameter(False, _FLAG, normalize),
        "rescale": Parameter(False, _FLAG, rescale),
        "lambda": Parameter(False, _NUMBER, 1.0),
        "int8_mask": Parameter(False, _FLAG, False),  # of memory alone, there as here
        **{name: Parameter(True, _NUMBER, default) for name, default in more.items()},
    }


MERGEKIT: dict[str, dict[str, Parameter]] = {
    "linear": {"weight": Parameter(True, _NUMBER), "normalize": Parameter(False, _FLAG, True)},
    "slerp": {"t": Parameter(False, _NUMBER)},
    "nearswap": {"t": Parameter(False, _NUMBER)},
    "passthrough": {"scale": Parameter(True, _NUMBER, 1.0)},
    "model_stock": {"filter_wise": Parameter(False, _FLAG, False)},
    "task_arithmetic": _task_vectors(),
    "ties": _task_vectors(normalize=True),
    "dare_linear": _task_vectors(rescale=True),
    "dare_ties": _task_vectors(rescale=True),
    "breadcrumbs": _task_vectors(gamma=0.01),
    "breadcrumbs_ties": _task_vectors(gamma=0.01),
    "della": _task_vectors(normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _task_vectors(rescale=True, epsilon=0.15),
}
# Methods of ours that combine weights as they are where no base is named; all others are for differences from a base.
_ON_WEIGHTS = ("average", "weighted_average", "slerp")
_ELEMENTWISE = ("magmax", "consensus")


def check(value: Scalar, parameter: Parameter, where: str) -> Any:
    """A parameter's value.

    Raises:
      ValueError: if it is not of the parameter's kind.
    """
    if parameter.kind == _FLAG:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, not {value!r}")
        return value
    if isinstance(value, (bool, str)):
        raise ValueError(f"{where} must be a number, not {value!r}")
    return float(value)


def mergekit_job(
    name: str, shared: Mapping[str, Any], each: Mapping[str, Sequence[float]], *, count: int, based: bool, key: int
) -> Job:
    """What mergekit's method of that name does with a tensor.

    Args:
      name: of ``MERGEKIT``.
      shared: every shared parameter.
      each: every other parameter, with one value for each model (but the base).
      count: number of models (but the base; for slerp and linear with it).
      based: whether there is a base.
      key: seed of what is random.

    Raises:
      ValueError: if it does not go with these models or values.
    """
    if name == "linear":
        if based:
            raise ValueError(
                "linear is an average of models and has no base_model; list that model under models, or leave it out"
            )
        total = sum(each["weight"])
        if shared["normalize"] and abs(total) < 1e-12:
            raise ValueError(f"the weights {list(each['weight'])} add up to 0; set normalize: false")
        return Job(False, tuple(w / total if shared["normalize"] else w for w in each["weight"]))
    if name == "passthrough":
        if based:
            raise ValueError("passthrough copies one model, and base_model is another one: leave base_model out")
        if count != 1:
            raise ValueError(f"passthrough copies one model, but {count} are given; use slices, each with one source")
        return Job(False, (each["scale"][0],))
    if not based:
        raise ValueError(f"{name} needs a base_model")
    if name in ("slerp", "nearswap") and count != 1:
        raise ValueError(f"{name} is between base_model and one other model, but {count} others are given")
    if name == "slerp":
        return Job(False, whole=_cached_slerp(shared["t"]))
    if name == "nearswap":
        return Job(True, elementwise=_cached_nearswap(shared["t"]))
    if name == "model_stock":
        if shared["filter_wise"]:
            raise ValueError("model_stock with filter_wise: true is not supported; leave it at false, which is by tensor")
        if count < 2:
            raise ValueError("model_stock needs base_model and at least two other models")
        return Job(True, whole=model_stock(conform="mergekit"))

    weights, densities = tuple(each["weight"]), tuple(each["density"])
    if name == "task_arithmetic":
        total = sum(weights)
        divisor = total if shared["normalize"] and abs(total) >= 1e-8 else 1.0
        return Job(True, tuple(shared["lambda"] * w / divisor for w in weights))
    if name == "ties" and not shared["rescale"]:
        return Job(True, ties=Ties(densities, weights, shared["lambda"], mean=shared["normalize"], weighted=True))
    extra = tuple(each.get("gamma", each.get("epsilon", densities)))
    fusion = _cached_sparse(name, densities, extra, weights, shared["rescale"], shared["normalize"], shared["lambda"], key)
    return Job(True, whole=fusion)


@functools.lru_cache(256)
def _cached_slerp(t: float) -> Fusion:
    return slerp(t, conform="mergekit")


@functools.lru_cache(256)
def _cached_nearswap(t: float) -> Fusion:
    def part(leaf: jax.Array) -> jax.Array:
        share = jnp.asarray(t, leaf.dtype) / jnp.maximum(jnp.abs(leaf[0]), jnp.asarray(1e-6, leaf.dtype))
        return leaf[0] * jnp.clip(share, 0, 1)

    return chain(lambda stacked: jax.tree.map(part, stacked))


@functools.lru_cache(256)
def _cached_sparse(
    name: str,
    densities: tuple[float, ...],
    extra: tuple[float, ...],
    weights: tuple[float, ...],
    rescale: bool,
    normalize: bool,
    scale: float,
    key: int,
) -> Fusion:
    """mergekit's methods that leave out entries of each task, weigh, and add up, with or without an election."""
    kind = name.partition("_")[0]

    def sparsify(setting: tuple[float, float]) -> Part:
        density, other = setting
        if density >= 1:
            return lambda stacked: stacked
        if density <= 0:
            return lambda stacked: jax.tree.map(jnp.zeros_like, stacked)
        if kind == "dare":
            # drop has divided by the density, which the norm takes out again.
            return tool_parts.keeping_l1(parts.drop(density, key)) if rescale else _both(parts.drop(density, key), density)
        if kind == "della":
            if density + other >= 1 or density - other <= 0:
                raise ValueError(f"density {density:g} and epsilon {other:g}: their sum and difference must be between 0 and 1")
            part = tool_parts.magprune(density, 2 * other, key, rescale=False)
        elif kind == "breadcrumbs":
            part = tool_parts.keep_middle(density, other)
        else:
            part = parts.trim(density, "per_tensor")
        return tool_parts.keeping_l1(part) if rescale else part

    merged = tool_parts.mergekit_merge(
        lambda count: jnp.asarray(weights, jnp.float32),
        consensus=name in ("ties", "della") or name.endswith("_ties"),
        normalize=normalize,
    )
    return chain(_by_task(sparsify, tuple(zip(densities, extra, strict=True))), merged, parts.rescale(scale))


def _both(drop: Part, density: float) -> Part:
    undo = parts.rescale(density)
    return lambda stacked: undo(drop(stacked))


def _by_task(make: Callable[[Any], Part], settings: Sequence[Any]) -> Part:
    """A sparsifying part with a setting of its own for each task; every task draws as it would with one setting for all."""
    distinct = {setting: make(setting) for setting in dict.fromkeys(settings)}

    def part(stacked: Any) -> Any:
        done = {setting: part(stacked) for setting, part in distinct.items()}
        if len(done) == 1:
            return done[settings[0]]
        order = list(done)

        def pick(*leaves: jax.Array) -> jax.Array:
            return jnp.stack([leaves[order.index(setting)][t] for t, setting in enumerate(settings)])

        return jax.tree.map(pick, *(done[setting] for setting in order))

    return part


def our_parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of ``pefusion_jax.fusion.NAME``.

    Raises:
      ValueError: if that is no method, or takes something that a recipe cannot hold.
    """
    from pefusion_jax import fusion

    methods = {}
    for method in fusion.__all__:
        made = getattr(fusion, method)
        if inspect.isfunction(made) and method not in ("chain", "linear"):
            signature = inspect.signature(made)
            if signature.return_annotation in ("Fusion", Fusion):
                methods[method] = dict(signature.parameters)
    if name not in methods:
        raise ValueError(f"no fusion method {name!r}{nearest(name, sorted(methods))}")
    return methods[name]


def require_plain(name: str, given: Iterable[str]) -> None:
    """Refuses arguments of our method ``name`` that are made by calls, which a recipe or a command line cannot hold.

    Raises:
      ValueError: with the call that can.
    """
    known = our_parameters(name)
    for key in given:
        kind = str(known[key].annotation).partition(" ")[0] if key in known else ""
        if kind in ("Fusion", "Objective"):
            raise ValueError(
                f"{name} takes {key} as a pf.fusion.{kind}, not by name: call pf.fuse(pf.fusion.{name}({key}=...), trees)"
            )


def our_job(
    name: str, shared: Mapping[str, Scalar], each: Mapping[str, Sequence[Scalar]], *, models: Sequence[str], based: bool
) -> Job:
    """What ``pefusion_jax.fusion.NAME(**shared, **each)`` does with a tensor.

    Args:
      name: of the method.
      shared: parameters with one value.
      each: parameters with a value for each model.
      models: the models (but the base), by whose names a method goes that goes by names.
      based: whether differences from a base are combined.

    Raises:
      ValueError: if the method does not take these, or needs more than one tensor at a time.
    """
    if not based and name not in _ON_WEIGHTS:
        raise ValueError(f"{name} combines changes from a base model: name it as base_model")
    frozen = (tuple(sorted(shared.items())), tuple(sorted((key, tuple(values)) for key, values in each.items())))
    return _our_job(name, *frozen, tuple(models), based)


@functools.lru_cache(1024)
def _our_job(name: str, shared: Any, each: Any, models: tuple[str, ...], based: bool) -> Job:
    from pefusion_jax import fusion

    count = len(models)
    given = dict(shared) | {key: list(values) for key, values in each}
    require_plain(name, given)
    missing = [
        key
        for key, parameter in our_parameters(name).items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        and key not in given
    ]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}; if a recipe cannot hold that, load the models and use pf.fuse")
    try:
        method: Fusion = getattr(fusion, name)(**given)
        if method.bind is not None:
            method = method.bind(models)
        if method.weights is not None:
            coefficients = np.asarray(method.weights(count), np.float64)
            return Job(based, tuple(float(value) for value in coefficients))
        if name == "ties" and based:
            streamed = _our_ties(given, count)
            if streamed is not None:
                return Job(based, ties=streamed)
        alone = _sees_one_tensor(method, count)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}({', '.join(f'{key}={value}' for key, value in given.items())}): {error}") from error
    if not alone:
        _refuse_many_tensors(name)
    return Job(based, elementwise=method) if name in _ELEMENTWISE else Job(based, whole=method)


def _our_ties(given: Mapping[str, Any], count: int) -> Ties | None:
    """TIES in the form that is done chunk by chunk, if these are arguments of it."""
    conform = given.get("conform", "paper")
    per_tensor = conform == "mergekit" or (conform == "paper" and given.get("trim") == "per_tensor")
    density, scale = given.get("density", 0.2), given.get("scale", 1.0)
    if not per_tensor or isinstance(density, list) or isinstance(scale, list):
        return None
    weights = given.get("weights") or [1.0] * count
    return Ties(
        densities=(float(density),) * count,
        weights=tuple(map(float, weights)),
        scale=float(scale),
        by_count=given.get("elect") == "count",
        mean=given.get("reduce") != "sum" and given.get("normalize") is not False,
        weighted=conform == "mergekit",
    )


def _sees_one_tensor(method: Fusion, count: int) -> bool:
    """Tries the method on two tensors, together and apart: a merge of files sees one tensor at a time."""
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(count, 4, 3)), "b": 10 * rng.normal(size=(count, 7))}
    tasks = [{path: jnp.asarray(leaf[t], jnp.float32) for path, leaf in tensors.items()} for t in range(count)]
    together = fuse(method, tasks)
    apart = {path: fuse(method, [{path: task[path]} for task in tasks])[path] for path in tensors}
    return all(np.allclose(together[path], apart[path], rtol=1e-4, atol=1e-5) for path in tensors)


def _refuse_many_tensors(name: str) -> None:
    known = our_parameters(name)
    way = (
        "set trim: per_tensor"
        if "trim" in known
        else f"use merge_method: {name}, which goes tensor by tensor"
        if name in MERGEKIT
        else "load the models and use pf.fuse"
    )
    raise ValueError(f"{name} compares tensors with each other, and a merge of files sees one at a time: {way}")
