"""The report while a batch goes on, and where it cannot be written."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows import report_file
from flows.report_file import ReportingListener, write_report
from onnx_config.errors import InputError
from tasks.report import ModelEntry, Report, Status
from tasks.request import SilentListener


def model_entry(model_id: str) -> ModelEntry:
    return ModelEntry(
        id=model_id,
        revision=None,
        status=Status.CONVERTED,
        task=None,
        model_type=None,
        architecture=None,
        artifact=None,
        template=None,
        simplified=False,
        parity=None,
        peak_rss_bytes=None,
        attempts=1,
        error=None,
    )


def read(path: Path) -> list[str]:
    return [model.id for model in Report.model_validate_json(path.read_text(encoding="utf-8")).models]


def no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_report_that_cannot_be_written_is_whole_or_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report.of([model_entry("org/a")], started_at=datetime(2026, 1, 1, tzinfo=UTC), seconds=1)
    path = tmp_path / "report.json"
    path.write_text("the last one")
    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(path, report)
    assert path.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_in_work_has_a_report_of_what_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.json"
    listener = ReportingListener(SilentListener(), path)
    listener.model_started("org/a")
    assert not path.exists()
    listener.model_finished(model_entry("org/a"))
    assert read(path) == ["org/a"]
    listener.model_finished(model_entry("org/b"))
    assert read(path) == ["org/a"], "not for every model of a thousand"
    monkeypatch.setattr(report_file, "_SECONDS_BETWEEN", 0.0)
    listener.model_finished(model_entry("org/c"))
    assert read(path) == ["org/a", "org/b", "org/c"]


def test_a_report_that_cannot_be_written_stops_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", no_room)
    ReportingListener(SilentListener(), tmp_path / "report.json").model_finished(model_entry("org/a"))
    assert list(tmp_path.iterdir()) == []
