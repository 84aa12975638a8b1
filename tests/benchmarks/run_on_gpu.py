"""Everything that needs a GPU, in one command, on a machine that has one.

    python tests/benchmarks/run_on_gpu.py [--device cuda|cpu] [--workdir DIR] [--shapes N]

Says which versions of PyTorch, ONNX Runtime and the driver there are; runs the tests marked ``gpu``; builds the demo's
models, converts them, and verifies the artifacts on the CPU and then on the GPU at every optimisation level; prints a
table of verdicts, differences and times of both. PyTorch may be another version than the pinned one. ONNX Runtime's
GPU build takes the place of the other one (``pip install --no-deps --force-reinstall onnxruntime-gpu``) and finds
CUDA's libraries among PyTorch's. Exits 1 if a test failed, or an artifact that holds on the CPU does not on the GPU.

``--device cpu`` goes the same way without a GPU, both times on the CPU, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# As a module, since the environment of a GPU machine may have no installed commands.
FERRY = (sys.executable, "-m", "flows.entry")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--shapes", type=int, default=0, help="compare at so many shapes at least")
    options = parser.parse_args()
    usable = say_what_is_there()
    if options.device == "cuda" and not usable:
        print("There is no CUDA device that both can use. --device cpu tries the script without one.", file=sys.stderr)
        return 2
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--gpu", "tests"]
    failed = options.device == "cuda" and subprocess.run(tests, cwd=ROOT, check=False).returncode != 0
    if options.workdir is not None:
        return compare(options.workdir.resolve(), options.device, options.shapes) or int(failed)
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-gpu-") as folder:
        return compare(Path(folder), options.device, options.shapes) or int(failed)


def say_what_is_there() -> bool:
    """Print versions and devices; return whether PyTorch and ONNX Runtime both can use a GPU."""
    import onnxruntime
    import torch
    import transformers

    from onnx_config.cuda import cuda_problem

    problem = cuda_problem()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    print(f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}), ONNX Runtime {onnxruntime.__version__} "
          f"({', '.join(onnxruntime.get_available_providers())}), transformers {transformers.__version__}")  # fmt: skip
    print(f"GPU: {device}{f'; not usable: {problem}' if problem else ''}", flush=True)
    return problem is None


def compare(work: Path, device: str, shapes: int) -> int:
    """Convert the demo's models on the CPU, verify them on both, print the table; return 1 if a verdict differs."""
    sys.path.append(str(ROOT / "deploy" / "demo"))
    from build_models import build_models

    work.mkdir(parents=True, exist_ok=True)
    build_models(work)
    ferry(work, "batch", "manifest.yaml", "--engine", "local", "--device", "cpu", "--report", "batch.json")
    more = ("--shapes", str(shapes)) if shapes else ()
    ferry(work, "verify", "all", "--device", "cpu", "--report", "cpu.json", *more)
    ferry(work, "verify", "all", "--device", device, "--matrix", "--report", "gpu.json", *more)
    there, here = ({e["id"]: e for e in json.loads((work / f"{n}.json").read_text())["models"]} for n in ("gpu", "cpu"))
    print(f"\n{'model':28} {'CPU':10} {'of tol.':>8} {'s':>6}   {device:10} {'of tol.':>8} {'s':>6}  cells")
    worse = 0
    for name, entry in here.items():
        other = there[name]
        worse += entry["verdict"] == "verified" != other["verdict"]
        print(
            f"{Path(name).name:28} {column(entry)}   {column(other)}  {len((other['parity'] or {}).get('cells', ()))}"
        )
        if other["verdict"] != "verified" and (said := other["error"] or (other["parity"] or {}).get("detail")):
            print(f"{'':28} {said}")
    print(f"\n{len(here)} artifacts, {worse} of those that hold on the CPU do not on {device}; in {work}")
    return int(worse > 0 or not here)


def column(entry: dict[str, Any]) -> str:
    """Return the verdict, the difference as a share of its tolerance, and the seconds."""
    parity = entry["parity"] or {}
    shares = [o["max_abs_diff"] / o["tolerance"] for o in parity.get("outputs", ()) if o["tolerance"]]
    return f"{entry['verdict']:10} {max(shares, default=0.0):8.3f} {entry['seconds']:6.1f}"


def ferry(work: Path, *arguments: str) -> None:
    environment = {**os.environ, "FERRY_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    subprocess.run([*FERRY, *arguments], cwd=work, env={**environment, "PYTHONPATH": path}, check=False)


if __name__ == "__main__":
    sys.exit(main())
