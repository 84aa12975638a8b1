"""Versions of a registered model on MLflow's own server: what they say, that there is one of each, and never half."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from onnx_config.errors import InputError, TransientError
from tasks.pipeline import convert_model
from tasks.publish import publish_to_mlflow
from tests.faults.harness import assert_whole, request, tiny, workspace
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.tasks.test_pipeline import Files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def artifact(home: Path) -> Path:
    entry = convert_model(request(tiny(home / "model")), workspace(home / "home"), steps=Files().steps)
    assert entry.artifact is not None
    return Path(entry.artifact)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture(autouse=True)
def _named(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.url)


def publish(artifact: Path, home: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.entry", "publish", str(artifact), *words],
        env={**os.environ, "FERRY_HOME": str(home / "home"), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name='{name}'"))


def runs(client: Any, name: str) -> list[Any]:
    experiment = client.get_experiment_by_name("onnx-ferry")
    return list(client.search_runs([experiment.experiment_id], f"tags.`onnx_ferry.model` = '{name}'"))


def test_a_version_has_the_files_and_says_what_they_are(
    client: Any, artifact: Path, home: Path, tmp_path: Path
) -> None:
    done = publish(artifact, home, "--to", "mlflow:classifier", "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    answer = json.loads(out)
    assert answer["where"] == "models:/classifier/1"
    (version,) = versions(client, "classifier")
    record = json.loads((artifact / "ferry.json").read_text())
    entry = record["model"]
    told = {name.removeprefix("onnx_ferry."): value for name, value in version.tags.items()}
    assert told["artifact"] == answer["artifact"] == artifact.name
    assert told["class"] == entry["architecture"]
    assert (told["source"], told["revision"], told["task"]) == (entry["id"], entry["revision"], entry["task"])
    assert told["verdict"] == "verified"
    assert (
        told["sha256.model.onnx"] == json.loads((artifact / "ferry.json").read_text())["files"]["model.onnx"]["sha256"]
    )
    assert len(told["key"]) == 64, "the catalog knows it"
    assert version.status == "READY"
    assert client.get_run(version.run_id).info.status == "FINISHED"

    from mlflow.artifacts import download_artifacts

    there = Path(download_artifacts(f"models:/classifier/{version.version}", dst_path=str(tmp_path / "there")))
    assert_whole(there)
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in artifact.iterdir()}


def test_the_same_artifact_is_one_version_and_another_a_second(client: Any, artifact: Path, home: Path) -> None:
    first = publish_to_mlflow(artifact, "twice")
    assert publish_to_mlflow(artifact, "twice") == first
    assert len(versions(client, "twice")) == len(runs(client, "twice")) == 1
    entry = convert_model(request(tiny(home / "other", seed=2)), workspace(home / "home"), steps=Files().steps)
    assert publish_to_mlflow(Path(str(entry.artifact)), "twice").where == "models:/twice/2"


def test_two_at_once_make_one_version(client: Any, artifact: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: publish_to_mlflow(artifact, "race").where, range(2)))
    (version,) = versions(client, "race")
    assert both == [f"models:/race/{version.version}"] * 2


def test_who_is_killed_in_the_middle_leaves_nothing_that_looks_done(
    client: Any, server: MlflowServer, artifact: Path, home: Path
) -> None:
    with server.fault("stall", "model.onnx") as seen:
        killed = publish(artifact, home, "--to", "mlflow:killed")
        deadline = time.monotonic() + 60
        while not seen.exists():
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert versions(client, "killed") == []
    assert [run.info.status for run in runs(client, "killed")] == ["RUNNING"]

    assert publish_to_mlflow(artifact, "killed").where == "models:/killed/1"
    assert [run.info.status for run in runs(client, "killed")] == ["FINISHED"], "the same run, gone on with"


def test_a_file_that_the_server_refuses_makes_no_version(client: Any, server: MlflowServer, artifact: Path) -> None:
    with server.fault("refuse", "config.json"), pytest.raises(TransientError, match="No version was made"):
        publish_to_mlflow(artifact, "refused")
    assert versions(client, "refused") == []
    assert [run.info.status for run in runs(client, "refused")] == ["FAILED"]


def test_what_is_not_verified_never_reaches_the_server(client: Any, artifact: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(artifact, tmp_path / "spoilt"))
    (spoilt / "model.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="not as it was verified"):
        publish_to_mlflow(spoilt, "spoilt")
    assert runs(client, "spoilt") == []


@pytest.mark.parametrize(
    ("uri", "words", "kind"),
    [
        pytest.param("", "No MLflow server is named", InputError, id="unnamed"),
        pytest.param("http://me:secret@127.0.0.1:9", "does not answer", TransientError, id="away"),
    ],
)
def test_a_server_that_is_not_there_is_said(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, uri: str, words: str, kind: type[Exception]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(kind, match=words) as raised:
        publish_to_mlflow(artifact, "nowhere")
    assert "secret" not in str(raised.value)
