"""Templates: what counts as the same structure, what a store holds, and one trace for many models."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import db
from flows.batch import run_batch
from onnx_config.errors import ErrorKind, FerryError, InputError
from onnx_config.spec import ModelSpec
from tasks import versions
from tasks.collect import collect
from tasks.job import Job, reproduce_command
from tasks.register import catalog
from tasks.report import Engine, ModelEntry, Status
from tasks.request import SilentListener
from tasks.template_key import template_key
from tasks.template_store import TemplateStore
from tests.faults.harness import assert_nothing_half_done, request, tiny, workspace

KEY = "ab" * 32
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = ModelSpec(
    model_type="tiny", architecture="TinyModel", task="feature-extraction", task_family="feature-extraction",
    inputs=(), outputs=(), axis_ranges={}, sizes={}, preprocessor=None, parameters=None,
)  # fmt: skip


# What counts as the same structure


def write_model(folder: Path, *, config: dict[str, Any] | None = None, **tensors: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "hidden_size": 8, **(config or {})}))
    weights = {"w": np.zeros((2, 3), np.float32), "ids": np.arange(3), **tensors}
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")
    return folder


def key_of(folder: Path, spec: ModelSpec = SPEC, *, fixed: tuple[str, ...] = (), **options: Any) -> str:
    places = workspace(folder / "home")
    job = Job(request=request(folder, **options), workspace=places, revision="r", key="k", source=folder,
              scratch=folder, memory_bytes=1, weight_bytes=1)  # fmt: skip
    return template_key(job, spec, fixed=fixed)


LABELS = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"w": np.ones((2, 3), np.float32)}, id="other-weights"),
        pytest.param({"w": np.ones((2, 3), np.float16)}, id="halves"),
        pytest.param({"config": {"_name_or_path": "other", "transformers_version": "4.1"}}, id="origin"),
        pytest.param({"config": {"torch_dtype": "bfloat16", "architectures": ["Tiny"]}}, id="stored-type"),
        pytest.param({"config": {"text_config": {"_name_or_path": "x"}}}, id="inside"),
    ],
)
def test_models_of_one_structure_have_one_key(changes: dict[str, Any], tmp_path: Path) -> None:
    base = {"config": {"text_config": {}}} if "text_config" in changes.get("config", {}) else {}
    assert key_of(write_model(tmp_path / "one", **base)) == key_of(write_model(tmp_path / "two", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"config": {"hidden_size": 16}}, id="config"),
        pytest.param({"config": {"hidden_act": "gelu"}}, id="a-new-setting"),
        pytest.param({"config": {"id2label": {"0": "a"}}}, id="number-of-labels"),
        pytest.param({"ids": np.arange(1, 4)}, id="whole-numbers"),
        pytest.param({"w": np.zeros((3, 2), np.float32)}, id="a-shape"),
        pytest.param({"v": np.zeros(1, np.float32)}, id="one-more-tensor"),
        pytest.param({"ids": None}, id="one-less"),
    ],
)
def test_models_of_two_structures_have_two_keys(changes: dict[str, Any], tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", config=LABELS)
    changes = {**changes, "config": {**LABELS, **changes.get("config", {})}}
    assert key_of(one) != key_of(write_model(tmp_path / "two", **changes))


def test_options_and_versions_are_a_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "one")
    renamed = write_model(tmp_path / "two", config={**LABELS, "id2label": {"0": "ja", "1": "nein"}})
    assert key_of(renamed) == key_of(write_model(tmp_path / "three", config=LABELS))
    keys = {
        key_of(folder),
        key_of(folder, fixed=("height",)),
        key_of(folder, opset=19),
        key_of(folder, ModelSpec.from_json({**SPEC.to_json(), "architecture": "OtherModel"})),
    }
    monkeypatch.setattr(versions, "_version", lambda _: "0")
    versions._installed.cache_clear()
    try:
        keys.add(key_of(folder))
    finally:
        versions._installed.cache_clear()
    assert len(keys) == 5


# What a store holds


def publish(store: TemplateStore, scratch: Path, **changes: Any) -> Any:
    scratch.mkdir(parents=True)
    (scratch / "plain.onnx").write_text("graph")
    return store.publish(KEY, scratch, **{"notes": ["a note"], "nodes": 7, "direct": None, **changes})


def test_what_is_published_is_read_again(tmp_path: Path) -> None:
    store = TemplateStore(tmp_path / "templates")
    assert store.read(KEY) is None
    made = publish(store, tmp_path / "scratch")
    assert store.read(KEY) == made
    assert (made.notes, made.nodes, made.plain.read_text()) == (("a note",), 7, "graph")
    assert (made.simplified.is_file(), made.why_plain()) == (False, None)
    kept = tmp_path / "kept"
    kept.mkdir()
    made.keep_simplified(kept, reason="onnxsim failed")
    assert made.why_plain() == "onnxsim failed"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "template.json").write_text("{"), id="torn-record"),
        pytest.param(lambda folder: (folder / "template.json").unlink(), id="no-record"),
        pytest.param(lambda folder: (folder / "plain.onnx").unlink(), id="no-graph"),
        pytest.param(lambda folder: (folder / "template.json").write_text('{"schema": 99}'), id="of-another-time"),
    ],
)
def test_what_is_damaged_is_made_again(damage: Any, tmp_path: Path) -> None:
    store = TemplateStore(tmp_path / "templates")
    damage(publish(store, tmp_path / "one").folder)
    assert store.read(KEY) is None
    assert store.read(publish(store, tmp_path / "two").folder.name) is not None


def test_who_waits_for_a_template_can_be_stopped(tmp_path: Path) -> None:
    store, stopping = TemplateStore(tmp_path / "templates"), threading.Event()
    with store.locked(KEY, stopping=stopping):
        stopping.set()
        other = TemplateStore(tmp_path / "templates")
        with pytest.raises(KeyboardInterrupt), other.locked(KEY, stopping=stopping):
            pass


def test_a_store_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "templates").write_text("a file")
    with pytest.raises(FerryError, match="template store") as caught:
        publish(TemplateStore(tmp_path / "templates"), tmp_path / "scratch")
    # Not remembered as a fault of the model.
    assert caught.value.kind is ErrorKind.STORE
    with (
        pytest.raises(FerryError, match="template store") as caught,
        TemplateStore(tmp_path / "templates").locked(KEY, stopping=threading.Event()),
    ):
        pass
    assert caught.value.kind is ErrorKind.STORE


def test_an_error_of_who_holds_a_template_is_its_own(tmp_path: Path) -> None:
    store = TemplateStore(tmp_path / "templates")
    with pytest.raises(InputError, match="no weights"), store.locked(KEY, stopping=threading.Event()):
        raise InputError("no weights")


def test_what_nobody_uses_is_cleared_up(tmp_path: Path) -> None:
    places = workspace(tmp_path / "home")
    store = TemplateStore(places.templates)
    old, fresh = publish(store, tmp_path / "one").folder, "cd" * 32
    long_ago = time.time() - 10 * 86400
    for path in (old, *old.iterdir()):
        os.utime(path, (long_ago, long_ago))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "plain.onnx").write_text("graph")
    store.publish(fresh, tmp_path / "two", notes=[], nodes=1, direct=None)
    with db.session_scope(catalog(places)) as session:
        for key, reused in ((KEY, False), (KEY, True), (fresh, False), ("ef" * 32, False)):
            db.note_template(session, key, architecture="TinyModel", size_bytes=5, reused=reused, at=NOW)
        assert {record.key: record.hits for record in db.list_templates(session)} == {KEY: 1, fresh: 0, "ef" * 32: 0}

    (item,) = collect(places, unused_days=9, dry_run=True)
    assert (item.what, item.path, old.is_dir()) == ("template", old, True)
    assert collect(places, unused_days=11) == []
    assert [item.path for item in collect(places, unused_days=9)] == [old]
    assert store.read(KEY) is None
    assert store.read(fresh) is not None
    with db.session_scope(catalog(places)) as session:
        # That of the folder which was never there goes as well.
        assert [record.key for record in db.list_templates(session)] == [fresh]


def test_a_template_that_is_read_is_used(tmp_path: Path) -> None:
    places = workspace(tmp_path / "home")
    store = TemplateStore(places.templates)
    folder = publish(store, tmp_path / "one").folder
    long_ago = time.time() - 10 * 86400
    for path in (folder, *folder.iterdir()):
        os.utime(path, (long_ago, long_ago))
    assert store.read(KEY) is not None
    assert collect(places, unused_days=9) == []


# One trace for many models


def convert(home: Path, *folders: Path) -> dict[str, ModelEntry]:
    report = run_batch([request(folder) for folder in folders], workspace(home), output=None, workers=2,
                       engine=Engine.LOCAL, retry_failed=None, listener=SilentListener())  # fmt: skip
    return {Path(entry.id).name: entry for entry in report.models}


def test_fine_tunes_share_one_trace_and_a_wrong_one_is_not_called_converted(tmp_path: Path) -> None:
    home = tmp_path / "home"
    folders = [tiny(tmp_path / f"tune-{seed}", "bert-sequence-classification", seed=seed) for seed in range(3)]
    labels = json.loads((folders[2] / "config.json").read_text())
    labels["id2label"] = {key: f"label {key}" for key in labels["id2label"]}
    labels["label2id"] = {value: int(key) for key, value in labels["id2label"].items()}
    (folders[2] / "config.json").write_text(json.dumps(labels))
    entries = convert(home, *folders)
    assert [entry.status for entry in entries.values()] == [Status.CONVERTED] * 3, entries
    assert sorted(str(entry.template) for entry in entries.values()) == ["reused", "reused", "traced"]
    assert all(entry.simplified for entry in entries.values())
    for entry in entries.values():
        (graph,) = entry.graphs
        assert (sum(graph.operators.values()), sum(graph.operators_before_simplify.values())) == (
            graph.nodes,
            graph.nodes_before_simplify,
        )
    assert_nothing_half_done(home)
    with db.session_scope(catalog(workspace(home))) as session:
        (record,) = db.list_templates(session)
    assert (record.architecture, record.hits) == ("BertForSequenceClassification", 2)
    assert record.size_bytes > 0

    # Once one was compared at all shapes, no other is compared at a long text; what is not proven any more is.
    (proof,) = (home / "templates").glob("*/*/simplified.proven")
    (brief,) = convert(home, tiny(tmp_path / "tune-3", "bert-sequence-classification", seed=3)).values()
    proof.unlink()
    (whole,) = convert(home, tiny(tmp_path / "tune-4", "bert-sequence-classification", seed=4)).values()
    assert (brief.parity.shapes + 1, brief.template) == (whole.parity.shapes, whole.template)
    assert {c.shape for c in whole.parity.cells} - {c.shape for c in brief.parity.cells} == {"a long text"}
    assert brief.parity.axes_proven == whole.parity.axes_proven
    assert proof.is_file()

    # A template that is wrong is found out, and the model gets a graph of its own.
    (template,) = (home / "templates").glob("*/*/simplified.weights.json")
    for name in ("simplified", "plain"):
        path = template.with_name(f"{name}.weights.json")
        weights = json.loads(path.read_text())
        (query,) = (w for w in weights if w["key"].endswith("layer.0.attention.self.query.weight"))
        (key,) = (w for w in weights if w["key"].endswith("layer.0.attention.self.key.weight"))
        query["key"], key["key"] = key["key"], query["key"]
        path.write_text(json.dumps(weights))
    (entry,) = convert(home, tiny(tmp_path / "tune-9", "bert-sequence-classification", seed=9)).values()
    assert (entry.status, entry.template) == (Status.CONVERTED, "direct")
    assert any("what was bound to the template does not hold" in note for note in entry.notes)


def test_an_artifact_can_share_the_checkpoints_file(tmp_path: Path) -> None:
    folder, output = tiny(tmp_path / "model", "bert-model"), tmp_path / "out"
    asked = request(folder, weights="link")
    report = run_batch([asked], workspace(tmp_path / "home"), output=output, workers=1, engine=Engine.LOCAL,
                       retry_failed=None, listener=SilentListener())  # fmt: skip
    (entry,) = report.models
    assert entry.status is Status.CONVERTED, entry.error
    assert (output / "model" / "model.safetensors").samefile(folder / "model.safetensors")
    assert (output / "model" / "model.onnx").stat().st_size < (folder / "model.safetensors").stat().st_size / 2
    assert_nothing_half_done(tmp_path / "home", output)
    assert reproduce_command(asked).endswith("--weights link")


def test_a_checkpoint_with_nan_is_refused_with_a_template_too(tmp_path: Path) -> None:
    home, good, bad = tmp_path / "home", tiny(tmp_path / "good"), tiny(tmp_path / "bad", seed=1)
    weights = load_file(bad / "model.safetensors")
    name = next(name for name, value in weights.items() if value.dtype == np.float32)
    weights[name].flat[0] = np.nan
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    entries = convert(home, good, bad)
    assert entries["good"].status is Status.CONVERTED
    assert entries["bad"].error is not None
    assert "holds NaN or infinite weights" in entries["bad"].error.message
