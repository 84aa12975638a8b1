"""Real servers on this machine, started and ended by tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from flows.prefect_environment import missing_settings
from flows.prefect_server import _free_port

__all__ = ["prefect_server", "served"]

_START_SECONDS = 180.0


@contextmanager
def served(command: Sequence[str], url: str, *, environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """Start a server, yield ``url`` when it answers at ``url``/health, and kill it and what it started at the end."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + _START_SECONDS
    try:
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            time.sleep(0.1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def prefect_server(home: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Start Prefect's own server, as a user would, over an empty folder; yield the URL of its API."""
    port = str(_free_port())
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    settings = {**environment, **missing_settings({}, home), "PREFECT_HOME": str(home)}
    with served(command, f"http://127.0.0.1:{port}/api", environment=settings, log=home / "log") as url:
        yield url
