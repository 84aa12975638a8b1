"""``ferry catalog export --html`` and ``--parquet``: the catalog as files for people and for tables."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest

from flows.export_formats import COLUMNS
from tests.flows.test_catalog_commands import catalog, converted, failed, hostile, run

__all__ = ["catalog"]


class Page(HTMLParser):
    """The tags and attributes of a page, and what a reader sees of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def seen(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(*arguments: str) -> Page:
    result = run("export", "--html", "report.html", *arguments)
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    return Page(Path("report.html").read_text(encoding="utf-8"))


def test_the_page_has_the_overview_and_each_model_with_its_verdict(catalog):
    catalog(converted(1), failed(2), converted(3, parity=(replace(converted().parity[0], verdict="unstable"),)))
    seen = page_of().seen
    for words in ("org/model-1", "org/model-2", "org/model-3", "verified", "unstable", "timeout", "1.2e-06 of 1.0e-05",
                  "66.7 % of 3 attempts", "Time and memory per step", "export 8.0 s"):  # fmt: skip
        assert words in seen
    assert "Not all are here" not in seen


def test_the_page_loads_and_runs_nothing_whatever_a_model_is_called(catalog):
    evil = '<script src="http://evil.example/x.js"></script><img src=x onerror=alert(1)>"\'</style>{{ 7*7 }}'
    catalog(converted(1), hostile(), failed(3, model_id=evil, task=evil, model_type=evil))
    page = page_of()
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "style", "background"}
    assert [(tag, given) for tag, given in page.tags if loading & set(given)] == []
    assert [name for _, given in page.tags for name in given if name.startswith("on")] == []
    (policy,) = [given["content"] for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "url(" not in page.seen
    assert "@import" not in page.seen
    assert evil[:160] in page.seen
    assert "\u202e" not in page.seen
    assert "\x1b" not in page.seen


def test_a_page_that_leaves_models_out_says_so(catalog):
    catalog(converted(1), converted(2), converted(3))
    seen = page_of("--models", "2").seen
    assert "Not all are here: these are the newest 2 of 3 conversions." in seen
    assert "org/model-3" in seen
    assert "org/model-1" not in seen
    result = run("export", "--html", "report.html", "--models", "2")
    assert result.stderr == "A page with 2 of 3 models written to report.html\n"


def test_a_page_of_a_catalog_without_conversions(catalog):
    catalog()
    assert "Nothing was converted yet." in page_of().seen


def test_no_page_of_no_catalog(catalog, tmp_path):
    result = run("export", "--html", "report.html")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There is no catalog yet" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_parquet_has_the_columns_of_the_csv_with_types(catalog):
    check = replace(converted().parity[0], max_abs_diff=math.nan)
    catalog(converted(1), failed(2, model_id="=1+1\n\u202e"), converted(3, parity=(check,)))
    result = run("export", "--parquet", "all.parquet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "3 conversions written to all.parquet\n"
    table = pyarrow.parquet.read_table("all.parquet")
    assert tuple(table.column_names) == COLUMNS
    first, second, third = table.to_pylist()
    assert (first["id"], first["model_id"], first["verdict"], first["simplified"]) == (
        1,
        "org/model-1",
        "verified",
        True,
    )
    assert (first["finished_at"].isoformat(), first["seconds"]) == ("2026-01-01T12:01:00+00:00", 78.0)
    # Text as it was recorded: nobody takes a cell of this file for a formula.
    assert (second["model_id"], second["error_kind"], second["size_bytes"]) == ("=1+1\n\u202e", "timeout", None)
    assert math.isnan(third["max_abs_diff"])


def test_parquet_of_no_catalog_has_no_rows(catalog):
    assert run("export", "--parquet", "all.parquet").exit_code == 0
    assert pyarrow.parquet.read_table("all.parquet").num_rows == 0


def test_parquet_goes_by_parts(catalog, monkeypatch):
    monkeypatch.setattr("flows.export_formats._ROWS_PER_GROUP", 2)
    catalog(*(converted(number) for number in range(1, 6)))
    run("export", "--parquet", "all.parquet")
    read = pyarrow.parquet.ParquetFile("all.parquet")
    assert (read.metadata.num_rows, read.num_row_groups) == (5, 3)
    read.close()


def test_without_pyarrow_the_error_says_what_to_type(catalog, tmp_path, monkeypatch):
    catalog(converted(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run("export", "--parquet", "all.parquet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'onnx-ferry[parquet]'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_several_files_at_once(catalog):
    catalog(converted(1))
    result = run("export", "--html", "a.html", "--parquet", "b.parquet", "--format", "json", "--output", "c.json")
    assert result.exit_code == 0
    assert result.stderr.count("written to") == 3
    assert len(json.loads(Path("c.json").read_text())["conversions"]) == 1


@pytest.mark.parametrize("option", ["--html", "--parquet"])
def test_where_nothing_can_be_written(catalog, tmp_path, option):
    catalog(converted(1))
    result = run("export", option, str(tmp_path / "absent" / "file"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot be written" in result.stderr
