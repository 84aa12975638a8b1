"""One child of the fork server as its parent sees it: watched from its first moment to its last, and its log."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from onnx_config.errors import ErrorKind, FerryError, ResourceError
from onnx_config.export.child import Job, send_job
from onnx_config.export.forkserver import NUMBER, kill_session

__all__ = ["RUN_VARIABLE", "TICK_SECONDS", "Run", "Watch", "read_tail", "receive", "tail_of"]

RUN_VARIABLE = "ONNX_FERRY_RUN"
"""Environment variable that a child has and hands on, so that what it started is known as its own."""

TICK_SECONDS = 0.1
"""How often a child is looked at."""

_RELIST_SECONDS = 0.5
_SEND_SECONDS = 30.0
_KILLED_GRACE_SECONDS = 10.0
_LOG_LIMIT_BYTES = 64 * 1024**2
_READ_BYTES = 64 * 1024
_TAIL_CHARACTERS = 4_000
_FAULT_FRAMES = 4


@dataclass(eq=False, slots=True)
class Run:
    """One child as its parent sees it."""

    name: str
    """How messages call the step."""

    folder: Path
    """The child's working folder; absolute."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Unlike that of any other run; in the names of its files and in its environment."""

    pid: int | None = None
    """The child's process id; ``None`` until the server has told it."""

    verdict: FerryError | None = None
    """Why this process killed the child; ``None`` while it has not."""

    @property
    def log(self) -> Path:
        """Where the child's output goes."""
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name)[:40].strip("-.")
        return self.folder / f"{label or 'step'}-{self.token}.log"

    @property
    def answer(self) -> Path:
        """What appears when the function has ended."""
        return self.log.with_suffix(".answer.json")

    def kill(self, verdict: FerryError) -> None:
        """Kill the child for the reason ``verdict``; the first reason stays."""
        if self.verdict is None:
            self.verdict = verdict
        if self.pid is not None:
            kill_session(self.pid)


class Watch:
    """Watches one child from its first moment to its last."""

    def __init__(
        self, running: Run, pid: int, link: socket.socket, *, timeout_seconds: float, memory_limit_bytes: int
    ) -> None:
        self._run = running
        self._pid = pid
        self._link = link
        self._timeout_seconds = timeout_seconds
        self._memory_limit_bytes = memory_limit_bytes
        self._started = time.monotonic()
        self._listed = float("-inf")
        self._processes: set[psutil.Process] = set()
        self.seconds = 0.0
        self.peak_rss_bytes = 0

    def until_the_end(self, job: Job) -> int | None:
        """Send ``job`` and return the child's exit status, negative for a signal; ``None`` if the server died."""
        try:
            # A child that is killed before it has read its job says so by its status.
            with suppress(OSError):
                self._link.settimeout(_SEND_SECONDS)
                send_job(self._link, job)
            return self._wait()
        except EOFError:
            # The kernel has killed the child with its server, but not what the child had started.
            kill_session(self._pid)
            return None
        except BaseException:
            self._run.kill(ResourceError(f"{self._run.name} was interrupted", kind=ErrorKind.CRASHED))
            with suppress(EOFError, OSError):
                receive(self._link, _KILLED_GRACE_SECONDS)
            raise
        finally:
            self.seconds = time.monotonic() - self._started
            self._kill_the_rest()

    def _wait(self) -> int:
        killed_at: float | None = None
        while True:
            status = receive(self._link, TICK_SECONDS)
            if status is not None:
                return status
            now = time.monotonic()
            if self._run.verdict is None:
                verdict = self._exceeded(now)
                if verdict is not None:
                    self._run.kill(verdict)
            if self._run.verdict is not None:
                killed_at = killed_at or now
                self._run.kill(self._run.verdict)
                if now - killed_at > _KILLED_GRACE_SECONDS:
                    # Stuck in the kernel, on a dead disk for instance, and gone as soon as that lets it.
                    return -signal.SIGKILL
            self._limit_log()

    def _exceeded(self, now: float) -> FerryError | None:
        size = self._sample(now)
        if size > self._memory_limit_bytes:
            return ResourceError(
                f"{self._run.name} held {_readable(size)} of memory, more than its limit of "
                f"{_readable(self._memory_limit_bytes)}, and was stopped; give it more memory"
            )
        if now - self._started > self._timeout_seconds:
            return ResourceError(
                f"{self._run.name} took longer than its limit of {self._timeout_seconds:g} s and was stopped; "
                "give it more time",
                kind=ErrorKind.TIMEOUT,
            )
        return None

    def _sample(self, now: float) -> int:
        """Return the bytes that the child holds and all it has started, also what no longer hangs on it.

        Pages of files count as resident and not as held: where memory is short, the system drops them.
        """
        if now - self._listed > _RELIST_SECONDS:  # Listing reads every process of the machine.
            self._listed = now
            with suppress(psutil.Error):
                child = psutil.Process(self._pid)
                self._processes |= {child, *child.children(recursive=True)}
        resident = held = 0
        for process in tuple(self._processes):
            try:
                size = process.memory_info().rss
            except psutil.Error:
                self._processes.discard(process)
                continue
            resident += size
            held += _held_bytes(process.pid, size)
        self.peak_rss_bytes = max(self.peak_rss_bytes, resident)
        return held

    def _limit_log(self) -> None:
        """Begin the log anew when it is too long, so that an endless printer does not fill the disk."""
        with suppress(OSError):
            if self._run.log.stat().st_size > _LOG_LIMIT_BYTES:
                os.truncate(self._run.log, 0)

    def _kill_the_rest(self) -> None:
        """Kill what has left the child's session: what was seen while it ran, and what has its environment."""
        for process in self._processes | set(psutil.process_iter()):
            with suppress(psutil.Error, OSError):
                # Both look whether it is the same process still, and not a later one with its id.
                if process in self._processes or process.environ().get(RUN_VARIABLE) == self._run.token:
                    process.kill()


