"""What a conversion costs against the depth of the model: tracing and binding apart.

    python tests/benchmarks/bench_depth.py [--layers 4 12 24 48] [--width 256]

Writes Llamas that differ in nothing but the number of layers, with random weights, and runs the steps of ours on each
as a conversion does, one child per step. Prints CPU seconds, per step and per layer, and nodes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from bench_memory import run_steps, write_llama

from onnx_config.export import isolate


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 24, 48], metavar="N")
    parser.add_argument("--width", type=int, default=256, metavar="N", help="hidden size (default: 256)")
    options = parser.parse_args(arguments)
    isolate.warm_up()
    steps = ("detect", "trace", "simplify", "bind", "parity")
    print(f"{'layers':>8}{''.join(f'{step:>9}' for step in steps)}{'trace / layer':>15}{'nodes':>8}")
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
            folder = Path(name)
            write_llama(folder / "llama", layers=layers, width=options.width, vocabulary=1000)
            seconds: dict[str, float] = {}
            nodes = 0
            before = cpu_seconds()
            for step, answer in run_steps(folder / "llama", folder):
                now = cpu_seconds()
                seconds[step], before = now - before, now
                nodes = answer.value["graph"]["nodes"] if step == "bind" else nodes
        row = "".join(f"{seconds[step]:9.2f}" for step in steps)
        print(f"{layers:8}{row}{seconds['trace'] / layers:15.3f}{nodes:8}", flush=True)
    return 0


def cpu_seconds() -> float:
    """Return what the children of the fork servers of this process have used."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(t.children_user + t.children_system for t in times)


if __name__ == "__main__":
    sys.exit(main())
