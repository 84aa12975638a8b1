"""``ferry batch --watch``: a batch that somebody else runs, followed from the catalog."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from sqlalchemy import Engine, update
from typer.testing import CliRunner

import db
from db import BatchTotals, finish_batch, record_conversion, session_scope, start_batch
from flows import watch
from flows.batch import run_batch
from flows.cli import app
from onnx_config.errors import ErrorKind, InputError, TransientError
from tasks.report import Engine as BatchEngine
from tasks.report import ModelEntry, Status, Step
from tasks.request import SilentListener, Workspace
from tests.faults.harness import request, workspace
from tests.flows.test_catalog_commands import converted, failed

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FERRY_CATALOG_URL", raising=False)
    return workspace(tmp_path / "home")


@pytest.fixture
def engine(place: Workspace) -> Engine:
    made = db.make_engine(place.catalog_url)
    db.upgrade(made)
    return made


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["batch", *words])


def begin(engine: Engine, models: int | None = 3, **found: int) -> int:
    with session_scope(engine) as session:
        totals = None if models is None else BatchTotals(**found)
        return start_batch(session, engine="local", started_at=NOW, models=models, found=totals)


def record(engine: Engine, batch: int, *records: db.ConversionRecord) -> None:
    with session_scope(engine) as session:
        for one in records:
            record_conversion(session, one, batch_id=batch)


def end(engine: Engine, batch: int, **totals: int) -> None:
    with session_scope(engine) as session:
        finish_batch(session, batch, BatchTotals(**totals), finished_at=NOW + timedelta(minutes=2))


class Story:
    """What happens in the catalog between two looks, in place of waiting."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps = list(steps)
        self.now = 0.0

    def pause(self, seconds: float) -> None:
        self.now += seconds
        if self.steps:
            self.steps.pop(0)()

    def clock(self) -> float:
        return self.now


class Heard(SilentListener):
    def __init__(self) -> None:
        self.entries: list[ModelEntry] = []
        self.told: list[str] = []

    def model_started(self, model_id: str) -> None:
        self.told.append(f"{model_id}: started")

    def step_started(self, model_id: str, step: Step) -> None:
        self.told.append(f"{model_id}: {step}")

    def model_finished(self, entry: ModelEntry) -> None:
        self.entries.append(entry)


def followed(place: Workspace, story: Story, name: str = "1", quiet: list[float] | None = None) -> tuple[Any, Heard]:
    heard = Heard()
    tell: Callable[[float], None] = (quiet if quiet is not None else []).append
    batch = watch.find_batch(place, name)
    report = watch.watch_batch(batch, place, listener=heard, quiet=tell, pause=story.pause, clock=story.clock)
    return report, heard


def test_models_are_told_as_they_are_recorded_and_the_end_is_the_batchs_own(place, engine):
    batch = begin(engine, 4, reused=1)
    story = Story(
        lambda: record(engine, batch, converted(1)),
        lambda: record(engine, batch, failed(2), converted(3)),
        lambda: None,
        lambda: end(engine, batch, converted=2, reused=1, failed=1),
    )
    report, heard = followed(place, story)
    assert [(entry.id, entry.status) for entry in heard.entries] == [
        ("org/model-1", Status.CONVERTED),
        ("org/model-2", Status.FAILED),
        ("org/model-3", Status.CONVERTED),
    ]
    assert report.models == tuple(heard.entries)
    assert report.totals.model_dump() == {"converted": 2, "reused": 1, "failed": 1, "mismatch": 0}
    assert report.seconds == 120
    assert not report.all_verified


