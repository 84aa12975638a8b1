"""The overview and the models as one page that stands by itself: it loads and runs nothing, and can be handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db.dashboard.pages import overview_values, templates
from db.listing import ConversionFilter, list_page
from db.overview import OverviewFilter, Period, TotalsPoint
from db.vocabulary import ConversionStatus

__all__ = ["ReportPage", "render_report"]

_STYLE = Path(__file__).parent / "static" / "app.css"
_BARS = 90
_WIDTH, _HEIGHT = 1000.0, 160.0
_ROWS_PER_READ = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """A page, and how much of the catalog is on it."""

    text: str
    """HTML."""

    models: int
    """Conversions that it lists, the newest."""

    all_models: int
    """Conversions that hold now."""


def render_report(session: Session, *, now: datetime, most_models: int = 2000) -> ReportPage:
    """Return the overview over all time and the newest ``most_models`` conversions that hold now, as one HTML page.

    Everything that stands on it goes through the templates' escaping, as on the dashboard's pages; a policy in the page
    itself keeps a browser from loading anything.
    """
    wanted = OverviewFilter(period=Period.ALL, now=now)
    values = overview_values(session, wanted)
    totals = values["now_totals"]
    rows: list[Any] = []
    place = None
    while len(rows) < most_models:
        page = list_page(session, ConversionFilter(), limit=min(_ROWS_PER_READ, most_models - len(rows)), after=place)
        rows += page.rows
        place = page.next
        if place is None:
            break
    text = templates.env.get_template("report.html").render(
        values
        | {
            "style": _STYLE.read_text(encoding="utf-8"),
            "now": now,
            "rows": rows,
            "all_models": totals.models,
            "bars": _bars(values["points"], until=now),
        }
    )
    return ReportPage(text=text, models=len(rows), all_models=totals.models)


def _bars(points: Sequence[TotalsPoint], *, until: datetime) -> dict[str, Any] | None:
    """Return the attempts over time as stacked rectangles, some days to a bar; ``None`` where there are none."""
    if not points:
        return None
    begin = points[0].start
    days = max(1, (max(until, points[-1].start) - begin).days + 1)
    step = -(-days // _BARS)
    sums: dict[int, dict[str, int]] = {}
    for point in points:
        bar = sums.setdefault((point.start - begin).days // step, dict.fromkeys(_STATUSES, 0))
        for status in _STATUSES:
            bar[status] += getattr(point.totals, status)
    highest = max(sum(bar.values()) for bar in sums.values())
    width = _WIDTH / -(-days // step)
    drawn = []
    for place, bar in sums.items():
        base = _HEIGHT
        for status in _STATUSES:
            height = _HEIGHT * bar[status] / highest
            base -= height
            if height:
                drawn.append((status, round(place * width, 1), round(base, 1), round(width * 0.8, 1), round(height, 1)))
    return {
        "drawn": drawn,
        "width": _WIDTH,
        "height": _HEIGHT,
        "highest": highest,
        "days": step,
        "begin": begin,
        "end": begin + timedelta(days=days - 1),
    }


_STATUSES = tuple(word.value for word in ConversionStatus)
