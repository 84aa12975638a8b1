"""Real processes and real kills: whatever becomes of a child, its server or its parent, the rest goes on."""

from __future__ import annotations

import mmap
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_config.errors import ErrorKind, FerryError, InternalError, ModelError, ResourceError, TransientError
from onnx_config.export import isolate, watch
from onnx_config.export.child import server_environment
from onnx_config.export.isolate import Answer, ChildError, Server

ROOT = Path(__file__).parents[2]
BODIES = "tests.onnx_config.isolate_bodies"
GIB = 1024**3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is built on Linux's process control")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    light = Server(preload=(BODIES,))
    yield light
    light.shutdown()


@pytest.fixture
def call(server: Server, tmp_path: Path) -> Callable[..., Answer]:
    def call(body: str, request: dict[str, Any] | None = None, **options: Any) -> Answer:
        defaults = {"folder": tmp_path, "timeout_seconds": 20, "memory_limit_bytes": GIB, "name": f"step {body}"}
        return server.run(f"{BODIES}:{body}", request or {}, **{**defaults, **options})

    return call


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.01)
    return found


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def read_pids(folder: Path, seconds: float = 10) -> list[int]:
    """Return what the body ``hang`` told: child, grandchild, one in its own session, server, daemon if any."""
    path = folder / "pids"
    wait_until(path.exists, seconds)
    return [int(pid) for pid in path.read_text().split()]


def assert_all_end(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)))


# What a step gets


def test_the_answer_comes_back(call, tmp_path):
    answer = call("echo", {"text": "é\ud800", "numbers": [1, 2.5, None], "nested": {"a": True}})
    assert answer.value == {"text": "é\ud800", "numbers": [1, 2.5, None], "nested": {"a": True}}
    assert 0 < answer.seconds < 5
    assert 5 * 1024**2 < answer.peak_rss_bytes < GIB
    assert answer.log_tail == ""
    assert [path.suffix for path in tmp_path.iterdir()] == [".log"]


def test_a_child_has_surroundings_of_its_own(call, tmp_path, monkeypatch):
    monkeypatch.setenv("SET_AFTER_THE_SERVER", "yes")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:3128")
    variables = ["SET_AFTER_THE_SERVER", "HTTPS_PROXY", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TMPDIR"]
    found = call("surroundings", {"variables": variables}, threads=3).value
    assert found.pop("main") == "None", "the test runner's main module must not run in the child"
    assert found.pop("oom_score") >= 800
    assert found == {
        "cwd": str(tmp_path),
        "temporary": str(tmp_path),
        "session": True,
        "argv": ["-c"],
        "environment": {
            "SET_AFTER_THE_SERVER": "yes",
            "HTTPS_PROXY": None,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "3",
            "TMPDIR": str(tmp_path),
        },
        "core": 0,
        "stdin": "",
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, "", id="none-yet"),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, ":glibc.malloc.check=1", id="the-users-come-last"),
    ],
)
def test_the_server_keeps_freed_memory_and_waits_without_burning_a_core(before, after):
    made = server_environment({**before, "KEPT": "yes"})
    assert made["GLIBC_TUNABLES"].startswith("glibc.malloc.mmap_threshold=")
    assert made["GLIBC_TUNABLES"].endswith(after)
    assert (made["OMP_WAIT_POLICY"], made["OMP_NUM_THREADS"], made["KEPT"]) == ("passive", "1", "yes")


def test_the_server_imports_once_what_its_children_will_need(call):
    modules = ["wave", "colorsys"]
    first = call("imported", {"modules": modules}).value
    named = call("imported", {"modules": modules}, imports=("no_such_module", "wave:no_such_name", "colorsys")).value
    later = call("imported", {"modules": modules}).value
    assert first["there"] == [False, False]
    assert named["there"] == later["there"] == [True, True]
    assert first["server"] == named["server"] == later["server"]


