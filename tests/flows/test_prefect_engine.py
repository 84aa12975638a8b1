"""Prefect's traps as they concern us: policy without a server, then the real command against real servers.

The commands run in processes of their own, so that Prefect's threads and settings stay out of the other tests.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from flows.prefect_environment import missing_settings
from flows.prefect_server import EmbeddedServer, _free_port
from onnx_config.errors import ErrorKind, InternalError, ModelError, ResourceError, TransientError

ROOT = Path(__file__).parents[2]
FERRY = Path(sys.executable).with_name("ferry")
STEPS = ("detect", "export", "simplify", "parity", "register")
MODEL = "vit-model"


# Policy, without a server.


def step_tasks() -> dict[str, Any]:
    from tasks import prefect_tasks

    return {step: getattr(prefect_tasks, f"{step}_task") for step in STEPS}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_tried_again_by_the_kind_of_its_error_and_never_timed_or_cached_by_prefect(step: str) -> None:
    from prefect.cache_policies import NO_CACHE

    from tasks.prefect_tasks import may_pass

    # Prefect calls no other kind of condition, and then retries nothing in silence.
    assert inspect.isfunction(may_pass)
    task = step_tasks()[step]
    assert task.name == step
    assert task.retry_condition_fn is may_pass
    assert task.retries == 2
    # Native code does not listen to it; the step's child is killed instead.
    assert task.timeout_seconds is None
    # The store and the catalog are looked up before; a cached record may name files that are gone.
    assert task.cache_policy == NO_CACHE
    assert task.persist_result is False
    # For each tag the server would be asked before each run, and a server that is away would fail the model.
    assert not task.tags


@pytest.mark.parametrize(
    ("error", "again"),
    [
        pytest.param(TransientError("away", kind=ErrorKind.NETWORK), True, id="network"),
        pytest.param(TransientError("full", kind=ErrorKind.STORE), True, id="store"),
        pytest.param(TransientError("locked", kind=ErrorKind.CATALOG), True, id="catalog"),
        pytest.param(ModelError("no", kind=ErrorKind.EXPORT_FAILED), False, id="the-model"),
        pytest.param(ResourceError("hungry", kind=ErrorKind.OUT_OF_MEMORY), False, id="memory"),
        pytest.param(InternalError("ours"), False, id="our-bug"),
        pytest.param(ConnectionError("untranslated"), False, id="a-foreign-error"),
    ],
)
def test_what_is_tried_again(error: Exception, again: bool) -> None:
    from prefect.states import exception_to_failed_state
    from prefect.utilities.asyncutils import run_coro_as_sync

    from tasks.prefect_tasks import may_pass

    state: Any = run_coro_as_sync(exception_to_failed_state(error))
    assert may_pass(step_tasks()["export"], None, state) is again  # type: ignore[arg-type]  # the run is not looked at


def test_the_flow_and_its_parent_task_have_the_names_that_dashboards_ask_for() -> None:
    from flows import prefect_engine

    assert prefect_engine.convert_models.name == "convert_models"
    assert prefect_engine.convert_model.name == "convert_model"
    assert prefect_engine.convert_model.retries == 0


def test_the_pool_is_as_wide_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's default is a thread per model, however many there are."""
    from flows import prefect_engine

    asked: dict[str, Any] = {}

    class Flow:
        def with_options(self, **options: Any) -> Flow:
            asked.update(options)
            return self

        def __call__(self, *_args: object, **_kwargs: object) -> None: ...

    monkeypatch.setattr(prefect_engine, "convert_models", Flow())
    prefect_engine._run_flow([], None, workers=3, url=None, log=Path("log"))  # type: ignore[arg-type]  # no model, no plan
    assert type(asked["task_runner"]).__name__ == "ThreadPoolTaskRunner"
    assert asked["task_runner"]._max_workers == 3


@pytest.mark.parametrize(
    ("package", "range_", "why"),
    [
        ("fastapi", "<0.151", "Prefect's server does not import with newer ones: Body() has lost 'min_items'"),
        ("sqlalchemy", "<2.1", "under 2.1 Prefect's server looks healthy and never schedules a run"),
        ("prefect", "==3.8.*", "the traps below were measured with it"),
    ],
)
def test_the_installed_versions_go_together(package: str, range_: str, why: str) -> None:
    installed = version(package)
    assert SpecifierSet(range_).contains(Version(installed)), f"{package} {installed} is not {range_}: {why}"


ALWAYS = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_LOGGING_LEVEL": "WARNING"}


