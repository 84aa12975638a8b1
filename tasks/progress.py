"""What is known of a conversion while it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from onnx_config.errors import FerryError
from onnx_config.spec import ModelSpec
from tasks.job import StepCost, reproduce_command
from tasks.lease import Lease
from tasks.report import ErrorEntry, ModelEntry, ParityEntry, Status, Step, VariantEntry
from tasks.request import ConversionRequest, Listener

__all__ = ["Progress"]


@dataclass(slots=True)
class Progress:
    """What is known of a conversion so far; becomes its entry whenever it ends."""

    request: ConversionRequest
    listener: Listener
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: dict[Step, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    step: Step = Step.FETCH
    revision: str | None = None
    key: str | None = None
    lease: Lease | None = None
    spec: ModelSpec | None = None
    parity: ParityEntry | None = None
    template: str | None = None
    simplified: bool = False
    attempts: int = 1
    notes: list[str] = field(default_factory=list)
    variants: tuple[VariantEntry, ...] = ()

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        self.step = step
        if self.lease is not None:
            self.lease.note_step(step)
        self.listener.step_started(self.request.model_id, step)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0.0) + time.monotonic() - start, 3)

    def waits(self) -> None:
        """Say that no step goes on until there is memory."""
        if self.lease is not None:
            self.lease.note_step(None)

    def saw(self, cost: StepCost) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes or 0, cost.peak_rss_bytes)

    def entry(self, status: Status, *, error: FerryError | None = None, **fields: Any) -> ModelEntry:
        spec = self.spec
        return ModelEntry(
            id=self.request.model_id,
            revision=self.revision,
            status=status,
            task=spec.task if spec else None,
            model_type=spec.model_type if spec else None,
            architecture=spec.architecture if spec else None,
            artifact=fields.pop("artifact", None),
            template=self.template,
            simplified=self.simplified,
            parity=self.parity,
            variants=self.variants,
            seconds=dict(self.seconds),
            peak_rss_bytes=self.peak_rss_bytes,
            attempts=self.attempts,
            notes=tuple(dict.fromkeys(self.notes)),
            error=None
            if error is None
            else ErrorEntry(
                kind=error.kind,
                message=error.message,
                step=self.step,
                reproduce=reproduce_command(self.request),
            ),
            **fields,
        )
