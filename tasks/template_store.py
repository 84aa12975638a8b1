"""Templates on disk: one folder per structure, ``<2 hex>/<sha256>``, whole or not there.

A folder holds the graph as traced, once it was simplified that one too, the list of the weights of each, and
``template.json``; beside a graph, ``<name>.proven`` says that with the weights of a model it was verified at all shapes
that are compared. Where a structure can only be traced with its weights, ``template.json`` alone says so.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from onnx_config.errors import ErrorKind, InputError, TransientError
from tasks.disk import disk_errors
from tasks.file_lock import file_lock

__all__ = ["Template", "TemplateStore"]

_SCHEMA = 1
_RECORD = "template.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What is known of a structure."""

    folder: Path

    notes: tuple[str, ...]
    """Axes that had to be fixed, outputs that were declared in vain."""

    nodes: int
    """Of the graph as traced."""

    operators: dict[str, int] = field(default_factory=dict)
    """Its nodes by operator; empty where nobody counted them."""

    direct: str | None = None
    """Why its models are traced with their weights, each for itself; ``None``: they are bound to the template."""

    @property
    def plain(self) -> Path:
        """The graph as traced."""
        return self.folder / "plain.onnx"

    @property
    def simplified(self) -> Path:
        """The simplified graph, where there is one."""
        return self.folder / "simplified.onnx"

    @property
    def _refusal(self) -> Path:
        return self.folder / "simplified.txt"

    @property
    def is_tried(self) -> bool:
        """Whether somebody has simplified the graph, or tried to."""
        return self.simplified.is_file() or self.why_plain() is not None

    def is_proven(self, *, simplified: bool) -> bool:
        """Return whether one of its graphs, with the weights of some model, was verified at all shapes."""
        return self._proof(simplified=simplified).is_file()

    def note_proven(self, *, simplified: bool) -> None:
        """Note that a graph was verified at all shapes; where that cannot be written, the next model is compared so."""
        with suppress(OSError):
            self._proof(simplified=simplified).touch()

    def _proof(self, *, simplified: bool) -> Path:
        return (self.simplified if simplified else self.plain).with_suffix(".proven")

    def why_plain(self) -> str | None:
        """Return why there is no simplified graph, where that was tried."""
        try:
            return self._refusal.read_text(encoding="utf-8")
        except OSError:
            return None

    def keep_simplified(self, scratch: Path, *, reason: str | None) -> None:
        """Move the simplified graph in from ``scratch``, or note why there is none."""
        with _store_errors(self.folder):
            if reason is not None:
                draft = scratch / self._refusal.name
                draft.write_text(reason, encoding="utf-8")
                draft.replace(self._refusal)
                return
            # The graph last: where it is, its list is.
            for name in ("simplified.weights.json", "simplified.onnx"):
                (scratch / name).replace(self.folder / name)


def _last_used(folder: Path) -> float:
    """Return when a template was last read, in seconds since the epoch; of a torn one when it was made."""
    try:
        return max(path.stat().st_mtime for path in (folder, folder / _RECORD) if path.exists())
    except (OSError, ValueError):
        return 0.0


class TemplateStore:
    """The templates in a folder. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """The folder; made when something is written. May be removed at any time when nothing runs."""

    def path_of(self, key: str) -> Path:
        """Return where the template of ``key`` is, or would be."""
        return self.root / key[:2] / key

    def read(self, key: str) -> Template | None:
        """Return the template; ``None`` where there is none, or a torn or foreign folder."""
        folder = self.path_of(key)
        try:
            record = json.loads((folder / _RECORD).read_bytes())
            if (record["schema"], record["key"]) != (_SCHEMA, key):
                return None
            found = Template(
                folder=folder,
                notes=tuple(record["notes"]),
                nodes=int(record["nodes"]),
                operators=dict(record.get("operators", {})),
                direct=record["direct"],
            )
        except (OSError, ValueError, LookupError, TypeError):
            return None
        if found.direct is None and not found.plain.is_file():
            return None
        # When it was last used, for whoever clears up.
        with suppress(OSError):
            os.utime(folder / _RECORD)
        return found

    def unused(self, *, before: datetime) -> list[Path]:
        """Return the folders of templates that nobody has read since, and of what is left of torn ones."""
        return [
            folder
            for folder in sorted(self.root.glob("??/*"))
            if folder.is_dir() and _last_used(folder) < before.timestamp()
        ]

    def remove(self, folder: Path, *, before: datetime, scratch: Path) -> bool:
        """Remove one of those folders unless it is used again by now; return whether it was removed.

        It leaves its place whole, so that whoever looks sees all of it or nothing.

        Raises:
            TransientError: If the folder cannot be written (``store``).
        """
        with _store_errors(self.root):
            if _last_used(folder) >= before.timestamp():
                return False
            try:
                folder.rename(scratch / folder.name)
            except FileNotFoundError:
                return False
            shutil.rmtree(scratch / folder.name, ignore_errors=True)
        return True

    def publish(
        self,
        key: str,
        made: Path,
        *,
        notes: list[str],
        nodes: int,
        direct: str | None,
        operators: dict[str, int] | None = None,
    ) -> Template:
        """Move the finished folder ``made``, on the same file system, into the store; return the template.

        Raises:
            TransientError: If the folder cannot be written, or the disk is full (``store``).
        """
        record: dict[str, Any] = {"schema": _SCHEMA, "key": key, "notes": notes, "nodes": nodes, "direct": direct}
        record["operators"] = counted = operators or {}
        target = self.path_of(key)
        with _store_errors(self.root):
            (made / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                # Torn, or else it would have been read; nobody else writes while the key is locked.
                shutil.rmtree(target)
            made.rename(target)
        return Template(folder=target, notes=tuple(notes), nodes=nodes, operators=counted, direct=direct)

    @contextmanager
    def locked(self, key: str, *, stopping: threading.Event) -> Iterator[None]:
        """Wait for the right to make the template of ``key``, and hold it: one traces, the others wait.

        Raises:
            TransientError: If the folder cannot be written (``store``).
            KeyboardInterrupt: If ``stopping`` is set meanwhile.
        """
        with ExitStack() as stack:
            # Not around what the caller does meanwhile, whose errors are its own.
            with _store_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self.root / f"{key}.lock", stopping=stopping))
            yield


@contextmanager
def _store_errors(root: Path) -> Iterator[None]:
    """Translate what the file system raises: no fault of a model's, and so not to be remembered as one."""
    try:
        with disk_errors(f"the template store {str(root)!r}"):
            yield
    except InputError as error:
        raise TransientError(error.message, kind=ErrorKind.STORE) from error
