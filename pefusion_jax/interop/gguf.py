"""Reads GGUF files (version 2 and 3): metadata, and tensors as float32. A file is checked before anything in it is believed.

Format: ``github.com/ggml-org/ggml/blob/master/docs/gguf.md``. Tensors may be float32, float16 or quantised in blocks of 32
as Q4_0, Q4_1 or Q8_0.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pefusion_jax.interop.safetensors import WeightFileError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class GgufTensor(NamedTuple):
    """A tensor of a file that has not been read yet: its shape, slowest axis first, its kind, and what reads it."""

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]


class _Kind(NamedTuple):
    name: str
    block: int  # values in a block
    size: int  # bytes of a block
    values: Callable[[np.ndarray], np.ndarray]  # blocks [n, size] uint8 -> values [n, block] float32


def _half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


_KINDS = {
    0: _Kind("F32", 1, 4, lambda b: b.view("<f4").astype(np.float32)),
    1: _Kind("F16", 1, 2, _half),
    2: _Kind("Q4_0", 32, 18, lambda b: _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)),
    3: _Kind("Q4_1", 32, 20, lambda b: _half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4])),
    8: _Kind("Q8_0", 32, 34, lambda b: _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)),
}


def read_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Reads what a GGUF file says about itself, and where its tensors are.

    Args:
      path: the file.

    Returns:
      The metadata, and ``{name: GgufTensor}``, whose ``read()`` gives the float32 array.

    Raises:
      WeightFileError: if the file is damaged, or has a tensor of a kind that is not implemented.
    """
    path = Path(path)
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != b"GGUF":
        raise WeightFileError(path, "is not a GGUF file", expected="GGUF in the beginning", found=repr(bytes(data[:4])))
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise WeightFileError(path, "has an unknown GGUF version", expected="2 or 3", found=str(version))
    count, entries = cursor.length(24), cursor.length(12)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    rows = []
    for _ in range(count):
        name, dims = cursor.string(), cursor.scalar("<I")
        if dims > _MAX_DIMS:
            raise WeightFileError(path, "has too many axes", tensor=name[:80], expected=f"up to {_MAX_DIMS}", found=str(dims))
        shape = tuple(cursor.scalar("<Q") for _ in range(dims))[::-1]
        rows.append((name, shape, cursor.scalar("<I"), cursor.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
        raise WeightFileError(path, "has a wrong general.alignment", expected="1 to 65536", found=str(alignment)[:40])
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, code, offset in rows:
        kind = _KINDS.get(code)
        if kind is None:
            known = ", ".join(kind.name for kind in _KINDS.values())
            raise WeightFileError(
                path, "is of a kind that is not implemented", tensor=name[:80], expected=known, found=str(code)
            )
        size = math.prod(shape) // kind.block * kind.size
        if name in tensors or (shape or (1,))[-1] % kind.block or start + offset + size > len(data):
            found = f"{list(shape)} as {kind.name} at {offset}"
            raise WeightFileError(path, "is there twice, cut off or of a wrong shape", tensor=name[:80], found=found)
        blocks = data[start + offset : start + offset + size].reshape(-1, kind.size)
        tensors[name] = GgufTensor(shape, kind.name, functools.partial(_read, blocks, kind, shape))
    return metadata, tensors


def _read(blocks: np.ndarray, kind: _Kind, shape: tuple[int, ...]) -> np.ndarray:
    return kind.values(np.asarray(blocks)).reshape(shape)


class _Cursor:
    """A place in a file, and what can be read from there."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise WeightFileError(self.path, "is cut off", found=f"{len(self.data)} bytes")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def length(self, size: int) -> int:
        """A number of things that take ``size`` bytes at least; more than can be there is an error before it is believed."""
        count = self.scalar("<Q")
        if count * size > len(self.data):
            raise WeightFileError(self.path, "is cut off or damaged", found=f"{count} entries in {len(self.data)} bytes")
        return count

    def string(self) -> str:
        return self.take(self.length(1)).decode("utf-8", "replace")

    def value(self, code: int) -> Any:
        if code in _SCALARS:
            return self.scalar(_SCALARS[code])
        if code == _STRING:
            return self.string()
        if code != _ARRAY:
            raise WeightFileError(self.path, "has metadata of an unknown type", found=str(code))
        inner = self.scalar("<I")
        if inner == _STRING:
            return [self.string() for _ in range(self.length(8))]
        if inner not in _SCALARS:
            raise WeightFileError(self.path, "has an array of an unknown type", found=str(inner))
        form = _SCALARS[inner]
        count = self.length(struct.calcsize(form))
        return np.frombuffer(self.take(count * struct.calcsize(form)), form).tolist()
