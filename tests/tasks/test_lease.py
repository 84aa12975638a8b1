"""Workers on several machines that share a catalog: one of them converts a model, and another when that one is gone.

Two machines are two homes here: what is locked in one is nothing to the other.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.orm import Session

import db
from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export import isolate
from tasks import lease as lease_module
from tasks import retry
from tasks.crew import Crew
from tasks.job import Job
from tasks.lease import Lease, LeaseLostError, held_lease, is_gone, process_identity
from tasks.memory import MemoryGate
from tasks.pipeline import convert_model
from tasks.register import catalog
from tasks.report import ModelEntry, Status, Step
from tasks.request import ConversionRequest, Workspace
from tests.faults.harness import artifact_folders, assert_nothing_half_done, catalog_rows, workspace
from tests.tasks.test_pipeline import Files, make_model

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

ROOT = Path(__file__).parents[2]
KEY = "a" * 64


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "_LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(isolate, "warm_up", lambda: None)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.2)


@pytest.fixture(params=["sqlite", "postgresql"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    places = workspace(tmp_path / "home")
    if request.param == "sqlite":
        return places
    server: PostgresServer = request.getfixturevalue("postgres")
    return replace(places, catalog_url=server.create())


@pytest.fixture
def model(tmp_path: Path) -> ConversionRequest:
    return make_model(tmp_path / "model")


@contextmanager
def other_process(places: Workspace, *, seconds: float = 120.0) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that has the lease on `KEY`."""
    words = [sys.executable, "-m", "tests.tasks.lease_holder", places.home, places.catalog_url, KEY, seconds]
    with subprocess.Popen(
        [str(word) for word in words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def taken(places: Workspace, *, stopping: threading.Event | None = None) -> float:
    """Take the lease on `KEY` and give it back; return for how many seconds it was waited for."""
    started = time.monotonic()
    with held_lease(places, KEY, stopping=stopping or threading.Event()):
        return time.monotonic() - started


def holder(places: Workspace) -> db.LeaseRecord | None:
    with db.session_scope(catalog(places), read_only=True) as session:
        return db.find_leases(session, [KEY]).get(KEY)


def take_as(places: Workspace, record: db.LeaseRecord, *, seconds: float = 60.0) -> None:
    with db.session_scope(catalog(places)) as session:
        assert db.take_lease(session, record, seconds=seconds) is record


def elsewhere(**changes: object) -> db.LeaseRecord:
    values = {"key": KEY, "owner": "another", "host": "elsewhere", "process_id": 7, "process": "boot pid:[1] 7"}
    return db.LeaseRecord(**(values | changes))  # type: ignore[arg-type]


# What is seen of it


def seen(places: Workspace) -> list[tuple[str, str | None]]:
    with db.session_scope(catalog(places), read_only=True) as session:
        return [(running.model_id, running.step) for running in db.list_running(session)]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_each_step_of_a_conversion_is_seen_while_it_runs(places, model):
    steps: list[str] = []

    def look(step: Step, _job: Job) -> None:
        until(lambda: seen(places) == [(str(Path(model.model_id).resolve()), step.value)])
        steps.append(step.value)

    entry = convert_model(model, places, steps=Files(hook=look).steps)
    assert entry.status is Status.CONVERTED
    assert steps == ["detect", "export", "simplify", "parity", "register"]
    assert seen(places) == []
    with db.session_scope(catalog(places), read_only=True) as session:
        assert [record.worker for record in db.list_conversions(session)] == [platform.node()]


def test_a_model_that_waits_for_memory_says_so(places, model):
    gate = MemoryGate(places.memory_limit_bytes)
    with ThreadPoolExecutor() as pool:
        with gate.alone(stopping=threading.Event()):
            entry = pool.submit(convert_model, model, places, steps=Files().steps, gate=gate)
            until(lambda: [step for _, step in seen(places)] == [None])
        assert entry.result().status is Status.CONVERTED


def test_no_step_waits_for_the_catalog(places, model, monkeypatch):
    """A catalog that is away costs what is seen, and no conversion."""

    def away(*_: object) -> bool:
        raise db.CatalogError("the server is restarted", transient=True)

    monkeypatch.setattr(db, "note_step", away)
    assert convert_model(model, places, steps=Files().steps).status is Status.CONVERTED


def test_steps_that_follow_each_other_at_once_are_few_statements(places, monkeypatch):
    written: list[str | None] = []
    note, slow = db.note_step, threading.Event()

    def noted(session: Session, record: db.LeaseRecord, step: str | None) -> bool:
        slow.wait(10)
        written.append(step)
        return note(session, record, step)

    monkeypatch.setattr(db, "note_step", noted)
    with held_lease(places, KEY, stopping=threading.Event(), model_id="org/model") as held:
        held.note_step(Step.FETCH)
        for step in Step:
            held.note_step(step)
        slow.set()
        until(lambda: seen(places) == [("org/model", "register")])
    assert len(written) <= 2
    assert None not in written


def test_a_lease_on_something_else_is_no_model_in_work(places):
    with held_lease(places, KEY, stopping=threading.Event()):
        assert seen(places) == []


# Who has it, and until when


def test_a_lease_says_who_has_it_and_is_given_back(places):
    with held_lease(places, KEY, stopping=threading.Event()) as held:
        found = holder(places)
        assert found == held.record
        assert (found.process_id, found.process) == (os.getpid(), process_identity(os.getpid()))
        held.confirm()
    assert holder(places) is None


def test_who_comes_second_waits(places):
    with other_process(places) as process:
        stopping = threading.Event()
        threading.Timer(0.5, stopping.set).start()
        with pytest.raises(KeyboardInterrupt):
            taken(places, stopping=stopping)
        process.communicate("go on\n", timeout=30)
        assert taken(places) < 1


def test_a_killed_process_of_this_machine_is_not_waited_for(places):
    with other_process(places) as process:
        process.send_signal(signal.SIGKILL)
        # Still a zombie, as in a container whose first process asks after nobody.
        assert taken(places) < 5
        process.wait()
        assert holder(places) is None


def test_a_process_elsewhere_is_waited_for_until_its_time_is_over(places):
    take_as(places, elsewhere(), seconds=1.0)
    assert 0.7 < taken(places) < 5


@pytest.mark.usefixtures("short")
def test_a_lease_is_kept_for_as_long_as_it_is_needed(places):
    with held_lease(places, KEY, stopping=threading.Event()) as held:
        time.sleep(2.2)
        with db.session_scope(catalog(places)) as session:
            assert db.take_lease(session, elsewhere(), seconds=60) == held.record
        held.check()


def test_a_suspended_process_loses_it_and_notices(places):
    with other_process(places, seconds=1.0) as process:
        process.send_signal(signal.SIGSTOP)
        assert taken(places) < 10
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("go on\n", timeout=30)
        assert out == "lost\n"


def test_what_others_have_taken_is_noticed_at_the_next_beat(places, monkeypatch):
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)
    with held_lease(places, KEY, stopping=threading.Event()) as held:
        with db.session_scope(catalog(places)) as session:
            db.take_lease(session, elsewhere(), seconds=60, instead_of=held.record.owner)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and held._thread.is_alive():
            time.sleep(0.02)
        with pytest.raises(LeaseLostError):
            held.check()
    # And it is not given back in their stead.
    assert holder(places) == elsewhere()


def test_a_database_that_is_away_for_a_while_costs_no_lease(tmp_path, monkeypatch):
    from tests.postgres import PostgresServer

    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)
    server = PostgresServer()
    try:
        server.start()
        places = replace(workspace(tmp_path / "home"), catalog_url=server.url())
        with held_lease(places, KEY, stopping=threading.Event()) as held:
            server.stop(hard=True)
            time.sleep(0.5)
            back = threading.Timer(0.5, server.start)
            back.start()
            held.confirm()
            assert holder(places) == held.record
            # It looks whether the server answers, until it has seen it.
            back.join()
            server.stop(hard=True)
            monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.2)
        # Nobody to give it back to: the end of the work is the end of the work.
        catalog(places).dispose()
    finally:
        server.remove()


