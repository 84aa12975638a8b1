"""Artifacts in optimum's ONNX Runtime classes answer as PyTorch does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

_random = random.Random(0)


def noise(*sizes: int) -> Any:
    return [noise(*sizes[1:]) for _ in range(sizes[0])] if sizes else _random.gauss(0, 1)


TEXT = {
    "input_ids": [[5, 17, 88, 140, 9, 33], [7, 250, 31, 64, 300, 12]],
    "attention_mask": [[1] * 6] * 2,
}
LEFT_PADDED = {
    "input_ids": [[5, 17, 88, 140, 9, 33], [0, 0, 31, 64, 300, 12]],
    "attention_mask": [[1] * 6, [0, 0, 1, 1, 1, 1]],
}
RIGHT_PADDED = {
    "input_ids": [[5, 17, 88, 140, 9, 33], [7, 250, 31, 64, 0, 0]],
    "attention_mask": [[1] * 6, [1, 1, 1, 1, 0, 0]],
}
IMAGES = {"pixel_values": noise(2, 3, 32, 32)}
SPEECH = {"input_features": noise(2, 16, 100)}
"""Of the one length that Whisper takes."""

GREEDY = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3}
SHORT = {**GREEDY, "max_new_tokens": 20, "min_new_tokens": 20}
"""Fits the positions of the tiny Whisper."""

TWO_GRAPHS = {"use_merged": False}


@pytest.mark.parametrize(
    ("name", "loader", "inputs"),
    [
        pytest.param("bert-model", "ORTModelForFeatureExtraction", RIGHT_PADDED, id="features"),
        pytest.param("bert-sequence-classification", "ORTModelForSequenceClassification", RIGHT_PADDED, id="text"),
        pytest.param("vit-image-classification", "ORTModelForImageClassification", IMAGES, id="images"),
        pytest.param("gpt2-causal-lm", "ORTModelForCausalLM", TEXT, id="gpt2"),
        pytest.param("llama-causal-lm", "ORTModelForCausalLM", TEXT, id="llama"),
    ],
)
def test_one_pass(folders: Any, optimum: Any, name: str, loader: str, inputs: dict[str, Any]) -> None:
    request = {"folder": str(folders.artifacts / name), "loader": loader, "inputs": inputs, "generate": None}
    answer = optimum(request)
    wanted = folders.reference(name, inputs, None)
    assert answer
    for key, values in answer.items():
        torch.testing.assert_close(torch.tensor(values), wanted[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("name", "loader", "inputs", "generate", "options"),
    [
        pytest.param("gpt2-causal-lm", "ORTModelForCausalLM", TEXT, GREEDY, {}, id="gpt2"),
        pytest.param("gpt2-causal-lm", "ORTModelForCausalLM", LEFT_PADDED, GREEDY, {}, id="gpt2-padded"),
        pytest.param("llama-causal-lm", "ORTModelForCausalLM", TEXT, GREEDY, {}, id="llama"),
        pytest.param("llama-causal-lm", "ORTModelForCausalLM", LEFT_PADDED, GREEDY, {}, id="llama-padded"),
        pytest.param("t5-conditional-generation", "ORTModelForSeq2SeqLM", RIGHT_PADDED, GREEDY, {}, id="t5"),
        pytest.param("t5-conditional-generation", "ORTModelForSeq2SeqLM", TEXT, BEAMS, {}, id="t5-beams"),
        pytest.param("t5-conditional-generation", "ORTModelForSeq2SeqLM", TEXT, GREEDY, TWO_GRAPHS, id="t5-two"),
        pytest.param("bart-conditional-generation", "ORTModelForSeq2SeqLM", RIGHT_PADDED, GREEDY, {}, id="bart"),
        pytest.param("bart-conditional-generation", "ORTModelForSeq2SeqLM", TEXT, BEAMS, {}, id="bart-beams"),
        pytest.param("bart-conditional-generation", "ORTModelForSeq2SeqLM", TEXT, GREEDY, TWO_GRAPHS, id="bart-two"),
        pytest.param(
            "whisper-conditional-generation", "ORTModelForSpeechSeq2Seq", SPEECH, SHORT, {}, id="whisper"
        ),
        pytest.param(
            "whisper-conditional-generation", "ORTModelForSpeechSeq2Seq", SPEECH, SHORT, TWO_GRAPHS, id="whisper-two"
        ),
    ],
)  # fmt: skip
def test_generated_tokens(
    folders: Any, optimum: Any, name: str, loader: str, inputs: dict[str, Any], generate: dict[str, Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    request = {"folder": str(folders.artifacts / name), "loader": loader, "inputs": inputs, "generate": generate}
    answer = optimum({**request, "options": options})
    assert answer["sequences"] == folders.reference(name, inputs, generate)["sequences"].tolist()
