"""Safetensors files: a reader that validates before it touches data, and an atomic writer.

The layout of a file is an 8-byte little-endian header length, a JSON header, and one block of data::

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ..., "__metadata__": {str: str}}

A header is untrusted input: every field is checked against the others and against the size of the file before any
array is made. What the reference implementation accepts and we do not: headers above 16 MB, more than 8 dimensions,
shapes that no array can have, and unknown fields. Tensor names are never used as file names.

Reference: https://github.com/huggingface/safetensors (format section of the README).
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import math
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pefusion_jax import files

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 1_000_000
MAX_DIMS = 8
_READ_BYTES = 2**30  # Linux reads less than 2 GiB at a time

# Types narrower than a byte (F4, F6_*) are left out on purpose: numpy has no packed layout for them.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_CONVERT = (
    "convert it once to safetensors where you trust its origin, for instance with transformers: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
_DOWNLOAD_AGAIN = "the file is damaged or was not written to the end: fetch or save it again"


class WeightFileError(ValueError):
    """A file of weights cannot be used. The text names the file, the tensor, both values, and what to do."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        problem: str,
        *,
        tensor: str | None = None,
        expected: Any = None,
        found: Any = None,
        remedy: str = _DOWNLOAD_AGAIN,
    ):
        self.path, self.problem, self.tensor = os.fspath(path), problem, tensor
        self.expected, self.found, self.remedy = expected, found, remedy
        parts = [f"{self.path}: {problem}"]
        if tensor is not None:
            parts.append(f"tensor: {_short(tensor)}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if found is not None:
            parts.append(f"found: {_short(found)}")
        parts.append(f"remedy: {remedy}")
        super().__init__("\n  ".join(parts))


class TensorInfo(NamedTuple):
    """Where one tensor lies: its dtype, its shape, and its bytes ``[offset, offset + nbytes)`` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


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
    with _open(path) as file:
        return _parse(file, path, max_header_bytes)[0]


def read_metadata(path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, str]:
    """Reads the ``__metadata__`` strings of a safetensors file, empty if there are none. Raises as ``read_header``."""
    with _open(path) as file:
        return _parse(file, path, max_header_bytes)[1]


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
    with _open(path) as file:
        infos, _ = _parse(file, path, max_header_bytes)
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
            yield name, _read(file, path, name, infos[name], aligned(infos[name].nbytes))


def read_concurrently(
    path: str | os.PathLike[str],
    names: Iterable[str],
    use: Callable[[str, np.ndarray, Path], None],
    keep: Callable[[str], bool] = lambda name: True,
    threads: int | None = None,
) -> None:
    """Calls ``use(name, array, path)`` for each tensor from a few threads, in the order of the file as far as possible.

    Beside the arrays that are kept, no more memory is taken than the largest tensor needs.

    Args:
      path: the file.
      names: the tensors wanted.
      use: called once for each; the first error ends the reading and is raised.
      keep: whether ``use`` keeps the array; the memory of others is used again when ``use`` returns.
      threads: at most 4, and no more than there are processors, if not given.

    Raises:
      WeightFileError: as ``read_header``.
    """
    path = Path(path)
    with _open(path) as file:
        infos, _ = _parse(file, path, MAX_HEADER_BYTES)
        wanted = sorted(names, key=lambda name: infos[name].offset)
        scratch = _Scratch(max((infos[name].nbytes for name in wanted), default=0))
        failed = threading.Event()

        def one(name: str) -> None:
            if failed.is_set():
                return
            info = infos[name]
            buffer = None
            try:
                if keep(name):
                    use(name, _read(file, path, name, info, aligned(info.nbytes)), path)
                else:
                    buffer = scratch.take(info.nbytes)
                    use(name, _read(file, path, name, info, buffer[: info.nbytes]), path)
            except BaseException:
                failed.set()
                raise
            finally:
                if buffer is not None:
                    scratch.give(buffer)

        with concurrent.futures.ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
            tasks = [pool.submit(one, name) for name in wanted]
        for task in tasks:
            task.result()


class _Scratch:
    """Buffers that several threads take and give back, together no larger than a budget.

    A page that is written for the first time costs more than copying into it, so buffers are used again.
    """

    def __init__(self, budget: int):
        self._budget, self._total = budget, 0
        self._free: list[np.ndarray] = []
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> np.ndarray:
        """A buffer of at least so many bytes, at most the budget; waits until there is room for one."""
        with self._changed:
            while True:
                fitting = [i for i, buffer in enumerate(self._free) if buffer.size >= nbytes]
                if fitting:
                    return self._free.pop(min(fitting, key=lambda i: self._free[i].size))
                while self._free and self._total + nbytes > self._budget:
                    self._total -= self._free.pop().size
                if self._total + nbytes <= self._budget:
                    self._total += nbytes
                    return aligned(nbytes)
                self._changed.wait()

    def give(self, buffer: np.ndarray) -> None:
        """Takes a buffer back."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()


def _read(file: io.BufferedReader, path: str | os.PathLike[str], name: str, info: TensorInfo, buffer: np.ndarray) -> np.ndarray:
    """One tensor of an open file whose header was validated, into a buffer; several threads may do so at a time."""
    done = 0
    while done < info.nbytes:
        got = os.preadv(file.fileno(), [buffer.data[done : done + _READ_BYTES]], info.offset + done)
        if got == 0:
            raise WeightFileError(path, "the file became shorter while it was read", tensor=name)
        done += got
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

    with files.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            array = _storable(path, name, make(name))
            if (array.dtype, array.shape) != (np.dtype(kinds[name][0]), tuple(kinds[name][1])):
                raise WeightFileError(
                    path, "a tensor is not of the kind that was announced", tensor=name, expected=kinds[name],
                    found=(array.dtype, array.shape), remedy="announce the dtype and shape that are made",
                )  # fmt: skip
            file.write(array.reshape(-1).view(np.uint8).data)


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


def _open(path: str | os.PathLike[str]) -> io.BufferedReader:
    path = Path(path)
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise WeightFileError(
            path,
            "this is a pickle format, which can run code when it is opened: it is never read",
            expected="a .safetensors file",
            remedy=_CONVERT,
        )
    return open(path, "rb")


def _parse(
    file: io.BufferedReader, path: str | os.PathLike[str], max_header_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise WeightFileError(
            path, "the file is too short for a safetensors file", expected="at least 8 bytes", found=f"{size} bytes"
        )
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes or length > size - 8 or length < 2:
        if prefix[:4] == b"PK\x03\x04" or prefix[:1] == b"\x80":
            raise WeightFileError(
                path,
                "this is a pickle (torch.save) under another name: it is never read",
                expected="a safetensors file",
                remedy=_CONVERT,
            )
        raise WeightFileError(
            path,
            "the header length is impossible or above the limit",
            expected=f"2 to {min(max_header_bytes, max(size - 8, 2))} bytes",
            found=f"{length} bytes",
            remedy=_DOWNLOAD_AGAIN + "; a genuine file with a longer header: raise max_header_bytes",
        )
    header = decode_json(file.read(length), path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightFileError(path, "__metadata__ must map strings to strings", found=metadata)
    if len(header) > MAX_TENSORS:
        raise WeightFileError(path, "too many tensors", expected=f"at most {MAX_TENSORS}", found=len(header))

    start, infos = 8 + length, {}
    for name, entry in header.items():
        infos[name] = _tensor_info(path, name, entry, start)
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position = start
    for name, info in ordered.items():
        if info.offset != position:
            raise WeightFileError(
                path,
                "byte ranges leave a hole" if info.offset > position else "byte ranges overlap",
                tensor=name,
                expected=f"begin {position - start}",
                found=f"begin {info.offset - start}",
            )
        position += info.nbytes
    if position != size:
        raise WeightFileError(
            path,
            "the file is cut short" if position > size else "the file has bytes that no tensor owns",
            expected=f"{position} bytes",
            found=f"{size} bytes",
        )
    return ordered, metadata


def decode_json(text: bytes, path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Reads a JSON object from a file that may be hostile: UTF-8, unique keys, no NaN, bounded nesting.

    Raises:
      WeightFileError: naming ``path`` and ``what`` it is.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)  # in linear time: there may be 100,000 keys
            raise ValueError(f"the key {key!r} stands twice")
        return out

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # escaped lone surrogates are not text either
    except (ValueError, RecursionError) as error:
        raise WeightFileError(
            path, f"{what} is not a UTF-8 JSON object with unique keys", found=f"{type(error).__name__}: {error}"
        ) from None
    if not isinstance(header, dict):
        raise WeightFileError(path, f"{what} is not a JSON object", found=type(header).__name__)
    return header


def _tensor_info(path: str | os.PathLike[str], name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightFileError(
            path, "a header entry has the wrong fields", tensor=name, expected="dtype, shape, data_offsets", found=entry
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightFileError(
            path,
            "unknown dtype",
            tensor=name,
            expected=", ".join(DTYPES),
            found=dtype,
            remedy="save the tensor in one of these dtypes",
        )
    if not isinstance(shape, list) or not all(_is_size(dim) for dim in shape):
        raise WeightFileError(path, "a shape must be a list of non-negative integers", tensor=name, found=shape)
    if len(shape) > MAX_DIMS:
        raise WeightFileError(path, "too many dimensions", tensor=name, expected=f"at most {MAX_DIMS}", found=len(shape))
    # numpy cannot make an empty array whose other dimensions multiply beyond 63 bits either.
    extent = math.prod(dim for dim in shape if dim) * DTYPES[dtype].itemsize
    if extent >= 2**63:
        raise WeightFileError(path, "the shape is larger than memory can be", tensor=name, found=shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise WeightFileError(path, "data_offsets must be two non-negative integers", tensor=name, found=offsets)
    begin, end = offsets
    if end < begin:
        raise WeightFileError(path, "a byte range ends before it begins", tensor=name, found=offsets)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise WeightFileError(
            path,
            "the byte range does not fit dtype and shape",
            tensor=name,
            expected=f"{nbytes} bytes for {dtype} {shape}",
            found=f"{end - begin} bytes",
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), start + begin, nbytes)


def aligned(nbytes: int, alignment: int = 64) -> np.ndarray:
    """Bytes at an address that JAX can use as they are, without a copy.

    Large ones are pages of their own, which go back to the system when they are freed. An allocator's heap would keep them,
    and reading tensor by tensor would hold several.
    """
    if nbytes >= 2**20:
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    buffer = np.empty(nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + nbytes]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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


def _short(value: Any, limit: int = 300) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
