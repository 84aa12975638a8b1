"""``/metrics`` for Prometheus and ``/healthz`` for whoever restarts what does not answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from db.dashboard.reading import CatalogReader, NotReadyError
from db.leases import list_running
from db.overview import OverviewFilter, Period, artifact_sizes, count_by, current_totals, running_batches, step_figures
from db.records import BatchTotals
from db.vocabulary import StepName

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["metrics_router"]

_MOST_IN_WORK = 10_000

metrics_router = APIRouter(include_in_schema=False)


@metrics_router.get("/healthz")
def _healthz(request: Request) -> Response:
    reader: CatalogReader = request.app.state.reader
    try:
        reader.check()
    except NotReadyError as error:
        # The dashboard itself is well: a restart would change nothing.
        return JSONResponse({"status": "ok", "catalog": error.message})
    return JSONResponse({"status": "ok", "catalog": "ready"})


@metrics_router.get("/metrics")
def _metrics(request: Request) -> Response:
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Catalog(session, reader))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Catalog(Collector):
    """Reads the catalog when Prometheus asks, so that the figures outlive the dashboard's process."""

    def __init__(self, session: Session, reader: CatalogReader) -> None:
        self._session = session
        self._reader = reader

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        session, now = self._session, datetime.now(UTC)
        ever = OverviewFilter(period=Period.ALL, now=now)
        for name, column, text in (
            ("ferry_conversions", "status", "Attempts that ended, by how."),
            ("ferry_failures", "error_kind", "Attempts without a verified artifact, by kind."),
            ("ferry_template_uses", "template", "Attempts that made a graph, by where its structure came from."),
        ):
            counter = CounterMetricFamily(name, text, labels=[column])
            for word, number in count_by(session, ever, column).items():
                counter.add_metric([word], number)
            yield counter
        models = GaugeMetricFamily("ferry_models", "What was asked for, by how it stands now.", labels=["status"])
        current: BatchTotals = self._reader.kept("current", lambda: current_totals(session))
        for word in ("converted", "reused", "mismatch", "failed"):
            models.add_metric([word], getattr(current, word))
        yield models
        sizes = self._reader.kept("sizes", lambda: artifact_sizes(session))
        disk = GaugeMetricFamily("ferry_artifact_bytes", "Bytes of all artifacts.", labels=["quarantined"])
        disk.add_metric(["false"], sizes.served_bytes)
        disk.add_metric(["true"], sizes.quarantined_bytes)
        yield disk
        running = len(running_batches(session, now=now))
        yield GaugeMetricFamily("ferry_batches_running", "Batches without an end.", value=running)
        working = GaugeMetricFamily("ferry_models_in_work", "Models in work, by where they are.", labels=["step"])
        steps_now = Counter(model.step or "waiting" for model in list_running(session, limit=_MOST_IN_WORK))
        for step in (*StepName, "waiting"):
            working.add_metric([str(step)], steps_now[str(step)])
        yield working
        steps = GaugeMetricFamily(
            "ferry_step_seconds", "Seconds of a step over the newest attempts.", labels=["step", "quantile"]
        )
        for figures in step_figures(session, ever):
            steps.add_metric([figures.step, "0.5"], figures.median_seconds)
            steps.add_metric([figures.step, "0.95"], figures.p95_seconds)
        yield steps
