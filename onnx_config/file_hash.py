"""SHA-256 of files, remembered while they do not change."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

__all__ = ["sha256_of"]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex.

    A file that was hashed by this process and has kept its inode, size and modification time (in
    nanoseconds) is not read again.
    """
    status = path.stat()
    return _hash(str(path), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _hash(path: str, inode: int, size: int, modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
