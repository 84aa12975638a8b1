"""What a person sees while conversions run, and afterwards."""

from __future__ import annotations

import io
import re
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows.progress import clean, duration, progress_for, summary
from onnx_config.errors import ErrorKind
from tasks.report import ErrorEntry, GraphEntry, ModelEntry, ParityEntry, Report, Status, Step, Verdict
from tasks.request import SilentListener

HOSTILE = "org/[bold red]x[/]\x1b[2J\x9b31m\u202egnp.\ud800\n[/nope]"
STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def entry(
    model_id: str, status: Status = Status.CONVERTED, *, kind: ErrorKind | None = None, message: str = "it broke"
) -> ModelEntry:
    verified = status in (Status.CONVERTED, Status.REUSED)
    graph = GraphEntry(role="model", path="/x", opset=20, nodes=230, nodes_before_simplify=340, inputs=(), outputs=())
    parity = ParityEntry(
        verdict=Verdict.VERIFIED,
        device="cpu",
        provider="CPUExecutionProvider",
        shapes=5,
        max_abs_diff=1.23e-6,
        tolerance=1e-5,
        axes_proven=("batch_size",),
    )
    return ModelEntry(
        id=model_id,
        revision="f" * 40,
        status=status,
        task="fill-mask" if verified else None,
        model_type="bert",
        architecture="BertForMaskedLM",
        artifact="/store/x" if verified else None,
        graphs=(graph,) if verified else (),
        template="traced",
        simplified=True,
        parity=parity if verified else None,
        seconds={Step.DETECT: 0.5, Step.EXPORT: 8.0},
        peak_rss_bytes=1,
        attempts=1,
        error=None
        if kind is None
        else ErrorEntry(kind=kind, message=message, step=Step.EXPORT, reproduce=f"ferry convert {model_id}"),
    )


def report(*entries: ModelEntry) -> Report:
    return Report.of(entries, started_at=STARTED, seconds=75)


def console(*, terminal: bool, width: int = 100, height: int = 20) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    environment = {"TERM": "xterm-256color"}
    made = Console(file=file, force_terminal=terminal, width=width, height=height, _environ=environment)
    return made, file


def printed(*entries: ModelEntry, **options: str) -> str:
    made, file = console(terminal=False, width=160)
    summary(made, report(*entries), **options)
    return file.getvalue()


@pytest.mark.parametrize("text", [HOSTILE, "\x07\x00\r\x1b]0;title\x07", "a\u2028b\u200bc"])
def test_clean_leaves_nothing_that_moves_a_terminal(text: str) -> None:
    assert clean(text).isprintable()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0 s"), (59.9, "59.9 s"), (60, "1:00"), (3600, "1:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_each_finished_model_is_a_line() -> None:
    made, file = console(terminal=False, width=40)
    with progress_for(made, 2) as listener:
        listener.model_started("org/a")
        listener.step_started("org/a", Step.EXPORT)
        listener.model_finished(entry("org/a"))
        listener.model_finished(entry("org/b", Status.FAILED, kind=ErrorKind.NETWORK, message="the Hub is away " * 5))
    first, second = file.getvalue().splitlines()
    assert first == "[1/2] converted org/a  8.5 s"
    assert second.startswith("[2/2] failed    org/b  network: the Hub is away the Hub is away")


def test_verbose_tells_each_step() -> None:
    made, file = console(terminal=False)
    with progress_for(made, 1, verbose=True) as listener:
        listener.model_started("org/a")
        listener.step_started("org/a", Step.PARITY)
    assert file.getvalue() == "org/a: started\norg/a: parity\n"


def test_quiet_says_nothing() -> None:
    made, file = console(terminal=True)
    with progress_for(made, 1, quiet=True) as listener:
        assert isinstance(listener, SilentListener)
        listener.model_finished(entry("org/a", Status.FAILED))
    assert file.getvalue() == ""


def test_with_json_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    made, file = console(terminal=True)
    with progress_for(made, 1, json=True) as listener:
        listener.model_finished(entry("org/a"))
    output = capsys.readouterr()
    assert (file.getvalue(), output.out) == ("", "")
    assert "[1/1] converted org/a" in output.err


def test_a_terminal_shows_only_what_is_in_work_and_keeps_failures() -> None:
    made, file = console(terminal=True, height=12)
    with progress_for(made, 1000) as listener:
        for number in range(1000):
            listener.model_started(f"org/m{number}")
        listener.step_started("org/m999", Step.PARITY)
        for number in range(999):
            status = Status.FAILED if number == 500 else Status.CONVERTED
            listener.model_finished(entry(f"org/m{number}", status, kind=ErrorKind.TIMEOUT if number == 500 else None))
        file.truncate(file.seek(0))
        area = made.render_lines(listener.render())  # type: ignore[attr-defined]
    lines = ["".join(segment.text for segment in line).rstrip() for line in area]
    assert re.match(r"org/m999 +parity +\d", lines[0])
    assert "999/1000" in lines[-2]
    assert lines[-1].split() == ["998", "converted", "0", "reused", "0", "mismatch", "1", "failed"]