def _held_bytes(pid: int, resident: int) -> int:
    """Return the bytes of a process that only its end gives back; ``resident`` where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        sizes = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")))
        return sum(int(size.split()[0]) * 1024 for size in sizes.values()) or resident
    except (OSError, ValueError, IndexError):
        return resident


def receive(link: socket.socket, seconds: float) -> int | None:
    """Return the server's next number, or ``None`` if none came in time; `EOFError` if the server is gone."""
    link.settimeout(seconds)
    try:
        data = link.recv(NUMBER.size)
    except TimeoutError:
        return None
    except ConnectionError as error:
        raise EOFError("the fork server is gone") from error
    if len(data) < NUMBER.size:
        raise EOFError("the fork server is gone")
    (number,) = NUMBER.unpack(data)
    return int(number)


def read_tail(path: Path) -> str:
    """Return the last lines of the log at ``path``; ``""`` if nothing was printed or the log was never begun."""
    try:
        with path.open("rb") as file:
            return tail_of(file)
    except FileNotFoundError:
        return ""


def tail_of(file: IO[bytes]) -> str:
    """Return the last lines, with only the innermost frames of a fault's report.

    Such a report gives the innermost frame first, then a hundred others and the names of all extension modules.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _READ_BYTES))
    kept: list[str] = []
    frames: int | None = None
    for line in file.read().decode("utf-8", "replace").splitlines():
        if line.endswith("(most recent call first):"):
            frames = 0
        elif frames is not None and line.startswith("  File "):
            frames += 1
            if frames > _FAULT_FRAMES:
                continue
        elif line.startswith("Extension modules:"):
            continue
        else:
            frames = None
        kept.append(line)
    return "\n".join(kept).strip()[-_TAIL_CHARACTERS:]


def _readable(size_bytes: int) -> str:
    """Return the size with a unit.

    >>> _readable(300 * 1024**2), _readable(3 * 1024**3)
    ('300 MiB', '3.0 GiB')
    """
    if size_bytes < 1024**3:
        return f"{size_bytes / 1024**2:.0f} MiB"
    return f"{size_bytes / 1024**3:.1f} GiB"
