"""`transformers.pipeline` takes a converted model for texts, images and sounds, and says what PyTorch's has it say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from onnx_config import AutoModelForONNX
from onnx_config.export.artifact import copy_side_files
from tests.onnx_config.converted import Converted, convert

Say = Callable[[Any], Any]

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
SOUND = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
TEXTS = ["the ferry leaves", "a captain reads the weather and the tide"]

CASES: dict[str, tuple[str, str, Say]] = {
    "feature-extraction": ("bert-model", "feature-extraction", lambda pipe: pipe(TEXTS[0])),
    "text-classification": (
        "bert-sequence-classification",
        "text-classification",
        lambda pipe: pipe(TEXTS, top_k=None, batch_size=2),
    ),
    "token-classification": ("bert-token-classification", "token-classification", lambda pipe: pipe(TEXTS)),
    "zero-shot-image-classification": (
        "clip-model",
        "zero-shot-image-classification",
        lambda pipe: pipe(IMAGE, candidate_labels=["a boat", "the sea"]),
    ),
    "image-classification": ("vit-image-classification", "image-classification", lambda pipe: pipe(IMAGE)),
    "image-feature-extraction": ("vit-model", "image-feature-extraction", lambda pipe: pipe(IMAGE)),
    "audio-classification": ("wav2vec2-sequence-classification", "audio-classification", lambda pipe: pipe(SOUND)),
    "speech-recognition": ("wav2vec2-ctc", "automatic-speech-recognition", lambda pipe: pipe(SOUND.copy())),
}
QUICK = ("feature-extraction", "image-classification")


def loaded(folder: Path, kind: str) -> Any:
    found = getattr(transformers, f"Auto{kind}")
    try:
        return found.from_pretrained(folder)
    except (OSError, ValueError):
        return None


def pipelines(task: str, source: Path, graph: Path, folder: Path) -> list[Any]:
    """Return the pipeline of PyTorch's model, and of the graph's."""
    artifact = folder / "artifact"
    artifact.mkdir()
    shutil.copy(graph, artifact / "model.onnx")
    copy_side_files(source, artifact)
    config = json.loads((source / "config.json").read_text())
    parts = {
        "tokenizer": loaded(artifact, "Tokenizer") if (source / "tokenizer_config.json").is_file() else None,
        "image_processor": loaded(artifact, "ImageProcessor"),
        "feature_extractor": loaded(artifact, "FeatureExtractor"),
    }
    models = (
        getattr(transformers, config["architectures"][0]).from_pretrained(source).eval(),
        AutoModelForONNX.from_pretrained(artifact, threads=1),
    )
    given = {name: part for name, part in parts.items() if part is not None}
    return [transformers.pipeline(task, model=model, **given) for model in models]


def close(ours: Any, theirs: Any) -> bool:
    """Return whether two answers are the same but for the last digits of their numbers."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(close(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if isinstance(theirs, float | np.floating):
        return bool(np.isclose(ours, theirs, atol=2e-5, rtol=1e-4))
    return bool(ours == theirs)


def check(task: str, say: Say, converted: Converted, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = pipelines(task, converted.source, converted.stored, folder)
    assert close(say(ours), say(theirs))
    assert str(ours).replace("\n", "") == str(theirs).replace("\n", "")
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize("case", QUICK)
def test_a_pipeline_takes_it(
    case: str, bert: Converted, vit: Converted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, task, say = CASES[case]
    check(task, say, bert if name.startswith("bert") else vit, tmp_path, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_so_do_the_others(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, task, say = CASES[case]
    check(task, say, convert(name, tmp_path), tmp_path, caplog)
