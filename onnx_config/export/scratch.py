"""Folders for a step's temporary files: removed at its end, or by the next process if this one is killed first.

Beside each folder lies a file of the same name and ``.lock``, which the owner keeps locked. The kernel drops the lock
when the owner dies, however it dies, so a lock that can be had means that nobody needs the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["remove_orphans", "scratch_folder"]

_REMOVE_ATTEMPTS = 5
_REMOVE_PAUSE_SECONDS = 0.05


@contextmanager
def scratch_folder(home: Path, name: str) -> Iterator[Path]:
    """Make an empty folder of this process's own below ``home/tmp``; remove it with all it holds at the end.

    ``name`` is for people who look there and need not be unique or a valid file name. Leftovers of killed processes
    are removed first. A folder that cannot be removed is no error: a later call tries again.

    ::

        with scratch_folder(home, "export of org/model") as folder:
            ...
    """
    root = home.absolute() / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    remove_orphans(home)
    label = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40].strip("-")
    folder = root / f"{label or 'step'}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    lock = FileLock(_lock_of(folder), thread_local=False)
    # Locked before the folder exists, so that a folder without a holder is an orphan at any moment.
    with lock:
        try:
            folder.mkdir()
            yield folder
        finally:
            _remove(folder)


def remove_orphans(home: Path) -> list[Path]:
    """Remove the folders below ``home/tmp`` whose process is gone, and return them; none is an empty list."""
    removed = []
    for lock_path in sorted((home.absolute() / "tmp").glob("*.lock")):
        folder = lock_path.with_suffix("")
        with suppress(Timeout, OSError), FileLock(lock_path, timeout=0, thread_local=False):
            if folder.exists():
                removed.append(folder)
            _remove(folder)
    return removed


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove(folder: Path) -> None:
    """Remove ``folder`` and then its lock file, which the caller holds; keep the lock file if the folder stays."""
    for _ in range(_REMOVE_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            _lock_of(folder).unlink(missing_ok=True)
            return
        # A killed process may be writing its last file still, or a folder in there forbids writing.
        with suppress(OSError):
            _allow_removal(folder)
        time.sleep(_REMOVE_PAUSE_SECONDS)


def _allow_removal(folder: Path) -> None:
    # Walked from the top, so that a folder is opened up before it is looked into; links are not followed.
    for parent, _, _ in os.walk(folder):
        for inner in (Path(parent), *Path(parent).iterdir()):
            if inner.is_dir() and not inner.is_symlink():
                inner.chmod(stat.S_IRWXU)
