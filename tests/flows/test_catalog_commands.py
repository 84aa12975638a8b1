"""``ferry catalog``: what people and programs read of the catalog."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import Result
from sqlalchemy import text
from typer.testing import CliRunner

from db import (
    ArtifactRecord,
    ConversionRecord,
    ErrorRecord,
    FileRecord,
    GraphRecord,
    OutputParityRecord,
    ParityRecord,
    StepTiming,
    TensorRecord,
    make_engine,
    record_conversion,
    session_scope,
    upgrade,
)
from flows.catalog_commands import catalog_app

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOSTILE = "[red]org[/red]/\x1b[2J\u202eevil:smile:\nname"
SHOWN = "[red]org[/red]/[2Jevil:smile: name"


def converted(number: int = 1, **changes: object) -> ConversionRecord:
    check = ParityRecord(
        verdict="verified",
        device="cpu",
        provider="CPUExecutionProvider",
        shapes=5,
        max_abs_diff=1.2e-6,
        tolerance=1e-5,
        axes_proven=("batch_size",),
        outputs=(OutputParityRecord(name="logits", max_abs_diff=1.1e-6, tolerance=2e-5),),
        checked_at=NOW,
    )
    artifact = ArtifactRecord(
        sha256=f"ab{number:062x}",
        path="/store/artifact",
        quarantined=False,
        size_bytes=3 * 1024**2,
        created_at=NOW,
        files=(FileRecord(path="model.onnx", size_bytes=2048, sha256="c" * 64),),
        graphs=(
            GraphRecord(
                role="model",
                path="model.onnx",
                opset=20,
                nodes=230,
                nodes_before_simplify=340,
                inputs=(TensorRecord(name="input_ids", dtype="int64", shape=("batch_size", 16)),),
                outputs=(TensorRecord(name="logits", dtype="float32", shape=("batch_size", 2)),),
            ),
        ),
    )
    values: dict[str, object] = {
        "model_id": f"org/model-{number}",
        "key": f"{number:064x}",
        "revision": "r" * 40,
        "status": "converted",
        "task": "text-classification",
        "model_type": "bert",
        "architecture": "BertForSequenceClassification",
        "template": "traced",
        "simplified": True,
        "options": {"device": "auto"},
        "attempts": 1,
        "peak_rss_bytes": 900 * 1024**2,
        "notes": ("an axis was fixed",),
        "timings": (StepTiming(step="export", seconds=8.0), StepTiming(step="parity", seconds=70.0)),
        "artifact": artifact,
        "parity": (check,),
        "environment": {"torch": "2.13.0"},
        "started_at": NOW,
        "finished_at": NOW + timedelta(minutes=number),
    }
    return ConversionRecord(**(values | changes))  # type: ignore[arg-type]


def failed(number: int = 2, **changes: object) -> ConversionRecord:
    error = ErrorRecord(
        kind="timeout", message="it took too long", step="export", reproduce="ferry convert org/model-2 --timeout 10"
    )
    values: dict[str, object] = {"status": "failed", "artifact": None, "parity": (), "error": error, "template": None}
    return converted(number, **(values | changes))


@pytest.fixture
def catalog(tmp_path, monkeypatch) -> Callable[..., None]:
    """Return a function that records conversions in the catalog that the commands read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FERRY_CATALOG_URL", raising=False)

    def fill(*records: ConversionRecord) -> None:
        engine = make_engine(f"sqlite:///{tmp_path}/home/catalog.db")
        upgrade(engine)
        with session_scope(engine) as session:
            for record in records:
                record_conversion(session, record)
        engine.dispose()

    return fill


