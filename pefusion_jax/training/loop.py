"""``finetune``: training on one task. The loop is in ``run.py``, the numbers are in ``step.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from pefusion_jax.tasks import Batch, eval_batches, train_batch
from pefusion_jax.tasks.task import inputs_for, task_number
from pefusion_jax.training.losses import loss_of, smooths
from pefusion_jax.training.run import Plan, Settings, describe_task, run, score
from pefusion_jax.training.step import Schedule


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
    patience: int = 0,
    label_smoothing: float = 0.0,
    penalty: tuple[Callable[..., jax.Array], Any] | None = None,
) -> dict[str, Any]:
    r"""Trains the adapters of one task; the base parameters are read only.

    .. math:: \phi \leftarrow \phi - \eta_k\, \mathrm{AdamW}(\mathrm{clip}(\nabla_\phi L)), \qquad
              L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}

    One seed gives one result, bit for bit, on the same devices and versions: batches, random masks and initial adapters are
    functions of the seed and the step. Equal settings and shapes reuse the compiled program, also for other tasks. Give an
    optimizer or a schedule of your own as one object, not a new one for each call, to keep this.

    Args:
      adapted: what ``pf.adapt``, ``pf.generate`` or ``pf.linearize`` returned. One that was generated for several tasks is
        trained for this one, which it has to know by name. An ``auxiliary`` loss that it has is added to :math:`L`.
      params: base parameters, in any floating dtype. If they are already replicated (``parallel.replicate``) they stay put.
      task: a task of ``pefusion_jax.tasks``: examples, encoding, frozen head, loss and metric.
      adapters: tree to start from, left as it is; ``None`` makes one with ``adapted.init`` and the seed.
      steps: number of updates in all, also for a resumed run.
      batch_size: number of examples of an update over all devices, micro-batches and processes.
      learning_rate: largest learning rate. Not used with a schedule or an optimizer of your own.
      schedule: ``"cosine"``, ``"linear"``, ``"constant"``, or a function of the step such as optax's.
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
      patience: number of evaluations in a row without a better score after which the run ends. 0: it never ends early.
      label_smoothing: :math:`\epsilon` of the cross-entropy :math:`(1 - \epsilon)\,\ell + \epsilon / K` times the sum over the
        :math:`K` real classes of their negative log-likelihoods. Of a classification with ``tasks.cross_entropy`` only.
      penalty: ``(function, arrays)`` with ``function(arrays, adapted, params, adapters) -> []``, which is added to the loss, as
        :func:`~pefusion_jax.penalty.interference_penalty` makes it. Equal functions share compiled programs, so let it live at
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
    settings = Settings.of(locals())  # first of all: these are the arguments
    task_number(adapted, task)  # now: an unknown task is an error before anything is made
    if validate_every:
        next(eval_batches(task, "validation", 1))  # and so is a split that is missing, or whose labels are hidden
    if label_smoothing and not smooths(task):
        raise ValueError(f"label_smoothing={label_smoothing} is for classes, but task {task.name!r} is a regression; pass 0")
    loss = loss_of(task, label_smoothing)

    def batch(step: int) -> Batch:
        made = train_batch(task, step, batch_size, seed)
        # A number for each part that is worked on apart: it is split like the rows.
        return {**made, "inputs": inputs_for(adapted, task, made["inputs"], groups=settings.parts)}

    plan = Plan(
        label=f"task {task.name!r}",
        batch=batch,
        init_inputs=lambda: train_batch(task, 0, batch_size, seed)["inputs"],
        head=task.head,
        loss=loss,
        score=lambda params, tree, here: {"validation": score(adapted, params, tree, task, batch_size, here)},
        belongs=lambda: {"task": describe_task(task, bool(validate_every))},
        config={"label_smoothing": float(label_smoothing)} if label_smoothing else {},
    )
    return run(adapted, params, settings, plan)
