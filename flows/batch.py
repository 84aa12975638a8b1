"""A batch: look everything up, convert what is not done, report.

What is done already never reaches an engine, so that a batch with nothing to do starts nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import db
from flows.prefect_environment import prepare_prefect
from onnx_config.errors import ErrorKind, FerryError
from onnx_config.export import isolate
from onnx_config.export.scratch import remove_orphans
from tasks.crew import Crew
from tasks.job import raise_if_stopping
from tasks.lookup import Lookup, look_up
from tasks.memory import MemoryGate, weight_bytes_in
from tasks.pipeline import convert_model, place_known, refused
from tasks.place import safe_name
from tasks.register import catalog, catalog_errors, patiently
from tasks.report import Engine, ModelEntry, Report, Status
from tasks.request import ConversionRequest, Listener, Refresh, Workspace
from tasks.steps import PLAIN_STEPS, Steps
from tasks.store import store_of

__all__ = ["BatchEnd", "BatchPlan", "Runner", "convert_one", "run_batch", "run_locally"]

TERMINATED = 143
"""Exit status after SIGTERM, as shells have it: 128 and the signal's number."""

_END_SECONDS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What every conversion of a batch shares."""

    workspace: Workspace
    """Where things are kept."""

    outputs: dict[ConversionRequest, Path | None]
    """Folder for each model's files, beside the store."""

    gate: MemoryGate
    """The memory that all share."""

    retry_failed: frozenset[ErrorKind]
    """Remembered failures to try again."""

    refresh: Refresh | None
    """What counts as changed beside commit and options."""

    listener: Listener
    """Is told of each step."""

    batch_id: int
    """The batch's number in the catalog."""

    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the batch is interrupted: models that wait their turn are not begun any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnd:
    """A batch that has ended."""

    batch_id: int
    """Its number in the catalog."""

    engine: Engine
    """Who ran it."""

    worked: bool
    """Whether there was a model to convert; else all were known, and no engine was called."""

    report: Report
    """What became of its models."""


# What needs no work: the number of the attempt in the catalog that it is known from, and how that ended.
_Done: TypeAlias = tuple[int | None, Status]

Runner: TypeAlias = Callable[[Sequence[ConversionRequest], BatchPlan], dict[ConversionRequest, ModelEntry]]
"""Converts the models of a batch that are not converted yet; those that it leaves out are done on plain threads."""


def run_batch(
    requests: Sequence[ConversionRequest],
    workspace: Workspace,
    *,
    output: Path | None,
    workers: int,
    engine: Engine,
    retry_failed: frozenset[ErrorKind] | None,
    listener: Listener,
    refresh: Refresh | None = None,
    gate: MemoryGate | None = None,
    runner: Runner | None = None,
    batch_id: int | None = None,
    ended: Callable[[BatchEnd], None] | None = None,
) -> Report:
    """Convert every model that is not converted yet; return the report over all, in the order given.

    Args:
        requests: The models.
        workspace: Where things are kept.
        output: Folder that gets one folder per model; ``None``: the store alone.
        workers: Models in work at a time.
        engine: Prefect or plain threads.
        retry_failed: Kinds of remembered failures to try again; ``None``: none.
        listener: Is told how the batch advances.
        refresh: What counts as changed beside commit and options; ``None``: nothing.
        gate: The memory that all conversions share; ``None``: that of the workspace, in this process alone.
        runner: Who converts, where it is neither of the engines.
        batch_id: The batch of the catalog that this one is a part of; ``None``: it is one of its own.
        ended: Is told when a batch of its own has ended and is recorded.

    Raises:
        InputError: If the store is not there (``bad_input``); nothing was started then.
        TransientError: If the catalog or the store does not answer (``catalog``, ``store``); the same.
        KeyboardInterrupt: If the batch is interrupted; what was converted stays converted, and of what was in
            work nothing is left or recorded.
        SystemExit: The same after SIGTERM, with the exit status 143.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    retried = retry_failed or frozenset()
    outputs = _outputs(requests, output)
    store_of(workspace).check()
    found = look_up(requests, workspace, retry_failed=retried, refresh=refresh)
    remove_orphans(workspace.home)
    done = [
        (lookup.conversion_id, lookup.known.status)
        for lookup in found.values()
        if isinstance(lookup, Lookup) and lookup.known is not None
    ]
    number = _start(workspace, engine, started_at, done, models=len(found)) if batch_id is None else batch_id
    entries: dict[ConversionRequest, ModelEntry] = {}
    todo: list[ConversionRequest] = []
    for request, lookup in found.items():
        entry = _known(request, lookup, outputs[request], workspace, number)
        if entry is None:
            todo.append(request)
        else:
            entries[request] = entry
            listener.model_finished(entry)
    _note_done(done, workspace, number)
    if todo:
        plan = BatchPlan(
            workspace=workspace,
            outputs=outputs,
            gate=gate or MemoryGate(workspace.memory_limit_bytes, workers=min(workers, len(todo))),
            retry_failed=retried,
            refresh=refresh,
            listener=listener,
            batch_id=number,
        )
        # The biggest last: whoever waits for much memory keeps a worker from all the others.
        todo.sort(key=lambda request: _bytes_to_read(found[request]))
        with _terminated_by_exit():
            entries |= _run(todo, plan, workers=workers, engine=engine, runner=runner)
    report = Report.of(
        [entries[request] for request in requests], started_at=started_at, seconds=time.monotonic() - start
    )
    if batch_id is None:
        totals = db.BatchTotals(**report.totals.model_dump())
        # A catalog that is gone by now, or whose disk is full, must not cost the report as well.
        with suppress(FerryError):
            _finish(workspace, number, totals)
        if ended is not None:
            ended(BatchEnd(batch_id=number, engine=engine, worked=bool(todo), report=report))
    return report


def _start(workspace: Workspace, engine: Engine, started_at: datetime, done: Sequence[_Done], *, models: int) -> int:
    opened = catalog(workspace)
    count = Counter(status for _, status in done)
    totals = db.BatchTotals(**{status.value: count[status] for status in Status})

    def start() -> int:
        with db.session_scope(opened) as session:
            db.forget_lapsed_leases(session)
            return db.start_batch(session, engine=engine.value, started_at=started_at, models=models, found=totals)

    return patiently(workspace, start)


def _finish(workspace: Workspace, number: int, totals: db.BatchTotals) -> None:
    opened = catalog(workspace)

    def finish() -> None:
        with db.session_scope(opened) as session:
            db.finish_batch(session, number, totals, finished_at=datetime.now(UTC))

    patiently(workspace, finish)


def _note_done(done: Sequence[_Done], workspace: Workspace, batch_id: int) -> None:
    """Have the catalog know what needs no work: it is no attempt, and a run that shows none of it would look empty."""
    numbers = [(number, status.value) for number, status in done if number is not None]
    # Pages are read by people; a batch goes on without them.
    with suppress(FerryError), catalog_errors(), db.session_scope(catalog(workspace)) as session:
        db.note_found_done(session, batch_id, numbers, found_at=datetime.now(UTC))


def _bytes_to_read(lookup: Lookup | FerryError) -> int:
    """Return the size of a model's weights; 0 where they are not here yet, or cannot be read."""
    if isinstance(lookup, FerryError) or lookup.source.folder is None:
        return 0
    try:
        return weight_bytes_in(lookup.source.folder)
    # Whoever converts it says what is wrong with it.
    except (OSError, FerryError):
        return 0


