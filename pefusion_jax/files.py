"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def _aside(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses; what is made under it gets the permissions of any new file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends without an error.

    A reader sees the old content or the new, never a part, also if the machine stops in between.
    """
    path = Path(path)
    temporary = _aside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(file: BinaryIO, size: int) -> None:
    """Asks the system for the room of a file that is about to be written, where the system can be asked.

    Writing then takes less than half the time, and a full disk is noticed before the work and not after.

    Raises:
      OSError: if there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file in one piece, see :func:`replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON for people, in one piece; what JSON does not know is written as its text."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode())


def require_free(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses an output folder that :func:`new_folder` would refuse, before any work is done.

    Raises:
      FileExistsError: if ``out`` holds something and ``overwrite`` is not given, or is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; name another folder, or replace it with --overwrite")


def require_apart(out: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuses an output folder whose replacement would delete something that it is made from.

    Raises:
      ValueError: if an input is the folder, or lies in it.
    """
    for given in inputs:
        if Path(given).resolve().is_relative_to(Path(out).resolve()):
            raise ValueError(f"{out} is or holds {given}, which is read here and would be replaced; name another folder")


@contextmanager
def new_folder(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written.

    Args:
      out: the folder to make. If it exists it must be empty, or ``overwrite`` be given.
      overwrite: replace a folder that exists.

    Raises:
      FileExistsError: if ``out`` holds something and ``overwrite`` is not given, or is a file.
    """
    require_free(out, overwrite)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = _aside(out)
    staging.mkdir()
    try:
        yield staging
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
