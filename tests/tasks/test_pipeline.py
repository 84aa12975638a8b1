"""One model through all steps: what is done again and what is not, which failures are remembered, who is waited for.

Conversions here are real, save where a test is about the order of things: there the steps are made of files alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import db
from db.found import list_found_done
from db.overview import running_totals
from flows.batch import _outputs, run_batch
from onnx_config.errors import (
    ErrorKind,
    FerryError,
    InputError,
    InternalError,
    ModelError,
    ResourceError,
    TransientError,
    error_of_kind,
)
from onnx_config.export import isolate, watch
from onnx_config.export.artifact import FERRY_FILE
from onnx_config.spec import ModelSpec
from tasks import pipeline, retry
from tasks.crew import Crew
from tasks.export import Exported
from tasks.job import Job, StepCost
from tasks.lookup import Lookup, look_up
from tasks.memory import MemoryGate
from tasks.parity import Checked
from tasks.pipeline import convert_model, place_known
from tasks.progress import Progress
from tasks.register import catalog, record_entry, register
from tasks.report import (
    Engine,
    ErrorEntry,
    GraphEntry,
    ModelEntry,
    OutputDifference,
    ParityEntry,
    Report,
    Status,
    Step,
    Verdict,
)
from tasks.request import ConversionRequest, SilentListener, Workspace
from tasks.retry import RETRIES, is_transient, with_retries
from tasks.simplify import Simplified
from tasks.steps import PLAIN_STEPS, Steps
from tests.faults.harness import (
    artifact_folders,
    assert_nothing_half_done,
    assert_whole,
    catalog_rows,
    environment,
    request,
    tiny,
    workspace,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COST = StepCost(seconds=0.1, peak_rss_bytes=1000)


def run(requests: Iterable[ConversionRequest], places: Workspace, **changes: Any) -> Report:
    options: dict[str, Any] = {
        "output": None,
        "workers": 2,
        "engine": Engine.LOCAL,
        "retry_failed": None,
        "listener": SilentListener(),
    }
    return run_batch(list(requests), places, **{**options, **changes})


def known(asked: ConversionRequest, places: Workspace, **options: Any) -> ModelEntry | None:
    lookup = look_up([asked], places, **options)[asked]
    assert isinstance(lookup, Lookup), lookup
    return lookup.known


# A batch again


@dataclass(frozen=True)
class Done:
    """A model that was converted, and where."""

    request: ConversionRequest
    places: Workspace
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("converted")
    asked, places = request(tiny(root / "model")), workspace(root / "home")
    report = run([asked], places)
    (entry,) = report.models
    assert entry.status is Status.CONVERTED, entry.error
    assert_nothing_half_done(places.home)
    return Done(asked, places, Path(entry.artifact or ""), report.seconds)


def test_a_second_run_does_nothing_but_look(done):
    """No child, no Prefect and no PyTorch, although Prefect is the engine asked for."""
    code = f"""
import json, sys, time
started = time.monotonic()
from pathlib import Path
import psutil
from flows.batch import run_batch
from tasks.report import Engine
from tasks.request import ConversionRequest, SilentListener, Workspace
places = Workspace(home=Path({str(done.places.home)!r}), catalog_url={done.places.catalog_url!r},
                   store=Path({str(done.places.store)!r}), memory_limit_bytes=1, timeout_seconds=1.0)
report = run_batch([ConversionRequest(model_id={done.request.model_id!r})], places, output=None, workers=2,
                   engine=Engine.PREFECT, retry_failed=None, listener=SilentListener())
print(json.dumps({{"totals": report.totals.model_dump(), "seconds": time.monotonic() - started,
    "heavy": [name for name in ("prefect", "torch", "transformers", "onnx", "onnxruntime") if name in sys.modules],
    "children": len(psutil.Process().children(recursive=True))}}))
