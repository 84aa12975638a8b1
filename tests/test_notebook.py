"""The notebook runs from top to bottom, offline, and shows what its text says."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "onnx_config" / "notebooks" / "understanding_onnxconfig.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_outputs_are_stored(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # nbclient's own warnings are not ours to fix
def test_every_cell_runs(notebook, tmp_path):
    # Where the package is not installed, the kernel finds it here.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    executed = client.execute(env=environment)
    shown = [
        output["data"]["text/plain"]
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    # The export agrees with PyTorch, and the images' placeholders were found.
    assert "True" in shown
    assert any(text.startswith("([16, 16], ") for text in shown), shown
    assert any("'past_key_values.1.value'" in text for text in shown)
