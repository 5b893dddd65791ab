"""Pieces of tensors: read from safetensors files wherever they lie, written to one file in order."""

from __future__ import annotations

import concurrent.futures
import hashlib
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pefusion_jax import files
from pefusion_jax.interop.headers import MAX_HEADER_BYTES, WeightFileError, parse
from pefusion_jax.interop.safetensors import file_start, open_file
from pefusion_jax.interop.weights import Weights

_WAITING = 3


class Pieces:
    """Reads pieces of the tensors of a folder, from several threads; to be closed."""

    def __init__(self, weights: Weights):
        self.infos = weights.infos
        self._weights = weights
        self._open: dict[Path, tuple[Any, threading.Lock]] = {}
        self._opening = threading.Lock()

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._weights.file_of(name)

    def read(self, name: str, start: int, count: int, buffer: np.ndarray) -> np.ndarray:
        """Entries ``[start, start + count)`` of a tensor, in the first bytes of a buffer.

        Raises:
          WeightFileError: if the file has changed since its header was read.
        """
        info, path = self.infos[name], self._weights.file_of(name)
        target = buffer[: count * info.dtype.itemsize]
        file, lock = self._file(path)
        with lock:
            file.seek(info.offset + start * info.dtype.itemsize)
            if file.readinto(target.data) != target.nbytes:
                raise WeightFileError(path, "the file became shorter while it was read", tensor=name)
        return target.view(info.dtype)

    def _file(self, path: Path) -> tuple[Any, threading.Lock]:
        with self._opening:
            if path not in self._open:
                file = open_file(path)
                # The data comes from the very handle whose header is checked here.
                try:
                    found, _ = parse(file, path, MAX_HEADER_BYTES)
                    if any(self.infos.get(name) != info for name, info in found.items()):
                        raise WeightFileError(path, "the file was exchanged while it was read", remedy="run it again")
                except BaseException:
                    file.close()
                    raise
                self._open[path] = file, threading.Lock()
            return self._open[path]

    def close(self) -> None:
        """Closes the files."""
        for file, _ in self._open.values():
            file.close()


class Writer:
    """Appends bytes to a file and to its SHA-256 in a thread of its own."""

    def __init__(self, file: BinaryIO, thread: concurrent.futures.Executor):
        self._file, self._thread = file, thread
        self._digest, self._pending = hashlib.sha256(), deque[concurrent.futures.Future[None]]()

    def append(self, data: Any) -> None:
        """Hands bytes over (or an array of them), which must not change any more; waits while too much is unwritten."""
        self._pending.append(self._thread.submit(self._write, data))
        while len(self._pending) > _WAITING:
            self._pending.popleft().result()

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._digest.update(data)

    def finish(self) -> str:
        """Waits for everything to be written; the file's SHA-256."""
        while self._pending:
            self._pending.popleft().result()
        return self._digest.hexdigest()


@contextmanager
def writing(path: Path, kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Iterator[tuple[list[str], Writer]]:
    """A safetensors file whose tensors are appended piece by piece.

    Yields:
      The order in which the tensors have to come, and what takes their bytes.
    """
    order, start = file_start(path, kinds)
    size = len(start) + sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())
    with files.replacing(path) as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
        files.reserve(file, size)
        writer = Writer(file, thread)
        writer.append(start)
        yield order, writer
        writer.finish()
