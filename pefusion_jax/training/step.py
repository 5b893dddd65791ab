"""One training step as one device sees it; ``parallel.py`` maps it over devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefusion_jax import trees
from pefusion_jax.training.losses import weighted_losses

Schedule = Callable[[Any], Any]
SCHEDULES = ("cosine", "linear", "constant")


class State(NamedTuple):
    """What a step changes. Its leaves are arrays, so it maps, donates and saves as one pytree.

    Attributes:
      adapters: nested dictionary of the trained leaves, float32. Leaves that are held still are not in it.
      opt_state: state of the optimizer, for the trained leaves only.
      step: ``[]`` int32, number of updates made.
      key: random key of the run; each step folds its number into it, so it never changes.
    """

    adapters: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


class NonFiniteError(ValueError):
    """A loss, a gradient or an update became NaN or infinite; the message names the step and the first bad path."""


class Rate(NamedTuple):
    """What the learning rate depends on. These are arrays in the optimizer's state, so one program serves all of them.

    Attributes:
      made: ``[]`` int32, number of updates made.
      peak: ``[]`` float32, the largest value.
      rising: ``[]`` float32, number of steps of the warm-up.
      steps: ``[]`` float32, number of all steps.
    """

    made: jax.Array
    peak: jax.Array
    rising: jax.Array
    steps: jax.Array


def learning_rate(schedule: str, rate: Rate) -> jax.Array:
    r"""Linear warm-up, then a cosine or a line to zero, or a constant.

    .. math:: \eta_k = \eta \min\left(\frac{k + 1}{w + 1}, c(p)\right), \quad p = \frac{\max(k - w, 0)}{K - w}, \quad
       c(p) = \tfrac12 (1 + \cos \pi p),\ 1 - p \text{ or } 1

    with :math:`k` updates made, :math:`w` steps of warm-up and :math:`K` steps in all.
    """
    k = rate.made.astype(jnp.float32)
    factor = jnp.minimum((k + 1.0) / (rate.rising + 1.0), 1.0)
    progress = jnp.clip((k - rate.rising) / jnp.maximum(rate.steps - rate.rising, 1.0), 0.0, 1.0)
    if schedule == "cosine":
        factor = jnp.minimum(factor, 0.5 * (1.0 + jnp.cos(math.pi * progress)))
    elif schedule == "linear":
        factor = jnp.minimum(factor, 1.0 - progress)
    return rate.peak * factor


@functools.lru_cache(maxsize=64)
def default_optimizer(schedule: str | Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW with optax's default moments; the same object for the same arguments, so that programs are reused.

    Its numbers come from :func:`with_rate`, unless ``schedule`` is a function of the step.

    Raises:
      ValueError: for an unknown schedule.
    """
    if callable(schedule):
        return optax.adamw(schedule, weight_decay=weight_decay)
    if schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {known}, or pass a function of the step")

    def init(params: Any) -> Rate:
        del params
        return Rate(jnp.zeros((), jnp.int32), *(jnp.zeros((), jnp.float32) for _ in range(3)))

    def update(updates: Any, state: Rate, params: Any = None) -> tuple[Any, Rate]:
        del params
        size = learning_rate(schedule, state)
        return jax.tree.map(lambda u: -size * u, updates), state._replace(made=state.made + 1)

    return optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(weight_decay), optax.GradientTransformation(init, update)
    )


@functools.lru_cache(maxsize=64)
def rate_of(schedule: str | Schedule) -> Callable[[State], Any]:
    """``state -> learning rate of the next update`` of :func:`default_optimizer`; the same object for the same schedule."""
    if callable(schedule):
        return lambda state: schedule(state.step)
    return lambda state: learning_rate(schedule, state.opt_state[-1])


