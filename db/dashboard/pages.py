"""The pages for people. Every value that stands on them goes through the templates' escaping."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.templating import Jinja2Templates
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from db.batches import get_batch, list_batches
from db.conversions import get_conversion
from db.coverage import batch_members, coverage
from db.dashboard.asked import After, Listing, Number, Overviewed, read_place
from db.dashboard.axes import axes_picture
from db.dashboard.gantt import timeline
from db.dashboard.reading import CatalogReader
from db.dashboard.snippets import snippets
from db.dashboard.words import count_text, difference_text, duration_text, plain, size_text, time_text
from db.errors import CatalogError
from db.found import found_done_totals, list_found_done
from db.leases import list_running
from db.listing import (
    ConversionFilter,
    ListedConversion,
    count_up_to,
    list_page,
    listed_by_number,
    model_history,
    timed_conversions,
)
from db.models import Artifact, ArtifactFile
from db.overview import (
    OverviewFilter,
    Period,
    artifact_sizes,
    count_by,
    current_totals,
    known_words,
    running_batches,
    running_totals,
    step_figures,
    totals_of,
    totals_over_time,
)
from db.records import ConversionRecord, GraphRecord, OutputParityRecord
from db.vocabulary import ConversionStatus, FailureKind

__all__ = ["overview_values", "pages_router", "show_problem", "templates"]

_ROWS = 50
_MOST_COUNTED = 10_000
_MOST_BARS = 300
_RUNS = 50
_LISTEN_SECONDS = 2.0
_LISTEN_AT_MOST_SECONDS = 3600.0
_STATUSES = tuple(word.value for word in ConversionStatus)
_LARGEST = 2**63 - 1

templates = Jinja2Templates(directory=Path(__file__).parent / "templates")
"""Autoescaping is on for every template here."""

templates.env.autoescape = True
templates.env.trim_blocks = templates.env.lstrip_blocks = True
templates.env.filters |= {
    "plain": plain,
    "size": size_text,
    "duration": duration_text,
    "difference": difference_text,
    "count": count_text,
    "time": time_text,
}


def _operator_names(graph: GraphRecord) -> list[str]:
    """Return the operators of a graph as stored and as exported, those with most nodes first."""
    counts = [graph.operators, graph.operators_before_simplify]
    most = {name: max(count.get(name, 0) for count in counts) for count in counts for name in count}
    return sorted(most, key=lambda name: (-most[name], name))


templates.env.globals["operator_names"] = _operator_names

pages_router = APIRouter(include_in_schema=False)


def show_problem(request: Request, status: int, title: str, message: str) -> Response:
    """Return a page that says what is wrong and what to do."""
    values = {"title": title, "message": message, "page": ""}
    return templates.TemplateResponse(request, "problem.html", values, status_code=status)


def overview_values(session: Session, wanted: OverviewFilter, reader: CatalogReader | None = None) -> dict[str, Any]:
    """Return what the overview shows, for a page or for a report."""
    points = totals_over_time(session, wanted)
    statuses, uses = count_by(session, wanted, "status"), count_by(session, wanted, "template")
    kept = _read_now if reader is None else reader.kept
    with_template = uses.get("traced", 0) + uses.get("reused", 0) + uses.get("direct", 0)
    return {
        "wanted": wanted,
        "statuses": {word: statuses.get(word, 0) for word in _STATUSES},
        "attempts": sum(statuses.values()),
        "failures": count_by(session, wanted, "error_kind"),
        "template_uses": uses,
        "template_rate": uses.get("reused", 0) / with_template if with_template else None,
        "now_totals": kept("current", lambda: current_totals(session)),
        "sizes": kept("sizes", lambda: artifact_sizes(session)),
        "steps": step_figures(session, wanted),
        "points": points,
        "chart": {
            "x": [int(point.start.timestamp()) for point in points],
            "step": 3600 if wanted.period.span == "hour" else 86400,
            "from": None if wanted.since is None else int(wanted.since.timestamp()),
            "to": int(wanted.now.timestamp()),
            "series": [
                {"label": word, "values": [getattr(point.totals, word) for point in points]} for word in _STATUSES
            ],
        },
    }


def _read_now(_: str, read: Any) -> Any:
    return read()


@pages_router.get("/")
def _overview(request: Request, wanted: Overviewed) -> Response:
    reader = _reader(request)
    with reader.session() as session:
        values = overview_values(session, wanted, reader) | {
            "page": "overview",
            "periods": [(period.value, _PERIOD_WORDS[period]) for period in Period],
            **_words(session, reader),
            "running": [(batch, totals_of(session, batch)) for batch in running_batches(session, now=wanted.now)],
            "working": list_running(session, worker=wanted.worker),
            "latest_runs": list_batches(session, limit=5),
        }
    return templates.TemplateResponse(request, "overview.html", values)


_PERIOD_WORDS = {
    Period.DAY: "last 24 hours",
    Period.WEEK: "last 7 days",
    Period.MONTH: "last 30 days",
    Period.QUARTER: "last 90 days",
    Period.ALL: "all time",
}


@pages_router.get("/models")
def _models(request: Request, wanted: Listing, after: After = None) -> Response:
    place, reader = read_place(after), _reader(request)
    with reader.session() as session:
        page = list_page(session, wanted, limit=_ROWS, after=place)
        values = {
            "page": "models",
            "wanted": wanted,
            "listing": page,
            "total": count_up_to(session, wanted, most=_MOST_COUNTED),
            "statuses": _STATUSES,
            "kinds": [kind.value for kind in FailureKind],
            "coverage_page": "/coverage?" + urlencode(_asked(wanted)),
            **_words(session, reader),
            "first_page": "/models?" + urlencode(_asked(wanted)),
            "next_page": "/models?" + urlencode(_asked(wanted) | {"after": str(page.next)}),
            "on_first_page": place is None,
        }
    return templates.TemplateResponse(request, "models.html", values)


def _words(session: Session, reader: CatalogReader) -> dict[str, list[str]]:
    """Return what the filters offer."""
    return {
        "tasks": reader.kept("tasks", lambda: known_words(session, "task")),
        "model_types": reader.kept("model_types", lambda: known_words(session, "model_type")),
        "workers": reader.kept("workers", lambda: known_words(session, "worker")),
    }


def _asked(wanted: ConversionFilter) -> dict[str, str]:
    given = {
        "q": wanted.text,
        "status": wanted.status,
        "task": wanted.task,
        "model_type": wanted.model_type,
        "error_kind": wanted.error_kind,
        "worker": wanted.worker,
        "run": wanted.batch_id,
        "every": "true" if wanted.every else None,
    }
    return {name: str(value) for name, value in given.items() if value}


@pages_router.get("/models/{number}")
def _model(request: Request, number: Number) -> Response:
    with _reader(request).session() as session:
        record = _conversion(session, number)
        values = {
            "page": "models",
            "record": record,
            "history": model_history(session, record.model_id),
            "covered": coverage(session, [number]),
            "pictures": [axes_picture(graph) for graph in record.artifact.graphs] if record.artifact else [],
            "plots": [_parity_plot(check.outputs) for check in record.parity],
            "snippets": snippets(record),
        }
    return templates.TemplateResponse(request, "model.html", values)


def _parity_plot(outputs: Sequence[OutputParityRecord]) -> list[dict[str, Any]]:
    """Return where each output's difference and tolerance stand on a scale of powers of ten, from 0 to 100."""
    values = [v for o in outputs for v in (o.max_abs_diff, o.tolerance) if math.isfinite(v) and v > 0]
    low = math.floor(math.log10(min(values))) - 1 if values else -9
    high = math.ceil(math.log10(max(values))) if values else 0

    def place(value: float) -> float:
        if not math.isfinite(value):
            return 100.0
        if value <= 0:
            return 0.0
        return round(min(100.0, max(0.0, (math.log10(value) - low) / max(1, high - low) * 100)), 2)

    return [
        {
            "output": output,
            "difference": place(output.max_abs_diff),
            "tolerance": place(output.tolerance),
            "holds": output.max_abs_diff <= output.tolerance,
        }
        for output in outputs
    ]