def _known(
    request: ConversionRequest, lookup: Lookup | FerryError, output: Path | None, workspace: Workspace, batch_id: int
) -> ModelEntry | None:
    """Return the entry of a model that needs no work: done before, or not to be found."""
    if isinstance(lookup, FerryError):
        return refused(request, lookup, workspace, batch_id=batch_id)
    return None if lookup.known is None else place_known(lookup.known, request, output, workspace)


def _run(
    todo: Sequence[ConversionRequest], plan: BatchPlan, *, workers: int, engine: Engine, runner: Runner | None
) -> dict[ConversionRequest, ModelEntry]:
    if runner is not None:
        done = runner(todo, plan)
        return done | run_locally([request for request in todo if request not in done], plan, workers=workers)
    # The server's imports take seconds; they go on beside all that comes before the first step.
    isolate.warm_up()
    match engine:
        case Engine.LOCAL:
            return run_locally(todo, plan, workers=workers)
        case Engine.PREFECT:
            url = prepare_prefect(plan.workspace.home)
            from flows.prefect_engine import run_with_prefect

            done = run_with_prefect(todo, plan, workers=workers, url=url)
            # What Prefect lost with its server is converted all the same.
            rest = [request for request in todo if request not in done]
            return done | run_locally(rest, plan, workers=workers)


def run_locally(
    todo: Sequence[ConversionRequest], plan: BatchPlan, *, workers: int
) -> dict[ConversionRequest, ModelEntry]:
    """Convert ``todo`` on plain threads, ``workers`` at a time; return the entries.

    An interruption kills the children in work and is raised again, within seconds even where a download goes on.
    """
    crew: Crew[ConversionRequest, ModelEntry] = Crew(lambda request: convert_one(request, plan), todo, workers=workers)
    try:
        return dict(crew.results())
    except BaseException:
        plan.stopping.set()
        # Again and again, since a child may have been on its way when the others were killed.
        crew.dismiss(seconds=_END_SECONDS, meanwhile=isolate.kill_all)
        raise


def convert_one(request: ConversionRequest, plan: BatchPlan, *, steps: Steps = PLAIN_STEPS) -> ModelEntry:
    """Convert one model of a batch.

    Raises:
        KeyboardInterrupt: If the batch was interrupted.
    """
    raise_if_stopping(plan.stopping)
    return convert_model(
        request,
        plan.workspace,
        output=plan.outputs[request],
        listener=plan.listener,
        gate=plan.gate,
        retry_failed=plan.retry_failed,
        refresh=plan.refresh,
        batch_id=plan.batch_id,
        stopping=plan.stopping,
        steps=steps,
    )


def _outputs(requests: Sequence[ConversionRequest], output: Path | None) -> dict[ConversionRequest, Path | None]:
    """Give every model a folder of its own; models whose names would collide get a number."""
    taken: set[str] = set()
    folders: dict[ConversionRequest, Path | None] = {}
    for request in requests:
        name = stem = safe_name(request.model_id)
        number = 2
        while name.lower() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.lower())
        folders[request] = None if output is None else output.absolute() / name
    return folders


@contextmanager
def _terminated_by_exit() -> Iterator[None]:
    """End by an exception on SIGTERM, as on Ctrl-C, so that children are killed and nothing is left running.

    Whoever has a handler already, as a flow of Prefect's has, keeps it: it is their word how the process ends.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