def test_an_embedded_server_reports_nowhere_and_records_what_it_was_told(tmp_path: Path) -> None:
    settings = missing_settings({}, tmp_path)
    assert ALWAYS.items() <= settings.items()
    assert Path(settings["PREFECT_HOME"]).is_relative_to(tmp_path)
    # With the default of one row at a time, most task runs are lost when the server ends.
    for name in ("TASK_RUN_RECORDER_BATCH_SIZE", "EVENT_PERSISTER_BATCH_SIZE", "TASK_RUN_RECORDER_READ_BATCH_SIZE"):
        assert int(settings[f"PREFECT_SERVER_SERVICES_{name}"]) >= 100


def test_a_server_that_is_named_gets_no_settings_of_an_embedded_one(tmp_path: Path) -> None:
    settings = missing_settings({"PREFECT_API_URL": "http://127.0.0.1:4200/api"}, tmp_path)
    assert ALWAYS.items() <= settings.items()
    assert not [name for name in settings if name.startswith("PREFECT_SERVER_SERVICES") or name == "PREFECT_HOME"]


@pytest.mark.parametrize("name", sorted(missing_settings({}, Path("home"))))
def test_what_the_user_has_set_stays(name: str, tmp_path: Path) -> None:
    assert name not in missing_settings({name: "mine"}, tmp_path)


@pytest.mark.parametrize("module", ["flows.cli", "flows.batch", "tasks.pipeline"])
def test_prefect_is_not_imported_before_there_is_work(module: str) -> None:
    code = f"import sys, {module}; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "uvicorn.py").write_text("raise TypeError(\"Body() got 'min_items'\")", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(broken), *sys.path])
    server = EmbeddedServer(tmp_path)
    with pytest.raises(TransientError, match=r"exit code 1.*min_items.*prefect\.log.*--engine local") as caught:
        server.wait_until_ready()
    assert caught.value.kind is ErrorKind.NETWORK
    assert not server.alive