def test_a_step_with_network_has_the_callers_settings(call, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    found = call("surroundings", {"variables": ["HF_HUB_OFFLINE", "HTTPS_PROXY"]}, network=True).value
    assert found["environment"] == {"HF_HUB_OFFLINE": None, "HTTPS_PROXY": "http://proxy:3128"}


def test_a_closed_network_leaves_loopback_open(call):
    ways = ["loopback", "localhost", "name", "tcp", "udp", "udp6", "datagram"]
    found = call("reach_out", {"ways": ways}).value
    assert [way for way, error in found.items() if not error] == ["loopback", "localhost"]
    assert all("the network is closed for this step" in found[way] for way in ways[2:])


def test_an_open_network_is_not_refused(call):
    found = call("reach_out", {"ways": ["loopback", "udp"]}, network=True).value
    assert "closed for this step" not in found["udp"]


def test_everything_printed_goes_to_the_log(call, tmp_path, capfd):
    answer = call("talk", {"lines": 30_000}, name="export of org/model: a/b")
    assert answer.log_tail.endswith("the end")
    assert len(answer.log_tail) <= 4_000
    (log,) = tmp_path.glob("*.log")
    assert log.name.startswith("export-of-org-model-a-b-")
    text = log.read_text()
    assert {"python says hello", "descriptor says hello", "C says hello"} < set(text.splitlines())
    assert len(text) > 2_500_000
    assert capfd.readouterr() == ("", "")


def test_an_endless_printer_does_not_fill_the_disk(call, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_LOG_LIMIT_BYTES", 100_000)
    assert call("talk", {"lines": 10_000, "seconds": 0.4}).log_tail.endswith("the end")
    (log,) = tmp_path.glob("*.log")
    assert log.stat().st_size < 100_000


def test_a_huge_answer_comes_back(call):
    assert len(call("huge", {"size": 30_000_000}).value["text"]) == 30_000_000


def test_a_huge_request_arrives(call):
    assert call("echo", {"text": "x" * 5_000_000}).value == {"text": "x" * 5_000_000}


def test_threads_run_children_at_once(server, tmp_path):
    def one(number: int) -> Any:
        folder = tmp_path / str(number)
        folder.mkdir()
        answer = server.run(
            f"{BODIES}:talk" if number % 2 else f"{BODIES}:echo",
            {"seconds": 1, "number": number},
            folder=folder,
            timeout_seconds=20,
            memory_limit_bytes=GIB,
            name=f"step {number}",
        )
        return answer.value.get("number", number)

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == list(range(8))
    assert time.monotonic() - started < 3.5, "four children that take 1 s each did not run beside each other"


# How a step ends badly


def test_a_ferry_error_keeps_its_kind(call):
    with pytest.raises(ModelError, match=r"^class X is not supported at all$") as caught:
        call("refuse", {"kind": "mismatch"})
    assert caught.value.kind is ErrorKind.MISMATCH


def test_any_other_exception_is_the_callers_to_judge(call):
    with pytest.raises(ChildError, match=r"^ValueError: bad value in two lines$") as caught:
        call("fail")
    error = caught.value
    assert error.type_name == "ValueError"
    assert "KeyError: 'cause'" in error.traceback_text
    assert "isolate_bodies.py" in error.traceback_text
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (again.type_name, again.message, again.traceback_text) == (
        error.type_name,
        error.message,
        error.traceback_text,
    )


@pytest.mark.parametrize(
    ("body", "request_", "type_name", "words"),
    [
        pytest.param("fail_oddly", {}, f"{BODIES}.OddError", "without a readable message", id="cannot-say-what-it-is"),
        pytest.param("leave", {}, "SystemExit", "3", id="sys-exit"),
        pytest.param("missing", {}, "AttributeError", "missing", id="no-such-function"),
        pytest.param("not_json", {"what": "object"}, "TypeError", "dict of JSON values: Object of type", id="object"),
        pytest.param("not_json", {"what": "set"}, "TypeError", "dict of JSON values: Object of type set", id="set"),
        pytest.param("not_json", {"what": "list"}, "TypeError", "and returned list", id="a-list"),
        pytest.param("not_json", {"what": "none"}, "TypeError", "and returned NoneType", id="nothing"),
    ],
)
def test_odd_ends_are_told(call, body, request_, type_name, words):
    with pytest.raises(ChildError, match=re.escape(words)) as caught:
        call(body, request_)
    assert caught.value.type_name == type_name


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"type": "MemoryError", "args": []}, id="python"),
        pytest.param({"type": "OSError", "args": [12, "Cannot allocate memory"]}, id="system-call"),
        pytest.param({"type": "", "args": ["[enforce fail] DefaultCPUAllocator: can't allocate memory"]}, id="torch"),
        pytest.param({"type": "", "args": ["CUDA out of memory. Tried to allocate 2 GiB"]}, id="torch-cuda"),
        pytest.param({"type": "", "args": ["bad_alloc: std::bad_alloc"]}, id="c++"),
        pytest.param({"type": "", "args": ["Failed to allocate memory for requested buffer"]}, id="onnxruntime"),
        pytest.param({"type": "MemoryError", "args": [], "wrapped": True}, id="as-a-cause"),
    ],
)
def test_allocators_that_give_up_are_out_of_memory(call, said):
    with pytest.raises(ResourceError, match="ran out of memory") as caught:
        call("say", said)
    assert caught.value.kind is ErrorKind.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        pytest.param("fill_disk", {"where": "step"}, id="in-the-step"),
        pytest.param("fill_disk", {"where": "answer"}, id="when-it-answers"),
        pytest.param("out_of_space_text", {}, id="quota"),
        pytest.param("say", {"type": "", "args": ["I/O error: No space left on device (os error 28)"]}, id="rust"),
        pytest.param("say", {"type": "OSError", "args": [28, "No space"], "wrapped": True}, id="as-a-cause"),
    ],
)
def test_a_full_disk_is_told(call, body, request_, tmp_path):
    with pytest.raises(TransientError, match=f"disk full while it worked in {tmp_path}") as caught:
        call(body, request_)
    assert caught.value.kind is ErrorKind.STORE


