"""``ferry doctor``: what it finds, and that it never shows a secret or changes anything."""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from flows import doctor
from flows.doctor import Check, Findings, Health, examine
from flows.settings import Settings, load_settings

TESTED = {
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "onnx": "1.23.2",
    "onnxscript": "0.7.2",
    "onnxruntime": "1.32.0",
    "onnxsim": "0.8.1",
    "prefect": "3.8.8",
    "sqlalchemy": "2.0.58",
    "fastapi": "0.150.0",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FERRY_HOME", "PREFECT_API_URL", "PREFECT_API_KEY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    # What ONNX Runtime and the driver say is the machine's; each test that cares sets it.
    monkeypatch.setitem(
        sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    )
    monkeypatch.setattr(doctor, "_cuda_devices", lambda: 0)
    return tmp_path


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keyed = self.headers.get("Authorization") == "Bearer pnu_key"
            self.send_response({"/api/health": 200, "/cloud/health": 200 if keyed else 401}.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("package", "number", "health", "words"),
    [
        pytest.param("torch", "2.13.0+cu130", Health.OK, "2.13.0", id="tested-with-a-local-part"),
        pytest.param("torch", "2.15.0", Health.WARNING, "outside torch>=2.11,<2.14", id="untested-torch"),
        pytest.param("torch", None, Health.PROBLEM, "not installed", id="no-torch"),
        pytest.param("fastapi", "0.150.9", Health.OK, "0.150.9", id="last-fastapi-that-works"),
        pytest.param("fastapi", "0.151.0", Health.PROBLEM, "outside", id="fastapi-breaks-prefect"),
        pytest.param("sqlalchemy", "2.0.99", Health.OK, "2.0.99", id="sqlalchemy-2.0"),
        pytest.param("sqlalchemy", "2.1.0", Health.PROBLEM, "outside", id="sqlalchemy-breaks-schedules"),
        pytest.param("prefect", "3.9.1", Health.PROBLEM, "outside", id="prefect-untested"),
        pytest.param("transformers", "4.57.0", Health.PROBLEM, "outside", id="transformers-without-exporter"),
        pytest.param("onnx", "banana", Health.WARNING, "not a version number", id="no-number"),
    ],
)
def test_versions(package: str, number: str | None, health: Health, words: str) -> None:
    checks = {check.name: check for check in doctor.check_versions(TESTED | {package: number})}
    assert checks[package].health is health
    assert words in checks[package].found
    assert (checks[package].fix is None) is (health is Health.OK)
    assert {check.health for name, check in checks.items() if name != package} == {Health.OK}


@pytest.mark.parametrize(
    ("package", "words"),
    [("fastapi", "fastapi>=0.100,<0.151.*embedded server"), ("sqlalchemy", "<2.1.*never schedules")],
)
def test_the_traps_of_prefect_say_what_to_install(package: str, words: str) -> None:
    (check,) = doctor.check_versions({package: "99"})
    assert check.fix is not None
    assert re.search(words, check.fix)


@pytest.mark.parametrize(
    ("devices", "providers", "health", "words"),
    [
        pytest.param(0, ["CPUExecutionProvider"], Health.OK, "parity runs on the CPU", id="no-device"),
        pytest.param(2, ["CUDAExecutionProvider"], Health.OK, "2 CUDA devices", id="device-and-provider"),
        pytest.param(1, ["CPUExecutionProvider"], Health.WARNING, "1 CUDA device", id="device-without-provider"),
    ],
)
def test_providers(
    monkeypatch: pytest.MonkeyPatch, devices: int, providers: list[str], health: Health, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: providers))
    monkeypatch.setattr(doctor, "_cuda_devices", lambda: devices)
    check = doctor.check_providers()
    assert (check.health, words in check.found) == (health, True)
    assert ("onnxruntime-gpu" in str(check.fix)) is (health is Health.WARNING)


def test_nothing_is_created(folder: Path, settings: Settings) -> None:
    findings = examine(settings)
    assert not list(folder.iterdir())
    found = {check.name: check for check in findings.checks}
    assert "can be created" in found["home"].found
    assert "the first conversion creates it" in found["catalog"].found
    assert found["home"].health is found["catalog"].health is found["store"].health is Health.OK


def test_places_that_cannot_be_written_are_problems(folder: Path) -> None:
    (folder / "file").touch()
    settings = load_settings(home="file/home", store_url="odd://bucket/x")
    assert doctor.check_home(settings).health is Health.PROBLEM
    assert "FERRY_HOME" in str(doctor.check_home(settings).fix)
    assert doctor.check_store(settings).health is Health.PROBLEM
    assert "needs a package of its own" in doctor.check_store(settings).found


def test_the_catalog_tells_its_schema(settings: Settings) -> None:
    from db.engine import make_engine
    from db.migrate import HEAD, upgrade

    engine = make_engine(settings.catalog_url)
    upgrade(engine)
    engine.dispose()
    check = doctor.check_catalog(settings)
    assert (check.health, check.found.endswith(f"schema {HEAD}, current")) == (Health.OK, True)


