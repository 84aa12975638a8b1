"""What a batch tells the Prefect server at its end: one event with the counts, which automations can wait for.

A server compares labels, not numbers: whether too many models failed is decided here, by the setting, and is a label.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tasks.report import Engine, Report

if TYPE_CHECKING:
    from flows.batch import BatchEnd

__all__ = ["EVENT", "OUTCOME_LABEL", "RESOURCE", "announce", "describe", "failure_rate"]

EVENT = "onnx-ferry.batch.finished"
"""Name of the event."""

RESOURCE = "onnx-ferry.batch"
"""What its resource's id begins with; the batch's number in the catalog follows."""

OUTCOME_LABEL = "onnx-ferry.outcome"
"""Label of its resource: ``failing`` where the failure rate is beyond the threshold, else ``fine``."""

_logger = logging.getLogger("prefect.onnx_ferry")


def failure_rate(report: Report) -> float:
    """Return the share of models that are not verified, 0 to 1."""
    failed = report.totals.failed + report.totals.mismatch
    return failed / len(report.models) if report.models else 0.0


def describe(end: BatchEnd, *, threshold: float) -> dict[str, Any]:
    """Return the event of a batch's end, as what `prefect.events.emit_event` takes.

    Args:
        end: The batch.
        threshold: Share of failures beyond which its outcome is ``failing``.
    """
    rate = failure_rate(end.report)
    return {
        "event": EVENT,
        "resource": {
            "prefect.resource.id": f"{RESOURCE}.{end.batch_id}",
            "prefect.resource.name": f"batch {end.batch_id}",
            OUTCOME_LABEL: "failing" if rate > threshold else "fine",
        },
        "payload": {
            "batch": end.batch_id,
            "models": len(end.report.models),
            **end.report.totals.model_dump(),
            "failure_rate": round(rate, 4),
            "failure_threshold": threshold,
            "started_at": end.report.started_at.isoformat(),
            "seconds": end.report.seconds,
        },
    }


def announce(end: BatchEnd, *, threshold: float) -> None:
    """Send the event, where a Prefect server knows of the batch: nothing waits for it, or fails without it.

    A batch without Prefect, or one that found everything done and so never called it, has no server to tell.
    """
    from flows.prefect_environment import embedded_server

    # The embedded server ends with the batch, and has no automations.
    if end.engine is not Engine.PREFECT or not end.worked or embedded_server() is not None:
        return
    from prefect.events import emit_event

    if emit_event(**describe(end, threshold=threshold)) is None:
        _logger.warning("Prefect took no event of the end of batch %s", end.batch_id)