@pytest.mark.parametrize(
    ("body", "request_", "kind", "words"),
    [
        pytest.param(
            "segfault", {}, "crashed", r"SIGSEGV; its last output: .*about to read.*string_at.*in segfault", id="segv"
        ),
        pytest.param("abort", {"text": "oh no"}, "crashed", r"died of SIGABRT; its last output: oh no", id="abort"),
        pytest.param(
            "abort", {"text": "what(): std::bad_alloc"}, "out_of_memory", "SIGABRT.*bad_alloc", id="c++-memory"
        ),
        pytest.param(
            "die_by_signal", {"signal": "SIGKILL"}, "crashed", "died of SIGKILL; it printed nothing", id="kill"
        ),
        pytest.param("die_by_signal", {"signal": "SIGTERM"}, "crashed", "died of SIGTERM", id="term"),
        pytest.param("die_by_signal", {"signal": "SIGINT"}, "crashed", "died of SIGINT", id="int"),
        pytest.param("die_by_signal", {"signal": "SIGRTMIN"}, "crashed", "died of SIGRTMIN|died of signal", id="rt"),
        pytest.param("leave_at_once", {"status": 3}, "crashed", "exit status 3 and no answer.*last words", id="exit-3"),
        pytest.param("leave_at_once", {"status": 0}, "crashed", "exit status 0 and no answer", id="exit-0"),
    ],
)
def test_a_death_names_its_signal_and_last_words(call, body, request_, kind, words):
    with pytest.raises(ResourceError, match=words) as caught:
        call(body, request_)
    assert caught.value.kind == kind
    assert len(caught.value.message) < 800


def test_the_kernels_killer_is_out_of_memory(call, monkeypatch):
    counts = iter([4, 5])
    monkeypatch.setattr(isolate, "_oom_kills", lambda: next(counts))
    with pytest.raises(ResourceError, match="killed by the kernel") as caught:
        call("die_by_signal", {"signal": "SIGKILL"})
    assert caught.value.kind is ErrorKind.OUT_OF_MEMORY


@pytest.mark.parametrize("elsewhere", [False, True], ids=["the-child", "its-own-child"])
def test_more_memory_than_allowed_ends_the_step(call, elsewhere):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"held \d+ MiB of memory, more than its limit of 150 MiB") as caught:
        call("eat", {"elsewhere": elsewhere}, memory_limit_bytes=150 * 1024**2)
    assert caught.value.kind is ErrorKind.OUT_OF_MEMORY
    assert time.monotonic() - started < 10


def test_pages_of_files_do_not_count_as_held(call):
    answer = call("read_mapped", {}, memory_limit_bytes=800 * 1024**2)
    assert answer.value["pages"] == 300 * 1024**2 // mmap.PAGESIZE
    held = answer.peak_rss_bytes - 300 * 1024**2
    # Within less than the file is large.
    assert call("read_mapped", {}, memory_limit_bytes=max(held, 0) + 150 * 1024**2).value == answer.value


