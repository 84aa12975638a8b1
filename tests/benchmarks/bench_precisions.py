"""What each variant of a model costs and keeps: bytes, seconds to make, error, agreement, and latency beside float32.

    python tests/benchmarks/bench_precisions.py [--only minilm] [--repetitions 30] [--threads 2]

Converts the real all-MiniLM-L6-v2, a ViT-base and a GPT-2 of 4 layers (random weights) once with every variant, and
reads what their ``ferry.json`` says of each; then runs the graphs in turns in one process. A variant that does not hold
is shown with its reason. The seconds are those of making and comparing one, without what all variants share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_latency import made, session, write
from measure import FERRY, timed

from onnx_config.variants import Variant, variant_file

SHAPES: Mapping[str, Mapping[str, int]] = {
    "minilm": {"rows": 1, "length": 64},
    "gpt2": {"rows": 1, "length": 64},
    "vit": {"rows": 1},
}
TASKS = {"minilm": "feature-extraction", "vit": "image-classification", "gpt2": "text-generation"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=sorted(SHAPES), action="append", help="a model; may be given several times")
    parser.add_argument("--repetitions", type=int, default=30, metavar="N", help="runs of each graph (default: 30)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each session (default: 2)")
    options = parser.parse_args(arguments)
    print(
        f"{'':18}{'MB':>8}{'seconds':>9}{'max diff':>11}{'share':>8}{'cosine':>9}{'alike':>8}{'ms':>9}{'x float32':>10}"
    )
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        for model in options.only or SHAPES:
            place = Path(name) / model
            wanted = [word for variant in Variant for word in ("--variant", variant.value)]
            source = write(model, place / "source")
            convert = [FERRY, "convert", source, "--task", TASKS[model], "--output", place / "made", *wanted]
            timed(convert, FERRY_HOME=str(place / "home"))
            show(model, place / "made", repetitions=options.repetitions, threads=options.threads)
    return 0


def show(model: str, folder: Path, *, repetitions: int, threads: int) -> None:
    """Print the lines of one model."""
    entries = json.loads((folder / "ferry.json").read_text(encoding="utf-8"))["model"]["variants"]
    held = [entry["variant"] for entry in entries if entry["graphs"]]
    files = {None: folder / "model.onnx"} | {name: folder / variant_file("model.onnx", name) for name in held}
    times = latencies(list(files.values()), SHAPES[model], repetitions, threads)
    found = dict(zip(files, times, strict=True))
    size = files[None].stat().st_size / 1e6
    print(f"{model + ' float32':18}{size:8.1f}{'':>9}{'':>11}{'':>8}{'':>9}{'':>8}{found[None] * 1e3:9.2f}", flush=True)
    for entry in entries:
        print(f"{model + ' ' + entry['variant']:18}{line(entry, found, found[None])}", flush=True)


def line(entry: Mapping[str, Any], found: Mapping[str | None, float], single: float) -> str:
    """Return what is shown of one variant."""
    parity = entry["parity"]
    if not entry["graphs"]:
        return f"  left out: {parity['detail'] if parity else '; '.join(entry['notes'])}"
    alike = parity["agreement"]["rate"] if parity["agreement"] else None
    shown = f"{entry['size_bytes'] / 1e6:8.1f}{entry['seconds']:9.2f}{parity['max_abs_diff']:11.2g}"
    shown += f"{parity['relative_error']:8.2%}{parity['cosine']:9.5f}{'-' if alike is None else f'{alike:.1%}':>8}"
    spent = found[entry["variant"]]
    return f"{shown}{spent * 1e3:9.2f}{single / spent:10.2f}"


def latencies(graphs: Sequence[Path], shape: Mapping[str, int], repetitions: int, threads: int) -> list[float]:
    """Return the median seconds of each graph, run in turns."""
    sessions = [session(path, threads) for path in graphs]
    feeds = [{value.name: made(value, shape) for value in one.get_inputs()} for one in sessions]
    spent: list[list[float]] = [[] for _ in sessions]
    for _ in range(repetitions):
        for one, feed, times in zip(sessions, feeds, spent, strict=True):
            start = time.perf_counter()
            one.run(None, feed)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[len(times) // 4 :]) for times in spent]


if __name__ == "__main__":
    raise SystemExit(main())
