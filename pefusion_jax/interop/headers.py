"""What the header of a safetensors file may say: every field is checked against the others and against the file's size.

What the reference implementation accepts and we do not: headers above 16 MB, more than 8 dimensions, shapes that no array can
have, and unknown fields.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 1_000_000
MAX_DIMS = 8

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
CONVERT = (
    "convert it once to safetensors where you trust its origin, for instance with transformers: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
DOWNLOAD_AGAIN = "the file is damaged or was not written to the end: fetch or save it again"


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
        remedy: str = DOWNLOAD_AGAIN,
    ):
        self.path, self.problem, self.tensor = os.fspath(path), problem, tensor
        self.expected, self.found, self.remedy = expected, found, remedy
        parts = [f"{self.path}: {problem}"]
        if tensor is not None:
            parts.append(f"tensor: {shown(tensor)}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if found is not None:
            parts.append(f"found: {shown(found)}")
        parts.append(f"remedy: {remedy}")
        super().__init__("\n  ".join(parts))


class TensorInfo(NamedTuple):
    """Where one tensor lies: its dtype, its shape, and its bytes ``[offset, offset + nbytes)`` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse(
    file: io.BufferedReader, path: str | os.PathLike[str], max_header_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of an open file: its tensors in the order of the data, and its metadata.

    Raises:
      WeightFileError: if it is no safetensors file, or contradicts itself or the file's size.
    """
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
                remedy=CONVERT,
            )
        raise WeightFileError(
            path,
            "the header length is impossible or above the limit",
            expected=f"2 to {min(max_header_bytes, max(size - 8, 2))} bytes",
            found=f"{length} bytes",
            remedy=DOWNLOAD_AGAIN + "; a genuine file with a longer header: raise max_header_bytes",
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


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shown(value: Any, limit: int = 300) -> str:
    """Anything from a file as text for a terminal: on one line, without control sequences, and cut where it is too long."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else text[:limit] + "..."