def test_a_catalog_of_a_newer_version_is_a_problem(settings: Settings) -> None:
    from sqlalchemy import text

    from db.engine import make_engine
    from db.migrate import upgrade

    engine = make_engine(settings.catalog_url)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    check = doctor.check_catalog(settings)
    assert (check.health, "9999" in check.found) == (Health.PROBLEM, True)
    assert "upgrade onnx-ferry" in str(check.fix)


def test_a_broken_catalog_is_a_problem(folder: Path) -> None:
    (folder / "notes.txt").write_text("no database " * 200)
    check = doctor.check_catalog(load_settings(catalog_url=f"sqlite:///{folder / 'notes.txt'}"))
    assert check.health is Health.PROBLEM


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_hunter2")
    monkeypatch.setenv("PREFECT_API_URL", "http://user:hunter2@127.0.0.1:1/api")
    settings = load_settings(catalog_url="nodriver://ferry:hunter2@127.0.0.1:1/ferry", store_url="s3://a:hunter2@b")
    findings = examine(settings)
    console = Console(record=True, width=400, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    doctor.print_findings(console, findings)
    console.file.close()
    said = console.export_text() + json.dumps(findings.to_json())
    assert "hunter2" not in said
    assert "a token is set" in said
    assert {check.name for check in findings.checks if check.health is Health.PROBLEM} >= {
        "catalog",
        "store",
        "prefect server",
    }


@pytest.mark.parametrize(
    ("path", "key", "health", "words"),
    [
        pytest.param("/api", None, Health.OK, "answers", id="answers"),
        pytest.param("/api/", None, Health.OK, "answers", id="slash-at-the-end"),
        pytest.param("", None, Health.WARNING, "answers 404", id="without-api"),
        pytest.param("/cloud", None, Health.PROBLEM, "answers 401", id="no-key"),
        pytest.param("/cloud", "pnu_key", Health.OK, "answers", id="key"),
    ],
)
def test_a_prefect_server(
    monkeypatch: pytest.MonkeyPatch,
    server: http.server.HTTPServer,
    *,
    path: str,
    key: str | None,
    health: Health,
    words: str,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}{path}")
    if key:
        monkeypatch.setenv("PREFECT_API_KEY", key)
    check = doctor.check_prefect()
    assert (check.health, words in check.found) == (health, True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/api", "nonsense", "http://[bad/api"])
def test_a_prefect_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    check = doctor.check_prefect()
    assert (check.health, "does not answer" in check.found) == (Health.PROBLEM, True)
    assert "--engine local" in str(check.fix)


def test_without_a_server_the_embedded_one_is_used() -> None:
    assert doctor.check_prefect().health is Health.OK
    assert "embedded" in doctor.check_prefect().found


def test_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check = doctor.check_hub()
    assert (check.health, check.found) == (Health.WARNING, "HF_HUB_OFFLINE is set; no token: public models only")


def test_a_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRY_TIEMOUT", "3")
    check = doctor.check_environment()
    assert check.health is Health.WARNING
    assert "FERRY_TIEMOUT is FERRY_TIMEOUT?" in str(check.fix)


@pytest.mark.parametrize(("limit", "health"), [("1", "warning"), ("3GiB", "ok"), ("99TiB", "warning")])
def test_the_memory_limit_fits_the_machine(monkeypatch: pytest.MonkeyPatch, limit: str, health: str) -> None:
    monkeypatch.setattr(doctor, "machine_memory_bytes", lambda: 4 * 2**30)
    assert doctor.check_memory(load_settings(memory_limit=limit)).health == health


def test_little_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert doctor.check_disk(settings).health is Health.WARNING


def test_a_broken_library_hides_nothing_else(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    def fail() -> None:
        raise RuntimeError("libcudart.so.13: cannot open")

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=fail))
    findings = examine(settings)
    found = {check.name: check for check in findings.checks}
    assert found["onnxruntime providers"].health is Health.PROBLEM
    assert "libcudart.so.13" in found["onnxruntime providers"].found
    assert found["hugging face"].health is Health.OK
    assert not findings.healthy


@pytest.mark.parametrize(("health", "healthy"), [(Health.OK, True), (Health.WARNING, True), (Health.PROBLEM, False)])
def test_only_problems_are_unhealthy(health: Health, healthy: bool) -> None:
    findings = Findings(versions={}, checks=(Check(name="x", health=health, found="y"),))
    assert findings.healthy is healthy
    assert findings.to_json()["checks"] == [{"name": "x", "health": health.value, "found": "y", "fix": None}]


def test_packages_are_not_imported(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    for name in ("torch", "transformers", "prefect"):
        monkeypatch.setitem(sys.modules, name, _Explosive(name))
    assert all(check.health is not Health.PROBLEM for check in examine(settings).checks)


class _Explosive(ModuleType):
    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{self.__name__}.{name} was used")
