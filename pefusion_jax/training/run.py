"""The loop that every training runs in, with its files and signals; what is trained on comes as a :class:`Plan`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefusion_jax import trees
from pefusion_jax.interop.pretrained import fingerprint
from pefusion_jax.tasks import Batch, Head, eval_batches
from pefusion_jax.tasks.task import inputs_for
from pefusion_jax.training import checkpoint, parallel
from pefusion_jax.training.logging import MetricsFile, Monitor
from pefusion_jax.training.preemption import Preempted, agreed, sigterm
from pefusion_jax.training.step import NonFiniteError, Schedule, default_optimizer, init_state, rate_of, with_rate


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """The arguments that all kinds of training share; see :func:`~pefusion_jax.training.finetune`.

    Raises:
      ValueError: for settings that cannot work.
    """

    adapters: Any
    steps: int
    batch_size: int
    learning_rate: float
    schedule: str | Schedule
    warmup: float
    weight_decay: float
    clip: float | None
    accumulate: int
    optimizer: optax.GradientTransformation | None
    stochastic: bool
    seed: int
    mapping: str
    devices: Sequence[jax.Device] | None
    checkpoint_dir: str | os.PathLike[str] | None
    checkpoint_every: int
    keep: int
    resume: bool
    log_file: str | os.PathLike[str] | None
    log_every: int
    progress: bool | None
    validate_every: int
    patience: int
    penalty: tuple[Callable[..., jax.Array], Any] | None

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("validate_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (never) or more")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number, 0 or more")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be above 0: the largest norm of the gradient, or None for no limit")
        if self.patience and not self.validate_every:
            raise ValueError(f"patience={self.patience} counts validations, but there are none; pass validate_every= too")
        parallel.held_devices(self.mapping, self.everywhere)
        parallel.check_batch_size(self.batch_size, len(self.everywhere), self.accumulate)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """The settings among a function's arguments, by their names."""
        return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})

    @functools.cached_property
    def everywhere(self) -> tuple[jax.Device, ...]:
        """The devices of all processes."""
        return tuple(jax.devices() if self.devices is None else self.devices)

    @property
    def parts(self) -> int:
        """Number of parts in which a batch is worked on: devices times micro-batches."""
        return len(self.everywhere) * self.accumulate


class Plan(NamedTuple):
    """What is trained on.

    Attributes:
      label: name of the run in messages.
      batch: ``(step) -> batch``, a pure function.
      init_inputs: ``() -> inputs`` for the model's ``init``.
      head: whose functions are used, and whose parameters go into the step.
      loss: see :func:`~pefusion_jax.training.losses.weighted_losses`.
      score: ``(params, adapters, devices) -> {name: number}`` on the validation split; ``validation`` decides.
      belongs: ``() -> `` what of it a state belongs to.
      config: settings beside those that all kinds of training share, of which the same is true.
      tasks: names of several tasks, whose losses go into the log one by one.
    """

    label: str
    batch: Callable[[int], Batch]
    init_inputs: Callable[[], Mapping[str, Any]]
    head: Head
    loss: Any
    score: Callable[[Any, Any, Sequence[jax.Device]], dict[str, float]]
    belongs: Callable[[], dict[str, Any]]
    config: dict[str, Any]
    tasks: tuple[str, ...] = ()