HERE = process_identity(os.getpid())


@pytest.mark.parametrize(
    ("process_id", "process", "gone"),
    [
        pytest.param(os.getpid(), HERE, False, id="alive"),
        pytest.param(2**22 + 5, HERE, True, id="no-such-number"),
        pytest.param(os.getpid(), HERE.rpartition(" ")[0] + " 1", True, id="its-number-was-used-again"),
        pytest.param(2**22 + 5, "other-boot " + HERE.partition(" ")[2], False, id="on-another-machine"),
        pytest.param(2**22 + 5, HERE.replace("pid:[", "pid:[9"), False, id="in-another-container"),
        pytest.param(2**22 + 5, "", False, id="it-cannot-be-said"),
        pytest.param(1, HERE.rpartition(" ")[0] + " 1", None, id="of-another-user"),
    ],
)
def test_who_is_known_to_be_gone(process_id, process, gone, monkeypatch):
    if gone is None:
        # Its number is in use, and /proc says nothing of it, as where it is mounted with hidepid.
        monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
        here = process_identity(os.getpid())
        monkeypatch.setattr(lease_module, "process_identity", lambda pid: here if pid == os.getpid() else "")
        gone = False
    assert is_gone(elsewhere(process_id=process_id, process=process)) is gone


# Models, on two machines


