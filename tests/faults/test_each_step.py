"""What fails may fail at any step of a model: the database, the disk, the worker, the clock. Nothing is torn or lost.

Steps here are made of files; what a real child may do is the matter of `test_isolate`.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

import db
from onnx_config.errors import ErrorKind
from onnx_config.export import isolate
from onnx_config.spec import ModelSpec
from tasks import progress, register, retry
from tasks.export import Exported
from tasks.job import Job
from tasks.pipeline import convert_model
from tasks.register import catalog
from tasks.report import ModelEntry, Status, Step
from tasks.request import ConversionRequest, Workspace
from tests.faults.harness import (
    ROOT,
    artifact_folders,
    assert_nothing_half_done,
    assert_whole,
    catalog_rows,
    workspace,
)
from tests.tasks.test_pipeline import Files, make_model

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

EACH_STEP = pytest.mark.parametrize("step", [step for step in Step if step is not Step.FETCH])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(isolate, "warm_up", lambda: None)


@pytest.fixture
def places(tmp_path: Path) -> Workspace:
    return workspace(tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> ConversionRequest:
    return make_model(tmp_path / "model")


def once_at(step: Step, do: Callable[[Job], object]) -> Callable[[Step, Job], None]:
    """Return a hook that does something the first time that a step is reached."""
    left = [do]

    def hook(reached: Step, job: Job) -> None:
        if reached is step and left:
            left.pop()(job)

    return hook


def statuses(places: Workspace) -> list[str]:
    with db.session_scope(catalog(places), read_only=True) as session:
        return [str(row.status) for row in db.iter_conversions(session)]


def assert_failed(entry: ModelEntry, kind: ErrorKind) -> None:
    assert entry.error is not None
    assert (entry.status, entry.error.kind) == (Status.FAILED, kind), entry.error.message


# A database on a server


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """One that may be killed: the shared one has other tests' connections."""
    from tests.postgres import PostgresServer

    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def served(places: Workspace, own_server: PostgresServer) -> Workspace:
    served = replace(places, catalog_url=own_server.create())
    # It has answered before, so it is waited for.
    assert statuses(served) == []
    return served


@pytest.mark.slow
@EACH_STEP
def test_a_database_that_is_away_for_a_while_costs_nothing(served, own_server, model, step):
    back = threading.Timer(0.7, own_server.start)

    def kill(_job: Job) -> None:
        own_server.stop(hard=True)
        back.start()

    entry = convert_model(model, served, steps=Files(hook=once_at(step, kill)).steps)
    back.join()
    assert entry.status is Status.CONVERTED, entry.error
    assert statuses(served) == ["converted"]
    assert_nothing_half_done(served.home)


@pytest.mark.slow
@EACH_STEP
def test_a_database_that_is_gone_is_said_and_leaves_nothing_torn(served, own_server, model, step, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.3)
    files = Files(hook=once_at(step, lambda _: own_server.stop(hard=True)))
    entry = convert_model(model, served, steps=files.steps)
    own_server.start()
    assert_failed(entry, ErrorKind.CATALOG)
    assert "that the server runs" in (entry.error.message if entry.error else "")
    assert_nothing_half_done(served.home)
    # What could not be recorded is not known, so it is done again, and what was stored is found in its place.
    assert convert_model(model, served, steps=Files().steps).status is Status.CONVERTED
    assert statuses(served) == ["converted"]
    assert len(artifact_folders(served.store)) == 1
    assert_nothing_half_done(served.home)


# A database in a file


@EACH_STEP
def test_a_catalog_that_another_program_has_locked_is_waited_for(places, model, step):
    released: list[threading.Timer] = []

    def lock(_job: Job) -> None:
        other = sqlite3.connect(places.home / "catalog.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")

        def release() -> None:
            other.execute("ROLLBACK")
            other.close()

        released.append(threading.Timer(0.4, release))
        released[0].start()

    entry = convert_model(model, places, steps=Files(hook=once_at(step, lock)).steps)
    released[0].join()
    assert entry.status is Status.CONVERTED, entry.error
    assert statuses(places) == ["converted"]


