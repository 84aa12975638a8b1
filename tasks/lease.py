"""The lease on a model while it is converted: workers on several machines that share a catalog take turns.

On one machine the lock on a file would do; leases are for workers with homes of their own. Whoever dies gives its
lease up by that: at once where the next one sees on the same machine that the process is gone, and otherwise when
nothing was heard of it for `LEASE_SECONDS`. Whoever was only away for so long (suspended, cut off) finds the lease
lost, and neither stores nor records what it made.

The lease also says where the model is, for whoever looks at what runs. Its own thread writes that down, so that no
step waits for the catalog, and of steps that follow each other at once only the last is written.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy.orm import Session

import db
from onnx_config.errors import FerryError
from tasks.job import raise_if_stopping
from tasks.register import catalog, patiently, worker_name
from tasks.report import Step
from tasks.request import Workspace

__all__ = ["BEAT_SECONDS", "LEASE_SECONDS", "Lease", "LeaseLostError", "held_lease", "is_gone", "process_identity"]

LEASE_SECONDS = 120.0
"""How long a lease lasts unless it is kept: longer than a database that is restarted is waited for."""

BEAT_SECONDS = 20.0
"""How often it is kept."""

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0

# Leases of this process that it could not give back, since the catalog was away: nobody needs to wait for them here.
_given_up: set[str] = set()


class LeaseLostError(Exception):
    """Another worker has taken the lease over: what was made under it is for nobody."""


class Lease:
    """A lease that is had, and kept by a thread of its own until it is given back."""

    def __init__(self, workspace: Workspace, record: db.LeaseRecord) -> None:
        self.record = record
        """What the catalog says of it."""
        self._workspace = workspace
        self._ended = threading.Event()
        self._lost = threading.Event()
        # Of the thread: that there is something to write, or nothing any more.
        self._woken = threading.Event()
        self._step: Step | None = Step.FETCH
        self._thread = threading.Thread(target=self._beat, name=f"lease {record.key[:12]}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise if it is known to be lost; asks nobody.

        Raises:
            LeaseLostError: If another worker has it.
        """
        if self._lost.is_set():
            raise LeaseLostError(f"the lease on {self.record.key} was taken over")

    def confirm(self) -> None:
        """Ask the catalog whether it is had, and have it for a while from now.

        Raises:
            LeaseLostError: If another worker has it.
            TransientError: If the catalog does not answer for about a minute (``catalog``).
        """
        engine = catalog(self._workspace)

        def ask() -> bool:
            with db.session_scope(engine) as session:
                return db.keep_lease(session, self.record, seconds=LEASE_SECONDS)

        if not patiently(self._workspace, ask):
            self._lost.set()
        self.check()

    def note_step(self, step: Step | None) -> None:
        """Have it said where the model is, as soon as may be; ``None``: it waits for its share of memory.

        Never fails, and waits for nothing.
        """
        if step is not self._step:
            self._step = step
            self._woken.set()

    def settle(self, session: Session) -> None:
        """Give it back in the transaction that records what was made under it: both are done, or neither.

        Raises:
            LeaseLostError: If another worker has it; or if an earlier try did it all, and its connection broke when it
                was to be told so. Whoever looks again finds the result.
        """
        if not db.release_lease(session, self.record):
            self._lost.set()
            self.check()

    def release(self) -> None:
        """Give it back. Where the catalog is away, it ends by itself."""
        self._ended.set()
        self._woken.set()
        if self._lost.is_set():
            return

        def give_back() -> None:
            with db.session_scope(catalog(self._workspace)) as session:
                db.release_lease(session, self.record)

        try:
            patiently(self._workspace, give_back)
        except FerryError:
            _given_up.add(self.record.owner)

    def _beat(self) -> None:
        engine = catalog(self._workspace)
        beat = time.monotonic() + BEAT_SECONDS
        written: Step | None = Step.FETCH
        while True:
            self._woken.wait(max(0.0, beat - time.monotonic()))
            self._woken.clear()
            if self._ended.is_set():
                return
            step, due = self._step, time.monotonic() >= beat
            if due:
                beat = time.monotonic() + BEAT_SECONDS
            elif step is written:
                continue
            # A database that is away now is asked again at the next beat: a lease outlives several.
            with suppress(db.CatalogError):
                with db.session_scope(engine) as session:
                    if step is not written:
                        kept = db.note_step(session, self.record, None if step is None else step.value)
                    if due:
                        kept = db.keep_lease(session, self.record, seconds=LEASE_SECONDS)
                written = step
                # One that was given back meanwhile is not lost.
                if not kept and not self._ended.is_set():
                    self._lost.set()
                    return


@contextmanager
def held_lease(
    workspace: Workspace,
    key: str,
    *,
    stopping: threading.Event,
    model_id: str | None = None,
    batch_id: int | None = None,
) -> Iterator[Lease]:
    """Wait for the lease on ``key`` (64 hexadecimal digits), and hold it.

    Args:
        workspace: Where the catalog is.
        key: What nobody else may work at meanwhile.
        stopping: Ends the waiting.
        model_id: The model that is converted under it, for whoever looks at what runs; ``None``: it is none.
        batch_id: The batch that the model belongs to.

    Raises:
        TransientError: If the catalog does not answer for about a minute (``catalog``).
        KeyboardInterrupt: If ``stopping`` is set meanwhile.
    """
    wanted = db.LeaseRecord(
        key=key,
        owner=secrets.token_hex(16),
        host=worker_name(),
        process_id=os.getpid(),
        process=process_identity(os.getpid()),
        model_id=model_id,
        batch_id=batch_id,
    )
    engine = catalog(workspace)
    gone: str | None = None
    pause = _FIRST_PAUSE_SECONDS

    def take() -> db.LeaseRecord:
        with db.session_scope(engine) as session:
            return db.take_lease(session, wanted, seconds=LEASE_SECONDS, instead_of=gone)

    while (holder := patiently(workspace, take)) is not wanted:
        if holder.owner != gone and (holder.owner in _given_up or is_gone(holder)):
            gone = holder.owner
            continue
        stopping.wait(pause)
        raise_if_stopping(stopping)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    lease = Lease(workspace, wanted)
    try:
        yield lease
    finally:
        lease.release()


def is_gone(holder: db.LeaseRecord) -> bool:
    """Return whether the process that has a lease is known to be dead: one of this machine, and of its numbering.

    Of a process elsewhere, or in another container, nothing is known.
    """
    where, _, born = holder.process.rpartition(" ")
    if not where or where != process_identity(os.getpid()).rpartition(" ")[0]:
        return False
    try:
        os.kill(holder.process_id, 0)
    except ProcessLookupError:
        return True
    except OSError:
        # There is one, of another user.
        pass
    now = process_identity(holder.process_id)
    # Where its times cannot be read, it may be the same.
    return now != "" and now.rpartition(" ")[2] != born


def process_identity(process_id: int) -> str:
    """Return what no other process was or will be; empty where this cannot be told, as off Linux.

    Start of the machine, numbering of processes (containers have their own), and the tick at which this one began,
    which a number that is used again has not; of a dead one that nobody has asked after, ``dead``.
    """
    proc = Path("/proc")
    try:
        machine = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbering = (proc / "self/ns/pid").readlink().name
        # After the program's name, which stands in brackets and may hold anything.
        said = (proc / str(process_id) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        state, born = said.split()[0], said.split()[19]
    except (OSError, IndexError):
        return ""
    return f"{machine} {numbering} {'dead' if state in 'ZX' else born}"
