"""One model of each kind, from the command to the verified artifact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from onnx_config.spec import size_of

KINDS = (
    "deberta-v2-token-classification",
    "gpt2-causal-lm",
    "t5-conditional-generation",
    "vit-image-classification",
    "resnet-image-classification",
    "detr-object-detection",
    "wav2vec2-ctc",
    "whisper-conditional-generation",
    "clip-model",
    "layoutlmv3-token-classification",
    "patchtst-prediction",
)

_ENCODER_DECODER = ["encoder", "decoder", "decoder_with_past", "decoder_merged"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_model_of_each_kind_is_converted_and_runs_elsewhere(tmp_path: Path) -> None:
    known = [name for name in KINDS if name in tiny_models.FAMILIES]
    assert len(known) == len(KINDS), set(KINDS) - set(known)
    for name in known:
        tiny_models.build(name, tmp_path / name)
    (tmp_path / "models.txt").write_text("".join(f"./{name}\n" for name in known))
    command = [Path(sys.executable).with_name("ferry"), "batch", "models.txt", "--engine", "local", "--workers", "2"]
    run = subprocess.run(
        [*command, "--report", "report.json", "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "FERRY_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    ended = {Path(e["id"]).name: (e["status"], e["task"]) for e in report["models"]}
    assert ended == {name: ("converted", tiny_models.FAMILIES[name].task) for name in known}, run.stderr
    assert run.returncode == 0
    roles = {Path(e["id"]).name: [graph["role"] for graph in e["graphs"]] for e in report["models"]}
    assert {name: found for name, found in roles.items() if found != ["model"]} == {
        "t5-conditional-generation": _ENCODER_DECODER,
        "whisper-conditional-generation": _ENCODER_DECODER,
        "clip-model": ["model", "text_model", "vision_model"],
    }
    for entry in report["models"]:
        assert entry["parity"]["verdict"] == "verified"
        assert entry["parity"]["shapes"] >= 4
        _runs_at_two_batch_sizes(entry)


def _runs_at_two_batch_sizes(entry: dict[str, object]) -> None:
    """Run the stored graphs with nothing of ours, at sizes of our own."""
    for graph in entry["graphs"]:  # type: ignore[attr-defined]
        _run_at_two_batch_sizes(graph)


def _run_at_two_batch_sizes(graph: dict[str, Any]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph["path"], providers=["CPUExecutionProvider"])
    for batch in (1, 2):
        sizes = {"height": 64, "width": 96, "decoder_sequence_length": 5}
        # Of the merged decoder, a past is as long as what the encoder gave.
        sizes |= dict.fromkeys(("encoder_sequence_length", "past_encoder_sequence_length"), 7)
        feed = {}
        for tensor in graph["inputs"]:
            length = 2000 if tensor["name"] == "input_values" else 9
            known = {**sizes, "sequence_length": length, "past_sequence_length": 6}
            rows = {axis: batch for axis in tensor["shape"] if str(axis).endswith("batch_size")}
            shape = [size_of(axis, {**known, **rows}) for axis in tensor["shape"]]
            feed[tensor["name"]] = np.ones(shape, tensor["dtype"])
        outputs = session.run(None, feed)
        assert all(np.isfinite(value).all() for value in outputs)
        assert len(outputs) == len(graph["outputs"])
