"""Run a graph on the inputs at which it differed from PyTorch, and print by how much.

    python compare.py [GRAPH.onnx]

Needs NumPy and ONNX Runtime, and the files beside it. Exits with 1 where the graph still differs by more than was
allowed, or stops; with 0 where it does not.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__all__ = ["main"]


def main(folder: Path, graph: str | None = None) -> int:
    """Compare the graph of ``folder``'s case, or another one, with what PyTorch returned; return the exit code."""
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    inputs, wanted = (dict(np.load(folder / name)) for name in ("inputs.npz", "pytorch.npz"))
    level = case["optimization"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, "ORT_DISABLE_ALL" if level == "disable" else f"ORT_ENABLE_{level.upper()}"
    )
    providers = dict.fromkeys((case["provider"], "CPUExecutionProvider"))
    session = onnxruntime.InferenceSession(graph or case["graph"], options, providers=list(providers))
    print(f"{graph or case['graph']}\nat {case['shape']}, {case['sizes']}, by {session.get_providers()[0]} at {level}")
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, {i.name: inputs[i.name] for i in session.get_inputs()})
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:  # noqa: BLE001
        print(f"ONNX Runtime stops: {error}")
        return 1
    differs = [_differs(name, got, wanted, case["tolerances"]) for name, got in zip(names, values, strict=True)]
    return int(any(differs))


def _differs(name: str, got: Any, wanted: dict[str, Any], tolerances: dict[str, float]) -> bool:
    want = wanted.get(name.removeprefix("output."))
    if want is None or got.shape != want.shape or got.dtype != want.dtype:
        there = "none" if want is None else f"{want.dtype} of shape {want.shape}"
        print(f"{name}: {got.dtype} of shape {got.shape}, and PyTorch returns {there}")
        return True
    apart = np.abs(got.astype(np.float64) - want.astype(np.float64))
    # Where both are the same infinity, or both no number, there is nothing between them.
    if got.dtype.kind == "f":
        apart[(got == want) | (np.isnan(got) & np.isnan(want))] = 0.0
    largest = float(np.max(np.where(np.isnan(apart), np.inf, apart), initial=0.0))
    allowed = tolerances.get(name, 0.0)
    print(f"{name}: differs by {largest:.3g}, allowed {allowed:.3g}")
    return largest > allowed


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, *sys.argv[1:2]))
