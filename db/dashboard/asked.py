"""What a request may ask: the same words in the address of a page and of the API, each with its limits."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Path, Query
from pydantic import AfterValidator

from db.listing import ConversionFilter, PlaceInListing
from db.overview import OverviewFilter, Period
from db.vocabulary import ConversionStatus, FailureKind

__all__ = ["PLACE_FORMAT", "After", "Limit", "Listing", "Number", "Overviewed", "read_place"]

_LARGEST = 2**63 - 1

Number = Annotated[int, Path(ge=1, le=_LARGEST)]
Limit = Annotated[int, Query(ge=1, le=200, description="Rows of a page.")]
PLACE_FORMAT = "place-in-listing"
"""What the API's description calls a place; a pattern would allow the thirtieth of February."""


def _checked_place(after: str | None) -> str | None:
    read_place(after)
    return after


def read_place(after: str | None) -> PlaceInListing | None:
    """Return where a page begins; ``None`` or empty: with the newest row.

    Raises:
        ValueError: If that is no place.
    """
    return PlaceInListing.read(after) if after else None


After = Annotated[
    str | None,
    AfterValidator(_checked_place),
    Query(
        max_length=60,
        description="Where the page begins: `next` of the one before.",
        json_schema_extra={"format": PLACE_FORMAT},
    ),
]
_Word = Annotated[str | None, Query(max_length=200)]


def _listing(  # noqa: PLR0917 - FastAPI gives them by name
    q: Annotated[str | None, Query(max_length=200, description="A part of the model's id.")] = None,
    status: Annotated[ConversionStatus | str | None, Query(max_length=40)] = None,
    task: _Word = None,
    model_type: _Word = None,
    error_kind: Annotated[FailureKind | str | None, Query(max_length=40)] = None,
    worker: _Word = None,
    run: Annotated[int | None, Query(ge=1, le=_LARGEST, description="Only attempts of this batch.")] = None,
    every: Annotated[bool, Query(description="Also attempts that a later one replaced.")] = False,
) -> ConversionFilter:
    return ConversionFilter(
        text=(q or "").strip() or None,
        status=status or None,
        task=task or None,
        model_type=model_type or None,
        error_kind=error_kind or None,
        worker=worker or None,
        batch_id=run,
        every=every,
    )


def _overviewed(
    period: Period = Period.MONTH, task: _Word = None, model_type: _Word = None, worker: _Word = None
) -> OverviewFilter:
    return OverviewFilter(
        period=period,
        now=datetime.now(UTC),
        task=task or None,
        model_type=model_type or None,
        worker=worker or None,
    )


Listing = Annotated[ConversionFilter, Depends(_listing)]
Overviewed = Annotated[OverviewFilter, Depends(_overviewed)]
