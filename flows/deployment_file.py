"""The deployment file: what ``ferry deploy`` registers with a Prefect server.

Work pools, limits, and deployments of the batch with their schedules. Everything that is wrong is said at once, each
with its line.
"""

from __future__ import annotations

import re
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator

from flows.manifest import read_manifest
from flows.settings import read_seconds
from flows.yaml_lines import YamlText
from onnx_config.errors import ErrorKind, InputError
from tasks.request import Refresh

__all__ = [
    "Collision",
    "Deployment",
    "DeploymentFile",
    "GlobalLimit",
    "Notification",
    "Parameters",
    "PoolType",
    "Schedule",
    "TagLimit",
    "WorkPool",
    "read_deployment_file",
]

_NAME = re.compile(r"[\w][\w .-]{0,99}")
_SHORTEST_INTERVAL = timedelta(seconds=10)


class PoolType(StrEnum):
    """Where a pool's workers run a batch."""

    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


class Collision(StrEnum):
    """What becomes of a run that would be one too many."""

    ENQUEUE = "enqueue"
    CANCEL_NEW = "cancel_new"


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("is no name; write letters, digits, blanks, '-', '_' and '.'")
    return name


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(
            "is no name of an environment variable; write one such as NOTIFY_URL, and set it where ferry deploy runs"
        )
    return name


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    # What the packages of time zones raise for a name that is none differs with the name.
    except Exception as error:
        raise ValueError(f"{name!r} is no time zone; write one such as UTC or Europe/Berlin") from error
    return name


def _cron(line: str) -> str:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=line)
    except ValueError as error:
        raise ValueError(
            f'{line!r} is no cron line; write minute, hour, day, month and weekday, such as "0 2 * * *"'
        ) from error
    return line


def _interval(value: object) -> object:
    seconds = read_seconds(value)
    if isinstance(seconds, int | float):
        if seconds < _SHORTEST_INTERVAL.total_seconds():
            raise ValueError(f"must be {_SHORTEST_INTERVAL.total_seconds():.0f} s at least")
        return timedelta(seconds=seconds)
    return seconds


_Name = Annotated[str, AfterValidator(_named)]
_Count = Annotated[int, Field(strict=True, ge=1)]


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkPool(_Keys):
    """A pool whose workers run deployments; made where it is not there, and brought up to date where it is."""

    name: _Name
    type: PoolType = PoolType.PROCESS
    """Of a pool that is there already it cannot be changed."""
    concurrency_limit: _Count | None = None
    """Runs at a time over all of the pool's workers; ``None``: any number."""
    description: str | None = None
    base_job_template: Path | None = None
    """JSON file, from the folder of the deployment file; ``None``: the one that Prefect has for the type."""


class GlobalLimit(_Keys):
    """Slots that runs share over all machines, such as GiB of memory."""

    name: _Name
    slots: _Count


class TagLimit(_Keys):
    """Task runs with a tag that may run at a time."""

    tag: _Name
    slots: _Count


class Schedule(_Keys):
    """When a deployment runs: a cron line, or an interval."""

    cron: Annotated[str, AfterValidator(_cron)] | None = None
    interval: Annotated[timedelta, BeforeValidator(_interval)] | None = None
    timezone: Annotated[str, AfterValidator(_zone)] = "UTC"
    active: StrictBool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> Schedule:
        if (self.cron is None) == (self.interval is None):
            raise ValueError("a schedule has either 'cron' or 'interval'")
        return self


class Parameters(_Keys):
    """What the batch is called with beside its manifest: the parameters of ``convert_models``."""

    output: str | None = None
    workers: _Count | None = None
    retry_failed: list[ErrorKind] | None = None
    refresh: Refresh | None = None
    shards: _Count | None = None
    pool: _Name | None = None
    memory_slots: _Name | None = None
    home: str | None = None
    memory_limit: str | None = None
    timeout: str | int | None = None


class Deployment(_Keys):
    """A batch that runs by itself."""

    name: _Name
    manifest: str
    """Path on the workers' machines; a relative one is taken from the folder of the deployment file."""
    work_pool: _Name
    work_queue: _Name | None = None
    schedules: list[Schedule] = Field(default_factory=list)
    """None: it runs when it is told to."""
    parameters: Parameters = Parameters()
    tags: list[_Name] = Field(default_factory=list)
    concurrency_limit: _Count | None = None
    """Runs of this deployment at a time; ``None``: any number."""
    collision: Collision = Collision.CANCEL_NEW
    """What becomes of a run beyond that; the next scheduled one finds what this one would have done."""
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """What the pool's job template leaves open: ``image``, ``env``, ``working_dir``."""
    description: str | None = None
    paused: StrictBool = False


