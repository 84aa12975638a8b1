"""The dashboards of Grafana: the files are what the code writes, and every query is one that PostgreSQL answers."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row
from ruamel.yaml import YAML
from sqlalchemy import Engine

from db import make_engine, session_scope
from db.overview import OverviewFilter, Period, artifact_sizes, count_by, current_totals
from tests.db.bulk import BulkCatalog, fill_in_bulk

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

DEPLOY = Path(__file__).parents[1] / "deploy"
GRAFANA = DEPLOY / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
DASHBOARDS: dict[str, dict[str, Any]] = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
# What a reader has chosen in a variable.
CHOSEN = {"task": ["*", "fill-mask", "it's; none"], "run": ["1"]}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                yield f"{name}: {panel['title']}", panel


PANELS = dict(panels())


def queries() -> list[Any]:
    found = []
    for name, panel in PANELS.items():
        (target,) = panel["targets"]
        sql = target["rawSql"]
        (used,) = {*re.findall(r"\$\{(\w+):sqlstring\}", sql)} or {""}
        found += [pytest.param(name, chosen, id=f"{name} ({chosen})") for chosen in CHOSEN.get(used, [""])]
    return found


def builder() -> ModuleType:
    path = GRAFANA / "build_dashboards.py"
    spec = importlib.util.spec_from_file_location("build_dashboards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_code_writes() -> None:
    built = builder().dashboard_files()
    assert built == {path.name: path.read_text(encoding="utf-8") for path in FILES}, (
        "python deploy/grafana/build_dashboards.py writes them"
    )


def test_every_panel_has_a_place_of_its_own_and_asks_the_source_that_is_provided() -> None:
    yaml = YAML(typ="safe", pure=True)
    sources = {source["uid"]: source for source in yaml.load(GRAFANA / "datasource.yaml")["datasources"]}
    (default,) = [uid for uid, source in sources.items() if source.get("isDefault")]
    assert default == "ferry-catalog"
    for dashboard in DASHBOARDS.values():
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            places = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not taken & places, panel["title"]
            taken |= places
            assert at["x"] + at["w"] <= 24
            for asked in [panel, *panel.get("targets", ())]:
                if panel["type"] != "row":
                    assert asked["datasource"] == {"type": sources[default]["type"], "uid": default}
        for variable in dashboard["templating"]["list"]:
            assert variable["datasource"]["uid"] == default
    provided = yaml.load(GRAFANA / "provider.yaml")["providers"][0]["options"]["path"]
    mounted = yaml.load(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provided}:ro" in mounted


# On a PostgreSQL


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server of its own, since users are of a server and not of a database."""
    from tests.postgres import PostgresServer

    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def filled(server: PostgresServer) -> Iterator[tuple[Engine, BulkCatalog]]:
    engine = make_engine(server.create())
    catalog = fill_in_bulk(engine, conversions=1500, models=600)
    # The lines that the compose file has run, with psql's own words carried out.
    script = (DEPLOY / "postgres-init.sql").read_text(encoding="utf-8")
    script = re.sub(r"^\\getenv \w+ GRAFANA_DATABASE_PASSWORD$", "", script, flags=re.MULTILINE)
    lines = [line for line in script.replace(":'password'", "'secret'").splitlines() if not line.startswith("--")]
    for statement in "\n".join(lines).split(";"):
        if statement.strip():
            server.run(statement)
    yield engine, catalog
    engine.dispose()


@pytest.fixture
def reader(server: PostgresServer, filled: tuple[Engine, BulkCatalog]) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection as Grafana has it: in the time zone of the server, and as the user that may only read."""
    address = f"host=127.0.0.1 port={server.port} user=grafana dbname={filled[0].url.database}"
    with psycopg.connect(address, row_factory=dict_row) as connection:
        yield connection


def expanded(sql: str, catalog: BulkCatalog, chosen: str) -> str:
    """Return what Grafana sends: macros and variables are texts that it puts in. A value for all stands as it is."""
    # An hour or day counts where it begins in the period.
    day = timedelta(days=1)
    begin, end = (f"'{moment:%Y-%m-%dT%H:%M:%SZ}'" for moment in (catalog.began_at - day, catalog.ended_at + day))
    sql = re.sub(r"\$__timeFilter\(([\w.]+)\)", rf"\1 BETWEEN {begin} AND {end}", sql)
    sql = sql.replace("$__timeFrom()", begin).replace("$__timeTo()", end)
    quoted = "'" + chosen.replace("'", "''") + "'"
    sql = re.sub(r"\$\{\w+:sqlstring\}", lambda _: quoted, sql)
    assert "$" not in sql
    return sql


@pytest.mark.parametrize(("name", "chosen"), queries())
def test_a_panels_query_has_an_answer(reader, filled, name, chosen):
    _, catalog = filled
    (target,) = PANELS[name]["targets"]
    cursor = reader.execute(expanded(target["rawSql"], catalog, chosen).encode())
    rows = cursor.fetchall()
    assert rows or chosen.startswith("it's")
    if target["format"] == "time_series":
        assert [column.name for column in cursor.description] == ["time", "metric", "value"]
        times = [row["time"] for row in rows]
        assert times == sorted(times)
        assert all(time.tzinfo is not None for time in times)


@pytest.mark.parametrize("dashboard", sorted(DASHBOARDS))
def test_what_a_variable_offers_can_be_chosen(reader, filled, dashboard):
    for variable in DASHBOARDS[dashboard]["templating"]["list"]:
        offered = [next(iter(row.values())) for row in reader.execute(variable["query"].encode()).fetchall()]
        assert offered
        assert str(CHOSEN[variable["name"]][-1 if variable["name"] == "run" else 1]) in map(str, offered)


def test_the_figures_are_those_of_our_own_dashboard(reader, filled):
    engine, catalog = filled

    def rows(name: str, chosen: str = "*") -> list[dict[str, Any]]:
        sql = PANELS[f"catalog.json: {name}"]["targets"][0]["rawSql"]
        return reader.execute(expanded(sql, catalog, chosen).encode()).fetchall()

    with session_scope(engine, read_only=True) as session:
        for chosen, task in (("*", None), ("fill-mask", "fill-mask")):
            wanted = OverviewFilter(period=Period.ALL, now=catalog.ended_at, task=task)
            (attempts,) = rows("Attempts", chosen)
            assert {name: number for name, number in attempts.items() if number} == count_by(session, wanted, "status")
            failures = {row["kind"]: row["attempts"] for row in rows("Why attempts failed", chosen)}
            assert failures == count_by(session, wanted, "error_kind")
        now = {row["status"]: row["models"] for row in rows("Models by their last attempt")}
        assert now == {name: getattr(current_totals(session), name) for name in now}
        (sizes,) = rows("Artifacts")
        assert sizes["served"] == artifact_sizes(session).served_bytes


def test_the_user_of_grafana_writes_nothing_and_sees_no_other_database(server, reader):
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        reader.execute("DELETE FROM parity_cells")
    reader.rollback()
    reader.execute("SET TRANSACTION READ WRITE")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute("DELETE FROM parity_cells")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(f"host=127.0.0.1 port={server.port} user=grafana dbname=prefect")
