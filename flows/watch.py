"""A batch that runs elsewhere, followed from the catalog: who records a model there tells whoever watches.

Nothing is asked of Prefect or of the machine that works, and nothing is written. What a batch finds done it counts when
it begins; of the rest every model is recorded as it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text
from sqlalchemy.orm import Session

import db
from flows.progress import duration, progress_for, summary
from onnx_config.errors import InputError, TransientError
from tasks.register import catalog, catalog_errors, to_entry
from tasks.report import ModelEntry, Report, Status, Step, Totals
from tasks.request import Listener, Workspace

__all__ = ["LATEST", "WatchedBatch", "find_batch", "follow", "watch_batch"]

LATEST = "latest"
"""Stands for the newest batch, of those that run if one does."""

_POLL_SECONDS = 2.0
_QUIET_SECONDS = 600.0
# A database that is being restarted is waited for as long as a batch itself waits.
_PATIENCE_SECONDS = 60.0
# Numbers are given out before what they stand for is written: a lower one may appear after a higher.
_OVERLAP = 500
_LOOKED_AT = 50
_MOST_IN_WORK = 1000
_SETTLED_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedBatch:
    """What the catalog says of a batch when it is found."""

    id: int
    """Its number."""

    engine: str
    """Who runs its steps."""

    started_at: datetime
    """When it began."""

    models: int | None
    """How many it was asked for; ``None``: an older onnx-ferry did not write that down."""

    found: int | None
    """How many of them were done when it began, or known to fail; ``None``: not known, or no longer."""

    ended: bool
    """Whether it has ended."""

    @property
    def to_record(self) -> int | None:
        """How many models are recorded until it ends; ``None``: nobody knows."""
        return None if self.models is None or self.found is None else max(0, self.models - self.found)


def follow(name: str, workspace: Workspace, console: Console) -> Report:
    """Show how a batch goes on until it ends, then what became of its models; return the report.

    Raises:
        InputError: If there is no such batch, or no catalog (``bad_input``).
        TransientError: If the catalog does not answer (``catalog``).
    """
    batch = find_batch(workspace, name)
    began = f"batch {batch.id}, since {batch.started_at:%Y-%m-%d %H:%M} UTC, {batch.engine}"
    if batch.models is not None:
        began += f": {batch.models} model{'' if batch.models == 1 else 's'}"
    if batch.found is not None:
        began += f", {batch.found} known when it began"
    console.print(Text(began), soft_wrap=True)

    def quiet(seconds: float) -> None:
        words = (
            f"Nothing was recorded for {duration(seconds)}: it works at something large, or it was killed. Ctrl-C ends "
            "watching; the batch goes on."
        )
        console.print(Text(words, "dim"), soft_wrap=True)

    with progress_for(console, batch.to_record) as listener:
        report = watch_batch(batch, workspace, listener=listener, quiet=quiet)
    summary(console, report)
    listed = sum(entry.status in (Status.FAILED, Status.MISMATCH) for entry in report.models)
    if untold := report.totals.failed + report.totals.mismatch - listed:
        words = (
            f"{untold} failed as in an earlier run and are not listed: `ferry catalog list --status failed` has them."
        )
        console.print(Text(words), soft_wrap=True)
    return report


def find_batch(workspace: Workspace, name: str) -> WatchedBatch:
    """Return the batch with a number, or the one that ``latest`` means.

    Raises:
        InputError: If there is none (``bad_input``).
        TransientError: If the catalog does not answer (``catalog``).
    """
    with catalog_errors():
        if db.schema_version(db.make_engine(workspace.catalog_url)) is None:
            raise InputError(
                "There is no catalog here yet, so no batch to follow. Name it with --catalog-url or --home."
            )
    with _reading(workspace) as session:
        newest = db.list_batches(session, limit=_LOOKED_AT)
        if name == LATEST:
            batch = next((one for one in newest if one.finished_at is None), newest[0] if newest else None)
        else:
            number = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else 0
            batch = db.get_batch(session, number) if number else None
    if batch is None:
        there = f"the newest are {', '.join(str(one.id) for one in newest[:5])}" if newest else "there was none yet"
        raise InputError(
            f"No batch has the number {name!r} in this catalog; {there}. Give one of them, or `--watch {LATEST}`; a "
            "catalog elsewhere is named with --catalog-url."
        )
    found = None if batch.found is None else batch.found.models
    return WatchedBatch(
        id=batch.id,
        engine=batch.engine,
        started_at=batch.started_at,
        models=batch.models,
        found=found,
        ended=batch.finished_at is not None,
    )


def watch_batch(
    batch: WatchedBatch,
    workspace: Workspace,
    *,
    listener: Listener,
    quiet: Callable[[float], None],
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Tell of each model that the batch records, until it ends; return the report over what it recorded.

    Of a model in work the listener hears the step, as its worker last said.

    The report's totals are the batch's own: they count also what was found done and is no entry.

    Args:
        batch: The one to follow.
        workspace: Where the catalog is.
        listener: Is told of each step that is seen to run, and of each model that ended.
        quiet: Is told, each time that nothing was recorded for ten minutes more, for how many seconds.
        pause: Waits.
        clock: Seconds that only go forward.

    Raises:
        TransientError: If the catalog does not answer for a minute (``catalog``).
    """
    seen: set[int] = set()
    newest = 0
    at_work: dict[str, str | None] = {}
    heard = told = answered = clock()
    while True:
        try:
            with _reading(workspace) as session:
                # Both as of one moment: when it has ended, all that it recorded is there.
                found = db.get_batch(session, batch.id)
                records = db.batch_conversions(session, batch.id, after=max(0, newest - _OVERLAP))
                running = db.list_running(session, batch_id=batch.id, limit=_MOST_IN_WORK)
            answered = clock()
        except TransientError:
            if clock() - answered > _PATIENCE_SECONDS:
                raise
            pause(_POLL_SECONDS)
            continue
        for record in records:
            number = record.id or 0
            newest = max(newest, number)
            if number not in seen:
                seen.add(number)
                heard = told = clock()
                at_work.pop(record.model_id, None)
                listener.model_finished(_entry(record))
        _tell_steps(listener, running, at_work)
        if found is None or found.finished_at is not None:
            return _report(batch, found, workspace)
        if clock() - told > _QUIET_SECONDS:
            told = clock()
            quiet(told - heard)
        pause(_POLL_SECONDS)


