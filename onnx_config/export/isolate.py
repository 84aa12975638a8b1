"""Run one step in a process of its own, so that a hang, a crash or a hunger for memory ends that step and no more.

::

    this process ── run() ──▶ fork server (libraries imported once) ── fork ──▶ child, one per step
         ▲  watches time and memory, kills                                        │
         └──────────────── answer file in the step's folder ◀─────────────────────┘

A child of the fork server starts in hundredths of a second, where a fresh interpreter needs seconds to import PyTorch.
Whatever ends a child (an exception, a signal, a limit, a full disk), `run` says so with an error of
`onnx_config.errors`; only an exception that the step itself must judge arrives as `ChildError`.

When this process is killed, the server notices, kills every child and whatever they had started, and ends. When the
server is killed, the kernel kills the children, this process the rest; the next run starts another server.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from onnx_config.errors import ErrorKind, InternalError, ResourceError, TransientError, error_of_kind
from onnx_config.export.child import EXIT_DISK_FULL, Job, names_memory, send_imports, server_environment
from onnx_config.export.watch import RUN_VARIABLE, TICK_SECONDS, Run, Watch, read_tail, receive, tail_of

__all__ = ["DETECTION_PRELOAD", "PRELOAD", "Answer", "ChildError", "Server", "kill_all", "run", "shutdown", "warm_up"]

PRELOAD = ("onnx_config.export.preload:import_quietly",)
"""What the fork server of `run` imports or calls before its first child."""

DETECTION_PRELOAD = ("onnx_config.export.preload:import_for_detection",)
"""The same for a `Server` whose children only detect: half the imports, which is half the time until the first."""

_SHUTDOWN_SECONDS = 5.0
_HUNG_UP_SECONDS = 1.0
_QUOTED_CHARACTERS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a step returned, and what it cost."""

    value: dict[str, Any]
    """The function's dict, after a round trip through JSON: tuples are lists, keys are strings."""

    seconds: float
    """Wall time from the child's start to its end."""

    peak_rss_bytes: int
    """Largest resident size: of the child itself, as the kernel counted it, or of the child and what it had started
    together, as sampled; the larger of the two. Libraries shared with the server count."""

    log_tail: str
    """The last lines the child printed, about 4,000 characters at most; ``""`` if it printed nothing."""


class ChildError(Exception):
    """The function raised something that is no `FerryError` and has nothing to do with memory, disk or time.

    The caller knows what the step was, so it alone can say what this means: ``export_failed``, ``runtime_failed``.
    """

    def __init__(self, type_name: str, message: str, traceback_text: str) -> None:
        super().__init__(type_name, message, traceback_text)
        self.type_name = type_name
        """Qualified name of the exception's class; built-in ones without a module: ``"ValueError"``."""
        self.message = message
        """The exception's text in one line, 2,000 characters at most; may be empty."""
        self.traceback_text = traceback_text
        """The child's traceback with its causes, the last 20,000 characters."""

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


def run(
    function: str,
    request: Mapping[str, Any],
    *,
    folder: Path,
    timeout_seconds: float,
    memory_limit_bytes: int,
    threads: int = 1,
    network: bool = False,
    imports: Sequence[str] = (),
    name: str,
) -> Answer:
    """Call ``function`` with ``request`` in a child process and return what it answered.

    ``function`` is ``"package.module:callable"``, takes one dict and returns one, both of JSON values. ``folder``
    exists; it becomes the child's working and temporary folder, takes its log, and is left as the child leaves it.
    Paths in ``request`` are therefore absolute. The child has this process's environment as it is at the time of the
    call, ``threads`` threads for PyTorch, no input, and no network but this machine's loopback unless ``network`` is
    true. Its time starts when it does, so the server's first imports do not count. ``memory_limit_bytes`` is compared
    ten times a second with what the child and all it has started hold, which is about 300 MB before it does anything;
    pages of files that it has mapped do not count, since the system drops them where memory is short. ``imports`` are
    modules, or attributes of such whose look-up imports more (``"package.module:attribute"``), that the server imports
    before its next child, so that none has to; only what a child has imported before unharmed should be among them.
    ``name`` is how messages call the step: ``"export of org/model"``. Any number of threads may call this at once.

    ::

        answer = run("package.steps:export", {"model": "/models/a"}, folder=folder, timeout_seconds=3600,
                     memory_limit_bytes=8 * 1024**3, name="export of org/a")

    Raises:
        FerryError: The function raised it; same kind and message.
        ResourceError: ``timeout``; ``out_of_memory``, by the limit, an allocator or the kernel; ``crashed``, by a
            signal, an exit without an answer, or `kill_all`.
        TransientError: ``store``: the disk is full.
        InternalError: ``request`` is no JSON, or ``folder`` is not there.
        ChildError: The function raised anything else, or returned something that is no dict of JSON values.
    """
    return _server.run(
        function,
        request,
        folder=folder,
        timeout_seconds=timeout_seconds,
        memory_limit_bytes=memory_limit_bytes,
        threads=threads,
        network=network,
        imports=imports,
        name=name,
    )