def run(*arguments: str) -> Result:
    """Run ``ferry catalog``, whose errors a test wants to see rather than exit code 1."""
    result = CliRunner().invoke(catalog_app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def models(result: Result) -> list[str]:
    return [conversion["model_id"] for conversion in json.loads(result.stdout)["conversions"]]


# list and search


def test_list_shows_a_line_for_each(catalog):
    catalog(converted(1), failed(2))
    result = run("list")
    header, first, second = [line.split() for line in result.stdout.splitlines()]
    assert header == ["id", "model", "task", "status", "parity", "size", "finished"]
    assert first[:5] == ["2", "org/model-2", "text-classification", "failed", "(timeout)"]
    assert second[:7] == ["1", "org/model-1", "text-classification", "converted", "verified,", "1.2e-06", "of"]
    assert second[-4:] == ["3.0", "MiB", "2026-01-01", "12:01:00Z"]
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["list"], ["org/model-3", "org/model-2", "org/model-1"], id="all-newest-first"),
        pytest.param(["list", "--status", "failed"], ["org/model-2"], id="by-status"),
        pytest.param(["list", "--task", "fill-mask"], ["org/model-3"], id="by-task"),
        pytest.param(["list", "--limit", "1"], ["org/model-3"], id="so-many"),
        pytest.param(
            ["list", "--all"], ["org/model-3", "org/model-2", "org/model-1", "org/model-1"], id="replaced-too"
        ),
        pytest.param(["search", "MODEL-2"], ["org/model-2"], id="search-an-id"),
        pytest.param(["search", "too long"], ["org/model-2"], id="search-an-error"),
        pytest.param(["search", "fill"], ["org/model-3"], id="search-a-task"),
        pytest.param(["search", "absent"], [], id="search-for-nothing"),
    ],
)
def test_listing_as_json(catalog, arguments, expected):
    catalog(converted(1), converted(1), failed(2), converted(3, task="fill-mask"))
    result = run(*arguments, "--json")
    assert models(result) == expected
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_listing_that_is_cut_says_so(catalog):
    catalog(converted(1), converted(2), converted(3))
    assert "2 of 3 conversions; see more with --limit." in run("list", "--limit", "2").stdout
    assert json.loads(run("list", "--limit", "2", "--json").stdout)["total"] == 3


def test_a_search_counts_no_further_than_it_has_to(catalog, monkeypatch):
    monkeypatch.setattr("flows.catalog_commands._MOST_COUNTED", 2)
    catalog(converted(1), converted(2), converted(3))
    assert "1 of 2 or more conversions; see more with --limit." in run("search", "model", "--limit", "1").stdout
    found = json.loads(run("search", "model", "--limit", "1", "--json").stdout)
    assert (found["total"], found["total_is_exact"], len(found["conversions"])) == (2, False, 1)
    found = json.loads(run("search", "model", "--limit", "3", "--json").stdout)
    assert (found["total"], found["total_is_exact"], len(found["conversions"])) == (3, True, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["list", "--limit", "0"], id="no-limit"),
        pytest.param(["list", "--status", "done"], id="unknown-status"),
        pytest.param(["export", "--format", "xml"], id="unknown-format"),
        pytest.param(["show"], id="show-nothing"),
        pytest.param(["search"], id="search-nothing"),
    ],
)
def test_a_wrong_call(catalog, arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


# show


def test_show_has_everything(catalog):
    catalog(converted(1))
    shown = run("show", "org/model-1").stdout
    for part in (
        "text-classification",
        "BertForSequenceClassification",
        "r" * 40,
        "device=auto",
        "900.0 MiB",
        "an axis was fixed",
        "230 nodes (exported 340), opset 20",
        "(batch_size, 16)",
        "model.onnx",
        "2.0 KiB",
        "c" * 64,
        f"ab{1:062x}",
        "verified, 1.2e-06 of 1.0e-05",
        "CPUExecutionProvider",
        "1.10e-06",
        "2.00e-05",
        "8.0 s",
        "1:10",
        "1:18",
        "2.13.0",
    ):
        assert part in shown, part


def test_show_tells_how_to_see_a_failure_again(catalog):
    catalog(failed(2))
    shown = run("show", "1").stdout
    for part in ("export, timeout", "it took too long", "ferry convert org/model-2 --timeout 10"):
        assert part in shown


def test_show_names_a_quarantine(catalog):
    artifact = replace(converted().artifact, quarantined=True, path="/store/quarantine/x")
    catalog(converted(1, status="mismatch", artifact=artifact))
    assert "quarantine   /store/quarantine/x" in run("show", "1").stdout


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("1", id="number"),
        pytest.param("org/model-1", id="model"),
        pytest.param(f"ab{1:062x}"[:10], id="artifact"),
    ],
)
def test_show_as_json(catalog, name):
    artifact = replace(converted().artifact, sha256=f"ab{1:0<62x}")
    catalog(converted(1, artifact=artifact if name.startswith("ab1") else converted().artifact))
    result = run("show", name, "--json")
    shown = json.loads(result.stdout)
    assert (shown["id"], shown["model_id"], shown["error"]) == (1, "org/model-1", None)
    assert shown["finished_at"] == "2026-01-01T12:01:00Z"
    assert shown["artifact"]["files"] == [{"path": "model.onnx", "size_bytes": 2048, "sha256": "c" * 64}]
    assert shown["artifact"]["graphs"][0]["inputs"][0]["shape"] == ["batch_size", 16]
    differences = {"name": "logits", "max_abs_diff": 1.1e-6, "tolerance": 2e-5, "spread": None}
    assert shown["parity"][0]["outputs"] == [differences]
    assert (result.exit_code, result.stderr) == (0, "")


