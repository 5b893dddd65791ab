"""Collects second moments and Fisher diagonals of one tuned model on its own unlabelled data.

How: every adapted layer gets a second kind of adapter, whose branch adds zero and whose *gradient* is defined as the
moments of what came in and of the gradient that came back. So one backward pass sums them up, layer by layer, in loops, under
``nn.remat`` and in scans alike, and no activation is kept that training would not keep.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.deltas import Delta, LowRank, fold
from pefusion_jax.layers import Layer
from pefusion_jax.layerwise import separate, stacked_layers
from pefusion_jax.moments import Moments, Statistics, diagonal_moment
from pefusion_jax.probes import INPUTS, MIXED, OUTPUTS, ROWS, Probe, listen, observe, row_weights
from pefusion_jax.tasks.metrics import token_cross_entropy
from pefusion_jax.tasks.task import Batch, Head, Task, eval_batches, task_number, train_batch

KINDS = ("inputs", "outputs", "fisher")


def statistics(
    adapted: Adapted,
    params: Any,
    tree: Any,
    data: Task | Iterable[Batch],
    *,
    head: Head | None = None,
    kinds: Collection[str] = ("inputs", "outputs"),
    examples: int = 128,
    batch_size: int = 32,
    split: str = "train",
    seed: int = 0,
    paths: Collection[str] = (),
    stacks: Collection[str] = STACKS,
    likelihood: Literal["categorical", "gaussian"] | None = None,
) -> Statistics:
    r"""Moments at the adapted layers of a tuned model, on its own inputs and its own predictions; labels are not used.

    .. math:: G = \frac{1}{\sum_p m_p} \sum_p m_p\, x_p x_p^\top, \qquad S = \frac1N \sum_p m_p\, g_p g_p^\top, \qquad
       F_{ij} = \frac1N \sum_n (\partial \log p(\hat y_n | x_n) / \partial W_{ij})^2

    over the positions :math:`p` (tokens, patches) of :math:`N` examples: :math:`x_p` is what the layer multiplies its weight
    by, :math:`g_p = \nabla_{y_p} \log p(\hat y | x)`, and :math:`\hat y` is drawn from the model's own prediction. :math:`m_p`
    is 0 for rows that fill up a batch and for padding: where the positions are those of ``attention_mask``, or of
    ``decoder_attention_mask`` for layers that read the decoder's tokens. A position that has no mask of its own counts with its
    example.

    A generated model is taken with the adapters that it makes for the task. A plain or layer-wise linearized model is taken
    with its change folded into the weights. A model that is affine in its change (``network``, ``weight``) has the layers'
    inputs of its point of expansion, and the gradients of its own, affine prediction, pulled back through its own Jacobian:
    these are the moments of its exact Fisher information.

    Weights of a convolution are read as matrices over patches. For an embedding :math:`G` is diagonal, the frequencies of
    the rows; what a tied output head (``attend``) does with the table is not counted. A module that is called several times
    sums over its calls. Parameters of other modules (norms) have no moments, only a Fisher diagonal; nor has a table that is
    read once for all rows of a batch (BERT's positions, the distances of T5 and MPNet), nor a dense change of an einsum whose
    weight has its input axes between its output axes. What has no moments is averaged by the methods that use them.

    Args:
      adapted: the model, plain or linearized; made with :func:`~pefusion_jax.adapt.adapt`.
      params: its base parameters.
      tree: adapters, displacement or :class:`~pefusion_jax.deltas.Delta`: the tuned model.
      data: a task, whose inputs and head are used, or batches.
      head: for batches: the head that turns outputs into a prediction.
      kinds: what to collect, of ``inputs`` (:math:`G`), ``outputs`` (:math:`S`, needs the first) and ``fisher`` (:math:`F`, one
        backward pass an example).
      examples: number of examples of a task, at most those it has; batches are used whole.
      batch_size: rows of a task's batches; rounding aside, the result does not depend on it.
      split: of a task; training examples come in the order of a permutation, others in their own.
      seed: of the permutation and of the draws.
      paths: parameters wanted besides those that the tree changes, in the paths of ``params``: where tasks have adapted
        different layers, those of the other tasks.
      stacks: names of nodes below which layers may be stacked by a scan, as in :func:`~pefusion_jax.fusion.fuse`.
      likelihood: ``categorical`` (softmax) or ``gaussian`` (unit variance, for a regression); a task's own by default.

    Returns:
      Float32 statistics.

    Raises:
      ValueError: for unknown kinds, a model without weight-space changes, batches without a head or without rows, and layers
        whose positions are not told from the rows of a batch, or the encoder's from the decoder's.

    Example::

      stats = {t.name: statistics(lora, params, taus[t.name], t) for t in tasks}
      merged = fuse(fusion.gram(stats), taus, adapted=lora, params=params)

    Reference: J. Martens and R. Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015;
    M. Matena and C. Raffel, Merging Models with Fisher-Weighted Averaging, 2022 (the diagonal; they take the expectation over
    the classes where we draw one).
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds or ("outputs" in kinds and "inputs" not in kinds):
        raise ValueError(f"kinds={tuple(kinds)!r} must be of {', '.join(map(repr, KINDS))}, with 'inputs' where 'outputs' is")
    if examples < 1 or batch_size < 1:
        raise ValueError(f"examples={examples} and batch_size={batch_size} must be 1 or more")
    if isinstance(data, Task):
        head = data.head
        likelihood = likelihood or ("categorical" if data.classes or data.loss is token_cross_entropy else "gaussian")
    if head is None:
        raise ValueError("batches come without a prediction: pass head=, as a task has it, or pass the task")
    if adapted.tasks and isinstance(data, Task) and not isinstance(tree, Delta):
        task_number(adapted, data)
        origin: Any = adapted.origin
        if origin is not None and origin.mode is None:  # the adapters that are made for this task, in the model that takes them
            tree, adapted = adapted.materialise(params, tree, data.name), origin.inner  # type: ignore[misc]
    delta = tree if isinstance(tree, Delta) else adapted.deltas(params, tree)
    start, affine = _base_point(adapted, params, delta)
    weights = trees.flat(start["params"] if isinstance(start.get("params"), Mapping) else start)
    for path in paths:
        if path not in weights:
            raise ValueError(f"no parameter {path!r} to collect moments of{trees.did_you_mean(path, weights)}")
    wanted = sorted({*delta.leaves, *paths})
    sites = tuple(sorted({p.rpartition("/")[0] for p in wanted if p.rpartition("/")[2] in ("kernel", "embedding", "bias")}))

    batches = _batches(data, split, batch_size, examples, seed)
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no batches to collect statistics from; pass at least one")
    probes: Any = {}
    probed = None
    if "inputs" in kinds:
        probed = _probed(adapted, sites)
        shapes = jax.eval_shape(functools.partial(probed.init, jax.random.key(0), start), **first["inputs"])
        probes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    fishers = {path: jnp.zeros(weights[path].shape, jnp.float32) for path in wanted} if "fisher" in kinds else {}
    run = _program(
        adapted,
        probed,
        head.features,
        head.logits,
        likelihood or "categorical",
        isinstance(tree, Delta),
        affine,
        "outputs" in kinds,
    )
    total: Any = (probes, fishers, jnp.zeros((), jnp.float32))
    key = jax.random.key(seed)
    place = 0
    for batch in itertools.chain([first], batches):
        given = (batch["inputs"], jnp.asarray(batch["weights"], jnp.float32), key, jnp.uint32(place))
        place += len(batch["weights"])
        total = run(total, start, params if affine else {}, tree if affine else {}, head.params, *given)
    sums, fishers, count = total
    rows = int(count)
    if rows == 0:
        raise ValueError("all rows of the batches have weight 0: there is nothing to collect statistics from")
    moments = _moments(trees.flat(sums), wanted, delta, count, "outputs" in kinds)
    return _by_layer(moments, {path: f / count for path, f in fishers.items()}, delta, weights, stacks, rows)


def _batches(data: Any, split: str, batch_size: int, examples: int, seed: int) -> Any:
    if not isinstance(data, Task):
        yield from data
        return
    size = min(examples, len(data.split(split)))
    batches = eval_batches(data, split, batch_size, labels=False) if split != "train" else None
    for step, first in enumerate(range(0, size, batch_size)):
        batch = dict(train_batch(data, step, batch_size, seed, labels=False) if batches is None else next(batches))
        batch["weights"] = np.where(np.arange(batch_size) < size - first, batch["weights"], 0.0).astype(np.float32)
        yield batch


def _base_point(adapted: Adapted, params: Any, delta: Delta) -> tuple[Any, bool]:
    """The weights at which the model is differentiated, and whether its prediction is made by their tangent."""
    origin = adapted.origin
    if origin is None:
        raise ValueError("the model does not say what it was made of; collect statistics of a model made with pf.adapt")
    if origin.plain is not None:
        params = fold(params, origin.plain.deltas(params, origin.adapters0))
    affine = origin.mode in ("network", "weight")
    return (params if affine else fold(params, delta)), affine


@functools.lru_cache(maxsize=32)
def _probed(adapted: Adapted, sites: tuple[str, ...]) -> Adapted:
    if not sites:
        raise ValueError("no linear layer is adapted, so that there are no moments; collect kinds=('fisher',)")
    origin: Any = adapted.origin
    return adapt(origin.model, Probe("|".join(map(re.escape, sites))))


# Keyed by functions and by the model; arrays are always arguments of the programs.
@functools.lru_cache(maxsize=32)
def _program(
    adapted: Adapted,
    probed: Any,
    features: Callable[..., jax.Array],
    logits: Callable[..., jax.Array],
    likelihood: str,
    is_delta: bool,
    affine: bool,
    with_outputs: bool,
) -> Callable[..., Any]:
    def prediction(params: Any, tree: Any, inputs: Any) -> Any:
        return (adapted.apply_deltas if is_delta else adapted.apply)(params, tree, **inputs)

    def cotangent(outputs: Any, head_params: Any, inputs: Any, keys: jax.Array) -> Any:
        """Gradient in the outputs of the log-likelihoods, summed over the rows, of labels that the model itself draws."""

        def score(outputs: Any) -> jax.Array:
            z = logits(head_params, features(outputs, inputs)).astype(jnp.float32)
            fixed = jax.lax.stop_gradient(z)
            if likelihood == "gaussian":
                noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
                return jnp.sum(noise * (z - fixed))
            drawn = jax.vmap(jax.random.categorical)(keys, fixed)
            return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), drawn[..., None], axis=-1))

        return jax.grad(score, allow_int=True)(outputs)

    def sums_of(probes: Any, start: Any, params: Any, tree: Any, head_params: Any, inputs: Any, weights: Any, keys: Any) -> Any:
        def positions_of(inputs: Any) -> dict[str, set[tuple[int, ...]]]:
            found: dict[str, set[tuple[int, ...]]] = {}

            def branch(rule: Any, layer: Layer, leaves: Any, x: Any, y: jax.Array, _: Any) -> jax.Array:
                read = _read(layer, leaves[0], x)
                if read is not None:
                    found.setdefault(layer.path, set()).add(read[1])
                return jnp.zeros_like(y)

            forward = probed.expand.forward(branch, None)
            jax.eval_shape(lambda inputs: forward(start, (probes,), **inputs), inputs)
            return found

        calls = listen(positions_of, inputs, len(weights))

        def branch(rule: Any, layer: Layer, leaves: Any, x: Any, y: jax.Array, _: Any) -> jax.Array:
            read = _read(layer, leaves[0], x)
            if read is None:
                return jnp.zeros_like(y)
            rows, positions, inner = read
            counted = row_weights(layer.path, x, positions, weights, inputs, calls)
            if counted is None:
                return jnp.zeros_like(y)
            like = jnp.zeros((*rows.shape[:inner], *positions, leaves[0][OUTPUTS].shape[-1]), y.dtype)
            return layer.place(observe(leaves[0], rows, counted, like), y)

        forward = probed.expand.forward(branch, None)
        outputs, pull = jax.vjp(lambda leaves: forward(start, (leaves,), **inputs), probes)
        predicted = prediction(params, tree, inputs) if affine else outputs
        found = pull(cotangent(predicted, head_params, inputs, keys))[0]
        if not with_outputs:  # not returned, so that XLA does not compute them
            flat = trees.flat(found)
            found = trees.nest({p: jnp.zeros_like(v) if p.endswith(OUTPUTS) else v for p, v in flat.items()})
        return found

    def squares_of(
        fishers: Any, start: Any, params: Any, tree: Any, head_params: Any, inputs: Any, weights: Any, keys: Any
    ) -> Any:
        def one(total: Any, example: Any) -> Any:
            row, weight, key = example
            row = jax.tree.map(lambda value: value[None], row)

            def forward(change: Any) -> Any:
                return adapted.base(fold(start, Delta(change)), **row)

            outputs, pull = jax.vjp(forward, jax.tree.map(jnp.zeros_like, fishers))
            predicted = prediction(params, tree, row) if affine else outputs
            found = pull(cotangent(predicted, head_params, row, key[None]))[0]
            return jax.tree.map(lambda t, g: t + weight * jnp.square(g), total, found), None

        kept = (weights > 0).astype(jnp.float32)
        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, fishers), (inputs, kept, keys))[0]

    @jax.jit
    def run(total: Any, *args: Any) -> Any:
        probes, fishers, count = total
        start, params, tree, head_params, inputs, weights, key, first = args
        weights = (weights > 0).astype(jnp.float32)
        # A draw depends on the example's place alone: the same for moments and Fisher information, and for every batch size.
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(first + jnp.arange(len(weights), dtype=jnp.uint32))
        given = (start, params, tree, head_params, inputs, weights, keys)
        if probes:
            found = sums_of(jax.tree.map(jnp.zeros_like, probes), *given)
            probes = jax.tree.map(jnp.add, probes, found)
        if fishers:
            fishers = jax.tree.map(jnp.add, fishers, squares_of(fishers, *given))
        return probes, fishers, count + jnp.sum(weights)

    return run


