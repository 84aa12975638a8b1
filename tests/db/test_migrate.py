"""The schema: what migrations build is what the models say, whoever builds it, and when."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, MetaData, Table, event, insert, inspect, select, text

from db import (
    CatalogVersionError,
    copying,
    count_conversions,
    find_conversion,
    is_current,
    make_engine,
    record_conversion,
    schema_version,
    session_scope,
    upgrade,
)
from db.migrate import HEAD, alembic_config
from db.models import Base
from db.search import SEARCH_OBJECTS
from tests.db.contents import fill

ROOT = Path(__file__).parents[2]


def test_head_is_the_only_newest_revision():
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD]


def test_models_and_migrations_agree(shared_engine):
    with shared_engine.connect() as connection:
        # What no model declares is of another kind on each database.
        options = {"compare_type": True, "include_name": lambda name, *_: not str(name).startswith(SEARCH_OBJECTS)}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_models_and_migrations_agree_on_checks(engine, empty_engine):
    """Alembic does not compare them, and PostgreSQL gives them back in words of its own."""
    Base.metadata.create_all(empty_engine)
    declared, built = inspect(empty_engine), inspect(engine)
    for table in Base.metadata.sorted_tables:
        one, other = (
            sorted((check["name"], check["sqltext"]) for check in found.get_check_constraints(table.name))
            for found in (declared, built)
        )
        assert one == other, table.name


def test_every_constraint_and_index_has_a_name(engine):
    found = inspect(engine)
    for table in Base.metadata.sorted_tables:
        parts = [found.get_pk_constraint(table.name), *found.get_foreign_keys(table.name)]
        parts += [*found.get_unique_constraints(table.name), *found.get_indexes(table.name)]
        assert [part for part in parts if not part["name"]] == [], table.name


def test_a_downgrade_leaves_nothing(engine):
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    assert schema_version(engine) is None


def test_an_absent_catalog_has_no_version_and_stays_absent(tmp_path):
    engine = make_engine(f"sqlite:///{tmp_path}/none/catalog.db")
    assert schema_version(engine) is None
    assert not is_current(engine)
    assert list(tmp_path.iterdir()) == []


def test_upgrading_again_changes_nothing_and_is_one_look(engine):
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    upgrade(engine)
    looked = len(statements)
    assert is_current(engine)
    assert looked <= len(statements) - looked, "it looks at more than asking does"
    assert not [sql for sql in statements if sql.startswith(("CREATE", "INSERT", "UPDATE", "BEGIN IMMEDIATE"))]


def test_a_current_catalog_needs_no_alembic(sqlite_engine):
    code = "import sys, db; db.upgrade(db.make_engine(sys.argv[1])); print('alembic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(sqlite_engine.url)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_an_empty_file_becomes_a_catalog(tmp_path):
    (tmp_path / "catalog.db").touch()
    engine = make_engine(f"sqlite:///{tmp_path}/catalog.db")
    assert schema_version(engine) is None
    upgrade(engine)
    assert schema_version(engine) == HEAD
    engine.dispose()


def test_a_catalog_in_memory():
    engine = make_engine("sqlite://")
    upgrade(engine)
    assert is_current(engine)
    engine.dispose()


def test_a_newer_catalog_is_refused(engine):
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(CatalogVersionError, match=r"schema version '9999'.* newer onnx-ferry: upgrade this"):
        upgrade(engine)
    assert schema_version(engine) == "9999"


def test_two_processes_upgrade_at_once(empty_url):
    code = (
        "import sys, db, alembic.command; print('ready', flush=True); sys.stdin.readline(); "
        "engine = db.make_engine(sys.argv[1]); db.upgrade(engine); print(db.schema_version(engine)); "
        "engine.dispose()"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, empty_url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    answers = [child.communicate(timeout=60) for child in children]
    assert answers == [(f"{HEAD}\n", "")] * 2


def test_a_migration_killed_in_the_middle_leaves_nothing(empty_url):
    url = empty_url
    code = (
        "import sys, time, db\nfrom db import migrate\n"
        "with db.make_engine(sys.argv[1]).begin() as connection:\n"
        "    migrate._run_alembic(connection)\n    print('migrated', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, url], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "migrated\n"
        child.send_signal(signal.SIGKILL)
    engine = make_engine(url)
    assert schema_version(engine) is None
    assert inspect(engine).get_table_names() == []
    upgrade(engine)
    assert is_current(engine)
    engine.dispose()


def rows_of(engine: Engine, table: Table) -> list[str]:
    with engine.connect() as connection:
        # As text, since NaN is not equal to itself.
        return [repr(tuple(row)) for row in connection.execute(select(table).order_by(table.c.id))]


EARLIER = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][:0:-1]


@pytest.mark.parametrize("revision", EARLIER)
def test_a_catalog_of_every_earlier_revision_keeps_what_is_in_it(engine, empty_engine, make_record, revision):
    fill(engine, make_record)
    old = empty_engine
    with old.begin() as connection:
        command.upgrade(alembic_config(connection), revision)
    then = MetaData()
    then.reflect(old)
    tables = [table for table in then.sorted_tables if table.name in Base.metadata.tables and "id" in table.c]
    for table in tables:
        # What counts itself counts there too, and a lease is nobody's content.
        if table.name in copying._NOT_COPIED:
            continue
        # What that revision could hold of a catalog of today.
        columns = [column.name for column in table.columns]
        names = [name for name in columns if name in Base.metadata.tables[table.name].c]
        assert names == columns
        with old.begin() as connection, engine.connect() as today:
            listed = today.execute(select(*(Base.metadata.tables[table.name].c[name] for name in names)))
            values = [dict(row._mapping) for row in listed]
            assert values
            connection.execute(insert(Base.metadata.tables[table.name]), values)
            copying._count_on_from(connection, table)
    before = {table.name: rows_of(old, table) for table in tables}
    assert all(before.values())
    upgrade(old)
    assert is_current(old)
    for table in tables:
        assert rows_of(old, table) == before[table.name], table.name
    with session_scope(old) as session:
        assert count_conversions(session, latest_only=False) == len(before["conversions"])
        record_conversion(session, make_record(50))
        assert find_conversion(session, "org/model-50") is not None
        assert find_conversion(session, "org/model-2") is not None
