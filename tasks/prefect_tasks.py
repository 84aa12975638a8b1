"""Prefect policy for the steps: names, retries. No logic; the only module here that knows Prefect.

Results are kept in the store and the catalog, which are looked up before a task is started; so Prefect caches
nothing. A step's time limit is its child's: Prefect's own cannot stop native code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff
from prefect.transactions import CommitMode, transaction
from prefect.utilities.annotations import opaque

from onnx_config.errors import FerryError
from tasks.detect import detect
from tasks.export import export
from tasks.join import join
from tasks.parity import check
from tasks.register import register
from tasks.retry import RETRIES, RETRY_WAIT_SECONDS, is_transient
from tasks.simplify import simplify
from tasks.steps import Steps
from tasks.variants import vary

__all__ = [
    "PREFECT_STEPS",
    "detect_task",
    "export_task",
    "join_task",
    "may_pass",
    "parity_task",
    "register_task",
    "simplify_task",
]


def may_pass(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether a failed step is tried again: only where the cause lies outside the model.

    A plain function, since Prefect never calls a condition that is anything else.
    """
    try:
        state.result()
    except FerryError as error:
        return is_transient(error)
    # Whatever else a step raised is no promise that the next try goes better.
    except Exception:  # noqa: BLE001
        return False
    return False


def _step(function: Callable[..., Any], name: str) -> Task[..., Any]:
    # No tags: for a task that has some, Prefect asks the server for a slot before each run, and the step fails where
    # the server is away.
    return Task(
        fn=function,
        name=name,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(RETRY_WAIT_SECONDS),
        retry_jitter_factor=0.5,
        retry_condition_fn=may_pass,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


detect_task = _step(detect, "detect")
export_task = _step(export, "export")
simplify_task = _step(simplify, "simplify")
parity_task = _step(check, "parity")
join_task = _step(join, "join")
register_task = _step(register, "register")
vary_task = _step(vary, "vary")


def _called(step: Task[..., Any]) -> Callable[..., Any]:
    """Return a call of ``step`` whose arguments Prefect does not look into."""

    def call(job: Any, *args: Any, **kwargs: Any) -> Any:
        named = step.with_options(task_run_name=f"{step.name} {job.request.model_id}"[:200])
        # In the model's own transaction, a step that is done would be shown as rolled back once a later one fails.
        with transaction(commit_mode=CommitMode.EAGER):
            return named(opaque(job), *(opaque(a) for a in args), **kwargs)

    return call


PREFECT_STEPS = Steps(
    detect=_called(detect_task),
    export=_called(export_task),
    simplify=_called(simplify_task),
    parity=_called(parity_task),
    join=_called(join_task),
    register=_called(register_task),
    vary=_called(vary_task),
)
"""The steps as Prefect task runs."""
