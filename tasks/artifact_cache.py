"""Local copies of artifacts whose store is elsewhere: as many as fit, those that were used last.

A copy is whole or not there. One is never changed in place, so that whoever has its files open or linked keeps them
when the copy goes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from onnx_config.export.artifact import FERRY_FILE
from onnx_config.export.scratch import remove_orphans, scratch_folder
from tasks.disk import disk_errors, folder_bytes

__all__ = ["ArtifactCache"]

# Somebody may be about to open what it was just given.
_IN_USE_SECONDS = 600.0


class ArtifactCache:
    """Copies under ``root``, each in a folder named by the artifact's content; any number of processes may use it."""

    def __init__(self, root: Path, *, limit_bytes: int) -> None:
        self.root = root
        """The folder; made when something is kept. May be removed at any time when nothing runs."""
        self.limit_bytes = limit_bytes
        """What all copies together may take; exceeded by those that were used in the last ten minutes."""

    def find(self, sha256: str) -> Path | None:
        """Return the copy of an artifact; ``None`` where there is none. It counts as used now."""
        folder = self.root / sha256
        try:
            os.utime(folder / FERRY_FILE)
        except OSError:
            return None
        return folder

    def get(self, sha256: str, fetch: Callable[[Path], None]) -> Path:
        """Return the copy of an artifact, which ``fetch`` writes into an empty folder where there is none.

        Two who ask at once wait for one fetch.

        Raises:
            TransientError: If the disk is full (``store``); and what ``fetch`` raises.
        """
        with self._locked(sha256):
            if (found := self.find(sha256)) is not None:
                return found
            with scratch_folder(self.root, sha256[:16]) as scratch:
                fetch(scratch / sha256)
                self._take(scratch / sha256, sha256)
        self.evict(keep=sha256)
        return self.root / sha256

    def keep(self, folder: Path, sha256: str) -> None:
        """Move a finished folder in, which is gone afterwards whether there is room for it or not."""
        with self._locked(sha256):
            if self.find(sha256) is None:
                self._take(folder, sha256)
        shutil.rmtree(folder, ignore_errors=True)
        self.evict(keep=sha256)

    def evict(self, *, keep: str | None = None, limit_bytes: int | None = None) -> list[Path]:
        """Remove the copies used longest ago until the others fit; return those removed.

        Args:
            keep: One that stays.
            limit_bytes: What the others may take; ``None``: the cache's limit.
        """
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        copies = sorted(self.copies(), reverse=True)
        total, removed = 0, []
        for used, folder in copies:
            total += folder_bytes(folder)
            if total > limit and folder.name != keep and time.time() - used > _IN_USE_SECONDS:
                removed.append(folder)
        for folder in removed:
            self.remove(folder)
        return removed

    def copies(self) -> Iterator[tuple[float, Path]]:
        """Yield each copy with when it was last used, in seconds since the epoch."""
        for path in self.root.glob(f"*/{FERRY_FILE}"):
            with suppress(OSError):
                yield path.stat().st_mtime, path.parent

    def remove(self, folder: Path) -> None:
        """Remove one copy; it leaves its place whole, so that whoever looks sees all of it or nothing."""
        with self._locked(folder.name), scratch_folder(self.root, folder.name[:16]) as scratch, suppress(OSError):
            folder.rename(scratch / folder.name)

    def clear_up(self) -> list[Path]:
        """Remove what killed processes have left; return it."""
        return remove_orphans(self.root) if self.root.is_dir() else []

    def _take(self, folder: Path, sha256: str) -> None:
        target = self.root / sha256
        # Without its ferry.json it is none of ours, or torn.
        shutil.rmtree(target, ignore_errors=True)
        try:
            folder.rename(target)
        except OSError:
            # From another disk: copied aside, so that it appears whole.
            with scratch_folder(self.root, sha256[:16]) as scratch:
                shutil.copytree(folder, scratch / sha256)
                (scratch / sha256).rename(target)
        with suppress(OSError):
            os.utime(target / FERRY_FILE)

    @contextmanager
    def _locked(self, sha256: str) -> Iterator[None]:
        with disk_errors(f"the folder {str(self.root)!r}"):
            locks = self.root / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            lock = FileLock(locks / f"{sha256}.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
