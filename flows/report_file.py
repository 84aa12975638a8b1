"""The report as a file: written while a batch goes on, so that one that is killed leaves what it had done by then."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from onnx_config.errors import InputError
from tasks.report import ModelEntry, Report, Step
from tasks.request import Listener
from tasks.verify_report import VerifyReport

__all__ = ["ReportingListener", "write_report"]

_SECONDS_BETWEEN = 10.0


def write_report(path: Path, report: Report | VerifyReport) -> None:
    """Write ``report`` as JSON; the file is the whole report or stays as it was.

    Raises:
        InputError: If the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(report.to_json() + "\n", encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"The report cannot be written to {str(path)!r} ({error.strerror}). Choose another file."
        ) from (error)


class ReportingListener:
    """Keeps a report of the models that ended so far, in the order in which they did, and tells ``listener`` all.

    The file is at most some ten seconds behind. Where it cannot be written the batch goes on: whether it can is
    checked before, and said at the end.
    """

    def __init__(self, listener: Listener, path: Path) -> None:
        self._listener = listener
        self._path = path
        self._started_at = datetime.now(UTC)
        self._start = time.monotonic()
        self._entries: list[ModelEntry] = []
        self._written_at: float | None = None
        self._lock = threading.Lock()

    def model_started(self, model_id: str) -> None:
        """Pass it on."""
        self._listener.model_started(model_id)

    def step_started(self, model_id: str, step: Step) -> None:
        """Pass it on."""
        self._listener.step_started(model_id, step)

    def model_finished(self, entry: ModelEntry) -> None:
        """Pass it on, and write the report if the last time was a while ago."""
        self._listener.model_finished(entry)
        with self._lock:
            self._entries.append(entry)
            now = time.monotonic()
            if self._written_at is not None and now - self._written_at < _SECONDS_BETWEEN:
                return
            self._written_at = now
            report = Report.of(self._entries, started_at=self._started_at, seconds=now - self._start)
            with suppress(InputError):
                write_report(self._path, report)
