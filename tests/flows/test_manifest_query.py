"""Queries in a manifest: what is asked of the Hub, what becomes of the answer, and what a mistake says."""

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
from urllib.parse import parse_qs, urlsplit

import pytest

from flows.manifest import read_manifest
from onnx_config.errors import InputError

ROOT = Path(__file__).parents[2]
PAGE = 3
READ = """
import json, sys, time
time.sleep = lambda seconds: None
from pathlib import Path
from flows.manifest import read_manifest
from onnx_config.errors import FerryError
try:
    found = read_manifest(Path(sys.argv[1]))
    print(json.dumps([[r.model_id, r.options.opset] for r in found]))
except FerryError as error:
    print(json.dumps({"kind": error.kind.value, "message": error.message}))
"""


class ListingHub(BaseHTTPRequestHandler):
    """Lists ten models of ``org``, three to a page; none of others, and breaks for ``broken``."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012 - a class of its own for each test

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        self.asked.append({"path": url.path, **query})
        author = query.get("author", [""])[0]
        start = int(query.get("cursor", ["0"])[0])
        names = [f"org/m{n}" for n in range(10)] if author == "org" else []
        body = json.dumps([{"id": name, "modelId": name} for name in names[start : start + PAGE]]).encode()
        status = {"broken": 503, "secret": 401}.get(author, 200)
        body = body if status == 200 else b"{}"
        self.send_response(status)
        if start + PAGE < len(names):
            link = f"http://{self.headers['Host']}{url.path}?author={author}&cursor={start + PAGE}"
            self.send_header("Link", f'<{link}>; rel="next"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[tuple[type[ListingHub], str]]:
    own = type("OwnHub", (ListingHub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield own, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def read(text: str, folder: Path, endpoint: str) -> Any:
    path = folder / "models.yaml"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_what_a_query_finds_is_converted_after_what_is_listed_and_once(hub, tmp_path: Path) -> None:
    own, endpoint = hub
    text = """
    defaults: {opset: 18}
    models: [org/m1, other/x]
    query:
      - {author: org, task: text-classification, tag: en, sort: likes, limit: 5}
      - {author: org, limit: 2}
    """
    found = read(text, tmp_path, endpoint)
    assert found == [[name, 18] for name in ("org/m1", "other/x", "org/m0", "org/m2", "org/m3", "org/m4")]
    first = own.asked[0]
    assert first == {
        "path": "/api/models",
        "author": ["org"],
        "pipeline_tag": ["text-classification"],
        "filter": ["transformers", "safetensors", "en"],
        "sort": ["likes"],
        "limit": ["5"],
    }
    assert len(own.asked) == 3, "two pages for five models, one for two"


def test_a_manifest_may_be_a_query_alone(hub, tmp_path: Path) -> None:
    _, endpoint = hub
    assert len(read("query: {author: org, limit: 200}", tmp_path, endpoint)) == 10


@pytest.mark.parametrize(
    ("author", "kind", "words"),
    [
        pytest.param("nobody", "bad_input", "line 2: the query finds no models with safetensors", id="nothing"),
        pytest.param("broken", "network", "line 2: The Hub answered HTTP 503", id="broken"),
        pytest.param("secret", "not_found", "line 2: .*HTTP 401.*HF_TOKEN", id="refused"),
    ],
)
def test_what_the_hub_does_not_answer_is_said_with_the_line(
    hub, tmp_path: Path, author: str, kind: str, words: str
) -> None:
    _, endpoint = hub
    found = read(f"models: [org/a]\nquery: {{author: {author}, limit: 5}}", tmp_path, endpoint)
    assert found["kind"] == kind
    with pytest.raises(InputError, match=words):
        raise InputError(found["message"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("query:\n  autor: org\n  limit: 5", "line 2: unknown key 'autor'.*'author'", id="unknown-key"),
        pytest.param("query:\n  author: org", "line 2: the key 'limit' of 'query' is missing", id="no-limit"),
        pytest.param("query:\n  limit: many", "line 2: 'limit' is 'many': it takes a whole number", id="limit"),
        pytest.param("query:\n  limit: 20000", "line 2: .*from 1 to 10000", id="limit-too-large"),
        pytest.param("query:\n  limit: 5\n  sort: download", "line 3: .*did you mean 'downloads'", id="sort"),
        pytest.param("query:\n  limit: 5\n  author: 3", "line 3: 'author' is 3: it takes a word", id="author"),
        pytest.param("query: org", "line 1: 'query' is the text 'org'", id="no-keys"),
        pytest.param("query: []", "lists no models", id="none"),
        pytest.param("models: []\nquery: {limit: 5}", "line 1: 'models' lists no models", id="no-models"),
    ],
)
def test_a_mistake_is_named_with_its_line_before_the_hub_is_asked(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_manifest(path)


def test_a_deployment_file_does_not_ask_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("query: {author: org, limit: 5}", encoding="utf-8")
    assert read_manifest(path, ask=False) == ()
