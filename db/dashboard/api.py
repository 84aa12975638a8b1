"""``/api/v1``: the catalog as JSON, for programs; reading only."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from sqlalchemy.orm import Session

from db.batches import get_batch, list_batches
from db.conversions import get_conversion
from db.dashboard.answers import (
    Comparison,
    Conversion,
    FoundDone,
    ListedModel,
    Models,
    Overview,
    Problem,
    Run,
    Runs,
    Totals,
)
from db.dashboard.asked import After, Limit, Listing, Number, Overviewed, read_place
from db.dashboard.reading import CatalogReader
from db.found import list_found_done
from db.leases import list_running
from db.listing import list_page
from db.overview import (
    artifact_sizes,
    count_by,
    current_totals,
    running_batches,
    step_figures,
    totals_of,
    totals_over_time,
)
from db.records import BatchRecord

__all__ = ["api_router"]

_LARGEST = 2**63 - 1
_ProblemAnswers: dict[int | str, dict[str, object]] = {404: {"model": Problem}, 503: {"model": Problem}}

api_router = APIRouter(prefix="/api/v1", tags=["catalog"])


@api_router.get("/overview", responses={503: {"model": Problem}})
def _overview(request: Request, wanted: Overviewed) -> Overview:
    """What happened in a period, and what holds now."""
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        return Overview.model_validate(
            {
                "period": wanted.period.value,
                "now": reader.kept("current", lambda: current_totals(session)),
                "over_time": totals_over_time(session, wanted),
                "statuses": count_by(session, wanted, "status"),
                "failures": count_by(session, wanted, "error_kind"),
                "templates": count_by(session, wanted, "template"),
                "steps": step_figures(session, wanted),
                "artifacts": reader.kept("sizes", lambda: artifact_sizes(session)),
                "running": [_run(session, batch) for batch in running_batches(session, now=wanted.now)],
                "working": list_running(session, worker=wanted.worker),
            }
        )


@api_router.get("/models", responses={503: {"model": Problem}})
def _models(request: Request, wanted: Listing, limit: Limit = 50, after: After = None) -> Models:
    """One page of conversions, those that ended last first."""
    place = read_place(after)
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        page = list_page(session, wanted, limit=limit, after=place)
    rows = [ListedModel.model_validate(row) for row in page.rows]
    return Models(models=rows, next=None if page.next is None else str(page.next))


@api_router.get("/models/{number}", responses=_ProblemAnswers)
def _model(request: Request, number: Number) -> Conversion:
    """One conversion, whole."""
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        return _conversion(session, number)


@api_router.get("/runs", responses={503: {"model": Problem}})
def _runs(request: Request, limit: Limit = 50, offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0) -> Runs:
    """Batches, newest first."""
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        return Runs(runs=[_run(session, batch) for batch in list_batches(session, limit=limit, offset=offset)])


@api_router.get("/runs/{number}", responses=_ProblemAnswers)
def _one_run(request: Request, number: Number) -> Run:
    """One batch; its models are under ``/models?run=``."""
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        batch = get_batch(session, number)
        if batch is None:
            raise HTTPException(404, f"No batch has number {number}; /api/v1/runs lists what is there.")
        return _run(session, batch)


@api_router.get("/runs/{number}/found", responses=_ProblemAnswers)
def _found(request: Request, number: Number, limit: Limit = 50) -> FoundDone:
    """What a batch did not convert, since it was done; those recorded last come first."""
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        if get_batch(session, number) is None:
            raise HTTPException(404, f"No batch has number {number}; /api/v1/runs lists what is there.")
        return FoundDone(
            models=[ListedModel.model_validate(row) for row in list_found_done(session, number, limit=limit)]
        )


@api_router.get("/compare", responses=_ProblemAnswers)
def _compare(
    request: Request, a: Annotated[int, Query(ge=1, le=_LARGEST)], b: Annotated[int, Query(ge=1, le=_LARGEST)]
) -> Comparison:
    """Two conversions side by side."""
    reader: CatalogReader = request.app.state.reader
    with reader.session() as session:
        return Comparison(a=_conversion(session, a), b=_conversion(session, b))


def _conversion(session: Session, number: int) -> Conversion:
    record = get_conversion(session, number)
    if record is None:
        raise HTTPException(404, f"No conversion has number {number}; /api/v1/models lists what is there.")
    return Conversion.model_validate(record)


def _run(session: Session, batch: BatchRecord) -> Run:
    return Run(
        id=batch.id,
        engine=batch.engine,
        started_at=batch.started_at,
        finished_at=batch.finished_at,
        models=batch.models,
        totals=Totals.model_validate(totals_of(session, batch)),
    )
