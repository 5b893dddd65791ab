"""``generate(adapted, generator) -> Adapted``: a hyper-network makes the adapters, and its tree is the trained one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, Expansions
from pefusion_jax.deltas import Delta
from pefusion_jax.generators.layout import Layout, layout_of
from pefusion_jax.generators.names import listed, number_of
from pefusion_jax.rules import owner

Flat = dict[str, Any]


class Generator(Protocol):
    """What :func:`generate` asks of a generator: a frozen dataclass with pure functions.

    ``tasks``: names of the tasks that it makes different adapters for, in order; empty if it makes one set of adapters.
    It may also have ``auxiliary``, a loss beside the tasks' own, or ``None``: ``(tree, params, outputs, inputs, base) -> []``,
    where ``params`` are the base parameters by path, ``inputs`` have the entry ``task`` and ``base()`` runs the model without
    adapters on them; and ``kept(tree)``, path in the tree -> path of the adapter leaf that it is, for leaves that are not made.
    These are trained where the method trains them; a leaf that a method holds still cannot be made. ``reads(params, outputs,
    inputs)``, or ``None``, raises if the loss cannot read what there is, ``outputs()`` being the base model's.

    One that makes adapters for each row has ``observe(tree, params, inputs, base) -> [batch, ...]``, or a tree of such: what it
    sees of the rows, from the base parameters by path and the model's inputs by name. Its ``make`` is mapped over the rows and
    gets the pair ``(number or None, what it sees of the row)`` for ``task``.
    """

    @property
    def tasks(self) -> tuple[str, ...]: ...

    def init(self, key: jax.Array, adapters: Flat, params: Flat, layout: Layout) -> dict[str, Any]:
        """A tree for adapters with these paths and shapes; float32, nested."""
        ...

    def make(self, tree: Any, params: Flat, layout: Layout, task: Any) -> Flat:
        """Path -> adapter leaf, from the base parameters and the number of one task."""
        ...

    def trained(self, tree: Any) -> dict[str, Any]:
        """Nested dictionary of the leaves that are trained."""
        ...

    def moving(self, tree: Any) -> dict[str, Any]:
        """The trained leaves whose derivative does not vanish identically at ``tree``."""
        ...


def generate(adapted: Adapted, generator: Generator) -> Adapted:
    r"""Lets a generator make the adapters: :math:`f(x; \theta, G_\psi(\theta, t))`, where :math:`\psi` is trained.

    The result is an :class:`~pefusion_jax.adapt.Adapted` like any other, and its tree is the generator's. With ``tasks`` its
    ``apply`` takes ``task``, int32 ``[]`` or ``[groups]``: the rows of the batch are ``groups`` blocks of equal size, in order,
    and each block belongs to one task. A single number costs what the plain adapter costs, beside the generation; with several,
    the model is mapped over the blocks, whose adapters are made once for each task present or for each task there is, whichever
    are fewer. A traced number that no task has gives adapters of NaN, since nothing can be raised. A generator that looks at
    the instance makes adapters for each row and maps the model over the rows.

    Args:
      adapted: what ``adapt`` returned.
      generator: of :mod:`pefusion_jax.generators`.

    Returns:
      The model. ``materialise(params, tree, task)`` gives the adapters of ``adapted`` for one task: to serve, to save, to
      export, to fuse or to linearize like any other. ``deltas`` exist if the generator makes one set of adapters. Where it
      looks at the instance, ``materialise(params, tree, task, inputs)`` gives adapters with the rows of the dictionary
      ``inputs`` in front, and :func:`~pefusion_jax.generators.mean_adapters` a task's mean.

    Raises:
      ValueError: if ``adapted`` is linearized (linearize the result), or generated already; and, by ``init`` and ``apply``, if
        generator and adapters do not belong together, such as a generator that would make what the method holds still.

    Example::

      made = generate(adapt(model, LoRA(rank=8, targets=r".*/(query|value)")), CondLoRA())
      theta = made.init(jax.random.key(0), params, **batch)
      adapters = made.materialise(params, theta)
    """
    if adapted.expand is None:
        raise ValueError("the model is linearized; generate first and linearize the result: linearize(generate(adapted, ...))")
    if adapted.materialise is not None:
        raise ValueError("the adapters of this model are generated already; pass what adapt() returned")
    if adapted.origin is None:
        raise ValueError("the model does not say which methods it was adapted with; pass what adapt() returned")
    methods = adapted.origin.methods
    inner = adapted.expand
    loss, observe = getattr(generator, "auxiliary", None), getattr(generator, "observe", None)

    def described(params: Any) -> tuple[Flat, Layout]:
        base = params["params"] if isinstance(params.get("params"), Mapping) else params
        return trees.flat(base), layout_of(base, lambda path: owner(methods, path) is not None)

    def kept(tree: Any) -> dict[str, str]:
        return generator.kept(tree) if hasattr(generator, "kept") else {}

    def without_held(picked: Any, tree: Any) -> dict[str, Any]:
        """Without the adapters' own leaves that their method holds still."""
        held = {at for at, path in kept(tree).items() if not _trains(methods, path)}
        return trees.nest({path: leaf for path, leaf in trees.flat(picked).items() if path not in held})

    def one(params: Any, tree: Any, task: Any) -> Any:
        flat, layout = described(params)
        made = generator.make(tree, flat, layout, task)
        if generator.tasks:
            # The number of no task, see numbers(): to index with it would make the last task's.
            known = (task if observe is None else task[0]) < len(generator.tasks)
            made = {path: jnp.where(known, leaf, jnp.nan) for path, leaf in made.items()}
        for path in made:
            if not layout.adapted(path):
                raise ValueError(
                    f"the generator makes a leaf {path!r}, which no method of this model has: its targets are others than the "
                    "adapters'. Make the tree with init() of this model"
                )
        return trees.nest(made)

    def several(params: Any, tree: Any, ids: jax.Array) -> Any:
        """Adapters with the blocks in front."""
        if ids.shape[0] <= len(generator.tasks):
            return jax.vmap(lambda task: one(params, tree, task))(ids)
        every = jax.vmap(lambda task: one(params, tree, task))(jnp.arange(len(generator.tasks), dtype=jnp.int32))
        return jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0), every)  # NaN for the number of no task

    def maker(params: Any, ids: Any, inputs: Any, kwargs: Any) -> Callable[[Any], Any]:
        """Tree -> adapters; with the blocks in front where there are several, with the rows where these are observed."""
        if observe is None:
            return lambda tree: (one if ids is None or ids.ndim == 0 else several)(params, tree, ids)
        named = _named(adapted.origin.model, inputs, kwargs)  # type: ignore[union-attr]
        still = _still(kwargs)

        def of(tree: Any) -> Any:
            seen = observe(tree, described(params)[0], named, lambda: adapted.base(params, *inputs, **still))
            batch = jax.tree.leaves(seen)[0].shape[0]
            rows = None if ids is None else jnp.repeat(ids.reshape(-1), _rows(ids.size, batch))
            return jax.vmap(lambda *row: one(params, tree, row))(rows, seen)

        return of

    def adapters(of: Callable[[Any], Any], parts: Sequence[Any], exact: bool) -> tuple[Any, ...]:
        """The adapters, and if there is a displacement of the tree theirs, to first order or exactly."""
        if len(parts) == 1:
            return (of(parts[0]),)
        if not exact:
            return jax.jvp(of, (parts[0],), (parts[1],))
        before, after = of(parts[0]), of(jax.tree.map(jnp.add, *parts))
        return before, jax.tree.map(jnp.subtract, after, before)

    def numbers(task: Any) -> Any:
        """Checked task numbers: ``None``, ``[]``, or ``[groups]`` with more than one group.

        Traced ones cannot be refused: those out of range, negative ones too, become the number of tasks, for which the
        adapters are NaN.
        """
        if not generator.tasks:
            if task is not None:
                raise ValueError("this generator makes one set of adapters for all inputs; leave out task=")
            return None
        if task is None:
            raise ValueError(f"say which task: pass task= with numbers into {listed(generator.tasks)}")
        if isinstance(task, str):
            return jnp.int32(number_of(generator.tasks, task))
        if not isinstance(task, jax.core.Tracer):
            known = np.asarray(task)
            if known.dtype.kind not in "iu" or not known.size or not 0 <= known.min() <= known.max() < len(generator.tasks):
                raise ValueError(
                    f"task={task!r:.80} must be numbers from 0 to {len(generator.tasks) - 1}: {listed(generator.tasks)}; "
                    "at least one"
                )
        ids = jnp.asarray(task, jnp.int32)
        if isinstance(ids, jax.core.Tracer):
            ids = jnp.where((ids >= 0) & (ids < len(generator.tasks)), ids, len(generator.tasks))
        if ids.ndim > 1 or not ids.size:
            raise ValueError(f"task has the shape {ids.shape}; it must be one number, or [groups]")
        return ids[0] if ids.shape == (1,) else ids

    def run(call: Any, params: Any, parts: Sequence[Any], inputs: Any, task: Any, rngs: Any, kwargs: Any, exact: bool) -> Any:
        ids = numbers(task)
        made = adapters(maker(params, ids, inputs, kwargs), parts, exact)
        if observe is None and (ids is None or ids.ndim == 0):
            return call(params, made, *inputs, **({} if rngs is None else {"rngs": rngs}), **kwargs)
        return _by_block(call, jax.tree.leaves(made)[0].shape[0], params, made, inputs, rngs, kwargs)

    def init(key: jax.Array, params: Any, *inputs: Any, task: Any = None, **kwargs: Any) -> Any:
        del task  # the tree is the same for all
        template_key, tree_key = jax.random.split(key)
        template = trees.flat(adapted.init(template_key, params, *inputs, **kwargs))
        flat, layout = described(params)
        reads = getattr(generator, "reads", None)
        if reads is not None:
            named = _named(adapted.origin.model, inputs, kwargs)  # type: ignore[union-attr]

            def read(params: Any) -> Any:
                return reads(described(params)[0], lambda: adapted.base(params, *inputs, **_still(kwargs)), named)

            jax.eval_shape(read, params)
        tree = generator.init(tree_key, template, flat, layout)
        first = jnp.int32(0) if generator.tasks else None
        shapes = jax.eval_shape(lambda params, tree: maker(params, first, inputs, kwargs)(tree), params, tree)
        made = {path: leaf.shape[observe is not None :] for path, leaf in trees.flat(shapes).items()}
        if made != {path: leaf.shape for path, leaf in template.items()}:
            odd = next(
                path for path in sorted({**made, **template}) if made.get(path) != getattr(template.get(path), "shape", None)
            )
            raise ValueError(
                f"{type(generator).__name__} makes {made.get(odd, 'nothing')} at {odd!r}, where the adapters have "
                f"{getattr(template.get(odd), 'shape', 'nothing')}"
            )
        still = next((path for path in sorted({*template} - {*kept(tree).values()}) if not _trains(methods, path)), None)
        if still is not None:
            method = type(owner(methods, still)).__name__
            raise ValueError(
                f"{method} holds {still!r} still, but {type(generator).__name__} makes it of what is trained, so that it would "
                f"move all the same: freeze_a has no meaning here. Use {method} without it, or PerTask, which keeps leaves"
            )
        return tree

    def apply(params: Any, tree: Any, *inputs: Any, task: Any = None, rngs: Any = None, **kwargs: Any) -> Any:
        def call(params: Any, made: Any, *inputs: Any, **kwargs: Any) -> Any:
            return adapted.apply(params, made[0], *inputs, **kwargs)

        return run(call, params, (tree,), inputs, task, rngs, kwargs, False)

    def base(params: Any, *inputs: Any, task: Any = None, **kwargs: Any) -> Any:
        del task
        return adapted.base(params, *inputs, **kwargs)

    def materialise(params: Any, tree: Any, task: Any = None, inputs: Any = None) -> Any:
        if inputs is None:
            _refuse(observe)
        ids = numbers(0 if task is None and len(generator.tasks) == 1 else task) if generator.tasks else None
        return maker(params, ids, (), inputs or {})(tree)

    def deltas(params: Any, tree: Any) -> Delta:
        _refuse(observe, generator.tasks)
        return adapted.deltas(params, one(params, tree, None))

    def apply_deltas(params: Any, delta: Delta, *inputs: Any, task: Any = None, **kwargs: Any) -> Any:
        del task
        return adapted.apply_deltas(params, delta, *inputs, **kwargs)

    def expand(branch: Any, change: Any, exact: bool = False) -> Any:
        call = inner.forward(branch, change)

        def forward(params: Any, parts: Any, *inputs: Any, task: Any = None, rngs: Any = None, **kwargs: Any) -> Any:
            return run(call, params, parts, inputs, task, rngs, kwargs, exact)

        return forward

    def changes(params: Any, parts: Any, change: Any, exact: bool = False) -> Delta:
        _refuse(observe, generator.tasks)
        return inner.changes(params, adapters(maker(params, None, (), {}), parts, exact), change)

    def auxiliary(params: Any, tree: Any, outputs: Any, inputs: Any) -> jax.Array:
        return loss(tree, described(params)[0], outputs, inputs, lambda: base(params, **inputs))  # type: ignore[misc]

    return Adapted(
        init=init,
        apply=apply,
        base=base,
        deltas=deltas,
        apply_deltas=apply_deltas,
        trainable=lambda tree: without_held(generator.trained(tree), tree),
        moving=lambda tree: without_held(generator.moving(tree), tree),
        pushforward=None,
        expand=Expansions(forward=expand, changes=changes),
        folds=adapted.folds and not generator.tasks and observe is None,
        origin=dataclasses.replace(adapted.origin, generator=generator, inner=adapted),
        tasks=generator.tasks,
        materialise=materialise,
        auxiliary=None if loss is None else auxiliary,
    )


