"""Rules: which adapter method owns which layer, parameter and adapter leaf, and what is said where none does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pefusion_jax import trees
from pefusion_jax.layers import Layer

Leaves = dict[str, jax.Array]


class Method(Protocol):
    """What ``adapt`` asks of an adapter method; see ``pefusion_jax.methods`` for those that exist.

    ``acts_on == "layers"``: rules address modules, ``branch`` computes what is added to the layer's output, and ``names``
    are the names of its leaves, which every site has. ``acts_on == "parameters"``: rules address parameters, the change of each
    is added before the model runs, and ``owns`` says which parameter a leaf belongs to. ``stochastic``: whether ``branch``
    needs a random key in training.

    A method may also have ``taps = True``: its rules address taps too (``backbones.Tap``), which no other method sees;
    ``folds = False``: its branch is no change of weights, and ``change`` always raises; ``optional``: those of its names that
    not every site has; ``patterns``: regular expressions beside the targets, each of which has to match one of its layers;
    ``beneath(x, y) -> y``: what its branch is added to in place of the layer's output; and ``around(call) -> call``: it gives
    the adapted model, ``call(*inputs, **kwargs) -> outputs``, other inputs than it was called with, or edits its outputs.
    """

    targets: str
    acts_on: str
    stochastic: bool
    names: tuple[str, ...]

    def leaves(self, site: Any) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """Leaf name -> (initialiser ``(key, shape, dtype) -> array``, shape), for a layer or a parameter."""
        ...

    def owns(self, leaf: str) -> str:
        """Name of the parameter that a leaf changes, or the empty string if the leaf is not of this method."""
        ...

    def branch(self, layer: Layer, leaves: Leaves, x: Any, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is added to the layer's output ``y`` at input ``x``; ``key`` is ``None`` where nothing is random."""
        ...

    def change(self, path: str, leaves: Leaves, weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Parameter name -> its weight-space change, or a ValueError that says why there is none."""
        ...

    def trained(self, leaves: Leaves) -> tuple[str, ...]:
        """Names of the leaves that are trained."""
        ...

    def moving(self, leaves: Leaves) -> tuple[str, ...]:
        """Names of the trained leaves whose derivative does not vanish identically at ``leaves``."""
        ...


def join(site: str, name: str) -> str:
    """Path of a leaf; a site may be the model itself."""
    return f"{site}/{name}" if site else name


def first(rules: Sequence[Method], path: str) -> Any:
    """The first method whose targets match the whole path, or ``None``."""
    return next((rule for rule in rules if re.fullmatch(rule.targets, path)), None)


def around(rules: Sequence[Method], call: Callable[..., Any]) -> Callable[..., Any]:
    """The model as the methods want it called, the first of them outermost."""
    for rule in reversed(rules):
        call = rule.around(call) if hasattr(rule, "around") else call
    return call


def owner(rules: Sequence[Method], path: str) -> Any:
    """The method that an adapter leaf belongs to, or ``None``."""
    on_layers = [rule for rule in rules if rule.acts_on == "layers"]
    on_parameters = [rule for rule in rules if rule.acts_on == "parameters"]
    return owner_on_layers(on_layers, path) or owner_on_parameters(on_parameters, path)


def owner_on_layers(rules: Sequence[Method], path: str) -> Any:
    """The method on layers that a leaf belongs to: its site is matched and its name is one of the method's."""
    site, _, name = path.rpartition("/")
    # Where the site is a tap, a method before it may match the path and not see the tap.
    return first([rule for rule in rules if name in rule.names], site)


def owner_on_parameters(rules: Sequence[Method], path: str) -> Any:
    """The method on parameters that a leaf belongs to."""
    site, _, name = path.rpartition("/")
    return next((rule for rule in rules if rule.owns(name) and first(rules, join(site, rule.owns(name))) is rule), None)


def sees(rule: Any, layer: Layer) -> bool:
    """Whether a layer, which may be a tap, is any of the method's business."""
    return bool(layer.kernel) or getattr(rule, "taps", False)


def sites(rules: Sequence[Method], parts: Sequence[Any], params: Any, *, parameters: bool) -> Any:
    """Yields (method, site path, leaves of each part, base weights of the site) for every site in adapter trees."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for index, part in enumerate(parts):
        for path, leaf in trees.flat(part).items():
            site, _, name = path.rpartition("/")
            rule = (owner_on_parameters if parameters else owner_on_layers)(rules, path)
            if rule is not None:
                slot = grouped.setdefault((site, rules.index(rule)), [{} for _ in parts])
                slot[index][name] = leaf
    weights = {} if params is None else trees.flat(params)
    for (site, rule_index), leaves in grouped.items():
        for part in () if parameters else leaves:
            require_whole(rules[rule_index], site, part)
        prefix = site + "/" if site else ""
        here = {
            path[len(prefix) :]: w for path, w in weights.items() if path.startswith(prefix) and "/" not in path[len(prefix) :]
        }
        yield rules[rule_index], site, tuple(leaves), here


def require_whole(rule: Method, site: str, leaves: Leaves) -> None:
    """Refuses a site on layers that lacks a leaf: half of a pair is no adapter."""
    for name in rule.names:
        if name not in leaves and name not in getattr(rule, "optional", ()):
            raise ValueError(
                f"the adapters lack the leaf {join(site, name)!r}, which {type(rule).__name__} needs beside "
                f"{', '.join(map(repr, leaves)) or 'no other'}; make them with init()"
            )


@contextlib.contextmanager
def fitting(site: str, parts: Sequence[Leaves]) -> Iterator[None]:
    """Says whose leaves they are when a computation finds that shapes do not go together."""
    try:
        yield
    except TypeError as error:  # what JAX raises then
        shapes = "; ".join(", ".join(f"{name} {tuple(np.shape(leaf))}" for name, leaf in part.items()) for part in parts)
        raise ValueError(
            f"the adapters of {site!r} do not fit the layer or each other ({shapes}): {error}. Take adapters that init() of "
            "this model made"
        ) from error


def check_paths(parts: Sequence[Any], params: Mapping[str, Any], rules: Sequence[Method]) -> None:
    """Linen ignores variables that no module asks for, so a leaf that nothing uses would be silent without this."""
    modules = {path.rpartition("/")[0] for path in trees.flat(params)}
    around = {"", *modules}
    for module in modules:
        around |= {module[:place] for place, letter in enumerate(module) if letter == "/"}
    for part in parts:
        for path in trees.flat(part):
            site = path.rpartition("/")[0]
            rule = owner(rules, path)
            # A tap has no parameters, but the module that it stands in has; whether it exists, the forward pass shows.
            tap = site.rpartition("/")[0] in around and getattr(rule, "taps", False)
            if site not in modules and not tap:
                raise ValueError(_unknown(path, modules))
            if rule is None:
                known = ", ".join(f"{type(each).__name__}(targets={each.targets!r})" for each in rules)
                raise ValueError(f"the adapters have a leaf {path!r} that is of no method here: {known}; leave it out")


def check_called(parts: Sequence[Any], params: Mapping[str, Any], called: set[str]) -> None:
    """Finds leaves of taps that are not there. Where the module around a tap was not called either, nothing can be said."""
    modules = {path.rpartition("/")[0] for path in trees.flat(params)}
    for part in parts:
        for path in trees.flat(part):
            site = path.rpartition("/")[0]
            if site not in modules and site not in called and site.rpartition("/")[0] in called:
                raise ValueError(_unknown(path, called))


def _unknown(path: str, modules: Iterable[str]) -> str:
    return (
        f"the adapters have a leaf {path!r} but the base parameters have no such module"
        f"{trees.did_you_mean(path.rpartition('/')[0], modules)}; were they made for another model?"
    )


def refuse_slashes(weights: Any, path: str = "") -> None:
    """Refuses names that no path can hold."""
    for name, below in weights.items() if isinstance(weights, Mapping) else ():
        if "/" in str(name):
            raise ValueError(
                f"the module {path!r} has a parameter named {name!r}, with a slash, as nn.WeightNorm names the scale of a "
                "layer that it wraps: paths of parameters would be ambiguous. Give the model its layers without that wrapper, "
                "with the product of scale and normalised weight as their weight"
            )
        refuse_slashes(below, join(path, str(name)))


def refuse_taken(leaves: Iterable[str], parameters: Mapping[str, Any]) -> None:
    """An adapter leaf travels beside the base's parameters, so it must not have the name of one."""
    for path in leaves:
        if path in parameters:
            raise ValueError(
                f"the base model has a parameter {path!r}, the name of an adapter leaf: it is adapted already; fold its "
                "adapters into the weights, or rename the parameter"
            )


def unmatched(rule: Method, known: Any, what: str) -> str:
    """What to say of a method whose targets match nothing."""
    plain = re.sub(r"\\.|[\\^$*+?{}()|\[\].]", "", rule.targets.split("|")[0])
    return (
        f"targets={rule.targets!r} matches no {what} that {type(rule).__name__} can adapt"
        f"{trees.did_you_mean(plain, known)}. The whole path must match: r'.*/name' matches at any depth"
    )
