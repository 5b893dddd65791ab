"""What the experiments on few examples compare: ways of tuning a text encoder on several tasks, each with its rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pefusion_jax as pf
from pefusion_jax import evaluation, generators
from pefusion_jax.methods import prompt_similarity
from pefusion_jax.tasks import train_batch


class Approach(NamedTuple):
    """One way of tuning.

    Attributes:
      build: ``(model, task names) -> `` the tunable model.
      together: one tree for all tasks, trained on mixed batches; else a tree for each.
      rates: peak learning rates to choose from.
      start: for those that begin with prompts of single tasks: ``(model, parameters, tasks, task name -> prompt tree, seed)``
        -> where training starts, task name (or ``""``, where there is one tree) -> tree.
    """

    build: Callable[[Any, tuple[str, ...]], pf.Adapted]
    together: bool
    rates: tuple[float, ...]
    start: Callable[..., dict[str, Any]] | None = None


def _parallel(model: Any) -> pf.Adapted:
    """Adapters beside the feed-forward layers, of a twelfth of the model's width: 64 for a base-sized model, as PHA's."""
    return pf.adapt(model, pf.parallel(bottleneck=model.config.hidden_size // 12, scale=1.0))


def _houlsby(model: Any) -> pf.Adapted:
    return pf.adapt(model, pf.houlsby(bottleneck=model.config.hidden_size // 32, norm=True))


def _pha(model: Any, tasks: tuple[str, ...], **options: Any) -> pf.Adapted:
    made = generators.pha(tasks, model.config.hidden_size, **{"instances": "base", **options})
    return pf.generate(_parallel(model), made)


def _prompted(model: Any) -> pf.Adapted:
    return pf.adapt(model, pf.PromptTuning(length=PROMPT))


def _attempt(model: Any, tasks: tuple[str, ...]) -> pf.Adapted:
    """Its sources are put into the tree when there are any."""
    none = jnp.zeros((len(tasks), PROMPT, model.config.hidden_size))
    return pf.generate(_prompted(model), generators.Attempt(sources=tasks, tasks=tasks, prompts=none))


def _with_sources(
    adapted: pf.Adapted, params: Any, tasks: Sequence[Any], prompts: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """ATTEMPT on all tasks at once: the sources are the prompts that each task trained alone, and so are the targets."""
    example = train_batch(tasks[0], 0, 2, 0)["inputs"]
    tree = adapted.init(jax.random.key(seed), params, **example, task=0)
    stacked = jnp.stack([jax.tree.leaves(prompts[task.name])[0] for task in tasks])
    return {"": {**tree, "sources": stacked, "target": jax.tree.map(lambda leaf: stacked, tree["target"])}}


def _most_alike(
    adapted: pf.Adapted, params: Any, tasks: Sequence[Any], prompts: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """SPoT: each task starts from the other task's prompt that is most like its own."""
    del adapted, params, seed
    start = {}
    for task in tasks:
        others = {name: tree for name, tree in prompts.items() if name != task.name}
        alike = prompt_similarity(prompts[task.name], others)
        start[task.name] = others[max(alike, key=lambda name: alike[name])]
    return start


PROMPT = 16  # positions
_ADAPTER = (1e-3, 3e-3, 1e-2)
_HYPER = (3e-4, 1e-3, 3e-3)
PROMPTS = "single-task prompts"
_PROMPT = (3e-3, 1e-2, 3e-2, 1e-1)
APPROACHES: dict[str, Approach] = {
    "single-task adapters": Approach(lambda model, tasks: _parallel(model), False, _ADAPTER),
    "single-task LoRA": Approach(
        lambda model, tasks: pf.adapt(model, pf.LoRA(rank=8, alpha=16, targets=r".*/(query|value|q|v)")), False, _ADAPTER
    ),
    PROMPTS: Approach(lambda model, tasks: _prompted(model), False, _PROMPT),
    "SPoT": Approach(lambda model, tasks: _prompted(model), False, _PROMPT, _most_alike),
    "shared adapter": Approach(lambda model, tasks: _parallel(model), True, _ADAPTER),
    "task embeddings": Approach(
        lambda model, tasks: pf.generate(_parallel(model), generators.task_embeddings(tasks)), True, _HYPER
    ),
    "HyperFormer": Approach(lambda model, tasks: pf.generate(_houlsby(model), generators.hyperformer(tasks)), True, _HYPER),
    "HyperFormer++": Approach(
        lambda model, tasks: pf.generate(_houlsby(model), generators.hyperformer_plus_plus(tasks)), True, _HYPER
    ),
    "HyperDecoder": Approach(
        lambda model, tasks: pf.generate(_parallel(model), generators.hyperdecoder(model.config.hidden_size)), True, _HYPER
    ),
    "MPT": Approach(lambda model, tasks: pf.generate(_prompted(model), generators.MPT(tasks=tasks)), True, _PROMPT),
    "ATTEMPT": Approach(_attempt, True, _PROMPT, _with_sources),
    "PHA": Approach(_pha, True, _HYPER),
    "PHA, words": Approach(lambda model, tasks: _pha(model, tasks, instances="words"), True, _HYPER),
    "PHA without its losses": Approach(lambda model, tasks: _pha(model, tasks, weight=0.0), True, _HYPER),
}


class Tuned(NamedTuple):
    """What training gave: the model and task -> tree, or the tree of all tasks under ``""``."""

    adapted: pf.Adapted
    trees: Mapping[str, Any]

    def scores(self, params: Any, tasks: Sequence[Any], split: str) -> pf.evaluation.Scores:
        """Scores of all tasks."""
        if "" in self.trees:
            return pf.evaluate(self.adapted, params, self.trees[""], tasks, split=split)
        found = [pf.evaluate(self.adapted, params, self.trees[task.name], [task], split=split) for task in tasks]
        return evaluation.Scores(
            {name: value for one in found for name, value in one.items()},
            {name: error for one in found for name, error in one.stderr.items()},
            {name: count for one in found for name, count in one.counts.items()},
        )

    @property
    def trained(self) -> int:
        """Number of trained parameters, of all tasks together."""
        sizes = [leaf.size for tree in self.trees.values() for leaf in jax.tree.leaves(self.adapted.trainable(tree))]
        return int(sum(sizes))


def tune(
    approach: Approach,
    adapted: pf.Adapted,
    params: Any,
    tasks: Sequence[Any],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    start: Mapping[str, Any] | None = None,
) -> Tuned:
    """Trains on all tasks: ``steps`` updates a task, whether each by itself or all together; ``start``: see ``Approach``."""
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "learning_rate": rate,
        "seed": seed,
        "devices": jax.devices()[:1],
        "progress": False,
    }
    start = start or {}
    if not approach.together:
        found = {
            task.name: pf.finetune(adapted, params, task, adapters=start.get(task.name), steps=steps, **common)
            for task in tasks
        }
        return Tuned(adapted, found)
    tree = pf.finetune_together(
        adapted, params, tasks, adapters=start.get(""), steps=steps * len(tasks), temperature=math.inf, groups=4, **common
    )
    return Tuned(adapted, {"": tree})
