"""Methods that go by name: each task's statistics are matched to its tree, parameter by parameter, with readable refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.deltas import Change, LowRank, dense, weighted_sum
from pefusion_jax.fusion.parts import Changes, Fusion
from pefusion_jax.in_turn import in_turn
from pefusion_jax.moments import Moments

One = Callable[[str, tuple[Change, ...], list[Any]], Change]


def check(off_diagonal: Any, damping: float) -> None:
    """Refuses a shrinkage outside [0, 1] or a damping outside [0, 1), as far as they are known now."""
    if not isinstance(off_diagonal, jax.core.Tracer) and not 0.0 <= float(off_diagonal) <= 1.0:
        raise ValueError(f"off_diagonal={off_diagonal} is a factor in [0, 1]")
    if not isinstance(damping, jax.core.Tracer) and not 0.0 <= float(damping) < 1.0:
        raise ValueError(f"damping={damping} is relative to the mean eigenvalue; it must be in [0, 1)")


def unbound(stacked: Any) -> Any:
    """What a method that goes by names does without them: it says how to give them."""
    raise ValueError("this method goes by the names of the tasks; use it with fuse(method, {task name: tree}, ...)")


def require(by_task: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Refuses trees for whose names there is no entry."""
    for name in names:
        if name not in by_task:
            raise ValueError(
                f"there are no {what} for the task {name!r}{trees.did_you_mean(name, by_task)}; give {what} for each tree, "
                "under the same name"
            )


def require_outputs(by_task: Mapping[str, Mapping[str, Moments]]) -> None:
    """Refuses statistics without output moments, naming the task and the parameter."""
    for name, moments in by_task.items():
        for path, found in moments.items():
            if found.outputs is None:
                raise ValueError(
                    f"the statistics of {name!r} have no output moments at {path!r}; collect kinds=('inputs', 'outputs')"
                )


def moments_shape(found: Moments) -> tuple[int, ...]:
    """Sizes of what the moments are of: ``[*batch, in]`` and perhaps ``out``."""
    inputs = tuple(found.inputs.shape[:-1])
    return inputs if found.outputs is None else (*inputs, found.outputs.shape[-1])


def matched(
    by_task: Mapping[str, Mapping[str, Any]], names: tuple[str, ...], by_path: Changes, shape: Callable[[Any], Any]
) -> tuple[dict[str, list[Any]], list[str]]:
    """For each parameter what each task knows of it (``None``: nothing), and the parameters that nobody knows."""
    found: dict[str, list[Any]] = {}
    plain = []
    for path, changes in by_path.items():
        here = [by_task[name].get(path) for name in names]
        if all(one is None for one in here):
            plain.append(path)
            continue
        for name, one, change in zip(names, here, changes, strict=True):
            if one is None and not _is_nothing(change):
                raise ValueError(
                    f"the statistics of {name!r} lack {path!r}, which its tree changes"
                    f"{trees.did_you_mean(path, by_task[name])}; "
                    "collect them again, of this tree"
                )
            if one is not None:
                _require_shape(name, path, one, change, shape)
        found[path] = here
    if not found:
        known = sorted({path for name in names for path in by_task[name]})
        path = next(iter(by_path), "")
        raise ValueError(
            f"the statistics are of other parameters than the trees, such as {path!r}{trees.did_you_mean(path, known)}"
        )
    return found, plain


def _require_shape(name: str, path: str, found: Any, change: Change, shape: Callable[[Any], Any]) -> None:
    if isinstance(found, Moments):
        size, sizes = 1, shape(found)
        for axis in change.shape:
            size *= axis
        whole = 1
        for axis in sizes or ():
            whole *= axis
        fits = sizes is None or (size == whole if found.outputs is not None else size % whole == 0)
        if isinstance(change, LowRank) and sizes is not None:
            fits = fits and tuple(change.a.shape[:-1]) == tuple(found.inputs.shape[:-1])
    else:
        fits, sizes = tuple(found.shape) == tuple(change.shape), found.shape
    if not fits:
        raise ValueError(
            f"the statistics of {name!r} at {path!r} are of a matrix {list(sizes or ())}, but the change has shape "
            f"{list(change.shape)}; collect them again, of this tree"
        )


def _is_nothing(change: Change) -> bool:
    if isinstance(change, LowRank):
        return change.rank == 0
    return not isinstance(change, jax.core.Tracer) and not bool(jnp.any(change))


def by_name(by_task: Mapping[str, Mapping[str, Any]], one: One, scale: Any, shape: Callable[[Any], Any], kinds: str) -> Fusion:
    """A method that combines one parameter at a time, by what each task knows of it; the others are averaged."""

    def bind(names: tuple[str, ...]) -> Fusion:
        require(by_task, names, f"statistics ({kinds})")

        def changes(by_path: Changes) -> dict[str, Change]:
            found, plain = matched(by_task, names, by_path, shape)
            if len(names) == 1:
                return {path: scaled(of_tasks[0], scale) for path, of_tasks in by_path.items()}
            made = in_turn(lambda item: one(*item), [(path, by_path[path], found[path]) for path in found])
            out = {**dict(zip(found, made, strict=True)), **{path: averaged(by_path[path]) for path in plain}}
            return {path: scaled(change, scale) for path, change in out.items()}

        return fusion_of(changes)

    return Fusion(unbound, bind=bind)


def fusion_of(changes: Callable[[Changes], dict[str, Change]]) -> Fusion:
    """A bound method; a plain tree is taken for changes of the parameters of its paths."""

    def apply(stacked: Any) -> Any:
        by_path = {path: tuple(leaf.astype(trees.wide_dtype(leaf.dtype))) for path, leaf in trees.paths(stacked).items()}
        out = changes(by_path)
        return trees.map_paths(lambda path, leaf: dense(out[path]).astype(leaf.dtype), stacked)

    return Fusion(apply, changes=changes)


def scaled(change: Change, scale: Any) -> Change:
    """The change times a scale; at a scale of 1 the very change, bit for bit."""
    if isinstance(scale, (int, float)) and scale == 1:
        return change
    return change * jnp.asarray(scale, change.dtype)


def averaged(changes: tuple[Change, ...]) -> Change:
    """The plain average; pairs stay pairs."""
    weight = jnp.full((len(changes),), 1.0 / len(changes), changes[0].dtype)
    return weighted_sum(list(changes), weight)