@pages_router.get("/artifacts/{sha256}/{path:path}")
def _file(request: Request, sha256: str, path: str, quarantined: bool = False) -> Response:
    with _reader(request).session() as session:
        found = session.execute(
            select(Artifact.path, Artifact.quarantined)
            .join(ArtifactFile, ArtifactFile.artifact_id == Artifact.id)
            .where(Artifact.sha256 == sha256, ArtifactFile.path == path)
        ).one_or_none()
    if found is None:
        raise HTTPException(404, "The catalog names no such file; a model's page lists the files of its artifact.")
    if found.quarantined and not quarantined:
        raise HTTPException(
            409,
            "This artifact is in quarantine: it does not answer as its PyTorch model does. To look at it all the "
            "same, follow the link on the model's page, or add ?quarantined=true to this address.",
        )
    folder = Path(found.path)
    try:
        inside = (folder / path).resolve()
        allowed = inside.is_relative_to(folder.resolve()) and inside.is_file()
    except (OSError, ValueError):
        allowed = False
    if not allowed:
        raise HTTPException(
            404, f"The file is not in {plain(folder, 300)} on this machine: it was moved or removed, or lies elsewhere."
        )
    name = inside.name.encode("ascii", "replace").decode().replace('"', "_").replace("?", "_")
    headers = {
        "Content-Disposition": f"attachment; filename=\"{name}\"; filename*=UTF-8''{quote(inside.name, safe='')}",
        "X-Quarantined": "true" if found.quarantined else "false",
    }
    return FileResponse(inside, media_type="application/octet-stream", headers=headers)


