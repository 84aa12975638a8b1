"""A Hub that is asked too often: how long it is left alone, and by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onnx_config.hub_limits import LONGEST_WAIT_SECONDS, asked_to_wait_seconds

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
PAUSE = 2
LOOK_UP = """
import json, sys, time
from pathlib import Path
from tasks.lookup import look_up, Lookup
from tests.faults.harness import request, workspace
started = time.monotonic()
found = look_up([request(f"org/m{n}") for n in range(int(sys.argv[2]))], workspace(Path(sys.argv[1])))
kinds = [f.source.revision if isinstance(f, Lookup) else f.kind.value for f in found.values()]
print(json.dumps([kinds, time.monotonic() - started]))
"""


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        pytest.param({"Retry-After": "120"}, 120, id="seconds"),
        pytest.param({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55,
            id="as-the-hub-says-it"),
        pytest.param({"Retry-After": "3", "RateLimit": '"api";r=0;t=55'}, 3, id="both"),
        pytest.param({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, id="a-date-that-is-past"),
        pytest.param({"Retry-After": "soon"}, None, id="nonsense"),
        pytest.param({"RateLimit": "api"}, None, id="no-time"),
        pytest.param({}, None, id="nothing"),
    ],
)  # fmt: skip
def test_how_long_a_refusal_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_to_wait_seconds(headers) == seconds


def test_a_date_is_counted_from_now() -> None:
    told = asked_to_wait_seconds({"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=90))})
    assert told is not None
    assert 85 < told <= 90


class BusyHub(BaseHTTPRequestHandler):
    """Refuses everything for a while after so many answers."""

    answers_before = 6
    pause_seconds = PAUSE
    seen: list[tuple[float, bool]] = []  # noqa: RUF012 - a class of its own for each test
    lock = threading.Lock()

    def do_GET(self) -> None:
        with self.lock:
            answered = sum(good for _, good in self.seen)
            refusals = [when for when, good in self.seen if not good]
            refused = answered == self.answers_before and (
                not refusals or time.monotonic() < refusals[0] + self.pause_seconds
            )
            self.seen.append((time.monotonic(), not refused))
        body = b"{}" if refused else json.dumps({"id": "org/m", "sha": SHA}).encode()
        self.send_response(429 if refused else 200)
        if refused:
            self.send_header("Retry-After", str(self.pause_seconds))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None: ...


@pytest.fixture
def busy() -> Iterator[tuple[type[BusyHub], str]]:
    own = type("OwnHub", (BusyHub,), {"seen": [], "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield own, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def look_up(endpoint: str, home: Path, count: int) -> tuple[list[str], float]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP, str(home), str(count)],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kinds, seconds = json.loads(done.stdout)
    return kinds, seconds


def test_a_batch_that_asks_too_often_waits_as_long_as_it_is_told_and_finds_every_model(busy, tmp_path: Path) -> None:
    hub, endpoint = busy
    kinds, seconds = look_up(endpoint, tmp_path, 40)
    assert kinds == [SHA] * 40
    assert PAUSE <= seconds < PAUSE + 10
    refusals = [when for when, good in hub.seen if not good]
    # Those of the eight who were on their way when the first was refused; after that nobody before the time was up.
    assert 1 <= len(refusals) <= 8
    assert len([when for when, _ in hub.seen if refusals[0] <= when < refusals[0] + PAUSE - 0.2]) <= 8


def test_a_hub_that_asks_for_too_long_a_wait_is_a_network_error(busy, tmp_path: Path) -> None:
    hub, endpoint = busy
    hub.answers_before, hub.pause_seconds = 0, int(LONGEST_WAIT_SECONDS) + 1
    kinds, seconds = look_up(endpoint, tmp_path, 1)
    assert kinds == ["network"]
    assert seconds < 30
