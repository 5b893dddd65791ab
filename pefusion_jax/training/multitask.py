"""``finetune_together``: training on several tasks at once. The loop is in ``run.py``, the numbers are in ``step.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from pefusion_jax.tasks import Batch, Head, eval_batches
from pefusion_jax.tasks.mixed import listed_tasks, mixed_batch, require_alike
from pefusion_jax.tasks.task import task_number
from pefusion_jax.training.losses import smooths, stacked_heads
from pefusion_jax.training.run import Plan, Settings, describe_task, run, score
from pefusion_jax.training.step import Schedule


def finetune_together(
    adapted: Any,
    params: Any,
    tasks: Iterable[Any] | Mapping[str, Any],
    *,
    adapters: Any = None,
    steps: int = 200,
    batch_size: int = 16,
    groups: int | None = None,
    temperature: float = 1.0,
    learning_rate: float = 1e-3,
    schedule: str | Schedule = "cosine",
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    stochastic: bool = True,
    seed: int = 0,
    mapping: str = "pmap",
    devices: Sequence[jax.Device] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    keep: int = 2,
    resume: bool = True,
    log_file: str | os.PathLike[str] | None = None,
    log_every: int = 10,
    progress: bool | None = None,
    validate_every: int = 0,
    patience: int = 0,
    label_smoothing: float = 0.0,
    penalty: tuple[Callable[..., jax.Array], Any] | None = None,
) -> dict[str, Any]:
    r"""Trains one tree of adapters on several tasks at once: of a plain model, which they share, or of a generated one.

    .. math:: L = \frac{1}{B} \sum_{g} \sum_{i \in g} \ell_{t_g}(h_{t_g}(f(x_i)), y_i)

    A batch has ``groups`` blocks of rows, each of one task :math:`t_g` with its own frozen head and loss: see
    :func:`~pefusion_jax.tasks.mixed_batch` for their shares. A model with ``tasks`` gets the number of each block's task in
    ``task``; one without is called as ever. One compiled program serves all batches of a length. All else is as
    :func:`finetune` has it: one seed gives one result, bit for bit, also for a run that was killed and goes on.

    Args:
      adapted: what ``pf.adapt``, ``pf.generate`` or ``pf.linearize`` returned. Its ``auxiliary`` loss, if it has one, is
        computed by each device and micro-batch on its own blocks, and the mean is added to :math:`L`.
      params: base parameters.
      tasks: the tasks, or a mapping whose values they are. Their heads have the same ``features``; heads that are also
        alike in their logits function and shapes (made with one ``pad_to``) are computed at once, others one kind after
        another. A model with ``tasks`` has to know the tasks' names; it may know others.
      adapters: see :func:`finetune`, also for the arguments that are not named here.
      steps: number of updates in all.
      batch_size: number of examples of an update over all tasks, devices and micro-batches.
      groups: number of blocks of a batch: a divisor of ``batch_size`` and a multiple of devices times ``accumulate``. By
        default the largest such number up to 8; where there is none that small, the smallest. For a model with an ``auxiliary``
        loss only numbers count that give each device and micro-batch two blocks or more, if there are any.
      temperature: shares are proportional to (number of examples)^(1 / temperature); infinity gives all tasks the same.
      log_file: as for :func:`finetune`, and ``loss/NAME``, the mean over the task's rows since the line before (without the
        auxiliary loss and the penalty), and ``validation/NAME``.
      validate_every: number of steps between two evaluations of all tasks on their validation splits; the mean of their scores
        decides.
      label_smoothing: as for :func:`finetune`; regressions go without.

    Returns:
      The full adapter tree.

    Raises:
      ValueError: as :func:`finetune`, and for tasks that cannot be in one batch.
      NonFiniteError: if a loss, a gradient or an update is not finite.
      Preempted: after SIGTERM, if there is a ``checkpoint_dir``.

    Example::

      shared = finetune_together(lora, params, tasks, steps=2000, batch_size=32, temperature=2.0)

    Reference: R. Karimi Mahabadi et al., Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks,
    2021, for the temperature. They draw the task of each batch; here a batch holds several, by a schedule.
    """
    settings = Settings.of(locals())  # first of all: these are the arguments
    of = listed_tasks(tasks)
    names = tuple(task.name for task in of)
    numbers = [task_number(adapted, task) for task in of]
    for task in of if validate_every else ():
        next(eval_batches(task, "validation", 1))  # now: a split that is missing, or whose labels are hidden
    if label_smoothing and not any(map(smooths, of)):
        raise ValueError(f"label_smoothing={label_smoothing} is for classes, but all tasks are regressions; pass 0")
    table, stacks = stacked_heads(of, label_smoothing)
    require_alike(of)
    contrasts = getattr(adapted, "auxiliary", None) is not None
    if contrasts and len(of) < 2:
        raise ValueError(
            f"the contrastive losses need instances of two or more tasks in a batch, and there is {names[0]!r} alone: train on "
            "more tasks, or without the losses: dataclasses.replace(generator, weight=0.0)"
        )
    heads = {"stacks": stacks, "numbers": np.asarray([n or 0 for n in numbers], np.int32)}
    groups = _groups(groups, settings, contrasts)
    # The blocks that a loss may contrast are those of one part; else batches do not depend on the number of devices.
    parts = settings.parts if contrasts else 1

    def batch(step: int) -> Batch:
        return mixed_batch(of, step, batch_size, seed, groups=groups, temperature=temperature, parts=parts)

    def init_inputs() -> dict[str, Any]:
        return {name: value for name, value in batch(0)["inputs"].items() if name != "task"}

    def scores(params: Any, tree: Any, here: Sequence[jax.Device]) -> dict[str, float]:
        found = {task.name: score(adapted, params, tree, task, batch_size, here) for task in of}
        return {"validation": float(np.mean(list(found.values()))), **{f"validation/{n}": s for n, s in found.items()}}

    plan = Plan(
        label=f"the run over {len(of)} tasks",
        batch=batch,
        init_inputs=init_inputs,
        head=Head(heads, of[0].head.features, of[0].head.logits),
        loss=table,
        score=scores,
        belongs=lambda: {
            "tasks": list(names),
            **{f"task {task.name!r}": describe_task(task, bool(validate_every)) for task in of},
        },
        config={
            "groups": groups,
            "temperature": str(float(temperature)),  # infinity is no JSON
            **({"parts": parts} if contrasts else {}),
            **({"label_smoothing": float(label_smoothing)} if label_smoothing else {}),
        },
        tasks=names,
    )
    return run(adapted, params, settings, plan)


def _groups(groups: int | None, settings: Settings, contrasts: bool) -> int:
    unit, size = settings.parts, settings.batch_size
    able = [number for number in range(unit, size + 1, unit) if size % number == 0]  # unit divides the size
    if groups is None:
        enough = [number for number in able if number >= 2 * unit] if contrasts else able
        enough = enough or able
        return max((number for number in enough if number <= 8), default=enough[0])
    if groups not in able:
        raise ValueError(
            f"groups={groups} blocks do not split evenly over {len(settings.everywhere)} devices x "
            f"accumulate={settings.accumulate} and batch_size={size}; numbers that do: {', '.join(map(str, able))}"
        )
    return groups
