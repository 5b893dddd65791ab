"""Name tables: how the tensors of a Hugging Face file map to a nested dictionary of parameters, in both directions.

Each backbone builds its own table from its configuration; what is strict about reading it is here, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees


class Entry(NamedTuple):
    """One row of a table: the name and shape in the file, and the axes that take it to our layout (None: as it is)."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None


Table = Mapping[str, Entry]  # slash path of the parameter -> where it comes from


def linear(path: str, name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Entry]:
    """Rows of a linear layer: torch stores ``[out, in]``, Flax ``[in, out]``."""
    rows = {f"{path}/kernel": Entry(f"{name}.weight", (outputs, inputs), (1, 0))}
    return rows | ({f"{path}/bias": Entry(f"{name}.bias", (outputs,))} if bias else {})


def norm(path: str, name: str, width: int) -> dict[str, Entry]:
    """Rows of a layer norm."""
    return {f"{path}/scale": Entry(f"{name}.weight", (width,)), f"{path}/bias": Entry(f"{name}.bias", (width,))}


def embedding(path: str, name: str, rows: int, width: int) -> dict[str, Entry]:
    """The row of an embedding table."""
    return {f"{path}/embedding": Entry(f"{name}.weight", (rows, width))}


def read(tensors: Mapping[str, np.ndarray], table: Table, what: str) -> dict[str, Any]:
    """Builds the parameters from the tensors of a file; every tensor must be used and every row filled.

    Args:
      tensors: ``{name: array}``, names as in the table.
      table: the rows.
      what: the model, for the message.

    Returns:
      A nested dictionary of numpy arrays, dtypes as in the file.

    Raises:
      ValueError: listing every missing, unexpected, wrongly shaped and non-floating tensor.
    """
    wanted = {entry.name: entry for entry in table.values()}
    shared = [name for name in wanted if name in tensors]
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
            for name in shared
            if tuple(tensors[name].shape) != wanted[name].shape
        ],
        "not of a floating dtype": [
            f"{name} {tensors[name].dtype}" for name in shared if not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
    }
    if any(problems.values()):
        lines = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
        raise ValueError(
            f"these weights do not fit {what} ({len(shared)} of {len(wanted)} names match):\n  "
            + "\n  ".join(lines)
            + "\nCheck that config.json and the weights belong to the same model, and that the model is of this kind."
        )
    return trees.nest(
        {
            path: np.ascontiguousarray(tensors[entry.name].transpose(entry.axes)) if entry.axes else tensors[entry.name]
            for path, entry in table.items()
        }
    )


def write(params: Mapping[str, Any], table: Table, what: str) -> dict[str, np.ndarray]:
    """The inverse of :func:`read`: ``{name in the file: array}``.

    Raises:
      ValueError: if the parameters' paths or shapes are not the table's.
    """
    flat = trees.flat(params)
    missing, unexpected = [p for p in table if p not in flat], [p for p in flat if p not in table]
    if missing or unexpected:
        raise ValueError(
            f"these parameters are not those of {what}: missing {_listed(missing)}; unexpected {_listed(unexpected)}"
        )
    out = {}
    for path, entry in table.items():
        array = np.asarray(flat[path])
        if entry.axes:
            if array.ndim != len(entry.axes):
                raise ValueError(f"{what}: {path} has {array.ndim} dimensions instead of {len(entry.axes)}")
            array = np.ascontiguousarray(array.transpose(np.argsort(entry.axes)))
        if array.shape != entry.shape:
            raise ValueError(f"{what}: {path} becomes {entry.name} {array.shape} instead of {entry.shape}")
        out[entry.name] = array
    return out


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return (", ".join(names[:limit]) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")
