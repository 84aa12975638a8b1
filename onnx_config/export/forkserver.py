"""The process that has the heavy libraries imported and forks one child per step.

Not the fork server of `multiprocessing`, for four reasons. That one runs the caller's script again in every child, so a
script without a main guard ends in an error about "bootstrapping". There is one per process, so another library's
preload list wins or loses against ours. It ignores a module that fails to import. And when its parent is killed it
leaves behind what its children had started; this one adopts such orphans and ends them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from onnx_config.export.child import live, receive_imports

__all__ = ["NUMBER", "kill_session", "serve"]

NUMBER = struct.Struct("!q")
"""How the server writes a child's process id, and later its exit status (negative: the signal)."""

_IMPORT_SECONDS = 600
_PARENT_CHECK_SECONDS = 1.0
_KILL_ROUNDS = 50
_PR_SET_CHILD_SUBREAPER = 36


def serve(control_fd: int, parent_pid: int, preload: Sequence[str]) -> None:
    """Import ``preload``, then fork a child for every socket that arrives at ``control_fd``; return with the parent.

    ``preload`` names modules, ``"package.module"``, or functions to call, ``"package.module:function"``. One that
    fails is told on standard error; the children that need it meet the same error again.
    Ctrl-C and SIGTERM are ignored: they are meant for the parent, which ends its children as it sees fit.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with _importing():
        for name in preload:
            try:
                module, _, function = name.partition(":")
                imported = importlib.import_module(module)
                if function:
                    getattr(imported, function)()
            except Exception:  # noqa: BLE001 - whatever a library's import raises
                traceback.print_exc()
    with socket.socket(fileno=control_fd) as control:
        _Loop(control, parent_pid).run()


@contextmanager
def _importing() -> Iterator[None]:
    # A collection finds nothing while modules are imported, and looks at ever more objects.
    gc.disable()
    # An import that hangs would leave this process behind for good, whatever becomes of the parent.
    faulthandler.dump_traceback_later(_IMPORT_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        # Objects that the collector never visits are never written to, so their pages stay shared with the children.
        gc.freeze()
        gc.enable()


def kill_session(pid: int) -> None:
    """Kill the child ``pid`` and all of its session that has not made a session of its own; none left is no error."""
    for kill in (os.killpg, os.kill):  # The second is for a child that has not called setsid yet.
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


class _Loop:
    def __init__(self, control: socket.socket, parent_pid: int) -> None:
        self._control = control
        self._parent_pid = parent_pid
        self._links: dict[int, socket.socket] = {}
        self._imported: set[str] = set()
        self._helpers = {process.pid for process in psutil.Process().children()}
        self._wake, wake_write = socket.socketpair()
        self._wake_write = wake_write
        for end in (self._wake, wake_write):
            end.setblocking(False)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            # A process that C code forked from the parent may hold the other end open after the parent's death.
            while os.getppid() == self._parent_pid:
                ready = {key.fileobj for key, _ in selector.select(_PARENT_CHECK_SECONDS)}
                if self._wake in ready:
                    with suppress(BlockingIOError):
                        self._wake.recv(4096)
                self._reap()
                if self._control in ready and not self._accept():
                    break
        for pid in self._links:
            kill_session(pid)
        self._kill_descendants()

    def _accept(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        if not data:
            return False
        link = socket.socket(fileno=fds[0])
        try:
            self._import(receive_imports(link))
        except EOFError:
            link.close()
            return True
        server_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            traceback.print_exc()
            link.close()
            return True
        if pid == 0:
            self._become_child(link, server_pid)
        self._links[pid] = link
        _tell(link, pid)
        return True

    def _import(self, names: Sequence[str]) -> None:
        """Import each once, so that this child and all later ones find it; the child that needs it meets its error."""
        new = [name for name in names if name not in self._imported]
        if not new:
            return
        self._imported.update(new)
        with _importing():
            for name in new:
                module, _, attribute = name.partition(":")
                with suppress(Exception):
                    imported = importlib.import_module(module)
                    if attribute:
                        getattr(imported, attribute)

    def _become_child(self, link: socket.socket, server_pid: int) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for other in (self._control, self._wake, self._wake_write, *self._links.values()):
                other.close()
            status = live(link, server_pid)
        except BaseException:  # noqa: BLE001 - a child must never return into the server's loop
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                # Looked at before it is reaped: as long as the dead child is there, nobody else can have its id.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            link = self._links.pop(pid, None)
            if link is not None:
                kill_session(pid)
            _, status = os.waitpid(pid, 0)
            if link is not None:
                if not self._links:
                    self._kill_descendants()
                _tell(link, os.waitstatus_to_exitcode(status))
                link.close()

    def _kill_descendants(self) -> None:
        """Kill what earlier children started and left; called while no child is wanted."""
        for _ in range(_KILL_ROUNDS):
            left = [
                process for process in psutil.Process().children(recursive=True) if process.pid not in self._helpers
            ]
            if not left:
                return
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            for process in left:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
            psutil.wait_procs(left, timeout=0.02)


def _tell(link: socket.socket, number: int) -> None:
    with suppress(OSError):  # The parent may have given up on this child.
        link.sendall(NUMBER.pack(number))
