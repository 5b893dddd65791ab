"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
      FileExistsError: if ``out`` holds something and ``overwrite`` is not given, is a file, or cannot be replaced: a mount
        point, or where this process stands.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    if os.path.ismount(out.resolve()):
        raise FileExistsError(f"{out} is a mount point, which cannot be replaced; name a folder in it")
    if Path.cwd().is_relative_to(out.resolve()):  # the shell would be left in a folder that is no longer there
        raise FileExistsError(f"{out} is or holds the working directory, which cannot be replaced; name another folder")
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
      out: the folder to make, or a link to it. If it exists it must be empty, or ``overwrite`` be given.
      overwrite: replace a folder that exists; it is deleted last.

    Raises:
      FileExistsError: as :func:`require_free`.
      OSError: if the complete folder cannot be moved to its place; it is kept, and the message says where.
    """
    require_free(out, overwrite)
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = _aside(out)
    staging.mkdir()
    try:
        yield staging
        require_free(out, overwrite)  # again: others may have written there in the meantime
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    old = staging.with_suffix(".old")
    try:
        if out.is_dir():
            os.rename(out, old)
        os.rename(staging, out)
    except OSError as error:
        if not out.exists():
            with suppress(OSError):  # there was nothing, or it stays where the message says
                os.rename(old, out)
        left = f"; what it held is in {old}" if old.is_dir() else ""
        raise OSError(f"{out} could not be replaced ({error}): the new folder is complete in {staging}{left}") from error
    shutil.rmtree(old, ignore_errors=True)
