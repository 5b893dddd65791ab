"""What making adapters costs beside training them: floating-point operations of a gradient, as XLA counts them.

    python experiments/benchmarks/generation_cost.py

For an encoder of MPNet-base's size (12 layers, width 768) and each generator: the gradient with respect to the generator's
tree, against the gradient with respect to the plain adapters of the same shapes. Nothing is run and no weights are needed.
A batch of several tasks has as many blocks of rows, and the adapters of each are made. Writes ``generation_cost.json``.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import pefusion_jax as pf
from pefusion_jax import files, generators
from pefusion_jax.backbones import MPNet, MPNetConfig

TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts the operations of a gradient with and without generators.

    Example:  python experiments/benchmarks/generation_cost.py --shapes 16,32 32,128
    """

    shapes: tuple[str, ...] = ("16,32", "32,128")
    """Rows and tokens of a batch."""
    out: Path = Path(__file__).with_suffix(".json")
    """The file to write."""


def rows(width: int) -> dict[str, tuple[Any, Any]]:
    """Name -> (methods, generator), with the sizes of their papers."""
    return {
        "CondLoRA, query and value, r = 8": (
            pf.LoRA(rank=8, alpha=8, targets=r".*/(query|value|q|v)"),
            generators.CondLoRA(),
        ),
        "PHA, 8 tasks": (pf.parallel(bottleneck=64, scale=1.0), generators.pha(TASKS, width, weight=0.0)),
        "HyperFormer++, 8 tasks": (pf.houlsby(bottleneck=24, norm=True), generators.hyperformer_plus_plus(TASKS)),
        "own adapters, 8 tasks": (pf.parallel(bottleneck=64, scale=1.0), generators.PerTask(tasks=TASKS)),
    }


def operations(model: Any, batch: int, length: int, blocks: int) -> dict[str, dict[str, float]]:
    """Generator -> operations of a gradient of the plain adapters, of the generator's tree, and their ratio."""
    ids = jnp.zeros((batch, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    found = {}
    for name, (methods, generator) in rows(model.config.hidden_size).items():
        plain = pf.adapt(model, methods)
        made = pf.generate(plain, generator)
        given = {"task": jnp.arange(blocks) % len(made.tasks) if blocks > 1 else jnp.int32(0)} if made.tasks else {}
        before, after = _flops(plain, params, ids, {}), _flops(made, params, ids, given)
        found[name] = {"plain": before, "generated": after, "ratio": after / before}
    return found


def _flops(adapted: pf.Adapted, params: Any, ids: jax.Array, given: dict[str, Any]) -> float:
    tree = jax.eval_shape(adapted.init, jax.random.key(0), params, ids)

    def total(tree: Any, params: Any, ids: jax.Array) -> jax.Array:
        return jnp.sum(adapted.apply(params, tree, ids, **given).last_hidden_state)

    return float(jax.jit(jax.grad(total)).lower(tree, params, ids).cost_analysis()["flops"])


def main(options: Options) -> None:
    model = MPNet(MPNetConfig(vocab_size=30527))
    table = {}
    for shape in options.shapes:
        batch, length = (int(part) for part in shape.split(","))
        for blocks in (1, 8):
            key = f"{batch} x {length} tokens, {'one task' if blocks == 1 else f'{blocks} blocks of rows'}"
            table[key] = operations(model, batch, length, blocks)
            for name, row in table[key].items():
                print(f"{key}: {name}: {row['ratio'] - 1:+.2%} of a gradient of {row['plain']:.3g} operations", flush=True)
    files.write_json(options.out, {"encoder": "MPNet-base", "python": sys.version.split()[0], "jax": jax.__version__, **table})


if __name__ == "__main__":
    main(tyro.cli(Options))
