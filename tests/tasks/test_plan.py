"""A plan of a list: what it says of each model, and that no model can sink another, however its child ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_config import hub
from onnx_config.errors import ErrorKind, FerryError, InputError, ModelError, TransientError
from onnx_config.export.detect_many import read_answers
from onnx_config.export.isolate import Server
from onnx_config.export.steps import check_options
from onnx_config.spec import ModelSpec
from tasks import detect_many as detecting
from tasks import plan as planning
from tasks import retry
from tasks.detect_many import Detection, detect_many
from tasks.estimate import count_layers, estimate
from tasks.memory import estimate_bytes
from tasks.plan import Outlook, Plan, plan_models
from tasks.report import ErrorEntry, ModelEntry, Status, Step
from tasks.request import ConversionRequest, Device
from tests.faults.harness import GIB, environment, request, tiny, wait_until, workspace
from tests.tasks.plan_bodies import SPEC

BODIES = "tests.tasks.plan_bodies:install"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    light = Server(preload=(BODIES,))
    yield light
    light.shutdown()


def model(root: Path, name: str, **config: Any) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "made", "do": "", "label": name, **config}))
    return folder


def detected(
    folders: list[Path], home: Path, server: Server, *, workers: int = 2, **changes: Any
) -> dict[str, Detection]:
    found = detect_many(
        {request(folder): folder for folder in folders}, workspace(home, **changes), workers=workers, server=server
    )
    return {Path(asked.model_id).name: detection for asked, detection in found.items()}


def pids(folder: Path) -> list[str]:
    return (folder / "pids").read_text().split()


def kind_of(detection: Detection) -> str:
    found = detection.found
    return found.kind.value if isinstance(found, FerryError) else "found"


# Many models in few children


def test_many_models_share_few_children(tmp_path, server):
    folders = [model(tmp_path, f"m{number}") for number in range(60)]
    found = detected(folders, tmp_path / "home", server)
    assert [kind_of(found[folder.name]) for folder in folders] == ["found"] * 60
    assert all(detection.found == SPEC and not detection.cached for detection in found.values())
    assert len({pid for folder in folders for pid in pids(folder)}) <= 20
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("does", "kind", "words", "runs"),
    [
        pytest.param("refuse", "unsupported", "is not supported", 1, id="a-refusal-of-the-class"),
        pytest.param("stumble", "unsupported", "ZeroDivisionError: nobody foresaw this", 2, id="any-error"),
        pytest.param("be-shy", "found", "", 2, id="an-error-of-others"),
        pytest.param("lack-memory", "unsupported", "can't allocate", 2, id="a-refusal-for-want-of-memory"),
        pytest.param("crash", "crashed", "SIGSEGV", 2, id="segfault"),
        pytest.param("leave", "crashed", "exit status 7", 2, id="exit"),
        pytest.param("hang", "timeout", r"limit of 0\.8 s", 2, id="hang"),
        pytest.param("spin", "timeout", r"limit of 0\.8 s", 2, id="hang-in-native-code"),
        pytest.param("eat", "out_of_memory", "300 MiB", 2, id="memory"),
    ],
)
def test_one_model_costs_no_other_model_anything(monkeypatch, tmp_path, server, does, kind, words, runs):
    monkeypatch.setattr(detecting, "_SHARED_SECONDS", 0.5)
    monkeypatch.setattr(detecting, "LONGEST_SECONDS", 0.8)
    if does == "eat":
        monkeypatch.setattr(detecting, "_SHARED_SECONDS", 30.0)
        monkeypatch.setattr(detecting, "LONGEST_SECONDS", 30.0)
    # One worker's only child of three: something before, something after.
    folders = [model(tmp_path, name, do=does if name == "bad" else "") for name in ("a", "bad", "z", "zz")]
    monkeypatch.setattr(detecting, "_chunks", lambda items, workers: [items])
    found = detected(folders, tmp_path / "home", server, workers=1, memory_limit_bytes=300 * 1024**2)
    assert {name: kind_of(detection) for name, detection in found.items()} == {
        "a": "found", "bad": kind, "z": "found", "zz": "found"
    }  # fmt: skip
    answer = found["bad"].found
    if isinstance(answer, FerryError):
        assert re.search(words, answer.message), answer.message
    bad = pids(folders[1])
    assert len(bad) == len(set(bad)) == runs, "what is no refusal of the class counts in a child of its own"
    assert len(pids(folders[0])) == len(pids(folders[2])) == len(pids(folders[3])) == 1
    assert pids(folders[2]) == pids(folders[3])
    if does in ("refuse", "stumble", "be-shy"):
        assert pids(folders[0]) == pids(folders[2]), "an exception does not end the child that others share"


KILL_SERVER = """
import sys, time
from pathlib import Path
import psutil
path = Path(sys.argv[1])
while not path.exists() or not path.read_text().endswith("\\n"):
    time.sleep(0.01)