def warm_up() -> None:
    """Start the fork server and return at once; its imports go on beside whatever the caller does next."""
    _server.warm_up()


def kill_all() -> None:
    """Kill every child that is running now; their `run` calls raise ``crashed``, saying that they were interrupted.

    Later calls of `run` start children again. Safe in a signal handler.
    """
    _server.kill_all()


def shutdown() -> None:
    """Kill every child and end the fork server; the next `run` starts another. Done at exit by itself."""
    _server.shutdown()


class Server:
    """A fork server of its own, with its own imports; `run` and its like use one that has `PRELOAD`.

    Starting is lazy. A process forked from this one by other means starts its own server when it first needs it.
    """

    def __init__(self, *, preload: Sequence[str] = PRELOAD) -> None:
        self._preload = tuple(preload)
        self._forget()
        _servers.add(self)

    def _forget(self) -> None:
        # Reentrant, since a signal handler may call kill_all while this thread holds it.
        self._lock = threading.RLock()
        self._runs: set[Run] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._output: IO[bytes] | None = None
        self._last_output = ""
        self._has_forked = False

    @property
    def pid(self) -> int | None:
        """Process id of the server; ``None`` if it was not started or has ended."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def warm_up(self) -> None:
        """See `warm_up`."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._drop()
            control, theirs = socket.socketpair()
            # Absolute, since the server lives in the root folder, so as to hold no other.
            path = [str(Path(entry).absolute()) for entry in sys.path]
            code = (
                f"import sys; sys.path[:] = {path!r}; from onnx_config.export.forkserver import serve; "
                f"serve({theirs.fileno()}, {os.getpid()}, {self._preload!r})"
            )
            with theirs:
                self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
                self._control = control
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                    cwd="/",
                    env=server_environment(os.environ),
                    # A signal for the terminal's whole job is for this process, which decides about its children.
                    start_new_session=True,
                )

    def kill_all(self) -> None:
        """See `kill_all`."""
        with self._lock:
            for running in self._runs:
                running.kill(ResourceError(f"{running.name} was interrupted", kind=ErrorKind.CRASHED))

    def shutdown(self) -> None:
        """See `shutdown`."""
        with self._lock:
            self.kill_all()
            self._drop()

    def _drop(self) -> None:
        """End the server, if it is there, by closing its line; whatever it had forked ends with it."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            if self._has_forked:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_SHUTDOWN_SECONDS)
            # A server without children may be busy with its imports for seconds yet.
            self._process.kill()
            self._process.wait()
        if self._output is not None:
            self._last_output = tail_of(self._output)
            self._output.close()
        self._process = self._control = self._output = None
        self._has_forked = False

    def run(
        self,
        function: str,
        request: Mapping[str, Any],
        *,
        folder: Path,
        timeout_seconds: float,
        memory_limit_bytes: int,
        threads: int = 1,
        network: bool = False,
        imports: Sequence[str] = (),
        name: str,
    ) -> Answer:
        """See `run`."""
        try:
            json.dumps(dict(request))
        except (TypeError, ValueError) as error:
            raise InternalError(f"the request of {name} is no JSON: {error}") from error
        if not folder.is_dir():
            raise InternalError(f"the folder of {name} is not there: {folder}")
        running = Run(name, folder.absolute())
        job = Job(
            name=name,
            function=function,
            request=dict(request),
            folder=str(running.folder),
            log=str(running.log),
            answer=str(running.answer),
            threads=threads,
            network=network,
            environment={**os.environ, RUN_VARIABLE: running.token},
        )
        with self._lock:
            self._runs.add(running)
        oom_kills_before = _oom_kills()
        try:
            link, pid = self._start_child(running, imports)
            with link:
                watch = Watch(
                    running, pid, link, timeout_seconds=timeout_seconds, memory_limit_bytes=memory_limit_bytes
                )
                status = watch.until_the_end(job)
            return _judge(running, watch, status, oom_killed=_oom_kills() > oom_kills_before)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(running, str(error)) from error
            raise
        finally:
            with self._lock:
                self._runs.discard(running)
            with suppress(OSError):
                running.answer.unlink(missing_ok=True)

    def _start_child(self, running: Run, imports: Sequence[str]) -> tuple[socket.socket, int]:
        """Return the line to a new child that waits for its job, and its process id."""
        for _ in range(2):  # A server that was killed a moment ago still looks alive, and takes no child.
            with self._lock:
                self.warm_up()
                process, control = self._process, self._control
                assert process is not None
                assert control is not None
                link, theirs = socket.socketpair()
                send_imports(link, imports)
                with theirs, suppress(ConnectionError):
                    socket.send_fds(control, [b"\0"], [theirs.fileno()])
            try:
                while running.verdict is None:
                    pid = receive(link, TICK_SECONDS)
                    if pid is not None:
                        with self._lock:
                            running.pid = pid
                            self._has_forked = True
                        return link, pid
                link.close()  # The child, once forked, finds nobody and leaves.
                raise running.verdict
            except EOFError:
                link.close()
                self._drop_dead(process)
            except BaseException:
                link.close()
                raise
        raise ResourceError(
            f"{running.name} could not start, as the fork server took no child, twice; {_quote(self._last_output)}",
            kind=ErrorKind.CRASHED,
        )

    def _drop_dead(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a server that hung up to be dead, and drop it unless another thread has done so."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(_HUNG_UP_SECONDS)
        with self._lock:
            if self._process is process and process.poll() is not None:
                self._drop()


def _judge(running: Run, watch: Watch, status: int | None, *, oom_killed: bool) -> Answer:
    """Return the answer that the child left, or raise what its end means."""
    if status == 0 and running.answer.exists():
        return _read_answer(running, watch)
    if running.verdict is not None:
        raise running.verdict
    if status is None:
        raise ResourceError(f"{running.name} ended, as its fork server died; run it again", kind=ErrorKind.CRASHED)
    if status == EXIT_DISK_FULL:
        raise _disk_full(running, "its answer could not be written")
    tail = read_tail(running.log)
    if oom_killed and status == -signal.SIGKILL:
        raise ResourceError(
            f"{running.name} was killed by the kernel, as the machine or its container ran out of memory; "
            "run fewer models at once or give it more memory"
        )
    if names_memory(tail):
        raise ResourceError(f"{running.name} ran out of memory and {_end(status)}; {_quote(tail)}")
    raise ResourceError(f"{running.name} {_end(status)}; {_quote(tail)}", kind=ErrorKind.CRASHED)


def _read_answer(running: Run, watch: Watch) -> Answer:
    record = json.loads(running.answer.read_text(encoding="utf-8"))
    if "kind" in record:
        raise error_of_kind(ErrorKind(record["kind"]), record["message"])
    if "type_name" in record:
        raise ChildError(record["type_name"], record["message"], record["traceback_text"])
    return Answer(
        value=record["value"],
        seconds=watch.seconds,
        peak_rss_bytes=max(record["peak_rss_bytes"], watch.peak_rss_bytes),
        log_tail=read_tail(running.log),
    )


def _disk_full(running: Run, found: str) -> TransientError:
    return TransientError(
        f"{running.name}: disk full while it worked in {running.folder}: {found}; free some space and run it again",
        kind=ErrorKind.STORE,
    )


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} and no answer"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"


def _quote(tail: str) -> str:
    text = " ".join(tail.split())
    if not text:
        return "it printed nothing"
    return f"its last output: {'... ' if len(text) > _QUOTED_CHARACTERS else ''}{text[-_QUOTED_CHARACTERS:]}"


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since boot, in any container; 0 if unknown."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _forget_servers() -> None:
    """Let go, in a process just forked, of servers that belong to its parent."""
    for server in _servers:
        if server._control is not None:
            server._control.close()
        if server._output is not None:
            server._output.close()
        if server._process is not None:
            server._process.returncode = 0  # Not ours to wait for.
        server._forget()


def _shut_down_servers() -> None:
    for server in tuple(_servers):
        server.shutdown()


os.register_at_fork(after_in_child=_forget_servers)
atexit.register(_shut_down_servers)
_server = Server()
