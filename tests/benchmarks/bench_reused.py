"""A batch of models that are all converted already: what it costs to find out.

    python tests/benchmarks/bench_reused.py [--count 1000] [--engine prefect|local] [--workdir DIR]

Writes ``--count`` fine-tunes of one tiny BERT, converts them (or takes those that are in ``DIR``), and runs the same
``ferry batch`` again. Prints both runs and the ratio per model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import FERRY, Run, timed
from safetensors.numpy import load_file, save_file


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="models (default: 1000)")
    parser.add_argument("--engine", choices=["prefect", "local"], default="prefect", help="of ferry (default: prefect)")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where models and catalog are, or are to be kept")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = options.workdir or Path(name)
        models = make_models(folder / "models", options.count)
        first = batch(models, folder, options.engine, "converted")
        second = batch(models, folder, options.engine, "reused")
    for title, run in ("first run", first), ("second run, all reused", second):
        each = run.wall_seconds / len(models) * 1000
        print(f"{title:28}{run.wall_seconds:9.1f} s{each:9.1f} ms per model{run.cpu_seconds:9.1f} CPU s")
    print(f"{'ratio':28}{first.wall_seconds / second.wall_seconds:9.1f}")
    return 0


def make_models(root: Path, count: int) -> list[Path]:
    from transformers import BertConfig, BertModel

    base = root / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if not base.exists():
        BertModel(BertConfig(vocab_size=200, max_position_embeddings=64, **sizes)).save_pretrained(base)
    weights, config = load_file(base / "model.safetensors"), (base / "config.json").read_bytes()
    models = []
    for number in range(count):
        model = root / f"tune-{number:04}"
        models.append(model)
        if (model / "model.safetensors").exists():
            continue
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_bytes(config)
        random = np.random.default_rng(number)
        noisy = {key: value + random.standard_normal(value.shape, np.float32) / 50 for key, value in weights.items()}
        save_file(noisy, model / "model.safetensors", metadata={"format": "pt"})
    return models


def batch(models: Sequence[Path], folder: Path, engine: str, expected: str) -> Run:
    manifest, report = folder / "manifest.json", folder / "report.json"
    manifest.write_text(json.dumps({"models": [str(model.resolve()) for model in models]}), encoding="utf-8")
    command = [FERRY, "batch", manifest, "--engine", engine, "--report", report]
    run, _ = timed(command, FERRY_HOME=str((folder / "home").resolve()))
    totals = json.loads(report.read_text())["totals"]
    if totals[expected] != len(models) and totals["reused"] != len(models):
        raise SystemExit(f"ferry batch: {totals}")
    return run


if __name__ == "__main__":
    sys.exit(main())
