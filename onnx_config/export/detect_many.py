"""Detections one after the other in one child, for lists so long that a child for each would cost more than the work.

What succeeds is told, and what a class itself refuses. Any other failure in a process that has seen other models may be
theirs, so whoever asks tries again in a child for that model alone, as `onnx_config.export.steps.detect` runs in any
conversion.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export import steps
from onnx_config.export.child import names_memory

__all__ = ["detect_many", "read_answers"]

Json = dict[str, Any]


def detect_many(request: Json) -> Json:
    """Detect each of ``items``, requests as `steps.detect` takes them, and append a line to ``answers`` after each.

    Each may take ``seconds`` of wall time. One that takes longer ends the process by SIGALRM, also in native code; the
    lines written so far say how far it got.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with Path(request["answers"]).open("a", encoding="utf-8") as file:
        for item in request["items"]:
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            spec = refusal = None
            try:
                spec = steps.detect(item)
            # Whatever it is, a child for this one alone will say it again.
            except Exception as error:  # noqa: BLE001
                refusal = _refusal(error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            file.write(json.dumps({"spec": spec, "refusal": refusal, "seconds": time.monotonic() - started}) + "\n")
            file.flush()
    return {}


def _refusal(error: Exception) -> str | None:
    """Return why a class is not supported, where it is the class that says so."""
    if not isinstance(error, ModelError) or error.kind is not ErrorKind.UNSUPPORTED:
        return None
    # The memory that it lacks may be what other models hold.
    return None if names_memory(error.message) else error.message


def read_answers(path: Path) -> list[Json]:
    """Return the lines that `detect_many` has written, one per item from the first on; a torn last line is left out.

    A ``spec`` of ``None`` is one that failed; its ``refusal`` says why it is not supported, or is ``None``.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    # What follows the last line break is empty, or torn.
    return [json.loads(line) for line in lines[:-1]]