@pytest.fixture
def machines(places: Workspace, tmp_path: Path) -> list[Workspace]:
    """Two, with a home each, one catalog and one store."""
    return [replace(places, home=tmp_path / name, store=tmp_path / "store") for name in ("first", "second")]


def convert_on(machines: list[Workspace], model: ConversionRequest, *files: Files) -> list[ModelEntry]:
    # By the path of the home, since a crew's jobs must differ.
    steps = {places.home: own for places, own in zip(machines, files, strict=True)}
    crew = Crew(lambda places: convert_model(model, places, steps=steps[places.home].steps), machines, workers=2)
    found = dict(crew.results())
    return [found[places] for places in machines]


def rows(places: Workspace) -> list[str]:
    with db.session_scope(catalog(places), read_only=True) as session:
        return [str(row.status) for row in db.iter_conversions(session)]


def test_two_machines_convert_a_model_once(machines, model):
    first, second = Files(hook=lambda *_: time.sleep(0.1)), Files(hook=lambda *_: time.sleep(0.1))
    entries = convert_on(machines, model, first, second)
    assert Counter(entry.status for entry in entries) == {Status.CONVERTED: 1, Status.REUSED: 1}
    assert len({entry.artifact for entry in entries}) == 1
    assert sorted([len(first.calls), len(second.calls)])[0] == 0
    assert rows(machines[0]) == ["converted"]
    assert holder(machines[0]) is None


def test_a_failure_of_the_model_is_the_others_too(machines, model):
    """Recorded before the lease is given back, so that whoever waits need not find out again."""
    faults = {Step.EXPORT: [ModelError("no", kind=ErrorKind.UNSUPPORTED)]}
    files = [Files(hook=lambda *_: time.sleep(0.1), faults=dict(faults)) for _ in machines]
    steps = dict(zip(machines, files, strict=True))

    def convert(places: Workspace) -> ModelEntry:
        return convert_model(model, places, steps=steps[places].steps, retry_failed=frozenset())

    entries = dict(Crew(convert, machines, workers=2).results())
    assert [entry.error.kind for entry in entries.values() if entry.error] == [ErrorKind.UNSUPPORTED] * 2
    assert [entry.notes != () for entry in entries.values()].count(True) == 1
    assert sorted(len(own.calls) for own in files)[0] == 0
    assert rows(machines[0]) == ["failed"]


def test_other_models_are_not_waited_for(machines, tmp_path):
    models = [make_model(tmp_path / name) for name in ("one", "two")]
    inside = threading.Barrier(2)
    files = Files(hook=lambda step, _job: inside.wait(20) if step is Step.EXPORT else None)
    crew = Crew(lambda number: convert_model(models[number], machines[number], steps=files.steps), [0, 1], workers=2)
    assert [entry.status for _, entry in crew.results()] == [Status.CONVERTED] * 2


def taken_over(step: Step, *, then: Callable[[Workspace], object] = lambda _: None) -> Callable[[Step, Job], None]:
    """Return what has another worker take the model over once, as if this one had been away for long, at a step."""
    once = [True]

    def hook(reached: Step, job: Job) -> None:
        if reached is step and once and job.lease is not None:
            once.clear()
            other = elsewhere(key=job.key, process="")
            with db.session_scope(catalog(job.workspace)) as session:
                db.take_lease(session, other, seconds=60, instead_of=job.lease.record.owner)
            then(job.workspace)
            with db.session_scope(catalog(job.workspace)) as session:
                db.release_lease(session, other)

    return hook


