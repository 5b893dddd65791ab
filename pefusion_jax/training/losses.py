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
    """A task's loss as a part of a compiled program.

    Attributes:
      function: ``(logits, labels) -> [batch]``.
      regression: whether its labels are float32; else int32.
    """

    function: Callable[..., jax.Array]
    regression: bool


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


def stacked_heads(tasks: Sequence[Any]) -> Any:
    """The parameters of the tasks' heads, with the tasks in front.

    Raises:
      ValueError: if the heads do not have the same functions, leaves and shapes, naming two tasks.
    """
    first = tasks[0]
    ours = trees.flat(first.head.params)
    for task in tasks[1:]:
        for name in ("features", "logits"):
            one, two = getattr(first.head, name), getattr(task.head, name)
            if one is not two:
                raise ValueError(
                    f"the heads of {first.name!r} and {task.name!r} have different {name} functions, {_name(one)} and "
                    f"{_name(two)}; give all tasks heads of one kind, or train them apart"
                )
        theirs = trees.flat(task.head.params)
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"the heads of {first.name!r} and {task.name!r} have different parameters, {', '.join(sorted(ours))} and "
                f"{', '.join(sorted(theirs))}; give all tasks heads of one kind, or train them apart"
            )
        for path, leaf in ours.items():
            one, two = (f"{np.asarray(x).dtype}{list(np.shape(x))}" for x in (leaf, theirs[path]))
            if one != two:
                raise ValueError(
                    f"the heads of {first.name!r} and {task.name!r} have different shapes: {path!r} is {one} and {two}. Pad "
                    "the classes of all tasks to one number: make their heads with one pad_to=, as large as the most classes"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(task.head.params for task in tasks))


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
      logits: of the heads.
      loss: ``(logits, labels) -> [batch]``, or a tuple of :class:`TaskLoss`, one a task, for batches with blocks of several.

    Returns:
      ``(params, adapters, head_params, rows, rngs) -> (sum, by_task)``: ``by_task`` is ``()`` for one task, for several
      :math:`\sum_i w_i \ell_i` of each task, ``[task]``. For several, ``head_params`` is ``{"heads": [task, ...], "numbers":
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
            losses = _by_group(logits, loss, head_params["heads"], task, found, rows["labels"])
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


def _by_group(
    logits: Callable[..., Any], table: tuple[TaskLoss, ...], heads: Any, task: Any, features: jax.Array, labels: jax.Array
) -> jax.Array:
    """Losses ``[rows]`` of blocks of rows, each under its own task's head and loss."""
    groups = task.shape[0]
    own = jax.tree.map(lambda leaf: leaf[task], heads)
    # Features of tokens have more axes.
    scores = jax.vmap(logits)(own, features.reshape(groups, -1, *features.shape[1:]))
    scores = scores.reshape(features.shape[0], *scores.shape[2:])
    kinds = list(dict.fromkeys(table))
    kind = jnp.repeat(jnp.asarray([kinds.index(each) for each in table], jnp.int32)[task], features.shape[0] // groups)
    losses = jnp.zeros(features.shape[0], jnp.float32)
    for number, (function, regression) in enumerate(kinds):
        mine = kind == number
        # Rows of other kinds get a label that every loss can take: what is not selected must be finite too, for the gradient.
        given = jnp.where(mine, labels, jnp.zeros_like(labels)).astype(jnp.float32 if regression else jnp.int32)
        losses = jnp.where(mine, function(scores, given).astype(jnp.float32), losses)
    return losses
