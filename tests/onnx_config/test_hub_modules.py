"""Repositories of sentence-transformers: the modules' files are fetched, and of a repository to detect only configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
MODULES = [
    {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
FILES = {
    "modules.json": json.dumps(MODULES),
    "0_Transformer/config.json": json.dumps({"model_type": "bert", "hidden_size": 48}),
    "0_Transformer/sentence_bert_config.json": "{}",
    "0_Transformer/model.safetensors": "weights",
    "0_Transformer/pytorch_model.bin": "pickled",
    "0_Transformer/vocab.txt": "a",
    "1_Pooling/config.json": "{}",
    "README.md": "words",
    "onnx/config.json": "{}",
    "0_Transformer/onnx/model.safetensors": "another format",
}
CONFIGS = {
    "modules.json",
    "0_Transformer/config.json",
    "0_Transformer/sentence_bert_config.json",
    "1_Pooling/config.json",
}

# Runs where the Hub's address is read, which is at import.
CLIENT = """
import json, sys
from onnx_config import hub
def held(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
folder = hub.fetch_config("org/st")
first = held(folder)
size = hub.read_config("org/st").hidden_size
print(json.dumps([first, held(hub.download(hub.resolve("org/st"))), size]))
"""


class FakeHub(BaseHTTPRequestHandler):
    """Holds one repository."""

    def do_GET(self) -> None:
        path = self.path.split("?", maxsplit=1)[0]
        if "/api/" in path:
            siblings = [{"rfilename": name} for name in FILES]
            tree = [{"type": "file", "path": name, "oid": "1" * 40, "size": len(text)} for name, text in FILES.items()]
            self.answer(
                200, json.dumps(tree if "/tree/" in path else {"id": "org/st", "sha": SHA, "siblings": siblings})
            )
            return
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name in FILES:
            self.answer(200, FILES[name], ETag=f'"{abs(hash(name)):x}"', **{"X-Repo-Commit": SHA})
        else:
            self.answer(404, "{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def answer(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cache: Path = tmp_path_factory.mktemp("huggingface")
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_to_detect_only_the_configs_are_fetched(fetched: list[Any]) -> None:
    assert set(fetched[0]) == CONFIGS


def test_to_convert_all_that_the_modules_need_is_fetched(fetched: list[Any]) -> None:
    assert set(fetched[1]) == CONFIGS | {"0_Transformer/model.safetensors", "0_Transformer/vocab.txt"}


def test_the_config_is_the_transformers(fetched: list[Any]) -> None:
    assert fetched[2] == 48
