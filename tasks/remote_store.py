"""The artifact store anywhere that fsspec reaches, such as a bucket of S3.

An artifact is written file by file, each read back and compared by its SHA-256, ``ferry.json`` last: where that one
is, the artifact is whole. An upload that was cut is completed by the next one of the same content, which leaves alone
what is there whole. Reading goes through copies on this machine, see `tasks.artifact_cache`.

Object stores write a file at once or not at all. A file system behind fsspec that does not (sftp, say) may show a torn
file while an artifact is healed, and at no other time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from onnx_config.errors import ErrorKind, FerryError, InputError, TransientError
from onnx_config.export.artifact import FERRY_FILE, content_address, list_files, read_ferry_file, write_ferry_value
from onnx_config.file_hash import sha256_of
from tasks.artifact_cache import ArtifactCache
from tasks.disk import disk_errors
from tasks.retry import patience_with

__all__ = ["RemoteStore"]

_PIECE_BYTES = 16 * 1024**2
_PIECES_AT_ONCE = 4
# What libraries raise for a wrong set-up, which no waiting mends; by name, since each kind of store has its own.
_SET_UP = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidRegionError",
}
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET")

Result = TypeVar("Result")


class _DamagedError(Exception):
    """A file in the store is not what was written."""


class RemoteStore:
    """Artifacts under a URL: verified ones in ``<2 hex>/<sha256>``, the others in ``quarantine/<sha256>``."""

    def __init__(self, url: str, cache: ArtifactCache) -> None:
        self.url = url.rstrip("/")
        """Where the store is, such as ``s3://bucket/prefix``; holds no secret."""
        self.cache = cache
        """Copies on this machine."""
        try:
            self._files, self._root = url_to_fs(self.url, **_options(self.url))
        except (ImportError, ValueError) as error:
            raise InputError(
                f"The artifact store {self.url!r} cannot be used: {_without_secrets(error)}. Its kind of store needs a "
                "package of its own: for S3, pip install 'onnx-ferry[s3]'."
            ) from error

    def path_of(self, sha256: str, *, quarantined: bool = False) -> str:
        """Return the URL of an artifact, there or not."""
        return f"{self.url}/{'quarantine' if quarantined else sha256[:2]}/{sha256}"

    def publish(self, folder: Path, sha256: str, *, quarantined: bool = False) -> str:
        """Write a finished folder, which becomes this machine's copy; return its URL. A failure leaves it as it was.

        Raises:
            InputError: If the store is not there or may not be written (``bad_input``).
            TransientError: If it does not answer for about a minute (``store``).
        """
        place = self.path_of(sha256, quarantined=quarantined)
        record = read_ferry_file(folder)
        if record is None:
            raise ValueError(f"{folder} has no {FERRY_FILE}")
        hashes = {name: listed["sha256"] for name, listed in sorted(record["files"].items())}
        for name, sha256_of_file in hashes.items():
            self._upload(folder / name, f"{place}/{name}", sha256_of_file)
        # A store that was restarted meanwhile may have forgotten what it took, and the last file vouches for all.
        sizes = self._sizes(place)
        for name, sha256_of_file in hashes.items():
            if sizes.get(name) != (folder / name).stat().st_size:
                self._upload(folder / name, f"{place}/{name}", sha256_of_file)
        self._upload(folder / FERRY_FILE, f"{place}/{FERRY_FILE}", sha256_of(folder / FERRY_FILE))
        self.cache.keep(folder, sha256)
        return place

    def folder(self, place: str) -> Path:
        """Return this machine's copy of an artifact, fetched where there is none, and compared by its content.

        An artifact that turns out to be damaged is withdrawn, so that the next conversion of the model heals it.

        Raises:
            InputError: If the store may not be read (``bad_input``).
            TransientError: If the artifact is not there or damaged, or the store does not answer (``store``).
        """
        return self.cache.get(_address(place), lambda folder: self._fetch(place, folder))

    def has(self, place: str) -> bool:
        """Return whether the artifact is there, or a copy of it here."""
        return self.cache.find(_address(place)) is not None or self._size_of(f"{place}/{FERRY_FILE}") is not None

    def is_whole(self, place: str, files: Iterable[tuple[str, int]]) -> bool:
        """Return whether the store has all ``files`` (relative path, size in bytes) and is finished with them.

        Contents are not read; it is one call however many files there are.

        Raises:
            InputError: If the store may not be read (``bad_input``).
            TransientError: If it does not answer (``store``).
        """
        sizes = self._sizes(place)
        return FERRY_FILE in sizes and all(sizes.get(name) == size for name, size in files)

    def quarantine(self, place: str, record: dict[str, Any]) -> str:
        """Put an artifact aside, with ``record`` as its ``ferry.json``; return its URL from now on.

        Raises:
            InputError: If the store may not be written (``bad_input``).
            TransientError: If the artifact is not there, or the store does not answer (``store``).
        """
        address = _address(place)
        with tempfile.TemporaryDirectory(prefix="ferry-quarantine-") as name:
            folder = shutil.copytree(self.folder(place), Path(name) / address)
            write_ferry_value(folder, record)
            # The copy here says otherwise, and would be taken for what is there.
            self.cache.remove(self.cache.root / address)
            target = self.publish(folder, address, quarantined=True)
        if target != place:
            self._withdraw(place)
            self.remove(place)
        return target

    def amend(self, place: str, record: dict[str, Any]) -> None:
        """Replace the ``ferry.json`` of an artifact, whose files stay as they are.

        Raises:
            InputError: If the store may not be written (``bad_input``).
            TransientError: If it does not answer (``store``).
        """
        with tempfile.TemporaryDirectory(prefix="ferry-amend-") as name:
            write_ferry_value(Path(name), record)
            path = Path(name) / FERRY_FILE
            self._upload(path, f"{place}/{FERRY_FILE}", sha256_of(path))
        # The copy here says otherwise.
        self.cache.remove(self.cache.root / _address(place))

    def check(self) -> None:
        """Look whether the store is there and may be read.

        Raises:
            InputError: If it is not, or may not (``bad_input``).
            TransientError: If it does not answer (``store``).
        """

        def look() -> None:
            bucket = self._root.partition("/")[0]
            # A prefix that nothing was written under yet is not there either, and no trouble.
            if not self._files.exists(self._root) and bucket and bucket != self._root:
                self._files.ls(bucket, detail=False)
            elif bucket == self._root:
                self._files.ls(self._root, detail=False)

        self._call(look)

    def unfinished(self, *, before: datetime) -> Iterator[tuple[str, int]]:
        """Yield the URL and size of what was begun and never finished, all of whose files are older than ``before``."""
        found = self._call(lambda: self._files.find(self._root, detail=True))
        artifacts: dict[str, dict[str, dict[str, Any]]] = {}
        for path, entry in found.items():
            parts = PurePosixPath(path).relative_to(self._root).parts
            if len(parts) > 2:
                artifacts.setdefault("/".join(parts[:2]), {})["/".join(parts[2:])] = entry
        for place, files in sorted(artifacts.items()):
            if FERRY_FILE not in files and all(_written_at(entry) < before for entry in files.values()):
                yield f"{self.url}/{place}", sum(entry["size"] or 0 for entry in files.values())

    def remove(self, place: str) -> None:
        """Remove all that is under the URL of an artifact."""
        self._call(lambda: self._files.rm(self._path(place), recursive=True))

    def _sizes(self, place: str) -> dict[str, int]:
        """Return the files of an artifact with their sizes; ``{}`` where there is none."""
        path = self._path(place)
        found = self._call(lambda: self._files.find(path, detail=True))
        return {PurePosixPath(name).relative_to(path).as_posix(): entry["size"] for name, entry in found.items()}

    def _upload(self, source: Path, target: str, sha256: str) -> None:
        path, size = self._path(target), source.stat().st_size

        def write() -> None:
            if self._is(path, size, sha256):
                return
            self._files.put_file(str(source), path, **_writing(self._files))
            if not self._is(path, size, sha256):
                raise _DamagedError(f"{target} was read back and is not what was written")

        self._call(write)

    def _is(self, path: str, size: int, sha256: str) -> bool:
        """Return whether a file is there with this content, which is read."""
        try:
            if self._files.info(path)["size"] != size:
                return False
            return self._sha256(path, size) == sha256
        except FileNotFoundError:
            return False

    def _sha256(self, path: str, size: int) -> str:
        digest = hashlib.sha256()
        for start in range(0, size, _PIECE_BYTES):
            digest.update(self._files.cat_file(path, start=start, end=min(size, start + _PIECE_BYTES)))
        return digest.hexdigest()

    def _fetch(self, place: str, folder: Path) -> None:
        for attempt in (1, 2):
            try:
                self._download(place, folder)
                return
            except _DamagedError as error:
                if attempt == 1:
                    # On its way, perhaps: once more, before the store is believed to be wrong.
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                self._withdraw(place)
                raise TransientError(
                    f"The artifact {place} is damaged: {error}. It was withdrawn from the store. Convert its model "
                    "again, which stores it anew.",
                    kind=ErrorKind.STORE,
                ) from error

    def _download(self, place: str, folder: Path) -> None:
        with disk_errors(f"the folder {str(self.cache.root)!r}"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._get(f"{place}/{FERRY_FILE}", folder / FERRY_FILE)
        try:
            listed = json.loads((folder / FERRY_FILE).read_bytes())["files"]
            names = [str(name) for name in listed]
        except (ValueError, LookupError, TypeError) as error:
            raise _DamagedError(f"its {FERRY_FILE} cannot be read ({type(error).__name__})") from error
        for name in names:
            # A name from outside becomes a path here.
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise _DamagedError(f"its {FERRY_FILE} lists a file outside the artifact")
            self._get(f"{place}/{name}", folder / name)
        # The name of the place is the hash over all files, so that this says everything.
        if content_address(list_files(folder)) != _address(place):
            wrong = [name for name in names if sha256_of(folder / name) != listed[name]["sha256"]]
            raise _DamagedError(f"{wrong[0] if wrong else FERRY_FILE} is not what was stored")

    def _get(self, source: str, target: Path) -> None:
        path = self._path(source)
        with disk_errors(f"the folder {str(self.cache.root)!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._call(lambda: self._files.get_file(path, str(target)), absent=True)
        except FileNotFoundError as error:
            if target.name == FERRY_FILE:
                place = source.removesuffix(f"/{FERRY_FILE}")
                raise TransientError(
                    f"The artifact {place} is not in the store any more. Convert its model again.", kind=ErrorKind.STORE
                ) from error
            raise _DamagedError(f"{target.name} is missing") from error

    def _withdraw(self, place: str) -> None:
        # Whoever may only read the store says that it is damaged, and can do no more.
        with suppress(Exception):
            self._files.rm_file(self._path(f"{place}/{FERRY_FILE}"))

    def _size_of(self, url: str) -> int | None:
        path = self._path(url)
        try:
            size: int = self._call(lambda: self._files.info(path)["size"], absent=True)
        except FileNotFoundError:
            return None
        return size

    def _path(self, place: str) -> str:
        # The store's URL may spell its root in another way than the file system does.
        return f"{self._root.rstrip('/')}/{place.removeprefix(self.url).lstrip('/')}"

    def _call(self, function: Callable[[], Result], *, absent: bool = False) -> Result:
        """Call the store until it answers, for about a minute; ``absent``: what is not there is no error of its own.

        Raises:
            InputError: If it is not there or refuses (``bad_input``).
            TransientError: If it does not answer (``store``).
        """
        try:
            return patience_with(self.url).call(function, passes=_may_pass)
        except FerryError:
            raise
        # Every kind of store has its own exceptions; which of them are whose fault is told by a few names.
        except Exception as error:
            if absent and isinstance(error, FileNotFoundError):
                raise
            raise self._judged(error) from error

    def _judged(self, error: Exception) -> FerryError:
        said = f"{type(error).__name__}: {_without_secrets(error)}"
        if _is_set_up(error):
            return InputError(
                f"The artifact store {self.url!r} cannot be used: {said}. Check FERRY_STORE_URL, that the bucket is "
                "there, and the credentials in the environment."
            )
        return TransientError(
            f"The artifact store {self.url!r} does not answer as it should: {said}. Nothing was registered. Run again "
            "when it does.",
            kind=ErrorKind.STORE,
        )


def _is_set_up(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError):
        # An upload in parts that broke off, and whose parts the store has forgotten, is reported by that alone.
        return "upload" not in str(error)
    return isinstance(error, PermissionError) or type(error).__name__ in _SET_UP


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, FerryError) and not _is_set_up(error)


def _address(place: str) -> str:
    return place.rpartition("/")[2]


def _options(url: str) -> dict[str, Any]:
    """Return how the file system is opened: no listing is believed twice, and nothing hangs."""
    # An instance of its own: one that fsspec keeps would go on with the credentials of another day.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if url.startswith(("s3://", "s3a://")):
        options["max_concurrency"] = _PIECES_AT_ONCE
        options["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            # Trying again is the business of s3fs, a few times, and of ours.
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
    return options


def _writing(files: fsspec.AbstractFileSystem) -> dict[str, Any]:
    # In parts that fit into memory, a few at a time; others choose for themselves.
    protocol = files.protocol if isinstance(files.protocol, tuple) else (files.protocol,)
    return {"chunksize": _PIECE_BYTES} if "s3" in protocol else {}


def _written_at(entry: dict[str, Any]) -> datetime:
    """Return when a file was written; of one that does not say so, now."""
    found = entry.get("LastModified") or entry.get("last_modified") or entry.get("created") or datetime.now(UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _without_secrets(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    for secret in filter(None, (os.environ.get(name) for name in _SECRETS)):
        text = text.replace(secret, "***")
    return text
