"""Tasks in one call: data, encoder, frozen head, loss and metric together, for a text model with a tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax

from pefusion_jax.tasks import metrics, sources
from pefusion_jax.tasks.features import features_of, mean_pool_features
from pefusion_jax.tasks.heads import linear_head, linear_logits, zero_shot_head
from pefusion_jax.tasks.sources import Labelled, PathLike
from pefusion_jax.tasks.task import Head, Task
from pefusion_jax.tasks.text import TextEncoder

BUCKETS = (16, 32, 64, 128, 256, 512)


def text_task(
    data: Labelled,
    model: Any,
    params: Any,
    tokenizer: Any,
    *,
    head: str | Head = "zero_shot",
    max_length: int = 32,
    buckets: Sequence[int] = BUCKETS,
    features: Callable[..., jax.Array] = mean_pool_features,
    metric: Callable[[Any, Any], float] | None = None,
    pad_to: int = 32,
) -> Task:
    """A task from labelled texts and a pretrained text model.

    Args:
      data: from ``folder_task_source`` or ``embedded``, or your own :class:`Labelled`.
      model: a Linen module that takes ``input_ids``, ``attention_mask``, ``token_type_ids`` and gives ``last_hidden_state``.
      params: its parameters.
      tokenizer: its Hugging Face tokenizer.
      head: ``"zero_shot"`` (from the class descriptions), ``"linear"`` (fitted to the base model's features of the training
        split), or a :class:`Head` of your own.
      max_length: longest number of tokens.
      buckets: lengths that batches are padded to.
      features: ``mean_pool_features``, ``cls_features``, or your own.
      metric: accuracy by default, for a regression Pearson's correlation.
      pad_to: classes are padded to a multiple of this.

    Raises:
      ValueError: for an unknown head, a zero-shot head for a regression, or a bad row, with its place.
    """
    encoder = TextEncoder(tokenizer, data.fields, tuple(buckets), max_length)
    regression = not data.classes
    task = Task(
        name=data.name,
        classes=data.classes,
        train=data.train,
        validation=data.validation,
        test=data.test,
        encode=encoder,
        head=head if isinstance(head, Head) else Head({}, features, linear_logits),
        metric=metric or (metrics.pearson if regression else metrics.accuracy),
        loss=metrics.squared_error if regression else metrics.cross_entropy,
    )
    if isinstance(head, Head):
        return task
    apply = base_apply(model)
    if head == "zero_shot":
        if regression:
            raise ValueError(f"task {data.name!r} is a regression, which has no class descriptions; use head='linear'")
        made = zero_shot_head(apply, params, encoder, data.descriptions, pad_to=pad_to, features=features)
    elif head == "linear":
        inputs, labels = task.arrays("train")
        # A TextEncoder always encodes whole splits, so there are inputs.
        rows = features_of(apply, params, cast(dict[str, Any], inputs), encoder.trim, features=features)
        made = linear_head(rows, labels, len(data.classes), pad_to=pad_to, features=features)
    else:
        raise ValueError(f"head={head!r} must be 'zero_shot', 'linear' or a Head")
    finished = dataclasses.replace(task, head=made)
    finished._prepared.update(task._prepared)  # what was tokenized for the head serves the training as well
    return finished


def folder_task(
    folder: PathLike,
    model: Any,
    params: Any,
    tokenizer: Any,
    *,
    fields: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    descriptions: Sequence[str] | None = None,
    **options: Any,
) -> Task:
    """A task from a folder of your own with ``train``, ``validation`` and ``test`` files.

    Args:
      folder: see ``folder_task_source``, also for ``fields``, ``classes`` and ``descriptions``.
      model: see :func:`text_task`, also for ``params``, ``tokenizer`` and the other options (``head``, ``max_length``, ...).
    """
    data = sources.folder_task_source(folder, fields=fields, classes=classes, descriptions=descriptions)
    return text_task(data, model, params, tokenizer, **options)


def embedded_tasks(
    model: Any,
    params: Any,
    tokenizer: Any,
    names: Sequence[str] | None = None,
    head: str = "zero_shot",
    max_length: int = 32,
    buckets: Sequence[int] = BUCKETS,
    *,
    path: PathLike | None = None,
    **options: Any,
) -> list[Task]:
    """The tasks of the committed extract, ready for a model.

    Args:
      model: see :func:`text_task`, also for the arguments that are not named here.
      names: which tasks, in this order; all by default.
      path: of the extract, if not in its usual place.

    Example::

      tasks = embedded_tasks(model, params, tokenizer, names=("spam", "intents"), head="linear")
    """
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a sequence of names: names=({names!r},)")
    data = sources.embedded("all", path=path) if names is None else {n: sources.embedded(n, path=path) for n in names}
    return [
        text_task(each, model, params, tokenizer, head=head, max_length=max_length, buckets=buckets, **options)
        for each in data.values()
    ]


def base_apply(model: Any) -> Callable[..., Any]:
    """``(params, **inputs) -> outputs`` of a Linen module; one function for each model, so that its programs are reused."""
    try:
        return _base_apply(model)
    except TypeError:  # a module with a field that cannot be hashed
        return _base_apply.__wrapped__(model)


@functools.lru_cache(maxsize=8)
def _base_apply(model: Any) -> Callable[..., Any]:
    def apply(params: Any, **inputs: Any) -> Any:
        return model.apply(params if "params" in params else {"params": params}, **inputs)

    return apply