def _trains(methods: Sequence[Any], path: str) -> bool:
    """Whether an adapter leaf's method trains it."""
    rule, name = owner(methods, path), path.rpartition("/")[2]
    return rule is None or name in rule.trained({name: None})  # a leaf of no method: its user is told elsewhere


def _refuse(observe: Any, tasks: Sequence[str] = ()) -> None:
    if observe is not None:
        raise ValueError(
            "the generator makes other adapters for each input, so a task has no adapters and no weight-space change; take the "
            "mean over instances, an approximation: "
            'generators.mean_adapters(generated, params, tree, task_data, split="train", most=256)'
        )
    if tasks:
        raise ValueError(
            "the generator makes other adapters for each task, so there is no one weight-space change; take one task's: "
            f"adapted.deltas(params, generated.materialise(params, tree, {tasks[0]!r})), with the model given to generate()"
        )


def _named(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call by name."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return {**inputs[0], **kwargs}
    given = inspect.signature(type(model).__call__).bind_partial(model, *inputs).arguments
    return {**dict(list(given.items())[1:]), **kwargs}


def _still(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call of the base model that is not random: it gets no keys."""
    return {name: True if name == "deterministic" else value for name, value in kwargs.items()}


def _rows(groups: int, batch: int | None) -> int:
    """The rows of a block."""
    if batch is None or batch % groups:
        raise ValueError(
            f"{groups} groups do not divide a batch of {batch} rows; task must be [groups] with batch % groups == 0"
        )
    return batch // groups


def _by_block(call: Any, groups: int, params: Any, made: Any, inputs: Any, rngs: Any, kwargs: Any) -> Any:
    """Maps the model over blocks of rows, each with its own adapters."""
    flat, structure = jax.tree.flatten((inputs, kwargs))
    batch = next((leaf.shape[0] for leaf in flat if getattr(leaf, "ndim", 0)), None)
    size = _rows(groups, batch)
    is_rows = [getattr(leaf, "ndim", 0) > 0 and leaf.shape[0] == batch for leaf in flat]
    rows = [leaf.reshape(groups, size, *leaf.shape[1:]) for leaf, mapped in zip(flat, is_rows, strict=True) if mapped]
    keys = None if rngs is None else jax.tree.map(lambda key: jax.random.split(key, groups), rngs)

    def block(adapters: Any, rows: Any, keys: Any) -> Any:
        given = iter(rows)
        leaves = [next(given) if mapped else leaf for leaf, mapped in zip(flat, is_rows, strict=True)]
        args, more = jax.tree.unflatten(structure, leaves)
        return call(params, adapters, *args, **({} if keys is None else {"rngs": keys}), **more)

    outputs = jax.vmap(block)(made, rows, keys)
    # Which inputs are rows is a guess, and outputs may tell more of a batch than its rows: similarities of all with all.
    one = jax.tree.map(lambda leaf: leaf[0], made)
    whole = jax.eval_shape(lambda: call(params, one, *inputs, **({} if rngs is None else {"rngs": rngs}), **kwargs))

    def joined(path: Any, leaf: jax.Array, expected: Any) -> jax.Array:
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), (batch, *leaf.shape[2:])
        if leaf.ndim < 2 or leaf.shape[1] != size or shape != expected.shape:
            raise ValueError(
                f"the output {name!r} is {leaf.shape[1:]} for a block of {size} rows and {expected.shape} for the batch of "
                f"{batch}, so blocks cannot be joined (a cache, similarities of all rows, inputs with other numbers of rows?); "
                "call it for one task at a time, or the model given to generate() with adapters from materialise() or "
                "mean_adapters()"
            )
        return leaf.reshape(shape)

    return jax.tree_util.tree_map_with_path(joined, outputs, whole)
