"""Clear up: what nothing has used for a while and what anything can be made again from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import db
from onnx_config.export.scratch import remove_orphans, scratch_folder
from tasks.disk import disk_errors, folder_bytes
from tasks.register import catalog, catalog_errors
from tasks.remote_store import RemoteStore
from tasks.request import Workspace
from tasks.store import store_of
from tasks.template_store import TemplateStore

__all__ = ["Collected", "collect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One thing that was removed, or would be."""

    what: str
    """``template``, ``detection``, ``temporary``; ``copy``: of an artifact whose store is elsewhere; ``upload``: what a
    killed process has left in such a store."""

    path: Path | str
    """Where it was: on this machine, or a URL."""

    size_bytes: int


def collect(workspace: Workspace, *, unused_days: float, dry_run: bool = False) -> list[Collected]:
    """Remove what was not used for so many days and can be made again, and what killed processes have left.

    That is templates, detections, this machine's copies of artifacts in a store elsewhere, and in such a store uploads
    that nobody has gone on with for so long. Conversions may go on meanwhile. Artifacts and the catalog's conversions
    stay.

    Raises:
        InputError: If a folder or the store cannot be written (``bad_input``).
        TransientError: If the catalog cannot be written (``catalog``), or the store does not answer (``store``).
    """
    before = datetime.now(UTC) - timedelta(days=unused_days)
    store = TemplateStore(workspace.templates)
    found = [_collected("template", folder) for folder in store.unused(before=before)]
    found += _old_detections(workspace.detections, before)
    elsewhere = store_of(workspace)
    if isinstance(elsewhere, RemoteStore):
        cache = elsewhere.cache
        old = sorted(folder for used, folder in cache.copies() if used < before.timestamp())
        found += [_collected("copy", folder) for folder in old]
        uploads = elsewhere.unfinished(before=before)
        found += [Collected(what="upload", path=place, size_bytes=size) for place, size in uploads]
    if dry_run:
        return found
    removed: list[Collected] = []
    gone: list[str] = []
    with disk_errors(f"the folder {str(workspace.home)!r}"):
        removed += [Collected(what="temporary", path=path, size_bytes=0) for path in remove_orphans(workspace.home)]
        with scratch_folder(workspace.home, "gc") as scratch:
            for item in found:
                if isinstance(elsewhere, RemoteStore) and isinstance(item.path, str):
                    elsewhere.remove(item.path)
                elif isinstance(elsewhere, RemoteStore) and item.what == "copy":
                    elsewhere.cache.remove(Path(item.path))
                elif item.what == "detection":
                    Path(item.path).unlink(missing_ok=True)
                elif not store.remove(Path(item.path), before=before, scratch=scratch):
                    continue
                else:
                    gone.append(Path(item.path).name)
                removed.append(item)
    with catalog_errors(), db.session_scope(catalog(workspace)) as session:
        known = {record.key for record in db.list_templates(session)}
        # Folders that somebody removed by hand count too.
        db.forget_templates(session, {*gone, *(key for key in known if not store.path_of(key).exists())})
    return removed


def _collected(what: str, folder: Path) -> Collected:
    return Collected(what=what, path=folder, size_bytes=folder_bytes(folder))


def _old_detections(root: Path, before: datetime) -> Iterator[Collected]:
    for path in sorted(root.glob("??/*.json")):
        # Somebody else may clear up as well.
        with suppress(FileNotFoundError):
            status = path.stat()
            if status.st_mtime < before.timestamp():
                yield Collected(what="detection", path=path, size_bytes=status.st_size)
