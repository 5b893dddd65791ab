"""The weighted loss of the rows that a device works on at a time: of one task, or of blocks of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.tasks.metrics import cross_entropy, smoothed_cross_entropy, smoothed_token_cross_entropy, token_cross_entropy


class TaskLoss(NamedTuple):
    """A task's head and loss as a part of a compiled program.

    Attributes:
      function: ``(logits, labels) -> [batch]``.
      regression: whether its labels are float32; else int32.
      logits: of the head.
      stack: which of the stacks of :func:`stacked_heads` holds the head's parameters.
      place: where in that stack.
    """

    function: Callable[..., jax.Array]
    regression: bool
    logits: Callable[..., jax.Array]
    stack: int
    place: int


def loss_of(task: Any, label_smoothing: float) -> Callable[..., jax.Array]:
    """A task's loss, smoothed if it is a cross-entropy, of classes or of tokens.

    Raises:
      ValueError: if ``label_smoothing`` is not in [0, 1), or the task has classes and another loss.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
    if not label_smoothing or not smooths(task):
        return task.loss
    if task.loss is token_cross_entropy:
        return smoothed_token_cross_entropy(float(label_smoothing))
    if task.loss is not cross_entropy:
        raise ValueError(
            f"label_smoothing={label_smoothing} smooths tasks.cross_entropy, but task {task.name!r} has a loss of its own; "
            "pass 0, or smooth in that loss"
        )
    return smoothed_cross_entropy(float(label_smoothing))


def smooths(task: Any) -> bool:
    """Whether label smoothing is for the task: it has classes, or its targets are texts, be they numbers."""
    return bool(task.classes) or task.loss is token_cross_entropy


def stacked_heads(tasks: Sequence[Any], label_smoothing: float = 0.0) -> tuple[tuple[TaskLoss, ...], list[Any]]:
    """Heads side by side: those with one ``logits`` function and parameters of the same shapes are one stack.

    Args:
      tasks: the tasks. Every stack's logits are computed for all rows of a batch, so that few stacks are fast.
      label_smoothing: see :func:`loss_of`; regressions go without.

    Returns:
      What a program has to know of each task, and the parameters of each stack, with its tasks in front.

    Raises:
      ValueError: if the heads have different ``features``, naming two tasks, or as :func:`loss_of`.
    """
    first = tasks[0]
    stacks: dict[Any, list[Any]] = {}
    table = []
    for task in tasks:
        one, two = first.head.features, task.head.features
        if one is not two:
            raise ValueError(
                f"the heads of {first.name!r} and {task.name!r} have different features functions, {_name(one)} and "
                f"{_name(two)}; give all tasks heads with the same, or train them apart"
            )
        shapes = tuple((path, np.shape(leaf), np.asarray(leaf).dtype) for path, leaf in trees.flat(task.head.params).items())
        kind = (task.head.logits, shapes)
        own = stacks.setdefault(kind, [])
        loss = loss_of(task, label_smoothing)
        table.append(TaskLoss(loss, not task.classes, task.head.logits, list(stacks).index(kind), len(own)))
        own.append(task.head.params)
    return tuple(table), [jax.tree.map(lambda *leaves: jnp.stack(leaves), *own) for own in stacks.values()]


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))


def weighted_losses(
    adapted: Any, features: Callable[..., Any], logits: Callable[..., Any], loss: Any
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Builds the sum that a device differentiates, :math:`\sum_i w_i \ell_i + \alpha \sum_i w_i`.

    :math:`\alpha` is the model's ``auxiliary`` loss, if it has one: divided by the weights of all devices and micro-batches,
    the total is the mean loss plus the weighted mean of the auxiliary losses.

    Args:
      adapted: the model.
      features: of the heads.
      logits: of the head; with several tasks each entry of ``loss`` has its own.
      loss: ``(logits, labels) -> [batch]``, or a tuple of :class:`TaskLoss`, one a task, for batches with blocks of several.

    Returns:
      ``(params, adapters, head_params, rows, rngs) -> (sum, by_task)``: ``by_task`` is ``()`` for one task, for several
      :math:`\sum_i w_i \ell_i` of each task, ``[task]``. For several, ``head_params`` is ``{"stacks": [stack, ...], "numbers":
      [task]}``, the second what the model calls them, and ``rows["inputs"]`` have ``task`` ``[groups]``.
    """
    auxiliary = getattr(adapted, "auxiliary", None)  # a model of one's own may lack it
    several = isinstance(loss, tuple)

    def run(params: Any, adapters: Any, head_params: Any, rows: Any, rngs: Any) -> tuple[jax.Array, Any]:
        inputs, task = rows["inputs"], None
        if several:
            inputs = dict(inputs)
            task = inputs.pop("task")
            if getattr(adapted, "tasks", ()):
                inputs["task"] = head_params["numbers"][task]
        outputs = adapted.apply(params, adapters, **rngs, **inputs)
        found = features(outputs, inputs)
        weights = rows["weights"].astype(jnp.float32)
        if several:
            losses = _by_group(loss, head_params["stacks"], task, found, rows["labels"])
        else:
            losses = loss(logits(head_params, found), rows["labels"])
        weighted = losses.astype(jnp.float32) * weights
        total = jnp.sum(weighted)
        if auxiliary is not None:
            total = total + auxiliary(params, adapters, outputs, inputs).astype(jnp.float32) * jnp.sum(weights)
        if not several:
            return total, ()
        sums = jnp.sum(weighted.reshape(task.shape[0], -1), axis=1)  # type: ignore[union-attr]
        return total, jnp.zeros(len(loss), jnp.float32).at[task].add(sums)

    return run


def _by_group(table: tuple[TaskLoss, ...], stacks: list[Any], task: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Losses ``[rows]`` of blocks of rows, each under its own task's head and loss."""
    groups = task.shape[0]
    blocks = features.reshape(groups, -1, *features.shape[1:])  # features of tokens have more axes
    scores = []
    for number, heads in enumerate(stacks):
        # Blocks of other stacks' tasks get the first head; what it makes of them is not selected below.
        place = jnp.asarray([each.place if each.stack == number else 0 for each in table], jnp.int32)[task]
        logits = next(each.logits for each in table if each.stack == number)
        found = jax.vmap(logits)(jax.tree.map(lambda leaf, place=place: leaf[place], heads), blocks)
        scores.append(found.reshape(features.shape[0], *found.shape[2:]))
    kinds = list(dict.fromkeys((each.function, each.regression, each.stack) for each in table))
    kind = [kinds.index((each.function, each.regression, each.stack)) for each in table]
    of_row = jnp.repeat(jnp.asarray(kind, jnp.int32)[task], features.shape[0] // groups)
    losses = jnp.zeros(features.shape[0], jnp.float32)
    for number, (function, regression, stack) in enumerate(kinds):
        mine = of_row == number
        # Rows of other kinds get a label that every loss can take: what is not selected must be finite too, for the gradient.
        given = jnp.where(mine, labels, jnp.zeros_like(labels)).astype(jnp.float32 if regression else jnp.int32)
        losses = jnp.where(mine, function(scores[stack], given).astype(jnp.float32), losses)
    return losses
