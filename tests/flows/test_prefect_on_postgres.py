"""Prefect's own data on PostgreSQL, as the compose file has it: its variables, both commands, and a batch over it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from flows.prefect_environment import missing_settings
from flows.prefect_server import _free_port
from tests.faults.harness import tiny
from tests.postgres import PostgresServer, full_programs

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "deploy" / "compose.yaml")["services"]


def variables(service: str, url: str) -> dict[str, str]:
    """Return a service's variables of Prefect, its database being the one at ``url``."""
    listed: dict[str, str] = SERVICES[service]["environment"]
    found = {name: value for name, value in listed.items() if name.startswith("PREFECT_SERVER_")}
    assert found["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")
    return found | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


@pytest.fixture
def server_with_trigrams() -> Iterator[PostgresServer]:
    """Start a PostgreSQL that has what Prefect's migrations ask for."""
    programs = full_programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL with pg_trgm, `apt install postgresql`")
    server = PostgresServer(programs=programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.mark.long
def test_a_batch_over_a_prefect_server_whose_data_is_on_postgresql(
    server_with_trigrams: PostgresServer, tmp_path: Path
) -> None:
    postgres = server_with_trigrams
    # As the cluster's user is: it owns its database, and is no superuser.
    database = "prefect"
    postgres.run("CREATE ROLE prefect LOGIN")
    postgres.run(f"CREATE DATABASE {database} OWNER prefect")
    url = f"postgresql+asyncpg://prefect@127.0.0.1:{postgres.port}/{database}"
    port = _free_port()
    common = os.environ | missing_settings({}, tmp_path) | {"PREFECT_HOME": str(tmp_path / "prefect")}

    migrate = SERVICES["prefect-migrate"]["command"]
    done = subprocess.run(
        [sys.executable, "-m", *migrate],
        env=common | variables("prefect-migrate", url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert postgres.run("SELECT count(*) FROM flow_run", database) == [(0,)]

    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"],
            env=common | variables("prefect-server", url),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    api = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{api}/ready", trust_env=False).is_success:
                    break
            time.sleep(0.2)
        tiny(tmp_path / "model")
        (tmp_path / "models.txt").write_text("./model\n", encoding="utf-8")
        ran = subprocess.run(
            [sys.executable, "-m", "flows.entry", "batch", "models.txt", "--report", "report.json"],
            cwd=tmp_path,
            env=os.environ | {"PREFECT_API_URL": api, "FERRY_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert json.loads((tmp_path / "report.json").read_text())["totals"]["converted"] == 1

        def recorded() -> bool:
            runs = postgres.run("SELECT state_type::text FROM flow_run", database)
            (tasks,) = postgres.run("SELECT count(*) FROM task_run WHERE state_type = 'COMPLETED'", database)[0]
            events = postgres.run("SELECT payload FROM events WHERE event = 'onnx-ferry.batch.finished'", database)
            return runs == [("COMPLETED",)] and tasks >= 5 and [event["converted"] for (event,) in events] == [1]

        while not recorded():
            assert time.monotonic() < deadline + 60, (tmp_path / "log").read_text()
            time.sleep(0.2)
        assert not list((tmp_path / "prefect").glob("*.db")), "nothing of it is in SQLite"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
