"""One part of a batch, as workers run it; ``ferry batch --shards`` starts it and follows it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from prefect import flow
from prefect.context import FlowRunContext

from flows.manifest import read_models
from flows.manifest_keys import ManifestModel
from flows.python_api import convert_requests
from flows.settings import load_settings, masked_url
from flows.shards import run_key
from onnx_config.errors import ErrorKind, InputError
from tasks.lease import held_lease
from tasks.register import find_batch
from tasks.request import Refresh, Workspace

__all__ = ["convert_shard"]


@flow(name="convert_shard", persist_result=False, log_prints=False)
def convert_shard(
    models: list[ManifestModel],
    *,
    batch_id: int,
    batch_started_at: datetime,
    workers: int | None = None,
    retry_failed: list[ErrorKind] | None = None,
    refresh: Refresh | None = None,
    memory_slots: str | None = None,
    memory_limit: str | None = None,
    home: str | None = None,
    catalog_url: str | None = None,
    store_url: str | None = None,
) -> dict[str, int]:
    """Convert models as a part of the batch ``batch_id`` of the catalog that all parts share; return the totals.

    Raises:
        InputError: If this worker's catalog is not the one that has the batch.
    """
    settings = load_settings(home=home, catalog_url=catalog_url, store_url=store_url, memory_limit=memory_limit)
    workspace = settings.workspace()
    batch = find_batch(workspace, batch_id)
    if batch is None or batch.started_at != batch_started_at:
        raise InputError(
            f"This worker's catalog, {masked_url(settings.catalog_url)}, has no batch {batch_id} of "
            f"{batch_started_at.isoformat()}: it is not that of the command that sent it. Set FERRY_CATALOG_URL and "
            "FERRY_STORE_URL to the same for all workers and for the command."
        )
    with _seen_alive(workspace):
        report = convert_requests(
            read_models(models),
            settings,
            output=None,
            workers=workers,
            retry_failed=retry_failed,
            refresh=refresh,
            memory_slots=memory_slots,
            batch_id=batch_id,
        )
    return report.totals.model_dump()


@contextmanager
def _seen_alive(workspace: Workspace) -> Iterator[None]:
    """Hold a lease on this run itself, so that whoever follows it sees in the catalog whether it lives.

    What its models are leased by says the same, but a run may wait for memory, or have none left.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        yield
        return
    with held_lease(workspace, run_key(str(context.flow_run.id)), stopping=threading.Event()):
        yield
