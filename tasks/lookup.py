"""Looking models up: at which revision they are, and what an earlier run made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import db
from onnx_config import hub
from onnx_config.errors import ErrorKind, FerryError, InputError, InternalError
from tasks.crew import Crew
from tasks.key import action_key
from tasks.register import known_results, to_entry
from tasks.report import ModelEntry, Status, Step
from tasks.request import ConversionRequest, Workspace
from tasks.retry import with_retries
from tasks.store import store_of

__all__ = ["Lookup", "look_up", "resolve", "unforeseen", "usable"]

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


def look_up(
    requests: Iterable[ConversionRequest], workspace: Workspace, *, retry_failed: frozenset[ErrorKind] | None = None
) -> dict[ConversionRequest, Lookup | FerryError]:
    """Resolve every model and find out what is done already; starts and downloads nothing.

    Args:
        requests: The models.
        workspace: Where things are kept.
        retry_failed: Kinds of remembered failures that are to be tried again.

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
    keys = {lookup.key for lookup in found.values() if isinstance(lookup, Lookup)}
    records = known_results(workspace, keys)

    def judge(request: ConversionRequest) -> Lookup | FerryError:
        lookup = found[request]
        if not isinstance(lookup, Lookup) or (record := records.get(lookup.key)) is None:
            return lookup
        try:
            return replace(lookup, known=usable(record, request, workspace, retry_failed or frozenset()))
        except FerryError as error:
            return error

    # A store elsewhere takes its time to answer, too.
    judged = dict(Crew(judge, wanted, workers=_LOOKUPS).results())
    return {request: judged[request] for request in wanted}


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
    try:
        source = hub.resolve(request.model_id, revision=request.revision)
    # The second is what pathlib raises where nobody has the home folder that a "~" stands for.
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"The model {request.model_id!r} cannot be read: {error}. Check the name and the permissions."
        ) from error
    model = "" if source.folder is not None else source.model_id
    return Lookup(request=request, source=source, key=action_key(model, source.revision, request.options), known=None)


def usable(
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
    return to_entry(record, model_id=request.model_id, status=Status.REUSED)
