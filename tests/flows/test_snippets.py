"""What a model's page says of loading it is run here as it stands there, each way in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import db
from db.dashboard.snippets import snippets
from flows.batch import run_batch
from tasks.register import catalog
from tasks.report import Engine, Status
from tasks.request import SilentListener
from tests.faults.harness import request, tiny, workspace
from tests.interop.environments import make_node

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "cpp"

# A text in, a class out; a text that goes on, with its cache; an image.
NAMES = ("bert-sequence-classification", "gpt2-causal-lm", "vit-image-classification")

pytestmark = pytest.mark.slow


class Converted:
    """Models that are converted when somebody asks for them, each once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, dict[str, str]] = {}

    def snippets(self, name: str) -> dict[str, str]:
        if name not in self._known:
            places = workspace(self._root / "home")
            folder = tiny(self._root / name, name)
            report = run_batch([request(folder)], places, output=None, workers=1, engine=Engine.LOCAL,
                               retry_failed=None, listener=SilentListener())  # fmt: skip
            (entry,) = report.models
            assert entry.status is Status.CONVERTED, entry.error
            with db.session_scope(catalog(places), read_only=True) as session:
                record = db.find_conversion(session, str(folder.resolve()))
            assert record is not None
            self._known[name] = dict(snippets(record))
        return self._known[name]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(tmp_path_factory.mktemp("snippets"))


def run(command: list[str], **changes: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **changes}, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("way", ["onnx-ferry", "ONNX Runtime"])
@pytest.mark.parametrize("name", NAMES)
def test_the_python_on_a_models_page_runs(converted: Converted, name: str, way: str) -> None:
    assert run([sys.executable, "-c", converted.snippets(name)[way]], PYTHONPATH=str(ROOT)).strip()


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler on this machine")
@pytest.mark.parametrize("name", NAMES)
def test_the_cpp_on_a_models_page_compiles_and_gives_what_the_graph_takes(
    converted: Converted, tmp_path: Path, name: str
) -> None:
    """Over a stand-in for ONNX Runtime's header, which no package has that tests may fetch: it tells what it was given.

    What that was, ONNX Runtime is then given from Python.
    """
    (tmp_path / "model.cpp").write_text(converted.snippets(name)["C++"], encoding="utf-8")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    program = tmp_path / "model"
    run(["c++", "-std=c++17", *warnings, f"-I{STAND_IN}", str(tmp_path / "model.cpp"), "-o", str(program)])
    told = [line.split("\t") for line in run([str(program)]).splitlines()]
    ((path,),) = [rest for word, *rest in told if word == "model"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {
        name: np.ones([int(size) for size in shape.split()], dtype=dtype)
        for word, name, dtype, shape in (line for line in told if line[0] == "input")
    }
    outputs = [name for word, name in (line for line in told if line[0] == "output")]
    assert outputs == [output.name for output in session.get_outputs()]
    assert all(value.size for value in session.run(outputs, given))


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with transformers.js, which npm fetches."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node.js with npm on this machine")
    folder = tmp_path_factory.mktemp("node") / "packages"
    try:
        make_node(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm cannot install transformers.js: {error}")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_javascript_on_a_models_page_runs(converted: Converted, node: Path, name: str) -> None:
    script = node / f"{name}.mjs"
    script.write_text(converted.snippets(name)["transformers.js"], encoding="utf-8")
    assert run(["node", str(script)]).strip()
