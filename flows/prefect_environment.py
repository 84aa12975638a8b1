"""How Prefect is set up before it is imported: an embedded server of our own, unless one is named.

Prefect reads its settings when it is imported. What the user has set stays.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flows.prefect_server import EmbeddedServer

__all__ = ["embedded_server", "missing_settings", "prepare_prefect", "quiet_prefect"]

_ALWAYS = {
    # Nothing here reports home.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # What a failure's log line says is in the run's state too, and a server that is away would have each line wait.
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    # Below that, each event that a server did not take is written to the log in full, of which a model has twenty.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    # With the 5 of the default, each call to a server that went away gives up after a minute; with 2, after 6 seconds.
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    # A second server of Prefect's own making would take the history of this one.
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
}

_EMBEDDED = {
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    # One row at a time, as is the default, the embedded server forgets most task runs when it stops.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
}

_embedded: EmbeddedServer | None = None


def missing_settings(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the variables to add to ``environment``: what the user has set is not among them.

    >>> missing_settings({}, Path("home"))["PREFECT_HOME"]
    'home/prefect'
    >>> "PREFECT_HOME" in missing_settings({"PREFECT_API_URL": "http://server/api"}, Path("home"))
    False
    """
    wanted = dict(_ALWAYS)
    if not environment.get("PREFECT_API_URL"):
        wanted |= _EMBEDDED | {"PREFECT_HOME": str(home / "prefect")}
    return {name: value for name, value in wanted.items() if name not in environment}


def prepare_prefect(home: Path) -> str | None:
    """Set the environment for Prefect; return the URL of the server to use, ``None`` for an embedded one.

    The embedded one is started here and comes up while the caller imports Prefect; `embedded_server` has it.

    Args:
        home: ``FERRY_HOME``; the embedded server keeps its data in ``prefect`` and ``logs`` below it.
    """
    global _embedded  # noqa: PLW0603 - one per process, as are Prefect's settings
    if _embedded is not None and os.environ.get("PREFECT_API_URL") == _embedded.url:
        # A batch before this one in the same process has set it.
        if _embedded.alive and _embedded.home == home:
            return None
        del os.environ["PREFECT_API_URL"]
        _embedded.stop()
    given = os.environ.get("PREFECT_API_URL") or None
    os.environ.update(missing_settings(os.environ, home))
    if given is None:
        _embedded = EmbeddedServer(home)
        os.environ["PREFECT_API_URL"] = _embedded.url
    return given


def quiet_prefect() -> None:
    """Set the environment for Prefect where a server is asked and no flow is run: nothing reports home."""
    os.environ.update({name: value for name, value in _ALWAYS.items() if name not in os.environ})


def embedded_server() -> EmbeddedServer | None:
    """Return the server that `prepare_prefect` has started; ``None`` if it had no need to."""
    return _embedded