def run(adapted: Any, params: Any, settings: Settings, plan: Plan) -> dict[str, Any]:
    """Trains; see :func:`~pefusion_jax.training.finetune` for what it promises."""
    of, adapters, everywhere = settings, settings.adapters, settings.everywhere
    here = parallel.held_devices(of.mapping, everywhere)
    optimizer = of.optimizer
    rate: Callable[[Any], Any] | None = None
    if optimizer is None:
        optimizer, rate = default_optimizer(of.schedule, float(of.weight_decay)), rate_of(of.schedule)
    advance = parallel.compiled_step(
        adapted,
        optimizer,
        plan.head.features,
        plan.head.logits,
        plan.loss,
        of.accumulate,
        None if of.clip is None else float(of.clip),
        of.stochastic,
        rate,
        of.mapping,
        everywhere,
        None if of.penalty is None else of.penalty[0],
    )
    first_inputs = functools.cache(plan.init_inputs)
    if adapters is None:
        adapters = adapted.init(jax.random.key(of.seed), params, **first_inputs())
    trained, held = trees.split(adapters, adapted.trainable(adapters))
    state = init_state(trained, optimizer, of.seed)
    if of.optimizer is None and not callable(of.schedule):
        state = with_rate(state, float(of.learning_rate), float(of.warmup), of.steps)
    # The best score, its adapters, and with patience the number of validations since.
    best: Any = (np.asarray(-np.inf), parallel.unreplicate(state.adapters)) if of.validate_every else ()
    best += (np.asarray(0),) if of.patience else ()

    start = 0
    belongs: dict[str, Any] = {}
    if of.checkpoint_dir is not None:
        config = {
            "batch_size": of.batch_size,
            "clip": None if of.clip is None else float(of.clip),
            "accumulate": of.accumulate,
            "stochastic": of.stochastic,
            "validate_every": of.validate_every,
            **({"patience": of.patience} if of.patience else {}),
            # A validation at the end of a run that a longer run would not have: such a run may not be lengthened.
            **({"ends between validations": of.steps} if of.validate_every and of.steps % of.validate_every else {}),
            **({} if of.penalty is None else {"penalty": fingerprint(trees.paths(of.penalty[1]))}),
            **plan.config,
            **_optimizer_config(
                of.optimizer, state.opt_state, of.schedule, of.learning_rate, of.warmup, of.weight_decay, of.steps
            ),
        }
        belongs = _belongs(adapted, params, adapters, trained, plan, first_inputs(), of.seed, config)
        if of.resume:
            found = checkpoint.restore_latest(of.checkpoint_dir, (parallel.unreplicate(state), best), belongs)
            if found is not None:
                start, (state, best) = found
        else:
            checkpoint.clear(of.checkpoint_dir)
    if start > of.steps:
        raise ValueError(
            f"{of.checkpoint_dir} holds a state of step {start}, beyond steps={of.steps}; raise steps or remove it"
        )

    # The state is given to each step in turn, so it must not share memory with the caller's adapters.
    state = parallel.replicate(state, here, copy=True)
    params, held_there, head_params = parallel.replicate((params, held, plan.head.params), here)
    # The step takes what belongs to the loss as one argument.
    of_loss = head_params if of.penalty is None else (head_params, parallel.replicate(of.penalty[1], here))

    primary = jax.process_index() == 0
    log = MetricsFile(of.log_file, after=start) if of.log_file is not None and primary else None
    shown = of.progress if primary else False
    monitor = Monitor(of.steps, start, of.log_every, log, shown, trained, plan.label, plan.tasks)
    try:
        with sigterm(enabled=of.checkpoint_dir is not None) as asked:
            for step in range(start, of.steps):
                if _hopeless(of.patience, best):
                    break  # also a run that had ended here, and is called again
                batch = plan.batch(step)
                placed = parallel.place_batch(batch, of.mapping, everywhere)
                state, metrics = advance(state, params, held_there, of_loss, placed)
                done = step + 1
                monitor.push(done, {**metrics, "task_rows": _rows_of_tasks(batch, plan.tasks)} if plan.tasks else metrics)
                if of.validate_every and (done % of.validate_every == 0 or done == of.steps):
                    monitor.flush()
                    scores = plan.score(params, trees.merge(state.adapters, held_there), here)
                    monitor.note({"step": done, **scores})
                    if scores["validation"] > float(best[0]):
                        best = (np.asarray(scores["validation"]), parallel.unreplicate(state.adapters))
                        best += (np.asarray(0),) if of.patience else ()
                    elif of.patience:
                        best = (*best[:2], best[2] + 1)
                if of.checkpoint_dir is None:
                    continue
                stop = agreed(asked)
                last = done == of.steps or _hopeless(of.patience, best)
                if stop or last or done % of.checkpoint_every == 0:
                    monitor.flush()  # a state is saved only after every step in it is known to be finite
                    checkpoint.save(of.checkpoint_dir, done, (parallel.unreplicate(state), best), belongs, keep=of.keep)
                if stop:
                    raise Preempted(
                        f"{plan.label} was asked to end after step {done} of {of.steps}; its state is saved in "
                        f"{Path(of.checkpoint_dir)}. The same call goes on from there"
                    )
            monitor.flush()
    finally:
        monitor.close()
    final = best[1] if of.validate_every else parallel.unreplicate(state.adapters)
    # Uncommitted, on the default device: what the caller computes with them decides where that happens.
    return trees.merge(jax.tree.map(jnp.asarray, final), held)


def describe_task(task: Any, validates: bool) -> dict[str, Any]:
    """What of a task a state belongs to, with its validation split if that decides what is kept."""
    return {
        "name": task.name,
        "classes": len(task.classes),
        **_describe_split(task, "train", "training"),
        **(_describe_split(task, "validation", "validation") if validates else {}),
        "head": fingerprint(trees.paths(task.head.params)),
        **{name: written(getattr(task.head, name)) for name in ("features", "logits")},
        **{name: written(getattr(task, name, None)) for name in ("loss", "metric")},
    }


def _describe_split(task: Any, split: str, called: str) -> dict[str, Any]:
    """Size, labels and a few of the inputs, as reading all would take long; a task of one's own may have no ``arrays``."""
    size = len(getattr(task, split))
    found: dict[str, Any] = {f"{called} examples": size}
    if hasattr(task, "arrays"):
        few = np.unique(np.linspace(0, size - 1, min(size, 8)).astype(np.int64))
        inputs = task.rows(split, few, np.ones(len(few), np.float32))["inputs"]
        found |= {f"{called} labels": fingerprint({"": task.arrays(split)[1]})}
        found |= {f"{called} inputs": fingerprint(trees.paths(inputs))}
    return found


