"""A Hub on loopback that breaks off a download, or moves its branch while a model is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.faults.harness import ROOT

OLD, NEW = "1" * 40, "2" * 40
CONFIG = b'{"model_type": "bert"}'
# More than one piece of a download.
WEIGHTS = {OLD: os.urandom(3 << 20), NEW: os.urandom(3 << 20)}

# Runs where the Hub's address is read, which is at import; moves the branch between the look and the download.
FETCH = """
import hashlib, json, sys, urllib.request
from onnx_config import hub
from onnx_config.errors import FerryError
from tasks import retry
retry.RETRY_WAIT_SECONDS = 0.05
from tasks.lookup import resolve
from tasks.request import ConversionRequest
endpoint, move = sys.argv[1], sys.argv[2] == "move"
source = resolve(ConversionRequest(model_id="org/m")).source
if move:
    urllib.request.urlopen(endpoint + "/move").read()
try:
    folder = retry.with_retries(hub.download)(source)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(json.dumps([source.revision, weights, hub.resolve("org/m").revision]))
except FerryError as error:
    print(json.dumps([error.kind.value, error.message]))
"""


class Hub(BaseHTTPRequestHandler):
    """Has one repository of two commits; the first downloads of its weights end in the middle."""

    main = OLD
    cuts = 0

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path == "/move":
            type(self).main = NEW
            self._answer(b"moved")
            return
        commit = next((sha for sha in (OLD, NEW) if sha in path), type(self).main)
        if "/tree/" in path:
            sizes = {"config.json": len(CONFIG), "model.safetensors": len(WEIGHTS[commit])}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self._answer(json.dumps(tree).encode())
            return
        if "/api/" in path:
            files = [{"rfilename": name, "size": 1} for name in ("config.json", "model.safetensors")]
            self._answer(json.dumps({"id": "org/m", "sha": commit, "siblings": files}).encode())
            return
        body = CONFIG if path.endswith("config.json") else WEIGHTS[commit]
        headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith((".json", ".safetensors")):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self._answer(body, start=start, cut=path.endswith(".safetensors"), **headers)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def _answer(self, body: bytes, *, start: int = 0, cut: bool = False, **headers: str) -> None:
        piece = body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        if self.command != "GET":
            return
        if cut and type(self).cuts:
            type(self).cuts -= 1
            self.wfile.write(piece[: len(piece) // 2])
            self.close_connection = True
            return
        self.wfile.write(piece)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served() -> Iterator[tuple[type[Hub], str]]:
    own = type("OwnHub", (Hub,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield own, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(endpoint: str, home: Path, *, move: bool = False) -> list[Any]:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, endpoint, "move" if move else "stay"],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_download_that_is_cut_goes_on_and_is_whole(served, tmp_path, cuts):
    hub, endpoint = served
    hub.cuts = cuts
    assert fetch(endpoint, tmp_path) == [OLD, sha256(WEIGHTS[OLD]).hexdigest(), OLD]
    assert hub.cuts == 0


def test_a_branch_that_moves_meanwhile_changes_no_model(served, tmp_path):
    """What was looked up is what is fetched and what its artifact is known by; the next run sees the new commit."""
    _, endpoint = served
    assert fetch(endpoint, tmp_path, move=True) == [OLD, sha256(WEIGHTS[OLD]).hexdigest(), NEW]
    assert fetch(endpoint, tmp_path)[:2] == [NEW, sha256(WEIGHTS[NEW]).hexdigest()]
