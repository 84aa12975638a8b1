"""What a disk does and refuses, in words of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onnx_config.errors import ErrorKind, FerryError, InputError, TransientError

__all__ = ["FULL", "disk_errors", "flush", "flush_folder", "folder_bytes"]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room."""

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Translate what the file system raises into errors of ours."""
    try:
        yield
    except FerryError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise TransientError(
                f"The disk is full while writing to {what}. Free some space and run again.", kind=ErrorKind.STORE
            ) from error
        if error.errno in _REFUSED:
            raise InputError(
                f"{what[0].upper()}{what[1:]} cannot be written: {error}. Choose another folder."
            ) from error
        raise TransientError(f"Writing to {what} failed: {error}. Run again.", kind=ErrorKind.STORE) from error


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files; of those that go away meanwhile nothing."""
    total = 0
    # Not rglob, which raises where a folder goes away between its being listed and its being read.
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).stat().st_size
    return total


def flush(folder: Path) -> None:
    """Have the disk hold every file of a folder, and the folder itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
