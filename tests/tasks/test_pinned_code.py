"""Code of a repository runs at a commit that was named, and nowhere else; what it made says so."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from onnx_config import AutoModelForONNX, UniversalOnnxConfig
from onnx_config.errors import ErrorKind, InputError
from onnx_config.hub import refuse_unpinned_code
from onnx_config.remote_code import RemoteCode, code_sha256
from tasks.detect import detect_model
from tasks.detect_many import detect_many
from tasks.lookup import look_up
from tasks.request import ConversionOptions, ConversionRequest
from tests.faults.harness import ferry, read_report, tiny, workspace, write_manifest
from tests.own_code import write_own_code

COMMIT = "0123456789abcdef" * 2 + "01234567"


def asked(model: str, revision: str | None = None, *, trusted: bool = True) -> ConversionRequest:
    return ConversionRequest(model_id=model, revision=revision, options=ConversionOptions(trust_remote_code=trusted))


@pytest.mark.parametrize(
    ("model", "revision", "refused"),
    [
        pytest.param("org/name", None, True, id="main"),
        pytest.param("org/name", "v1.0", True, id="tag"),
        pytest.param("org/name", COMMIT[:12], True, id="short-commit"),
        pytest.param("org/name@main", None, True, id="branch-in-the-id"),
        pytest.param("org/name", COMMIT, False, id="commit"),
        pytest.param(f"org/name@{COMMIT}", None, False, id="commit-in-the-id"),
        pytest.param("./models/mine", None, False, id="folder"),
    ],
)
def test_code_of_a_repository_needs_a_commit(model: str, revision: str | None, refused: bool) -> None:
    if not refused:
        refuse_unpinned_code(model, revision=revision)
        return
    with pytest.raises(InputError, match="name that commit as the revision") as raised:
        refuse_unpinned_code(model, revision=revision)
    assert raised.value.kind is ErrorKind.BAD_INPUT


def test_nothing_is_asked_of_the_hub_for_code_at_a_branch(tmp_path: Path) -> None:
    places, request = workspace(tmp_path), asked("org/name", "main")
    found = look_up([request], places)[request]
    assert isinstance(found, InputError), found
    with pytest.raises(InputError, match="trust_remote_code"):
        detect_model(request, places)
    with pytest.raises(InputError, match="trust_remote_code"):
        UniversalOnnxConfig.from_pretrained("org/name", trust_remote_code=True)


def test_a_model_with_code_of_its_own_becomes_an_artifact_that_needs_none(tmp_path: Path) -> None:
    trusted = write_own_code(tmp_path / "trusted")
    write_own_code(tmp_path / "plain")
    write_manifest(tmp_path / "models.yaml", [{"id": "./trusted", "trust_remote_code": True}, "./plain"])
    words = ("batch", "models.yaml", "--engine", "local", "--report", "report.json", "--output", "out")
    ferry(*words, home=tmp_path / "home", cwd=tmp_path)
    entries = read_report(tmp_path / "report.json")
    assert entries["plain"]["error"]["kind"] == "unsupported"
    entry = entries["trusted"]
    assert (entry["status"], entry["task"]) == ("converted", "text-classification"), entry["error"]
    assert any(code_sha256(trusted) in note for note in entry["notes"])
    graph = onnx.load(entry["graphs"][0]["path"], load_external_data=False)
    certificate = {prop.key: prop.value for prop in graph.metadata_props}
    assert certificate["onnx_ferry.code_sha256"] == code_sha256(trusted)
    value = json.loads((trusted / "config.json").read_text())
    code = RemoteCode(trusted, value)
    original = code.model_class(entry["architecture"]).from_pretrained(trusted, config=code.config_of(value)).eval()
    inputs = {"input_ids": torch.tensor([[5, 7, 9, 2]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    loaded = AutoModelForONNX.from_pretrained(entry["artifact"])
    assert loaded.config.model_type == "ripple"
    torch.testing.assert_close(loaded(**inputs).logits, original(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_code_of_one_model_does_not_meet_the_detection_of_another(tmp_path: Path) -> None:
    meddler = write_own_code(tmp_path / "meddler", weights=False)
    path = meddler / "configuration_ripple.py"
    lines = "from onnx_config.universal_config import UniversalOnnxConfig", "UniversalOnnxConfig.task = 'meddled'"
    path.write_text("\n".join([path.read_text(), *lines, ""]))
    # The next ones by model type: what shares a child is sorted by that.
    others = ("roberta-sequence-classification", "t5-conditional-generation", "vit-image-classification")
    folders = [tiny(tmp_path / name, name) for name in others]
    requests = [asked(str(meddler)), *(asked(str(folder), trusted=False) for folder in folders)]
    found = detect_many({r: Path(r.model_id) for r in requests}, workspace(tmp_path / "home"), workers=1)
    tasks = [getattr(found[request].found, "task", found[request].found) for request in requests]
    assert tasks[0] == "meddled"
    assert "meddled" not in tasks[1:]