def test_models_in_work_are_told_with_their_steps(place, engine):
    batch = begin(engine, 2)
    one, two = (
        db.LeaseRecord(
            key=letter * 64,
            owner=letter,
            host="h",
            process_id=1,
            process="",
            model_id=f"org/model-{at}",
            batch_id=batch,
        )
        for at, letter in enumerate("ab", 1)
    )

    def work(*steps: tuple[db.LeaseRecord, str | None]) -> None:
        with session_scope(engine) as session:
            for lease, step in steps:
                db.take_lease(session, lease, seconds=60)
                db.note_step(session, lease, step)

    def done() -> None:
        with session_scope(engine) as session:
            db.release_lease(session, one)
            record_conversion(session, converted(1), batch_id=batch)

    story = Story(
        # Just begun: it may turn out to be done.
        lambda: work((two, "fetch")),
        lambda: work((one, "export")),
        lambda: None,
        lambda: work((one, "parity"), (two, None)),
        done,
        lambda: work((two, "register")),
        lambda: end(engine, batch, converted=2),
    )
    _, heard = followed(place, story)
    told = {name: [line.rpartition(" ")[2] for line in heard.told if name in line] for name in ("model-1", "model-2")}
    assert told == {"model-1": ["started", "export", "parity"], "model-2": ["started", "register"]}
    assert [entry.id for entry in heard.entries] == ["org/model-1"]


def test_a_number_that_appears_late_is_not_missed(place, engine):
    """Of two workers the one that got its number first may write last."""
    batch = begin(engine)
    record(engine, batch, *(converted(number) for number in range(1, 4)))

    def move(to: int | None) -> None:
        table = db.models.Conversion.__table__
        with session_scope(engine) as session:
            session.execute(update(table).where(table.c.id == 1).values(batch_id=to))

    move(None)
    story = Story(lambda: move(batch), lambda: end(engine, batch, converted=3))
    _, heard = followed(place, story)
    assert sorted(entry.id for entry in heard.entries) == ["org/model-1", "org/model-2", "org/model-3"]


def test_a_batch_that_says_nothing_for_long_is_wondered_about_again_and_again(place, engine):
    batch = begin(engine)
    quiet: list[float] = []
    wait = int(watch._QUIET_SECONDS / watch._POLL_SECONDS) + 2
    story = Story(*[lambda: None] * (2 * wait), lambda: end(engine, batch))
    followed(place, story, quiet=quiet)
    assert [round(seconds, -2) for seconds in quiet] == [600, 1200]


def test_a_catalog_that_is_away_is_waited_for_a_minute(place, engine, monkeypatch):
    batch = begin(engine)
    real = db.get_batch
    away = 0

    def get_batch(*words: Any) -> Any:
        nonlocal away
        if away:
            away -= 1
            raise db.CatalogError("away", transient=True)
        return real(*words)

    monkeypatch.setattr(db, "get_batch", get_batch)

    def leave(times: int) -> None:
        nonlocal away
        away = times

    report, _ = followed(place, Story(lambda: leave(20), *[lambda: None] * 25, lambda: end(engine, batch, converted=1)))
    assert report.totals.converted == 1
    second = begin(engine, 5, reused=1, failed=1)
    assert (watch.find_batch(place, "latest").found, watch.find_batch(place, "latest").to_record) == (2, 3)
    with pytest.raises(TransientError, match="away"):
        followed(place, Story(lambda: leave(1000)), str(second))


@pytest.mark.parametrize(
    ("name", "ended", "expected"),
    [
        pytest.param("latest", (1,), 2, id="the-newest-that-runs"),
        pytest.param("latest", (2,), 1, id="an-older-one-that-runs"),
        pytest.param("latest", (1, 2), 2, id="the-newest-of-those-that-ended"),
        pytest.param("1", (), 1, id="by-its-number"),
    ],
)
def test_find_batch(place, engine, name, ended, expected):
    for number in (1, 2):
        with session_scope(engine) as session:
            start_batch(session, engine="local", started_at=NOW + timedelta(minutes=number))
    for number in ended:
        end(engine, number)
    assert watch.find_batch(place, name).id == expected