psutil.Process(int(path.read_text())).parent().kill()
"""


def test_a_server_that_is_killed_is_started_again(tmp_path):
    dying = Server(preload=(BODIES,))
    folders = [model(tmp_path, f"m{number}", do="hang-once" if number == 1 else "") for number in range(4)]
    killer = subprocess.Popen(
        [sys.executable, "-c", KILL_SERVER, str(folders[1] / "pids")], env=environment(tmp_path / "home")
    )
    try:
        found = detected(folders, tmp_path / "home", dying, workers=1)
    finally:
        killer.kill()
        killer.wait()
        dying.shutdown()
    assert {kind_of(detection) for detection in found.values()} == {"found"}
    assert len(pids(folders[1])) == 2


def test_what_is_known_starts_nothing(tmp_path):
    folders = [model(tmp_path, name, do=does) for name, does in (("a", ""), ("b", "refuse"))]
    first, second = Server(preload=(BODIES,)), Server(preload=(BODIES,))
    try:
        before = detected(folders, tmp_path / "home", first)
        again = detected(folders, tmp_path / "home", second)
        assert second.pid is None
    finally:
        first.shutdown()
        second.shutdown()
    assert [detection.cached for detection in again.values()] == [True, True]
    assert again["a"].found == before["a"].found == SPEC
    assert str(again["b"].found) == str(before["b"].found)


@pytest.mark.parametrize("does", ["", "refuse"])
def test_models_with_one_config_are_detected_once(tmp_path, server, does):
    folders = [model(tmp_path / name, "m", do=does, label="same") for name in ("a", "b", "c")]
    found = detect_many(
        {request(folder): folder for folder in folders}, workspace(tmp_path / "home"), workers=2, server=server
    )
    assert sum((folder / "pids").exists() for folder in folders) == 1
    for folder in folders:
        answer = found[request(folder)].found
        if does:
            # The message is about the folder that was asked about, and not about the one that was looked at.
            assert str(answer) == f"{folder} is not supported"
        else:
            assert answer == SPEC


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        pytest.param(None, ErrorKind.BAD_INPUT, "does not exist", id="no-config"),
        pytest.param("{", ErrorKind.BAD_INPUT, "is not JSON", id="no-json"),
        pytest.param("[1]", ErrorKind.BAD_INPUT, "not an object", id="no-object"),
        pytest.param("[" * 100_000, ErrorKind.UNSUPPORTED, "RecursionError", id="too-deep"),
    ],
)
def test_a_config_that_cannot_be_read_is_its_models_failure(tmp_path, server, content, kind, words):
    good, bad = model(tmp_path, "good"), model(tmp_path, "bad")
    (bad / "config.json").unlink()
    if content is not None:
        (bad / "config.json").write_text(content)
    found = detected([bad, good], tmp_path / "home", server)
    answer = found["bad"].found
    assert isinstance(answer, FerryError)
    assert answer.kind is kind
    assert re.search(words, answer.message)
    assert found["good"].found == SPEC


INTERRUPTED = """
import sys
from pathlib import Path
from onnx_config.export.isolate import Server
from tasks.detect_many import detect_many
from tests.faults.harness import request, workspace
folders = [Path(word) for word in sys.argv[2:]]
server = Server(preload=("tests.tasks.plan_bodies:install",))
try:
    detect_many({request(f): f for f in folders}, workspace(Path(sys.argv[1])), workers=2, server=server)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interruption_leaves_no_child_and_no_folder(tmp_path):
    folders = [model(tmp_path, name, do="hang") for name in ("a", "b", "c", "d")]
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(home), *map(str, folders)],
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: sum((folder / "pids").exists() for folder in folders) == 2)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3
        process.send_signal(signal.SIGINT)
        interrupted_at = time.monotonic()
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert out == "interrupted\n"
    assert time.monotonic() - interrupted_at < detecting._END_SECONDS, "the children were waited for, not ended"
    wait_until(lambda: not any(child.is_running() for child in children), 10)
    assert list((home / "tmp").iterdir()) == []


