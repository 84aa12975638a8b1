"""Latency of our graphs in ONNX Runtime beside that of optimum's, at the same shapes.

    python tests/benchmarks/bench_latency.py [--repetitions 60] [--threads 2]

Converts the real all-MiniLM-L6-v2 (its transformer alone), a ViT-base, the encoder of a Whisper-base and a GPT-2 of 4
layers (random weights, without a cache) with ours and with ``optimum-cli`` at its default optimisation, and runs both
graphs in turns in one process at ONNX Runtime's default level. Prints medians and their ratio: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from measure import FERRY, model_folder, peer_environment, timed

SHAPES: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "minilm": ({"rows": 1, "length": 16}, {"rows": 1, "length": 128}, {"rows": 8, "length": 32}),
    "vit": ({"rows": 1}, {"rows": 4}),
    "whisper": ({"rows": 1}, {"rows": 2}),
    "gpt2": ({"rows": 1, "length": 16}, {"rows": 1, "length": 128}, {"rows": 8, "length": 32}),
}
TASKS = {
    "minilm": "feature-extraction",
    "vit": "image-classification",
    "whisper": "automatic-speech-recognition",
    "gpt2": "text-generation",
}
GRAPHS = {"whisper": "encoder_model.onnx"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=60, metavar="N", help="runs of each graph (default: 60)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each session (default: 2)")
    options = parser.parse_args(arguments)
    optimum = peer_environment()
    print(f"{'':24}{'ours, ms':>10}{'optimum, ms':>13}{'ratio':>8}")
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = Path(name)
        for model in SHAPES:
            source = write(model, folder / model)
            ours, theirs = folder / f"{model}-ours", folder / f"{model}-theirs"
            convert = [FERRY, "convert", source, "--task", TASKS[model], "--output", ours]
            timed(convert, FERRY_HOME=str(folder / "home"))
            timed([optimum, "export", "onnx", "-m", source, "--task", TASKS[model], theirs], may_fail=True)
            sessions = [session(place / GRAPHS.get(model, "model.onnx"), options.threads) for place in (ours, theirs)]
            for shape in SHAPES[model]:
                first, second = compare(sessions, shape, options.repetitions)
                label = f"{model} {' x '.join(str(size) for size in shape.values())}"
                print(f"{label:24}{first * 1000:10.2f}{second * 1000:13.2f}{second / first:8.2f}", flush=True)
    return 0


def write(model: str, folder: Path) -> Path:
    """Write the model's folder and return it."""
    import transformers

    if model == "minilm":
        shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("modules.json"))
    elif model == "vit":
        transformers.ViTForImageClassification(transformers.ViTConfig()).save_pretrained(folder)
    elif model == "whisper":
        # Of the decoder, which is not compared, the least that there can be.
        config = transformers.WhisperConfig(
            d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, decoder_layers=1,
            decoder_attention_heads=8, decoder_ffn_dim=64,
        )  # fmt: skip
        transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    else:
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4)).save_pretrained(folder)
    return folder


def session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(sessions: Sequence[Any], shape: Mapping[str, int], repetitions: int) -> tuple[float, float]:
    """Return the median seconds of each of two sessions, run in turns."""
    feeds = [{value.name: made(value, shape) for value in one.get_inputs()} for one in sessions]
    names = [[value.name for value in one.get_outputs()][:1] for one in sessions]
    spent: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions + 5):
        for at in (0, 1) if repetition % 2 else (1, 0):
            started = time.perf_counter()
            sessions[at].run(names[at], feeds[at])
            if repetition >= 5:
                spent[at].append(time.perf_counter() - started)
    return statistics.median(spent[0]), statistics.median(spent[1])


def made(value: Any, shape: Mapping[str, int]) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    if value.name == "pixel_values":
        return random.standard_normal((shape["rows"], 3, 224, 224)).astype(np.float32)
    if value.name == "input_features":
        return random.standard_normal((shape["rows"], 80, 3000)).astype(np.float32)
    size = (shape["rows"], shape["length"])
    if value.name == "input_ids":
        return random.integers(1000, 2000, size)
    if value.name == "position_ids":
        return np.broadcast_to(np.arange(shape["length"]), size).copy()
    return (np.zeros if value.name == "token_type_ids" else np.ones)(size, np.int64)


if __name__ == "__main__":
    sys.exit(main())
