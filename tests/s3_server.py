"""An S3 server on loopback, moto's, in a process of its own that can be killed; what it holds is gone with it.

Between the server and its callers stands a small relay, which stays when the server goes: it can refuse, cut
connections in the middle of an upload, and count what is asked.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["KEY", "SECRET", "S3Server"]

KEY, SECRET = "AKIAFERRYTESTS", "s3cret-of-the-tests"
_START_SECONDS = 60.0
_BODY_BYTES = 1 << 16


class S3Server:
    """A server and the relay before it; ``with`` starts and ends both."""

    def __init__(self, *, checks_keys: bool = False) -> None:
        self._checks_keys = checks_keys
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self.before: Callable[[str, str], str] = lambda _method, _path: "pass"
        """Called with each request's method and path; says ``pass``, ``refuse`` (503), ``cut`` or ``half``."""
        self.asked: Counter[str] = Counter()
        """Requests by method; of uploads by ``PUT part`` and ``PUT``."""
        server = self

        class Relay(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                server._relay(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815 - the names that http.server asks for

            def log_message(self, *_: object) -> None:
                pass

        self._front = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
        self._front.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._front.server_address[1]}"
        """Where callers find it."""

    def __enter__(self) -> S3Server:
        threading.Thread(target=self._front.serve_forever, daemon=True).start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._front.shutdown()
        self._front.server_close()

    def variables(self, **changes: str) -> dict[str, str]:
        """Return the environment under which the store's library finds the server."""
        own = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        return {**own, "AWS_DEFAULT_REGION": "us-east-1", **changes}

    def start(self) -> None:
        """Start the server, empty, and wait until it answers."""
        words = ["-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(self._port)]
        variables = {"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if self._checks_keys else {}
        self._process = subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self._port), 1):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("moto's server did not start") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """End the server as a machine does that loses its power; the relay refuses until `start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self, name: str) -> None:
        """Add a bucket."""
        assert self.call("PUT", f"/{name}") == 200

    def call(self, method: str, path: str, body: bytes = b"") -> int:
        """Ask the server itself, past the relay; return the status."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            # Moto tells by this which of AWS's services is meant.
            name = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"
            connection.request(method, path, body=body, headers={"Authorization": name})
            return connection.getresponse().status
        finally:
            connection.close()

    def _relay(self, caller: BaseHTTPRequestHandler) -> None:
        method, path = caller.command, caller.path
        kind = f"{method} part" if "partNumber=" in path else method
        what = self.before(method, path)
        body = self._body(caller, what)
        if what in ("cut", "half"):
            caller.close_connection = True
            return
        if what == "refuse":
            caller.close_connection = True
            caller.send_response(503)
            caller.send_header("Content-Length", "0")
            caller.end_headers()
            return
        self.asked[kind] += 1
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            headers = {name: value for name, value in caller.headers.items() if name.lower() != "expect"}
            # The body was read whole, whatever way it came in.
            headers["Content-Length"] = str(len(body))
            headers.pop("Transfer-Encoding", None)
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            caller.close_connection = True
            return
        finally:
            connection.close()
        caller.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                caller.send_header(name, value)
        length = answer.getheader("Content-Length") if method == "HEAD" else str(len(content))
        caller.send_header("Content-Length", length or "0")
        caller.end_headers()
        caller.wfile.write(content)

    def _body(self, caller: BaseHTTPRequestHandler, what: str) -> bytes:
        if caller.headers.get("Expect", "").lower() == "100-continue":
            caller.send_response_only(100)
            caller.end_headers()
        if "chunked" in caller.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(caller.rfile.readline().split(b";")[0], 16):
                pieces.append(caller.rfile.read(size))
                caller.rfile.readline()
            caller.rfile.readline()
            return b"".join(pieces)
        length = int(caller.headers.get("Content-Length", 0))
        return caller.rfile.read(min(length, _BODY_BYTES) if what == "half" else length)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
