"""``finetune``: the training loop of one task, with its files and signals; the numbers are in ``step.py``."""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefusion_jax import trees
from pefusion_jax.interop.pretrained import fingerprint
from pefusion_jax.tasks import eval_batches, train_batch
from pefusion_jax.training import checkpoint, parallel
from pefusion_jax.training.logging import MetricsFile, Monitor
from pefusion_jax.training.step import NonFiniteError, Schedule, default_optimizer, init_state, learning_rate_schedule


class Preempted(Exception):
    """The run was asked to end (SIGTERM) and has saved its state; the same call goes on from there.

    A program that does not catch it ends with a traceback and exit code 1; to report the signal, catch it and
    ``sys.exit(143)``.
    """


def finetune(
    adapted: Any,
    params: Any,
    task: Any,
    *,
    adapters: Any = None,
    steps: int = 200,
    batch_size: int = 16,
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
    penalty: tuple[Callable[..., jax.Array], Any] | None = None,
) -> dict[str, Any]:
    r"""Trains the adapters of one task; the base parameters are read only.

    .. math:: \phi \leftarrow \phi - \eta_k\, \mathrm{AdamW}(\mathrm{clip}(\nabla_\phi L)), \qquad
              L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}

    One seed gives one result, bit for bit, on the same devices and versions: batches, random masks and initial adapters are
    functions of the seed and the step. Equal settings and shapes reuse the compiled program, also for other tasks. Give an
    optimizer or a schedule of your own as one object, not a new one for each call, to keep this.

    Args:
      adapted: what ``pf.adapt``, ``pf.generate`` or ``pf.linearize`` returned.
      params: base parameters, in any floating dtype. If they are already replicated (``parallel.replicate``) they stay put.
      task: a task of ``pefusion_jax.tasks``: examples, encoding, frozen head, loss and metric.
      adapters: tree to start from, left as it is; ``None`` makes one with ``adapted.init`` and the seed.
      steps: number of updates in all, also for a resumed run.
      batch_size: number of examples of an update over all devices, micro-batches and processes.
      learning_rate: largest learning rate. Not used with a schedule or an optimizer of your own.
      schedule: ``"cosine"``, ``"constant"``, or a function of the step such as optax's.
      warmup: share of the steps in which the rate rises linearly.
      weight_decay: decoupled weight decay of the trained leaves.
      clip: largest norm of the gradient, ``None`` for no limit.
      accumulate: number of micro-batches in which a device works through its rows.
      optimizer: any optax transformation in place of AdamW.
      stochastic: whether the model gets a ``dropout`` key; without one, nothing in it is random.
      seed: seed of the batches, the random masks and, without ``adapters``, the initial adapters.
      mapping: ``"pmap"`` or ``"shard_map"``; the numbers are the same.
      devices: devices of all processes; all there are by default.
      checkpoint_dir: folder for the training state. A run that is killed goes on from its last state when called again, and
        ends with the bits of an uninterrupted one. On SIGTERM the state is saved and :class:`Preempted` raised.
      checkpoint_every: number of steps between two states.
      keep: number of states kept.
      resume: whether to go on from ``checkpoint_dir``; ``False`` removes the states there first.
      log_file: JSON-lines file with ``step``, ``loss``, ``grad_norm``, ``learning_rate``, ``examples_per_second``.
      log_every: number of steps between two of its lines.
      progress: whether to show a bar; by default where standard error is a terminal.
      validate_every: number of steps between two evaluations on the validation split; the adapters with the best score are
        returned, the earliest of equals. 0: no evaluation, the last adapters are returned.
      penalty: ``(function, arrays)`` with ``function(arrays, adapted, params, adapters) -> []``, which is added to the loss, as
        :func:`~pefusion_jax.penalty.interference` makes it. Equal functions share compiled programs, so let it live at
        module level and put what differs between tasks into the arrays.

    Returns:
      The full adapter tree: trained leaves in float32, merged with those that were held still.

    Raises:
      ValueError: for settings that cannot work, or a checkpoint of another run.
      NonFiniteError: if a loss, a gradient or an update is not finite; it names the step and the first bad path.
      Preempted: after SIGTERM, if there is a ``checkpoint_dir``.

    Example::

      taus = {task.name: finetune(llora, params, task, steps=500, checkpoint_dir=f"runs/{task.name}") for task in tasks}

    Reference: I. Loshchilov and F. Hutter, Decoupled Weight Decay Regularization, 2019. The schedule differs from theirs: it
    decays once, and its first step already learns.
    """
    positive = {"steps": steps, "checkpoint_every": checkpoint_every, "keep": keep, "log_every": log_every}
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if validate_every < 0:
        raise ValueError(f"validate_every={validate_every} must be 0 (never) or more")
    everywhere = tuple(jax.devices() if devices is None else devices)
    here = parallel.held_devices(mapping, everywhere)
    parallel.check_batch_size(batch_size, len(everywhere), accumulate)

    own_optimizer = optimizer
    rate: Schedule | None = None
    if optimizer is None:
        if callable(schedule):
            rate = schedule
        else:
            rate = learning_rate_schedule(float(learning_rate), schedule, float(warmup), steps)
        optimizer = default_optimizer(rate, float(weight_decay))
    head = task.head
    run = parallel.compiled_step(
        adapted,
        optimizer,
        head.features,
        head.logits,
        task.loss,
        accumulate,
        None if clip is None else float(clip),
        stochastic,
        rate,
        mapping,
        everywhere,
        None if penalty is None else penalty[0],
    )
    if adapters is None:
        first = train_batch(task, 0, batch_size, seed)
        adapters = adapted.init(jax.random.key(seed), params, **first["inputs"])
    trained, held = trees.split(adapters, adapted.trainable(adapters))
    state = init_state(trained, optimizer, seed)
    best: Any = (np.asarray(-np.inf), parallel.unreplicate(state.adapters)) if validate_every else ()

    start = 0
    belongs: dict[str, Any] = {}
    if checkpoint_dir is not None:
        belongs = _belongs(
            params,
            adapters,
            trained,
            task,
            seed,
            {
                "batch_size": batch_size,
                "clip": None if clip is None else float(clip),
                "accumulate": accumulate,
                "stochastic": stochastic,
                "validate_every": validate_every,
                **({} if penalty is None else {"penalty": fingerprint(trees.paths(penalty[1]))}),
                **_optimizer_config(own_optimizer, state.opt_state, schedule, learning_rate, warmup, weight_decay, steps),
            },
        )
        if resume:
            found = checkpoint.restore_latest(checkpoint_dir, (parallel.unreplicate(state), best), belongs)
            if found is not None:
                start, (state, best) = found
        else:
            checkpoint.clear(checkpoint_dir)
    if start > steps:
        raise ValueError(f"{checkpoint_dir} holds a state of step {start}, beyond steps={steps}; raise steps or remove it")

    # The state is given to each step in turn, so it must not share memory with the caller's adapters.
    state = parallel.replicate(state, here, copy=True)
    params, held_there, head_params = parallel.replicate((params, held, head.params), here)
    # The step takes what belongs to the loss as one argument.
    of_loss = head_params if penalty is None else (head_params, parallel.replicate(penalty[1], here))

    primary = jax.process_index() == 0
    log = MetricsFile(log_file, after=start) if log_file is not None and primary else None
    monitor = Monitor(steps, start, log_every, log, progress if primary else False, trained, f"task {task.name!r}")
    try:
        with _sigterm(enabled=checkpoint_dir is not None) as asked:
            for step in range(start, steps):
                batch = parallel.place_batch(train_batch(task, step, batch_size, seed), mapping, everywhere)
                state, metrics = run(state, params, held_there, of_loss, batch)
                done = step + 1
                monitor.push(done, metrics)
                if validate_every and (done % validate_every == 0 or done == steps):
                    monitor.flush()
                    now = trees.merge(state.adapters, held_there)
                    score = _score(adapted, params, now, head_params, task, batch_size, here)
                    monitor.note({"step": done, "validation": score})
                    if score > float(best[0]):
                        best = (np.asarray(score), parallel.unreplicate(state.adapters))
                if checkpoint_dir is None:
                    continue
                stop = _agreed(asked)
                if stop or done % checkpoint_every == 0 or done == steps:
                    monitor.flush()  # a state is saved only after every step in it is known to be finite
                    checkpoint.save(checkpoint_dir, done, (parallel.unreplicate(state), best), belongs, keep=keep)
                if stop:
                    raise Preempted(
                        f"task {task.name!r} was asked to end after step {done} of {steps}; its state is saved in "
                        f"{Path(checkpoint_dir)}. The same call goes on from there"
                    )
            monitor.flush()
    finally:
        monitor.close()
    final = best[1] if validate_every else parallel.unreplicate(state.adapters)
    # Uncommitted, on the default device: what the caller computes with them decides where that happens.
    return trees.merge(jax.tree.map(jnp.asarray, final), held)


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