def _read(layer: Layer, leaves: Any, x: Any) -> tuple[jax.Array, tuple[int, ...], int] | None:
    """What the weight is multiplied by, at which positions, behind how many axes of the weight's own; or nothing."""
    inner = leaves[OUTPUTS].ndim - 2
    if layer.rows is None:  # a tied output head has activations for ids
        return None if jnp.issubdtype(x.dtype, jnp.floating) else (x, x.shape, inner)
    rows = layer.rows(x)
    return rows, rows.shape[inner:-1], inner


def _moments(sums: dict[str, Any], wanted: list[str], delta: Delta, count: Any, with_outputs: bool) -> dict[str, Moments]:
    found = {}
    for path in wanted:
        site, _, name = path.rpartition("/")
        prefix = site + "/" if site else ""
        if prefix + ROWS not in sums or name not in ("kernel", "embedding", "bias"):
            continue
        change = delta.leaves.get(path)
        if prefix + MIXED in sums and not isinstance(change, LowRank) and name != "bias":
            continue  # nothing says which of its axes are inputs
        g, s, rows = (sums[prefix + leaf] for leaf in (INPUTS, OUTPUTS, ROWS))
        if not np.any(rows):
            continue  # read once for all rows
        rows = jnp.maximum(rows, jnp.finfo(jnp.float32).tiny)
        outputs = s / count if with_outputs else None
        inputs: Any = g / rows.reshape(*rows.shape, *(1,) * (g.ndim - rows.ndim))
        if name == "bias":
            inputs = jnp.ones((*rows.shape, 1, 1), jnp.float32)
        elif g.ndim - rows.ndim == 1:
            inputs = diagonal_moment(inputs)
        found[path] = Moments(inputs, outputs, change.axes if isinstance(change, LowRank) else None)
    return found


def _by_layer(
    moments: dict[str, Moments], fisher: dict[str, Any], delta: Delta, weights: Mapping[str, Any], stacks: Any, rows: int
) -> Statistics:
    """Gives the layers that a scan has stacked a path each, as ``fuse`` does with the changes."""
    shapes = {path: (jax.ShapeDtypeStruct(weights[path].shape, jnp.float32),) for path in {*moments, *fisher}}
    counts = stacked_layers(shapes, stacks)
    # The leaves below a node may agree in their leading axis by chance; the moments of stacked layers have one of their own.
    for path, found in moments.items():
        node = next((node for node in counts if path.startswith(node + "/")), None)
        if node is not None and len(found.inputs.shape) < 3:
            del counts[node]

    def split(values: Mapping[str, Any]) -> dict[str, Any]:
        return {path: value[0] for path, value in separate({p: (v,) for p, v in values.items()}, counts).items()}

    return Statistics(split(moments), split(fisher), rows)