@pytest.mark.parametrize("name", ["7", "0", "-1", "x", "", "9" * 30])
def test_no_such_batch(place, engine, name):
    begin(engine)
    with pytest.raises(InputError, match=r"No batch has the number .*; the newest are 1"):
        watch.find_batch(place, name)


# The command


def test_the_command_shows_the_models_the_errors_by_kind_and_what_to_type(place, engine):
    batch = begin(engine, 5, reused=1, failed=1)
    record(engine, batch, converted(1), failed(2), failed(3))
    end(engine, batch, converted=1, reused=1, failed=3)
    result = run("--watch", str(batch), "--report", "report.json")
    assert result.exit_code == 1, result.output
    assert "batch 1, since 2026-01-01 12:00 UTC, local: 5 models\n" in result.stdout
    assert "[1] converted org/model-1" in result.stdout
    assert "timeout: 2 models" in result.stdout
    assert "try again: ferry batch MANIFEST --retry-failed timeout" in result.stdout
    assert "5 models in 2:00:  1 converted  1 reused  0 mismatch  3 failed" in result.stdout
    assert "1 failed as in an earlier run" in result.stdout
    assert json.loads(Path("report.json").read_text())["totals"]["failed"] == 3


def test_a_batch_that_ended_well_is_a_zero(place, engine):
    batch = begin(engine, None)
    record(engine, batch, converted(1))
    end(engine, batch, converted=1)
    result = run("--watch", "latest")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "[1] converted org/model-1" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--watch", "7"], "there was none yet", id="no-batch"),
        pytest.param(["--watch", "1", "models.yaml"], "leave out the manifest", id="with-a-manifest"),
        pytest.param(["--watch", "1", "--retry-failed"], "leave out the manifest", id="with-options"),
        pytest.param([], "Missing argument 'MANIFEST'", id="nothing"),
    ],
)
def test_a_wrong_call_starts_nothing(place, engine, words, message):
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_without_a_catalog_none_is_made(place, tmp_path):
    result = run("--watch", "latest")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "There is no catalog here yet" in result.stderr
    assert list(tmp_path.iterdir()) == []


# A real one


def test_a_batch_says_how_many_models_it_has_and_what_it_knows_of_them(place, tmp_path):
    """Two folders without weights fail, are remembered, and are known the next time."""
    wanted = []
    for number in range(2):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type", "number": number}))
        wanted.append(request(folder))
    silent = SilentListener()
    words: dict[str, Any] = {"output": None, "workers": 1, "engine": BatchEngine.LOCAL, "listener": silent}
    first = run_batch(wanted, place, retry_failed=None, **words)
    assert {entry.error.kind for entry in first.models if entry.error} <= {ErrorKind.UNSUPPORTED, ErrorKind.BAD_INPUT}
    run_batch(wanted, place, retry_failed=None, **words)
    with session_scope(db.make_engine(place.catalog_url)) as session:
        session.execute(update(db.models.Batch.__table__).values(finished_at=None))
    one, two = watch.find_batch(place, "1"), watch.find_batch(place, "2")
    assert (one.models, two.models) == (2, 2)
    assert two.to_record in (0, 2)


def test_a_terminal_shows_a_bar_also_where_nobody_knows_the_end(place, engine):
    batch = begin(engine, None)
    record(engine, batch, failed(2))
    end(engine, batch, failed=1)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=20, _environ={"TERM": "xterm-256color"})
    report = watch.follow(str(batch), place, console)
    assert report.totals.failed == 1
    assert "failed" in file.getvalue()


def test_ctrl_c_ends_watching_and_not_the_batch(place, engine):
    batch = begin(engine)
    command = [sys.executable, "-m", "flows.entry", "batch", "--watch", str(batch)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("batch 1")
        child.send_signal(2)
        _, error = child.communicate(timeout=30)
    assert (child.returncode, error) == (130, "Interrupted.\n")
    with session_scope(engine, read_only=True) as session:
        found = db.get_batch(session, batch)
    assert found is not None
    assert found.finished_at is None
