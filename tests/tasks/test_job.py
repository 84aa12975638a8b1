"""One step in a child: what a failure nobody foresaw means, what an interruption does, and the command to repeat it."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from onnx_config.errors import ErrorKind, FerryError, InternalError, ModelError
from onnx_config.export import isolate
from tasks import job as job_module
from tasks.job import Job, reproduce_command, run_child
from tasks.report import Step
from tasks.request import ConversionOptions, ConversionRequest, Device
from tests.faults.harness import wait_until, workspace


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "scratch").mkdir()
    return Job(
        request=ConversionRequest(model_id="./model"),
        workspace=workspace(tmp_path / "home"),
        revision="r" * 64,
        key="k" * 64,
        source=tmp_path / "model",
        scratch=tmp_path / "scratch",
        memory_bytes=2 * 1024**3,
        weight_bytes=0,
    )


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the steps run a function of the isolation's own tests, in a real child of a server that imports no torch."""
    server = isolate.Server(preload=("tests.onnx_config.isolate_bodies",))

    def use(body: str) -> None:
        def run(function: str, *args: object, **kwargs: object) -> isolate.Answer:
            return server.run(f"tests.onnx_config.isolate_bodies:{body}", *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(job_module.isolate, "run", run)
        monkeypatch.setattr(job_module.isolate, "kill_all", server.kill_all)

    yield use
    server.shutdown()


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (Step.DETECT, ErrorKind.UNSUPPORTED),
        (Step.EXPORT, ErrorKind.EXPORT_FAILED),
        (Step.SIMPLIFY, ErrorKind.RUNTIME_FAILED),
        (Step.PARITY, ErrorKind.RUNTIME_FAILED),
        (Step.FETCH, ErrorKind.INTERNAL),
        (Step.REGISTER, ErrorKind.INTERNAL),
    ],
)
def test_an_exception_nobody_foresaw_has_the_kind_of_its_step(job, child, step, kind):
    child("fail")
    with pytest.raises(FerryError, match=f"The step {step} ended with ValueError: bad value in two lines") as caught:
        run_child(job, step, "detect", {})
    assert caught.value.kind is kind
    assert isinstance(caught.value, InternalError if kind is ErrorKind.INTERNAL else ModelError)
    assert isinstance(caught.value.__cause__, isolate.ChildError)


def test_a_step_has_a_folder_and_says_what_it_cost(job, child):
    child("echo")
    answer, cost = run_child(job, Step.DETECT, "detect", {"text": "hello"})
    assert answer == {"text": "hello"}
    assert cost.seconds > 0
    assert cost.peak_rss_bytes > 1024**2
    assert [path.name for path in job.scratch.iterdir()] == ["detect"]


@pytest.mark.parametrize(
    ("architecture", "imports"), [(None, ()), ("BertModel", ("transformers:BertModel",))], ids=["unknown", "detected"]
)
def test_the_server_imports_the_class_of_a_detected_model(job, monkeypatch, architecture, imports):
    asked = []
    answer = isolate.Answer(value={}, seconds=1.0, peak_rss_bytes=9, log_tail="")
    monkeypatch.setattr(job_module.isolate, "run", lambda *_, **options: asked.append(options["imports"]) or answer)
    run_child(job, Step.PARITY, "parity", {}, architecture=architecture)
    assert asked == [imports]


def test_after_an_interruption_no_child_is_started(job, child):
    child("echo")
    job.stopping.set()
    with pytest.raises(KeyboardInterrupt):
        run_child(job, Step.DETECT, "detect", {})
    assert list(job.scratch.iterdir()) == []


def test_a_child_that_an_interruption_kills_is_no_crash(job, child):
    child("talk")

    def interrupt() -> None:
        wait_until(lambda: list(job.scratch.glob("export/*.log")))
        job.stopping.set()
        isolate.kill_all()

    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child(job, Step.EXPORT, "export", {"seconds": 60})
    assert time.monotonic() - started < 20
    thread.join()


REQUESTS = {
    "hub": ConversionRequest(model_id="org/name"),
    "hub-at-revision": ConversionRequest(model_id="org/name", revision="v1.0"),
    "folder-with-blanks": ConversionRequest(model_id="./my models/a; rm -rf $HOME"),
    "everything": ConversionRequest(
        model_id="./model",
        options=ConversionOptions(
            task="fill-mask", device=Device.CPU, opset=20, dtype="float16", simplify=False, trust_remote_code=True
        ),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_command_to_repeat_it_asks_for_the_same(name, monkeypatch, tmp_path):
    """Read by the command line itself, it becomes the very request that it was made of."""
    seen = []

    def convert_model(request: ConversionRequest, *_: object, **options: object) -> None:
        seen.append((request, options["output"]))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tasks.pipeline.convert_model", convert_model)
    words = shlex.split(reproduce_command(REQUESTS[name], output=tmp_path / "out"))
    assert words[0] == "ferry"
    assert CliRunner().invoke(app, words[1:]).exit_code == 130
    assert seen == [(REQUESTS[name], tmp_path / "out")]
