"""A catalog with some thousand attempts: what is found is what is there, and no question reads a large table whole.

`tests/benchmarks/bench_catalog.py` asks the same of a million, and how long it takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from db import (
    ErrorRecord,
    count_conversions,
    list_conversions,
    make_engine,
    quarantine_artifact,
    record_conversion,
    search,
    session_scope,
)
from db.dashboard import create_app
from db.listing import ConversionFilter, count_up_to, list_page
from db.models import Base, Conversion, ConversionTotal, GroupedTotal, SourceModel
from db.search import TextSearch, known_values
from tests.db.bulk import OLD_ORG, RARE_WORD, BulkCatalog, fill_in_bulk
from tests.db.catalog_queries import QUERIES
from tests.db.conftest import DATABASES, new_catalog
from tests.db.plans import plan_of, statements_of

LARGE = {table.name for table in Base.metadata.sorted_tables} - {"environments", "templates", "batches", "leases"}


@pytest.fixture(scope="module", params=DATABASES)
def filled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, BulkCatalog]]:
    engine = make_engine(new_catalog(request.param, tmp_path_factory.mktemp("bulk"), request, empty=True))
    yield engine, fill_in_bulk(engine, conversions=2000, models=800)
    engine.dispose()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the search take every one of its ways in a catalog of this size: what is far back by its indexes alone."""
    for name, value in (("_LOOK_FIRST", 40), ("_LOOK_ON", 80), ("_COUNTED_AMONG", 80), ("_FEW_MODELS", 30)):
        monkeypatch.setattr(search, name, value)


def is_like_another(name: str) -> bool:
    """Return whether a question differs from another one by its words or its page alone."""
    if name.startswith("overview: "):
        return bool(re.search(r", (24h|7d|30d|90d)|all, (task|type|worker)", name)) and "status" not in name
    return bool(re.search("how many|in the middle|every attempt|wildcard|absent|an organisation|: failed,", name))


NAMES = [pytest.param(name, marks=pytest.mark.slow if is_like_another(name) else ()) for name in QUERIES]


@pytest.mark.parametrize("name", NAMES)
def test_no_question_reads_a_large_table_whole(filled, narrow, name):
    engine, catalog = filled
    with session_scope(engine, read_only=True) as session:
        statements = statements_of(session, lambda session: QUERIES[name](session, catalog, 1))
        connection = session.connection()
        if engine.dialect.name == "postgresql":
            # In tables of this size that is the faster way; this asks what could be done without.
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        steps = [step for statement in statements for step in plan_of(connection, statement)]
    assert statements
    scans = {step.removeprefix("scan ") for step in steps if step.startswith("scan ")} & LARGE
    # SQLite's index has three letters in a row: fewer are looked for in the ids of all models.
    allowed = {"source_models"} if engine.dialect.name == "sqlite" and "two letters" in name else set()
    assert scans <= allowed, steps


TEXTS = ["BERT", RARE_WORD, f"{OLD_ORG}/", "no-such", "t5", "a", "%", "_", "é", "token-class", "odd_1", "Add_97 was"]
MORE_TEXTS = [
    "bert", "org-3/", "zq", "/", "100%", "\\", '"', "'", "ß", "forctc", "leave the axis", "attention/add_", "ODD_",
]  # fmt: skip


@pytest.mark.parametrize("latest_only", [True, False])
@pytest.mark.parametrize("words", [*TEXTS, *(pytest.param(text, marks=pytest.mark.slow) for text in MORE_TEXTS)])
def test_a_search_finds_what_reading_everything_finds(filled, narrow, words, latest_only):
    engine, _ = filled
    with session_scope(engine, read_only=True) as session:
        expected = read_everything(session, words, latest_only=latest_only, everywhere=True)
        found = list_conversions(session, text=words, latest_only=latest_only, limit=70)
        assert [record.id for record in found] == expected[:70]
        later = list_conversions(session, text=words, latest_only=latest_only, limit=5, offset=20)
        assert [record.id for record in later] == expected[20:25]
        assert count_conversions(session, text=words, latest_only=latest_only) == len(expected)
        assert count_conversions(session, text=words, latest_only=latest_only, most=9) == min(9, len(expected))
        expected = read_everything(session, words, latest_only=latest_only, everywhere=False)
        wanted = ConversionFilter(text=words, every=not latest_only)
        seen: list[int] = []
        page = list_page(session, wanted, limit=60)
        seen += [row.id for row in page.rows]
        while page.next is not None and len(seen) < 300:
            page = list_page(session, wanted, limit=60, after=page.next)
            seen += [row.id for row in page.rows]
        assert seen == expected[: len(seen)]
        assert page.next is not None or len(seen) == len(expected)
        counted = count_up_to(session, wanted, most=50)
        assert counted.number <= min(50, len(expected))
        assert not counted.exact or counted.number == len(expected)


