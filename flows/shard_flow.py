"""One part of a batch, as workers run it; ``ferry batch --shards`` starts it and follows it."""

from __future__ import annotations

from datetime import datetime

from prefect import flow

import db
from flows.manifest import ManifestModel, read_models
from flows.python_api import convert_requests
from flows.settings import load_settings, masked_url
from onnx_config.errors import ErrorKind, InputError
from tasks.register import catalog, catalog_errors
from tasks.request import Refresh

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
    with catalog_errors(), db.session_scope(catalog(workspace), read_only=True) as session:
        batch = db.get_batch(session, batch_id)
    if batch is None or batch.started_at != batch_started_at:
        raise InputError(
            f"This worker's catalog, {masked_url(settings.catalog_url)}, has no batch {batch_id} of "
            f"{batch_started_at.isoformat()}: it is not that of the command that sent it. Set FERRY_CATALOG_URL and "
            "FERRY_STORE_URL to the same for all workers and for the command."
        )
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
