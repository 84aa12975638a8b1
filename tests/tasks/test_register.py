"""Between the report and the catalog nothing is lost, and a registration that is tried again ends as one."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import db
from onnx_config.errors import ErrorKind, TransientError
from onnx_config.export.artifact import FERRY_FILE, read_ferry_file
from tasks import register as register_module
from tasks.job import Job
from tasks.register import catalog, known_results, record_entry, register, to_entry
from tasks.report import (
    ErrorEntry,
    GraphEntry,
    ModelEntry,
    OutputDifference,
    ParityEntry,
    Status,
    Step,
    TensorEntry,
    Verdict,
)
from tasks.request import ConversionRequest, Workspace
from tests.faults.harness import artifact_folders, assert_nothing_half_done, assert_whole, catalog_rows, workspace

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = "a" * 64

words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
counts = st.integers(0, 2**40)
differences = st.floats(0, allow_nan=False, allow_infinity=True)
tensors = st.builds(
    TensorEntry,
    name=words,
    dtype=st.sampled_from(["int64", "float32", "bool"]),
    shape=st.lists(st.integers(0, 2**31) | words, max_size=4).map(tuple),
)
graphs = st.builds(
    GraphEntry,
    role=words,
    path=words.map(lambda name: f"{sha256(name.encode()).hexdigest()[:8]}.onnx"),
    opset=st.integers(7, 30),
    nodes=counts,
    nodes_before_simplify=counts,
    operators=st.dictionaries(words, counts, max_size=3),
    operators_before_simplify=st.dictionaries(words, counts, max_size=3),
    inputs=st.lists(tensors, max_size=3).map(tuple),
    outputs=st.lists(tensors, max_size=3).map(tuple),
)
parities = st.builds(
    ParityEntry,
    verdict=st.sampled_from(Verdict),
    device=st.sampled_from(["cpu", "cuda"]),
    provider=words,
    shapes=counts,
    max_abs_diff=st.none() | differences,
    tolerance=st.none() | differences,
    axes_proven=st.lists(words, max_size=3).map(tuple),
    outputs=st.lists(
        st.builds(OutputDifference, name=words, max_abs_diff=differences, tolerance=differences), max_size=3
    ).map(tuple),
    detail=st.none() | words,
)
errors = st.builds(
    ErrorEntry, kind=st.sampled_from(ErrorKind), message=words, step=st.sampled_from(Step), reproduce=words
)
entries = st.builds(
    ModelEntry,
    id=st.just("org/name"),
    revision=st.none() | words,
    status=st.sampled_from(Status),
    task=st.none() | words,
    model_type=st.none() | words,
    architecture=st.none() | words,
    artifact=st.none() | words.map(lambda name: str(Path(f"/store/{name}"))),
    graphs=st.lists(graphs, max_size=2, unique_by=(lambda g: g.role, lambda g: g.path)).map(tuple),
    template=st.none() | st.sampled_from(["traced", "reused", "direct"]),
    simplified=st.booleans(),
    parity=st.none() | parities,
    seconds=st.dictionaries(st.sampled_from(Step), st.floats(0, 1e6)),
    peak_rss_bytes=st.none() | counts,
    attempts=st.integers(1, 5),
    notes=st.lists(words, max_size=3).map(tuple),
    error=st.none() | errors,
)
NOTHING = ModelEntry(
    id="org/name",
    revision=None,
    status=Status.FAILED,
    task=None,
    model_type=None,
    architecture=None,
    artifact=None,
    template=None,
    simplified=False,
    parity=None,
    peak_rss_bytes=None,
    attempts=1,
    error=ErrorEntry(kind=ErrorKind.NETWORK, message="gone", step=Step.FETCH, reproduce="ferry convert org/name"),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace(tmp_path_factory.mktemp("catalog"))


def artifact_record(entry: ModelEntry) -> db.ArtifactRecord | None:
    if entry.artifact is None:
        return None
    # As the store has it: one content, one place.
    address = sha256(entry.model_dump_json().encode()).hexdigest()
    return register_module._artifact_record(entry.artifact, address, [], entry.graphs, entry.status is Status.MISMATCH)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(entries)
@example(NOTHING)
def test_what_the_catalog_gives_back_is_what_the_report_said(shared, entry):
    done = entry.status in (Status.CONVERTED, Status.REUSED)
    assume(done is (entry.error is None))
    assume(entry.artifact is not None or not done)
    if entry.artifact is None:
        entry = entry.model_copy(update={"graphs": ()})
    key = sha256(repr(entry).encode()).hexdigest()
    request = ConversionRequest(model_id=entry.id)
    record_entry(shared, request, entry, key=key, started_at=NOW, artifact=artifact_record(entry))
    (record,) = known_results(shared, [key]).values()
    again = to_entry(record, model_id=entry.id, status=entry.status)
    # The catalog has the place once, and the graphs below it; the report spells each path out.
    placed = tuple(g.model_copy(update={"path": str(Path(entry.artifact or "") / g.path)}) for g in entry.graphs)
    assert again == entry.model_copy(update={"graphs": placed})


def test_a_difference_that_is_no_number_comes_back_as_one(shared):
    parity = ParityEntry(
        verdict=Verdict.MISMATCH,
        device="cpu",
        provider="CPUExecutionProvider",
        shapes=5,
        max_abs_diff=float("nan"),
        tolerance=1e-5,
        axes_proven=(),
        outputs=(OutputDifference(name="logits", max_abs_diff=float("nan"), tolerance=1e-5),),
    )
    entry = NOTHING.model_copy(update={"parity": parity})
    record_entry(shared, ConversionRequest(model_id=entry.id), entry, key=KEY, started_at=NOW)
    (record,) = known_results(shared, [KEY]).values()
    again = to_entry(record, model_id=entry.id, status=entry.status)
    assert repr(again) == repr(entry)


def test_the_newest_result_of_a_key_counts(shared):
    request = ConversionRequest(model_id="org/name")
    for message in ("first", "second"):
        assert NOTHING.error is not None
        error = NOTHING.error.model_copy(update={"message": message})
        record_entry(shared, request, NOTHING.model_copy(update={"error": error}), key="b" * 64, started_at=NOW)
    record = known_results(shared, ["b" * 64, "c" * 64])["b" * 64]
    assert record.error is not None
    assert record.error.message == "second"


def test_no_keys_ask_nothing_of_the_catalog(tmp_path):
    assert known_results(workspace(tmp_path / "home"), []) == {}
    assert not (tmp_path / "home").exists()


def test_a_folder_is_known_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = workspace(tmp_path / "home")
    for model in ("./model", "org/name"):
        record_entry(places, ConversionRequest(model_id=model), NOTHING.model_copy(update={"id": model}), key=None,
                     started_at=NOW)  # fmt: skip
    assert [row.model_id for row in catalog_rows(places.home)] == [str(tmp_path / "model"), "org/name"]


# The step


GRAPH = GraphEntry(role="model", path="model.onnx", opset=20, nodes=2, nodes_before_simplify=3, inputs=(), outputs=())
DRAFT = NOTHING.model_copy(
    update={"status": Status.CONVERTED, "revision": "r" * 64, "error": None, "graphs": (GRAPH,), "template": "direct"}
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    source, scratch = tmp_path / "model", tmp_path / "home" / "tmp" / "scratch"
    (scratch / "artifact").mkdir(parents=True)
    (scratch / "artifact" / "model.onnx").write_text("graph")
    source.mkdir()
    for name in ("config.json", "vocab.txt", "model.safetensors", "README.md"):
        (source / name).write_text(name)
    return Job(
        request=ConversionRequest(model_id="org/name"),
        workspace=workspace(tmp_path / "home"),
        revision="r" * 64,
        key=KEY,
        source=source,
        scratch=scratch,
        memory_bytes=1,
        weight_bytes=0,
    )


def clear_scratch(job: Job) -> None:
    for path in sorted(job.scratch.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    job.scratch.rmdir()


def test_files_and_row_are_stored_together(job):
    entry = register(job, DRAFT, started_at=NOW, batch_id=None)
    folder = Path(entry.artifact or "")
    assert artifact_folders(job.workspace.store) == {folder}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", FERRY_FILE, "model.onnx", "vocab.txt"]
    assert [graph.path for graph in entry.graphs] == [str(folder / "model.onnx")]
    clear_scratch(job)
    assert_nothing_half_done(job.workspace.home)
    record = known_results(job.workspace, [KEY])[KEY]
    assert to_entry(record, model_id=DRAFT.id, status=Status.CONVERTED) == entry
    ferry_file: dict[str, Any] | None = read_ferry_file(folder)
    assert ferry_file is not None
    assert ModelEntry.model_validate_json(json.dumps(ferry_file["model"])) == DRAFT


def test_a_catalog_that_comes_back_finds_the_files_in_place(job, monkeypatch):
    """The files are moved before the row is written, so a second try has no folder any more."""
    url = job.workspace.catalog_url
    away = replace(job, workspace=replace(job.workspace, catalog_url="sqlite:////proc/nothing/catalog.db"))
    with pytest.raises(TransientError) as caught:
        register(away, DRAFT, started_at=NOW, batch_id=None)
    assert caught.value.kind is ErrorKind.CATALOG
    (folder,) = artifact_folders(job.workspace.store)
    assert_whole(folder)

    entry = register(job, DRAFT, started_at=NOW, batch_id=None)
    assert entry.artifact == str(folder)
    clear_scratch(job)
    assert_nothing_half_done(job.workspace.home)
    (row,) = catalog_rows(job.workspace.home)
    assert row.artifact is not None
    assert sorted(file.path for file in row.artifact.files) == ["config.json", "model.onnx", "vocab.txt"]
    assert catalog(job.workspace).url.render_as_string() == url


def test_a_store_that_comes_back_gets_the_whole_artifact(job):
    blocked = job.workspace.store
    blocked.write_text("in the way")
    with pytest.raises(Exception, match="cannot be written"):
        register(job, DRAFT, started_at=NOW, batch_id=None)
    blocked.unlink()
    register(job, DRAFT, started_at=NOW, batch_id=None)
    clear_scratch(job)
    assert_nothing_half_done(job.workspace.home)
    assert len(artifact_folders(job.workspace.store)) == 1