def with_rate(state: State, peak: float, warmup: float, steps: int) -> State:
    """The state with the numbers of the schedule: the largest rate, the share of the steps in which it rises, the steps.

    Raises:
      ValueError: for a warm-up outside [0, 1).
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} is a share of the steps; it must be at least 0 and below 1")
    numbers = (jnp.float32(value) for value in (peak, round(warmup * steps), steps))
    *others, rate = state.opt_state
    return state._replace(opt_state=(*others, Rate(rate.made, *numbers)))


def init_state(trained: Mapping[str, Any], optimizer: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step.

    Args:
      trained: nested dictionary of floating leaves; they are converted to float32.
      optimizer: any optax transformation.
      seed: seed of the run's random key.

    Raises:
      ValueError: if there is nothing to train, or a leaf is not floating.
    """
    leaves = trees.paths(trained)
    if not leaves:
        raise ValueError("the adapters have no trained leaf; adapt the model with a method that trains something")
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"the trained leaf {path!r} is {leaf.dtype}; only floating leaves can be trained, hold it still")
    adapters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trained)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python floats with its integer counters
        opt_state = optimizer.init(adapters)
    return State(adapters, opt_state, jnp.zeros((), jnp.int32), jax.random.key(seed))


def make_step(
    adapted: Any,
    optimizer: optax.GradientTransformation,
    head_features: Callable[..., jax.Array],
    head_logits: Callable[..., jax.Array],
    loss: Any,
    *,
    accumulate: int = 1,
    clip: float | None = 1.0,
    stochastic: bool = True,
    rate: Callable[[State], Any] | None = None,
    axis_name: str = "data",
    penalty: Callable[..., jax.Array] | None = None,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    r"""Builds the step that every device runs on its share of the batch.

    .. math:: L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad g = \nabla_\phi L

    with sums over the batch of *all* devices. Each device sums :math:`w_i \ell_i` and its gradient over its rows; one
    all-reduce adds these sums, the weights and the number of examples, so ``trained elements + 3`` numbers cross the wire, and
    with several tasks one more for each. The model's ``auxiliary`` loss, if it has one, is added on each device.
    Where the loss, the gradient or the updated adapters are not finite, adapters and optimizer state stay as they were.

    Args:
      adapted: what ``pf.adapt`` returns; its ``apply`` is used.
      optimizer: any optax transformation; it sees the reduced and clipped gradient.
      head_features: ``(outputs, inputs) -> [batch, d]``.
      head_logits: ``(head_params, [batch, d]) -> [batch, classes]``; with several tasks each entry of ``loss`` has its own.
      loss: ``(logits, labels) -> [batch]``; or one entry a task, see :func:`~pefusion_jax.training.losses.weighted_losses`.
      accumulate: number of micro-batches that a device's rows are worked through in, to save memory.
      clip: largest Euclidean norm of the reduced gradient, ``None`` for no limit.
      stochastic: whether ``apply`` gets ``rngs={"dropout": key}``. The key depends on the step, the device and the
        micro-batch: with dropout, other numbers of devices draw other masks.
      rate: ``state -> learning rate``, for the metrics only.
      axis_name: name of the mapped axis.
      penalty: ``(penalty_params, adapted, params, adapters) -> []``, added to :math:`L` with its gradient, once for all
        devices. The step's ``head_params`` is then the pair ``(head_params, penalty_params)``.

    Returns:
      ``step(state, params, held, head_params, batch) -> (state, metrics)``: ``held`` are the adapter leaves that are not
      trained, ``batch`` is ``{"inputs": {name: [rows, ...]}, "labels": [rows], "weights": [rows]}``. The metrics are scalars,
      the same on every device: ``loss``, ``grad_norm`` (before clipping), ``examples``, ``learning_rate``, ``finite`` and
      ``bad``, a number that :func:`describe_bad` turns into a path. With several tasks also ``task_losses`` ``[task]``, the
      sums of their rows' weighted losses.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    losses = weighted_losses(adapted, head_features, head_logits, loss)

    def weighted_loss(trained: Any, fixed: Any, key: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
        params, held, head_params = fixed
        rngs = {"rngs": {"dropout": key}} if stochastic else {}
        return losses(params, trees.merge(trained, held), head_params, rows, rngs)

    def summed(trained: Any, fixed: Any, key: jax.Array, batch: Any) -> tuple[tuple[jax.Array, Any], Any]:
        """Sum of the weighted losses of this device's rows, in all and by task, and its gradient."""
        value_and_grad = jax.value_and_grad(weighted_loss, has_aux=True)
        if accumulate == 1:
            return value_and_grad(trained, fixed, key, batch)
        micro = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(total: Any, item: Any) -> tuple[Any, None]:
            index, rows = item
            return jax.tree.map(jnp.add, total, value_and_grad(trained, fixed, jax.random.fold_in(key, index), rows)), None

        by_task = jnp.zeros(len(loss), jnp.float32) if isinstance(loss, tuple) else ()
        zero = ((jnp.zeros((), jnp.float32), by_task), jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(add, zero, (jnp.arange(accumulate), micro))[0]

    def step(state: State, params: Any, held: Any, head_params: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), jax.lax.axis_index(axis_name))
        if penalty is not None:
            head_params, penalty_params = head_params
        (loss_sum, by_task), grads = summed(state.adapters, (params, held, head_params), key, batch)
        weights = batch["weights"].astype(jnp.float32)
        local = jnp.stack([loss_sum, jnp.sum(weights), jnp.sum((weights > 0).astype(jnp.float32))])
        # No collective stands inside the differentiated function: how one is transposed depends on the mapping.
        (loss_sum, weight_sum, examples), by_task, grads = jax.lax.psum((local, by_task, grads), axis_name)
        mean_loss = loss_sum / weight_sum
        grads = jax.tree.map(lambda g: g / weight_sum, grads)
        if penalty is not None:
            # After the reduction: every device has the same adapters, and nothing more crosses the wire.
            added, more = jax.value_and_grad(
                lambda trained: penalty(penalty_params, adapted, params, trees.merge(trained, held)).astype(jnp.float32)
            )(state.adapters)
            mean_loss, grads = mean_loss + added, jax.tree.map(jnp.add, grads, more)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes Python floats with its integer counters
            grad_norm = optax.tree.norm(grads)
            clipped = grads if clip is None else optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())[0]
            updates, opt_state = optimizer.update(clipped, state.opt_state, state.adapters, value=mean_loss)
            adapters = optax.apply_updates(state.adapters, updates)
            now = jnp.asarray(jnp.nan if rate is None else rate(state), jnp.float32)

        broken = jnp.concatenate([_broken(grads), _broken(adapters)])
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm) & ~jnp.any(broken)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (adapters, opt_state), (state.adapters, state.opt_state)
        )
        metrics = {
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "examples": examples,
            "learning_rate": now,
            "finite": finite,
            "bad": jnp.where(jnp.any(broken), jnp.argmax(broken), -1).astype(jnp.int32),
            **({"task_losses": by_task} if isinstance(loss, tuple) else {}),
        }
        return State(kept[0], kept[1], state.step + 1, state.key), metrics

    return step


def _broken(tree: Any) -> jax.Array:
    """``[leaves]`` bool, in the order of the sorted paths: which leaves hold a NaN or an infinity."""
    leaves = trees.paths(tree)
    return jnp.stack([~jnp.all(jnp.isfinite(leaves[path])) for path in sorted(leaves)])


def describe_bad(adapters: Any, metrics: Mapping[str, Any]) -> str:
    """Says what was not finite in a step whose metrics have ``finite == False``.

    Args:
      adapters: the trained leaves (shapes are enough), which name the paths.
      metrics: the step's metrics, fetched.
    """
    names = sorted(trees.paths(adapters))
    bad = int(metrics["bad"])
    where = ""
    if bad >= 0:
        what = "gradient" if bad < len(names) else "updated adapters"
        where = f"; first bad leaf of the {what}: {names[bad % len(names)]!r}"
    return f"loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}{where}"
