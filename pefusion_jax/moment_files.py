"""Statistics as safetensors files: ``inputs:PATH``, ``outputs:PATH``, ``fisher:PATH``; three tensors if compressed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.interop import safetensors
from pefusion_jax.interop.headers import WeightFileError
from pefusion_jax.moments import Moment, Moments, Spectral, Statistics

_KIND = "second moments 1"
_PARTS = ("vectors", "values", "diagonal")


def save_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Writes statistics as one safetensors file, atomically; :func:`load_statistics` gives back the same bits.

    Args:
      path: the file, for instance ``statistics.safetensors`` in the folder of a run; its folder is made if needed.
      statistics: of concrete arrays.

    Raises:
      ValueError: if there is nothing in it, or a value is not finite, naming it.
    """
    tensors: dict[str, Any] = {f"fisher:{name}": value for name, value in statistics.fisher.items()}
    for name, moments in statistics.moments.items():
        for side in ("inputs", "outputs"):
            value = getattr(moments, side)
            if isinstance(value, Spectral):
                tensors |= {f"{side}.{part}:{name}": getattr(value, part) for part in _PARTS}
            elif value is not None:
                tensors[f"{side}:{name}"] = value
    if not tensors:
        raise ValueError(f"{path}: the statistics are empty; pass what statistics() returned")
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    safetensors.check_finite(arrays, path)
    axes = {name: moments.axes for name, moments in statistics.moments.items() if moments.axes is not None}
    metadata = {"kind": _KIND, "examples": json.dumps(statistics.examples), "axes": json.dumps(axes, sort_keys=True)}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    safetensors.save_safetensors(path, arrays, metadata)


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Reads a file that :func:`save_statistics` wrote. It is validated before it is used, and never run.

    Raises:
      ValueError: naming the file and the tensor, if the file holds anything but well-formed, finite statistics.
      OSError: if it cannot be opened.
    """
    metadata = safetensors.read_metadata(path)
    if metadata.get("kind") != _KIND:
        raise WeightFileError(path, "the file does not hold statistics", expected=f"kind {_KIND!r}", found=metadata.get("kind"),
                              remedy="give a file that save_statistics wrote")  # fmt: skip
    examples, axes = _metadata(path, metadata)
    arrays = safetensors.load_safetensors(path)
    safetensors.check_finite(arrays, path)
    sides: dict[str, dict[str, Any]] = {}
    fisher: dict[str, jax.Array] = {}
    for key in sorted(arrays):
        kind, colon, name = key.partition(":")
        side, dot, part = kind.partition(".")
        known = side in ("inputs", "outputs") and (not dot or part in _PARTS) or kind == "fisher"
        if not colon or not name or not known:
            raise _refused(
                path, key, "this is not a name that statistics have", "inputs:PATH, outputs:PATH or fisher:PATH", key
            )
        if arrays[key].dtype not in (np.float32, np.float64):
            raise _refused(
                path, key, "this is not a floating-point type of statistics", "float32 or float64", arrays[key].dtype
            )
        if kind == "fisher":
            if arrays[key].size and arrays[key].min() < 0:
                raise _refused(path, key, "a Fisher diagonal is negative", "0 or more", arrays[key].min())
            fisher[name] = jnp.asarray(arrays[key])
        else:
            sides.setdefault(name, {}).setdefault(side, {})[part] = arrays[key]
    moments = {}
    for name, found in sides.items():
        if "inputs" not in found:
            raise _refused(
                path, f"outputs:{name}", "there are output moments without input moments", f"inputs:{name}", "nothing"
            )
        made = {side: _moment(path, f"{side}:{name}", parts) for side, parts in found.items()}
        moments[name] = Moments(made["inputs"], made.get("outputs"), axes.pop(name, None))
    if axes:
        raise _refused(path, "__metadata__", "axes are given for parameters without moments", "none", sorted(axes)[0])
    return Statistics(moments, fisher, examples)


def _refused(path: Any, tensor: str, problem: str, expected: Any, found: Any) -> WeightFileError:
    return WeightFileError(
        path, problem, tensor=tensor, expected=expected, found=found, remedy="collect the statistics again and save them"
    )


def _metadata(path: Any, metadata: Mapping[str, str]) -> tuple[int, dict[str, tuple[int, ...]]]:
    try:
        examples, axes = json.loads(metadata["examples"]), json.loads(metadata["axes"])
        if type(examples) is not int or examples < 0 or not isinstance(axes, dict):
            raise ValueError("examples must be a number, axes a dictionary")
        for order in axes.values():
            whole = isinstance(order, list) and all(type(axis) is int for axis in order)
            if not whole or sorted(order) != list(range(len(order))):
                raise ValueError("axes must be permutations")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise _refused(path, "__metadata__", "examples or axes are damaged", "as save_statistics wrote them", error) from error
    return examples, {name: tuple(order) for name, order in axes.items()}


def _moment(path: Any, key: str, parts: Mapping[str, np.ndarray]) -> Moment:
    if set(parts) == {""}:
        matrix = parts[""]
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise _refused(path, key, "a moment is not square", "[*batch, n, n]", list(matrix.shape))
        diagonal = np.diagonal(matrix, axis1=-2, axis2=-1)
        if diagonal.size and diagonal.min() < 0:
            raise _refused(path, key, "the diagonal of a moment is negative", "0 or more", diagonal.min())
        return jnp.asarray(matrix)
    if set(parts) != set(_PARTS):
        raise _refused(path, key, "parts of a compressed moment are missing", ", ".join(_PARTS), ", ".join(sorted(parts)))
    vectors, values, diagonal = (parts[part] for part in _PARTS)
    fits = (
        vectors.ndim >= 2 and vectors.shape[:-1] == diagonal.shape and vectors.shape[:-2] + vectors.shape[-1:] == values.shape
    )
    if not fits or vectors.shape[-1] > vectors.shape[-2]:
        shapes = {part: list(parts[part].shape) for part in _PARTS}
        raise _refused(path, key, "the parts of a compressed moment do not fit together", "[n, k], [k], [n], k <= n", shapes)
    if diagonal.size and diagonal.min() < 0:
        raise _refused(path, key, "the diagonal of a moment is negative", "0 or more", diagonal.min())
    return Spectral(*map(jnp.asarray, (vectors, values, diagonal)))
