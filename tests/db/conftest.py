"""One migrated catalog on each database for all tests; each works in a transaction that is rolled back.

A test that asks for ``session``, ``shared_engine`` or ``engine`` runs on SQLite and on PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from db import (
    ArtifactRecord,
    ConversionRecord,
    ErrorRecord,
    FileRecord,
    GraphRecord,
    OutputParityRecord,
    ParityCellRecord,
    ParityRecord,
    StepTiming,
    TensorRecord,
    make_engine,
    upgrade,
)

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def migrated(postgres: PostgresServer) -> str:
    """A database at the newest schema that others are copied from; a copy takes a tenth of a migration."""
    url = postgres.create()
    engine = make_engine(url)
    upgrade(engine)
    engine.dispose()
    return url.rpartition("/")[2]


def new_catalog(kind: str, folder: Path, request: pytest.FixtureRequest, *, empty: bool = False) -> str:
    """Return the URL of a new catalog, migrated or ``empty``."""
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.create() if empty else server.create(like=request.getfixturevalue("migrated"))
    url = f"sqlite:///{folder}/{'empty' if empty else 'own'}/catalog.db"
    if not empty:
        engine = make_engine(url)
        upgrade(engine)
        engine.dispose()
    return url


@pytest.fixture(scope="session", params=DATABASES)
def shared_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = make_engine(new_catalog(request.param, tmp_path_factory.mktemp("catalog"), request))
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def rolled_back(shared_engine: Engine) -> Callable[[], AbstractContextManager[Session]]:
    @contextmanager
    def open_session() -> Iterator[Session]:
        with shared_engine.connect() as connection:
            transaction = connection.begin()
            with Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
                yield session
            transaction.rollback()

    return open_session


@pytest.fixture
def session(rolled_back: Callable[[], AbstractContextManager[Session]]) -> Iterator[Session]:
    with rolled_back() as opened:
        yield opened


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A migrated catalog of the test's own, for what a rolled-back transaction cannot show."""
    engine = make_engine(new_catalog(request.param, tmp_path, request))
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    """A migrated SQLite catalog, for what only SQLite does."""
    engine = make_engine(f"sqlite:///{tmp_path}/own/catalog.db")
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def empty_engine(engine: Engine, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database with nothing in it, beside ``engine`` and of its kind."""
    other = make_engine(new_catalog(engine.dialect.name, tmp_path, request, empty=True))
    yield other
    other.dispose()


@pytest.fixture(params=DATABASES)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database with nothing in it."""
    return new_catalog(request.param, tmp_path, request, empty=True)


@pytest.fixture(scope="session")
def make_record() -> Callable[..., ConversionRecord]:
    """Return a function that makes a verified conversion; what is given replaces what it would say.

    ``number`` tells its key, model and artifact from those of others. With ``failure``, a kind, it failed.
    """

    def make(number: int = 1, *, failure: str | None = None, **changes: object) -> ConversionRecord:
        digest = f"{number:064x}"
        values: dict[str, object] = {
            "model_id": f"org/model-{number}",
            "key": digest,
            "requested_revision": "main",
            "revision": f"{number:040x}",
            "status": "converted" if failure is None else "failed",
            "task": "text-classification",
            "task_family": "text-classification",
            "model_type": "bert",
            "architecture": "BertForSequenceClassification",
            "template": "traced" if failure is None else None,
            "simplified": True,
            "options": {"device": "auto", "opset": None},
            "attempts": 1,
            "peak_rss_bytes": 900_000_000,
            "notes": ("an axis was fixed",),
            "timings": (StepTiming(step="fetch", seconds=0.5), StepTiming(step="export", seconds=8.0)),
            "environment": {"torch": "2.13.0", "onnx": "1.23.0"},
            "started_at": START,
            "finished_at": START + timedelta(seconds=number),
        }
        if failure is None:
            values["artifact"] = ArtifactRecord(
                sha256=digest,
                path=f"/store/{digest}",
                quarantined=False,
                size_bytes=1234,
                created_at=START,
                files=(
                    FileRecord(path="config.json", size_bytes=34, sha256="b" * 64),
                    FileRecord(path="model.onnx", size_bytes=1200, sha256="a" * 64),
                ),
                graphs=(
                    GraphRecord(
                        role="model",
                        path="model.onnx",
                        opset=20,
                        nodes=230,
                        nodes_before_simplify=340,
                        inputs=(
                            TensorRecord(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),
                            TensorRecord(name="attention_mask", dtype="int64", shape=("batch_size", 16)),
                        ),
                        outputs=(TensorRecord(name="logits", dtype="float32", shape=("batch_size", 2)),),
                    ),
                ),
            )
            values["parity"] = (
                ParityRecord(
                    verdict="verified",
                    device="cpu",
                    provider="CPUExecutionProvider",
                    shapes=5,
                    max_abs_diff=1.2e-6,
                    tolerance=1e-5,
                    axes_proven=("batch_size", "sequence_length"),
                    outputs=(OutputParityRecord(name="logits", max_abs_diff=1.2e-6, tolerance=1e-5, spread=2e-7),),
                    cells=(
                        ParityCellRecord(
                            graph="model",
                            provider="CPUExecutionProvider",
                            optimization="all",
                            dtype="float32",
                            shape="one row",
                            sizes={"batch_size": 1, "sequence_length": 13},
                            verdict="verified",
                            output="logits",
                            max_abs_diff=1.2e-6,
                            tolerance=1e-5,
                        ),
                    ),
                    session={"intra_op_num_threads": 1},
                    environment={"torch": "2.13.0", "onnx": "1.23.0"},
                    checked_at=START,
                ),
            )
        else:
            values["error"] = ErrorRecord(
                kind=failure, message="it broke", step="export", reproduce=f"ferry convert org/model-{number}"
            )
        return ConversionRecord(**(values | changes))  # type: ignore[arg-type]

    return make
