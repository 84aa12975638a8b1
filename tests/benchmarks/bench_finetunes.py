"""Verified conversions per CPU second over many fine-tunes of one structure, beside three peers.

    python tests/benchmarks/bench_finetunes.py [--count 20] [--structure minilm|bert-base] [--engine local|prefect]

Makes ``--count`` checkpoints of one structure (the real all-MiniLM-L6-v2 with noise on its weights, or a BERT-base of
12 layers with random ones) and converts them

- with one ``ferry batch`` in an empty FERRY_HOME: all that it starts, the first trace included;
- with ``optimum-cli export onnx``, a process per model (three are timed);
- with optimum's ``main_export`` in one warm process (the first call is not counted), checked at one shape;
- with transformers' ``OnnxExporter`` in one warm process (the first call is not counted, two are timed), unchecked.

Prints CPU seconds per model and how many times more conversions per CPU second ``ferry`` makes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import FERRY, model_folder, peer_environment, timed
from safetensors.numpy import load_file, save_file

NOISE = 0.01

WARM_OPTIMUM = """
import json, sys, time, warnings, logging
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
import torch
torch.set_num_threads(1)
from optimum.exporters.onnx import main_export
spent = []
for source in sys.argv[2:]:
    start = time.process_time()
    main_export(source, output=sys.argv[1] + "/" + source.rsplit("/")[-1], task="feature-extraction", device="cpu")
    spent.append(time.process_time() - start)
print(json.dumps(spent))
"""

WARM_EXPORTER = """
import contextlib, io, json, sys, time, warnings, logging
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
import torch
torch.set_num_threads(1)
from transformers import AutoModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
spent = []
for source in sys.argv[2:]:
    start = time.process_time()
    model = AutoModel.from_pretrained(source).eval()
    ids = torch.ones(2, 16, dtype=torch.int64)
    with contextlib.redirect_stdout(io.StringIO()):
        result = OnnxExporter().export(model, {"input_ids": ids, "attention_mask": ids}, OnnxConfig(dynamic=True))
    import onnx_ir
    onnx_ir.save(result.program, sys.argv[1] + "/" + source.rsplit("/")[-1] + ".onnx")
    spent.append(time.process_time() - start)
print(json.dumps(spent))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, metavar="N", help="fine-tunes (default: 20)")
    parser.add_argument("--structure", choices=["minilm", "bert-base"], default="minilm")
    parser.add_argument("--engine", choices=["local", "prefect"], default="local", help="of ferry (default: local)")
    options = parser.parse_args(arguments)
    optimum = peer_environment()
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = Path(name)
        models = make_models(options.structure, options.count, folder / "models")
        ours = convert(models, folder, options.engine)
        shutil.rmtree(folder / "home")
        clis = []
        for model in models[:3]:
            clis.append(
                timed([optimum, "export", "onnx", "-m", model, "--task", "feature-extraction", folder / "o"])[0]
            )
            shutil.rmtree(folder / "o")
        cli = sum(run.cpu_seconds for run in clis) / len(clis)
        warm = warm_seconds(optimum.with_name("python"), WARM_OPTIMUM, models[:5], folder / "warm")
        plain = warm_seconds(Path(sys.executable), WARM_EXPORTER, models[:3], folder / "plain")
    print(f"{options.count} fine-tunes of {options.structure}, CPU seconds per model    ratio")
    print(f"{f'ferry batch --engine {options.engine}, verified':48}{ours:8.2f}")
    for title, other in (
        ("optimum-cli, a process each", cli),
        ("optimum's main_export, warm", warm),
        ("OnnxExporter, warm, not checked", plain),
    ):
        print(f"{title:48}{other:8.2f}{other / ours:9.1f}")
    return 0


def make_models(structure: str, count: int, root: Path) -> list[Path]:
    """Write the fine-tunes; return their folders."""
    if structure == "minilm":
        base = root / "base"
        shutil.copytree(model_folder(), base)
        # A transformer alone, as the peers convert it, and not a sentence encoder.
        (base / "modules.json").unlink()
    else:
        base = bert_base(root / "base")
    weights = load_file(base / "model.safetensors")
    models = []
    for number in range(count):
        model = root / f"tune-{number:02}"
        shutil.copytree(base, model)
        random = np.random.default_rng(number)
        noisy = {
            name: (value + random.standard_normal(value.shape, dtype=np.float32) * NOISE * value.std())
            if value.dtype == np.float32
            else value
            for name, value in weights.items()
        }
        save_file(noisy, model / "model.safetensors", metadata={"format": "pt"})
        models.append(model)
    return models


def bert_base(folder: Path) -> Path:
    """Write a BERT-base with random weights, and the real model's tokenizer."""
    from transformers import BertConfig, BertModel

    shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("model.safetensors", "modules.json"))
    BertModel(BertConfig()).save_pretrained(folder)
    return folder


def convert(models: Sequence[Path], folder: Path, engine: str) -> float:
    """Convert all with one batch; return the CPU seconds per model."""
    manifest, report = folder / "manifest.yaml", folder / "report.json"
    manifest.write_text(json.dumps({"models": [str(model) for model in models]}), encoding="utf-8")
    command = [FERRY, "batch", manifest, "--engine", engine, "--report", report]
    run, _ = timed(command, FERRY_HOME=str(folder / "home"))
    document = json.loads(report.read_text())
    if document["totals"]["converted"] != len(models):
        raise SystemExit(f"ferry batch converted {document['totals']}")
    uses = [model["template"] for model in document["models"]]
    print(f"ferry: {uses.count('traced')} traced, {uses.count('reused')} reused, {run.cpu_seconds:.1f} CPU seconds, "
          f"{run.wall_seconds:.1f} s", file=sys.stderr)  # fmt: skip
    return run.cpu_seconds / len(models)


def warm_seconds(python: Path, code: str, models: Sequence[Path], output: Path) -> float:
    """Return the CPU seconds per model of a process that converts all; the first is not counted."""
    output.mkdir()
    _, printed = timed([python, "-c", code, output, *models])
    spent = json.loads(printed.strip().splitlines()[-1])[1:]
    shutil.rmtree(output)
    return float(sum(spent) / len(spent))


if __name__ == "__main__":
    sys.exit(main())
