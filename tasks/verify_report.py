"""What verifying again says: an entry for each artifact, and what has changed since the time before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from tasks.report import ErrorEntry, ParityEntry, VariantParityEntry, Verdict

__all__ = ["Change", "VariantVerifyEntry", "VerifyEntry", "VerifyReport", "change_between"]

_DRIFT = 0.1


class Change(StrEnum):
    """How a verdict relates to the one before on the same device."""

    SAME = "same"
    NEWLY_FAILING = "newly_failing"
    NEWLY_PASSING = "newly_passing"
    DRIFTED = "drifted"
    """Verified both times, and the difference has grown by more than a tenth of the tolerance."""
    FIRST = "first"
    """There was none before on this device."""
    NONE = "none"
    """There is no verdict this time."""


def change_between(was: Verdict, now: Verdict, *, grown: float, tolerance: float | None) -> Change:
    """Return how the verdict of ``now`` relates to the one before.

    Args:
        was: The verdict before, on the same device.
        now: The verdict of this time.
        grown: By how much the difference is larger than before.
        tolerance: What is allowed of it; ``None``: nothing.
    """
    held, holds = (verdict is Verdict.VERIFIED for verdict in (was, now))
    if held != holds:
        return Change.NEWLY_PASSING if holds else Change.NEWLY_FAILING
    return Change.DRIFTED if holds and grown > _DRIFT * (tolerance or 0.0) else Change.SAME


class VariantVerifyEntry(BaseModel):
    """One variant of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    verdict: Verdict
    change: Change
    parity: VariantParityEntry
    before: VariantParityEntry | None
    """The verdict that ``ferry.json`` told."""


class VerifyEntry(BaseModel):
    """One artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """The model, as it was asked for."""
    revision: str | None
    artifact: str
    """Folder that holds the files; of what no longer holds, the quarantine folder."""
    conversion: int | None
    """Its number in the catalog; ``None``: the catalog does not know it."""
    task: str | None
    architecture: str | None
    verdict: Verdict
    """``not_run`` where it could not be compared."""
    change: Change
    parity: ParityEntry | None
    before: ParityEntry | None
    """The verdict before, on the same device."""
    variants: tuple[VariantVerifyEntry, ...] = ()
    """Those in the artifact; none were compared where the float32 graphs do not hold."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: ErrorEntry | None


class VerifyReport(BaseModel):
    """What a run of `ferry verify` found."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: int = Field(default=1, alias="schema")
    started_at: datetime
    seconds: float
    totals: dict[Verdict, int]
    changes: dict[Change, int]
    models: tuple[VerifyEntry, ...]

    @classmethod
    def of(cls, entries: Iterable[VerifyEntry], *, started_at: datetime, seconds: float) -> VerifyReport:
        """Return the report over ``entries``, in their order, with totals counted."""
        models = tuple(entries)
        verdicts, changes = Counter(e.verdict for e in models), Counter(e.change for e in models)
        return cls(
            started_at=started_at.astimezone(UTC),
            seconds=round(seconds, 3),
            totals={verdict: verdicts[verdict] for verdict in Verdict},
            changes={change: changes[change] for change in Change},
            models=models,
        )

    @property
    def all_verified(self) -> bool:
        """Whether every artifact was compared and holds, with all its variants."""
        found = (verdict for entry in self.models for verdict in (entry.verdict, *(v.verdict for v in entry.variants)))
        return all(verdict is Verdict.VERIFIED for verdict in found)

    def to_json(self) -> str:
        """Return the report as one JSON document."""
        return self.model_dump_json(by_alias=True, indent=2)
