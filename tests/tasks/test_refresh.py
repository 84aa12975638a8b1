"""What a newer installation does with what an older one has converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks import versions
from tasks.lookup import Lookup, look_up
from tasks.pipeline import convert_model
from tasks.report import ModelEntry, Status
from tasks.request import ConversionRequest, Refresh, Workspace
from tests.faults.harness import request, tiny, workspace
from tests.tasks.test_pipeline import Files


@pytest.fixture
def places(tmp_path: Path) -> Workspace:
    return workspace(tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> ConversionRequest:
    return request(tiny(tmp_path / "model"))


def convert(model: ConversionRequest, places: Workspace, **options: Any) -> ModelEntry:
    return convert_model(model, places, steps=Files().steps, **options)


def known(model: ConversionRequest, places: Workspace, **options: Any) -> ModelEntry | None:
    lookup = look_up([model], places, **options)[model]
    assert isinstance(lookup, Lookup), lookup
    return lookup.known


def upgrade(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    installed = {**versions.package_versions(), **packages}
    monkeypatch.setattr(versions, "_installed", lambda _names: tuple(installed.items()))


def test_what_older_versions_have_converted_stays_converted_and_says_so(places, model, monkeypatch):
    assert convert(model, places).status is Status.CONVERTED
    was = versions.package_versions()["torch"]
    upgrade(monkeypatch, torch="99.0", transformers=versions.package_versions()["transformers"])
    for again in (known(model, places), convert(model, places)):
        assert again is not None
        assert again.status is Status.REUSED
        assert f"converted with torch {was} (now 99.0); --refresh versions converts it again" in again.notes


def test_refresh_converts_again_what_other_versions_have_converted_and_only_that(places, model, monkeypatch):
    convert(model, places)
    again = known(model, places, refresh=Refresh.VERSIONS)
    assert again is not None, "the same versions: nothing to do"
    assert not [note for note in again.notes if "refresh" in note]
    upgrade(monkeypatch, onnxruntime="99.0")
    assert known(model, places, refresh=Refresh.VERSIONS) is None
    assert convert(model, places, refresh=Refresh.VERSIONS).status is Status.CONVERTED
    assert known(model, places, refresh=Refresh.VERSIONS) is not None


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"options": {"opset": 18}}, id="options"),
        pytest.param({"content": True}, id="content"),
        pytest.param({"epoch": 10**6}, id="what-our-code-makes-of-it"),
    ],
)
def test_whatever_the_versions_a_change_is_converted(places, model, monkeypatch, changed):
    convert(model, places)
    upgrade(monkeypatch, torch="99.0")
    if "options" in changed:
        model = request(model.model_id, **changed["options"])
    if "content" in changed:
        (Path(model.model_id) / "vocab.txt").write_text("new", encoding="utf-8")
    if "epoch" in changed:
        for module in ("tasks.lookup", "tasks.key"):
            monkeypatch.setattr(f"{module}.CODE_EPOCH", changed["epoch"])
    assert known(model, places) is None


def test_what_is_damaged_or_older_than_the_epoch_in_the_catalog_is_converted_again(places, model, monkeypatch):
    entry = convert(model, places)
    upgrade(monkeypatch, torch="99.0")
    assert known(model, places) is not None
    (Path(entry.artifact or "") / "model.onnx").unlink()
    assert known(model, places) is None


def test_a_failure_of_other_versions_is_tried_again(places, model, monkeypatch):
    from onnx_config.errors import ErrorKind, ModelError
    from tasks.job import Job
    from tasks.report import Step

    def fail(step: Step, _job: Job) -> None:
        if step is Step.EXPORT:
            raise ModelError("cannot", kind=ErrorKind.EXPORT_FAILED)

    assert convert_model(model, places, steps=Files(hook=fail).steps).status is Status.FAILED
    assert known(model, places) is not None
    upgrade(monkeypatch, torch="99.0")
    assert known(model, places) is None
