"""Looking models up: at which revision they are, and what an earlier run made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import db
from onnx_config import hub
from onnx_config.errors import ErrorKind, FerryError, InputError, InternalError
from tasks.crew import Crew
from tasks.key import action_key
from tasks.register import EPOCH_NAME, catalog_id, known_results, results_of_revisions, to_entry
from tasks.report import ModelEntry, Status, Step
from tasks.request import ConversionRequest, Refresh, Workspace
from tasks.retry import with_retries
from tasks.store import store_of
from tasks.variants import known_variants
from tasks.versions import CODE_EPOCH, package_versions

__all__ = ["Lookup", "find_known", "look_up", "resolve", "unforeseen"]

_LOOKUPS = 8
# Steps that read nothing but the model: only there bad input says something of it, and not of a disk or a device.
_ABOUT_THE_MODEL = (Step.DETECT, Step.EXPORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """A model found, and what an earlier run made of it."""

    request: ConversionRequest
    source: hub.Source
    key: str
    known: ModelEntry | None
    """The result to report again; ``None``: there is work to do."""
    conversion_id: int | None = None
    """The attempt in the catalog that it is the result of."""


def look_up(
    requests: Iterable[ConversionRequest],
    workspace: Workspace,
    *,
    retry_failed: frozenset[ErrorKind] | None = None,
    refresh: Refresh | None = None,
) -> dict[ConversionRequest, Lookup | FerryError]:
    """Resolve every model and find out what is done already; starts and downloads nothing.

    Args:
        requests: The models.
        workspace: Where things are kept.
        retry_failed: Kinds of remembered failures that are to be tried again.
        refresh: What counts as changed beside commit and options; ``None``: nothing.

    Returns:
        Per request what was found, or why the model cannot be looked up.

    Raises:
        TransientError: If the catalog cannot be read (``catalog``).
    """
    found: dict[ConversionRequest, Lookup | FerryError] = {}
    wanted = list(dict.fromkeys(requests))
    # The Hub takes its time to answer, and hashing a folder waits for the disk.
    answers = dict(Crew(_resolve_or_error, wanted, workers=_LOOKUPS).results())
    for request in wanted:
        found[request] = answers[request]
    lookups = [lookup for lookup in found.values() if isinstance(lookup, Lookup)]
    for request, known in _find(lookups, workspace, retry_failed or frozenset(), refresh).items():
        found[request] = replace(found[request], known=known.entry, conversion_id=known.conversion_id)  # type: ignore[type-var]  # only lookups were asked for
    return found


def _resolve_or_error(request: ConversionRequest) -> Lookup | FerryError:
    try:
        found: Lookup = resolve(request)
    except FerryError as error:
        return error
    # One model that nobody foresaw must not end the look at all the others.
    except Exception as error:  # noqa: BLE001
        return unforeseen(error)
    return found


def unforeseen(error: Exception) -> InternalError:
    wrapped = InternalError(f"onnx-ferry failed with {type(error).__name__}: {error}. Please report this.")
    wrapped.__cause__ = error
    return wrapped


@with_retries
def resolve(request: ConversionRequest) -> Lookup:
    if request.options.trust_remote_code:
        hub.refuse_unpinned_code(request.model_id, revision=request.revision)
    try:
        source = hub.resolve(request.model_id, revision=request.revision)
    # The second is what pathlib raises where nobody has the home folder that a "~" stands for.
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"The model {request.model_id!r} cannot be read: {error}. Check the name and the permissions."
        ) from error
    model = "" if source.folder is not None else source.model_id
    return Lookup(request=request, source=source, key=action_key(model, source.revision, request.options), known=None)


@dataclass(frozen=True, slots=True)
class _Known:
    entry: ModelEntry
    conversion_id: int | None


def find_known(
    lookups: Iterable[Lookup], workspace: Workspace, retry_failed: frozenset[ErrorKind], refresh: Refresh | None
) -> dict[ConversionRequest, ModelEntry]:
    """Return what earlier runs made of models: those that are not to be converted, by request.

    First by key, which has the versions in it; then, unless they count, a verified artifact that other versions made of
    the same commit with the same options. Failures are known for their versions alone: others may do better.

    Raises:
        TransientError: If the catalog cannot be read (``catalog``).
    """
    return {request: known.entry for request, known in _find(lookups, workspace, retry_failed, refresh).items()}


def _find(
    lookups: Iterable[Lookup], workspace: Workspace, retry_failed: frozenset[ErrorKind], refresh: Refresh | None
) -> dict[ConversionRequest, _Known]:
    wanted = list(lookups)
    known: dict[ConversionRequest, _Known] = {}
    rest: list[Lookup] = []
    records = known_results(workspace, {lookup.key for lookup in wanted})
    for lookup in wanted:
        record = records.get(lookup.key)
        entry = None if record is None else _usable(record, lookup.request, workspace, retry_failed)
        if record is not None and entry is not None:
            known[lookup.request] = _Known(entry, record.id)
        elif record is None:
            rest.append(lookup)
    if refresh is None and rest:
        known |= _made_by_other_versions(rest, workspace)
    return known


def _made_by_other_versions(lookups: Iterable[Lookup], workspace: Workspace) -> dict[ConversionRequest, _Known]:
    asked: dict[tuple[str, str], list[ConversionRequest]] = {}
    for lookup in lookups:
        asked.setdefault((catalog_id(lookup.source.model_id), lookup.source.revision), []).append(lookup.request)
    known: dict[ConversionRequest, _Known] = {}
    for record in results_of_revisions(workspace, asked):
        # Where this code makes other graphs by now, or nobody knows whether it does, the model is converted again.
        if record.environment.get(EPOCH_NAME) != str(CODE_EPOCH) or record.revision is None:
            continue
        for request in asked.get((record.model_id, record.revision), ()):
            if request in known or request.options.to_json() != dict(record.options):
                continue
            entry = _usable(record, request, workspace, frozenset())
            if entry is not None and entry.status is Status.REUSED:
                notes = (*entry.notes, _versions_note(record.environment))
                noted = entry.model_copy(update={"notes": tuple(dict.fromkeys(notes))})
                known[request] = _Known(noted, record.id)
    return known


def _versions_note(made_with: Mapping[str, str]) -> str:
    now = package_versions()
    changed = [
        f"{name} {made_with.get(name, 'none')} (now {now.get(name, 'none')})"
        for name in sorted({*now, *made_with} - {EPOCH_NAME})
        if made_with.get(name) != now.get(name)
    ]
    return f"converted with {', '.join(changed)}; --refresh versions converts it again"


def _usable(
    record: db.ConversionRecord, request: ConversionRequest, workspace: Workspace, retry_failed: frozenset[ErrorKind]
) -> ModelEntry | None:
    """Return the entry that an earlier result is worth; ``None`` if the model is to be converted.

    Raises:
        InputError: If the artifact's store may not be read (``bad_input``).
        TransientError: If it does not answer (``store``).
    """
    if record.error is not None:
        kind = ErrorKind(record.error.kind)
        if not kind.remembered or kind in retry_failed:
            return None
        if kind is ErrorKind.BAD_INPUT and record.error.step not in _ABOUT_THE_MODEL:
            return None
        entry = to_entry(record, model_id=request.model_id, status=Status(record.status))
        note = "known from an earlier run with the same versions; --retry-failed tries again"
        return entry.model_copy(update={"notes": tuple(dict.fromkeys((*entry.notes, note)))})
    artifact = record.artifact
    if artifact is None or artifact.quarantined:
        return None
    store = store_of(workspace, artifact.path)
    if not store.is_whole(artifact.path, [(f.path, f.size_bytes) for f in artifact.files]):
        return None
    entry = to_entry(record, model_id=request.model_id, status=Status.REUSED)
    if not request.options.variants:
        return entry
    return entry.model_copy(update={"variants": known_variants(store.folder(artifact.path), artifact.path)})