class Notification(_Keys):
    """Where to say that a batch is failing, or that a run of it crashed: a webhook, which gets JSON with a ``text``."""

    name: _Name
    url_variable: Annotated[str, AfterValidator(_variable)]
    """Environment variable of ``ferry deploy`` that has the webhook's URL, which is a secret and stands in no file."""


class DeploymentFile(_Keys):
    """All that is registered."""

    work_pools: list[WorkPool] = Field(default_factory=list)
    concurrency_limits: list[GlobalLimit] = Field(default_factory=list)
    tag_limits: list[TagLimit] = Field(default_factory=list)
    notifications: list[Notification] = Field(default_factory=list)
    deployments: Annotated[list[Deployment], Field(min_length=1)]


_MAPPINGS: dict[tuple[str, ...], type[BaseModel]] = {
    (): DeploymentFile,
    ("work_pools",): WorkPool,
    ("concurrency_limits",): GlobalLimit,
    ("tag_limits",): TagLimit,
    ("notifications",): Notification,
    ("deployments",): Deployment,
    ("deployments", "schedules"): Schedule,
    ("deployments", "parameters"): Parameters,
}
_NAMED = (
    ("work_pools", "name"),
    ("concurrency_limits", "name"),
    ("tag_limits", "tag"),
    ("notifications", "name"),
    ("deployments", "name"),
)


def read_deployment_file(path: Path) -> tuple[DeploymentFile, tuple[str, ...]]:
    """Return a deployment file with the paths in it made absolute, and notes on what could not be checked here.

    Raises:
        InputError: If the file cannot be read, or anything in it or in a manifest that it names is wrong: an unknown
            key, a name given twice, a cron line or a time zone that is none. All of it in one message, each with its
            line.
    """
    text = YamlText.read(path, "Deployment file")
    if text.problems:
        raise text.error()
    if not isinstance(text.values, dict):
        text.add((), "the keys 'deployments' and 'work_pools' belong here")
        raise text.error()
    found = text.check(DeploymentFile, {place: tuple(model.model_fields) for place, model in _MAPPINGS.items()})
    for group, key in _NAMED:
        _check_twice(text, group, key)
    if found is None:
        raise text.error()
    folder = path.absolute().parent
    notes: list[str] = []
    deployments = []
    for number, deployment in enumerate(found.deployments):
        manifest = folder / Path(deployment.manifest).expanduser()
        if manifest.is_file():
            try:
                read_manifest(manifest, ask=False)
            except InputError as error:
                text.add(("deployments", number, "manifest"), error.message.rstrip("."))
        elif Path(deployment.manifest).expanduser().is_absolute():
            notes.append(f"{deployment.name}: {deployment.manifest} is not on this machine, so it was not read")
        else:
            text.add(("deployments", number, "manifest"), f"there is no file {str(manifest)!r}")
        deployments.append(deployment.model_copy(update={"manifest": str(manifest)}))
    _check_room_for_parts(text, found)
    pools = []
    for number, pool in enumerate(found.work_pools):
        template = None if pool.base_job_template is None else folder / pool.base_job_template
        if template is not None and not template.is_file():
            text.add(("work_pools", number, "base_job_template"), f"there is no file {str(template)!r}")
        pools.append(pool.model_copy(update={"base_job_template": template}))
    if text.problems:
        raise text.error()
    return found.model_copy(update={"deployments": deployments, "work_pools": pools}), tuple(notes)


def _check_room_for_parts(text: YamlText, file: DeploymentFile) -> None:
    limits = {pool.name: pool.concurrency_limit for pool in file.work_pools}
    for number, deployment in enumerate(file.deployments):
        parts = deployment.parameters
        if parts.pool is not None and parts.shards is None:
            text.add(("deployments", number, "parameters", "pool"), "'pool' is that of the parts: it needs 'shards'")
        in_own_pool = parts.shards is not None and parts.pool in (None, deployment.work_pool)
        if in_own_pool and limits.get(deployment.work_pool) == 1:
            text.add(
                ("deployments", number, "parameters", "shards"),
                f"the work pool {deployment.work_pool!r} has a concurrency_limit of 1, so that a run would wait "
                "for its own parts for ever; raise it, or give the parts another 'pool'",
            )


def _check_twice(text: YamlText, group: str, key: str) -> None:
    items = text.values.get(group)
    seen: dict[str, int] = {}
    for number, item in enumerate(items if isinstance(items, list) else ()):
        name = item.get(key) if isinstance(item, dict) else None
        if not isinstance(name, str):
            continue
        if name in seen:
            first = text.lines[group, seen[name], key]
            text.add((group, number, key), f"{name!r} stands on line {first} already")
        seen.setdefault(name, number)
