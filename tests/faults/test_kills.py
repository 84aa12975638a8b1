"""Killed in the middle: one model of a batch, or the batch itself; the next run continues where it was.

One home goes through it all, as a user's would: each test begins with what the one before it left.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from tests.faults.harness import (
    alive,
    artifact_folders,
    assert_nothing_half_done,
    assert_whole,
    catalog_rows,
    ferry,
    killed_at_the_end,
    read_report,
    start,
    tiny,
    wait_until,
    write_manifest,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="isolation is built on Linux's process control"),
    pytest.mark.usefixtures("in_order"),
]
WORDS = ("batch", "models.json", "--engine", "local", "--workers", "1", "--output", "out", "--report", "report.json")


@dataclass(frozen=True)
class Place:
    """A folder with two models and a manifest; ``home`` is what the batches before have left."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def report(self) -> dict[str, dict[str, Any]]:
        return read_report(self.folder / "report.json")

    def scratch(self) -> list[Path]:
        return [path for path in (self.home / "tmp").glob("*") if path.is_dir()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("kills")
    tiny(folder / "victim")
    # Of another structure: what the other one has traced would spare the victim its export.
    tiny(folder / "other", "vit-model")
    write_manifest(folder / "models.json", ["./victim", "./other"])
    return Place(folder)


@pytest.fixture(scope="module")
def broken() -> list[str]:
    return []


@pytest.fixture
def in_order(request: pytest.FixtureRequest, broken: list[str]) -> Iterator[None]:
    """Skip what builds on a test that has failed."""
    if broken:
        pytest.skip(f"builds on {broken[0]}, which failed")
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        broken.append(request.node.name)


@dataclass(frozen=True)
class Running:
    """A batch whose first model is being exported."""

    process: Any
    server: psutil.Process
    child: psutil.Process

    @property
    def family(self) -> list[psutil.Process]:
        return [self.server, self.child]


@pytest.fixture
def exporting(place: Place) -> Iterator[Running]:
    """Start the batch and wait until the victim's export is on its way."""
    (place.folder / "report.json").unlink(missing_ok=True)
    with killed_at_the_end(start(*WORDS, home=place.home, cwd=place.folder)) as process:
        family = psutil.Process(process.pid)

        def child() -> tuple[psutil.Process, psutil.Process] | None:
            assert process.poll() is None, process.communicate()
            # The log is begun by the child itself, once it has its job.
            if not list((place.home / "tmp").glob("victim*/export/export-of*.log")):
                return None
            # A child of the step before may still be on its way out.
            for server in family.children():
                for inner in server.children():
                    with suppress(psutil.Error):
                        if Path(inner.cwd()).name == "export":
                            return server, inner
            return None

        server, inner = wait_until(child, 120)
        yield Running(process, server, inner)


def assert_all_gone(running: Running, seconds: float = 10) -> None:
    wait_until(lambda: not alive(running.family), seconds)


def test_a_killed_child_costs_its_model_and_no_other(place, exporting):
    exporting.child.send_signal(signal.SIGKILL)
    assert exporting.process.wait(240) == 1
    models = place.report()
    error = models["victim"]["error"]
    assert (error["kind"], error["step"]) == ("crashed", "export")
    assert "died of SIGKILL" in error["message"]
    assert "export of ./victim" in error["message"]
    assert error["reproduce"] == "ferry convert ./victim"
    assert models["victim"]["attempts"] == 1
    assert models["other"]["status"] == "converted"
    assert_nothing_half_done(place.home, place.folder / "out")
    assert_all_gone(exporting)


def test_a_killed_batch_leaves_no_process_and_nothing_torn(place, exporting):
    exporting.process.kill()
    exporting.process.wait()
    assert_all_gone(exporting)
    # The report holds what had ended by then.
    assert {name: model["status"] for name, model in place.report().items()} == {"other": "reused"}
    # What it had in work is still there, and nobody holds it.
    (scratch,) = place.scratch()
    with FileLock(f"{scratch}.lock", timeout=1):
        assert (scratch / "export").is_dir()
    for lock in (place.home / "locks").iterdir():
        with FileLock(lock, timeout=1):
            pass
    (folder,) = artifact_folders(place.home / "artifacts")
    assert_whole(folder)
    assert [row.status for row in catalog_rows(place.home)] == ["failed", "converted"]


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, id="interrupted"), pytest.param(signal.SIGTERM, 143, id="terminated")],
)
def test_a_batch_that_is_asked_to_end_does_so_at_once(place, exporting, number, code):
    rows = len(catalog_rows(place.home))
    asked = time.monotonic()
    exporting.process.send_signal(number)
    _, err = exporting.process.communicate(timeout=30)
    assert time.monotonic() - asked < 10
    assert exporting.process.returncode == code
    assert "Traceback" not in err
    assert_all_gone(exporting, 1)
    # That a user went home says nothing about a model; and what a killed batch left is gone since this one began.
    assert len(catalog_rows(place.home)) == rows
    assert_nothing_half_done(place.home, place.folder / "out")


def test_the_next_run_continues_where_it_was(place):
    done = ferry(*WORDS, home=place.home, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    models = place.report()
    assert {name: entry["status"] for name, entry in models.items()} == {"victim": "converted", "other": "reused"}
    assert_nothing_half_done(place.home, place.folder / "out")
    assert {path.name for path in (place.folder / "out").iterdir()} == {"victim", "other"}
    assert [(row.model_id.rpartition("/")[2], row.status) for row in catalog_rows(place.home)] == [
        ("victim", "failed"),
        ("other", "converted"),
        ("victim", "converted"),
    ]
