"""Registering the deployment file with a Prefect server: what is there and the same stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.deployment_file import Deployment, DeploymentFile, GlobalLimit, PoolType, Schedule, TagLimit, WorkPool
from flows.notifications import check_urls, register_notification
from flows.prefect_connection import until_answered
from flows.registered import Action, Registered, registered
from onnx_config.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.flows import Flow

__all__ = ["ENTRYPOINT", "apply", "register_deployment", "run_in"]

ENTRYPOINT = "flows.convert_models"
"""Where workers find the flow: in the installed package, so that no code is pulled."""

_COMMAND = "ferry deploy"
# Intervals count from a moment that stays the same, so that registering again changes nothing.
_ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)


def apply(file: DeploymentFile, client: SyncPrefectClient, *, dry_run: bool = False) -> list[Registered]:
    """Make the server have what the file says; return what was done, or would be.

    Pools, limits and deployments that the file does not name stay as they are.

    Raises:
        InputError: If the server has a pool of this name and another type, or lacks a pool or limit that the file
            uses, or a notification's URL is not in the environment; nothing was changed then.
    """

    def check() -> None:
        _check_pools(file, client)
        _check_limits(file, client)

    urls = check_urls(file.notifications)
    until_answered(client, _COMMAND, check)
    steps: list[Callable[[], Registered]] = [
        *(partial(_pool, pool, client, dry_run) for pool in file.work_pools),
        *(partial(_global_limit, limit, client, dry_run) for limit in file.concurrency_limits),
        *(partial(_tag_limit, limit, client, dry_run) for limit in file.tag_limits),
        *(partial(register_notification, one, urls[one.name], client, dry_run) for one in file.notifications),
        *(partial(_deployment, deployment, client, dry_run) for deployment in file.deployments),
    ]
    return [until_answered(client, _COMMAND, step) for step in steps]


def _found(ask: Callable[[], Any]) -> Any:
    """Return what the server has; ``None`` where it has none."""
    from prefect.exceptions import ObjectNotFound

    try:
        return ask()
    except ObjectNotFound:
        return None


def _check_pools(file: DeploymentFile, client: SyncPrefectClient) -> None:
    declared = {pool.name: pool.type.value for pool in file.work_pools}
    used = [(f"The deployment {d.name!r}", name) for d in file.deployments for name in (d.work_pool, d.parameters.pool)]
    checked: set[str] = set()
    for who, name in [*((f"The deployment file's pool {name!r}", name) for name in declared), *used]:
        if name is None or name in checked:
            continue
        there = _found(lambda name=name: client.read_work_pool(name))  # type: ignore[misc]  # a default is no argument
        if there is None and name not in declared:
            raise InputError(
                f"{who} is to run in the work pool {name!r}, which neither the file has nor the server. Add it under "
                "'work_pools', or correct the name."
            )
        if there is not None and there.type != declared.get(name, there.type):
            raise InputError(
                f"The work pool {name!r} is of type {declared[name]!r} in the file and {there.type!r} on the server, "
                f"and a pool cannot change its type. Give it another name, or remove it: prefect work-pool delete "
                f"{name!r}."
            )
        checked.add(name)


def _check_limits(file: DeploymentFile, client: SyncPrefectClient) -> None:
    declared = {limit.name for limit in file.concurrency_limits}
    for deployment in file.deployments:
        name = deployment.parameters.memory_slots
        if name is None or name in declared:
            continue
        if _found(lambda name=name: client.read_global_concurrency_limit_by_name(name)) is None:  # type: ignore[misc]
            raise InputError(
                f"The deployment {deployment.name!r} takes its memory from the concurrency limit {name!r}, which "
                "neither the file has nor the server. Add it under 'concurrency_limits', or correct the name."
            )


def _pool(pool: WorkPool, client: SyncPrefectClient, dry_run: bool) -> Registered:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    there = _found(lambda: client.read_work_pool(pool.name))
    template = None if pool.base_job_template is None else _job_template(pool)
    wanted: dict[str, Any] = {"concurrency_limit": pool.concurrency_limit, "description": pool.description}
    if template is not None:
        wanted["base_job_template"] = template
    changed = [key for key, value in wanted.items() if there is not None and getattr(there, key) != value]

    def do(action: Action) -> None:
        if action is Action.CREATE:
            given = {**wanted, "base_job_template": template or _default_job_template(pool.type)}
            client.create_work_pool(WorkPoolCreate(name=pool.name, type=pool.type.value, **given))
        else:
            client.update_work_pool(pool.name, WorkPoolUpdate(**wanted))

    return registered("work_pool", pool.name, there, changed, do, dry_run=dry_run)


def _job_template(pool: WorkPool) -> dict[str, Any]:
    assert pool.base_job_template is not None
    try:
        template = json.loads(pool.base_job_template.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The job template {str(pool.base_job_template)!r} of the work pool {pool.name!r} cannot be read: {error}. "
            f"Write one with: prefect work-pool get-default-base-job-template --type {pool.type.value}."
        ) from error
    if not isinstance(template, dict) or {"job_configuration", "variables"} - template.keys():
        raise InputError(
            f"The job template {str(pool.base_job_template)!r} of the work pool {pool.name!r} has no "
            "'job_configuration' and 'variables'. Write one with: prefect work-pool get-default-base-job-template "
            f"--type {pool.type.value}."
        )
    return template


def _default_job_template(pool_type: PoolType) -> dict[str, Any]:
    from prefect.utilities.asyncutils import run_coro_as_sync
    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    found = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type(pool_type.value))
    if not found:
        raise InputError(
            f"Prefect has no job template for work pools of type {pool_type.value!r} here. Install the package that "
            f"brings it (prefect-{pool_type.value}), or give 'base_job_template'."
        )
    return dict(found)


def _global_limit(limit: GlobalLimit, client: SyncPrefectClient, dry_run: bool) -> Registered:
    there = _found(lambda: client.read_global_concurrency_limit_by_name(limit.name))
    changed = ["slots"] if there is not None and there.limit != limit.slots else []

    def do(_action: Action) -> None:
        client.upsert_global_concurrency_limit_by_name(limit.name, limit.slots)

    return registered("concurrency_limit", limit.name, there, changed, do, dry_run=dry_run)


def _tag_limit(limit: TagLimit, client: SyncPrefectClient, dry_run: bool) -> Registered:
    there = _found(lambda: client.read_concurrency_limit_by_tag(limit.tag))
    changed = ["slots"] if there is not None and there.concurrency_limit != limit.slots else []

    def do(_action: Action) -> None:
        client.create_concurrency_limit(limit.tag, limit.slots)  # The server takes it for an update where it is there.

    return registered("tag_limit", limit.tag, there, changed, do, dry_run=dry_run)


def run_in(folder: str) -> list[dict[str, Any]]:
    """Return the steps that make ``folder`` a run's current one.

    Without any, a worker copies its own current folder, whatever lies in it, into a temporary one for each run.
    """
    return [{"prefect.deployments.steps.set_working_directory": {"directory": folder}}]


def _deployment(deployment: Deployment, client: SyncPrefectClient, dry_run: bool) -> Registered:
    from flows.python_api import convert_models

    parameters = deployment.parameters.model_dump(mode="json", exclude_unset=True)
    if deployment.parameters.shards is not None:
        parameters.setdefault("pool", deployment.work_pool)
    folder = deployment.job_variables.get("working_dir") or str(Path(deployment.manifest).parent)
    return register_deployment(
        client,
        convert_models,
        deployment.name,
        dry_run=dry_run,
        entrypoint=ENTRYPOINT,
        parameters={"manifest": deployment.manifest, **parameters},
        work_pool_name=deployment.work_pool,
        work_queue_name=deployment.work_queue,
        tags=sorted(set(deployment.tags)),
        schedules=[_schedule(schedule) for schedule in deployment.schedules],
        concurrency_limit=deployment.concurrency_limit,
        collision=deployment.collision.value.upper(),
        job_variables=deployment.job_variables,
        pull_steps=run_in(folder),
        description=deployment.description or f"Converts the models of {deployment.manifest}.",
        paused=deployment.paused,
    )


def _schedule(schedule: Schedule) -> DeploymentScheduleCreate:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

    when: CronSchedule | IntervalSchedule
    if schedule.cron is not None:
        when = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    else:
        assert schedule.interval is not None
        when = IntervalSchedule(interval=schedule.interval, anchor_date=_ANCHOR, timezone=schedule.timezone)
    return DeploymentScheduleCreate(schedule=when, active=schedule.active)


def register_deployment(
    client: SyncPrefectClient,
    flow: Flow[..., Any],
    name: str,
    *,
    dry_run: bool = False,
    schedules: Iterable[DeploymentScheduleCreate] = (),
    concurrency_limit: int | None = None,
    collision: str = "ENQUEUE",
    **wanted: Any,
) -> Registered:
    """Make the server have a deployment of a flow; one that is there and the same keeps its scheduled runs."""
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
    from prefect.utilities.callables import parameter_schema

    full_name = f"{flow.name}/{name}"
    planned = list(schedules)
    wanted |= {
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "enforce_parameter_schema": True,
        "version": _version(),
    }
    there: DeploymentResponse | None = _found(lambda: client.read_deployment_by_name(full_name))
    changed: list[str] = []
    if there is not None:
        changed = [key for key, value in wanted.items() if not _same(getattr(there, key, None), value, key)]
        if sorted(map(_shown, there.schedules)) != sorted(map(_shown, planned)):
            changed.append("schedules")
        limit = there.global_concurrency_limit
        options = there.concurrency_options
        found = (None if limit is None else limit.limit, None if options is None else options.collision_strategy.value)
        if found[0] != concurrency_limit or (concurrency_limit is not None and found[1] != collision):
            changed.append("concurrency_limit")

    def do(_action: Action) -> None:
        client.create_deployment(
            client.create_flow_from_name(flow.name),
            name,
            schedules=planned,
            concurrency_limit=concurrency_limit,
            concurrency_options=None
            if concurrency_limit is None
            else ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy(collision)),
            **wanted,
        )

    return registered("deployment", full_name, there, changed, do, dry_run=dry_run)


def _same(there: Any, wanted: Any, key: str) -> bool:
    if key == "tags":
        return bool(sorted(there or ()) == wanted)
    if key == "work_queue_name" and wanted is None:
        return there in (None, "default")
    # What is absent and what is empty are the same to a server.
    return bool((there or None) == (wanted or None))


def _shown(schedule: Any) -> str:
    return json.dumps([schedule.schedule.model_dump(mode="json"), schedule.active], sort_keys=True)


def _version() -> str | None:
    try:
        return version("onnx-ferry")
    except PackageNotFoundError:
        return None