def read_everything(session: Session, words: str, *, latest_only: bool, everywhere: bool) -> list[int]:
    columns = (Conversion.task, Conversion.model_type, Conversion.architecture, Conversion.error_message)
    query = select(Conversion.id, Conversion.latest, SourceModel.model_id, *columns).join(
        SourceModel, SourceModel.id == Conversion.source_model_id
    )
    if len(words) < 3:
        query = query.with_only_columns(*query.selected_columns[:-1])
    return [
        number
        for number, latest, model, *rest in session.execute(
            query.order_by(Conversion.finished_at.desc(), Conversion.id.desc())
        )
        if (latest or not latest_only)
        and any(words.lower() in (said or "").lower() for said in (model, *(rest if everywhere else ())))
    ]


def test_what_is_added_and_changed_is_found_by_its_index(engine, make_record, monkeypatch):
    monkeypatch.setattr(search, "_LOOK_FIRST", 0)
    monkeypatch.setattr(search, "_LOOK_ON", 0)

    def found(words: str) -> list[str]:
        with session_scope(engine, read_only=True) as session:
            return [record.model_id for record in list_conversions(session, text=words)]

    with session_scope(engine) as session:
        record_conversion(session, make_record(1, model_id="org/first"))
        record_conversion(session, make_record(2, model_id="Straße/日本語モデル", failure="timeout"))
    assert found("ORG/FIR") == ["org/first"]
    assert found("本語モ") == found("straße") == found("it broke") == ["Straße/日本語モデル"]
    error = ErrorRecord(kind="mismatch", message="no longer true", step="parity", reproduce="x")
    with session_scope(engine) as session:
        quarantine_artifact(session, f"{1:064x}", path="/elsewhere", error=error)
    assert found("longer") == ["org/first"]
    with session_scope(engine) as session:
        again = ErrorRecord(kind="mismatch", message="quite another", step="parity", reproduce="x")
        session.execute(Conversion.__table__.update().where(Conversion.id == 1).values(error_message=again.message))
    assert found("longer") == []
    assert found("another") == ["org/first"]


def test_without_the_index_a_search_finds_the_same(sqlite_engine, make_record):
    """As where SQLite was built without it."""
    with session_scope(sqlite_engine) as session:
        record_conversion(session, make_record(1))
        for table in search.SEARCH_OBJECTS:
            for when in ("insert", "update", "delete"):
                session.execute(text(f"DROP TRIGGER {table}_{when}"))
            session.execute(text(f"DROP TABLE {table}"))
        record_conversion(session, make_record(2, failure="timeout"))
        assert [record.id for record in list_conversions(session, text="model-")] == [2, 1]
        assert [record.id for record in list_conversions(session, text="it broke")] == [2]
        assert TextSearch(text="model-").count(session, most=5) == (2, True)


def test_known_values_are_all_that_there_are(filled):
    engine, _ = filled
    with session_scope(engine, read_only=True) as session:
        for place in (Conversion.task, Conversion.model_type, Conversion.architecture):
            there = set(session.scalars(select(place).where(place.is_not(None)).distinct()))
            assert known_values(session, place) == sorted(there)


@pytest.mark.parametrize(("dimension", "column"), [("all", None), ("task", "task"), ("model_type", "model_type")])
def test_totals_in_groups_add_up_to_all_attempts(filled, dimension, column):
    engine, catalog = filled
    with session_scope(engine, read_only=True) as session:
        for span in ("hour", "day"):
            query = select(func.sum(GroupedTotal.conversions)).where(
                GroupedTotal.dimension == dimension, GroupedTotal.span == span
            )
            assert session.execute(query).scalar_one() == catalog.conversions
        if column is not None:
            ours, theirs = select(GroupedTotal.word), select(getattr(ConversionTotal, column))
            assert set(session.scalars(ours.where(GroupedTotal.dimension == dimension))) == set(session.scalars(theirs))


@pytest.mark.parametrize(
    "path",
    ["/", "/?period=all", "/models", "/models?q=bert", "/models?q=zq&every=true", "/models/1999", "/runs", "/runs/3"],
)
def test_a_page_is_small_with_all_that_it_loads(filled, path):
    """300 kB at most, without the charts' library; a run of 500 models has the most to draw."""
    engine, _ = filled
    client = TestClient(create_app(engine), base_url="http://127.0.0.1")
    page = client.get(path)
    assert page.status_code == 200
    assets = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text))
    assert {"/static/app.css", "/static/htmx.min.js"} <= assets
    loaded = sum(len(client.get(name).content) for name in assets if "uplot" not in name)
    assert len(page.content) + loaded < 300_000
    if path.startswith("/runs/"):
        assert page.text.count("<title>") == 1 + 300
        assert re.search(r"<title>\S+: fetch [\d.]+ s, .*, converted</title><rect class=\"step-fetch\"", page.text)