def test_answers_are_read_up_to_a_torn_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert read_answers(path) == []
    path.write_text('{"spec": null, "seconds": 1}\n{"spec": {"mo')
    assert read_answers(path) == [{"spec": None, "seconds": 1}]


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (1, 8), (7, 2), (1000, 2), (1000, 8)])
def test_chunks_hold_every_model_once_and_end_small(count, workers):
    chunks = list(detecting._chunks(list(range(count)), workers))
    assert [item for chunk in chunks for item in chunk] == list(range(count))
    assert max(map(len, chunks)) <= 40
    assert [len(chunk) for chunk in chunks] == sorted((len(chunk) for chunk in chunks), reverse=True)
    assert len(chunks[-1]) == 1


# What a plan says


@pytest.fixture
def answers(monkeypatch) -> dict[str, ModelSpec | FerryError]:
    """Answers in the place of detection, by the folder's name; those not named are `SPEC`."""
    found: dict[str, ModelSpec | FerryError] = {}

    def detect_them(sources: dict[ConversionRequest, Path], *_: Any, **__: Any) -> dict[ConversionRequest, Detection]:
        return {
            asked: Detection(found=found.get(folder.name, SPEC), key=folder.name, seconds=0.5, cached=False)
            for asked, folder in sources.items()
        }

    monkeypatch.setattr(planning, "detect_many", detect_them)
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.0)
    return found


def plan(requests: list[ConversionRequest], home: Path, *, rehearse: bool = False, **changes: Any) -> Plan:
    return plan_models(requests, workspace(home, **changes), workers=2, rehearse=rehearse)


def test_a_plan_keeps_the_order_and_adds_up(answers, tmp_path):
    folders = [model(tmp_path, name, num_hidden_layers=2) for name in ("a", "b", "c")]
    answers["b"] = ModelError("no class", kind=ErrorKind.UNSUPPORTED)
    answers["c"] = replace(SPEC, parameters=3_000_000)
    made = plan([request(folder) for folder in folders], tmp_path / "home")
    assert [(Path(m.id).name, m.outlook) for m in made.models] == [
        ("a", Outlook.WORKS), ("b", Outlook.FAILS), ("c", Outlook.WORKS)
    ]  # fmt: skip
    a, b, c = made.models
    assert b.error == ErrorEntry(
        kind=ErrorKind.UNSUPPORTED, message="no class", step=Step.DETECT, reproduce=f"ferry convert {folders[1]}"
    )
    assert (a.weight_bytes, c.weight_bytes) == (4_000_000, 12_000_000)
    assert a.peak_memory_bytes == estimate_bytes(4_000_000)
    totals = made.totals
    assert (totals.works, totals.fails, totals.parameters) == (2, 1, 4_000_000)
    assert totals.peak_memory_bytes == estimate_bytes(12_000_000)
    assert totals.disk_bytes == (a.disk_bytes or 0) + (c.disk_bytes or 0)
    assert totals.seconds == pytest.approx((a.seconds or 0) + (c.seconds or 0), abs=0.1)
    assert Plan.model_validate_json(made.to_json()) == made
    assert not made.all_work


