"""What parity costs: its share of a conversion, and what more shapes add.

    python tests/benchmarks/bench_parity.py [--shapes 20] [--repetitions 3]

Converts the real all-MiniLM-L6-v2, a ViT and a GPT-2 of 4 layers (random weights), one after the other in one batch,
and prints the share of the steps' wall time that parity took. Then compares each artifact again in this process, at the
usual shapes and at ``--shapes``, and prints processor seconds and their ratio: less than 3 is wanted for 20 shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import FERRY, model_folder, timed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = Path(name)
        models = {"minilm": model_folder(), **made(folder)}
        (folder / "models.txt").write_text("".join(f"{path}\n" for path in models.values()))
        command = [FERRY, "batch", folder / "models.txt", "--engine", "local", "--workers", "1"]
        timed([*command, "--report", folder / "report.json"], FERRY_HOME=str(folder / "home"))
        entries = json.loads((folder / "report.json").read_text())["models"]
        print("share of parity in a conversion's wall time")
        for entry, model in zip(entries, models, strict=True):
            seconds = entry["seconds"]
            print(f"{model:12} {seconds['parity'] / sum(seconds.values()):6.0%} of {sum(seconds.values()):.1f} s")
        several = f"{arguments.shapes} shapes"
        print(f"\nCPU seconds of a comparison  usual shapes  {several:>12}   ratio")
        for entry, model in zip(entries, models, strict=True):
            few, many = (
                statistics.median(seconds_of(entry, count) for _ in range(arguments.repetitions))
                for count in (0, arguments.shapes)
            )
            print(f"{model:28} {few:12.2f} {many:14.2f} {many / few:7.2f}", flush=True)
    return 0


def made(folder: Path) -> dict[str, Path]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=4)).save_pretrained(folder / "gpt2")
    ViTForImageClassification(ViTConfig(num_hidden_layers=4)).save_pretrained(folder / "vit")
    return {"gpt2": folder / "gpt2", "vit": folder / "vit"}


def seconds_of(entry: dict[str, Any], count: int) -> float:
    """Return what comparing one artifact takes, loading both sides included."""
    from onnx_config.export import steps
    from onnx_config.export.shapes import Float64
    from tasks.basis import read_basis

    folder = Path(entry["artifact"])
    (graph,) = read_basis(folder).graphs
    (stored,) = entry["graphs"]
    start, waited = time.process_time(), os.times().children_user
    found = steps.parity(
        {
            "folder": entry["id"],
            "spec": graph.spec.to_json(),
            "graph": stored["path"],
            "inputs": stored["inputs"],
            "limits": list(graph.limits),
            "device": "cpu",
            "threads": 1,
            "float64": str(Float64.HALF),
            "mapped": False,
            "count": count,
        }
    )
    if found["outcome"] != "verified":
        raise SystemExit(f"{entry['id']}: {found['detail']}")
    return time.process_time() - start + os.times().children_user - waited


if __name__ == "__main__":
    sys.exit(main())
