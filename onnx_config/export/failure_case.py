"""What is kept of a comparison that did not hold, so that anybody can see it again with one command.

The script needs NumPy and ONNX Runtime and nothing of ours: whoever gets the folder need not install a converter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx_config.export.parity import Cell
    from onnx_config.export.reference import Reference

__all__ = ["CASE_FILE", "INPUTS_FILE", "SCRIPT_FILE", "WANTED_FILE", "write_case"]

CASE_FILE = "case.json"
"""What was compared, and what was found."""

INPUTS_FILE = "inputs.npz"
"""The graph's inputs by name."""

WANTED_FILE = "pytorch.npz"
"""What PyTorch returned for them, by name."""

SCRIPT_FILE = "compare.py"
"""Runs the graph on the inputs and prints by how much it differs."""


def write_case(
    folder: Path, graph: Path, reference: Reference, cell: Cell, *, tolerances: Mapping[str, float]
) -> dict[str, Any]:
    """Write inputs, PyTorch's answer, what was found and a script into ``folder``; return what ``case.json`` holds.

    Args:
        folder: Is made where it is not there.
        graph: The graph that differs.
        reference: What PyTorch computed, at the shape where it differs.
        cell: What was found there.
        tolerances: Output -> largest difference allowed.

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / INPUTS_FILE, **dict[str, Any](reference.inputs))
    np.savez(folder / WANTED_FILE, **dict[str, Any](reference.outputs))
    case = {
        "graph": str(graph),
        "provider": cell.provider,
        "optimization": cell.optimization,
        "shape": cell.shape,
        "sizes": dict(cell.sizes),
        "detail": cell.detail,
        "tolerances": dict(tolerances),
    }
    (folder / CASE_FILE).write_text(json.dumps(case, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("compare_case.py"), folder / SCRIPT_FILE)
    return case