@pytest.mark.parametrize(
    ("files", "kind", "note"),
    [
        pytest.param({"model.safetensors": 10}, None, "", id="safetensors"),
        pytest.param({"model-00001-of-00002.safetensors": 5}, None, "", id="shards"),
        pytest.param({}, None, "no weights lie beside the config", id="a-config-alone"),
        pytest.param({"tokenizer.json": 9}, None, "no weights lie beside", id="a-config-with-a-tokenizer"),
        pytest.param({"pytorch_model.bin": 10}, "other formats alone \\(pytorch_model.bin\\)", "", id="pickle"),
        pytest.param({"tf_model.h5": 1, "model.safetensors": 1}, None, "", id="several-formats"),
    ],
)
def test_weights_in_other_formats_are_told_beforehand(answers, tmp_path, files, kind, note):
    folder = model(tmp_path, "m")
    for name, size in files.items():
        (folder / name).write_bytes(b"x" * size)
    (made,) = plan([request(folder)], tmp_path / "home").models
    if kind is None:
        assert made.error is None
    else:
        assert made.error is not None
        assert (made.error.kind, made.error.step) == (ErrorKind.BAD_INPUT, Step.EXPORT)
        assert re.search(kind, made.error.message)
    assert re.search(note, " ".join(made.notes))


@pytest.mark.parametrize(
    ("files", "outlook", "download"),
    [
        pytest.param({"model.safetensors": 70, "config.json": 1}, Outlook.WORKS, 70, id="safetensors"),
        pytest.param({"onnx/model.safetensors": 70}, Outlook.FAILS, None, id="elsewhere"),
        pytest.param({"config.json": 1}, Outlook.FAILS, None, id="nothing"),
        pytest.param(TransientError("away"), Outlook.WORKS, None, id="the-hub-does-not-tell"),
    ],
)
def test_a_repository_is_looked_at_before_it_is_downloaded(monkeypatch, answers, tmp_path, files, outlook, download):
    def listed(*_: object, **__: object) -> dict[str, int]:
        if isinstance(files, Exception):
            raise files
        return files

    folder = model(tmp_path, "snapshot")
    monkeypatch.setattr(hub, "fetch_config", lambda *_, **__: folder)
    monkeypatch.setattr(hub, "list_files", listed)
    (made,) = plan([request("org/name")], tmp_path / "home").models
    assert (made.outlook, made.download_bytes) == (outlook, download)


def test_a_model_that_is_not_there_fails_before_anything_is_read(answers, tmp_path):
    made = plan([request("./absent"), request("org/offline")], tmp_path / "home").models
    assert [(m.error.kind, m.error.step) for m in made if m.error] == [
        (ErrorKind.NOT_FOUND, Step.FETCH), (ErrorKind.NETWORK, Step.FETCH)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        pytest.param({"opset": 9}, ErrorKind.BAD_INPUT, "opset 9", id="opset"),
        pytest.param({"device": Device.CUDA}, ErrorKind.BAD_INPUT, "device 'cuda'", id="device"),
    ],
)
def test_options_that_nothing_can_be_converted_with(monkeypatch, answers, tmp_path, options, kind, words):
    if "device" in options:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # In this process what the step says in its child; that a child is asked is one call for equal options.
    asked = []

    def run_child(_job: object, _step: object, function: str, values: dict[str, Any], **_: object) -> None:
        asked.append(function)
        check_options(values)

    monkeypatch.setattr(planning, "run_child", run_child)
    a, b = model(tmp_path, "a"), model(tmp_path, "b")
    asked_for = [request(a, **options), request(b, **options, task="fill-mask"), request(a)]
    made = plan(asked_for, tmp_path / "home").models
    assert asked == ["check_options"]
    assert [m.outlook for m in made] == [Outlook.FAILS, Outlook.FAILS, Outlook.WORKS]
    assert made[0].error is not None
    assert made[0].error.kind is kind
    assert words in made[0].error.message


def test_more_memory_than_there_is_is_said(answers, tmp_path):
    answers["m"] = replace(SPEC, parameters=70_000_000_000)
    (made,) = plan([request(model(tmp_path, "m"))], tmp_path / "home", memory_limit_bytes=8 * GIB).models
    assert made.outlook is Outlook.WORKS
    assert any("FERRY_MEMORY_LIMIT" in note for note in made.notes)


