"""The Prefect server of a batch that was given none: a child of this process, and gone when it is.

Prefect can start one itself, but that one writes to the terminal, dies of the Ctrl-C that the batch is meant for,
and lives on when the batch is killed. This one writes to a file, is in a session of its own, and reads from a pipe
whose other end only the batch holds.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from onnx_config.errors import ErrorKind, TransientError

__all__ = ["EmbeddedServer", "app", "log_file"]

_START_SECONDS = 180.0
_STOP_SECONDS = 10.0
_TICK_SECONDS = 0.1
_QUOTED_CHARACTERS = 500
_VARIABLES = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def log_file(home: Path) -> Path:
    """Return where Prefect and its embedded server write what they have to say; the folder is made."""
    folder = home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "prefect.log"


class EmbeddedServer:
    """A Prefect server that starts in the background; its environment is this process's own.

    One of a home starts at a time, since two that create one database at once would fail.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        """``FERRY_HOME``; the server writes to `log_file` below it."""
        self._lock = FileLock(home / "prefect-start.lock")
        self._log = log_file(home)
        self._lock.acquire()
        try:
            port = _free_port()
            self.url = f"http://127.0.0.1:{port}/api"
            """What ``PREFECT_API_URL`` is to be."""
            self._said_before = self._log.stat().st_size if self._log.exists() else 0
            command = ["-m", "uvicorn", "--factory", "flows.prefect_server:app", "--host", "127.0.0.1"]
            command += ["--port", str(port), "--log-level", "error", "--lifespan", "on"]
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **_VARIABLES, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,
                )
        except BaseException:
            self._lock.release()
            raise
        # Prefect sends its last events when threads end, which is before this.
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        """Whether the process runs; it may not answer yet."""
        return self._process.poll() is None

    def wait_until_ready(self, *, timeout_seconds: float = _START_SECONDS) -> None:
        """Return when the server answers.

        Raises:
            TransientError: If it ended, or has not answered in time (``network``); it is stopped then.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            while not self._answers():
                if not self.alive:
                    raise self._failure(f"ended with exit code {self._process.returncode} before it answered")
                if time.monotonic() > deadline:
                    raise self._failure(f"did not answer within {timeout_seconds:.0f} s")
                time.sleep(_TICK_SECONDS)
        except BaseException:
            self.stop()
            raise
        finally:
            self._lock.release()

    def stop(self) -> None:
        """End the server, with some seconds for what it has not written yet. Does nothing the second time."""
        atexit.unregister(self.stop)
        self._lock.release()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        if not self.alive:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        # Not through the proxy that the environment may name: it does not reach this machine's loopback.
        with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=5) as client:
            return client.get(f"{self.url}/health").status_code == httpx.codes.OK
        return False

    def _failure(self, what: str) -> TransientError:
        with self._log.open("rb") as log:
            log.seek(self._said_before)
            said = " ".join(log.read().decode(errors="replace").split())
        last = f"its last words: {said[-_QUOTED_CHARACTERS:]}" if said else "it said nothing"
        return TransientError(
            f"Prefect's embedded server {what}; {last} (all in {self._log}). Run ferry doctor to see whether the "
            "installed versions go together, or use --engine local, which needs no server.",
            kind=ErrorKind.NETWORK,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _leave_with_parent() -> None:
    """End this process when the pipe on its standard input is closed, which the parent's death does too."""
    while sys.stdin.buffer.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def app() -> Any:
    """Return Prefect's server application, for uvicorn in the child process."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from prefect.server.api.server import create_app

    return create_app()
