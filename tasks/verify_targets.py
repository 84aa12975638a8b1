"""What is verified again: the artifacts that are meant by names, all of them, or a sample."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import db
from onnx_config.errors import ErrorKind, InputError
from onnx_config.export.artifact import FERRY_FILE, ArtifactFile, content_address, read_ferry_file
from tasks.register import catalog, catalog_errors, parity_entry
from tasks.report import ParityEntry
from tasks.request import Workspace

__all__ = ["Target", "find_targets", "sample_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An artifact to compare again."""

    place: str
    """Where it is: a folder, or the URL that the catalog notes."""

    name: str
    """How messages call it."""

    model: tuple[str, str] | None = None
    """What the catalog knows of the model that it was made of: a Hub id or an absolute folder, and the revision."""

    sha256: str | None = None
    """Its content address, where the catalog knows it to be in ``place``; ``None``: it is a copy, or unknown."""

    architecture: str | None = None
    """Class of its model, where the catalog knows it."""

    conversion_id: int | None = None
    """The attempt in the catalog that made it; ``None``: the catalog does not know it."""

    checks: tuple[ParityEntry, ...] = ()
    """The comparisons so far, oldest first."""


def find_targets(names: Sequence[str], workspace: Workspace) -> list[Target]:
    """Return what is meant by each name: a folder with an artifact, or what the catalog knows by it.

    ``["all"]`` are all artifacts of the catalog, also those in quarantine.

    Raises:
        InputError: If nothing is called so (``not_found``).
        TransientError: If the catalog cannot be read (``catalog``).
    """
    engine = catalog(workspace)
    with catalog_errors(), db.session_scope(engine, read_only=True) as session:
        if list(names) == ["all"]:
            return [target for record in db.iter_artifacts(session) if (target := _of_record(record)) is not None]
        return [_named(session, name) for name in names]


def _named(session: Any, name: str) -> Target:
    folder = Path(name).expanduser()
    if (folder / FERRY_FILE).is_file():
        record = db.find_conversion(session, _address(folder))
        known = None if record is None else _of_record(record)
        place = str(folder.absolute())
        found = Target(place=place, name=name) if known is None else known
        # The copy that was named is the one that is looked at.
        return replace(found, place=place, name=name, sha256=found.sha256 if found.place == place else None)
    meant = str(folder.resolve()) if folder.is_dir() else name
    for record in filter(None, (db.find_conversion(session, meant),)):
        if (target := _of_record(record)) is not None:
            return target
        raise InputError(
            f"The catalog knows {name!r}, and its last conversion left no artifact: {record.status}. "
            "Convert it, or name an artifact that `ferry catalog list` shows."
        )
    raise InputError(
        f"{name!r} is no artifact: neither a folder that holds a {FERRY_FILE}, nor known to the catalog. "
        "`ferry catalog list` shows what is; `ferry verify all` takes them all.",
        kind=ErrorKind.NOT_FOUND,
    )


def _of_record(record: db.ConversionRecord) -> Target | None:
    if record.artifact is None:
        return None
    return Target(
        place=record.artifact.path,
        sha256=record.artifact.sha256,
        name=record.model_id,
        model=None if record.revision is None else (record.model_id, record.revision),
        architecture=record.architecture,
        conversion_id=record.id,
        checks=tuple(parity_entry(check) for check in record.parity),
    )


def _address(folder: Path) -> str:
    return content_address(_files(read_ferry_file(folder) or {}))


def _files(value: Mapping[str, Any]) -> list[ArtifactFile]:
    listed = value.get("files")
    if not isinstance(listed, Mapping):
        return []
    return [
        ArtifactFile(path=path, size_bytes=int(file["size_bytes"]), sha256=str(file["sha256"]))
        for path, file in listed.items()
    ]


def sample_of(targets: Iterable[Target], count: int, *, seed: int = 0) -> list[Target]:
    """Return so many of the targets, from as many classes of models as there are: one of each first, then another."""
    by_class: dict[str | None, list[Target]] = defaultdict(list)
    for target in targets:
        by_class[target.architecture].append(target)
    groups = [by_class[name] for name in sorted(by_class, key=str)]
    shuffled = random.Random(seed)
    shuffled.shuffle(groups)
    for group in groups:
        shuffled.shuffle(group)
    turns = (target for turn in zip_longest(*groups) for target in turn if target is not None)
    return [target for target, _ in zip(turns, range(count), strict=False)]
