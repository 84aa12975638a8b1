"""The Prefect flow: one parent task per model that calls the step tasks.

A shell around ``tasks.pipeline``. The store and the catalog are the truth, Prefect is the view: a server that
goes away in the middle costs its record of the run and nothing else. `prepare_prefect` must have been called
before this module is imported.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from prefect import flow, get_client, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events.clients import PrefectEventsClient
from prefect.events.worker import EventsWorker, emit_events_to_cloud
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_LOGGING_SETTINGS_PATH,
    temporary_settings,
)
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.prefect_environment import embedded_server
from flows.prefect_server import log_file
from onnx_config.errors import ErrorKind, TransientError
from onnx_config.export import isolate
from tasks.prefect_tasks import PREFECT_STEPS
from tasks.report import ModelEntry, Status
from tasks.request import ConversionRequest

if TYPE_CHECKING:
    from flows.batch import BatchPlan

__all__ = ["convert_model", "convert_models", "run_in_flow", "run_with_prefect"]

_logger = logging.getLogger("prefect.onnx_ferry")

_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 60.0
_STOP_SECONDS = 10.0
_TICK_SECONDS = 0.2


class _Work:
    """A batch in work. Prefect's parameters are JSON; what is none of it stays here, under a number."""

    def __init__(self, todo: Sequence[ConversionRequest], plan: BatchPlan) -> None:
        self.todo = tuple(todo)
        self.plan = plan
        self.done: dict[ConversionRequest, ModelEntry] = {}
        self.positions: set[int] = set()
        """Models whose steps are running."""

    def stop(self) -> None:
        """Kill the children in work, and those that were on their way when the others were killed."""
        self.plan.stopping.set()
        deadline = time.monotonic() + _STOP_SECONDS
        isolate.kill_all()
        while self.positions and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)
            isolate.kill_all()


_in_work: dict[int, _Work] = {}
_numbers = count(1)


@task(name="convert_model", cache_policy=NO_CACHE, persist_result=False, task_run_name="{model}")
def convert_model(model: str, work: int, position: int) -> Any:
    """Convert one model; its steps are task runs below this one. A model that fails makes this run fail."""
    from flows.batch import convert_one

    batch = _in_work[work]
    request = batch.todo[position]
    batch.positions.add(position)
    try:
        entry = convert_one(request, batch.plan, steps=PREFECT_STEPS)
    finally:
        batch.positions.discard(position)
    batch.done[request] = entry
    if entry.error is not None:
        return Failed(message=f"{entry.error.kind}: {entry.error.message}"[:1000])
    return Completed(message=f"{entry.status}: {entry.artifact}")


@flow(name="convert_models", validate_parameters=False, persist_result=False, log_prints=False)
def convert_models(models: list[str], work: int) -> Any:
    """Convert ``models``, a few at a time; ends as failed only where not one of them was verified."""
    batch = _in_work[work]
    _convert_all(batch, lambda position: convert_model.submit(models[position], work, position))
    good = sum(entry.status in (Status.CONVERTED, Status.REUSED) for entry in batch.done.values())
    message = f"{good} of {len(models)} verified"
    return Completed(message=message) if good or not models else Failed(message=message)


def run_in_flow(
    todo: Sequence[ConversionRequest], plan: BatchPlan, *, workers: int
) -> dict[ConversionRequest, ModelEntry]:
    """Convert ``todo`` as task runs of the flow run that this is called in; return the entries.

    What a server that goes away keeps from being done is left out.
    """
    number = next(_numbers)
    work = _in_work[number] = _Work(todo, plan)
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=workers)

    def submit(position: int) -> PrefectFuture[Any]:
        parameters = {"model": todo[position].model_id, "work": number, "position": position}
        return runner.submit(convert_model, parameters)

    try:
        isolate.warm_up()
        with runner:
            _convert_all(work, submit)
    # A server that goes away raises here although every model may be done; the entries tell.
    except Exception:
        _logger.exception("Prefect did not run all models; the rest is converted without it")
    finally:
        del _in_work[number]
    return work.done


def _convert_all(batch: _Work, submit: Callable[[int], PrefectFuture[Any]]) -> None:
    """Submit every model and wait for all; an interruption stops those in work and is raised again."""
    view = _Artifacts(batch.plan.batch_id)
    total = len(batch.todo)
    try:
        futures = [submit(position) for position in range(total)]
        view.start()
        for finished, future in enumerate(as_completed(futures), start=1):
            future.wait()
            view.advance(finished, total)
    except BaseException:
        batch.stop()
        raise
    view.finish(list(batch.done.values()))