@pages_router.get("/runs")
def _runs(request: Request, offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0) -> Response:
    with _reader(request).session() as session:
        batches = list_batches(session, limit=_RUNS + 1, offset=offset)
        rows = [(batch, totals_of(session, batch)) for batch in batches[:_RUNS]]
    values = {
        "page": "runs",
        "rows": rows,
        "earlier": offset + _RUNS if len(batches) > _RUNS else None,
        "later": max(0, offset - _RUNS) if offset else None,
    }
    return templates.TemplateResponse(request, "runs.html", values)


@pages_router.get("/runs/{number}")
def _run(request: Request, number: Number) -> Response:
    with _reader(request).session() as session:
        batch = get_batch(session, number)
        if batch is None:
            raise HTTPException(404, f"No batch has number {number}. The list of runs shows what is there.")
        recorded = running_totals(session, number)
        found = found_done_totals(session, number)
        found_rows = list_found_done(session, number, limit=_ROWS)
        picture = timeline(timed_conversions(session, number, limit=_MOST_BARS))
        listing = list_page(session, ConversionFilter(batch_id=number), limit=_ROWS)
        working = list_running(session, batch_id=number)
    values = {
        "page": "runs",
        "batch": batch,
        "totals": batch.totals or recorded,
        "recorded": recorded.models - found.models,
        "found": found.models,
        "found_rows": found_rows,
        "timeline": picture,
        "working": working,
        "most_bars": _MOST_BARS,
        "listing": listing,
    }
    return templates.TemplateResponse(request, "run.html", values)


@pages_router.get("/runs/{number}/coverage")
def _run_coverage(
    request: Request, number: Number, before: Annotated[int | None, Query(ge=1, le=_LARGEST)] = None
) -> Response:
    with _reader(request).session() as session:
        if get_batch(session, number) is None:
            raise HTTPException(404, f"No batch has number {number}. The list of runs shows what is there.")
        members = batch_members(session, number, limit=_ROWS + 1, before=before)
        rows = listed_by_number(session, members[:_ROWS])
        values = _covered(session, rows) | {
            "title": f"Run {number}",
            "page": "runs",
            "back": f"/runs/{number}",
            "next_page": f"/runs/{number}/coverage?before={members[_ROWS - 1]}" if len(members) > _ROWS else None,
        }
    return templates.TemplateResponse(request, "coverage.html", values)


@pages_router.get("/coverage")
def _coverage(request: Request, wanted: Listing, after: After = None) -> Response:
    with _reader(request).session() as session:
        page = list_page(session, wanted, limit=_ROWS, after=read_place(after))
        values = _covered(session, page.rows) | {
            "title": "Models",
            "page": "models",
            "back": "/models?" + urlencode(_asked(wanted)),
            "next_page": "/coverage?" + urlencode(_asked(wanted) | {"after": str(page.next)}) if page.next else None,
        }
    return templates.TemplateResponse(request, "coverage.html", values)


def _covered(session: Session, rows: Sequence[ListedConversion]) -> dict[str, Any]:
    return {"rows": rows, "covered": coverage(session, [row.id for row in rows])}


