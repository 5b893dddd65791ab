"""What a trained generator makes of a task's data: which known task a new one is like, a prototype for it, mean adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted
from pefusion_jax.generators.core import generate
from pefusion_jax.generators.hypernetwork import HyperNetwork
from pefusion_jax.tasks.task import Task, eval_batches, task_number


class Retrieval(NamedTuple):
    """Where the instances of a task lie among the prototypes.

    Attributes:
      names: the known tasks.
      cosines: ``[instance, task]``, of the instances with the prototypes.
    """

    names: tuple[str, ...]
    cosines: np.ndarray

    @property
    def scores(self) -> dict[str, float]:
        """Known task -> mean cosine."""
        return dict(zip(self.names, self.cosines.mean(axis=0).tolist(), strict=True))

    @property
    def nearest(self) -> str:
        """The known task with the highest mean cosine."""
        return self.names[int(self.cosines.mean(axis=0).argmax())]

    @property
    def votes(self) -> dict[str, float]:
        """Known task -> share of the instances that are nearest to its prototype."""
        counts = np.bincount(self.cosines.argmax(axis=1), minlength=len(self.names))
        return dict(zip(self.names, (counts / len(self.cosines)).tolist(), strict=True))

    def shares(self, temperature: float = 0.1) -> np.ndarray:
        r"""``[task]``: the softmax of the scores over :math:`\tau`."""
        scores = self.cosines.mean(axis=0) / temperature
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()


def instance_codes(
    generated: Adapted,
    params: Any,
    tree: Any,
    task: Task,
    *,
    split: str = "train",
    most: int | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """The retriever's view of a task's inputs, ``[instance, d]``; labels are not looked at.

    Args:
      generated: a model from ``generate`` with a retriever.
      params: base parameters.
      tree: the generator's.
      task: any task that the model can encode, known or new.
      split: whose inputs.
      most: how many of them; all by default.
      batch_size: rows of a batch.

    Raises:
      ValueError: if there is no retriever, or no instance is asked for.
    """
    if most is not None and most < 1:
        raise ValueError(f"most={most} instances; look at one or more, or leave it out for all")
    program = _program(generated, _retriever(generated).instances)
    rows: list[np.ndarray] = []
    for batch in eval_batches(task, split, batch_size, labels=False):
        kept = batch["weights"] > 0
        rows.append(np.asarray(program(params, tree, batch["inputs"]))[kept])
        if most is not None and sum(map(len, rows)) >= most:
            break
    return np.concatenate(rows)[:most]


def retrieve(generated: Adapted, params: Any, tree: Any, task: Task, **options: Any) -> Retrieval:
    r"""Compares a task's instances with the prototypes of the known ones: :math:`\cos(z_i, k_t)`.

    Args:
      generated, params, tree, task, options: as for :func:`instance_codes`.

    Reference: what H. Zhao, J. Fu, Z. He, Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning, 2023, do with
    few examples of a new task is not in their code; this rule is ours.
    """
    z = instance_codes(generated, params, tree, task, **options)
    return Retrieval(generated.tasks, _unit(z) @ _unit(np.asarray(tree["tasks"], np.float32)).T)


def retrieval_table(
    generated: Adapted, params: Any, tree: Any, tasks: Iterable[Task] | Mapping[str, Task], **options: Any
) -> dict[str, dict[str, float]]:
    """Task -> known task -> share of its instances that are nearest to that prototype, on the validation split by default."""
    listed = tasks.values() if isinstance(tasks, Mapping) else tasks
    return {t.name: retrieve(generated, params, tree, t, **{"split": "validation", **options}).votes for t in listed}


def add_task(generated: Adapted, tree: Any, name: str, like: str | np.ndarray | Retrieval) -> tuple[Adapted, dict[str, Any]]:
    """A model and a tree that know one task more, whose prototype is that of a known one or a mixture.

    Args:
      generated: a model from ``generate`` with a hyper-network.
      tree: the generator's; left as it is.
      name: of the new task, which gets the last number.
      like: a known task's name; shares ``[task]``, such as :meth:`Retrieval.shares`; or a :class:`Retrieval`, whose nearest
        task it is.

    Returns:
      The model, without the contrastive losses, and the tree. To train the new prototype alone take
      ``dataclasses.replace(generator, tune="prototypes")``; those of other tasks have no gradient. ``weight_decay`` would
      shrink them all the same, since they are one leaf: leave it at 0.

    Raises:
      ValueError: if the name is taken, or ``like`` is none of these.
    """
    generator = _hypernetwork(generated)
    if name in generated.tasks:
        raise ValueError(f"the generator knows a task {name!r} already; give the new one another name")
    shares = np.zeros(len(generated.tasks), np.float32)
    if isinstance(like, Retrieval):
        like = like.nearest
    if isinstance(like, str):
        if like not in generated.tasks:
            raise ValueError(f"like={like!r} is not one of the known tasks {', '.join(generated.tasks)}")
        shares[generated.tasks.index(like)] = 1
    else:
        shares = np.asarray(like, np.float32)
        if shares.shape != (len(generated.tasks),) or not np.isfinite(shares).all():
            raise ValueError(
                f"like must be a name, or one finite share for each of {len(generated.tasks)} tasks; got {like!r:.80}"
            )
    grown = dataclasses.replace(generator, tasks=(*generated.tasks, name), weight=0.0)
    embeddings = jnp.asarray(tree["tasks"], jnp.float32)
    prototype = jnp.asarray(shares) @ embeddings
    inner = generated.origin.inner  # type: ignore[union-attr]
    return generate(inner, grown), {**tree, "tasks": jnp.concatenate([embeddings, prototype[None]])}  # type: ignore[arg-type]


def mean_adapters(
    generated: Adapted,
    params: Any,
    tree: Any,
    task: Task,
    *,
    split: str = "train",
    most: int = 256,
    batch_size: int = 16,
) -> Any:
    r"""One set of adapters for a task, from a generator that makes others for each instance.

    .. math:: \bar\phi_t = \frac{1}{N} \sum_{i=1}^N G_\psi(x_i, t)

    An approximation: the mean is that of the adapters and not of the outputs, or of the weight-space changes that factors such
    as LoRA's multiply out to. It is exact where all instances get the same adapters. With heads that are affine in a code, as
    those of :class:`HyperDecoder`, it is what they make of the mean code.

    Args:
      generated: a model from ``generate`` with a generator that looks at the instance, not linearized.
      params: base parameters.
      tree: the generator's.
      task: whose inputs; labels are not looked at. For a generator with tasks its name says which.
      split: whose inputs.
      most: :math:`N`, or fewer where there are no more.
      batch_size: rows whose adapters are held in memory at once.

    Returns:
      Adapters of the model that was given to ``generate``: ``generated.origin.inner``.

    Raises:
      ValueError: if the generator does not look at the instance, or there are no instances.

    Reference: for H. Ivison, M. Peters, Hyperdecoders: Instance-specific decoders for multi-task NLP, 2022, the mean is ours;
    they have no adapters of a task.
    """
    origin = generated.origin
    if origin is None or origin.mode is not None or getattr(origin.generator, "observe", None) is None:
        raise ValueError(
            "mean_adapters is for a model from generate(), not linearized, whose generator looks at the instance, as "
            "hyperdecoder(...) does; others give a task's adapters by generated.materialise(params, tree, task)"
        )
    if most < 1:
        raise ValueError(f"most={most} instances; take the mean over one or more")
    number = task_number(generated, task)
    total, count = None, 0.0
    for batch in eval_batches(task, split, batch_size, labels=False):
        weights = (np.asarray(batch["weights"]) > 0).astype(np.float32)
        weights *= np.cumsum(weights) <= most - count
        found = _summed(generated)(params, tree, batch["inputs"], number, weights)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += float(weights.sum())
        if count >= most:
            break
    if not count:
        raise ValueError(f"the split {split!r} of {task.name!r} has no instances to take the mean over; take another")
    return jax.tree.map(lambda leaf: leaf / jnp.float32(count), total)


def _hypernetwork(generated: Adapted) -> HyperNetwork:
    generator = None if generated.origin is None else generated.origin.generator
    if not isinstance(generator, HyperNetwork) or generated.origin.mode is not None:  # type: ignore[union-attr]
        raise ValueError("pass a model from generate() with a hyper-network, such as generators.pha(...), not linearized")
    return generator


def _retriever(generated: Adapted) -> HyperNetwork:
    generator = _hypernetwork(generated)
    if not generator.retriever:
        raise ValueError("this generator has no retriever; generators.pha(...) makes one that has")
    return generator


@functools.lru_cache(maxsize=16)
def _program(generated: Adapted, instances: str) -> Any:
    @jax.jit
    def codes(params: Any, tree: Any, inputs: Any) -> jax.Array:
        def outputs() -> Any:
            # Of an encoder whose adapters are the same for all tasks: any number will do.
            return generated.base(params, **inputs) if instances == "base" else generated.apply(params, tree, **inputs, task=0)

        retriever = _retriever(generated)
        flat = trees.flat(params["params"] if isinstance(params.get("params"), Mapping) else params)
        return retriever.retrieve(tree, retriever.seen(flat, outputs, inputs))

    return codes


@functools.lru_cache(maxsize=16)
def _summed(generated: Adapted) -> Any:
    @jax.jit
    def total(params: Any, tree: Any, inputs: Any, number: Any, weights: jax.Array) -> Any:
        rows = generated.materialise(params, tree, number, inputs)  # type: ignore[misc]
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), rows)

    return total


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
