"""What a search minimises: losses of a fused tree, with every array an argument of the compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import Delta
from pefusion_jax.layerwise import join
from pefusion_jax.tasks.task import Batch, Task, inputs_for, task_number


class Term(NamedTuple):
    """One of the losses whose mean is minimised.

    Attributes:
      name: shown in errors.
      function: ``(arrays, fused, batch) -> (sum of losses, number of examples)``, traceable. Programs are kept for each
        function: give terms that differ in arrays alone the same one.
      arrays: everything that the function needs besides its other arguments, such as the base parameters.
      batches: one batch or more; step ``k`` takes batch ``k`` modulo their number.
    """

    name: str
    function: Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]
    arrays: Any
    batches: Sequence[Any]


class Objective(NamedTuple):
    r"""The mean of its terms' mean losses, :math:`\frac1K \sum_k \frac{1}{n_k} \sum_i \ell_{k,i}`.

    A term's function gets what the search combines: a Delta if weight changes are fused, else a tree. Layers that a scan has
    stacked come one by one (``layer/0/...``) in either; :func:`objective` puts them together again for its model.

    Attributes:
      terms: at least one.
    """

    terms: tuple[Term, ...]


def objective(
    adapted: Any,
    params: Any,
    tasks: Iterable[Task] | Mapping[str, Task],
    kind: Literal["cross_entropy", "entropy"] = "cross_entropy",
    *,
    split: str = "validation",
    batch_size: int = 16,
    examples: int | None = None,
    init: Any = None,
    seed: int = 0,
) -> Objective:
    r"""The mean over tasks of their losses under their frozen heads, as a function of a fused tree or Delta.

    Args:
      adapted: the model.
      params: its base parameters, of any layout; an argument of the compiled programs.
      tasks: the tasks; those whose heads and losses are the same functions share a program.
      kind: ``"cross_entropy"``, each task's own loss with labels (for a regression its squared error); or ``"entropy"`` of the
        predictions, :math:`-\sum_c p_c \log p_c`, without labels.
      split: the examples that are looked at. To be honest do not take ``"test"``: entropy on test inputs is transductive.
      batch_size: rows of a batch, of one task. The order of examples is shuffled once.
      examples: use only so many of each task, drawn by ``seed``; all by default.
      init: the start of the adapters, if the search will run with ``fuse(..., space="adapter", init=init)``: the model is then
        applied to ``init + fused``.
      seed: of the order.

    Raises:
      ValueError: for an unknown kind or an empty split, two tasks of one name, or entropies of a regression.
    """
    if kind not in ("cross_entropy", "entropy"):
        raise ValueError(f"kind={kind!r} must be 'cross_entropy' or 'entropy'")
    if batch_size < 1 or (examples is not None and examples < 1):
        raise ValueError(f"batch_size={batch_size} and examples={examples} must be 1 or more")
    terms: list[Term] = []
    for task in tasks.values() if isinstance(tasks, Mapping) else tasks:
        if any(task.name == term.name for term in terms):
            raise ValueError(f"two tasks are named {task.name!r}; give each task a name of its own")
        if kind == "entropy" and not task.classes:
            raise ValueError(f"task {task.name!r} is a regression, whose predictions have no entropy; use kind='cross_entropy'")
        if kind == "entropy" and task.predict is not None:
            raise ValueError(f"task {task.name!r} is scored by its own predict, not by its head; use kind='cross_entropy'")
        task_number(adapted, task)  # an unknown task is an error now
        function = _loss_of(adapted, task.head.features, task.head.logits, None if kind == "entropy" else task.loss)
        arrays = {"params": params, "head": task.head.params, "init": init}
        terms.append(Term(task.name, function, arrays, _Batches(adapted, task, split, batch_size, examples, seed)))
    if not terms:
        raise ValueError("there is nothing to minimise: no tasks were given; pass at least one")
    return Objective(tuple(terms))


class _Batches(Sequence[Batch]):
    """Batches of a split in a shuffled order, made when they are asked for; the last one is filled up with weight 0."""

    def __init__(self, adapted: Any, task: Task, split: str, batch_size: int, examples: int | None, seed: int) -> None:
        order = np.random.default_rng([seed, *task.name.encode()]).permutation(len(task.split(split)))
        self._adapted, self._task, self._split = adapted, task, split
        self._size, self._order = batch_size, order[:examples]

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = np.arange(index * self._size, (index + 1) * self._size)
        real = (place < len(self._order)).astype(np.float32)
        batch = self._task.rows(self._split, self._order[np.minimum(place, len(self._order) - 1)], real)
        return {**batch, "inputs": inputs_for(self._adapted, self._task, batch["inputs"])}


@functools.lru_cache(maxsize=64)
def _loss_of(adapted: Any, features: Any, logits: Any, loss: Any) -> Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]:
    def function(arrays: Any, fused: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        params, inputs = arrays["params"], batch["inputs"]
        if isinstance(fused, Delta):
            if arrays["init"] is not None:
                raise ValueError("the objective has an init, which belongs to space='adapter', but weight changes are fused")
            outputs = adapted.apply_deltas(params, Delta(_in_layout(fused.leaves, params)), **inputs)
        else:
            tree = trees.nest(_in_layout(trees.flat(fused), params))
            if arrays["init"] is not None:
                tree = jax.tree.map(jnp.add, arrays["init"], tree)
            outputs = adapted.apply(params, tree, **inputs)
        scores = logits(arrays["head"], features(outputs, inputs)).astype(jnp.float32)
        each = _entropy(scores) if loss is None else loss(scores, batch["labels"])
        return jnp.sum(each * batch["weights"]), jnp.sum(batch["weights"])

    return function


def _entropy(logits: jax.Array) -> jax.Array:
    """Shannon entropy of the softmax, ``[batch, classes]`` -> ``[batch]``; padded classes have probability 0."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _in_layout(leaves: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Stacks layers that were taken apart, where the model's parameters have them stacked."""
    inner = params["params"] if isinstance(params.get("params"), Mapping) else params
    modules = {"/".join(path.split("/")[:end]) for path in trees.flat(inner) for end in range(1, path.count("/") + 2)}
    numbers: dict[str, set[int]] = {}
    for path in leaves:
        segments = path.split("/")
        for place, segment in enumerate(segments[:-1]):
            node = "/".join(segments[: place + 1])
            if segment in STACKS and segments[place + 1].isdigit() and node in modules:
                if f"{node}/{segments[place + 1]}" not in modules:
                    numbers.setdefault(node, set()).add(int(segments[place + 1]))
                break
    return join(leaves, {node: len(found) for node, found in numbers.items()}) if numbers else dict(leaves)