def test_show_a_folder_by_its_relative_path(catalog, tmp_path):
    (tmp_path / "my-model").mkdir()
    catalog(converted(1, model_id=str(tmp_path / "my-model")))
    assert run("show", "my-model", "--json").exit_code == 0


@pytest.mark.parametrize("name", ["7", "org/absent", "ffffffff"])
def test_show_what_is_not_there(catalog, name):
    catalog(converted(1))
    result = run("show", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"'{name}' is not in the catalog" in result.stderr
    assert "`ferry catalog list`" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# export


def test_export_as_json_has_every_attempt(catalog):
    catalog(converted(1), converted(1), failed(2))
    result = run("export")
    exported = json.loads(result.stdout)
    assert exported["schema"] == 1
    assert [(entry["id"], entry["status"]) for entry in exported["conversions"]] == [
        (1, "converted"),
        (2, "converted"),
        (3, "failed"),
    ]
    assert exported["conversions"][0] == json.loads(run("show", "1", "--json").stdout)
    assert result.stderr == ""


def test_export_as_csv(catalog):
    error = ErrorRecord(kind="crashed", message='=HYPERLINK("x")', step="export", reproduce="-a, b")
    catalog(converted(1), failed(2, error=error))
    first, second = csv.DictReader(io.StringIO(run("export", "--format", "csv").stdout))
    assert (first["model_id"], first["verdict"], first["max_abs_diff"]) == ("org/model-1", "verified", "1.2e-06")
    assert (first["seconds"], first["size_bytes"], first["error_kind"]) == ("78.0", str(3 * 1024**2), "")
    assert first["finished_at"] == "2026-01-01T12:01:00Z"
    assert (second["error_kind"], second["artifact_path"]) == ("crashed", "")
    assert (second["error_message"], second["error_reproduce"]) == ('\'=HYPERLINK("x")', "'-a, b")


def test_export_to_a_file_replaces_it_whole(catalog, tmp_path):
    catalog(converted(1))
    (tmp_path / "out.json").write_text("old" * 10_000)
    result = run("export", "--output", "out.json")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "1 conversions written to out.json\n"
    assert len(json.loads((tmp_path / "out.json").read_text())["conversions"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out.json"]


def test_export_to_where_nothing_can_be_written(catalog, tmp_path):
    catalog(converted(1))
    result = run("export", "--output", str(tmp_path / "absent" / "out.json"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot be written" in result.stderr


# Absent, empty and unreadable


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["list"], "The catalog is empty: nothing was converted yet.\n", id="list"),
        pytest.param(["search", "x"], "The catalog is empty: nothing was converted yet.\n", id="search"),
        pytest.param(["list", "--json"], {"total": 0, "total_is_exact": True, "conversions": []}, id="list-json"),
        pytest.param(["export"], {"schema": 1, "conversions": []}, id="export"),
    ],
)
def test_an_absent_catalog_is_empty_and_stays_absent(catalog, tmp_path, arguments, expected):
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (result.stdout if isinstance(expected, str) else json.loads(result.stdout)) == expected
    assert list(tmp_path.iterdir()) == []


def test_showing_from_an_absent_catalog(catalog):
    result = run("show", "1")
    assert result.exit_code == 1
    assert "it is empty" in result.stderr


def test_a_catalog_without_conversions(catalog):
    catalog()
    assert run("list").stdout == "No conversion fits.\n"


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["list", "--json"], ["show", "1"], ["search", "x"], ["export"]],
    ids="-".join,
)
def test_an_unreadable_catalog(catalog, tmp_path, arguments):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalog.db").write_text("no database" * 100)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not a readable SQLite database" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_newer_catalog(catalog, tmp_path):
    catalog()
    engine = make_engine(f"sqlite:///{tmp_path}/home/catalog.db")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    result = run("list")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "upgrade this installation" in result.stderr


