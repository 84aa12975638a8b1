"""What the children of `test_isolate` do; each takes a request and returns an answer, as a step does."""

# ruff: noqa: T201 - what a step prints is what some tests are about
from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from onnx_config.errors import ErrorKind, ModelError

JSON = dict[str, Any]
_SLEEP = "import time; time.sleep(600)"


class OddError(Exception):
    """An exception that the parent could not unpickle, and that cannot even say what it is."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__()
        self.pair = (first, second)

    def __str__(self) -> str:
        raise RuntimeError("no text")


def echo(request: JSON) -> JSON:
    return request


def surroundings(request: JSON) -> JSON:
    return {
        "cwd": str(Path.cwd()),
        "temporary": tempfile.gettempdir(),
        "session": os.getsid(0) == os.getpid(),
        "argv": sys.argv,
        "main": str(getattr(sys.modules["__main__"], "__file__", None)),
        "environment": {key: os.environ.get(key) for key in request["variables"]},
        "core": __import__("resource").getrlimit(__import__("resource").RLIMIT_CORE)[0],
        "oom_score": int(Path("/proc/self/oom_score_adj").read_text()),
        "stdin": os.read(0, 1).decode(),
    }


def imported(request: JSON) -> JSON:
    return {"there": [name in sys.modules for name in request["modules"]], "server": os.getppid()}


def refuse(request: JSON) -> NoReturn:
    raise ModelError("class X  is not supported\nat all", kind=ErrorKind(request["kind"]))


def fail(request: JSON) -> NoReturn:
    try:
        raise KeyError("cause")
    except KeyError as error:
        raise ValueError("bad  value\nin two lines") from error


def fail_oddly(request: JSON) -> NoReturn:
    raise OddError(1, lambda: 2)


def say(request: JSON) -> NoReturn:
    """Raise what a library says, wrapped as exporters do, or plain."""
    error = {"MemoryError": MemoryError, "OSError": OSError}.get(request["type"], RuntimeError)(*request["args"])
    if request.get("wrapped"):
        raise ValueError("the exporter failed") from error
    raise error


def leave(request: JSON) -> NoReturn:
    sys.exit(3)


def leave_at_once(request: JSON) -> NoReturn:
    print("last words")
    os._exit(request["status"])


def segfault(request: JSON) -> JSON:
    print("about to read address 0")
    ctypes.string_at(0)
    return {}


def abort(request: JSON) -> NoReturn:
    os.write(2, request["text"].encode())
    os.abort()


def die_by_signal(request: JSON) -> JSON:
    os.kill(os.getpid(), getattr(signal, request["signal"]))
    time.sleep(30)
    return {}


def eat(request: JSON) -> JSON:
    """Hold more and more memory, in a process started by this one if asked; never past 2 GiB, should nobody stop it."""
    if request.get("elsewhere") and os.fork():
        time.sleep(30)
    held = []
    for _ in range(128):
        held.append(b"x" * (16 * 1024**2))
        time.sleep(0.01)
    return {"held": len(held)}


def read_mapped(request: JSON) -> JSON:
    """Map a file of 300 MiB, touch all of it, and stay so for a while."""
    path = Path("large")
    with path.open("wb") as file:
        for _ in range(300):
            file.write(b"x" * 1024**2)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        total = sum(pages[place] == ord("x") for place in range(0, len(pages), mmap.PAGESIZE))
        time.sleep(0.5)
    return {"pages": total}


def hang(request: JSON) -> JSON:
    """Sleep beside a process that sleeps, and one that has left the session; tell the three ids in a file."""
    if request.get("stubborn"):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    near = subprocess.Popen([sys.executable, "-c", _SLEEP])
    far = subprocess.Popen([sys.executable, "-c", _SLEEP], start_new_session=True)
    daemon = orphan({})["pid"] if request.get("daemon") else far.pid
    draft = Path("pids.draft")
    draft.write_text(f"{os.getpid()} {near.pid} {far.pid} {os.getppid()} {daemon}")
    draft.rename("pids")
    if request.get("seconds"):
        time.sleep(request["seconds"])
        return {}
    while True:
        if request.get("stubborn"):
            sum(range(100_000))
        else:
            time.sleep(60)


def orphan(request: JSON) -> JSON:
    """Return at once, leaving behind a process that is nobody's child."""
    code = (
        "import subprocess, sys; new = dict(stdout=subprocess.DEVNULL, start_new_session=True); "
        f"p = subprocess.Popen([sys.executable, '-c', {_SLEEP!r}], stderr=subprocess.DEVNULL, **new); "
        "print(p.pid); p.returncode = 0"
    )
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"pid": int(started.stdout)}


def talk(request: JSON) -> JSON:
    """Print through Python, through the file descriptor and through C's own buffer."""
    print("python says hello")
    os.write(1, b"descriptor says hello\n")
    ctypes.CDLL(None).printf(b"C says hello\n")
    for number in range(request.get("lines", 0)):
        print(f"line {number:6d} " + "." * 80)
    time.sleep(request.get("seconds", 0))
    print("the end", file=sys.stderr)
    return {}


def huge(request: JSON) -> JSON:
    return {"text": "x" * request["size"]}


def not_json(request: JSON) -> Any:
    return {"object": {"value": object()}, "set": {"value": {1}}, "list": [1], "none": None}[request["what"]]


def reach_out(request: JSON) -> JSON:
    """Try several ways out; an empty text is a way that was open."""
    found = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = listener.getsockname()
        attempts = {
            "loopback": lambda: socket.create_connection(near, timeout=5).close(),
            "localhost": lambda: socket.getaddrinfo("localhost", 80),
            "name": lambda: socket.getaddrinfo("onnx-ferry.invalid", 443),
            "tcp": lambda: socket.create_connection(("192.0.2.1", 9), timeout=5),
            # Connecting a datagram socket sends nothing, so this one is tried with the network open, too.
            "udp": lambda: _datagram(socket.AF_INET).connect(("192.0.2.1", 9)),
            "udp6": lambda: _datagram(socket.AF_INET6).connect(("2001:db8::1", 9)),
            "datagram": lambda: _datagram(socket.AF_INET).sendto(b"x", ("192.0.2.1", 9)),
        }
        for way in request["ways"]:
            try:
                attempts[way]()
                found[way] = ""
            except OSError as error:
                found[way] = str(error)
    return found


def _datagram(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_DGRAM)


def fill_disk(request: JSON) -> JSON:
    """Write to a full disk, where ``request["where"]`` says: in the step itself, or only when its answer is written."""
    if request["where"] == "step":
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")
    log = next(Path.cwd().glob("*.log"))
    log.with_name(log.stem + ".answer.json.draft").symlink_to("/dev/full")
    return {"text": "x" * 10_000}


def out_of_space_text(request: JSON) -> NoReturn:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def with_torch(request: JSON) -> JSON:
    """Compute with the preloaded PyTorch; tell which libraries were there before this function asked for them."""
    loaded = [name for name in request["modules"] if name in sys.modules]
    import huggingface_hub
    import torch

    left = torch.ones(300, 300)
    return {
        "loaded": loaded,
        "threads": torch.get_num_threads(),
        "sum": float((left @ left).sum()),
        "offline": huggingface_hub.is_offline_mode(),
    }


def _die() -> None:
    import faulthandler

    faulthandler.enable(file=2)
    ctypes.string_at(0)
