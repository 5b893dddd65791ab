"""Safetensors files: a reader that validates before it touches data, and an atomic writer.

The layout of a file is an 8-byte little-endian header length, a JSON header, and one block of data::

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ..., "__metadata__": {str: str}}

A header is untrusted input: every field is checked against the others and against the size of the file before any
array is made (``headers.py``). Tensor names are never used as file names.

Reference: https://github.com/huggingface/safetensors (format section of the README).
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pefusion_jax import files
from pefusion_jax.interop.headers import (
    CONVERT,
    DTYPES,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    TensorInfo,
    WeightFileError,
    parse,
)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Private memory, and on Linux all of its pages at once: one by one, at their first use, they cost twice as much.
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)} if hasattr(mmap, "MAP_PRIVATE") else {}
)
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def read_header(path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, TensorInfo]:
    """Reads and validates the header of a safetensors file without reading data.

    Args:
      path: the file.
      max_header_bytes: longest header that is accepted.

    Returns:
      ``{tensor name: TensorInfo}`` in the order of the data.

    Raises:
      WeightFileError: if the file is not a safetensors file, or its header contradicts itself or the file's size.
      OSError: if the file cannot be opened.
    """
    with open_file(path) as file:
        return parse(file, path, max_header_bytes)[0]


def read_metadata(path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, str]:
    """Reads the ``__metadata__`` strings of a safetensors file, empty if there are none. Raises as ``read_header``."""
    with open_file(path) as file:
        return parse(file, path, max_header_bytes)[1]


def iter_safetensors(
    path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields ``(name, array)`` one tensor at a time, so that no more than one is held twice in memory.

    Args:
      path: the file.
      names: the tensors wanted; all by default.
      max_header_bytes: longest header that is accepted.

    Raises:
      WeightFileError: as ``read_header``, or if a wanted name is not in the file.
    """
    # The data is read from the very handle whose header was validated: the file cannot be exchanged in between.
    with open_file(path) as file:
        infos, _ = parse(file, path, max_header_bytes)
        wanted = list(infos) if names is None else list(names)
        for name in wanted:
            if name not in infos:
                raise WeightFileError(
                    path,
                    "a tensor is missing",
                    tensor=name,
                    found=f"{len(infos)} other tensors",
                    remedy="check that the file belongs to this model",
                )
        for name in wanted:
            yield name, read_tensor(file, path, name, infos[name], aligned(infos[name].nbytes))


def read_tensor(
    file: io.BufferedReader, path: str | os.PathLike[str], name: str, info: TensorInfo, buffer: np.ndarray
) -> np.ndarray:
    """One tensor of an open file whose header was validated, in a buffer of its size."""
    file.seek(info.offset)
    if file.readinto(buffer.data) != info.nbytes:
        raise WeightFileError(path, "the file became shorter while it was read", tensor=name)
    if info.dtype == np.bool_ and buffer.size and buffer.max() > 1:
        raise WeightFileError(path, "a boolean is neither 0 nor 1", tensor=name, found=int(buffer.max()))
    return buffer.view(info.dtype).reshape(info.shape)


def load_safetensors(
    path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> dict[str, np.ndarray]:
    """Loads the tensors of a safetensors file as writable numpy arrays (bfloat16 through ml_dtypes).

    Args and Raises: as :func:`iter_safetensors`.
    """
    return dict(iter_safetensors(path, names, max_header_bytes=max_header_bytes))


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file atomically: the old file stays until the new one is complete on disk.

    The bytes depend on the tensors and the metadata alone, not on the order of the mapping.

    Args:
      path: the file; its folder must exist.
      tensors: ``{name: array}``, numpy or JAX arrays of any layout in memory.
      metadata: strings to store; ``{"format": "pt"}``, which older transformers insist on, is added unless it
        names a format itself.

    Raises:
      WeightFileError: if a name, a dtype or the metadata cannot be stored, before anything is written.
    """
    path = Path(path)
    arrays = {name: _storable(path, name, value) for name, value in tensors.items()}
    write_safetensors(path, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.__getitem__, metadata)


def write_safetensors(
    path: str | os.PathLike[str],
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    make: Callable[[str], Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As :func:`save_safetensors` for tensors that are made one at a time, so that no more than one need exist.

    Args:
      path: the file; its folder must exist.
      kinds: ``{name: (dtype, shape)}``.
      make: ``name -> array`` of that dtype and shape.
      metadata: strings to store.

    Raises:
      WeightFileError: if something cannot be stored, or an array is not of its announced kind.
    """
    path = Path(path)
    order, start = file_start(path, kinds, metadata)
    with files.replacing(path) as file:
        files.reserve(file, len(start) + sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in kinds.values()))
        file.write(start)
        for name in order:
            array = _storable(path, name, make(name))
            if (array.dtype, array.shape) != (np.dtype(kinds[name][0]), tuple(kinds[name][1])):
                raise WeightFileError(
                    path, "a tensor is not of the kind that was announced", tensor=name, expected=kinds[name],
                    found=(array.dtype, array.shape), remedy="announce the dtype and shape that are made",
                )  # fmt: skip
            file.write(array.reshape(-1).view(np.uint8).data)