def test_flags_beat_the_environment(catalog, tmp_path, monkeypatch):
    catalog(converted(1))
    home = str(tmp_path / "home")
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "elsewhere"))
    assert models(run("list", "--json")) == []
    assert models(run("list", "--json", "--home", home)) == ["org/model-1"]
    assert models(run("list", "--json", "--catalog-url", f"sqlite:///{home}/catalog.db")) == ["org/model-1"]


# Hostile text


def hostile() -> ConversionRecord:
    error = ErrorRecord(kind="crashed", message=HOSTILE, step="export", reproduce=HOSTILE)
    artifact = replace(
        converted().artifact,
        path=HOSTILE,
        files=(FileRecord(path=HOSTILE, size_bytes=1, sha256="c" * 64),),
        graphs=(
            GraphRecord(
                role=HOSTILE,
                path=HOSTILE,
                opset=20,
                nodes=1,
                nodes_before_simplify=1,
                inputs=(TensorRecord(name=HOSTILE, dtype=HOSTILE, shape=(HOSTILE,)),),
                outputs=(),
            ),
        ),
    )
    check = replace(
        converted().parity[0],
        max_abs_diff=math.nan,
        provider=HOSTILE,
        detail=HOSTILE,
        axes_proven=(HOSTILE,),
        outputs=(OutputParityRecord(name=HOSTILE, max_abs_diff=math.nan, tolerance=math.inf),),
    )
    return failed(
        1,
        model_id=HOSTILE,
        task=HOSTILE,
        model_type=HOSTILE,
        architecture=HOSTILE,
        notes=(HOSTILE,),
        environment={HOSTILE: HOSTILE},
        options={HOSTILE: HOSTILE},
        error=error,
        artifact=artifact,
        parity=(check,),
    )


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["search", "evil"], ["show", "1"], ["show", "[/red]\x1b[2J"], ["export", "--format", "csv"]],
    ids=["list", "search", "show", "show-absent", "csv"],
)
def test_hostile_text_is_shown_as_it_reads(catalog, arguments):
    catalog(hostile())
    result = run(*arguments)
    for bad in ("\x1b", "\u202e", "\U0001f604"):
        assert bad not in result.stdout + result.stderr
    if "[/red]\x1b[2J" not in arguments:
        assert SHOWN in result.stdout
        assert result.exit_code == 0


@pytest.mark.parametrize("arguments", [["list", "--json"], ["show", "1", "--json"], ["export"]])
def test_hostile_text_is_whole_in_json_and_numbers_are_strict(catalog, arguments):
    catalog(hostile())

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    result = run(*arguments)
    assert result.stdout.isascii()
    document = json.loads(result.stdout, parse_constant=refuse)
    conversion = document["conversions"][0] if "conversions" in document else document
    assert conversion["model_id"] == HOSTILE
    assert conversion["parity"][0]["max_abs_diff"] is None
    assert conversion["parity"][0]["outputs"][0]["tolerance"] is None


def test_nothing_heavy_is_imported(catalog, tmp_path):
    catalog(converted(1))
    code = (
        "import sys; from flows.catalog_commands import catalog_app; catalog_app(['list', '--json'], "
        "standalone_mode=False); print(sorted({'torch', 'transformers', 'prefect', 'alembic'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["total"] == 1


def test_a_folder_is_listed_as_it_is_typed_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.catalog_commands import _near

    monkeypatch.chdir(tmp_path)
    assert _near(str(tmp_path / "models" / "a")) == "./models/a"
    assert _near(str(tmp_path.parent / "a")) == str(tmp_path.parent / "a")
    assert _near("org/name") == "org/name"