def written(value: Any) -> str:
    """An object in words that are the same in every process, without its address; of very long ones a digest."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= 4000 else f"{text[:200]}... {hashlib.sha256(text.encode()).hexdigest()}"


def _hopeless(patience: int, best: Any) -> bool:
    """Whether the last ``patience`` validations brought no better score."""
    return bool(patience) and int(best[2]) >= patience


def _rows_of_tasks(batch: Batch, tasks: Sequence[str]) -> np.ndarray:
    """Sums of the weights of each task's rows, ``[task]``: the host knows them, so they need not come from the devices."""
    task = batch["inputs"]["task"]
    return np.bincount(task, batch["weights"].reshape(len(task), -1).sum(axis=1), minlength=len(tasks))


def _optimizer_config(
    optimizer: Any,
    opt_state: Any,
    schedule: str | Schedule,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    steps: int,
) -> dict[str, Any]:
    """What of the optimizer has to stay the same over a resumed run; functions can only be told from names."""
    if optimizer is not None:
        return {"optimizer": "given by the caller", "optimizer state": checkpoint.structure(opt_state)}
    if callable(schedule):
        return {"optimizer": "adamw", "schedule": "given by the caller", "weight_decay": weight_decay}
    config = {"optimizer": "adamw", "schedule": schedule, "learning_rate": float(learning_rate), "weight_decay": weight_decay}
    if schedule == "constant" and round(warmup * steps) == 0:
        return config  # the number of steps changes nothing: such a run may be lengthened
    return {**config, "warmup": warmup, "steps": steps}


def _belongs(
    adapted: Any, params: Any, adapters: Any, trained: Any, plan: Plan, inputs: Any, seed: int, config: dict[str, Any]
) -> dict[str, Any]:
    """What a state belongs to: everything that decides the bits of the run, as far as it can be written down."""
    from importlib import metadata

    return {
        "base weights": fingerprint(params),
        "adapters": checkpoint.structure(adapters),
        "trained": sorted(trees.paths(trained)),
        "initial adapters": fingerprint(adapters),
        **_made_of(adapted),
        **plan.belongs(),
        "first inputs": fingerprint(trees.paths(inputs)),
        "seed": seed,
        "config": config,
        "versions": {"python": sys.version.split()[0], **{p: metadata.version(p) for p in ("jax", "flax", "optax")}},
    }


def _made_of(adapted: Any) -> dict[str, Any]:
    """What the trained tree stands for: model, methods, expansion and its point; of a generated one generator and tasks."""
    found: dict[str, Any] = {"numbers of tasks": list(adapted.tasks)} if getattr(adapted, "tasks", ()) else {}
    origin = getattr(adapted, "origin", None)  # a model of one's own may lack it
    if origin is not None:
        found |= {"model": written(origin.model), "methods": [written(method) for method in origin.methods]}
        found |= {} if origin.generator is None else {"generator": written(origin.generator)}
        if origin.mode is not None:
            found |= {"mode": origin.mode, "point of expansion": fingerprint(trees.paths(origin.adapters0))}
    return found


@functools.lru_cache(maxsize=64)
def _logits(adapted: Any, features: Callable[..., Any], logits: Callable[..., Any]) -> Callable[..., Any]:
    @jax.jit
    def forward(params: Any, adapters: Any, head_params: Any, inputs: Any) -> jax.Array:
        return logits(head_params, features(adapted.apply(params, adapters, **inputs), inputs))

    return forward


def score(adapted: Any, params: Any, adapters: Any, task: Any, batch_size: int, devices: Sequence[jax.Device]) -> float:
    """The task's metric on its validation split; larger is better."""
    head_params = parallel.replicate(task.head.params, devices)
    forward = _logits(adapted, task.head.features, task.head.logits)
    predict = getattr(task, "predict", None)  # a task of one's own may lack it
    logits, labels = [], []
    for batch in eval_batches(task, "validation", batch_size):
        real = batch["weights"] > 0
        # The task's number is added last: it is one for all rows, and not split.
        inputs = inputs_for(adapted, task, parallel.split_rows(batch["inputs"], devices))
        if predict is None:
            found = forward(params, adapters, head_params, inputs)
        else:
            found = predict("adapters", adapted, params, adapters, inputs)
        logits.append(np.asarray(found)[real])
        labels.append(batch["labels"][real])
    value = float(task.metric(np.concatenate(logits), np.concatenate(labels)))
    if not math.isfinite(value):
        raise NonFiniteError(
            f"task {task.name!r}: the validation score is {value}; its metric may not be defined on this split"
        )
    return value
