"""Name tables: how the tensors of a Hugging Face file map to a nested dictionary of parameters, in both directions.

Each backbone builds its own table from its configuration; what is strict about reading it is here, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees


class Entry(NamedTuple):
    """One row of a table.

    Attributes:
      name: of the tensor in the file.
      shape: of the tensor in the file.
      axes: permutation that takes the tensor to our layout; None: as it is.
      part: ``(i, n)`` if the parameter is the i-th of n equal parts of the tensor's first axis; None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None


Table = Mapping[str, Entry]  # slash path of the parameter -> where it comes from


def linear(path: str, name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Entry]:
    """Rows of a linear layer: torch stores ``[out, in]``, Flax ``[in, out]``."""
    rows = {f"{path}/kernel": Entry(f"{name}.weight", (outputs, inputs), (1, 0))}
    return rows | ({f"{path}/bias": Entry(f"{name}.bias", (outputs,))} if bias else {})


def conv(path: str, name: str, inputs: int, outputs: int, window: tuple[int, int], bias: bool = True) -> dict[str, Entry]:
    """Rows of a two-dimensional convolution: torch stores ``[out, in, h, w]``, Flax ``[h, w, in, out]``."""
    rows = {f"{path}/kernel": Entry(f"{name}.weight", (outputs, inputs, *window), (2, 3, 1, 0))}
    return rows | ({f"{path}/bias": Entry(f"{name}.bias", (outputs,))} if bias else {})


def norm(path: str, name: str, width: int, bias: bool = True) -> dict[str, Entry]:
    """Rows of a layer norm, or without ``bias`` of an RMS norm."""
    rows = {f"{path}/scale": Entry(f"{name}.weight", (width,))}
    return rows | ({f"{path}/bias": Entry(f"{name}.bias", (width,))} if bias else {})


def embedding(path: str, name: str, rows: int, width: int) -> dict[str, Entry]:
    """The row of an embedding table."""
    return {f"{path}/embedding": Entry(f"{name}.weight", (rows, width))}


class Report(NamedTuple):
    """How the tensors of a file and a table of names meet; each a list of canonical tensor names.

    Attributes:
      matched: in both.
      missing: in the table only.
      unexpected: in the file only.
      misfits: sentences about tensors of another shape or of a dtype that is not floating.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} of {len(self.matched) + len(self.missing)} names match"]
        for kind in ("missing", "unexpected", "misfits"):
            found = getattr(self, kind)
            if found:
                lines.append(f"{len(found)} {'do not fit' if kind == 'misfits' else kind}: {_listed(found)}")
        return "\n  ".join(lines)


def compare(infos: Mapping[str, Any], table: Table) -> Report:
    """Compares tensors with a table by name, shape and kind of dtype.

    Args:
      infos: ``{canonical name: anything with .shape and .dtype}``.
      table: the rows.
    """
    wanted = {entry.name: entry for entry in table.values()}
    shared = [name for name in wanted if name in infos]
    misfits = [
        f"{name} is {list(infos[name].shape)} instead of {list(wanted[name].shape)}"
        for name in shared
        if tuple(infos[name].shape) != wanted[name].shape
    ]
    misfits += [f"{name} is {infos[name].dtype}" for name in shared if not jnp.issubdtype(infos[name].dtype, jnp.floating)]
    return Report(
        matched=shared,
        missing=[name for name in wanted if name not in infos],
        unexpected=[name for name in infos if name not in wanted],
        misfits=misfits,
    )


def require_fit(report: Report, what: str, strict: bool = True) -> None:
    """Raises a ValueError unless a report is good enough to load.

    Args:
      report: see :func:`compare`.
      what: the model, for the message.
      strict: False accepts missing and unexpected names, but never misfits, and never a report without a match.
    """
    if report.misfits or not report.matched or (strict and (report.missing or report.unexpected)):
        raise ValueError(
            f"these weights do not fit {what}: {report}\n"
            "Check that config.json and the weights belong to the same model, and that the model is of this kind."
        )


def convert(entry: Entry, array: np.ndarray) -> np.ndarray:
    """A parameter from the tensor of the file, as a view of it."""
    if entry.part is not None:
        index, count = entry.part
        rows = array.shape[0] // count
        array = array[index * rows : (index + 1) * rows]
    return array if entry.axes is None else array.transpose(entry.axes)


def parameter_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of a parameter in our layout."""
    shape = entry.shape
    if entry.part is not None:
        shape = (shape[0] // entry.part[1], *shape[1:])
    return shape if entry.axes is None else tuple(shape[axis] for axis in entry.axes)


def read(tensors: Mapping[str, np.ndarray], table: Table, what: str) -> dict[str, Any]:
    """Builds the parameters from the tensors of a file; every tensor must be used and every row filled.

    Args:
      tensors: ``{name: array}``, names as in the table.
      table: the rows.
      what: the model, for the message.

    Returns:
      A nested dictionary of contiguous numpy arrays, dtypes as in the file.

    Raises:
      ValueError: listing every missing, unexpected, wrongly shaped and non-floating tensor.
    """
    require_fit(compare(tensors, table), what)
    # np.ascontiguousarray would give a scalar (CLIP's logit_scale) an axis.
    arrays = {path: convert(entry, tensors[entry.name]) for path, entry in table.items()}
    return trees.nest({path: np.require(array, requirements="C") for path, array in arrays.items()})


class Pending(NamedTuple):
    """A tensor of a file that has not been made yet: its dtype and shape, and the function that makes it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def pending(params: Mapping[str, Any], table: Table, what: str) -> dict[str, Pending]:
    """``{name in the file: Pending}`` for parameters in the loop layout, so that tensors can be written one at a time.

    Raises:
      ValueError: if the parameters' paths or shapes are not the table's.
    """
    flat = trees.flat(params)
    missing, unexpected = [p for p in table if p not in flat], [p for p in flat if p not in table]
    if missing or unexpected:
        raise ValueError(
            f"these parameters are not those of {what}: missing {_listed(missing)}; unexpected {_listed(unexpected)}"
        )
    parts: dict[str, dict[int, str]] = {}
    for path, entry in table.items():
        if tuple(flat[path].shape) != parameter_shape(entry):
            raise ValueError(f"{what}: {path} has the shape {tuple(flat[path].shape)} instead of {parameter_shape(entry)}")
        parts.setdefault(entry.name, {})[entry.part[0] if entry.part else 0] = path

    def make(paths: dict[int, str]) -> np.ndarray:
        arrays = []
        for _, path in sorted(paths.items()):
            array, axes = np.asarray(flat[path]), table[path].axes
            arrays.append(array if axes is None else np.ascontiguousarray(array.transpose(np.argsort(axes))))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    out = {}
    for name, paths in parts.items():
        first = paths[min(paths)]
        out[name] = Pending(np.dtype(flat[first].dtype), table[first].shape, functools.partial(make, paths))
    return out


def write(params: Mapping[str, Any], table: Table, what: str) -> dict[str, np.ndarray]:
    """The inverse of :func:`read`: ``{name in the file: array}``. Raises as :func:`pending`."""
    return {name: row.make() for name, row in pending(params, table, what).items()}


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return (", ".join(names[:limit]) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")
