"""The table of generators that every guarantee is checked for, on a tiny BERT as a loop and under a scan."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pefusion_jax as pf
from pefusion_jax import generators, trees
from pefusion_jax.backbones import Bert, BertConfig

TASKS = ("rte", "mrpc", "cola")
CONFIG = BertConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8
)
IDS = jnp.arange(24).reshape(4, 6) % 11
LORA = pf.LoRA(rank=2, alpha=4, targets=r".*/(query|value)")
PARALLEL = pf.parallel(bottleneck=3)
HOULSBY = pf.houlsby(bottleneck=2, norm=True)
PROMPT = pf.PromptTuning(length=2, init="unit")
SOURCES = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float32)


class Row(NamedTuple):
    """One generator, the methods whose leaves it makes, and its departures.

    ``start``: largest change of an output that the start may make: some generators begin near the base model and not at it.
    ``zero_gradient``: regular expression of the leaves whose gradient is exactly zero at the start.
    ``per_row``: why it makes adapters for each row, so that a task has none of its own; empty if it does not.
    """

    name: str
    methods: Any
    generator: Any
    start: float = 0.0
    zero_gradient: str = r"(?!)"
    per_row: str = ""


# A new generator is one row here.
GENERATORS = [
    Row("cond_lora", LORA, generators.CondLoRA(), zero_gradient=r".*theta_a"),
    Row("per_task", LORA, generators.PerTask(tasks=TASKS, shared=r".*/value/.*"), zero_gradient=r".*lora_a"),
    Row("task_embeddings", LORA, generators.task_embeddings(TASKS), start=1e-3),
    Row(
        "pha",
        PARALLEL,
        generators.pha(TASKS, features=8, learned=r".*_bias", instances="base"),
        start=1e-3,
        zero_gradient=r"retriever/.*",
    ),
    Row("hyperformer", PARALLEL, generators.hyperformer(TASKS), start=2.0),
    Row("hyperformer_plus_plus", HOULSBY, generators.hyperformer_plus_plus(TASKS), start=2.0),
    # A prompt changes the model from the start.
    Row("mpt", PROMPT, generators.MPT(tasks=TASKS, rank=2), start=5.0),
    Row(
        "hyperdecoder",
        LORA,
        generators.hyperdecoder(features=8, hidden=64),
        start=1e-3,
        per_row="made from the row's hidden states",
    ),
    Row(
        "attempt",
        PROMPT,
        generators.Attempt(sources=("mnli", "qqp"), tasks=TASKS, width=4, temperature=2.0, prompts=SOURCES),
        start=5.0,
        per_row="mixed by attention to the row's words",
    ),
]
LAYOUTS = ["loop", "scan"]


class Case(NamedTuple):
    """A generator in a model: its start, a random point, a random direction, and what ``apply`` takes beside the tree."""

    row: Row
    inner: pf.Adapted
    made: pf.Adapted
    params: Any
    start: Any
    point: Any
    direction: Any
    inputs: dict[str, Any]


@functools.cache
def parameters(layout: str) -> Any:
    drawn = jax.jit(Bert(CONFIG).init)(jax.random.key(1), IDS)["params"]
    # Of trained size: attention of freshly drawn weights is uniform, whatever is added to its queries.
    loop = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, drawn)
    if layout == "loop":
        return loop
    layers = loop["encoder"]["layer"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[str(n)] for n in range(CONFIG.num_hidden_layers)))
    return {**loop, "encoder": {**loop["encoder"], "layer": stacked}}


@functools.cache
def build(name: str, layout: str) -> Case:
    row = next(row for row in GENERATORS if row.name == name)
    inner = pf.adapt(Bert(CONFIG, scan_layers=layout == "scan"), row.methods)
    made = pf.generate(inner, row.generator)
    params = parameters(layout)
    inputs = {"input_ids": IDS, "task": jnp.array([2, 0])} if made.tasks else {"input_ids": IDS}
    if layout == "loop":
        start = jax.jit(lambda key, params: made.init(key, params, IDS))(jax.random.key(0), params)
    else:
        start = stacked(build(name, "loop").start)
    point = jax.tree.map(jnp.add, start, _noise(start, 2, 0.1))
    return Case(row, inner, made, params, start, point, _noise(start, 3, 0.05), inputs)


def _noise(tree: Any, seed: int, size: float) -> Any:
    """The same numbers in both layouts; smaller where 64 of them make one number of an adapter."""
    key = jax.random.key(seed)

    def drawn(path: str, leaf: Any) -> Any:
        scale = size / 8 if "/heads/" in path else size
        return scale * jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape)

    return trees.map_paths(drawn, tree)


def stacked(tree: Any) -> Any:
    """Leaves that are kept as the model has them, for the scanned model; all others are the same in both."""
    layers: dict[str, list[Any]] = {}
    out: dict[str, Any] = {}
    for path, leaf in trees.flat(tree).items():
        match = re.fullmatch(r"((?:learned|own|shared)/encoder/layer)/\d+/(.*)", path)
        if match is None:
            out[path] = leaf
        else:
            layers.setdefault(f"{match[1]}/{match[2]}", []).append(leaf)
    return trees.nest(out | {path: jnp.stack(of, axis=int(path.startswith("own"))) for path, of in layers.items()})


def hidden(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, tree, inputs: apply(params, tree, **inputs).last_hidden_state


@functools.cache
def makes(made: pf.Adapted) -> Callable[..., Any]:
    return jax.jit(made.materialise)  # type: ignore[arg-type]


def materialised(case: Case) -> list[tuple[Any, slice]]:
    """Sets of adapters, and the rows of ``IDS`` that get them when ``apply`` takes the case's inputs."""
    if case.row.per_row:
        rows = makes(case.made)(case.params, case.point, case.inputs.get("task"), {"input_ids": IDS})
        return [(jax.tree.map(lambda leaf, n=n: leaf[n], rows), slice(n, n + 1)) for n in range(IDS.shape[0])]
    names = [TASKS[n] for n in case.inputs["task"]] if case.made.tasks else [None]
    size = IDS.shape[0] // len(names)
    return [
        (case.made.materialise(case.params, case.point, name), slice(n * size, (n + 1) * size))  # type: ignore[misc]
        for n, name in enumerate(names)
    ]
