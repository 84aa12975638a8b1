"""Memory that a conversion takes, over the size of the weights, beside two peers.

    python tests/benchmarks/bench_memory.py [--layers 22] [--workdir DIR] [--limit GIB] [--ours-only]

Writes a Llama of TinyLlama's sizes with random weights (22 layers: 1.1e9 parameters, 4.4 GB in float32, in shards), or
takes the one that is in ``DIR``, and prints the peak of

- each step of ours by itself, in its child: trace, simplify, bind, parity;
- ``ferry convert``, all processes together;
- optimum's ``main_export``, and transformers' ``OnnxExporter``, which does not check what it wrote.

What several processes share is counted once, and pages of files count. With ``--limit`` the command runs once more with
``FERRY_MEMORY_LIMIT`` set to so many GiB, inside a control group that has one GiB more for everything, the pages of
files among it (Linux, cgroup v1, as root): both sides of the comparison then read their weights from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import FERRY, peer_environment, timed
from safetensors.numpy import save_file

from onnx_config.export import isolate

GB = 1e9
GROUP = Path("/sys/fs/cgroup/memory/onnx-ferry-bench")
STEPS = "onnx_config.export.steps"
TEMPLATE_STEPS = "onnx_config.export.template_steps"

OPTIMUM = """
import sys, warnings, logging
warnings.filterwarnings("ignore")
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation", device="cpu")
"""

EXPORTER = """
import sys, warnings
warnings.filterwarnings("ignore")
import onnx_ir, torch
from transformers import AutoModelForCausalLM
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.ones(2, 16, dtype=torch.int64)
inputs = {"input_ids": ids, "attention_mask": ids, "use_cache": False}
result = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
onnx_ir.save(result.program, sys.argv[2] + "/model.onnx", external_data="model.onnx_data")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22, metavar="N", help="of the model (default: 22)")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where the model is, or is to be kept")
    parser.add_argument("--limit", type=float, metavar="GIB", help="convert once more within this")
    parser.add_argument("--ours-only", action="store_true", help="do not run the peers")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = Path(name)
        model = (options.workdir or folder) / "llama"
        if not (model / "config.json").exists():
            write_llama(model, layers=options.layers)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{size / GB:.2f} GB of weights\n{'':44}peak GB   of the weights")
        for step, answer in run_steps(model, folder):
            show(f"  {step}", answer.peak_rss_bytes, size)
        for path in folder.glob("model.onnx*"):
            path.unlink()
        ours, _ = timed([FERRY, "convert", model], FERRY_HOME=str(folder / "home"))
        show("ferry convert, verified", ours.peak_bytes, size)
        if options.limit is not None:
            convert_within(options.limit, model, folder, size)
        if not options.ours_only:
            python = peer_environment().with_name("python")
            (folder / "exporter").mkdir()
            for title, command in (
                ("optimum's main_export", [python, "-c", OPTIMUM, model, folder / "optimum"]),
                ("OnnxExporter, not checked", [sys.executable, "-c", EXPORTER, model, folder / "exporter"]),
            ):
                run, _ = timed(command, may_fail=True)
                show(title + ("" if run.status == 0 else f" (ended with {run.status})"), run.peak_bytes, size)
    return 0


def show(title: str, peak: int, size: int) -> None:
    print(f"{title:44}{peak / GB:7.2f}{peak / size:16.2f}", flush=True)


def write_llama(folder: Path, *, layers: int, width: int = 2048, vocabulary: int = 32000) -> None:
    """Write a Llama with random weights, one shard per layer, never holding more than one of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 512),
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    random = np.random.default_rng(0)
    places: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for part, names in shards.items():
        file = f"model-{part}.safetensors"
        tensors = {
            name: np.ones(shapes[name], np.float32)
            if len(shapes[name]) == 1
            else random.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def run_steps(model: Path, folder: Path) -> Iterator[tuple[str, isolate.Answer]]:
    """Run each step in a child, as a conversion does; yield its name and its answer."""

    def run(step: str, function: str, **request: object) -> isolate.Answer:
        work = folder / step
        work.mkdir()
        options: dict[str, Any] = {"timeout_seconds": 3600, "memory_limit_bytes": 2**40, "threads": 1}
        return isolate.run(function, request, folder=work, name=step, **options)

    plain, simplified, bound = (str(folder / name) for name in ("plain.onnx", "simplified.onnx", "model.onnx"))
    yield "detect", (answer := run("detect", f"{STEPS}:detect", folder=str(model)))
    asked = {"folder": str(model), "spec": answer.value}
    options = {"dtype": "float32", "opset": None, "fixed": []}
    yield "trace", run("trace", f"{TEMPLATE_STEPS}:trace", **asked, **options, output=plain)
    yield "simplify", run("simplify", f"{TEMPLATE_STEPS}:simplify", graph=plain, output=simplified)
    answer = run("bind", f"{TEMPLATE_STEPS}:bind", **asked, graph=simplified, output=bound, metadata={})
    yield "bind", answer
    how = {"device": "cpu", "threads": 1, "float64": "needed", "mapped": False}
    inputs = answer.value["graph"]["inputs"]
    yield "parity", run("parity", f"{STEPS}:parity", **asked, graph=bound, inputs=inputs, **how)


def convert_within(limit_gib: float, model: Path, folder: Path, size: int) -> None:
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(int((limit_gib + 1) * 2**30)))
    join = f'echo $$ > {GROUP / "cgroup.procs"}; exec "$@"'
    command: list[str | Path] = ["sh", "-c", join, "sh", FERRY, "convert", model]
    home = {"FERRY_HOME": str(folder / "limited"), "FERRY_MEMORY_LIMIT": f"{limit_gib}GiB"}
    try:
        run, _ = timed(command, **home)
    finally:
        GROUP.rmdir()
    show(f"ferry convert within {limit_gib:g} GiB, verified", run.peak_bytes, size)
    print(f"{'':44}{run.wall_seconds:.0f} s")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