class _Artifacts:
    """Progress and summary of a batch on the server, while it answers: no model waits or fails for them."""

    def __init__(self, batch_id: int) -> None:
        self._batch_id = batch_id
        self._progress: UUID | None = None
        self._silent_until = 0.0

    def start(self) -> None:
        created = self._call(
            create_progress_artifact, progress=0.0, key="conversion-progress", description="Models converted"
        )
        # In a flow that is not async the call has ended; its annotation allows for both.
        self._progress = cast("UUID | None", created)

    def advance(self, finished: int, total: int) -> None:
        if self._progress is not None:
            self._call(update_progress_artifact, self._progress, progress=100.0 * finished / total)

    def finish(self, entries: Sequence[ModelEntry]) -> None:
        self._call(
            create_table_artifact,
            key="conversion-summary",
            table=[_row(entry) for entry in entries],
            description=f"Batch {self._batch_id}: `ferry catalog list` has the details.",
        )

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() < self._silent_until:
            return None
        try:
            return function(*args, **kwargs)
        # Whatever the server or the way to it has: it is left alone for a while, since each call takes long to fail.
        except Exception as error:  # noqa: BLE001
            self._silent_until = time.monotonic() + _PAUSE_SECONDS
            _logger.error("No artifacts for a while: %s failed with %r", function.__name__, error)
            return None


def _row(entry: ModelEntry) -> dict[str, Any]:
    return {
        "model": entry.id,
        "status": entry.status.value,
        "task": entry.task or "",
        "max abs diff": entry.parity.max_abs_diff if entry.parity else None,
        "seconds": round(sum(entry.seconds.values()), 1),
        "error": f"{entry.error.kind}: {entry.error.message}"[:300] if entry.error else "",
    }


def _log_to_file(path: Path) -> None:
    """Send what Prefect has to say to a file: a model that fails is an error to it, with a traceback.

    A logging configuration that the user has given to Prefect stays.
    """
    if PREFECT_LOGGING_SETTINGS_PATH.value().exists():
        return
    to_file = logging.FileHandler(path, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)-7s | %(process)d | %(name)s - %(message)s"))
    for logger in (logging.getLogger(), *map(logging.getLogger, ("prefect._internal", "uvicorn", "fastapi"))):
        mine = [handler for handler in logger.handlers if type(handler).__module__ == "prefect.logging.handlers"]
        for handler in mine:
            logger.removeHandler(handler)
        if mine:
            logger.addHandler(to_file)


def _wait_for_server(url: str | None) -> None:
    """Return when the server answers: the one at ``url``, or the embedded one.

    Raises:
        TransientError: If it does not (``network``).
    """
    if url is None:
        if (server := embedded_server()) is not None:
            server.wait_until_ready()
        return
    settings = {PREFECT_API_REQUEST_TIMEOUT: _ANSWER_SECONDS, PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        if (error := client.api_healthcheck()) is not None:
            raise _unusable(url, error) from error


def _unusable(url: str | None, error: Exception) -> TransientError:
    where = f"The Prefect server at {url}" if url else "Prefect's embedded server"
    return TransientError(
        f"{where} cannot be used: {type(error).__name__}: {str(error)[:300]}. Check it, or run with "
        "--engine local, which needs no server.",
        kind=ErrorKind.NETWORK,
    )


def run_with_prefect(
    todo: Sequence[ConversionRequest], plan: BatchPlan, *, workers: int, url: str | None
) -> dict[ConversionRequest, ModelEntry]:
    """Run the flow over ``todo``; return the entries of the models that it came to.

    A server that goes away in the middle is named on standard error; its models are converted all the same.

    Raises:
        TransientError: If the server at ``url`` does not answer and nothing was converted (``network``).
    """
    log = log_file(plan.workspace.home)
    _log_to_file(log)
    current = os.environ.get("PREFECT_API_URL")
    # Prefect has read its settings when it was imported, which may have been before they were made.
    with temporary_settings({PREFECT_API_URL: current} if PREFECT_API_URL.value() != current else {}):
        _wait_for_server(url)
        if not emit_events_to_cloud():
            # Prefect is patient for seven seconds with each event, of which a model has twenty: a server that went away
            # would hold up the end of a batch for hours. An event that fails is sent again with the next one.
            EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=1)
        return _run_flow(todo, plan, workers=workers, url=url, log=log)


def _run_flow(
    todo: Sequence[ConversionRequest], plan: BatchPlan, *, workers: int, url: str | None, log: Path
) -> dict[ConversionRequest, ModelEntry]:
    number = next(_numbers)
    work = _in_work[number] = _Work(todo, plan)
    # A thread pool's futures are a kind of what the flow asks for, which the runner's type has no way to say.
    runner = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=workers))
    try:
        run = convert_models.with_options(task_runner=runner)
        run([request.model_id for request in todo], number, return_state=True)
    # A server that goes away raises here although every model may be done; the entries tell.
    except Exception as error:
        _logger.exception("The flow did not end as it should")
        if not work.done:
            raise _unusable(url, error) from error
        where = f"The Prefect server at {url}" if url else "Prefect's embedded server"
        sys.stderr.write(
            f"Note: {where} went away ({type(error).__name__}), so its record of this batch is incomplete. "
            f"The models and the catalog are not affected. Prefect's log is {log}.\n"
        )
    finally:
        del _in_work[number]
    return work.done
