"""Artifacts of tiny models, made by the real command, and the foreign programs that load them.

What is loaded here is never loaded by us: each answer comes from a process of another environment, see
``environments.py``. The references are PyTorch's, in this process, of the folders that were converted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models

HERE = Path(__file__).parent

# These import what only the foreign environment has.
collect_ignore = ["run_optimum.py", "run_sentence_transformers.py"]

NAMES = (
    "bert-model",
    "bert-sequence-classification",
    "vit-image-classification",
    "gpt2-causal-lm",
    "llama-causal-lm",
    "t5-conditional-generation",
    "bart-conditional-generation",
    "whisper-conditional-generation",
)
SENTENCE = "sentence-encoder"

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where the models and their artifacts lie, by name."""

    sources: Path
    artifacts: Path

    def reference(self, name: str, inputs: dict[str, Any], generate: dict[str, Any] | None) -> dict[str, Any]:
        """Return what the unmodified PyTorch model answers, as tensors."""
        import torch
        import transformers

        model_class = getattr(transformers, tiny_models.FAMILIES[name].architecture)
        model = model_class.from_pretrained(self.sources / name).eval()
        given = {key: torch.tensor(values) for key, values in inputs.items()}
        with torch.no_grad():
            if generate is not None:
                return {"sequences": model.generate(**given, **generate)}
            return {key: value for key, value in model(**given).items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return all models with their artifacts, made in one batch."""
    root = tmp_path_factory.mktemp("interop")
    sources = root / "models"
    for name in NAMES:
        tiny_models.build(name, sources / name)
    _write_sentence_encoder(sources / SENTENCE)
    listed = [*NAMES, SENTENCE]
    (root / "models.txt").write_text("".join(f"./models/{name}\n" for name in listed))
    run = subprocess.run(
        [Path(sys.executable).with_name("ferry"), "batch", "models.txt", "--engine", "local", "--output", "out"],
        cwd=root,
        env={**os.environ, "FERRY_HOME": str(root / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return Folders(sources=sources, artifacts=root / "out")


def _write_sentence_encoder(folder: Path) -> None:
    """Write BERT with a mean over its tokens and a normalisation, as sentence-transformers writes it."""
    tiny_models.build("bert-model", folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Return the folder of the foreign environments."""
    folder = Path(request.config.getoption("--interop-cache") or request.config.rootpath / ".interop").resolve()
    missing = [name for name in ("python", "node") if not (folder / name / "complete").exists()]
    assert not missing, f"{folder} has no complete {missing}. Run: make interop"
    return folder


@pytest.fixture(scope="session")
def optimum(cache: Path) -> Ask:
    """Return what asks optimum."""
    return lambda request: _asked([cache / "python" / "bin" / "python", HERE / "run_optimum.py"], request)


@pytest.fixture(scope="session")
def sentence_transformers(cache: Path) -> Ask:
    """Return what asks sentence-transformers."""
    script = HERE / "run_sentence_transformers.py"
    return lambda request: _asked([cache / "python" / "bin" / "python", script], request)


@pytest.fixture(scope="session")
def transformers_js(cache: Path) -> Ask:
    """Return what asks transformers.js."""
    environment = str(cache / "node")
    return lambda request: _asked(["node", HERE / "run_transformers.mjs"], {**request, "environment": environment})


def _asked(command: list[str | Path], request: dict[str, Any]) -> dict[str, Any]:
    # Our own import path is no part of a foreign environment.
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer
