"""The table of methods that every guarantee is checked for, and the tiny models they are checked on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from models import Encoder, Wide, stack_layers

import pefusion_jax as pf
from pefusion_jax.backbones import Tap


class Row(NamedTuple):
    """One method and where it departs from the contract, each departure with its reason.

    ``zero_gradient``: regular expression of the leaves whose gradient is exactly zero at the start.
    ``linear_forward``, ``linear_gradient``: bounds on FLOPs of the network linearization in base forwards.
    ``folds``: false for methods that are no change of the weights, for which the tests of folding expect the error.
    ``start``: largest change of an output that the start may make: a prompt is in the model from the start.
    ``counted``: ``layout -> (model, parameters, inputs)`` whose FLOPs are counted, for methods that need token ids.
    ``model``: ``layout -> `` what the method is checked in. ``layouts``: those in which every guarantee is checked; that all
    layouts agree is checked for every method. ``variant``: other settings of a method above, whose steps need no devices.
    """

    name: str
    make: Callable[[str], Any]
    zero_gradient: str = r"(?!)"
    linear_forward: float = 2.2
    linear_gradient: float = 3.3
    folds: bool = True
    start: float = 0.0
    counted: Callable[[str], Any] | None = None
    model: Callable[[str], Any] = Encoder
    layouts: tuple[str, ...] = ("loop", "remat", "scan")
    variant: bool = False


class TappedBlock(nn.Module):
    """A residual network with a tap at its end, if wanted behind attention without weights."""

    attends: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        if self.attends:
            x = x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x
        y = nn.Dense(8, name="down")(jnp.tanh(nn.Dense(12, name="query")(x)))
        return x + Tap(name="tap")(y, x), None


class Tapped(nn.Module):
    """Token ids -> logits through two blocks with taps, which compile in a fraction of the time of an ``Encoder``."""

    layout: str = "loop"
    attends: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(11, 8, name="embed")
        x = embed(ids)
        if self.layout == "scan":
            scanned = nn.scan(TappedBlock, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=2)
            return embed.attend(scanned(self.attends, name="layers")(x, None)[0])
        block = nn.remat(TappedBlock) if self.layout == "remat" else TappedBlock
        for i in range(2):
            x, _ = block(self.attends, name=f"layer_{i}")(x)
        return embed.attend(x)


class WideText(nn.Module):
    """Token ids -> ``Wide``, where every position knows the mean of all."""

    layout: str = "loop"

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(11, 256, name="embed")(ids)
        wide = Wide(self.layout)
        nn.share_scope(self, wide)
        return wide(x + jnp.mean(x, axis=1, keepdims=True))


def long_texts(layout: str) -> Any:
    """A model for counting FLOPs, with texts that are long against a prompt: ``(model, params, inputs)``."""
    ids = jnp.arange(64).reshape(1, 64) % 11
    params = jax.jit(WideText("loop").init)(jax.random.key(0), ids)["params"]
    return WideText(layout), stack_layers(params) if layout == "scan" else params, ids


LAYERS = r".*(query|key|value|out|up|down|conv|embed)"
WEIGHTS = r".*/(query|up|conv)/kernel|.*norm2?/scale|embed/embedding"

# A new method is one row here.
METHODS = [
    Row("lora", lambda t: pf.LoRA(rank=2, alpha=4, targets=t or LAYERS), zero_gradient=r".*lora_a"),
    Row(
        "lora_patterns",
        lambda t: pf.LoRA(
            rank=2,
            rank_stabilized=True,
            targets=t or LAYERS,
            rank_pattern={r".*(query|up)": 3},
            alpha_pattern={r".*(up|down)": 8.0},
        ),
        zero_gradient=r".*lora_a",
        layouts=("scan",),
        variant=True,
    ),
    Row(
        "lora_frozen_a",
        lambda t: pf.LoRA(rank=2, targets=t or LAYERS, freeze_a=True),
        zero_gradient=r".*lora_a",
        layouts=("remat",),
        variant=True,
    ),
    # A change of the weights themselves has a dense tangent: x dW is a second product in each layer.
    Row(
        "full",
        lambda t: pf.FullFineTuning(targets=f"({t})/kernel" if t else WEIGHTS),
        linear_forward=3.1,
        linear_gradient=5.1,
    ),
    # Smooth nonlinearities, because derivatives are compared with finite differences; at a layer and at a tap.
    Row(
        "bottleneck",
        lambda t: pf.Bottleneck(bottleneck=2, activation="gelu", targets=t or r".*/(query|tap)"),
        zero_gradient=r".*adapter_down(_bias)?",
        folds=False,
        model=Tapped,
        layouts=("loop",),
    ),
    Row(
        "bottleneck_parallel",
        lambda t: pf.Bottleneck(
            bottleneck=2, activation="silu", placement="parallel", norm=True, scale=4.0, targets=t or r".*/(query|tap)"
        ),
        zero_gradient=r".*adapter_(down|up)(_bias)?",
        folds=False,
        model=Tapped,
        layouts=("scan",),
        variant=True,
    ),
    # Two positions in front of each text: 66 in place of 64 where FLOPs are counted.
    Row(
        "prompt",
        lambda t: pf.PromptTuning(length=2, init="unit", ids="ids", targets=t or "embed"),
        start=10.0,
        folds=False,
        counted=long_texts,
        linear_forward=2.2 * 66 / 64,
        linear_gradient=3.3 * 66 / 64,
        model=functools.partial(Tapped, attends=True),
        layouts=("loop",),
    ),
]
LAYOUTS = ["loop", "remat", "scan"]
MODES = ["network", "layer", "weight"]


class Case(NamedTuple):
    """A method in a model: its start, a random point, a random direction, and one batch of token ids."""

    row: Row
    model: Any
    adapted: pf.Adapted
    params: Any
    start: Any
    point: Any
    direction: Any
    ids: jax.Array


def noise(tree: Any, seed: int, size: float) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [size * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@functools.cache
def build(name: str, layout: str) -> Case:
    row = next(row for row in METHODS if row.name == name)
    ids = jnp.arange(12).reshape(2, 6) % 11
    params = jax.jit(row.model("loop").init)(jax.random.key(1), ids)["params"]
    loop = pf.adapt(row.model("loop"), row.make(""))
    start = loop.init(jax.random.key(0), params, ids)
    point = jax.tree.map(jnp.add, start, noise(start, 2, 0.05))
    direction = noise(start, 3, 0.05)
    if layout == "scan":
        params, start, point, direction = (stack_layers(tree) for tree in (params, start, point, direction))
    model = row.model(layout)
    return Case(row, model, pf.adapt(model, row.make("")), params, start, point, direction, ids)


# One compiled program for each function of a case, however many tests call it.
jit = functools.cache(jax.jit)
_expansions: dict[Any, pf.Adapted] = {}


def expansion(case: Case, at: str, mode: str) -> pf.Adapted:
    """The linearization of a case at its ``start`` or its ``point``, the same object for every test."""
    name = (case.adapted, at, mode)
    if name not in _expansions:
        _expansions[name] = pf.linearize(case.adapted, getattr(case, at), mode)
    return _expansions[name]