@EACH_STEP
def test_a_catalog_that_has_no_room_fails_the_model_and_leaves_nothing_torn(places, model, step):
    """As on a full disk; the store is on another one."""
    engine = catalog(places)

    def narrow(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute("PRAGMA max_page_count = 1").fetchone()

    class Talkative(Files):
        def export(self, job: Job, spec: ModelSpec, **options: object) -> Exported:
            # More than fits into pages that are there already.
            return replace(super().export(job, spec, **options), notes=("x" * 1_000_000,))

    full = Talkative(hook=once_at(step, lambda _: event.listen(engine, "checkout", narrow)))
    entry = convert_model(model, places, steps=full.steps)
    assert_failed(entry, ErrorKind.CATALOG)
    assert "full" in (entry.error.message if entry.error else "")
    event.remove(engine, "checkout", narrow)
    engine.dispose()
    assert statuses(places) == []
    assert_nothing_half_done(places.home)
    assert convert_model(model, places, steps=Files().steps).status is Status.CONVERTED
    assert len(artifact_folders(places.store)) == 1
    assert_nothing_half_done(places.home)


# A disk


@EACH_STEP
@pytest.mark.parametrize("number", [pytest.param(errno.ENOSPC, id="full"), pytest.param(errno.EDQUOT, id="quota")])
def test_a_disk_that_is_full_fails_the_model_and_leaves_nothing_torn(places, model, step, number):
    def fill(_job: Job) -> None:
        raise OSError(number, os.strerror(number), str(places.home / "tmp"))

    entry = convert_model(model, places, steps=Files(hook=once_at(step, fill)).steps)
    assert_failed(entry, ErrorKind.STORE)
    assert statuses(places) == ["failed"]
    assert artifact_folders(places.store) == set()
    assert_nothing_half_done(places.home)
    # That a disk was full is not remembered against the model.
    assert convert_model(model, places, steps=Files().steps, retry_failed=frozenset()).status is Status.CONVERTED


# A worker


@pytest.mark.slow
@EACH_STEP
def test_a_worker_that_is_killed_is_followed_by_another_machines(places, model, postgres, tmp_path, step):
    """The first has a home, and so locks, of its own; what it leaves on its machine is in nobody's way."""
    here = replace(places, catalog_url=postgres.create(), store=tmp_path / "store")
    words = [tmp_path / "gone", here.catalog_url, here.store, model.model_id, step.value]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.step_worker", *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "reached\n"
        other.send_signal(signal.SIGKILL)
        other.wait()
    started = time.monotonic()
    entry = convert_model(model, here, steps=Files().steps)
    assert time.monotonic() - started < 10, "a process that is seen to be gone is not waited for"
    assert entry.status is Status.CONVERTED, entry.error
    assert statuses(here) == ["converted"]
    (folder,) = artifact_folders(here.store)
    assert_whole(folder)


# The worker's clock


@EACH_STEP
@pytest.mark.parametrize(
    "jump", [pytest.param(timedelta(days=-400), id="back"), pytest.param(timedelta(days=400), id="ahead")]
)
def test_a_clock_that_jumps_costs_nothing(places, model, step, jump, monkeypatch):
    offset = timedelta()

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # one of the standard library's
            return datetime.now(tz) + offset

    monkeypatch.setattr(register, "datetime", Jumping)
    monkeypatch.setattr(progress, "datetime", Jumping)
    before = time.time

    def turn(_job: Job) -> None:
        nonlocal offset
        offset = jump
        monkeypatch.setattr(time, "time", lambda: before() + jump.total_seconds())

    entry = convert_model(model, places, steps=Files(hook=once_at(step, turn)).steps)
    monkeypatch.setattr(time, "time", before)
    assert entry.status is Status.CONVERTED, entry.error
    assert all(0 <= seconds < 60 for seconds in entry.seconds.values()), entry.seconds
    (row,) = catalog_rows(places.home)
    assert row.status == "converted"
    assert convert_model(model, places, steps=Files().steps).status is Status.REUSED
