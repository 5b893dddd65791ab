"""The kinds of tuning that the suites compare, and the training of their single-task and multi-task models.

A trained model is a run (``pf.load_run``) in ``WORK/KIND/SEED/TASK``; what is there is not trained again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import pefusion_jax as pf
from experiments.rates import best_rate
from pefusion_jax.penalty import interference_penalty
from pefusion_jax.runs import FILE, save_run
from pefusion_jax.training.checkpoint import load_adapters

ENCODER = r".*(layer|layers)/.*(kernel|bias|scale)"


class Kind(NamedTuple):
    """One way of tuning.

    Attributes:
      title: for tables.
      mode: of ``linearize``, or ``None``.
      full: train the encoder's own weights in place of LoRA.
      rates: peak learning rates to choose from.
      control: compared with a few fusion methods only.
      apart: weight of the penalty on interference with the other tasks, which needs their stored moments and no data.
    """

    title: str
    mode: str | None
    full: bool
    rates: tuple[float, ...]
    control: bool = False
    apart: float = 0.0


# A layer-linearized LoRA at B = 0 is LoRA with its random A frozen, function for function, so one row stands for both.
KINDS = {
    "lora": Kind("LoRA", None, False, (1e-3, 3e-3, 1e-2)),
    "frozen_a": Kind("LoRA, A frozen (= L-LoRA layer)", "layer", False, (1e-3, 3e-3, 1e-2, 3e-2), True),
    "network": Kind("L-LoRA network", "network", False, (1e-3, 3e-3, 1e-2, 3e-2)),
    "lora_apart": Kind("LoRA + interference penalty", None, False, (1e-3, 3e-3, 1e-2), True, 1.0),
    "network_apart": Kind("L-LoRA network + interference penalty", "network", False, (1e-3, 3e-3, 1e-2, 3e-2), True, 1.0),
    "full": Kind("full fine-tuning", None, True, (5e-5, 2e-4, 8e-4), True),
}


class Base(NamedTuple):
    """A pretrained model and how its suite is trained.

    ``example`` are inputs of one batch; ``others`` gives the base model's statistics on all tasks but the named one.
    """

    name: str
    model: Any
    params: Any
    rank: int
    alpha: float
    targets: str
    steps: int
    batch_size: int
    example: Mapping[str, Any]
    others: Callable[[str], Mapping[str, Any]]


class Tuned(NamedTuple):
    """All models of one kind and one seed.

    Attributes:
      adapted: the tunable model.
      trees: task -> its adapters.
      start: the adapters that all started from.
      method: the adapter method.
    """

    kind: Kind
    adapted: pf.Adapted
    trees: dict[str, Any]
    start: Any
    method: Any

    def changes(self, params: Any) -> dict[str, pf.Delta]:
        """Task -> weight-space change."""
        return {name: self.adapted.deltas(params, tree) for name, tree in self.trees.items()}


@functools.lru_cache(maxsize=64)
def _plain(base_model: Any, method_key: tuple[Any, ...]) -> tuple[Any, pf.Adapted]:
    full, rank, alpha, targets = method_key
    method: Any = pf.FullFineTuning(targets=ENCODER) if full else pf.LoRA(rank=rank, alpha=alpha, targets=targets)
    return method, pf.adapt(base_model, method)


_LINEAR: dict[tuple[str, int], tuple[Any, pf.Adapted, Any]] = {}


def adapted_for(base: Base, kind_name: str, seed: int) -> tuple[Any, pf.Adapted, Any]:
    """Method, tunable model and common start of a kind and a seed; plain kinds share one model, and its programs."""
    kind = KINDS[kind_name]
    method, plain = _plain(base.model, (kind.full, base.rank, base.alpha, base.targets))
    if (kind_name, seed) not in _LINEAR:
        start = plain.init(jax.random.key(seed), base.params, **base.example)
        adapted = plain if kind.mode is None else pf.linearize(plain, start, kind.mode)
        _LINEAR[kind_name, seed] = (method, adapted, start)
    return _LINEAR[kind_name, seed]


def train(
    base: Base,
    kind_name: str,
    task: Any,
    seed: int,
    rate: float,
    folder: Path,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Any:
    """The adapters of one task: trained, or read if the run is there."""
    method, adapted, start = adapted_for(base, kind_name, seed)
    mode = KINDS[kind_name].mode
    if (folder / FILE).is_file():
        return _read(folder, base, base.steps, rate)
    if KINDS[kind_name].apart:
        options["penalty"] = interference_penalty(base.others(task.name), weight=KINDS[kind_name].apart)
    how = _how(base, adapted, start, mode, rate, seed)
    tree = pf.finetune(adapted, base.params, task, steps=base.steps, **how, **options)
    _save(folder, tree, base, method, mode, start, task=task.name, learning_rate=rate, steps=base.steps)
    say(f"trained {kind_name} on {task.name}, seed {seed}")
    return tree


def _how(base: Base, adapted: pf.Adapted, start: Any, mode: str | None, rate: float, seed: int) -> dict[str, Any]:
    """What all training of one kind has in common."""
    return {
        "adapters": start if mode is None else adapted.init(None, base.params),
        "batch_size": base.batch_size,
        "learning_rate": rate,
        "seed": seed,
        "devices": jax.devices()[:1],
        "progress": False,
    }


def train_together(base: Base, kind_name: str, tasks: Sequence[Any], seed: int, rate: float, folder: Path) -> Any:
    """One adapter for all tasks, the upper line: as many examples as all single models saw, the tasks mixed in each batch."""
    method, adapted, start = adapted_for(base, kind_name, seed)
    mode = KINDS[kind_name].mode
    steps = base.steps * len(tasks)
    if (folder / FILE).is_file():
        return _read(folder, base, steps, rate)
    how = _how(base, adapted, start, mode, rate, seed)
    tree = pf.finetune_together(adapted, base.params, tasks, steps=steps, temperature=math.inf, **how)
    _save(folder, tree, base, method, mode, start, task="all", learning_rate=rate, steps=steps)
    return tree


def choose_rate(base: Base, kind_name: str, task: Any, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The learning rate with the best validation score on one task, seed 0, and all scores; see ``best_rate``."""

    def score(rate: float) -> float:
        tree = train(base, kind_name, task, 0, rate, folder / task.name / f"{rate:g}", say)
        adapted = adapted_for(base, kind_name, 0)[1]
        return pf.evaluate(adapted, base.params, tree, [task], split="validation")[task.name]

    return best_rate(score, KINDS[kind_name].rates, lambda text: say(f"{kind_name}, {text}"))


def _read(folder: Path, base: Base, steps: int, rate: float) -> Any:
    stored, spec = load_adapters(folder / FILE)
    asked = {"model": base.name, "steps": steps, "learning_rate": rate, "batch_size": base.batch_size, "targets": base.targets}
    found = {name: spec.get(name) for name in asked} | {"targets": spec["methods"][0]["targets"]}
    if spec["methods"][0]["type"] == "LoRA":
        asked |= {"rank": base.rank, "alpha": base.alpha}
        found |= {name: spec["methods"][0][name] for name in ("rank", "alpha")}
    else:
        asked["targets"] = ENCODER
    if found != asked:
        raise ValueError(f"{folder} was trained with {found}, but asked for is {asked}; name another --work folder")
    return stored["tree"]


def _save(folder: Path, tree: Any, base: Base, method: Any, mode: str | None, start: Any, **notes: Any) -> None:
    notes["batch_size"] = base.batch_size
    save_run(folder, tree, model=base.name, params=base.params, methods=method, mode=mode, adapters0=start, **notes)