# The real command.


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder with two models, of which one is broken, and a home for what is made of them."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "FERRY_"))}
        for name in ("DO_NOT_TRACK", "COLUMNS"):
            kept.pop(name, None)
        (self.folder / "user").mkdir(exist_ok=True)
        return kept | {"FERRY_HOME": str(self.home), "HOME": str(self.folder / "user")} | more

    def batch(self, *arguments: str, timeout: float = 240, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [str(FERRY), "batch", "models.txt", "--report", "report.json", *arguments]

    def report(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return document

    def statuses(self) -> list[str]:
        return [model["status"] for model in self.report()["models"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the model ``good`` and one whose weights end in the middle, ``broken``."""
    folder = tmp_path_factory.mktemp("models")
    # In a process of its own: it prints bars, and its libraries are not needed here.
    code = f"from pathlib import Path; import tiny_models; tiny_models.build({MODEL!r}, Path('good'))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        check=True,
    )
    shutil.copytree(folder / "good", folder / "broken")
    weights = folder / "broken" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    return folder


def make_place(models: Path, folder: Path, *names: str) -> Place:
    shutil.copytree(models, folder, dirs_exist_ok=True)
    (folder / "models.txt").write_text("".join(f"./{name}\n" for name in names), encoding="utf-8")
    return Place(folder=folder)


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Place:
    return make_place(models, tmp_path / "place", "good", "broken")


def wait_for(condition: Any, *, seconds: float = 120, process: subprocess.Popen[str] | None = None) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def exporting(place: Place, process: subprocess.Popen[str]) -> None:
    """Return when a model is being exported."""
    # One pattern for all depths would go into the folders of models that have just failed, and these go away.
    wait_for(lambda: list((place.home / "tmp").glob("*/export")), process=process)


def servers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [
            child for child in psutil.Process(process.pid).children() if "flows.prefect_server:app" in cmdline(child)
        ]
    return []


def cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def processes_of(place: Place) -> list[psutil.Process]:
    """Return the processes that belong to a place, whoever started them: its home is in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            if process.environ().get("FERRY_HOME") == str(place.home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_running(place: Place, *, seconds: float = 10) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := processes_of(place)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def ask(api: str, what: str, **query: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{api}/{what}/filter", json=query, trust_env=False, timeout=30).raise_for_status()
    found: list[dict[str, Any]] = answer.json()
    return found


def all_ended(runs: list[dict[str, Any]]) -> bool:
    return bool(runs) and all(run["state_type"] in ("COMPLETED", "FAILED") for run in runs)


def states(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {run["name"]: run["state_name"] for run in runs}


@pytest.fixture(scope="module")
def recorded(api: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """Run a batch of the two models with its runs on a server; return its place and what it printed."""
    place = make_place(models, tmp_path_factory.mktemp("recorded"), "good", "broken")
    ran = place.batch(PREFECT_API_URL=api)
    assert ran.returncode == 1, ran.stderr
    assert place.statuses() == ["converted", "failed"]
    # The server writes what it was told a moment later.
    wait_for(lambda: all_ended(ask(api, "flow_runs") + ask(api, "task_runs")), seconds=60)
    return place, ran.stdout + ran.stderr


def test_the_flow_says_how_many_were_verified(recorded: tuple[Place, str], api: str) -> None:
    runs = ask(api, "flow_runs")
    assert [(run["state_name"], run["state"]["message"]) for run in runs] == [("Completed", "1 of 2 verified")]


def test_each_model_is_one_task_run_that_fails_if_the_model_does(recorded: tuple[Place, str], api: str) -> None:
    runs = [run for run in ask(api, "task_runs") if run["task_key"].startswith("convert_model")]
    assert states(runs) == {"./good": "Completed", "./broken": "Failed"}
    failed = next(run for run in runs if run["name"] == "./broken")
    assert failed["state"]["message"].startswith("bad_input: ")
    assert "model.safetensors" in failed["state"]["message"]


def test_each_step_is_a_task_run(recorded: tuple[Place, str], api: str) -> None:
    found = states(ask(api, "task_runs"))
    assert {name: state for name, state in found.items() if name.endswith(" ./good")} == {
        f"{step} ./good": "Completed" for step in STEPS
    }


def test_the_step_that_failed_failed_once_and_those_before_it_stand(recorded: tuple[Place, str], api: str) -> None:
    place, _ = recorded
    failed_at = place.report()["models"][1]["error"]["step"]
    runs = {run["name"]: run for run in ask(api, "task_runs") if run["name"].endswith(" ./broken")}
    assert runs[f"{failed_at} ./broken"]["state_name"] == "Failed"
    assert runs[f"{failed_at} ./broken"]["run_count"] == 1
    before = STEPS[: STEPS.index(failed_at)]
    assert states(list(runs.values())) == {f"{failed_at} ./broken": "Failed"} | {
        f"{step} ./broken": "Completed" for step in before
    }


def test_summary_and_progress_are_artifacts(recorded: tuple[Place, str], api: str) -> None:
    artifacts = {artifact["key"]: artifact for artifact in ask(api, "artifacts")}
    assert artifacts["conversion-progress"]["data"] == 100.0
    rows = json.loads(artifacts["conversion-summary"]["data"])
    assert {row["model"]: row["status"] for row in rows} == {"./good": "converted", "./broken": "failed"}


def test_prefects_own_words_are_in_its_log_only(recorded: tuple[Place, str]) -> None:
    place, printed = recorded
    assert_no_noise(printed)
    assert "bad_input" in (place.home / "logs" / "prefect.log").read_text(encoding="utf-8")


def test_a_second_batch_looks_and_starts_nothing(recorded: tuple[Place, str], api: str) -> None:
    place, _ = recorded
    before = [run["id"] for run in ask(api, "flow_runs")]
    ran = place.batch(PREFECT_API_URL=api)
    assert ran.returncode == 1
    assert place.statuses() == ["reused", "failed"]
    assert [run["id"] for run in ask(api, "flow_runs")] == before


FLAKY = """
import json
from onnx_config.errors import ErrorKind, ModelError, TransientError
from tasks import prefect_tasks

calls = {"transient": 0, "model": 0}

def transient():
    calls["transient"] += 1
    if calls["transient"] < 3:
        raise TransientError("away", kind=ErrorKind.NETWORK)

def model():
    calls["model"] += 1
    raise ModelError("cannot", kind=ErrorKind.EXPORT_FAILED)

for function in (transient, model):
    step = prefect_tasks._step(function, f"flaky-{function.__name__}")
    step.with_options(retry_delay_seconds=0.1, retry_jitter_factor=0)(return_state=True)
print(json.dumps(calls))
"""


def test_only_what_may_pass_awaits_a_retry(api: str, place: Place) -> None:
    environment = place.environment(PREFECT_API_URL=api, PREFECT_HOME=str(place.home), DO_NOT_TRACK="1")
    ran = subprocess.run(
        [sys.executable, "-c", FLAKY], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == {"transient": 3, "model": 1}

    def history(name: str) -> list[str]:
        runs = [run for run in ask(api, "task_runs") if run["task_key"].startswith(name)]
        if not runs:
            return []
        query = {"task_run_id": runs[0]["id"]}
        found = httpx.get(f"{api}/task_run_states/", params=query, trust_env=False).raise_for_status().json()
        return [state["name"] for state in sorted(found, key=lambda state: state["timestamp"])]

    # The server writes what it was told a moment later.
    wait_for(lambda: "Completed" in history("transient") and "Failed" in history("model"), seconds=30)
    assert history("transient").count("AwaitingRetry") == 2
    assert "AwaitingRetry" not in history("model")


def test_a_server_that_is_not_there_is_one_paragraph_and_converts_nothing(place: Place) -> None:
    start = time.monotonic()
    ran = place.batch(PREFECT_API_URL=f"http://127.0.0.1:{_free_port()}/api")
    assert time.monotonic() - start < 60
    assert ran.returncode == 1
    assert re.fullmatch(r"Error: The Prefect server at http://127\.0\.0\.1:\d+/api .*--engine local.*\n", ran.stderr)
    assert "Traceback" not in ran.stdout
    assert not list((place.home / "artifacts").glob("**/model.onnx"))
    assert not (place.folder / "report.json").exists()


def assert_no_noise(text: str) -> None:
    for word in ("Traceback", "elemetry", "NoneType: None", " | ERROR ", " | WARNING ", "prefect.", "--- Error"):
        assert word not in text


@pytest.mark.slow
def test_without_a_server_one_is_embedded_and_leaves_no_trace_outside_its_home(place: Place) -> None:
    code, screen = run_in_terminal(place)
    assert code == 1
    assert place.statuses() == ["converted", "failed"]
    assert_no_noise(screen)
    # The last picture of the live area, and the one line above it, are whole.
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in screen.splitlines()]
    assert sum(line.startswith("failed    ./broken  bad_input") for line in lines) == 1
    assert left_running(place) == []
    assert (place.home / "prefect" / "prefect.db").is_file()
    assert not (place.folder / "user" / ".prefect").exists()
    assert recorded_by_the_embedded_server(place) == {
        "./good": "Completed",
        "./broken": "Failed",
        **{f"{step} ./good": "Completed" for step in STEPS},
        "detect ./broken": "Completed",
        f"{place.report()['models'][1]['error']['step']} ./broken": "Failed",
    }


def recorded_by_the_embedded_server(place: Place) -> Mapping[str, str]:
    import sqlite3

    with sqlite3.connect(place.home / "prefect" / "prefect.db") as database:
        rows = database.execute("select name, state_name from task_run").fetchall()
    database.close()
    return dict(rows)


def run_in_terminal(place: Place) -> tuple[int, str]:
    """Run the batch under a terminal of its own; return its exit code and all that appeared there."""
    import pty

    ours, theirs = pty.openpty()
    environment = place.environment(TERM="xterm", COLUMNS="120", LINES="40")
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        place.command(), cwd=place.folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = bytearray()
    with suppress(OSError):
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    return process.wait(), seen.decode(errors="replace")


@pytest.mark.slow
def test_a_server_that_dies_in_mid_batch_costs_its_record_alone(models: Path, tmp_path: Path) -> None:
    place = make_place(models, tmp_path / "place", "good", "broken")
    process = place.start()
    exporting(place, process)
    for server in servers_of(process):
        server.kill()
    killed = time.monotonic()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert place.statuses() == ["converted", "failed"]
    assert place.report()["models"][1]["error"]["kind"] == "bad_input"
    assert "2 models in" in out
    assert re.search(r"^Note: Prefect's embedded server went away .*prefect\.log\.$", err, re.MULTILINE), err
    assert_no_noise(out + err.replace("prefect.log", ""))
    # The export and the parity that were left take some seconds of it, Prefect's patience the rest.
    assert time.monotonic() - killed < 60
    assert left_running(place) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_an_interruption_ends_everything_at_once(place: Place, number: int, code: int) -> None:
    process = place.start()
    exporting(place, process)
    sent = time.monotonic()
    # To the whole group, as a terminal does; the embedded server is not in it.
    os.killpg(process.pid, number)
    _out, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 20
    assert process.returncode == code
    assert_no_noise(err)
    assert left_running(place) == []
    assert not list((place.home / "artifacts").glob("**/model.onnx"))


@pytest.mark.slow
def test_a_batch_that_is_killed_takes_its_server_with_it(place: Place) -> None:
    process = place.start()
    wait_for(lambda: servers_of(process), process=process)
    process.kill()
    process.communicate()
    assert left_running(place, seconds=30) == []
