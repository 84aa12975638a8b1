"""How Prefect is set up before it is imported: an embedded server of our own, unless one is named.

Prefect reads its settings when it is imported. What the user has set stays.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["prepare_prefect"]

_ALWAYS = {
    # Nothing here reports home.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}

_EMBEDDED = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    # One row at a time, as is the default, the embedded server forgets most task runs when it stops.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
}


def prepare_prefect(home: Path) -> str | None:
    """Set the environment for Prefect; return the URL of the server to use, ``None`` for an embedded one.

    Args:
        home: ``FERRY_HOME``; the embedded server keeps its data in ``prefect`` below it.
    """
    for name, value in _ALWAYS.items():
        os.environ.setdefault(name, value)
    url = os.environ.get("PREFECT_API_URL") or None
    if url is None:
        os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))
        for name, value in _EMBEDDED.items():
            os.environ.setdefault(name, value)
    return url
