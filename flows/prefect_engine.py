"""The Prefect flow: one parent task per model that calls the step tasks.

A shell around ``tasks.pipeline``. The store and the catalog are the truth, Prefect is the view: a server that
goes away in the middle costs its record of the run and nothing else. `prepare_prefect` must have been called
before this module is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from prefect import flow, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from onnx_config.errors import ErrorKind, TransientError
from onnx_config.export import isolate
from tasks.prefect_tasks import PREFECT_STEPS
from tasks.report import ModelEntry, Status
from tasks.request import ConversionRequest

if TYPE_CHECKING:
    from flows.convert_models import BatchPlan

__all__ = ["convert_model", "convert_models", "run_with_prefect"]


class _Work:
    """A batch in work. Prefect's parameters are JSON; what is none of it stays here, under a number."""

    def __init__(self, todo: Sequence[ConversionRequest], plan: BatchPlan) -> None:
        self.todo = tuple(todo)
        self.plan = plan
        self.done: dict[ConversionRequest, ModelEntry] = {}


_in_work: dict[int, _Work] = {}
_numbers = count(1)


@task(name="convert_model", cache_policy=NO_CACHE, persist_result=False, task_run_name="{model}")
def convert_model(model: str, work: int, position: int) -> Any:
    """Convert one model; its steps are task runs below this one. A model that fails makes this run fail."""
    from flows.convert_models import convert_one

    batch = _in_work[work]
    request = batch.todo[position]
    entry = convert_one(request, batch.plan, steps=PREFECT_STEPS)
    batch.done[request] = entry
    if entry.error is not None:
        return Failed(message=f"{entry.error.kind}: {entry.error.message}"[:1000])
    return Completed(message=f"{entry.status}: {entry.artifact}")


@flow(name="convert_models", validate_parameters=False, persist_result=False, log_prints=False)
def convert_models(models: list[str], work: int) -> Any:
    """Convert ``models``, a few at a time; ends as failed only where not one of them was verified."""
    batch = _in_work[work]
    created = create_progress_artifact(progress=0.0, key="conversion-progress", description="Models converted")
    # In a flow that is not async the call has ended; its annotation allows for both.
    progress = cast(UUID, created)
    try:
        futures = [convert_model.submit(model, work, position) for position, model in enumerate(models)]
        for finished, future in enumerate(as_completed(futures), start=1):
            future.wait()
            update_progress_artifact(progress, progress=100.0 * finished / len(models))
    except BaseException:
        batch.plan.stopping.set()
        isolate.kill_all()
        raise
    entries = list(batch.done.values())
    create_table_artifact(
        key="conversion-summary",
        table=[_row(entry) for entry in entries],
        description=f"Batch {batch.plan.batch_id}: `ferry catalog list` has the details.",
    )
    good = sum(entry.status in (Status.CONVERTED, Status.REUSED) for entry in entries)
    message = f"{good} of {len(models)} verified"
    return Completed(message=message) if good or not models else Failed(message=message)


def _row(entry: ModelEntry) -> dict[str, Any]:
    return {
        "model": entry.id,
        "status": entry.status.value,
        "task": entry.task or "",
        "max abs diff": entry.parity.max_abs_diff if entry.parity else None,
        "seconds": round(sum(entry.seconds.values()), 1),
        "error": f"{entry.error.kind}: {entry.error.message}"[:300] if entry.error else "",
    }


def run_with_prefect(
    todo: Sequence[ConversionRequest], plan: BatchPlan, *, workers: int, url: str | None
) -> dict[ConversionRequest, ModelEntry]:
    """Run the flow over ``todo``; return the entries, those of models that Prefect lost included.

    Raises:
        TransientError: If the server at ``url`` does not answer and nothing was converted (``network``).
    """
    number = next(_numbers)
    work = _in_work[number] = _Work(todo, plan)
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=workers)
    try:
        run = convert_models.with_options(task_runner=runner)
        run([request.model_id for request in todo], number, return_state=True)
    except KeyboardInterrupt:
        raise
    # A server that goes away raises here although every model may be done; the entries below tell.
    except Exception as error:
        if not work.done:
            where = f"The Prefect server at {url}" if url else "Prefect's embedded server"
            raise TransientError(
                f"{where} cannot be used: {type(error).__name__}: {str(error)[:300]}. Check it, or run with "
                "--engine local, which needs no server.",
                kind=ErrorKind.NETWORK,
            ) from error
    finally:
        del _in_work[number]
    return work.done
