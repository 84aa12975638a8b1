"""MLflow's own server on loopback, for tests: ``python mlflow_server.py FOLDER PORT`` runs it in the foreground.

It is what `mlflow server` runs behind gunicorn, without the part that answers for large language models and needs
pandas. Between it and its clients stands what a test asks for by files in ``FOLDER/faults``: see `_Faults`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.prefect_server import _free_port
from tests.loopback import served


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowServer:
    """A server that runs."""

    url: str
    folder: Path
    """Of its database, its files and its faults."""

    @contextmanager
    def fault(self, kind: str, name: str) -> Iterator[Path]:
        """Have uploads of a file ``stall``, or be ``refuse``d; yield a file that is there once one has come."""
        fault = self.folder / "faults" / kind
        seen = fault.with_suffix(".seen")
        fault.parent.mkdir(exist_ok=True)
        fault.write_text(name)
        try:
            yield seen
        finally:
            fault.unlink()
            seen.unlink(missing_ok=True)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Start a server over an empty folder, and yield it when it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, str(folder), str(port)]
    with served(command, f"http://127.0.0.1:{port}", environment=environment, log=folder / "log") as url:
        yield MlflowServer(url=url, folder=folder)


class _Faults:
    """Stands before the server: an upload of the file that ``stall`` names waits, one that ``refuse`` names fails."""

    def __init__(self, app: Callable[..., Iterable[bytes]], folder: Path) -> None:
        self._app = app
        self._folder = folder

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        for kind in ("stall", "refuse"):
            fault = self._folder / kind
            name = fault.read_text() if fault.exists() else ""
            if name and environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(f"/{name}"):
                fault.with_suffix(".seen").touch()
                while kind == "stall" and fault.exists():
                    time.sleep(0.05)
                start_response("507 Insufficient Storage", [("Content-Type", "text/plain")])
                return [b"no"]
        return self._app(environ, start_response)


def main(folder: Path, port: int) -> None:
    """Serve until killed."""
    database = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ.update(
        _MLFLOW_SERVER_FILE_STORE=database,
        _MLFLOW_SERVER_REGISTRY_STORE=database,
        _MLFLOW_SERVER_ARTIFACT_DESTINATION=str(folder / "files"),
        _MLFLOW_SERVER_ARTIFACT_ROOT="mlflow-artifacts:/",
        _MLFLOW_SERVER_SERVE_ARTIFACTS="true",
    )
    from mlflow.server import app
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, _Faults(app, folder / "faults"), threaded=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
