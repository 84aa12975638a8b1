"""Writes the dashboards that Grafana shows over the catalog on PostgreSQL.

    python deploy/grafana/build_dashboards.py

The files under ``dashboards`` are what this writes and are committed, so that nobody who runs Grafana needs it; a test
holds them equal, and runs every panel's SQL.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, common, piechart, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, QueryVariable, Row
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphDrawStyle, StackingMode, VizOrientation
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DynamicConfigValue,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

# As a script this file is alone in its folder's name space.
sys.path.insert(0, str(Path(__file__).parent))

import queries

__all__ = ["DASHBOARDS", "SOURCE", "dashboard_files", "main"]

DASHBOARDS = Path(__file__).parent / "dashboards"

SOURCE = DataSourceRef(type_val="grafana-postgresql-datasource", uid="ferry-catalog")
"""As ``datasource.yaml`` provides it."""

_Panel = TypeVar("_Panel", stat.Panel, timeseries.Panel)
_STATUSES = {"converted": "green", "reused": "blue", "mismatch": "orange", "failed": "red"}


class SqlQuery(variants.Dataquery):
    """A query of Grafana's PostgreSQL source, for which the SDK has no class."""

    def __init__(self, sql: str, *, series: bool) -> None:
        self._sql = sql
        self._series = series

    def to_json(self) -> dict[str, object]:
        """Return it as Grafana keeps it."""
        return {
            "refId": "A",
            "datasource": SOURCE,
            "editorMode": "code",
            "format": "time_series" if self._series else "table",
            "rawQuery": True,
            "rawSql": self._sql,
        }


class _Sql(Builder[variants.Dataquery]):
    def __init__(self, sql: str, *, series: bool = False) -> None:
        self._query = SqlQuery(sql, series=series)

    def build(self) -> variants.Dataquery:
        return self._query


def main() -> None:
    """Write every dashboard."""
    DASHBOARDS.mkdir(exist_ok=True)
    for name, text in dashboard_files().items():
        (DASHBOARDS / name).write_text(text, encoding="utf-8")


def dashboard_files() -> dict[str, str]:
    """Return the files by name."""
    built = {"catalog.json": _catalog(), "run.json": _run()}
    return {
        name: json.dumps(dashboard.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, dashboard in built.items()
    }


def _catalog() -> Dashboard:
    return (
        _dashboard("onnx-ferry: catalog", "ferry-catalog", since="now-30d")
        .with_variable(
            # A value for all has to be SQL by itself: Grafana quotes the others only.
            _variable("task", queries.TASKS).include_all(True).all_value("'*'").current(_option("All", "$__all"))
        )
        .with_row(Row("What happened"))
        .with_panel(_coloured(_figures("Attempts", queries.ATTEMPTS)))
        .with_panel(_bars("Attempts over time", queries.ATTEMPTS_OVER_TIME).span(24).height(9))
        .with_panel(_gauge("Why attempts failed", queries.FAILURES, "What ended without a verified artifact, by kind."))
        .with_panel(
            piechart.Panel()
            .title("Where graphs came from")
            .description("traced: the structure was new; reused: bound to one traced before; direct: with its weights.")
            .datasource(SOURCE)
            .with_target(_Sql(queries.TEMPLATES))
            .reduce_options(common.ReduceDataOptions().values(True).calcs([]))
            .span(12)
            .height(9)
        )
        .with_row(Row("What holds now"))
        .with_panel(_gauge("Models by their last attempt", queries.STANDING, "Of everything ever asked for."))
        .with_panel(_figures("Artifacts", queries.ARTIFACTS).unit("bytes").span(12).height(9))
        .with_row(Row("A closer look, at the newest 1,000 attempts of the period"))
        .with_panel(_table("Seconds of each step", queries.STEPS).span(12).height(9))
        .with_panel(_table("Closest to what is allowed", queries.CLOSEST).span(12).height(9))
        .with_panel(_table("Not converted", queries.NEWEST_FAILURES).span(24).height(12))
        .with_panel(_table("Runs", queries.BATCHES).span(24).height(10).override_by_name("took", [_unit("s")]))
    )


def _run() -> Dashboard:
    return (
        _dashboard("onnx-ferry: a run", "ferry-run", since="now-7d")
        .refresh("10s")
        .with_variable(_variable("run", queries.RUNS).sort(VariableSort.DISABLED))
        .with_panel(_coloured(_figures("Models", queries.RUN_MODELS)))
        .with_panel(_bars("Models per minute", queries.RUN_ENDS).span(24).height(9))
        .with_panel(_gauge("Seconds spent in each step", queries.RUN_STEPS, "All models together.").unit("s"))
        .with_panel(_table("Why models failed", queries.RUN_FAILURES).span(12).height(9))
    )


def _dashboard(title: str, uid: str, *, since: str) -> Dashboard:
    return Dashboard(title).uid(uid).tags(["onnx-ferry"]).time(since, "now").timezone("utc").refresh("1m").readonly()


def _variable(name: str, sql: str) -> QueryVariable:
    return (
        QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(sql)
        .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _option(text: str, value: str) -> VariableOption:
    return VariableOption(selected=True, text=text, value=value)


def _figures(title: str, sql: str) -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .datasource(SOURCE)
        .with_target(_Sql(sql))
        .reduce_options(common.ReduceDataOptions().values(False).calcs(["lastNotNull"]))
        .span(24)
        .height(5)
    )


def _bars(title: str, sql: str) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(title)
        .datasource(SOURCE)
        .with_target(_Sql(sql, series=True))
        .draw_style(GraphDrawStyle.BARS)
        .fill_opacity(80)
        .line_width(0)
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        .min(0)
    )
    return _coloured(panel)


def _gauge(title: str, sql: str, description: str) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .with_target(_Sql(sql))
        .reduce_options(common.ReduceDataOptions().values(True).calcs([]))
        .orientation(VizOrientation.HORIZONTAL)
        .min(0)
        .span(12)
        .height(9)
    )


def _table(title: str, sql: str) -> table.Panel:
    return table.Panel().title(title).datasource(SOURCE).with_target(_Sql(sql))


def _coloured(panel: _Panel) -> _Panel:
    """Give each status the colour that it has on the project's own dashboard."""
    for status, colour in _STATUSES.items():
        fixed: object = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_name(status, [DynamicConfigValue(id_val="color", value=fixed)])
    return panel


def _unit(unit: str) -> DynamicConfigValue:
    return DynamicConfigValue(id_val="unit", value=unit)


if __name__ == "__main__":
    main()
