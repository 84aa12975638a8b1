"""The variants of an artifact, verified again: each with a verdict of its own, and the loader refuses what falls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from onnx_config.errors import ErrorKind
from onnx_config.export.artifact import finite, write_ferry_value
from tasks.disk import disk_errors
from tasks.job import Job
from tasks.report import ErrorEntry, Step, VariantEntry, VariantParityEntry
from tasks.request import Workspace
from tasks.store import store_of
from tasks.variant_verdicts import VerifiedGraph, judge_again
from tasks.verify_report import Change, VariantVerifyEntry, change_between
from tasks.verify_targets import Target

__all__ = ["error_of_variants", "verify_variants", "withhold"]


def verify_variants(
    job: Job, parts: Sequence[VerifiedGraph], there: Sequence[VariantEntry], folder: Path
) -> tuple[VariantVerifyEntry, ...]:
    """Return what is to be said of the variants ``there`` beside the float32 graphs ``parts`` in ``folder``."""
    return tuple(
        VariantVerifyEntry(
            variant=now.variant,
            verdict=now.parity.verdict,
            change=_change(was.parity, now.parity),
            parity=now.parity,
            before=was.parity,
        )
        for was, now in zip(there, judge_again(job, parts, there, folder), strict=True)
        if now.parity is not None
    )


def _change(was: VariantParityEntry | None, now: VariantParityEntry) -> Change:
    if was is None or was.device != now.device:
        return Change.FIRST
    grown = (now.relative_error or 0.0) - (was.relative_error or 0.0)
    return change_between(was.verdict, now.verdict, grown=grown, tolerance=now.tolerance)


def error_of_variants(
    target: Target, model_id: str, fallen: Sequence[VariantVerifyEntry], *, device: str
) -> ErrorEntry:
    """Return what is to be said of an artifact of which variants do not hold on ``device``."""
    said = "; ".join(f"{found.variant}: {found.parity.detail}" for found in fallen)
    return ErrorEntry(
        kind=ErrorKind.MISMATCH,
        message=f"The float32 graphs of {model_id} hold; of their variants these do not, on {device}: {said}. "
        "The loader refuses those that held on this device before, or fail on the CPU.",
        step=Step.PARITY,
        reproduce=f"ferry verify {quote(target.place)} --device {device}",
    )


def withhold(
    target: Target, folder: Path, value: dict[str, Any], fallen: Sequence[VariantVerifyEntry], *, workspace: Workspace
) -> None:
    """Write down of variants that they do not hold, which is why the loader refuses them; their files stay."""
    verdicts = {found.variant: found.parity.model_dump(mode="json") for found in fallen}
    variants = [
        {**entry, "parity": verdicts.get(entry["variant"], entry["parity"])} for entry in value["model"]["variants"]
    ]
    changed = finite({**value, "model": {**value["model"], "variants": variants}})
    if target.sha256 is None:
        with disk_errors(f"the folder {str(folder)!r}"):
            write_ferry_value(folder, changed)
    else:
        store_of(workspace, target.place).amend(target.place, changed)
