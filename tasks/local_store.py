"""The artifact store in a folder of this machine: a folder of content-addressed folders, each whole or not there.

An artifact is built aside, flushed to the disk and renamed into place. A process killed at any moment
leaves the store as it was, and a build folder that the next run removes.
"""

from __future__ import annotations

import errno
import filecmp
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnx_config.export.artifact import FERRY_FILE, write_ferry_value
from onnx_config.export.scratch import scratch_folder
from tasks.disk import disk_errors, flush, flush_folder

__all__ = ["LocalStore"]


class LocalStore:
    """Artifacts under ``root``: verified ones in ``<2 hex>/<sha256>``, the others in ``quarantine/<sha256>``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """The store's folder; made when something is stored."""

    def path_of(self, sha256: str, *, quarantined: bool = False) -> str:
        """Return where an artifact is, or would be."""
        return str(self.root / ("quarantine" if quarantined else sha256[:2]) / sha256)

    def publish(self, folder: Path, sha256: str, *, quarantined: bool = False) -> str:
        """Move a finished folder into the store; return where it is. After a failure ``folder`` is as it was.

        Where the same content is there already, only what is damaged of it is replaced, file by file, so that
        a whole artifact is whole at every moment. ``folder`` may be on another disk than the store.

        Raises:
            InputError: If the store is no folder or cannot be written (``bad_input``).
            TransientError: If the disk is full (``store``).
        """
        target = Path(self.path_of(sha256, quarantined=quarantined))
        with disk_errors(f"the artifact store {str(self.root)!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            flush(folder)
            try:
                _move(folder, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # A rename does not cross disks, so a copy is made aside in the store first.
                with scratch_folder(self.root, sha256[:16]) as near:
                    copy = _copy(folder, near / folder.name)
                    flush(copy)
                    _move(copy, target)
            flush_folder(target.parent)
            shutil.rmtree(folder, ignore_errors=True)
        return str(target)

    def folder(self, place: str) -> Path:
        """Return the artifact's own folder; nobody may write into it."""
        return Path(place)

    def has(self, place: str) -> bool:
        """Return whether the artifact is there."""
        return (Path(place) / FERRY_FILE).is_file()

    def quarantine(self, place: str, record: dict[str, Any]) -> str:
        """Move an artifact aside, with ``record`` as its ``ferry.json``; return where it is.

        Raises:
            InputError: If the store cannot be written (``bad_input``).
            TransientError: If the disk is full (``store``).
        """
        folder = Path(place)
        target = Path(self.path_of(folder.name, quarantined=True))
        with disk_errors(f"the artifact store {str(self.root)!r}"):
            # From here on the loader refuses it, wherever it is.
            write_ferry_value(folder, record)
            if folder != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                _move(folder, target)
                shutil.rmtree(folder, ignore_errors=True)
                flush_folder(target.parent)
        return str(target)

    def amend(self, place: str, record: dict[str, Any]) -> None:
        """Replace the ``ferry.json`` of an artifact, which stays where it is.

        Raises:
            InputError: If the store cannot be written (``bad_input``).
            TransientError: If the disk is full (``store``).
        """
        with disk_errors(f"the artifact store {str(self.root)!r}"):
            write_ferry_value(Path(place), record)

    def check(self) -> None:
        """Do nothing: whether the folder can be written shows when it is made."""

    def is_whole(self, place: str, files: Iterable[tuple[str, int]]) -> bool:
        """Return whether a folder has all ``files`` (relative path, size in bytes) and is finished.

        Contents are not read.
        """
        folder = Path(place)
        try:
            return self.has(place) and all((folder / path).stat().st_size == size for path, size in files)
        except OSError:
            return False


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        # A rename over a folder that has files fails: the same content is there already.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _heal(folder, target)


def _copy(folder: Path, target: Path) -> Path:
    # Not shutil.copytree, which goes on where a disk is full and says so in a list of texts.
    for path in folder.rglob("*"):
        if path.is_file():
            there = target / path.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
    return target


def _heal(folder: Path, target: Path) -> None:
    """Make the files of ``target`` those of ``folder``, which keeps them; ``ferry.json`` last."""
    aside = folder.with_name(f"{folder.name}.healing")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == FERRY_FILE):
        there = target / path.relative_to(folder)
        if there.is_file() and filecmp.cmp(path, there, shallow=False):
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        try:
            aside.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, aside)
        aside.replace(there)
