"""Locks between processes, waited for no longer than the user does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.disk import disk_errors
from tasks.job import raise_if_stopping

__all__ = ["file_lock"]

_LOOK_SECONDS = 0.5


@contextmanager
def file_lock(path: Path, *, stopping: threading.Event) -> Iterator[None]:
    """Wait for the lock ``path``, in a folder that is there, and hold it. The file stays when nobody holds it any more.

    Raises:
        InputError: If the file cannot be written (``bad_input``).
        TransientError: If the disk is full (``store``).
        KeyboardInterrupt: If ``stopping`` is set meanwhile.
    """
    lock = FileLock(path)
    while not lock.is_locked:
        raise_if_stopping(stopping)
        # The time-out is an OSError too, and no trouble with the disk.
        with disk_errors(f"the folder {str(path.parent)!r}"), suppress(Timeout):
            lock.acquire(timeout=_LOOK_SECONDS)
    try:
        yield
    finally:
        lock.release()