def test_peak_memory_is_the_steps_own(call):
    assert call("huge", {"size": 1}).peak_rss_bytes + 60_000_000 < call("huge", {"size": 60_000_000}).peak_rss_bytes


@pytest.mark.parametrize("stubborn", [False, True], ids=["asleep", "busy-and-ignoring-SIGTERM"])
def test_a_hang_ends_with_all_it_started(call, stubborn, tmp_path):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"longer than its limit of 1\.2 s") as caught:
        call("hang", {"stubborn": stubborn}, timeout_seconds=1.2)
    assert caught.value.kind is ErrorKind.TIMEOUT
    assert 1.2 < time.monotonic() - started < 4
    assert_all_end(read_pids(tmp_path)[:3])


def test_a_step_that_ends_well_leaves_nobody_behind(call, tmp_path):
    call("hang", {"seconds": 0.3})
    assert_all_end(read_pids(tmp_path)[:3])
    assert_all_end([call("orphan").value["pid"]])


# When the processes around a step die


def test_kill_all_interrupts_every_run(server, tmp_path):
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()

    def one(folder: Path) -> FerryError | None:
        with pytest.raises(ResourceError, match="was interrupted") as caught:
            server.run(f"{BODIES}:hang", {}, folder=folder, timeout_seconds=60, memory_limit_bytes=GIB, name="a step")
        return caught.value

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(one, folder) for folder in folders]
        pids = [pid for folder in folders for pid in read_pids(folder)[:3]]
        server.kill_all()
        assert [run.result(10).kind for run in runs] == [ErrorKind.CRASHED] * 3
    assert_all_end(pids)


