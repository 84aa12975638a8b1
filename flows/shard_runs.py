"""Parts of a batch as deployment runs in a Prefect work pool."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import db
from flows.batch import BatchPlan, Runner
from flows.deploy import register_deployment, run_in
from flows.partition import partition, structures
from flows.prefect_connection import connected, until_answered
from flows.settings import Settings
from flows.shards import Look, Outcome, run_key, run_parts
from onnx_config.errors import FerryError, InputError
from onnx_config.hub import is_folder
from tasks.lease import is_gone
from tasks.register import catalog, find_batch
from tasks.report import ModelEntry
from tasks.request import ConversionRequest

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

__all__ = ["SILENT_SECONDS", "PoolRuns", "shard_runner"]

SILENT_SECONDS = 600.0
"""A run that has sent no heartbeat for so long is taken for dead; Prefect's flows send one every three minutes.

A run that has a lease on itself in the catalog is known to be dead sooner. This is for what dies before it has one."""

_ENTRYPOINT = "flows.shard_flow.convert_shard"
_COMMAND = "ferry batch --shards"
_UNCLAIMED_SECONDS = 30.0
_logger = logging.getLogger("prefect.onnx_ferry")


def shard_runner(
    settings: Settings, *, shards: int, pool: str, workers: int | None, memory_slots: str | None = None
) -> Runner:
    """Return what runs a batch in so many parts, each as a run in the work pool ``pool``.

    ``workers`` are models at a time in each part; ``None``: as many as the worker's machine has cores.

    Raises (when it runs):
        InputError: If no Prefect server is named, or it has no such pool.
        TransientError: If the server does not answer.
    """

    def run(todo: Sequence[ConversionRequest], plan: BatchPlan) -> dict[ConversionRequest, ModelEntry]:
        with connected(_COMMAND) as client:
            runs = PoolRuns(client, settings, plan, pool=pool, workers=workers, memory_slots=memory_slots)
            return run_parts(partition(structures(todo), shards), plan, runs)

    return run


class PoolRuns:
    """Starts and watches the runs of one batch."""

    def __init__(
        self,
        client: SyncPrefectClient,
        settings: Settings,
        plan: BatchPlan,
        *,
        pool: str,
        workers: int | None,
        memory_slots: str | None,
    ) -> None:
        self._client = client
        self._pool = pool
        self._batch = plan.batch_id
        self._workspace = plan.workspace
        self._said_unclaimed = False
        self._started = time.monotonic()
        self._deployment = until_answered(client, _COMMAND, self._register)
        batch = find_batch(plan.workspace, plan.batch_id)
        assert batch is not None
        self._parameters: dict[str, Any] = {
            "batch_id": plan.batch_id,
            "batch_started_at": batch.started_at.isoformat(),
            "workers": workers,
            "retry_failed": sorted(kind.value for kind in plan.retry_failed),
            "refresh": plan.refresh,
            "memory_slots": memory_slots,
            **_places(settings),
        }

    def _register(self) -> UUID:
        from prefect.exceptions import ObjectNotFound

        from flows.shard_flow import convert_shard

        try:
            self._client.read_work_pool(self._pool)
        except ObjectNotFound as error:
            raise InputError(
                f"The batch was to run in the work pool {self._pool!r}, and the Prefect server has none of that name. "
                "Register it with `ferry deploy`, or type: prefect work-pool create "
                f"{self._pool!r} --type process; then start workers: prefect worker start --pool {self._pool!r}."
            ) from error
        register_deployment(
            self._client,
            convert_shard,
            self._pool,
            entrypoint=_ENTRYPOINT,
            parameters={},
            work_pool_name=self._pool,
            work_queue_name=None,
            tags=["ferry"],
            job_variables={},
            pull_steps=run_in("."),
            description="A part of a batch: `ferry batch --shards` starts it.",
            paused=False,
        )
        return self._client.read_deployment_by_name(f"{convert_shard.name}/{self._pool}").id

    def start(self, part: int, attempt: int, requests: Sequence[ConversionRequest]) -> str:
        """Begin a run over models; return its id. Called again after an error, it begins no second one.

        Raises:
            TransientError: If the server is away (``network``).
        """
        run = until_answered(
            self._client,
            _COMMAND,
            lambda: self._client.create_flow_run_from_deployment(
                self._deployment,
                parameters={**self._parameters, "models": [_model(request) for request in requests]},
                name=f"batch {self._batch} part {part}" + (f" again {attempt - 1}" if attempt > 1 else ""),
                tags=["ferry", f"ferry-batch-{self._batch}"],
                idempotency_key=f"{self._parameters['batch_started_at']} {self._batch} {part} {attempt}",
            ),
        )
        return str(run.id)

    def look(self, runs: Collection[str]) -> Mapping[str, Look]:
        """Return how runs are getting on; of a server that is away, nothing."""
        import httpx
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        try:
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run) for run in runs]))
            found = self._client.read_flow_runs(flow_run_filter=chosen, limit=200)
            self._say_if_unclaimed(found)
            leases = self._leases(runs)
            return {str(run.id): self._look(run, leases.get(run_key(str(run.id)))) for run in found}
        except httpx.HTTPError as error:
            _logger.warning("The Prefect server does not answer: %r", error)
            return {}

    def _leases(self, runs: Collection[str]) -> dict[str, db.LeaseRecord]:
        """Return the leases that runs have on themselves; of a catalog that is away, none."""
        try:
            with db.session_scope(catalog(self._workspace), read_only=True) as session:
                return db.find_leases(session, [run_key(run) for run in runs])
        except (db.CatalogError, FerryError):
            return {}

    def _look(self, run: Any, lease: db.LeaseRecord | None = None) -> Look:
        from prefect.client.schemas.objects import StateType

        said = "" if run.state is None else f"{run.state.name}: {run.state.message or ''}"[:500]
        match run.state_type:
            case StateType.COMPLETED | StateType.FAILED:
                return Look(outcome=Outcome.ENDED, said=said)
            case StateType.CRASHED:
                return Look(outcome=Outcome.DIED, said=said)
            case StateType.CANCELLED:
                return Look(outcome=Outcome.CANCELLED, said=said)
            case StateType.RUNNING if lease is not None and (lease.lapsed or is_gone(lease)):
                # Should it live after all, as after being suspended.
                self.cancel(str(run.id))
                where = f"process {lease.process_id} on {lease.host}"
                return Look(outcome=Outcome.DIED, said=f"{where}, which ran it, is gone")
            case StateType.RUNNING | StateType.PENDING if self._silent(run):
                self.cancel(str(run.id))
                return Look(outcome=Outcome.DIED, said=f"nothing was heard of it for {SILENT_SECONDS:.0f} s")
            case _:
                return Look(outcome=Outcome.WORKING)

    def _silent(self, run: Any) -> bool:
        """Return whether a run that should be running has not been heard of for long, as when its machine is gone."""
        from prefect.client.schemas.objects import StateType

        now = datetime.now(UTC)
        if run.state_type is StateType.PENDING:
            # A worker has taken it, and nothing has begun: the worker died, or it fetches an image for long.
            return run.state is not None and (now - run.state.timestamp).total_seconds() > SILENT_SECONDS
        if run.start_time is None or (now - run.start_time).total_seconds() < SILENT_SECONDS:
            return False
        asked = {
            "filter": {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "resource": {"id": [f"prefect.flow-run.{run.id}"]},
                "order": "DESC",
            },
            "limit": 1,
        }
        events = self._client.request("POST", "/events/filter", json=asked).json()["events"]
        if not events:
            # A server that keeps no events, or heartbeats that are switched off, prove nothing.
            return False
        last = datetime.fromisoformat(events[0]["occurred"])
        return (now - last).total_seconds() > SILENT_SECONDS

    def _say_if_unclaimed(self, runs: Sequence[Any]) -> None:
        if self._said_unclaimed or time.monotonic() - self._started < _UNCLAIMED_SECONDS:
            return
        self._said_unclaimed = True
        if runs and all(run.state_type in ("SCHEDULED", "PENDING") for run in runs):
            sys.stderr.write(
                f"Note: no worker has taken a part of the batch yet. Is one running? prefect worker start --pool "
                f"{self._pool!r}\n"
            )

    def cancel(self, run: str) -> None:
        """Have a run end soon; a server that is away is left alone."""
        from prefect.client.schemas.objects import State, StateType

        with suppress(Exception):
            self._client.set_flow_run_state(UUID(run), State(type=StateType.CANCELLING), force=True)


def _model(request: ConversionRequest) -> dict[str, Any]:
    """Return a request as the keys of a manifest's model."""
    # A worker's current folder is not this one.
    place = str(Path(request.model_id).expanduser().absolute()) if is_folder(request.model_id) else request.model_id
    return {"id": place, "revision": request.revision, **request.options.to_json()}


def _places(settings: Settings) -> dict[str, str | None]:
    """Return where the workers find catalog and store: said where both are on this machine.

    Of others the workers know from their own settings: Prefect shows parameters to whoever may look, and a URL may
    have a password in it.
    """
    if not settings.catalog_url.startswith("sqlite"):
        return {"home": None, "catalog_url": None, "store_url": None}
    store = settings.store_url if "@" not in settings.store_url else None
    return {"home": str(settings.home), "catalog_url": settings.catalog_url, "store_url": store}
