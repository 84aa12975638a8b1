"""What was verified where: of each conversion of a list, the newest word on every place that it was compared at.

A place is a device with a provider and how far ONNX Runtime rewrites the graph there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from db.assemble import chunked
from db.models import Conversion, FoundDone, ParityCell, ParityCheck
from db.vocabulary import ParityVerdict

__all__ = ["Coverage", "Place", "Seen", "batch_members", "coverage"]

UNKNOWN_LEVEL = "-"
"""How far the graph was rewritten, where a check did not write that down."""

_LEVELS = (UNKNOWN_LEVEL, "disable", "basic", "extended", "all")
# Of several comparisons at one place the worst counts.
_WORST_FIRST = (ParityVerdict.MISMATCH, ParityVerdict.UNSTABLE, ParityVerdict.NOT_RUN, ParityVerdict.VERIFIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where graphs are compared."""

    device: str
    """``cpu`` or ``cuda``."""

    provider: str
    """ONNX Runtime's execution provider."""

    optimization: str
    """``disable``, ``basic``, ``extended`` or ``all``; `UNKNOWN_LEVEL` where nobody wrote it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the newest check of a conversion found at a place."""

    verdict: str
    """A `db.vocabulary.ParityVerdict`: the worst of its comparisons there."""

    compared: int
    """How many those were: graphs times shapes."""

    max_abs_diff: float | None
    """Largest difference of an output; ``None`` where nothing was compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What was verified where, of some conversions."""

    places: tuple[Place, ...]
    """Those that any of them was compared at; the CPU first."""

    seen: dict[int, dict[Place, Seen]] = field(default_factory=dict)
    """Number of the conversion -> place -> what was found."""

    def count(self, place: Place, verdict: str) -> int:
        """Return how many of the conversions have this verdict at a place."""
        return sum(1 for found in self.seen.values() if place in found and found[place].verdict == verdict)


def coverage(session: Session, numbers: Iterable[int]) -> Coverage:
    """Return what was verified where of the conversions with these numbers; every one of them has an entry."""
    wanted = list(numbers)
    seen: dict[int, dict[Place, Seen]] = {number: {} for number in wanted}
    checks: list[Row[Any]] = []
    columns = select(
        ParityCheck.id,
        ParityCheck.conversion_id,
        ParityCheck.device,
        ParityCheck.provider,
        ParityCheck.verdict,
        ParityCheck.shapes,
        ParityCheck.max_abs_diff,
    )
    for part in chunked(wanted):
        checks += session.execute(columns.where(ParityCheck.conversion_id.in_(part))).all()
    cells = _cells(session, [check.id for check in checks])
    # A later check replaces what an earlier one found at the same place, and nothing else.
    for check in sorted(checks, key=lambda row: row.id):
        whole = Seen(verdict=check.verdict, compared=check.shapes, max_abs_diff=check.max_abs_diff)
        found = cells.get(check.id) or {(check.provider, UNKNOWN_LEVEL): whole}
        for (provider, level), one in found.items():
            seen[check.conversion_id][Place(device=check.device, provider=provider, optimization=level)] = one
    places = {place for found in seen.values() for place in found}
    return Coverage(places=tuple(sorted(places, key=_order)), seen=seen)


def batch_members(session: Session, batch_id: int, *, limit: int, before: int | None = None) -> Sequence[int]:
    """Return the numbers of a batch's attempts and of what it found done, the newest first, from below ``before``."""
    made = select(Conversion.id).where(Conversion.batch_id == batch_id)
    found = select(FoundDone.conversion_id.label("id")).where(FoundDone.batch_id == batch_id)
    both = made.union(found).subquery()
    query = select(both.c.id).order_by(both.c.id.desc()).limit(limit)
    return session.scalars(query if before is None else query.where(both.c.id < before)).all()


def _cells(session: Session, check_ids: Sequence[int]) -> dict[int, dict[tuple[str, str], Seen]]:
    counted = select(
        ParityCell.parity_check_id,
        ParityCell.provider,
        ParityCell.optimization,
        ParityCell.verdict,
        func.count().label("compared"),
        func.max(ParityCell.max_abs_diff).label("largest"),
    ).group_by(ParityCell.parity_check_id, ParityCell.provider, ParityCell.optimization, ParityCell.verdict)
    found: dict[int, dict[tuple[str, str], Seen]] = defaultdict(dict)
    for part in chunked(check_ids):
        for row in session.execute(counted.where(ParityCell.parity_check_id.in_(part))):
            place = (row.provider, row.optimization)
            one = Seen(verdict=row.verdict, compared=row.compared, max_abs_diff=row.largest)
            found[row.parity_check_id][place] = _together(found[row.parity_check_id].get(place), one)
    return found


def _together(one: Seen | None, other: Seen) -> Seen:
    if one is None:
        return other
    return Seen(
        verdict=min(one.verdict, other.verdict, key=lambda word: _WORST_FIRST.index(ParityVerdict(word))),
        compared=one.compared + other.compared,
        max_abs_diff=max((d for d in (one.max_abs_diff, other.max_abs_diff) if d is not None), default=None),
    )


def _order(place: Place) -> tuple[bool, str, str, int]:
    level = _LEVELS.index(place.optimization) if place.optimization in _LEVELS else len(_LEVELS)
    return place.device != "cpu", place.device, place.provider, level
