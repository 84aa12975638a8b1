"""What is handed on, and what is never: folders, and a repository of a Hub on loopback that takes commits."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from onnx_config.errors import InputError
from tasks.pipeline import convert_model
from tasks.publish import publish_to_folder
from tests.faults.harness import assert_whole, request, tiny, workspace
from tests.tasks.test_pipeline import Files

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    entry = convert_model(request(tiny(root / "model")), workspace(root / "home"), steps=Files().steps)
    assert entry.artifact is not None
    return Path(entry.artifact)


@pytest.fixture
def artifact(stored: Path, tmp_path: Path) -> Path:
    """Return an artifact of which a test may spoil something."""
    return Path(shutil.copytree(stored, tmp_path / stored.name))


def test_a_verified_artifact_is_whole_in_its_new_folder(artifact: Path, tmp_path: Path) -> None:
    done = publish_to_folder(artifact, tmp_path / "out" / "mine")
    assert done.artifact == artifact.name
    assert_whole(tmp_path / "out" / "mine")
    assert publish_to_folder(artifact, tmp_path / "out" / "mine") == done, "again: nothing to do"


def test_a_folder_with_files_of_others_is_left_alone(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="no artifact of onnx-ferry; they would be mixed"):
        publish_to_folder(artifact, tmp_path / "mine")


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        record = json.loads((folder / "ferry.json").read_text(encoding="utf-8"))
        edit(record)
        (folder / "ferry.json").write_text(json.dumps(record), encoding="utf-8")

    changed.__name__ = name
    return changed


def append(name: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("x")

    return changed


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(append("model.onnx"), "model.onnx is missing, changed or new", id="graph-changed"),
        pytest.param(append("config.json"), "config.json is missing, changed or new", id="config-changed"),
        pytest.param(append("extra.bin"), "extra.bin is missing, changed or new", id="file-added"),
        pytest.param(lambda folder: (folder / "model.onnx").unlink(), "model.onnx is missing", id="graph-gone"),
        pytest.param(lambda folder: (folder / "ferry.json").unlink(), "has no ferry.json", id="no-record"),
        pytest.param(change("m", lambda r: r["model"].update(status="mismatch")), "status mismatch", id="status"),
        pytest.param(change("p", lambda r: r["model"].update(parity=None)), "parity not_run", id="no-parity"),
        pytest.param(change("v", lambda r: r["model"]["parity"].update(verdict="unstable")), "unstable", id="verdict"),
        pytest.param(change("x", lambda r: r["model"].update(status="fine")), "cannot be read", id="unreadable"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_verified_is_never_handed_on(
    artifact: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(artifact)
    with pytest.raises(InputError, match=words):
        publish_to_folder(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class WritableHub(BaseHTTPRequestHandler):
    """Takes repositories, branches and commits; refuses everything where it is told to."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012 - a class of its own for each test
    refuse = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        host = f"http://{self.headers['Host']}"
        path = self.path.partition("?")[0]
        if self.refuse:
            self.answer(self.refuse, {"error": "no"})
        elif path.endswith("/repos/create"):
            self.calls.append((path, json.loads(body)))
            self.answer(200, {"url": f"{host}/org/mine"})
        elif "/branch/" in path:
            self.calls.append((path, None))
            self.answer(200, {})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in path:
            self.calls.append((path, [json.loads(line) for line in body.splitlines()]))
            self.answer(200, {"commitUrl": f"{host}/org/mine/commit/{SHA}", "commitOid": SHA, "success": True})
        else:
            self.answer(404, {})

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[tuple[type[WritableHub], str]]:
    own = type("OwnHub", (WritableHub,), {"calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield own, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def publish(artifact: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.entry", "publish", str(artifact), *words],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_repository_gets_the_graphs_under_onnx_in_one_commit(hub, artifact: Path) -> None:
    own, endpoint = hub
    done = publish(artifact, endpoint, "--to", "hub:org/mine", "--private", "--branch", "onnx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["where"] == f"{endpoint}/org/mine/commit/{SHA}"
    (_, made), (branch, _), (path, lines) = own.calls
    assert (made["name"], made["organization"]) == ("mine", "org")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert branch.endswith("/org/mine/branch/onnx")
    assert path.endswith("/org/mine/commit/onnx")
    written = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
    assert {"onnx/model.onnx", "config.json"} <= written.keys()
    assert not [name for name in written if name.endswith((".onnx", "ferry.json")) and not name.startswith("onnx/")]
    for name, value in written.items():
        assert base64.b64decode(value["content"]) == (artifact / name.removeprefix("onnx/")).read_bytes()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        pytest.param(401, 2, r"HF_TOKEN", id="no-token"),
        pytest.param(500, 1, r"HTTP 500", id="broken"),
    ],
)
def test_what_the_hub_refuses_is_said(hub, artifact: Path, status: int, code: int, words: str) -> None:
    own, endpoint = hub
    own.refuse = status
    done = publish(artifact, endpoint, "--to", "hub:org/mine")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_x" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["--to", "git:mine"], "no place of the kind 'git'. Write hub:org/name", id="kind"),
        pytest.param(["--to", "out", "--private"], "are of the Hub", id="folder-with-branch"),
        pytest.param(["--to", "mlflow:mine", "--branch", "x"], "and nor has MLflow", id="mlflow-with-branch"),
        pytest.param(["--to", "mlflow://host/mine"], "is no name of a registered model", id="mlflow-with-host"),
    ],
)  # fmt: skip
def test_a_call_that_is_wrong_hands_nothing_on(artifact: Path, words: list[str], said: str) -> None:
    done = publish(artifact, "http://127.0.0.1:9", *words)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