def _tell_steps(listener: Listener, running: list[db.RunningConversion], at_work: dict[str, str | None]) -> None:
    """Tell of models that are in work since the last look, and of steps that began since; keep what was told."""
    for model in reversed(running):
        # What turns out to be done already is gone at once, and nothing is recorded of it that would end it here.
        if model.step == Step.FETCH and model.seconds < _SETTLED_SECONDS:
            continue
        if model.model_id not in at_work:
            listener.model_started(model.model_id)
            at_work[model.model_id] = None
        if model.step is not None and model.step != at_work[model.model_id]:
            listener.step_started(model.model_id, Step(model.step))
            at_work[model.model_id] = model.step


def _report(batch: WatchedBatch, ended: db.BatchRecord | None, workspace: Workspace) -> Report:
    with _reading(workspace) as session:
        entries = [_entry(record) for record in db.batch_conversions(session, batch.id)]
    end = datetime.now(UTC) if ended is None or ended.finished_at is None else ended.finished_at
    report = Report.of(entries, started_at=batch.started_at, seconds=(end - batch.started_at).total_seconds())
    if ended is None or ended.totals is None:
        return report
    totals = ended.totals
    own = Totals(converted=totals.converted, reused=totals.reused, failed=totals.failed, mismatch=totals.mismatch)
    return report.model_copy(update={"totals": own})


def _entry(record: db.ConversionRecord) -> ModelEntry:
    return to_entry(record, model_id=record.model_id, status=Status(record.status))


@contextmanager
def _reading(workspace: Workspace) -> Iterator[Session]:
    with catalog_errors(), db.session_scope(catalog(workspace), read_only=True) as session:
        yield session