def _belongs(params: Any, adapters: Any, trained: Any, task: Any, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """What a state belongs to: everything that decides the bits of the run, as far as it can be written down."""
    from importlib import metadata

    return {
        "base weights": fingerprint(params),
        "adapters": checkpoint.structure(adapters),
        "trained": sorted(trees.paths(trained)),
        "initial adapters": fingerprint(adapters),
        "task": {"name": task.name, "classes": len(task.classes), "training examples": len(task.train)},
        "seed": seed,
        "config": config,
        "versions": {"python": sys.version.split()[0], **{p: metadata.version(p) for p in ("jax", "flax", "optax")}},
    }


@contextmanager
def _sigterm(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM into a flag while the body runs. Only the main thread may do that; elsewhere the flag stays down.

    With several processes JAX itself listens for the signal, see :func:`_agreed`.
    """
    received = False

    def receive(number: int, frame: Any) -> None:
        nonlocal received
        received = True

    if not enabled or jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: received
    except Preempted:
        received = False
        raise
    finally:
        # None: the handler was not installed from Python and cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
        if received:
            signal.raise_signal(signal.SIGTERM)  # it came too late to be acted on here


# Several processes agree on a step by number. Counting over all runs of the process keeps the numbers of two runs apart.
_CALLS = itertools.count()


def _agreed(asked: Callable[[], bool]) -> bool:
    """Whether to stop after this step, the same answer in every process. All of them call this after every step."""
    if jax.process_count() == 1:
        return asked()
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return reached_preemption_sync_point(next(_CALLS))


@functools.lru_cache(maxsize=64)
def _logits(adapted: Any, features: Callable[..., Any], logits: Callable[..., Any]) -> Callable[..., Any]:
    @jax.jit
    def forward(params: Any, adapters: Any, head_params: Any, inputs: Any) -> jax.Array:
        return logits(head_params, features(adapted.apply(params, adapters, **inputs), inputs))

    return forward


def _score(
    adapted: Any, params: Any, adapters: Any, head_params: Any, task: Any, batch_size: int, devices: Sequence[jax.Device]
) -> float:
    """The task's metric on its validation split; larger is better."""
    forward = _logits(adapted, task.head.features, task.head.logits)
    logits, labels = [], []
    for batch in eval_batches(task, "validation", batch_size):
        real = batch["weights"] > 0
        inputs = parallel.split_rows(batch["inputs"], devices)
        logits.append(np.asarray(forward(params, adapters, head_params, inputs))[real])
        labels.append(batch["labels"][real])
    score = float(task.metric(np.concatenate(logits), np.concatenate(labels)))
    if not math.isfinite(score):
        raise NonFiniteError(
            f"task {task.name!r}: the validation score is {score}; its metric may not be defined on this split"
        )
    return score
