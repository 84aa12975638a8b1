"""A catalog is copied whole, once, and into nothing that belongs to another."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

import db
from db import (
    CatalogError,
    ConversionRecord,
    copy_catalog,
    copying,
    make_engine,
    record_conversion,
    session_scope,
    upgrade,
)
from tests.db.conftest import START, new_catalog
from tests.db.contents import content, fill

ROOT = Path(__file__).parents[2]
MakeRecord = Callable[..., ConversionRecord]


@pytest.fixture
def source(sqlite_engine: Engine, make_record: MakeRecord) -> Engine:
    """A catalog with something in every table."""
    fill(sqlite_engine, make_record)
    return sqlite_engine


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(new_catalog(request.param, tmp_path / "target", request, empty=True))
    yield engine
    engine.dispose()


def test_a_copy_is_equal_row_by_row(source, target):
    done = copy_catalog(source, target)
    assert content(source) == content(target)
    assert min(len(rows) for rows in content(target).values()) > 0
    counts = {name: len(rows) for name, rows in content(source).items() if name not in copying._NOT_COPIED}
    assert {part.table: part.rows for part in done} == counts
    assert all(part.written == part.rows for part in done)


def test_copying_again_writes_nothing(source, target):
    copy_catalog(source, target)
    assert sum(part.written for part in copy_catalog(source, target)) == 0


def test_what_came_or_changed_since_is_copied_too(source, target, make_record):
    copy_catalog(source, target)
    fill(source, make_record, first=5, count=4)
    with session_scope(source) as session:
        db.note_template(session, f"{1:064x}", architecture="BertModel", size_bytes=20, reused=True, at=START)
    assert sum(part.written for part in copy_catalog(source, target)) > 0
    assert content(source) == content(target)


def test_the_copy_goes_on_as_a_catalog(source, target, make_record):
    copy_catalog(source, target)
    with session_scope(target) as session:
        number = record_conversion(session, make_record(77))
        found = db.get_conversion(session, number)
        assert found is not None
        assert found.model_id == "org/model-77"
        assert db.count_conversions(session, latest_only=False) == number


def test_a_copy_that_was_cut_is_completed(source, target, monkeypatch):
    monkeypatch.setattr(copying, "_ROWS_PER_PART", 3)
    seen: list[str] = []

    def stop(done: db.Copied) -> None:
        seen.append(done.table)
        if done.table == "conversions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_catalog(source, target, listener=stop)
    assert content(source) != content(target)
    copy_catalog(source, target)
    assert content(source) == content(target)


def test_a_copy_that_was_killed_is_completed(source, target):
    code = (
        "import sys, time\nimport db\nfrom db import copying\ncopying._ROWS_PER_PART = 2\n"
        "seen = lambda done: (print(done.table, flush=True), time.sleep(60 if done.table == 'graphs' else 0))\n"
        "db.copy_catalog(db.make_engine(sys.argv[1]), db.make_engine(sys.argv[2]), listener=seen)\n"
    )
    words = [str(engine.url) for engine in (source, target)]
    with subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert "graphs\n" in iter(child.stdout.readline, "")
        child.send_signal(signal.SIGKILL)
    copy_catalog(source, target)
    assert content(source) == content(target)


def test_a_target_with_other_content_is_refused_and_left_alone(source, target, make_record):
    upgrade(target)
    fill(target, make_record, first=40, count=1)
    before = content(target)
    with pytest.raises(CatalogError, match=r"holds other content .* Nothing was copied\. Name an empty database"):
        copy_catalog(source, target)
    assert content(target) == before


def test_a_copy_that_has_gone_its_own_way_is_refused(source, target, make_record):
    copy_catalog(source, target)
    with session_scope(target) as session:
        record_conversion(session, make_record(99))
    with pytest.raises(CatalogError, match="holds other content"):
        copy_catalog(source, target)


def test_a_target_that_changes_meanwhile_is_told(source, target):
    def meddle(done: db.Copied) -> None:
        if done.table == "environments":
            with target.begin() as connection:
                connection.execute(text("UPDATE environments SET sha256 = replace(sha256, '0', '1')"))

    with pytest.raises(CatalogError, match=r"differs from the catalog in its table environments: something else"):
        copy_catalog(source, target, listener=meddle)


def test_a_catalog_is_not_copied_into_itself(source):
    with pytest.raises(CatalogError, match="into itself"):
        copy_catalog(source, make_engine(str(source.url)))


def test_the_order_is_that_of_references(source, target):
    order = [part.table for part in copy_catalog(source, target)]
    assert order.index("source_models") < order.index("revisions") < order.index("conversions")
    assert order.index("conversions") < order.index("parity_checks") < order.index("parity_outputs")
