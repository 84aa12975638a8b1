"""The artifact store: a folder of content-addressed folders, each whole or not there.

An artifact is built aside, flushed to the disk and renamed into place. A process killed at any moment
leaves the store as it was, and a build folder that the next run removes.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from onnx_config.errors import ErrorKind, FerryError, InputError, TransientError
from onnx_config.export.artifact import FERRY_FILE, read_ferry_file

__all__ = ["ArtifactStore", "disk_errors", "place", "safe_name"]

_LINKED = (".onnx", ".onnx_data")


class ArtifactStore:
    """Artifacts under ``root``: verified ones in ``<2 hex>/<sha256>``, the others in ``quarantine/<sha256>``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """The store's folder; made when something is stored."""

    def path_of(self, sha256: str, *, quarantined: bool = False) -> Path:
        """Return where an artifact is, or would be."""
        if quarantined:
            return self.root / "quarantine" / sha256
        return self.root / sha256[:2] / sha256

    def publish(self, folder: Path, sha256: str, *, quarantined: bool = False) -> Path:
        """Move a finished folder into the store; return where it is.

        Where the same content is there already, it is replaced, so that a damaged one heals.

        Raises:
            TransientError: If the disk is full or the store cannot be written (``store``).
        """
        target = self.path_of(sha256, quarantined=quarantined)
        with disk_errors(f"the artifact store {str(self.root)!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            _flush(folder)
            # A rename over a folder that has files fails, so the old one steps aside first.
            aside = target.with_name(f".{sha256[:16]}.{uuid.uuid4().hex[:8]}.old")
            if target.exists():
                target.rename(aside)
            folder.rename(target)
            _flush_folder(target.parent)
            shutil.rmtree(aside, ignore_errors=True)
        return target

    def is_whole(self, folder: Path, files: Iterable[tuple[str, int]]) -> bool:
        """Return whether a folder has all ``files`` (relative path, size in bytes); contents are not read."""
        try:
            return folder.is_dir() and all((folder / path).stat().st_size == size for path, size in files)
        except OSError:
            return False


def place(source: Path, target: Path, names: Sequence[str]) -> Path:
    """Make ``target`` hold the files of an artifact, hard-linked where possible, ``ferry.json`` last.

    A new folder appears whole or not at all. In one that holds an earlier artifact, that artifact's files are
    replaced and ``ferry.json`` is missing meanwhile; files of others stay.

    Raises:
        InputError: If the folder holds files that are not an artifact's, or cannot be written (``bad_input``).
        TransientError: If the disk is full (``store``).
    """
    if _same(source, target, names):
        return target
    with disk_errors(f"the output folder {str(target)!r}"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            return _replace(source, target, names)
        aside = target.with_name(f".{target.name[:80]}.{uuid.uuid4().hex[:8]}.part")
        try:
            for name in (*names, FERRY_FILE):
                _link(source / name, aside / name)
            aside.replace(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _replace(source: Path, target: Path, names: Sequence[str]) -> Path:
    earlier = read_ferry_file(target) if target.is_dir() else None
    if earlier is None:
        raise InputError(
            f"The output folder {str(target)!r} holds files that are no artifact of onnx-ferry; they would be mixed. "
            "Choose an empty or new folder."
        )
    (target / FERRY_FILE).unlink()
    known = {name for name in earlier.get("files", {}) if _is_inside(name)}
    for name in names:
        part = target / f"{name}.part"
        part.unlink(missing_ok=True)
        _link(source / name, part)
        part.replace(target / name)
    for name in known - set(names):
        (target / name).unlink(missing_ok=True)
    _link(source / FERRY_FILE, target / FERRY_FILE)
    return target


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def _link(source: Path, target: Path) -> None:
    """Hard-link a graph or its weights; copy what a user may want to edit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.name.endswith(_LINKED):
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EEXIST):
            raise
        shutil.copyfile(source, target)


def _same(source: Path, target: Path, names: Sequence[str]) -> bool:
    """Return whether ``target`` holds this very artifact: the same ``ferry.json``, every file of its size."""
    try:
        if (target / FERRY_FILE).read_bytes() != (source / FERRY_FILE).read_bytes():
            return False
        return all((target / name).stat().st_size == (source / name).stat().st_size for name in names)
    except OSError:
        return False


def safe_name(model_id: str) -> str:
    """Return a folder name for a model id: no separators, no leading dot, at most 120 characters.

    >>> safe_name("org/name"), safe_name("./models/mine")
    ('org__name', 'mine')
    """
    is_path = model_id.startswith((".", "/", "~")) or model_id.count("/") > 1
    text = Path(model_id).expanduser().absolute().name if is_path else model_id.replace("/", "__")
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text).lstrip(".-")
    return kept[:120] or "model"


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Translate what the file system raises into errors of ours."""
    try:
        yield
    except FerryError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TransientError(
                f"The disk is full while writing to {what}. Free some space and run again.", kind=ErrorKind.STORE
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise InputError(
                f"{what[0].upper()}{what[1:]} cannot be written: {error}. Choose another folder."
            ) from error
        raise TransientError(f"Writing to {what} failed: {error}. Run again.", kind=ErrorKind.STORE) from error


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
