"""A catalog moves from a file to a PostgreSQL server, and everything goes on there: one story, end to end."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from flows.cli import app
from onnx_config import AutoModelForONNX
from tests.faults.harness import ferry, read_report, tiny, write_manifest

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is built on Linux's process control")


def test_a_catalog_moves_to_a_server_and_goes_on_there(
    tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny(tmp_path / "first"), tiny(tmp_path / "second", seed=1)
    write_manifest(tmp_path / "models.json", ["./first"])
    words = ["batch", "models.json", "--engine", "local", "--workers", "1", "--report", "report.json"]
    home = tmp_path / "home"
    done = ferry(*words, home=home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    artifact = read_report(tmp_path / "report.json")["first"]["artifact"]

    # Without the driver's name, as people write it; the rest of the story names it by the environment.
    url = postgres.create().replace("+psycopg", "")
    moved = ferry("catalog", "migrate", "--to", url, home=home, cwd=tmp_path)
    assert moved.returncode == 0, moved.stderr
    assert "conversions               1 rows, 1 written" in moved.stdout
    (home / "catalog.db").rename(tmp_path / "old.db")

    variables = {"FERRY_CATALOG_URL": url}
    write_manifest(tmp_path / "models.json", ["./first", "./second"])
    done = ferry(*words, home=home, cwd=tmp_path, variables=variables)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "report.json")
    assert {name: model["status"] for name, model in report.items()} == {"first": "reused", "second": "converted"}
    assert report["first"]["artifact"] == artifact
    assert not (home / "catalog.db").exists()

    monkeypatch.setenv("FERRY_HOME", str(home))
    monkeypatch.setenv("FERRY_CATALOG_URL", url)
    monkeypatch.chdir(tmp_path)

    def said(*command: str) -> str:
        result = CliRunner().invoke(app, ["catalog", *command])
        assert result.exit_code == 0, result.output
        return result.stdout

    listed = json.loads(said("list", "--json"))
    assert [Path(row["model_id"]).name for row in listed["conversions"]] == ["second", "first"]
    assert json.loads(said("search", "PATCHTST", "--json"))["total"] == 2
    assert json.loads(said("show", str(second), "--json"))["model_id"] == str(second)
    assert len(list(csv.DictReader(io.StringIO(said("export", "--format", "csv"))))) == 2
    assert [template["hits"] for template in json.loads(said("templates", "--json"))["templates"]] == [1]
    assert json.loads(said("gc", "--json"))["removed"] == []
    # By its content's hash, by its id, and by the folder that it was made from.
    for name in (Path(artifact).name, listed["conversions"][1]["id"], first):
        assert AutoModelForONNX.from_pretrained(str(name)).folder == Path(artifact)