@pytest.mark.parametrize(
    ("dtype", "weight_bytes"), [("float32", 4_000_000), ("float16", 2_000_000), ("bfloat16", 2_000_000)]
)
def test_an_estimate_is_in_the_dtype_asked_for(dtype, weight_bytes):
    needed = estimate(1_000_000, {"num_hidden_layers": 2}, dtype=dtype, side_bytes=500)
    assert needed.weight_bytes == weight_bytes
    assert weight_bytes + 500 < needed.disk_bytes < weight_bytes + 1_000_000
    assert needed.peak_memory_bytes == estimate_bytes(4_000_000)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        pytest.param({}, 0, id="none"),
        pytest.param({"num_hidden_layers": 12}, 12, id="encoder"),
        pytest.param({"encoder_layers": 6, "decoder_layers": 4}, 10, id="both-sides"),
        pytest.param({"depths": [2, 2, 18, 2]}, 24, id="stages"),
        pytest.param({"text_config": {"n_layer": 3}, "vision_config": {"num_hidden_layers": 4}}, 7, id="parts"),
        pytest.param({"num_hidden_layers": None, "depth": "x", "n_layers": True}, 0, id="no-numbers"),
    ],
)
def test_layers_are_counted_in_all_parts(config, layers):
    assert count_layers(config) == layers


def test_larger_and_deeper_takes_longer():
    small, deep, wide = estimate(10**6, {"depth": 2}), estimate(10**6, {"depth": 20}), estimate(10**9, {"depth": 2})
    assert small.seconds < deep.seconds < wide.seconds


# Rehearsals


def ended(status: Status, error: ErrorEntry | None = None) -> ModelEntry:
    return ModelEntry(
        id="m", revision=None, status=status, task=None, model_type=None, architecture=None, artifact=None,
        template=None, simplified=False, parity=None, seconds={Step.EXPORT: 2.0}, peak_rss_bytes=None, attempts=1,
        error=error,
    )  # fmt: skip


DIFFERS = ErrorEntry(kind=ErrorKind.MISMATCH, message="it differs", step=Step.PARITY, reproduce="x")


@pytest.mark.parametrize(
    ("entry", "outlook", "words"),
    [
        pytest.param(ended(Status.CONVERTED), Outlook.WORKS, "", id="converted"),
        pytest.param(
            ended(Status.MISMATCH, DIFFERS), Outlook.FAILS, "twin with random weights fails: it differs", id="mismatch",
        ),
        pytest.param(
            ModelError("no twin", kind=ErrorKind.UNSUPPORTED), Outlook.WORKS, "could not be rehearsed: no twin",
            id="no-twin",
        ),
    ],
)  # fmt: skip
def test_a_rehearsal_speaks_for_its_model(monkeypatch, answers, tmp_path, entry, outlook, words):
    rehearsed = []

    def rehearse(asked: ConversionRequest, *_: object, **__: object) -> ModelEntry | FerryError:
        rehearsed.append(asked.model_id)
        return entry

    monkeypatch.setattr(planning, "_rehearse", rehearse)
    monkeypatch.setattr(planning.isolate, "warm_up", lambda: None)
    folders = [model(tmp_path / name, "same") for name in ("a", "b")]
    bad = model(tmp_path, "bad")
    answers["bad"] = InputError("no")
    made = plan([request(folder) for folder in (*folders, bad)], tmp_path / "home", rehearse=True)
    assert rehearsed == [str(folders[0])], "one twin for one config, and none for what fails anyway"
    assert made.rehearsed
    for found in made.models[:2]:
        assert found.outlook is outlook
        said = found.error.message if found.error else " ".join(found.notes)
        assert words in said
    assert made.models[2].rehearsal is None


@pytest.mark.slow
def test_a_real_rehearsal_stores_nothing(tmp_path):
    folder, home = tiny(tmp_path / "model"), tmp_path / "home"
    (folder / "model.safetensors").unlink()
    made = plan([request(folder)], home, rehearse=True)
    (found,) = made.models
    assert found.error is None
    assert found.rehearsal is not None
    assert found.rehearsal.status is Status.CONVERTED
    assert found.rehearsal.parity is not None
    assert sorted(path.name for path in home.iterdir()) == ["detections", "tmp"]
    assert list((home / "tmp").iterdir()) == []
