"""A batch in parts: how it is split, and what becomes of parts whose runs end in every way, without a server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import db
from flows.batch import BatchPlan, _outputs
from flows.partition import partition, structures
from flows.shards import MOST_RUNS, Look, Outcome, run_parts
from onnx_config.errors import ErrorKind, TransientError
from tasks.lease import process_identity
from tasks.memory import MemoryGate
from tasks.register import catalog, record_entry
from tasks.report import ErrorEntry, ModelEntry, Status, Step
from tasks.request import ConversionOptions, ConversionRequest, Device, SilentListener, Workspace


def asked(name: str, **options: Any) -> ConversionRequest:
    return ConversionRequest(model_id=f"org/{name}", options=ConversionOptions(**options))


# How a batch is split.


@given(st.dictionaries(st.integers(0, 200), st.integers(0, 9), max_size=60), st.integers(1, 12), st.randoms())
def test_the_parts_are_the_batch_about_equal_and_the_same_in_any_order(
    groups: dict[int, int], shards: int, random: Any
) -> None:
    structure_of = {asked(str(name)): str(group) for name, group in groups.items()}
    parts = partition(structure_of, shards)
    assert sorted(r.model_id for part in parts for r in part) == sorted(r.model_id for r in structure_of)
    assert len(parts) <= shards
    assert all(parts)
    share = -(-len(structure_of) // shards)
    assert all(len(part) < 2 * share for part in parts)
    shuffled = list(structure_of.items())
    random.shuffle(shuffled)
    assert partition(dict(shuffled), shards) == parts
    for structure in set(structure_of.values()):
        members = [request for request, found in structure_of.items() if found == structure]
        homes = [part for part in parts if set(part) & set(members)]
        assert len(homes) <= -(-len(members) // share), "models of one structure are together where they fit"


def write_config(folder: Path, **settings: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **settings}), encoding="utf-8")
    return str(folder)


def test_fine_tunes_have_one_structure_and_a_model_that_cannot_be_read_its_own(tmp_path: Path) -> None:
    names = [
        write_config(tmp_path / "a", hidden_size=64, id2label={"0": "bad"}),
        write_config(tmp_path / "b", hidden_size=64, id2label={"0": "good"}, _name_or_path="org/a"),
        write_config(tmp_path / "c", hidden_size=32, id2label={"0": "good"}),
        str(tmp_path / "nothing"),
    ]
    requests = [ConversionRequest(model_id=name) for name in names]
    other = ConversionRequest(model_id=names[0], options=ConversionOptions(opset=18))
    found = structures([*requests, other])
    first, second, third, fourth = (found[request] for request in requests)
    assert first == second
    assert len({first, third, fourth, found[other]}) == 4


# What becomes of the parts.

FAILURE = ErrorEntry(kind=ErrorKind.NETWORK, message="away", step=Step.FETCH, reproduce="ferry convert")


class FakeRuns:
    """Runs that record what a script says, and end as it says: per part, one line for each run."""

    def __init__(self, plan: BatchPlan, script: dict[int, list[tuple[int, Outcome]]]) -> None:
        self.plan = plan
        self.script = script
        self.started: list[tuple[int, int, list[str]]] = []
        self.cancelled: list[str] = []
        self.looks = 0

    def start(self, part: int, attempt: int, requests: Sequence[ConversionRequest]) -> str:
        self.started.append((part, attempt, [request.model_id for request in requests]))
        recorded, _ = self.script[part][attempt - 1]
        for request in requests[:recorded]:
            record(self.plan, request)
        return f"{part}.{attempt}"

    def look(self, runs: Collection[str]) -> Mapping[str, Look]:
        self.looks += 1
        if self.looks == 1:
            return {}  # As of a server that is away for a moment.
        found = {}
        for run in runs:
            part, attempt = map(int, run.split("."))
            found[run] = Look(outcome=self.script[part][attempt - 1][1], said="exit code -9")
        return found

    def cancel(self, run: str) -> None:
        self.cancelled.append(run)


def record(plan: BatchPlan, request: ConversionRequest) -> None:
    entry = ModelEntry(
        id=request.model_id,
        revision="a" * 40,
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
        error=FAILURE,
    )
    record_entry(plan.workspace, request, entry, key=None, started_at=datetime.now(UTC), batch_id=plan.batch_id)


@pytest.fixture
def plan(tmp_path: Path) -> BatchPlan:
    workspace = Workspace(
        home=tmp_path,
        catalog_url=f"sqlite:///{tmp_path / 'catalog.db'}",
        store=tmp_path / "artifacts",
        memory_limit_bytes=2**33,
        timeout_seconds=60.0,
    )
    with db.session_scope(catalog(workspace)) as session:
        number = db.start_batch(session, engine="prefect", started_at=datetime.now(UTC))
    return BatchPlan(
        workspace=workspace,
        outputs=_outputs(PARTS[0] + PARTS[1], None),
        gate=MemoryGate(2**33),
        retry_failed=frozenset(),
        refresh=None,
        listener=SilentListener(),
        batch_id=number,
    )


# Folders that are not there: looking them up asks nobody.
PARTS = [[ConversionRequest(model_id=f"./none/{part}{n}") for n in range(3)] for part in "ab"]
FIRST, SECOND = PARTS
ENDED, DIED, CANCELLED = Outcome.ENDED, Outcome.DIED, Outcome.CANCELLED


def pause(_seconds: float) -> None: ...


@pytest.mark.parametrize(
    ("script", "runs", "lost"),
    [
        pytest.param({1: [(3, ENDED)], 2: [(3, ENDED)]}, [3, 3], [], id="all-is-well"),
        pytest.param({1: [(3, DIED)], 2: [(3, ENDED)]}, [3, 3], [], id="died-when-all-was-done"),
        pytest.param({1: [(1, DIED), (2, ENDED)], 2: [(3, ENDED)]}, [3, 3, 2], [], id="died-and-done-again"),
        pytest.param({1: [(1, DIED), (1, DIED), (1, ENDED)], 2: [(3, ENDED)]}, [3, 3, 2, 1], [], id="died-twice"),
        pytest.param({1: [(1, ENDED), (2, ENDED)], 2: [(3, ENDED)]}, [3, 3, 2], [], id="refused-and-tried-again"),
        pytest.param({1: [(1, DIED)] * MOST_RUNS, 2: [(3, ENDED)]}, [3, 3, 2, 1], [], id="one-each-time"),
        pytest.param({1: [(0, DIED)] * MOST_RUNS, 2: [(3, ENDED)]}, [3, 3, 3, 3], FIRST, id="always-dies"),
        pytest.param({1: [(2, CANCELLED)], 2: [(3, ENDED)]}, [3, 3], FIRST[2:], id="cancelled-by-somebody"),
    ],
)  # fmt: skip
def test_a_part_whose_run_ends_without_all_of_it_is_run_again_for_the_rest(
    plan: BatchPlan, script: dict[int, list[tuple[int, Outcome]]], runs: list[int], lost: list[ConversionRequest]
) -> None:
    fake = FakeRuns(plan, script)
    done = run_parts(PARTS, plan, fake, pause=pause)
    assert [len(names) for _, _, names in fake.started] == runs
    assert done.keys() == set(FIRST + SECOND)
    kinds = {request: entry.error.kind for request, entry in done.items() if entry.error is not None}
    assert [request for request in FIRST if kinds[request] is ErrorKind.CRASHED] == lost
    assert all(kinds[request] is ErrorKind.NETWORK for request in SECOND)
    with db.session_scope(catalog(plan.workspace), read_only=True) as session:
        recorded = db.batch_conversions(session, plan.batch_id)
    assert len(recorded) == 6, "each model has one line in the catalog, whoever had it"


def test_what_is_lost_says_how(plan: BatchPlan) -> None:
    script = {1: [(0, DIED)] * MOST_RUNS, 2: [(3, ENDED)]}
    error = run_parts(PARTS, plan, FakeRuns(plan, script), pause=pause)[FIRST[0]].error
    assert error is not None
    assert "part 1) ended 3 times without a result for it, the last time with: exit code -9" in error.message


def test_an_interruption_cancels_the_runs(plan: BatchPlan) -> None:
    fake = FakeRuns(plan, {1: [(0, Outcome.WORKING)], 2: [(0, Outcome.WORKING)]})

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts(PARTS, plan, fake, pause=interrupted)
    assert fake.cancelled == ["1.1", "2.1"]


def test_a_catalog_that_is_away_for_a_while_is_waited_for(plan: BatchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., Any] = db.batch_conversions
    answers = iter([False, False])

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if not next(answers, True):
            raise TransientError("away", kind=ErrorKind.CATALOG)
        return read(*args, **kwargs)

    monkeypatch.setattr(db, "batch_conversions", sometimes)
    done = run_parts(PARTS, plan, FakeRuns(plan, {1: [(3, ENDED)], 2: [(3, ENDED)]}), pause=pause)
    assert len(done) == 6


def test_a_server_that_is_away_when_a_part_is_to_begin_is_waited_for(plan: BatchPlan) -> None:
    class Away(FakeRuns):
        answers = 3

        def start(self, part: int, attempt: int, requests: Sequence[ConversionRequest]) -> str:
            self.answers -= 1
            if self.answers >= 0:
                raise TransientError("away", kind=ErrorKind.NETWORK)
            return super().start(part, attempt, requests)

    runs = Away(plan, {1: [(3, ENDED)], 2: [(3, ENDED)]})
    assert len(run_parts(PARTS, plan, runs, pause=pause)) == 6
    assert [part for part, _, _ in runs.started] == [1, 2]


# Runs on a server: what they are given, and what a look at one says.


def test_what_a_part_is_given_are_the_models_with_all_of_their_options(tmp_path: Path) -> None:
    from flows.manifest import read_models
    from flows.manifest_keys import ManifestModel
    from flows.shard_runs import _model
    from onnx_config.variants import Variant

    options = ConversionOptions(
        task="fill-mask",
        device=Device.CPU,
        opset=18,
        dtype="float16",
        simplify=False,
        weights="link",
        trust_remote_code=True,
        variants=(Variant.FP16, Variant.Q4),
    )
    usual = asdict(ConversionOptions())
    assert [name for name, value in asdict(options).items() if value == usual[name]] == [], "another one is new"
    request = ConversionRequest(model_id="org/a", revision="v1", options=options)
    folder = ConversionRequest(model_id=str(tmp_path))
    written = json.loads(json.dumps([_model(request), _model(folder)]))
    assert read_models([ManifestModel(**keys) for keys in written]) == (request, folder)


def test_a_run_that_has_sent_no_heartbeat_for_long_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a machine is gone with its worker: the server itself would show the run as running for ever."""
    from types import SimpleNamespace
    from uuid import uuid4

    from prefect.client.schemas.objects import StateType

    from flows import shard_runs

    now = datetime.now(UTC)
    heard: dict[str, str] = {}

    class Client:
        def request(self, _method: str, _path: str, *, json: Any) -> Any:
            (resource,) = json["filter"]["resource"]["id"]
            found = [{"occurred": heard[resource]}] if resource in heard else []
            return SimpleNamespace(json=lambda: {"events": found})

        def set_flow_run_state(self, run: Any, state: Any, *, force: bool) -> None:
            cancelled.append((run, state.type, force))

    cancelled: list[Any] = []
    runs = object.__new__(shard_runs.PoolRuns)
    runs._client = Client()  # type: ignore[assignment]  # as much of one as a look takes

    def look(
        kind: StateType,
        *,
        started_ago: float = 3600,
        heard_ago: float | None = None,
        since: float = 1,
        lease: db.LeaseRecord | None = None,
    ) -> Outcome:
        run = SimpleNamespace(
            id=uuid4(),
            state_type=kind,
            state=SimpleNamespace(
                name=kind.value.title(), message="as it is", timestamp=now - timedelta(seconds=since)
            ),
            start_time=now - timedelta(seconds=started_ago),
        )
        if heard_ago is not None:
            heard[f"prefect.flow-run.{run.id}"] = (now - timedelta(seconds=heard_ago)).isoformat()
        return runs._look(run, lease).outcome

    silent = shard_runs.SILENT_SECONDS
    assert look(StateType.RUNNING, heard_ago=silent - 60) is Outcome.WORKING
    assert look(StateType.RUNNING, heard_ago=silent + 60) is DIED
    assert [(kind, force) for _, kind, force in cancelled] == [(StateType.CANCELLING, True)], "should it live after all"
    # A server that keeps no events proves nothing, nor does one that has had no time to hear of it.
    assert look(StateType.RUNNING) is Outcome.WORKING
    assert look(StateType.RUNNING, started_ago=silent - 60, heard_ago=silent + 60) is Outcome.WORKING
    assert look(StateType.COMPLETED) is look(StateType.FAILED) is ENDED
    assert look(StateType.CRASHED) is DIED
    assert look(StateType.CANCELLED) is CANCELLED
    assert look(StateType.SCHEDULED, since=silent + 60) is look(StateType.PENDING) is Outcome.WORKING
    # Taken by a worker that died before anything began.
    assert look(StateType.PENDING, since=silent + 60) is DIED
    # The catalog knows sooner.
    held = db.LeaseRecord(key="a" * 64, owner="o", host="h", process_id=2**22 + 5, process="elsewhere pid:[1] 7")
    assert look(StateType.RUNNING, lease=held) is Outcome.WORKING
    assert look(StateType.RUNNING, lease=replace(held, lapsed=True)) is DIED
    assert look(StateType.RUNNING, lease=replace(held, process=process_identity(os.getpid()))) is DIED
    assert look(StateType.COMPLETED, lease=replace(held, lapsed=True)) is ENDED