"""
    before = catalog_rows(done.places.home)
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(done.places.home), capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    assert found.pop("seconds") < 10
    assert found == {
        "totals": {"converted": 0, "reused": 1, "failed": 0, "mismatch": 0},
        "heavy": [],
        "children": 0,
    }
    assert catalog_rows(done.places.home) == before


@pytest.fixture
def restored(done: Done) -> Iterator[Done]:
    """Put the artifact back as it was."""
    kept = done.folder.with_name("kept")
    shutil.copytree(done.folder, kept)
    yield done
    shutil.rmtree(done.folder, ignore_errors=True)
    kept.rename(done.folder)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "model.onnx").unlink(), id="graph-deleted"),
        pytest.param(lambda folder: (folder / "model.onnx").write_bytes(b"half"), id="graph-truncated"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), id="config-deleted"),
        pytest.param(lambda folder: (folder / FERRY_FILE).unlink(), id="ferry-json-deleted"),
        pytest.param(shutil.rmtree, id="folder-deleted"),
    ],
)
def test_a_damaged_artifact_is_not_reused(restored, damage):
    assert known(restored.request, restored.places) is not None
    damage(restored.folder)
    assert known(restored.request, restored.places) is None


def test_other_options_and_other_content_are_other_work(done, tmp_path):
    assert known(done.request, done.places) is not None
    assert known(request(done.request.model_id, simplify=False), done.places) is None
    changed = tmp_path / "changed"
    shutil.copytree(done.request.model_id, changed)
    assert known(request(changed), done.places) is not None
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    assert known(request(changed), done.places) is None


def test_a_damaged_artifact_is_converted_again_and_heals(done, tmp_path):
    (done.folder / "model.onnx").write_bytes(b"half")
    (done.folder / "config.json").unlink()
    report = run([done.request], done.places, output=tmp_path)
    assert report.totals.converted == 1
    assert_nothing_half_done(done.places.home, tmp_path)
    assert artifact_folders(done.places.store) == {done.folder}, "the same model has become another graph"
    assert known(done.request, done.places) is not None


def test_a_lost_catalog_is_made_anew_over_the_store_that_is_there(done, tmp_path):
    places = replace(done.places, catalog_url=f"sqlite:///{tmp_path / 'new.db'}")
    assert run([done.request], places).totals.converted == 1
    assert run([done.request], places).totals.reused == 1
    for folder in artifact_folders(done.places.store):
        assert_whole(folder)


def test_a_known_model_is_placed_without_work(done, tmp_path):
    for _ in range(2):
        (entry,) = run([done.request], done.places, output=tmp_path / "out").models
        assert (entry.status, entry.artifact) == (Status.REUSED, str(tmp_path / "out" / "model"))
        assert [graph.path for graph in entry.graphs] == [str(tmp_path / "out" / "model" / "model.onnx")]
        assert_whole(tmp_path / "out" / "model")


def test_the_catalog_knows_what_a_run_found_done(done):
    with db.session_scope(catalog(done.places)) as session:
        before = db.list_batches(session)[0].id
    run([done.request], done.places)
    with db.session_scope(catalog(done.places), read_only=True) as session:
        batch = db.list_batches(session)[0]
        assert batch.id > before
        (found,) = list_found_done(session, batch.id, limit=5)
        assert (found.model_id, found.status) == (done.request.model_id, "reused")
        assert running_totals(session, batch.id) == batch.totals


def test_a_run_without_work_removes_what_a_killed_one_left(done):
    left = done.places.home / "tmp" / "export-of-a-killed-run"
    left.mkdir(parents=True)
    (left / "traced.onnx").write_text("half")
    left.with_name(f"{left.name}.lock").touch()
    assert run([done.request], done.places).totals.reused == 1
    assert_nothing_half_done(done.places.home)


# What runs out


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        pytest.param({"memory_limit_bytes": 50_000_000}, ErrorKind.OUT_OF_MEMORY, "more than its limit of 48 MiB",
                     id="memory"),
        pytest.param({"timeout_seconds": 0.01}, ErrorKind.TIMEOUT, "took longer than its limit of 0.01 s", id="time"),
    ],
)  # fmt: skip
def test_what_runs_out_is_tried_once_more_alone(tmp_path, monkeypatch, changes, kind, words):
    # A tiny model is detected in less than the usual time between two looks at a child.
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.002)
    places = workspace(tmp_path / "home", **changes)
    asked = request(tiny(tmp_path / "model"))
    (entry,) = run([asked], places).models
    assert entry.error is not None
    assert (entry.error.kind, entry.error.step, entry.attempts) == (kind, Step.DETECT, 2)
    assert words in entry.error.message
    assert entry.notes == (f"the first try ended with {kind}; the second ran alone",)
    assert_nothing_half_done(places.home)
    # More memory or time is all it needs, so that the next batch tries.
    assert known(asked, places) is None
    assert catalog_rows(places.home)[0].attempts == 2


# Steps made of files


SPEC = ModelSpec(
    model_type="tiny", architecture="TinyModel", task="feature-extraction", task_family="feature-extraction",
    inputs=(), outputs=(), axis_ranges={}, sizes={}, preprocessor=None, parameters=None,
)  # fmt: skip
GRAPH = GraphEntry(role="model", path="model.onnx", opset=20, nodes=2, nodes_before_simplify=3, inputs=(), outputs=())


def verdict(value: Verdict, detail: str | None = None) -> Checked:
    entry = ParityEntry(
        verdict=value, device="cpu", provider="CPUExecutionProvider", shapes=5, max_abs_diff=0.0, tolerance=1e-5,
        axes_proven=(), outputs=(OutputDifference(name="x", max_abs_diff=0.0, tolerance=1e-5),), detail=detail,
    )  # fmt: skip
    return Checked(entry=entry, notes=(), cost=COST)


@dataclass
class Files:
    """Steps that write files; ``faults`` says what a step raises, in turn, before it works."""

    faults: dict[Step, list[BaseException]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    hook: Callable[[Step, Job], object] = lambda _step, _job: None

    def _call(self, step: Step, job: Job, note: str = "") -> None:
        self.calls.append(f"{step}{note}")
        self.hook(step, job)
        if self.faults.get(step):
            raise self.faults[step].pop(0)

    def detect(self, job: Job) -> tuple[ModelSpec, StepCost]:
        self._call(Step.DETECT, job)
        return SPEC, COST

    def export(self, job: Job, _spec: ModelSpec, **_options: object) -> Exported:
        self._call(Step.EXPORT, job)
        (job.scratch / "traced.onnx").write_text("graph")
        return Exported(use="direct", path=job.scratch / "traced.onnx", notes=(), cost=COST)

    def simplify(
        self, job: Job, _spec: ModelSpec, exported: Exported, _metadata: object, *, enabled: bool = True
    ) -> Simplified:
        self._call(Step.SIMPLIFY, job, "" if enabled else " not")
        (job.scratch / "artifact").mkdir(exist_ok=True)
        path = job.scratch / "artifact" / "model.onnx"
        path.write_text(f"{exported.path.read_text()} of {job.key}, simplified: {enabled}")
        return Simplified(path=path, graph=GRAPH, simplified=enabled, reason=None, cost=COST)

    def parity(self, job: Job, _spec: ModelSpec, _stored: Simplified, **_: Any) -> Checked:
        self._call(Step.PARITY, job)
        value = self.verdicts.pop(0) if self.verdicts else Verdict.VERIFIED
        return verdict(value, None if value is Verdict.VERIFIED else "x differs")

    def register(self, job: Job, entry: ModelEntry, **options: Any) -> ModelEntry:
        self._call(Step.REGISTER, job)
        return register(job, entry, **options)

    @property
    def steps(self) -> Steps:
        """The steps with their retries, as in a batch without Prefect."""
        own = {step.value: with_retries(getattr(self, step)) for step in Step if step is not Step.FETCH}
        return Steps(**own, join=PLAIN_STEPS.join)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.001)
    # Steps made of files need no server; those of real conversions start it when they are called.
    monkeypatch.setattr(isolate, "warm_up", lambda: None)


@pytest.fixture
def places(tmp_path: Path) -> Workspace:
    return workspace(tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> ConversionRequest:
    return make_model(tmp_path / "model")


def make_model(folder: Path) -> ConversionRequest:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": folder.name}))
    return request(folder)


def test_the_biggest_model_comes_last(tmp_path, monkeypatch):
    places, asked = workspace(tmp_path / "home"), []
    for name, size in (("large", 3000), ("small", 1000), ("none", 0), ("middle", 2000)):
        asked.append(make_model(tmp_path / name))
        if size:
            (tmp_path / name / "model.safetensors").write_bytes(b"0" * size)
    begun: list[str] = []

    class Noting(SilentListener):
        def model_started(self, model_id: str) -> None:
            begun.append(Path(model_id).name)

    report = run(asked, places, workers=1, listener=Noting())
    assert begun == ["none", "small", "middle", "large"]
    assert [Path(entry.id).name for entry in report.models] == ["large", "small", "none", "middle"]


def test_the_steps_run_in_their_order(places, model):
    files = Files()
    entry = convert_model(model, places, steps=files.steps)
    assert files.calls == ["detect", "export", "simplify", "parity", "register"]
    assert (entry.status, entry.template, entry.simplified, entry.attempts) == (Status.CONVERTED, "direct", True, 1)
    assert list(entry.seconds) == list(Step)
    assert entry.peak_rss_bytes == COST.peak_rss_bytes
    assert_nothing_half_done(places.home)


@pytest.mark.parametrize("kind", ErrorKind)
@pytest.mark.parametrize("step", [Step.DETECT, Step.REGISTER])
def test_each_kind_is_tried_as_often_as_it_deserves(places, model, kind, step):
    files = Files(faults={step: [error_of_kind(kind, "no")] * 10})
    entry = convert_model(model, places, steps=files.steps)
    assert entry.error is not None
    assert (entry.status, entry.error.kind, entry.error.step) == (Status.FAILED, kind, step)
    expected = 1 + RETRIES if kind.transient else 2 if kind.retried_alone else 1
    assert files.calls.count(step) == expected
    assert entry.attempts == (2 if kind.retried_alone else 1)
    assert [row.error.kind for row in catalog_rows(places.home) if row.error] == [kind]
    assert_nothing_half_done(places.home)


@pytest.mark.parametrize("step", [step for step in Step if step is not Step.FETCH])
def test_what_passes_is_not_told(places, model, step):
    files = Files(faults={step: [TransientError("no", kind=ErrorKind.STORE)]})
    assert convert_model(model, places, steps=files.steps).status is Status.CONVERTED
    assert files.calls.count(step) == 2
    assert_nothing_half_done(places.home)


@pytest.mark.parametrize("kind", ErrorKind)
def test_only_the_world_outside_is_transient(kind):
    expected = kind in ("network", "store", "catalog")
    assert is_transient(error_of_kind(kind, "no")) is expected
    assert not is_transient(ConnectionError())


@pytest.mark.parametrize("step", [step for step in Step if step is not Step.FETCH])
def test_a_bug_of_ours_ends_one_model_and_says_so(places, tmp_path, step):
    files = Files(faults={step: [ZeroDivisionError("division by zero")]})
    models = [make_model(tmp_path / name) for name in ("one", "two")]
    first, second = (convert_model(asked, places, steps=files.steps) for asked in models)
    assert first.error is not None
    assert (first.error.kind, first.error.step) == (ErrorKind.INTERNAL, step)
    assert first.error.message == ("onnx-ferry failed with ZeroDivisionError: division by zero. Please report this.")
    assert second.status is Status.CONVERTED
    assert_nothing_half_done(places.home)


STEPS_OF_A_KIND = [
    *((kind, step) for kind in ErrorKind for step in (Step.DETECT, Step.EXPORT)),
    (ErrorKind.BAD_INPUT, Step.FETCH),
    (ErrorKind.BAD_INPUT, Step.PARITY),
    (ErrorKind.BAD_INPUT, Step.REGISTER),
    (ErrorKind.RUNTIME_FAILED, Step.PARITY),
]


@pytest.mark.parametrize(("kind", "step"), STEPS_OF_A_KIND)
def test_a_failure_is_remembered_if_the_model_is_to_blame(places, model, kind, step):
    """Not where a device, a disk or the network was missing: they may be there tomorrow."""
    error = ErrorEntry(kind=kind, message="no", step=step, reproduce="ferry convert x")
    entry = Progress(request=model, listener=SilentListener()).entry(Status.FAILED)
    lookup = look_up([model], places)[model]
    assert isinstance(lookup, Lookup)
    record_entry(places, model, entry.model_copy(update={"error": error}), key=lookup.key, started_at=NOW)
    kinds = {ErrorKind.BAD_INPUT, ErrorKind.UNSUPPORTED, ErrorKind.EXPORT_FAILED, ErrorKind.RUNTIME_FAILED,
             ErrorKind.MISMATCH}  # fmt: skip
    expected = kind in kinds and (kind is not ErrorKind.BAD_INPUT or step in (Step.DETECT, Step.EXPORT))
    found = known(model, places)
    assert (found is not None) is expected
    if found is not None:
        assert found.error == error
        assert found.notes == ("known from an earlier run with the same versions; --retry-failed tries again",)
        assert known(model, places, retry_failed=frozenset({kind})) is None
        assert known(model, places, retry_failed=frozenset(ErrorKind) - {kind}) is not None


def test_a_remembered_failure_is_reported_without_work(places, model):
    files = Files(faults={Step.EXPORT: [ModelError("no", kind=ErrorKind.UNSUPPORTED)]})
    options: dict[str, Any] = {"steps": files.steps, "retry_failed": frozenset()}
    first = convert_model(model, places, **options)
    again = convert_model(model, places, **options)
    assert files.calls == ["detect", "export"]
    assert again.error == first.error
    retried = convert_model(model, places, steps=files.steps, retry_failed=frozenset({ErrorKind.UNSUPPORTED}))
    assert retried.status is Status.CONVERTED
    assert known(model, places) is not None


def test_a_model_that_is_named_alone_is_always_tried_again(places, model):
    files = Files(faults={Step.EXPORT: [ModelError("no", kind=ErrorKind.UNSUPPORTED)]})
    assert convert_model(model, places, steps=files.steps).status is Status.FAILED
    assert convert_model(model, places, steps=files.steps).status is Status.CONVERTED


# Verdicts


@pytest.mark.parametrize(
    ("verdicts", "calls", "status", "simplified"),
    [
        pytest.param([], ["simplify", "parity"], Status.CONVERTED, True, id="simplified-holds"),
        pytest.param(
            [Verdict.MISMATCH], ["simplify", "parity", "simplify not", "parity"], Status.CONVERTED, False,
            id="only-the-plain-one-holds",
        ),
        pytest.param(
            [Verdict.MISMATCH] * 2, ["simplify", "parity", "simplify not", "parity"], Status.MISMATCH, False,
            id="neither-holds",
        ),
        pytest.param([Verdict.UNSTABLE], ["simplify", "parity"], Status.MISMATCH, True, id="unstable"),
    ],
)  # fmt: skip
def test_the_verdict_binds(places, model, tmp_path, monkeypatch, verdicts, calls, status, simplified):
    monkeypatch.setattr("tasks.register.run_child", lambda *_: ({}, COST))  # the certificate of a graph that is none
    files = Files(verdicts=verdicts)
    entry = convert_model(model, places, steps=files.steps, output=tmp_path / "out")
    assert files.calls[2:-1] == calls
    assert (entry.status, entry.simplified) == (status, simplified)
    (folder,) = artifact_folders(places.store)
    assert_nothing_half_done(places.home)
    if status is Status.MISMATCH:
        assert entry.error is not None
        assert entry.error.kind is ErrorKind.MISMATCH
        assert "quarantine" in entry.error.message
        assert folder.parent.name == "quarantine"
        assert entry.artifact == str(folder)
        assert not (tmp_path / "out").exists()
        # Remembered, and never reused.
        again = known(model, places)
        assert again is not None
        assert again.status is Status.MISMATCH
    else:
        assert entry.artifact == str(tmp_path / "out")
        assert_whole(tmp_path / "out")


def test_a_simplified_graph_that_the_runtime_refuses_gives_way(places, model):
    files = Files(faults={Step.PARITY: [ModelError("bad node", kind=ErrorKind.RUNTIME_FAILED)]})
    entry = convert_model(model, places, steps=files.steps)
    assert (entry.status, entry.simplified) == (Status.CONVERTED, False)
    assert entry.notes == ("the plain graph is kept: the simplified one does not hold (bad node)",)


# Output folders


def test_a_failure_to_place_is_not_a_failure_to_convert(places, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    entry = convert_model(model, places, steps=Files().steps, output=tmp_path / "file" / "out")
    assert entry.error is not None
    assert (entry.status, entry.error.kind, entry.error.step) == (Status.FAILED, ErrorKind.BAD_INPUT, Step.REGISTER)
    assert entry.error.reproduce.endswith(f"--output {tmp_path / 'file' / 'out'}")
    assert entry.notes == (f"the model is converted all the same; its files are in {entry.artifact}",)
    assert [row.status for row in catalog_rows(places.home)] == ["converted"]
    again = known(model, places)
    assert again is not None
    placed = place_known(again, model, tmp_path / "out", places)
    assert (placed.status, placed.artifact) == (Status.REUSED, str(tmp_path / "out"))


def test_models_of_one_name_get_folders_of_their_own(tmp_path):
    models = ["./a/model", "./b/model", "./c/MODEL", "org/model", "./d/org__model", "./model-2", "./e/model"]
    requests = [request(name) for name in models]
    folders = _outputs(requests, tmp_path)
    names = [folder.name for folder in folders.values() if folder is not None]
    assert names[:4] == ["model", "model-2", "MODEL-3", "org__model"]
    assert len({name.lower() for name in names}) == len(models)
    assert {folder.parent for folder in folders.values() if folder is not None} == {tmp_path}
    assert set(_outputs(requests, None).values()) == {None}


# What stands in the way


def test_a_catalog_that_is_broken_ends_the_batch_before_it_starts(places, model):
    places.home.mkdir()
    (places.home / "catalog.db").write_text("no database " * 1000)
    with pytest.raises(TransientError, match="not a readable SQLite database") as caught:
        run([model], places)
    assert caught.value.kind is ErrorKind.CATALOG
    assert not (places.home / "tmp").exists()


def test_a_catalog_that_breaks_meanwhile_fails_the_model_and_not_the_batch(places, tmp_path, monkeypatch):
    """The report comes, although nothing can be recorded any more."""
    file = places.home / "catalog.db"

    def tear(step: Step, _job: Job) -> None:
        if step is not Step.REGISTER or file.read_bytes().startswith(b"torn"):
            return
        # Nobody may have the file open: pages in memory would hide that it is torn, and a mapped file that becomes
        # shorter ends the process. The thread that keeps the lease has noted the step by then.
        time.sleep(0.5)
        catalog(places).dispose()
        (places.home / "torn").write_bytes(b"torn" * 10_000)
        (places.home / "torn").replace(file)
        for beside in ("catalog.db-wal", "catalog.db-shm"):
            (places.home / beside).unlink(missing_ok=True)

    files = Files(hook=tear)
    monkeypatch.setattr("flows.batch.convert_one.__kwdefaults__", {"steps": files.steps})
    report = run([make_model(tmp_path / "one")], places)
    (entry,) = report.models
    assert entry.error is not None
    assert entry.error.kind is ErrorKind.CATALOG
    assert files.calls.count("register") == 1 + RETRIES
    assert file.exists()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        pytest.param("./" + "x" * 300, ErrorKind.BAD_INPUT, "File name too long", id="name-too-long"),
        pytest.param("~nobody-by-this-name/model", ErrorKind.BAD_INPUT, "home directory", id="no-such-home"),
        pytest.param("./nowhere", ErrorKind.NOT_FOUND, "does not exist", id="absent"),
    ],
)
def test_a_folder_that_cannot_be_looked_at_costs_no_other_model(places, model, monkeypatch, name, kind, words):
    files = Files()
    monkeypatch.setattr("flows.batch.convert_one.__kwdefaults__", {"steps": files.steps})
    bad, good = run([request(name), model], places).models
    assert bad.error is not None
    assert (bad.error.kind, bad.error.step) == (kind, Step.FETCH)
    assert words in bad.error.message
    assert good.status is Status.CONVERTED
    assert {row.batch_id for row in catalog_rows(places.home)} == {1}


def test_a_bug_in_looking_up_costs_no_other_model(places, model, monkeypatch):
    monkeypatch.setattr(pipeline.hub, "resolve", lambda *_, **__: 1 / 0)
    found = look_up([model], places)[model]
    assert isinstance(found, InternalError)
    assert "ZeroDivisionError" in found.message


def test_many_models_are_looked_up_side_by_side(places, monkeypatch):
    # None gets past it before four have come.
    together = threading.Barrier(4)

    def resolve(*_: object, **__: object) -> None:
        together.wait(timeout=30)
        raise InputError("no", kind=ErrorKind.NOT_FOUND)

    monkeypatch.setattr(pipeline.hub, "resolve", resolve)
    requests = [request(f"org/{number}") for number in range(24)]
    found = look_up(requests, places)
    assert list(found) == requests
    assert {type(answer) for answer in found.values()} == {InputError}


# Interrupted


@pytest.mark.parametrize("step", [step for step in Step if step is not Step.FETCH])
def test_an_interruption_leaves_nothing_behind_and_blames_nobody(places, model, step):
    stopping = threading.Event()

    def stop(reached: Step, _job: Job) -> None:
        if reached is step:
            stopping.set()

    # What the step says after its child was killed.
    files = Files(hook=stop, faults={step: [ResourceError("interrupted", kind=ErrorKind.CRASHED)]})
    with pytest.raises(KeyboardInterrupt):
        convert_model(model, places, steps=files.steps, stopping=stopping)
    assert files.calls[-1] == step, "a step began after the interruption"
    assert catalog_rows(places.home) == []
    assert_nothing_half_done(places.home)


def test_an_interruption_ends_waiting_for_another_process(places, model):
    """One that converts the same model holds its lock; the wait for it is not for ever."""
    inside, go_on, stopping = threading.Event(), threading.Event(), threading.Event()

    def hold(step: Step, _job: Job) -> None:
        if step is Step.EXPORT:
            inside.set()
            assert go_on.wait(20)

    first = Crew(lambda asked: convert_model(asked, places, steps=Files(hook=hold).steps), [model], workers=1)
    assert inside.wait(20)
    waiting = Files()
    second = Crew(
        lambda asked: convert_model(asked, places, steps=waiting.steps, stopping=stopping), [model], workers=1
    )
    time.sleep(0.2)
    stopping.set()
    with pytest.raises(KeyboardInterrupt):
        list(second.results())
    assert waiting.calls == []
    go_on.set()
    ((_, entry),) = first.results()
    assert entry.status is Status.CONVERTED


def test_an_interruption_ends_waiting_for_memory(places, model):
    gate, stopping, files = MemoryGate(10), threading.Event(), Files()
    with gate.alone():
        crew = Crew(
            lambda asked: convert_model(asked, places, steps=files.steps, gate=gate, stopping=stopping),
            [model],
            workers=1,
        )
        time.sleep(0.2)
        stopping.set()
        with pytest.raises(KeyboardInterrupt):
            list(crew.results())
    assert files.calls == []
    assert_nothing_half_done(places.home)


def test_two_threads_with_the_same_model_convert_it_once(places, tmp_path):
    models = [make_model(tmp_path / name / "model") for name in ("one", "two")]
    files = Files(hook=lambda *_: time.sleep(0.02))
    crew = Crew(lambda asked: convert_model(asked, places, steps=files.steps), models, workers=2)
    statuses = sorted(entry.status for _, entry in crew.results())
    assert statuses == [Status.CONVERTED, Status.REUSED]
    assert files.calls.count("export") == 1


def test_one_that_ran_out_of_memory_comes_again_when_the_others_are_done(places, tmp_path):
    """Its second try shares the machine with nobody."""
    gate = MemoryGate(places.memory_limit_bytes)
    working: set[str] = set()
    beside: list[set[str]] = []

    def note(step: Step, job: Job) -> None:
        name = Path(job.request.model_id).name
        if step is Step.DETECT:
            working.add(name)
        if name == "large" and job.memory_bytes == gate.limit_bytes:
            beside.append(set(working) - {name})
        time.sleep(0.05)
        if step is Step.REGISTER:
            working.discard(name)

    models = [make_model(tmp_path / name) for name in ("large", "a", "b", "c")]
    large = Files(hook=note, faults={Step.DETECT: [ResourceError("no")]})
    small = Files(hook=note)

    def convert(asked: ConversionRequest) -> ModelEntry:
        files = large if asked is models[0] else small
        return convert_model(asked, places, steps=files.steps, gate=gate)

    entries = dict(Crew(convert, models, workers=3).results())
    assert {entry.status for entry in entries.values()} == {Status.CONVERTED}
    assert entries[models[0]].attempts == 2
    assert beside
    assert all(others == set() for others in beside)


def test_errors_are_values_that_a_report_can_hold(places, model):
    error: FerryError = InputError("one\n  paragraph   only")
    entry = pipeline.refused(model, error, places)
    assert entry.error is not None
    assert entry.error.message == "one paragraph only"
    assert Report.of([entry], started_at=NOW, seconds=0.0).all_verified is False