@pytest.mark.parametrize("step", [Step.EXPORT, Step.REGISTER])
def test_who_was_away_for_too_long_takes_what_the_other_made(machines, model, step):
    mine, other = machines
    theirs = Files()
    made: list[ModelEntry] = []

    def convert(_: Workspace) -> None:
        # As the other would, whose lease is in the way of it here.
        with db.session_scope(catalog(mine)) as session:
            db.release_lease(session, elsewhere(key=key))
        made.append(convert_model(model, other, steps=theirs.steps))

    key = ""

    def note(reached: Step, job: Job) -> None:
        nonlocal key
        key = job.key
        hook(reached, job)

    hook = taken_over(step, then=convert)
    entry = convert_model(model, mine, steps=Files(hook=note).steps)
    (theirs_entry,) = made
    assert (theirs_entry.status, entry.status) == (Status.CONVERTED, Status.REUSED)
    assert entry.artifact == theirs_entry.artifact
    assert rows(mine) == ["converted"]
    assert len(artifact_folders(mine.store)) == 1
    for places in machines:
        assert_nothing_half_done(places.home, store=places.store)


def test_a_failure_of_who_was_away_is_nobodys(machines, model):
    """As of a child that ran out of time while its machine was suspended."""
    mine, other = machines
    files = Files(
        hook=taken_over(Step.EXPORT), faults={Step.EXPORT: [ModelError("late", kind=ErrorKind.EXPORT_FAILED)]}
    )
    entry = convert_model(model, mine, steps=files.steps)
    assert (entry.status, entry.notes) == (Status.CONVERTED, ())
    assert rows(mine) == ["converted"]
    assert not list((mine.home / "failures").glob("*"))
    assert convert_model(model, other, steps=Files().steps).status is Status.REUSED


def test_who_is_away_again_and_again_says_so(machines, model):
    mine = machines[0]

    def again(step: Step, job: Job) -> None:
        taken_over(Step.REGISTER)(step, job)

    files = Files(hook=again)
    entry = convert_model(model, mine, steps=files.steps)
    assert entry.error is not None
    assert (entry.status, entry.error.kind) == (Status.FAILED, ErrorKind.CATALOG)
    assert "taken over by another worker 3 times" in entry.error.message
    assert artifact_folders(mine.store) == set()
    assert_nothing_half_done(mine.home, store=mine.store)


def test_what_is_recorded_and_its_lease_go_together(places):
    """A worker killed right after would leave a lease that somebody else waits for."""
    with held_lease(places, KEY, stopping=threading.Event()) as held:

        def fail() -> None:
            with db.session_scope(catalog(places)) as session:
                held.settle(session)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert holder(places) == held.record, "what was not recorded is not done"
        with db.session_scope(catalog(places)) as session:
            held.settle(session)
        assert holder(places) is None


def test_an_answer_that_is_lost_is_no_second_record(machines, model, monkeypatch):
    """The catalog has recorded it all, and the connection breaks when it says so."""
    mine = machines[0]
    record, broken = db.record_conversion, [True]

    def once(session: Session, *args: object, **options: object) -> int:
        number = record(session, *args, **options)  # type: ignore[arg-type]
        if broken:
            broken.clear()
            session.commit()
            raise db.CatalogError("the connection broke", transient=True)
        return number

    monkeypatch.setattr(db, "record_conversion", once)
    entry = convert_model(model, mine, steps=Files().steps)
    assert entry.status is Status.REUSED
    assert rows(mine) == ["converted"]


def test_no_child_is_started_for_a_model_that_is_lost(places, model, monkeypatch):
    from tasks.job import run_child

    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 60.0)
    with held_lease(places, KEY, stopping=threading.Event()) as held:
        held._lost.set()
        job = Job(
            request=model, workspace=places, revision="", key=KEY, source=places.home, scratch=places.home,
            memory_bytes=1, weight_bytes=0, lease=held,
        )  # fmt: skip
        with pytest.raises(LeaseLostError):
            run_child(job, Step.EXPORT, "nothing", {})


def test_a_lease_costs_a_model_milliseconds(tmp_path):
    """On one machine with a catalog in a file, where nobody asks for leases."""
    places = workspace(tmp_path / "home")
    catalog(places)
    started = time.process_time()
    for number in range(100):
        with held_lease(places, f"{number:064x}", stopping=threading.Event()) as held:
            held.confirm()
    assert (time.process_time() - started) / 100 < 0.02
    assert catalog_rows(places.home) == []
    assert isinstance(held, Lease)
