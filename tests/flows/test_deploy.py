"""Deployments end to end: a real server, a real worker, a run that the server has scheduled, parts that are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
POOL = "tiny"
FILE = """
work_pools:
  - name: tiny
    concurrency_limit: 6
concurrency_limits:
  - name: tiny-gib
    slots: 8
tag_limits:
  - tag: tiny-tag
    slots: 3
deployments:
  - name: soon
    manifest: one.txt
    work_pool: tiny
    schedules:
      - {interval: 15, timezone: Europe/Berlin}
    parameters: {workers: 1, memory_slots: tiny-gib}
    tags: [tiny]
    concurrency_limit: 1
  - name: by-hand
    manifest: one.txt
    work_pool: tiny
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with three models, and the environment of all that runs in it."""

    folder: Path
    api: str

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "FERRY_"))}
        own = {
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_LOGGING_LEVEL": "INFO",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
        }
        return kept | own | more

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def ferry(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "flows.entry", *words, **more)

    def deploy(self, *words: str) -> dict[str, Any]:
        done = self.ferry("deploy", "prefect.yaml", "--json", *words)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def conversions(self) -> list[dict[str, Any]]:
        listed = self.ferry("catalog", "list", "--json", "--all")
        assert listed.returncode == 0, listed.stderr
        found: list[dict[str, Any]] = json.loads(listed.stdout)["conversions"]
        return found

    def ask(self, what: str, **query: Any) -> Any:
        return httpx.post(f"{self.api}/{what}", json=query, trust_env=False, timeout=30).raise_for_status().json()


@pytest.fixture(scope="module")
def place(api: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    code = "from pathlib import Path; import tiny_models\n"
    code += "for n, name in enumerate(['bert-model', 'vit-model', 'vit-model']): "
    code += "tiny_models.build(name, Path(f'm{n}'), seed=n)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=True)
    (folder / "one.txt").write_text("./m0\n", encoding="utf-8")
    (folder / "all.txt").write_text("./m0\n./m1\n./m2\n", encoding="utf-8")
    (folder / "prefect.yaml").write_text(FILE, encoding="utf-8")
    return Place(folder, api)


def wait_for(condition: Callable[[], Any], *, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def worker(place: Place) -> Iterator[psutil.Process]:
    """Start a worker for the pool, as a user would, in a folder of its own."""
    place.deploy()
    own = place.folder / "worker"
    own.mkdir()
    with (own / "log").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL],
            cwd=own,
            env=place.environment(PREFECT_WORKER_QUERY_SECONDS="2"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process = psutil.Process(started.pid)
    try:
        yield process
    finally:
        family = process.children(recursive=True)
        started.kill()
        started.wait()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()


@pytest.mark.slow
def test_deploying_again_changes_what_has_changed_and_makes_nothing_twice(place: Place) -> None:
    planned = place.deploy("--dry-run")
    assert {item["action"] for item in planned["items"]} == {"create"}
    assert place.ask("work_pools/filter") == []
    names = [(item["what"], item["name"]) for item in planned["items"]]
    assert names == [
        ("work_pool", "tiny"),
        ("concurrency_limit", "tiny-gib"),
        ("tag_limit", "tiny-tag"),
        ("deployment", "convert_models/soon"),
        ("deployment", "convert_models/by-hand"),
    ]
    assert [(item["what"], item["name"], item["action"]) for item in place.deploy()["items"]] == [
        (*name, "create") for name in names
    ]
    deployed = place.ask("deployments/filter")
    assert {item["action"] for item in place.deploy()["items"]} == {"unchanged"}
    # Not touched at all, so that the runs which are scheduled already stay.
    assert place.ask("deployments/filter") == deployed
    soon = next(found for found in deployed if found["name"] == "soon")
    assert soon["entrypoint"] == "flows.convert_models"
    assert soon["parameters"]["manifest"] == str(place.folder / "one.txt")
    assert soon["schedules"][0]["schedule"]["timezone"] == "Europe/Berlin"
    assert soon["global_concurrency_limit"]["limit"] == 1
    (place.folder / "prefect.yaml").write_text(
        FILE.replace("slots: 8", "slots: 6").replace("slots: 3", "slots: 2").replace("interval: 15", "interval: 20"),
        encoding="utf-8",
    )
    changed = {item["name"]: item["changed"] for item in place.deploy()["items"] if item["action"] == "update"}
    assert changed == {"tiny-gib": ["slots"], "tiny-tag": ["slots"], "convert_models/soon": ["schedules"]}
    assert len(place.ask("deployments/filter")) == 2
    assert [limit["limit"] for limit in place.ask("v2/concurrency_limits/filter") if limit["name"] == "tiny-gib"] == [6]


class Receiver(BaseHTTPRequestHandler):
    """Keeps what it is told."""

    told: list[dict[str, Any]] = []  # noqa: RUF012 - a class of its own for each test

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    own = type("OwnReceiver", (Receiver,), {"told": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook-secret", own.told
    server.shutdown()
    server.server_close()
    thread.join()


NOTIFYING = """
notifications:
  - name: Team A
    url_variable: NOTIFY_URL
