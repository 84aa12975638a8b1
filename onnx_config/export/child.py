"""One step's process: it confines itself, calls the function, and leaves its answer in a file.

`onnx_config.export.forkserver` forks it, `onnx_config.export.isolate` sends it a `Job` and reads what it left. Only the
standard library is imported here, since a child that reports its lack of memory must not import anything first.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import importlib
import ipaddress
import json
import os
import resource
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_config.errors import ErrorKind, FerryError, ResourceError, TransientError

__all__ = [
    "EXIT_DISK_FULL",
    "Job",
    "live",
    "names_memory",
    "receive_imports",
    "send_imports",
    "send_job",
    "server_environment",
]

EXIT_DISK_FULL = 74
"""Exit status of a child that could not even write its answer; ``EX_IOERR`` of sysexits.h."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Asking the driver whether there is a GPU makes CUDA unusable in every process forked later; NVML does not.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

# A thread of OpenMP that waits for the next operator burns a core that another model could use.
_PATIENT = {"OMP_WAIT_POLICY": "passive"}
_TUNABLES = "GLIBC_TUNABLES"
# Weights come and go by the hundred megabytes: what was freed is kept for the next, up to a bound, instead of given
# back and asked for again page by page. Not in huge pages: clearing many takes longer than they save.
_MEMORY = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"

