"""Tensors of a safetensors file, one after the other, in the hands of a few threads and in bounded memory."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from pefusion_jax.interop.headers import MAX_HEADER_BYTES, parse
from pefusion_jax.interop.safetensors import aligned, open_file, read_tensor


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
    with open_file(path) as file:
        infos, _ = parse(file, path, MAX_HEADER_BYTES)
        wanted = sorted(names, key=lambda name: infos[name].offset)
        scratch = _Scratch(max((infos[name].nbytes for name in wanted), default=0))
        # One thread reads while the others check, cast and transpose what they have read.
        reading, failed = threading.Lock(), threading.Event()

        def one(name: str) -> None:
            if failed.is_set():
                return
            size = infos[name].nbytes
            buffer = None if keep(name) else scratch.take(size)
            try:
                target = aligned(size) if buffer is None else buffer[:size]
                with reading:
                    array = read_tensor(file, path, name, infos[name], target)
                use(name, array, path)
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
