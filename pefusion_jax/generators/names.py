"""Names of tasks: what may be some, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pefusion_jax import trees


def texts(what: str, names: Iterable[Any]) -> tuple[str, ...]:
    """The names, as a tuple.

    Raises:
      ValueError: for a single text, whose letters would be the names, and for what is no text.
    """
    if isinstance(names, str):
        raise ValueError(f"{what}={names!r} is one name, whose letters would be taken for names; pass {what}=({names!r},)")
    found = tuple(names)
    odd = next((name for name in found if not isinstance(name, str)), None)
    if odd is not None:
        raise ValueError(
            f"{what} has a {type(odd).__name__} among its names; pass texts, of tasks [task.name for task in tasks]"
        )
    return found


def different(what: str, names: Iterable[Any]) -> tuple[str, ...]:
    """The same; also a ValueError if there is none, or one comes twice."""
    found = texts(what, names)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"{what}={found!r:.200} must be one or more different names")
    return found


def number_of(tasks: Sequence[str], name: str) -> int:
    """The number of a task.

    Raises:
      ValueError: for a name that is not among them, with those that are.
    """
    if name not in tasks:
        raise ValueError(f"there is no task {name!r}{trees.did_you_mean(name, tasks)}; the generator has {listed(tasks)}")
    return tuple(tasks).index(name)


def listed(tasks: Sequence[str]) -> str:
    """The tasks with their numbers, or the first of them."""
    names = [f"{number} {name}" for number, name in enumerate(tasks)]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