_MEMORY_TEXTS = (
    "can't allocate memory",
    "cannot allocate memory",
    "defaultcpuallocator",
    "std::bad_alloc",
    "failed to allocate memory",
    "cuda out of memory",
    "memory allocation of",  # Rust: safetensors and tokenizers abort with it.
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_DISK_TEXTS = ("no space left on device", "disk quota exceeded")
_MESSAGE_LIMIT = 2_000
_TRACEBACK_LIMIT = 20_000
_OOM_SCORE = "800"
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the parent asks of one child."""

    name: str
    """How messages call the step."""

    function: str
    """``"package.module:callable"``."""

    request: Mapping[str, Any]
    """The callable's only argument; JSON values."""

    folder: str
    """Absolute path of the child's working and temporary folder."""

    log: str
    """Absolute path of the file that takes standard output and standard error."""

    answer: str
    """Absolute path of the file that appears when the function has ended."""

    threads: int
    """Threads for PyTorch and OpenMP; above zero."""

    network: bool
    """Whether connections beyond this machine are allowed."""

    environment: Mapping[str, str]
    """The parent's environment at the time of the call."""


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the fork server of a process that has ``environment``."""
    # One thread each: a thread pool started by an import would not exist in the forked child.
    threads = dict.fromkeys(_THREAD_VARIABLES, "1")
    tunables = ":".join(filter(None, (_MEMORY, environment.get(_TUNABLES))))
    return {**environment, **_QUIET, **_OFFLINE, **_PATIENT, **threads, _TUNABLES: tunables}


def send_imports(link: socket.socket, names: Sequence[str]) -> None:
    """Send what the server is to import before it forks; to be sent before the server gets its end of ``link``."""
    _send(link, list(names))


def receive_imports(link: socket.socket) -> list[str]:
    """Return what `send_imports` sent; it is there already.

    Raises:
        EOFError: If it is not, as the other end was closed.
    """
    (size,) = _LENGTH.unpack(_receive_exactly(link, _LENGTH.size))
    return [str(name) for name in json.loads(_receive_exactly(link, size))]


def send_job(link: socket.socket, job: Job) -> None:
    """Send ``job`` through ``link``, its environment included, so that no secret touches the disk."""
    _send(link, asdict(job))


def _send(link: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    link.sendall(_LENGTH.pack(len(data)) + data)


def _receive_exactly(link: socket.socket, size: int) -> bytes:
    """Return ``size`` bytes from ``link``.

    Raises:
        EOFError: If the other end was closed before they had come.
    """
    data = bytearray()
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise EOFError(f"the other end closed after {len(data)} of {size} bytes")
        data += part
    return bytes(data)


def live(link: socket.socket, server_pid: int) -> int:
    """Do one job and return the exit status; called in a process just forked.

    0 means that the answer file is there, whether the function returned or raised. A parent that is gone before it
    has sent the job is no error: there is nobody to tell.
    """
    os.setsid()
    _die_with(server_pid)
    try:
        (size,) = _LENGTH.unpack(_receive_exactly(link, _LENGTH.size))
        job = Job(**json.loads(_receive_exactly(link, size)))
    except (EOFError, ConnectionError):
        return 0
    link.close()
    try:
        _write_logs_to(job.log)
        _confine(job)
        _write_answer(job.answer, _outcome(job))
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            return EXIT_DISK_FULL
        raise
    _flush()
    return 0


def names_memory(text: str) -> bool:
    """Return whether ``text`` is how PyTorch, ONNX Runtime, C++ or Rust say that memory ran out.

    >>> names_memory("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")
    True
    """
    lowered = text.lower()
    return any(words in lowered for words in _MEMORY_TEXTS)


def _outcome(job: Job) -> str:
    try:
        value = _resolve(job.function)(dict(job.request))
        return _success(value, job.function)
    except BaseException as error:  # noqa: BLE001 - the parent judges; SystemExit too, as a step that exits has no answer
        return json.dumps(_describe(error, job))


def _resolve(function: str) -> Callable[[dict[str, Any]], Any]:
    module, _, attribute = function.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _success(value: Any, function: str) -> str:
    if not isinstance(value, dict):
        raise TypeError(f"{function} must return a dict of JSON values, and returned {type(value).__name__}")
    try:
        return json.dumps({"value": value, "peak_rss_bytes": _peak_rss_bytes()})
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must return a dict of JSON values: {error}") from error


def _describe(error: BaseException, job: Job) -> dict[str, Any]:
    ferry = error if isinstance(error, FerryError) else _translate(error, job)
    if ferry is not None:
        return {"kind": ferry.kind.value, "message": ferry.message}
    cls = type(error)
    return {
        "type_name": cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}",
        "message": _text(error),
        "traceback_text": "".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:],
    }


def _translate(error: BaseException, job: Job) -> FerryError | None:
    """Return the error for a full disk or memory, wherever in the chain of causes it is said; else ``None``."""
    for cause in _chain(error):
        text = _text(cause)
        if getattr(cause, "errno", None) in _DISK_ERRORS or any(words in text.lower() for words in _DISK_TEXTS):
            return TransientError(
                f"{job.name}: disk full while it worked in {job.folder}: {text}; free some space and run it again",
                kind=ErrorKind.STORE,
            )
        if isinstance(cause, MemoryError) or names_memory(text):
            return ResourceError(
                f"{job.name} ran out of memory: {text or type(cause).__name__}; "
                "give it more memory, or run it where there is more"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:_MESSAGE_LIMIT]
    except Exception:  # noqa: BLE001 - a foreign exception's own __str__ may fail, and the step's error matters more
        return f"{type(error).__name__} without a readable message"


def _write_answer(path: str, text: str) -> None:
    draft = Path(f"{path}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _write_logs_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # A killed child cannot flush, so each line goes out at once.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2, all_threads=False)


def _flush() -> None:
    """Write out what Python and C hold back, since the process ends without running any exit handler."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def _confine(job: Job) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    threads = dict.fromkeys(_THREAD_VARIABLES, str(job.threads))
    environment = {**job.environment, **_QUIET, **threads, "TMPDIR": job.folder}
    if not job.network:
        environment |= _OFFLINE
        # A proxy on this machine would be a way out, as loopback stays open.
        environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
        sys.addaudithook(_refuse_network)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    os.chdir(job.folder)
    # Both read their settings when imported, which was in the server.
    if constants := sys.modules.get("huggingface_hub.constants"):
        offline = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
        constants.HF_HUB_OFFLINE = offline.upper() in ("1", "ON", "YES", "TRUE")  # type: ignore[attr-defined]
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(job.threads)


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Refuse connections and name look-ups beyond this machine, as an audit hook.

    It stops libraries that reach out of habit. It is no wall against hostile code, which can call C directly.
    """
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        link, address = args
        if link.family not in (socket.AF_INET, socket.AF_INET6) or not address:
            return
        host = address[0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    if not _is_loopback(host):
        raise OSError(errno.ENETUNREACH, f"the network is closed for this step, which asked for {host!r}")


def _is_loopback(host: object) -> bool:
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("ascii", "replace")
    if host is None or host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _peak_rss_bytes() -> int:
    # Not ru_maxrss: a forked process starts with its parent's there.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _die_with(server_pid: int) -> None:
    """Have the kernel kill this process when the fork server dies; end it if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server_pid:
        os._exit(1)