def test_a_killed_server_ends_its_runs_and_is_replaced(call, server, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(call, "hang")
        pids = read_pids(tmp_path)
        assert pids[3] == server.pid
        os.kill(pids[3], signal.SIGKILL)
        with pytest.raises(ResourceError, match="its fork server died") as caught:
            run.result(10)
    assert caught.value.kind is ErrorKind.CRASHED
    assert_all_end(pids)
    assert call("echo", {"a": 1}).value == {"a": 1}
    assert server.pid not in (None, pids[3])


def test_a_server_killed_between_runs_goes_unnoticed(call, server):
    for _ in range(3):
        call("echo")
        os.kill(server.pid, signal.SIGKILL)
    assert call("echo", {"a": 1}).value == {"a": 1}


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = Server(preload=(f"{BODIES}:_die",))
    with pytest.raises(
        ResourceError, match=r"the fork server took no child, twice; its last output: .*Segmentation fault"
    ) as caught:
        broken.run("builtins:dict", {}, folder=tmp_path, timeout_seconds=9, memory_limit_bytes=GIB, name="a step")
    assert caught.value.kind is ErrorKind.CRASHED
    broken.shutdown()


def test_an_import_that_fails_is_met_again_by_the_child(tmp_path):
    lame = Server(preload=("there.is.no.such.module",))
    options: dict[str, Any] = {"timeout_seconds": 9, "memory_limit_bytes": GIB, "name": "a step"}
    assert lame.run("builtins:dict", {"a": 1}, folder=tmp_path, **options).value == {"a": 1}
    with pytest.raises(ChildError, match="ModuleNotFoundError: No module named 'there'"):
        lame.run("there.is.no.such.module:f", {}, folder=tmp_path, **options)
    lame.shutdown()


def start_script(folder: Path, text: str) -> subprocess.Popen[str]:
    """Start a user's script, which has no main guard and keeps its children's files in ``folder``."""
    header = f"""
        import os, signal, sys
        from pathlib import Path
        from onnx_config.export.isolate import Server
        folder = Path({str(folder)!r})
        with (folder / "starts").open("a") as file:
            file.write(f"{{__name__}}\\n")
        server = Server(preload=())
        options = dict(folder=folder, timeout_seconds=60, memory_limit_bytes=2**30, name="a step")
    """
    script = folder / "script.py"
    script.write_text(textwrap.dedent(header) + textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    with start_script(tmp_path, 'print(server.run("builtins:dict", {"a": 1}, **options).value)') as script:
        assert script.communicate(timeout=30) == ("{'a': 1}\n", "")
    assert (tmp_path / "starts").read_text() == "__main__\n"


FORK = """
first = server.run("builtins:dict", {}, **options) and server.pid
pid = os.fork()
if pid == 0:
    assert server.pid is None
    server.run("builtins:dict", {}, **options)
    assert server.pid != first
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert server.run("builtins:dict", {"a": 1}, **options).value == {"a": 1} and server.pid == first
"""


def test_a_forked_process_has_a_server_of_its_own(tmp_path):
    with start_script(tmp_path, FORK) as script:
        assert script.communicate(timeout=30) == ("", "")
        assert script.returncode == 0


HANG = f'server.run("{BODIES}:hang", {{}}, **options)\n'


@pytest.mark.parametrize("daemon", [False, True], ids=["children", "a-daemon-without-a-parent"])
def test_a_killed_parent_leaves_nobody_behind(tmp_path, daemon):
    with start_script(tmp_path, HANG.replace("{}", repr({"daemon": daemon}))) as script:
        pids = read_pids(tmp_path)
        script.kill()
        assert_all_end(pids)


def test_a_child_dies_with_a_server_that_could_not_kill_it(tmp_path):
    with start_script(tmp_path, HANG) as script:
        child, near, far, server, _ = read_pids(tmp_path)
        os.kill(server, signal.SIGSTOP)
        script.kill()
        os.kill(server, signal.SIGKILL)
        assert_all_end([server, child])
        for pid in (near, far):  # With both gone nobody is left who knows of these; a container's end is theirs.
            os.kill(pid, signal.SIGKILL)


def test_a_killed_parent_whose_fork_holds_its_files_open_leaves_nobody_behind(tmp_path):
    # Forked behind Python's back, as a C library does, so that no hook of ours closes anything.
    fork = "import ctypes\nserver.warm_up()\nif ctypes.PyDLL(None).fork() == 0:\n    signal.pause()\n"
    with start_script(tmp_path, fork + HANG) as script:
        pids = read_pids(tmp_path)
        script.kill()
        assert_all_end(pids)
        os.killpg(script.pid, signal.SIGKILL)  # The fork, which outlives the script.


@pytest.mark.parametrize(
    ("number", "handler", "words"),
    [
        pytest.param(signal.SIGINT, "", "KeyboardInterrupt", id="ctrl-c"),
        pytest.param(
            signal.SIGTERM,
            "signal.signal(signal.SIGTERM, lambda *_: server.kill_all())\n",
            "ResourceError: a step was interrupted",
            id="kill_all-in-a-handler",
        ),
    ],
)
def test_an_interrupted_parent_ends_its_children(tmp_path, number, handler, words):
    with start_script(tmp_path, handler + HANG) as script:
        pids = read_pids(tmp_path)
        os.killpg(script.pid, number)
        _, errors = script.communicate(timeout=10)
        assert words in errors
        assert script.returncode != 0
        assert_all_end(pids)


# What the caller gets wrong


def test_a_request_that_is_no_json_is_our_bug(call):
    with pytest.raises(InternalError, match="the request of step echo is no JSON"):
        call("echo", {"path": Path()})


def test_a_folder_that_is_not_there_is_our_bug(call, tmp_path):
    with pytest.raises(InternalError, match="the folder of step echo is not there"):
        call("echo", folder=tmp_path / "missing")


# The real server


def test_the_libraries_are_there_before_the_step(tmp_path):
    modules = ["torch", "transformers.exporters.exporter_onnx", "onnxscript", "onnx", "onnxruntime"]
    options: dict[str, Any] = {"folder": tmp_path, "timeout_seconds": 60, "memory_limit_bytes": 4 * GIB}
    started = time.monotonic()
    isolate.warm_up()
    assert time.monotonic() - started < 1, "warm_up must not wait for the imports"
    request = {"modules": modules}
    first = isolate.run(f"{BODIES}:with_torch", request, threads=2, name="first", **options)
    assert first.value == {"loaded": modules, "threads": 2, "sum": 300.0**3, "offline": True}
    assert first.log_tail == ""
    assert isolate.run(f"{BODIES}:with_torch", request, name="second", **options).seconds < 3
    isolate.shutdown()
    assert isolate._server.pid is None
