"""Clear up: what nothing has used for a while and what anything can be made again from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import db
from onnx_config.export.scratch import remove_orphans, scratch_folder
from tasks.register import catalog, catalog_errors
from tasks.request import Workspace
from tasks.store import disk_errors, folder_bytes
from tasks.template_store import TemplateStore

__all__ = ["Collected", "collect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One thing that was removed, or would be."""

    what: str
    """``template``, ``detection`` or ``temporary``."""

    path: Path
    size_bytes: int


def collect(workspace: Workspace, *, unused_days: float, dry_run: bool = False) -> list[Collected]:
    """Remove templates and detections that were not used for so many days, and what killed processes have left.

    Conversions may go on meanwhile. Artifacts and the catalog's conversions stay.

    Raises:
        InputError: If a folder cannot be written (``bad_input``).
        TransientError: If the catalog cannot be written (``catalog``).
    """
    before = datetime.now(UTC) - timedelta(days=unused_days)
    store = TemplateStore(workspace.templates)
    found = [_collected("template", folder) for folder in store.unused(before=before)]
    found += [_collected("detection", path) for path in _old_files(workspace.detections, before)]
    if dry_run:
        return found
    removed: list[Collected] = []
    gone: list[str] = []
    with disk_errors(f"the folder {str(workspace.home)!r}"):
        removed += [Collected(what="temporary", path=path, size_bytes=0) for path in remove_orphans(workspace.home)]
        with scratch_folder(workspace.home, "gc") as scratch:
            for item in found:
                if item.what == "detection":
                    item.path.unlink(missing_ok=True)
                elif not store.remove(item.path, before=before, scratch=scratch):
                    continue
                else:
                    gone.append(item.path.name)
                removed.append(item)
    with catalog_errors(), db.session_scope(catalog(workspace)) as session:
        known = {record.key for record in db.list_templates(session)}
        # Folders that somebody removed by hand count too.
        db.forget_templates(session, {*gone, *(key for key in known if not store.path_of(key).exists())})
    return removed


def _collected(what: str, path: Path) -> Collected:
    size = folder_bytes(path) if path.is_dir() else path.stat().st_size
    return Collected(what=what, path=path, size_bytes=size)


def _old_files(root: Path, before: datetime) -> Iterator[Path]:
    for path in sorted(root.glob("??/*.json")):
        if path.stat().st_mtime < before.timestamp():
            yield path
