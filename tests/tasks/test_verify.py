"""A verdict binds afterwards too: what is registered is compared again, and what no longer holds is not served."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from flows.cli import app
from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.artifact import FERRY_FILE
from onnx_config.export.session import LEVELS
from onnx_config.file_hash import sha256_of
from onnx_config.variants import Variant
from tasks.lookup import Lookup, look_up
from tasks.parity import Effort
from tasks.pipeline import convert_model
from tasks.report import ModelEntry, Status, Verdict
from tasks.request import ConversionRequest, Device, Workspace
from tasks.verify import verify_target
from tasks.verify_report import Change, VerifyEntry, VerifyReport
from tasks.verify_targets import Target, find_targets, sample_of
from tests.faults.harness import assert_nothing_half_done, catalog_rows, request, share_traces, tiny, workspace


class Converted:
    """A tiny model, its artifact, and where both are."""

    def __init__(self, root: Path, name: str, *, model_id: str | None = None, **options: Any) -> None:
        self.places: Workspace = workspace(share_traces(root / "home"))
        self.model = tiny(root / "model", name)
        self.request: ConversionRequest = request(model_id or self.model, **options)
        self.entry: ModelEntry = convert_model(self.request, self.places)
        assert self.entry.status is Status.CONVERTED, self.entry.error
        self.folder = Path(self.entry.artifact or "")

    def verify(self, name: str = "all", **effort: Any) -> VerifyEntry:
        (target,) = find_targets([name], self.places)
        return verify_target(target, self.places, device=Device.CPU, effort=Effort(**effort))

    def plant(self, change: Callable[[onnx.ModelProto], object], name: str = "model.onnx") -> None:
        """Change the graph, and what is written down of it, as if it had been stored so."""
        path = self.folder / name
        model = onnx.load(str(path))
        change(model)
        path.unlink()  # Another link to it may be somebody else's.
        onnx.save(model, str(path))
        listed = json.loads((self.folder / FERRY_FILE).read_text())
        listed["files"][name] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        (self.folder / FERRY_FILE).write_text(json.dumps(listed))


def weight_off(model: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if "intermediate" in tensor.name)
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] += 1.0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("bert")
    # As a manifest beside its models names them.
    with contextlib.chdir(root):
        return Converted(root, "bert-sequence-classification", model_id="./model")


@pytest.mark.parametrize("name", ["all", "model", "folder", "hash"])
def test_a_healthy_artifact_is_verified_again(bert: Converted, name: str) -> None:
    names = {"model": str(bert.model), "folder": str(bert.folder), "hash": bert.folder.name[:12]}
    before = len(catalog_rows(bert.places.home)[0].parity)
    entry = bert.verify(names.get(name, name))
    assert (entry.verdict, entry.change, entry.error) == (Verdict.VERIFIED, Change.SAME, None)
    assert (entry.artifact, entry.id) == (str(bert.folder), bert.request.model_id)
    (row,) = catalog_rows(bert.places.home)
    assert len(row.parity) == before + 1
    assert row.parity[-1].environment == row.environment
    assert row.parity[-1].cells
    assert row.parity[-1].session is not None
    assert_nothing_half_done(bert.places.home)


def test_a_model_in_a_folder_is_found_from_wherever_one_calls(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()  # Called the same, and another one.
    monkeypatch.chdir(tmp_path)
    for name in ("all", str(bert.folder)):
        entry = bert.verify(name)
        assert (entry.verdict, entry.error, entry.id) == (Verdict.VERIFIED, None, "./model")


def test_a_folder_that_only_another_catalog_knows_is_asked_for(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strangers = workspace(tmp_path / "home")
    (target,) = find_targets([str(bert.folder)], strangers)
    entry = verify_target(target, strangers, device=Device.CPU, effort=Effort())
    assert (entry.verdict, entry.change) == (Verdict.NOT_RUN, Change.NONE)
    assert entry.error is not None
    assert entry.error.kind is ErrorKind.NOT_FOUND
    assert "'./model', which is not there as seen from" in entry.error.message


def test_the_matrix_has_a_cell_for_every_level_and_shape(bert: Converted) -> None:
    entry = bert.verify(levels=tuple(reversed(LEVELS)), shapes=9)
    assert entry.parity is not None
    found = Counter((cell.provider, cell.optimization, cell.dtype) for cell in entry.parity.cells)
    assert found == {("CPUExecutionProvider", level, "float32"): 9 for level in LEVELS}
    assert {cell.verdict for cell in entry.parity.cells} == {Verdict.VERIFIED}
    assert all(cell.max_abs_diff is not None and cell.output == "logits" for cell in entry.parity.cells)


def test_a_file_that_was_changed_is_said_so(bert: Converted, tmp_path: Path) -> None:
    copy = shutil.copytree(bert.folder, tmp_path / "copy")
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    entry = bert.verify(str(copy))
    assert (entry.verdict, entry.artifact) == (Verdict.NOT_RUN, str(copy))
    assert entry.error is not None
    assert "is not the file that was compared" in entry.error.message


@pytest.mark.parametrize("folder", [None, "empty"])
def test_what_is_no_artifact_is_said_so(bert: Converted, tmp_path: Path, folder: str | None) -> None:
    name = "org/nobody" if folder is None else str(tmp_path)
    with pytest.raises(InputError, match="is no artifact") as raised:
        find_targets([name], bert.places)
    assert raised.value.kind is ErrorKind.NOT_FOUND


def test_an_empty_catalog_has_nothing_to_verify(tmp_path: Path) -> None:
    assert find_targets(["all"], workspace(tmp_path / "home")) == []


def test_a_model_that_is_another_one_now_is_nothing_to_compare_with(tmp_path: Path) -> None:
    made = Converted(tmp_path, "bert-model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "note": "another"}))
    entry = made.verify(str(made.folder))
    assert (entry.verdict, entry.change) == (Verdict.NOT_RUN, Change.NONE)
    assert entry.error is not None
    assert entry.error.kind is ErrorKind.NOT_FOUND
    assert "another content now" in entry.error.message
    # Nothing is known of it, so that nothing is taken away either.
    assert made.folder.is_dir()


def test_what_no_longer_holds_is_not_served_any_more(tmp_path: Path) -> None:
    made = Converted(tmp_path, "bert-sequence-classification")
    made.plant(weight_off)
    entry = made.verify(bisect=True)
    assert (entry.verdict, entry.change) == (Verdict.MISMATCH, Change.NEWLY_FAILING)
    assert entry.error is not None
    assert entry.error.kind is ErrorKind.MISMATCH
    quarantine = Path(entry.artifact)
    assert quarantine.parent.name == "quarantine"
    assert quarantine.is_dir()
    assert not made.folder.exists()
    # The catalog, the next batch and the loader all say the same.
    (row,) = catalog_rows(made.places.home)
    assert (row.status, row.artifact is not None and row.artifact.quarantined) == ("mismatch", True)
    lookup = look_up([made.request], made.places)[made.request]
    assert isinstance(lookup, Lookup)
    assert lookup.known is not None
    assert lookup.known.status is Status.MISMATCH
    with pytest.raises(ModelError, match="quarantine"):
        AutoModelForONNX.from_pretrained(quarantine)
    # Where it goes wrong is named, and one command shows it to whoever has ONNX Runtime.
    assert any(note.startswith("first apart: the module bert") for note in entry.notes), entry.notes
    script = next(Path(note.split()[0]) for note in entry.notes if "reproduce.sh" in note)
    shown = subprocess.run([script], env={"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert shown.returncode == 1, shown.stderr
    assert "logits: differs by" in shown.stdout
    # And once more: it is the same, and stays where it is.
    again = made.verify()
    assert (again.verdict, again.change, again.artifact) == (Verdict.MISMATCH, Change.SAME, str(quarantine))


def test_an_artifact_mended_is_newly_passing_and_stays_in_quarantine(tmp_path: Path) -> None:
    made = Converted(tmp_path, "bert-model")
    whole = (made.folder / "model.onnx").read_bytes()
    made.plant(weight_off)
    made.folder = Path(made.verify().artifact)
    made.plant(lambda model: model.CopyFrom(onnx.load_from_string(whole)))
    entry = made.verify()
    assert (entry.verdict, entry.change) == (Verdict.VERIFIED, Change.NEWLY_PASSING)
    assert entry.artifact == str(made.folder)


def zero_channel(model: onnx.ModelProto) -> None:
    """Make one output of the first int8 weight zeros."""
    weight = next(t for t in model.graph.initializer if t.name.endswith("_quantized"))
    array = numpy_helper.to_array(weight).copy()
    array[:, 0] = 0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def test_a_variant_that_no_longer_holds_is_not_loaded_and_the_others_are(tmp_path: Path) -> None:
    made = Converted(tmp_path, "gpt2-causal-lm", variants=(Variant.FP16, Variant.INT8))
    healthy = made.verify()
    assert [(v.variant, v.verdict, v.change) for v in healthy.variants] == [
        ("fp16", Verdict.VERIFIED, Change.SAME),
        ("int8", Verdict.VERIFIED, Change.SAME),
    ]
    assert healthy.error is None
    made.plant(zero_channel, "model_int8.onnx")
    entry = made.verify()
    assert (entry.verdict, entry.change, entry.artifact) == (Verdict.VERIFIED, Change.SAME, str(made.folder))
    assert [(v.variant, v.verdict, v.change) for v in entry.variants] == [
        ("fp16", Verdict.VERIFIED, Change.SAME),
        ("int8", Verdict.MISMATCH, Change.NEWLY_FAILING),
    ]
    assert entry.error is not None
    assert "int8: " in entry.error.message
    assert not VerifyReport.of([entry], started_at=datetime.now(UTC), seconds=1.0).all_verified
    for good in (None, "fp16"):
        AutoModelForONNX.from_pretrained(made.folder, variant=good)
    with pytest.raises(ModelError, match=r"variant 'int8'.*mismatch"):
        AutoModelForONNX.from_pretrained(made.folder, variant="int8")
    AutoModelForONNX.from_pretrained(made.folder, variant="int8", allow_quarantined=True)
    # Whoever asks for the model again hears of it too.
    again = convert_model(made.request, made.places)
    assert [None if v.parity is None else v.parity.verdict for v in again.variants] == ["verified", "mismatch"]
    again_verified = made.verify()
    assert [v.change for v in again_verified.variants] == [Change.SAME, Change.SAME]


def test_a_variant_that_cannot_be_run_does_not_hold(tmp_path: Path) -> None:
    made = Converted(tmp_path, "bert-model", variants=(Variant.Q4,))

    def other_operator(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "MatMulNBits").op_type = "NobodyKnows"

    made.plant(other_operator, "model_q4.onnx")
    (variant,) = made.verify().variants
    assert (variant.verdict, variant.change) == (Verdict.MISMATCH, Change.NEWLY_FAILING)
    assert "refuses the graph model_q4.onnx" in (variant.parity.detail or "")


def test_graphs_in_half_precision_are_compared_again(tmp_path: Path) -> None:
    made = Converted(tmp_path, "bert-sequence-classification", dtype="float16")
    entry = made.verify()
    assert (entry.verdict, entry.change, entry.error) == (Verdict.VERIFIED, Change.SAME, None)
    made.plant(weight_off)
    entry = made.verify()
    assert (entry.verdict, entry.change) == (Verdict.MISMATCH, Change.NEWLY_FAILING)
    assert Path(entry.artifact).parent.name == "quarantine"


@pytest.mark.slow
def test_variants_of_several_graphs_are_compared_again(tmp_path: Path) -> None:
    made = Converted(tmp_path, "t5-conditional-generation", variants=(Variant.INT8,))
    (variant,) = made.verify().variants
    assert (variant.verdict, variant.change) == (Verdict.VERIFIED, Change.SAME)


def test_a_sample_takes_every_class_before_it_takes_one_twice() -> None:
    targets = [
        Target(place=str(number), name=str(number), architecture=name)
        for number, name in enumerate(["A"] * 50 + ["B"] * 3 + ["C"])
    ]
    for seed in range(5):
        found = sample_of(targets, 4, seed=seed)
        counts = Counter(target.architecture for target in found)
        assert set(counts) == {"A", "B", "C"}
        assert max(counts.values()) == 2
    assert len(sample_of(targets, 100)) == len(targets) == len({t.name for t in sample_of(targets, 100)})
    assert sample_of(targets, 9) == sample_of(targets, 9)


def test_the_command_prints_one_document(bert: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRY_HOME", str(bert.places.home))
    result = CliRunner().invoke(app, ["verify", "all", "--sample", "1", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["schema"], found["totals"]["verified"], found["changes"]["same"]) == (1, 1, 1)
    assert found["models"][0]["parity"]["cells"][0]["optimization"] == "all"
    shown = CliRunner().invoke(app, ["catalog", "show", "1"])
    assert "optimisation" in shown.stdout
    assert "CPUExecutionProvider" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "all", "more"], "`all` takes every artifact"),
        (["verify", "nobody/nothing"], "is no artifact"),
        (["verify"], "Missing argument"),
        (["verify", "all", "--report", "/"], "is a folder"),
    ],
)
def test_a_wrong_call_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert np.size(list(tmp_path.glob("home/tmp/*"))) == 0
