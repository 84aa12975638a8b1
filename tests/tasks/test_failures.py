"""What a failure leaves behind: a folder that shows it again, gone once the model converts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onnx_config.errors import ErrorKind
from tasks import failures
from tasks.failures import FailureFolders
from tasks.pipeline import convert_model
from tasks.report import ErrorEntry, Status, Step
from tasks.request import ConversionRequest
from tests.faults.harness import assert_nothing_half_done, request, tiny, workspace

ERROR = ErrorEntry(kind=ErrorKind.MISMATCH, message="it differs", step=Step.PARITY, reproduce="ferry convert 'a b'")


def test_a_failed_conversion_leaves_options_versions_and_a_script_and_a_good_one_removes_them(tmp_path: Path) -> None:
    places, asked = workspace(tmp_path / "home"), request(tiny(tmp_path / "model"))
    config = tmp_path / "model" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "context_length": "many"}))
    entry = convert_model(asked, places)
    assert entry.status is Status.FAILED
    folder = FailureFolders(places.home).of(asked)
    kept = json.loads((folder / "request.json").read_text())
    assert (kept["model"], kept["found"]) == (asked.model_id, entry.revision)
    assert kept["options"]["dtype"] == "float32"
    assert "torch" in json.loads((folder / "versions.json").read_text())
    assert entry.error is not None
    assert json.loads((folder / "error.json").read_text()) == entry.error.model_dump(mode="json")
    assert os.access(folder / "reproduce.sh", os.X_OK)
    assert entry.error.reproduce in (folder / "reproduce.sh").read_text()
    config.write_text(whole)
    assert convert_model(asked, places).status is Status.CONVERTED
    assert not folder.exists()
    assert_nothing_half_done(places.home)


def test_a_later_failure_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    kept, asked = FailureFolders(tmp_path), ConversionRequest(model_id="a b")
    cases = tmp_path / "cases"
    for role in ("encoder", "decoder"):
        (cases / role).mkdir(parents=True)
        (cases / role / "case.json").write_text('{"graph": "gone"}')
    folder = kept.keep(asked, ERROR, revision="1", cases=cases)
    assert folder is not None
    kept.point_to(folder, [("encoder", "/there/encoder_model.onnx"), ("nobody", "x")])
    graphs = {role: json.loads((folder / role / "case.json").read_text())["graph"] for role in ("encoder", "decoder")}
    assert graphs == {"encoder": "/there/encoder_model.onnx", "decoder": "gone"}
    lines = (folder / "reproduce.sh").read_text().splitlines()
    assert [line.split()[-1] for line in lines[3:5]] == ["decoder/compare.py", "encoder/compare.py"]
    assert kept.keep(asked, ERROR, revision="2") == folder
    assert not (folder / "encoder").exists()
    assert json.loads((folder / "request.json").read_text())["found"] == "2"


def test_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_MOST_FOLDERS", 3)
    kept = FailureFolders(tmp_path)
    requests = [ConversionRequest(model_id=f"org/{number}") for number in range(5)]
    for number, asked in enumerate(requests):
        folder = kept.keep(asked, ERROR, revision=None)
        assert folder is not None
        os.utime(folder, (number, number))
    assert [kept.of(asked).is_dir() for asked in requests] == [False, False, True, True, True]


def test_a_folder_that_cannot_be_written_is_nobodys_failure(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("a file where the folders go")
    assert FailureFolders(tmp_path).keep(ConversionRequest(model_id="a"), ERROR, revision=None) is None


def test_a_name_that_is_no_text_is_kept_by_its_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"./m\xff")
    error = ERROR.model_copy(update={"reproduce": f"ferry convert {name}"})
    folder = FailureFolders(tmp_path).keep(ConversionRequest(model_id=name), error, revision=None)
    assert folder is not None
    assert b"ferry convert ./m\xff\n" in (folder / "reproduce.sh").read_bytes()