@pages_router.get("/runs/{number}/events")
async def _events(request: Request, number: Number) -> Response:
    reader = _reader(request)

    def look() -> dict[str, Any] | None:
        with reader.session() as session:
            batch = get_batch(session, number)
            if batch is None:
                return None
            totals = totals_of(session, batch)
        return {"ended": batch.finished_at is not None, **{word: getattr(totals, word) for word in _STATUSES}}

    first = await run_in_threadpool(look)
    if first is None:
        raise HTTPException(404, f"No batch has number {number}.")

    async def events() -> AsyncIterator[str]:
        said: dict[str, Any] | None = None
        state: dict[str, Any] | None = first
        for _ in range(int(_LISTEN_AT_MOST_SECONDS / _LISTEN_SECONDS)):
            # A comment keeps proxies and the client's own patience from closing a quiet stream.
            yield ": here\n\n" if state == said else f"data: {json.dumps(state)}\n\n"
            said = state
            if state is None or state["ended"] or await request.is_disconnected():
                return
            await asyncio.sleep(_LISTEN_SECONDS)
            try:
                state = await run_in_threadpool(look)
            except CatalogError:
                return

    return StreamingResponse(events(), media_type="text/event-stream")


@pages_router.get("/compare")
def _compare(
    request: Request,
    a: Annotated[int | None, Query(ge=1, le=_LARGEST)] = None,
    b: Annotated[int | None, Query(ge=1, le=_LARGEST)] = None,
) -> Response:
    if a is None or b is None:
        return templates.TemplateResponse(request, "compare.html", {"page": "models", "a": a, "b": b, "rows": None})
    with _reader(request).session() as session:
        first, second = _conversion(session, a), _conversion(session, b)
    values = {"page": "models", "a": first, "b": second, "rows": _differences(first, second)}
    return templates.TemplateResponse(request, "compare.html", values)


def _differences(first: ConversionRecord, second: ConversionRecord) -> list[tuple[str, str, str]]:
    left, right = _facts(first), _facts(second)
    return [(name, left.get(name, "-"), right.get(name, "-")) for name in {**left, **right}]


def _facts(record: ConversionRecord) -> dict[str, str]:
    """Return what two conversions are compared by, as text."""
    facts: dict[str, object] = {
        "model": record.model_id,
        "revision": record.revision,
        "status": record.status,
        "task": record.task,
        "class": record.architecture,
        "template": record.template,
        "simplified": "yes" if record.simplified else "no",
        "worker": record.worker,
        "peak memory": size_text(record.peak_rss_bytes),
        "finished": time_text(record.finished_at),
    }
    facts |= {f"option {name}": value for name, value in sorted(record.options.items())}
    if record.error is not None:
        facts |= {"error": record.error.kind, "error at": record.error.step, "message": record.error.message}
    if record.artifact is not None:
        facts |= {"size": size_text(record.artifact.size_bytes), "artifact": record.artifact.sha256}
        for graph in record.artifact.graphs:
            facts |= {
                f"{graph.role}: nodes": f"{graph.nodes} of {graph.nodes_before_simplify} exported",
                f"{graph.role}: opset": graph.opset,
                f"{graph.role}: operators": ", ".join(f"{name} {count}" for name, count in graph.operators.items()),
                f"{graph.role}: inputs": "\n".join(_tensor(tensor) for tensor in graph.inputs),
                f"{graph.role}: outputs": "\n".join(_tensor(tensor) for tensor in graph.outputs),
            }
    # The newest on each device.
    for check in {(check.device, check.provider): check for check in record.parity}.values():
        facts |= {
            f"parity on {check.device}": check.verdict,
            f"difference on {check.device}": (
                f"{difference_text(check.max_abs_diff)} of {difference_text(check.tolerance)}"
            ),
            f"axes proven on {check.device}": ", ".join(check.axes_proven),
        }
    facts |= {f"time of {timing.step}": duration_text(timing.seconds) for timing in record.timings}
    facts |= {f"version of {name}": version for name, version in sorted(record.environment.items())}
    return {name: "-" if value in (None, "") else str(value) for name, value in facts.items()}


def _tensor(tensor: Any) -> str:
    return f"{tensor.name}: {tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _conversion(session: Session, number: int) -> ConversionRecord:
    record = get_conversion(session, number)
    if record is None:
        raise HTTPException(404, f"No conversion has number {number}. The list of models shows what is there.")
    return record


def _reader(request: Request) -> CatalogReader:
    reader: CatalogReader = request.app.state.reader
    return reader