work_pools: [{name: tiny}]
deployments: [{name: by-hand, manifest: one.txt, work_pool: tiny}]
"""


@pytest.mark.slow
def test_who_is_to_know_hears_of_a_batch_that_fails_and_of_a_run_that_crashes(
    place: Place, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    url, told = receiver
    (place.folder / "notifying.yaml").write_text(NOTIFYING, encoding="utf-8")

    def deploy(**more: str) -> dict[str, str]:
        done = place.ferry("deploy", "notifying.yaml", "--json", **more)
        assert done.returncode == 0, done.stderr
        assert "secret" not in done.stdout
        return {item["name"]: item["action"] for item in json.loads(done.stdout)["items"]}

    assert deploy(NOTIFY_URL="http://127.0.0.1:9/")["Team A"] == "create"
    assert deploy(NOTIFY_URL=url)["Team A"] == "update", "another URL"
    assert deploy(NOTIFY_URL=url)["Team A"] == "unchanged"
    assert len(place.ask("automations/filter")) == 2

    (place.folder / "half.txt").write_text("./m1\n./broken\n", encoding="utf-8")
    (place.folder / "broken").mkdir()
    (place.folder / "broken" / "config.json").write_text('{"model_type": "no-such-type"}', encoding="utf-8")
    ran = place.ferry("batch", "half.txt", "--home", "notified", FERRY_FAILURE_THRESHOLD="40%")
    assert ran.returncode == 1, ran.stderr
    wait_for(lambda: told)

    run = place.ask("deployments/filter", deployments={"name": {"any_": ["by-hand"]}})[0]["id"]
    number = place.ask(f"deployments/{run}/create_flow_run")["id"]
    crashed = {"state": {"type": "CRASHED", "name": "Crashed", "message": 'exit "-9"'}, "force": True}
    place.ask(f"flow_runs/{number}/set_state", **crashed)
    wait_for(lambda: len(told) > 1)
    failing, crash = told
    assert failing["text"] == f"onnx-ferry: batch {failing['payload']['batch']}: 1 of 2 models failed (50.0 %)"
    assert failing["payload"] | {"seconds": 0, "started_at": ""} == {
        "batch": 1,
        "models": 2,
        "converted": 1,
        "reused": 0,
        "failed": 1,
        "mismatch": 0,
        "failure_rate": 0.5,
        "failure_threshold": 0.4,
        "seconds": 0,
        "started_at": "",
    }
    assert crash["flow_run"] == number
    assert crash["text"].endswith('of convert_models: Crashed: exit "-9"')


@pytest.mark.slow
def test_a_run_that_the_server_has_scheduled_converts_what_the_manifest_lists(
    place: Place, worker: psutil.Process
) -> None:
    """The one test that would notice a server which looks healthy and schedules nothing."""
    runs = wait_for(
        lambda: [
            run
            for run in place.ask("flow_runs/filter", flow_runs={"state": {"type": {"any_": ["COMPLETED", "FAILED"]}}})
            if run["auto_scheduled"]
        ]
    )
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    (place.folder / "prefect.yaml").write_text(FILE.replace("timezone", "active: false, timezone"), encoding="utf-8")
    place.deploy()
    (found,) = place.conversions()
    assert (found["model_id"], found["status"]) == (str(place.folder / "m0"), "converted")
    tasks = {run["name"] for run in place.ask("task_runs/filter")}
    assert {"./m0", "export ./m0", "parity ./m0"} <= tasks
    finished = {
        "event": {"name": ["onnx-ferry.batch.finished"]},
        "resource": {"labels": {"onnx-ferry.outcome": "fine"}},
    }
    event = wait_for(lambda: place.ask("events/filter", filter=finished)["events"])[0]
    assert event["payload"]["models"] == 1
    assert {"flow-run", "deployment"} <= {related["prefect.resource.role"] for related in event["related"]}
    # The catalog lies beside the manifest, and the worker's folder was neither copied nor written to.
    assert (place.folder / "ferry-data" / "catalog.db").is_file()
    assert [path.name for path in (place.folder / "worker").iterdir()] == ["log"]


@pytest.mark.slow
def test_a_part_whose_process_is_killed_is_run_again_and_nothing_is_converted_twice(
    place: Place, worker: psutil.Process
) -> None:
    wait_for(lambda: not worker.children())
    words = ["batch", "all.txt", "--shards", "2", "--pool", POOL, "--workers", "1", "--report", "report.json"]
    batch = subprocess.Popen(
        [sys.executable, "-m", "flows.entry", *words],
        cwd=place.folder,
        env=place.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # In the middle of an export: the process of the run, whose children go with it.
        wait_for(lambda: list((place.folder / "ferry-data" / "tmp").glob("*/export")))
        os.kill(next(child.pid for child in worker.children()), signal.SIGKILL)
        out, err = batch.communicate(timeout=200)
    finally:
        batch.kill()
    assert batch.returncode == 0, out + err
    report = json.loads((place.folder / "report.json").read_text(encoding="utf-8"))
    assert {model["id"]: model["status"] for model in report["models"]} == {
        "./m0": "reused",
        "./m1": "converted",
        "./m2": "converted",
    }
    found = [(conversion["model_id"], conversion["status"]) for conversion in place.conversions()]
    assert sorted(found) == [(str(place.folder / f"m{n}"), "converted") for n in range(3)]
    names = [run["name"] for run in place.ask("flow_runs/filter") if run["name"].startswith("batch")]
    assert any(name.endswith(" again 1") for name in names)
    assert place.ask("flow_runs/filter", flow_runs={"state": {"type": {"any_": ["CRASHED"]}}})


@pytest.mark.slow
def test_the_documented_flow_of_a_users_own(place: Place) -> None:
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    code = f"{example}\nimport json, sys\nprint('found', json.dumps(nightly(['./m0', './nowhere'])))\n"
    ran = place.run("-c", code)
    assert ran.returncode == 0, ran.stderr
    (artifact,) = json.loads(ran.stdout.rpartition("found ")[2])
    assert artifact == str(place.folder / "onnx" / "m0")
    assert (place.folder / "onnx" / "m0" / "model.onnx").is_file()
    states = {run["name"]: run["state_type"] for run in place.ask("flow_runs/filter", sort="START_TIME_DESC", limit=2)}
    assert set(states.values()) == {"COMPLETED"}


@pytest.mark.slow
def test_a_pool_that_is_not_there_is_said_and_nothing_is_started(place: Place) -> None:
    ran = place.ferry("batch", "all.txt", "--shards", "2", "--pool", "nowhere", "--home", "other")
    assert ran.returncode == 2
    assert "the work pool 'nowhere', and the Prefect server has none of that name" in ran.stderr
    assert "prefect work-pool create 'nowhere' --type process" in ran.stderr


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        pytest.param(
            "", 2, "none is named: PREFECT_API_URL is not set. Start one with `prefect server start`", id="no-url"
        ),
        pytest.param(
            "http://127.0.0.1:9/api", 1, "the one at http://127.0.0.1:9/api does not answer", id="nobody-there"
        ),
    ],
)
def test_deploying_without_a_server_says_what_to_type(tmp_path: Path, url: str, code: int, words: str) -> None:
    (tmp_path / "one.txt").write_text("org/a\n", encoding="utf-8")
    (tmp_path / "prefect.yaml").write_text(FILE, encoding="utf-8")
    done = Place(tmp_path, url).ferry("deploy", "prefect.yaml")
    assert done.returncode == code
    assert words in done.stderr
    assert "export PREFECT_API_URL=http://127.0.0.1:4200/api" in done.stderr or url
    assert done.stdout == ""
