"""The artifact store: artifacts by their content, each whole or not there; in a folder, or anywhere fsspec reaches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tasks.local_store import LocalStore
from tasks.request import Workspace

__all__ = ["ArtifactStore", "file_in", "is_remote", "store_of"]


class ArtifactStore(Protocol):
    """Where artifacts are. A place is what the catalog notes of one: an absolute folder, or a URL."""

    def path_of(self, sha256: str, *, quarantined: bool = False) -> str:
        """Return the place where an artifact is, or would be."""

    def publish(self, folder: Path, sha256: str, *, quarantined: bool = False) -> str:
        """Take a finished folder in, which is gone afterwards; return its place. A failure leaves it as it was.

        What is there already of the same content stays, and what is damaged of it is replaced.

        Raises:
            InputError: If the store is not there or may not be written (``bad_input``).
            TransientError: If it has no room, or does not answer (``store``).
        """

    def folder(self, place: str) -> Path:
        """Return a folder of this machine with the files of an artifact; nobody may write into it.

        Raises:
            InputError: If the store may not be read (``bad_input``).
            TransientError: If the artifact is not there, is damaged, or the store does not answer (``store``).
        """

    def has(self, place: str) -> bool:
        """Return whether an artifact is there; only that of its files that is written last is looked for."""

    def is_whole(self, place: str, files: Iterable[tuple[str, int]]) -> bool:
        """Return whether an artifact is there with all ``files`` (relative path, size in bytes), which are not read."""

    def quarantine(self, place: str, record: dict[str, Any]) -> str:
        """Put an artifact aside, with another ``ferry.json``, and serve it no more; return its place from now on.

        Raises:
            InputError: If the store may not be written (``bad_input``).
            TransientError: If the artifact is not there, or the store does not answer (``store``).
        """

    def amend(self, place: str, record: dict[str, Any]) -> None:
        """Replace the ``ferry.json`` of an artifact, whose files and place stay as they are.

        Raises:
            InputError: If the store may not be written (``bad_input``).
            TransientError: If it has no room, or does not answer (``store``).
        """

    def check(self) -> None:
        """Raise what `publish` would of a store that is not there or does not answer, as far as a look can tell."""


def store_of(workspace: Workspace, place: str | None = None) -> ArtifactStore:
    """Return the store that new artifacts go to; with ``place``, the one that has that artifact.

    The two differ where the store's setting was changed after an artifact was made.

    Raises:
        InputError: If nothing that is installed reaches the store.
    """
    where = place or workspace.store
    if isinstance(where, Path) or not is_remote(where):
        return LocalStore(Path(where).parent.parent if place else Path(where))
    return _remote(
        where.rsplit("/", 2)[0] if place else where, workspace.home / "store-cache", workspace.store_cache_bytes
    )


@lru_cache(maxsize=32)
def _remote(url: str, cache: Path, cache_bytes: int) -> ArtifactStore:
    # Whoever has a folder needs neither fsspec nor the time to import it.
    from tasks.artifact_cache import ArtifactCache
    from tasks.remote_store import RemoteStore

    return RemoteStore(url, ArtifactCache(cache, limit_bytes=cache_bytes))


def is_remote(place: str) -> bool:
    """Return whether a place is a URL and no folder.

    >>> is_remote("s3://bucket/prefix"), is_remote("/srv/artifacts")
    (True, False)
    """
    return "://" in place


def file_in(place: str, name: str) -> str:
    """Return the place of a file of an artifact.

    >>> file_in("s3://bucket/ab/abc", "model.onnx")
    's3://bucket/ab/abc/model.onnx'
    """
    return f"{place}/{name}"