def test_the_live_area_fits_the_terminal() -> None:
    made, file = console(terminal=True, height=10, width=60)
    with progress_for(made, 1000) as listener:
        for number in range(1000):
            listener.model_started(f"org/{'x' * 90}{number}")
        area = made.render_lines(listener.render())  # type: ignore[attr-defined]
        listener.model_finished(entry("org/kept", Status.FAILED, kind=ErrorKind.CRASHED, message="long " * 50))
    assert len(area) <= 9
    assert "and 994 more" in "".join(segment.text for line in area for segment in line)
    failures = [line for line in file.getvalue().splitlines() if "org/kept" in line]
    assert len(failures) == 1
    assert "crashed: long" in failures[0]
    assert "…" in failures[0]


def test_a_model_listed_twice_stays_until_both_ended() -> None:
    made, _ = console(terminal=True)
    with progress_for(made, 2) as listener:
        for _ in range(2):
            listener.model_started("org/a")
        for shown in (True, False):
            listener.model_finished(entry("org/a"))
            area = made.render_lines(listener.render())  # type: ignore[attr-defined]
            assert ("org/a" in "".join(segment.text for line in area for segment in line)) is shown


@pytest.mark.parametrize("terminal", [True, False])
def test_threads_lose_no_count(terminal: bool) -> None:
    made, file = console(terminal=terminal)
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for number in range(25):
            listener.model_started(f"{thread}/{number}")
            listener.step_started(f"{thread}/{number}", Step.EXPORT)
            status = Status.FAILED if number == 0 else Status.REUSED
            listener.model_finished(entry(f"{thread}/{number}", status))

    with progress_for(made, 200) as listener:
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
    said = file.getvalue()
    if terminal:
        assert re.search(r"8 failed\W*$", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said))
    else:
        assert [line.split("]")[0] for line in said.splitlines()] == [f"[{number}/200" for number in range(1, 201)]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(5, "Input/output error"), id="terminal-gone"),
        pytest.param(ValueError("I/O operation on closed file"), id="closed"),
        pytest.param(SystemExit(1), id="broken-pipe-as-rich-tells-it"),
    ],
)
def test_a_reader_who_left_fails_no_conversion(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    made, _ = console(terminal=False)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(made, "print", fail)
    with progress_for(made, 1, verbose=True) as listener:
        listener.step_started("org/a", Step.EXPORT)
        listener.model_finished(entry("org/a"))


@pytest.mark.parametrize("terminal", [True, False])
def test_hostile_names_stay_text(terminal: bool) -> None:
    made, file = console(terminal=terminal)
    failed = entry(HOSTILE, Status.FAILED, kind=ErrorKind.NOT_FOUND, message=HOSTILE)
    with progress_for(made, 1, verbose=True) as listener:
        listener.model_started(HOSTILE)
        listener.step_started(HOSTILE, Step.FETCH)
        made.render_lines(listener.render()) if terminal else None  # type: ignore[attr-defined]
        listener.model_finished(failed)
    summary(made, report(failed))
    said = file.getvalue()
    assert "[bold red]x[/]" in said
    for dangerous in ("\x1b[2J", "\x9b", "\u202e", "\ud800"):
        assert dangerous not in said


def test_the_summary_shows_failures_first_and_all_columns() -> None:
    said = printed(entry("org/good"), entry("org/bad", Status.FAILED, kind=ErrorKind.UNSUPPORTED), entry("org/other"))
    rows = said.splitlines()
    assert rows[0].split() == ["status", "model", "task", "nodes", "max", "diff", "time"]
    assert rows[1].split()[:2] == ["failed", "org/bad"]
    assert rows[2].split() == ["converted", "org/good", "fill-mask", "230", "1.2e-06", "8.5", "s"]
    assert rows[3].split()[1] == "org/other"
    assert rows[-1] == "3 models in 1:15:  2 converted  0 reused  0 mismatch  1 failed"


def test_the_summary_groups_errors_and_names_the_next_command() -> None:
    failures = [entry(f"org/t{number}", Status.FAILED, kind=ErrorKind.TIMEOUT) for number in range(5)]
    said = printed(entry("org/n", Status.FAILED, kind=ErrorKind.NETWORK), *failures, manifest="my models.yaml")
    assert said.index("timeout: 5 models") < said.index("network: 1 model\n")
    assert "and 2 more" in said
    assert "ferry batch 'my models.yaml' --retry-failed timeout" in said
    assert "ferry batch 'my models.yaml' --retry-failed network" in said
    assert "see it again: ferry convert org/n" in said


def test_a_mismatch_without_an_error_is_named() -> None:
    said = printed(entry("org/m", Status.MISMATCH))
    assert "mismatch: 1 model" in said
    assert "--retry-failed mismatch" in said


def test_the_summary_shows_fifty_rows() -> None:
    last = entry("org/last-failed", Status.FAILED, kind=ErrorKind.INTERNAL)
    said = printed(*(entry(f"org/m{number}") for number in range(1000)), last)
    assert len(re.findall(r"^converted ", said, re.MULTILINE)) == 49
    assert re.search(r"^failed +org/last-failed", said, re.MULTILINE)
    assert "and 951 more models" in said


def test_an_empty_report_prints_its_totals() -> None:
    assert printed().strip() == "0 models in 1:15:  0 converted  0 reused  0 mismatch  0 failed"


def test_differences_that_are_no_numbers_are_left_out() -> None:
    broken = entry("org/a").model_copy(update={"parity": SimpleNamespace(max_abs_diff=float("nan"), detail=None)})
    assert re.search(r"230 +- ", printed(broken))
