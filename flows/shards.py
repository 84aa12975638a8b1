"""A batch in parts: each is run somewhere else, and this process follows them and makes one report.

The catalog is the truth: a part's models are done when it says so, whatever became of the run. A run that dies is
started again for what is left, a few times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

import db
from flows.batch import BatchPlan
from onnx_config.errors import ErrorKind, FerryError, ResourceError
from tasks.key import content_sha256
from tasks.lookup import look_up
from tasks.pipeline import place_known, refused
from tasks.register import catalog, catalog_errors, catalog_id, to_entry
from tasks.report import ModelEntry, Status
from tasks.request import ConversionRequest

__all__ = ["MOST_RUNS", "Look", "Outcome", "Runs", "run_key", "run_parts"]

MOST_RUNS = 3
"""Runs of one part, at most."""

Answer = TypeVar("Answer")

_TICK_SECONDS = 2.0
_PATIENCE_SECONDS = 300.0


class Outcome(StrEnum):
    """How a run is getting on."""

    WORKING = "working"
    ENDED = "ended"
    """By itself, as a success or a failure."""
    DIED = "died"
    """Its worker or its process did, or nothing was heard of it for long."""
    CANCELLED = "cancelled"
    """Somebody wanted it to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a look at a run told."""

    outcome: Outcome
    said: str = ""
    """What it ended with."""


def run_key(run: str) -> str:
    """Return the key of the lease that a run holds on itself for as long as it lives."""
    return content_sha256({"run": run})


class Runs(Protocol):
    """Where parts are run."""

    def start(self, part: int, attempt: int, requests: Sequence[ConversionRequest]) -> str:
        """Begin a run over models; return its id. Where it raises a transient error, it is called again."""

    def look(self, runs: Collection[str]) -> Mapping[str, Look]:
        """Return how runs are getting on; those of which nothing can be told now are left out."""

    def cancel(self, run: str) -> None:
        """Have a run end soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    number: int
    attempt: int
    requests: tuple[ConversionRequest, ...]


class _Follower:
    """What is known of a batch that others work at."""

    def __init__(self, todo: Sequence[ConversionRequest], plan: BatchPlan) -> None:
        self._plan = plan
        self._last = 0
        self._asked: dict[tuple[str, str | None, str], list[ConversionRequest]] = {}
        for request in todo:
            identity = _identity(catalog_id(request.model_id), request.revision, request.options.to_json())
            self._asked.setdefault(identity, []).append(request)
        self.done: dict[ConversionRequest, ModelEntry] = {}

    def read(self) -> None:
        """Take over what was recorded since the last time."""
        with catalog_errors(), db.session_scope(catalog(self._plan.workspace), read_only=True) as session:
            records = db.batch_conversions(session, self._plan.batch_id, after=self._last)
        for record in records:
            self._last = max(self._last, record.id or 0)
            identity = _identity(record.model_id, record.requested_revision, dict(record.options))
            for request in self._asked.get(identity, ()):
                self._take(request, to_entry(record, model_id=request.model_id, status=Status(record.status)))

    def find(self, requests: Collection[ConversionRequest]) -> None:
        """Take over what is converted of models though this batch did not record it: somebody else did it meanwhile."""
        found = look_up(requests, self._plan.workspace, retry_failed=frozenset(ErrorKind), refresh=self._plan.refresh)
        for request, lookup in found.items():
            if not isinstance(lookup, FerryError) and lookup.known is not None:
                self._take(request, lookup.known)

    def give_up(self, requests: Collection[ConversionRequest], error: FerryError) -> None:
        """Record models as failed."""
        for request in requests:
            entry = refused(request, error, self._plan.workspace, batch_id=self._plan.batch_id)
            self.done[request] = entry
            self._plan.listener.model_finished(entry)

    def _take(self, request: ConversionRequest, entry: ModelEntry) -> None:
        if request not in self.done:
            self._plan.listener.model_finished(entry)
        self.done[request] = place_known(entry, request, self._plan.outputs[request], self._plan.workspace)

    def left(self, requests: Collection[ConversionRequest]) -> tuple[ConversionRequest, ...]:
        return tuple(request for request in requests if request not in self.done)


def _identity(model_id: str, revision: str | None, options: Mapping[str, object]) -> tuple[str, str | None, str]:
    return model_id, revision, repr(sorted((key, str(value)) for key, value in options.items()))


def run_parts(
    parts: Sequence[Sequence[ConversionRequest]],
    plan: BatchPlan,
    runs: Runs,
    *,
    pause: Callable[[float], None] = time.sleep,
) -> dict[ConversionRequest, ModelEntry]:
    """Run every part, follow all until they end, and return an entry for each model.

    A part whose run died is started again for the models that are left, `MOST_RUNS` times in all; what is left after
    that is recorded as ``crashed``. An interruption cancels the runs and is raised again.
    """
    everything = [request for part in parts for request in part]
    follower = _Follower(everything, plan)
    working: dict[str, _Part] = {}

    def start(part: _Part) -> None:
        run = _patiently(lambda: runs.start(part.number, part.attempt, part.requests), pause)
        working[run] = part

    try:
        for number, requests in enumerate(parts, start=1):
            start(_Part(number=number, attempt=1, requests=tuple(requests)))
        while working:
            pause(_TICK_SECONDS)
            looks = runs.look(list(working))
            # After the look: what a run recorded before it ended is read below.
            _patiently(follower.read, pause)
            for run, look in looks.items():
                if look.outcome is Outcome.WORKING:
                    continue
                part = working.pop(run)
                if left := follower.left(part.requests):
                    _patiently(lambda left=left: follower.find(left), pause)  # type: ignore[misc]
                if not (left := follower.left(part.requests)):
                    continue
                if look.outcome is not Outcome.CANCELLED and part.attempt < MOST_RUNS:
                    start(_Part(number=part.number, attempt=part.attempt + 1, requests=left))
                else:
                    follower.give_up(left, _lost(part, look))
    except BaseException:
        for run in working:
            runs.cancel(run)
        raise
    return follower.done


def _patiently(ask: Callable[[], Answer], pause: Callable[[float], None]) -> Answer:
    """Call ``ask`` until the catalog or the server of the runs answers: those who convert wait for them too."""
    waited = 0.0
    while True:
        try:
            return ask()
        except FerryError as error:
            if not error.kind.transient or waited > _PATIENCE_SECONDS:
                raise
        pause(_TICK_SECONDS)
        waited += _TICK_SECONDS


def _lost(part: _Part, look: Look) -> FerryError:
    how = (
        "was cancelled" if look.outcome is Outcome.CANCELLED else f"ended {part.attempt} times without a result for it"
    )
    said = f", the last time with: {look.said}" if look.said else ""
    return ResourceError(
        f"The run that had this model (part {part.number}) {how}{said}. Look at the worker's log, and run again: "
        "what is converted is not converted twice.",
        kind=ErrorKind.CRASHED,
    )