def file_start(
    path: str | os.PathLike[str],
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[str], bytes]:
    """What stands before the data of a safetensors file, and the order in which the tensors' data follow it without a gap.

    Args and Raises: as :func:`write_safetensors`.
    """
    meta = {"format": "pt", **(metadata or {})}
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise WeightFileError(
                path,
                "metadata must map strings to strings",
                found=f"{key!r}: {value!r}",
                remedy="turn the value into a string, for instance with json.dumps",
            )
    for name, (dtype, _) in kinds.items():
        if np.dtype(dtype) not in _DTYPE_NAMES:
            raise WeightFileError(
                path,
                "this dtype cannot be stored",
                tensor=name,
                expected=", ".join(DTYPES),
                found=dtype,
                remedy="cast the array first",
            )
    # Widest types first keeps every tensor aligned; then by name.
    order = sorted(kinds, key=lambda name: (-np.dtype(kinds[name][0]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(meta.items()))}
    position = 0
    for name in order:
        dtype, shape = kinds[name]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def check_finite(tensors: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Raises a :class:`WeightFileError` naming the tensors that hold NaN or infinity.

    Args:
      tensors: ``{name: array}``; integers and booleans are passed over.
      path: the file they came from, for the message.
    """
    bad = {}
    for name, array in tensors.items():
        # A finite sum has finite terms: one pass over the data, without an array of booleans.
        with np.errstate(all="ignore"):
            if array.dtype.kind in "biu" or (array.dtype.itemsize >= 4 and np.isfinite(array.sum())):
                continue
        if array.dtype.kind not in "biu":
            count = int(array.size - np.count_nonzero(np.isfinite(array)))
            if count:
                bad[name] = f"{name} ({count} of {array.size})"
    if bad:
        listed = ", ".join(list(bad.values())[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise WeightFileError(
            path,
            "weights are NaN or infinite",
            tensor=next(iter(bad)),
            expected="finite values",
            found=listed,
            remedy="the training run that wrote them diverged, or the file is damaged: use an earlier checkpoint",
        )


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a safetensors file.

    Raises:
      WeightFileError: for formats that can run code.
      OSError: if it cannot be opened.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise WeightFileError(
            path,
            "this is a pickle format, which can run code when it is opened: it is never read",
            expected="a .safetensors file",
            remedy=CONVERT,
        )
    return open(path, "rb")


def aligned(nbytes: int, alignment: int = 64) -> np.ndarray:
    """Bytes at an address that JAX can use as they are, without a copy.

    Large ones are pages of their own, which go back to the system when they are freed. An allocator's heap would keep them,
    and reading tensor by tensor would hold several.
    """
    if nbytes >= 2**20:
        return np.frombuffer(mmap.mmap(-1, nbytes, **_PRIVATE), np.uint8)
    buffer = np.empty(nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + nbytes]


def _storable(path: Path, name: Any, value: Any) -> np.ndarray:
    if not isinstance(name, str) or name == "__metadata__":
        raise WeightFileError(
            path, "a tensor's name must be a string other than '__metadata__'", found=repr(name), remedy="rename the tensor"
        )
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.kind in "iufc" else array
    if array.dtype not in _DTYPE_NAMES:
        raise WeightFileError(
            path,
            "this dtype cannot be stored",
            tensor=name,
            expected=", ".join(DTYPES),
            found=array.dtype,
            remedy="cast the array first",
        )
    if array.ndim > MAX_DIMS:
        raise WeightFileError(
            path,
            "too many dimensions",
            tensor=name,
            expected=f"at most {MAX_DIMS}",
            found=array.ndim,
            remedy="reshape the array first",
        )
    return np.require(array, requirements="C")
