"""Artifacts in transformers.js answer as PyTorch does.

It looks for graphs in a folder ``onnx`` beside ``config.json``, so the files are laid out like that here, as links.
Of an encoder-decoder it reads ``encoder_model.onnx`` and ``decoder_model_merged.onnx``, of the others ``model.onnx``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

TEXT = {
    "input_ids": [[5, 17, 88, 140, 9, 33], [7, 250, 31, 64, 300, 12]],
    "attention_mask": [[1] * 6] * 2,
}
LEFT_PADDED = {
    "input_ids": [[5, 17, 88, 140, 9, 33], [0, 0, 31, 64, 300, 12]],
    "attention_mask": [[1] * 6, [0, 0, 1, 1, 1, 1]],
}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).tolist()}
SPEECH = {"input_features": torch.randn(1, 16, 100, generator=torch.Generator().manual_seed(0)).tolist()}
GREEDY = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
SHORT = {**GREEDY, "max_new_tokens": 20, "min_new_tokens": 20}
SENTENCE = "The ferry leaves the harbour at seven."


@pytest.fixture(scope="session")
def root(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the artifacts with each one's graphs in ``onnx``."""
    laid = tmp_path_factory.mktemp("transformers-js")
    for artifact in folders.artifacts.iterdir():
        graphs = laid / artifact.name / "onnx"
        graphs.mkdir(parents=True)
        for file in artifact.iterdir():
            (graphs if ".onnx" in file.name else graphs.parent).joinpath(file.name).symlink_to(file)
    return laid


def packed(values: Any) -> dict[str, Any]:
    tensor = torch.tensor(values)
    kind = "float32" if tensor.is_floating_point() else "int64"
    return {"dtype": kind, "dims": list(tensor.shape), "data": tensor.flatten().tolist()}


def unpacked(value: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(value["data"]).reshape(value["dims"])


@pytest.mark.parametrize(
    ("name", "loader", "inputs"),
    [
        pytest.param("bert-model", "AutoModel", LEFT_PADDED, id="features"),
        pytest.param("bert-sequence-classification", "AutoModelForSequenceClassification", LEFT_PADDED, id="text"),
        pytest.param("vit-image-classification", "AutoModelForImageClassification", IMAGES, id="images"),
    ],
)
def test_one_pass(
    folders: Any, transformers_js: Any, root: Path, name: str, loader: str, inputs: dict[str, Any]
) -> None:
    given = {key: packed(values) for key, values in inputs.items()}
    answer = transformers_js({"root": str(root), "model": name, "loader": loader, "inputs": given})
    wanted = folders.reference(name, inputs, None)
    assert answer.keys() == wanted.keys()
    for key, value in answer.items():
        torch.testing.assert_close(unpacked(value), wanted[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("name", "loader", "inputs", "generate"),
    [
        pytest.param("gpt2-causal-lm", "AutoModelForCausalLM", TEXT, GREEDY, id="gpt2"),
        pytest.param("gpt2-causal-lm", "AutoModelForCausalLM", LEFT_PADDED, GREEDY, id="gpt2-padded"),
        pytest.param("llama-causal-lm", "AutoModelForCausalLM", TEXT, GREEDY, id="llama"),
        pytest.param("llama-causal-lm", "AutoModelForCausalLM", LEFT_PADDED, GREEDY, id="llama-padded"),
        pytest.param("t5-conditional-generation", "AutoModelForSeq2SeqLM", TEXT, GREEDY, id="t5"),
        pytest.param("bart-conditional-generation", "AutoModelForSeq2SeqLM", TEXT, GREEDY, id="bart"),
        pytest.param("whisper-conditional-generation", "WhisperForConditionalGeneration", SPEECH, SHORT, id="whisper"),
    ],
)
def test_generated_tokens(
    folders: Any, transformers_js: Any, root: Path, name: str, loader: str, inputs: dict[str, Any],
    generate: dict[str, Any],
) -> None:  # fmt: skip
    given = {key: packed(values) for key, values in inputs.items()}
    request = {"root": str(root), "model": name, "loader": loader, "inputs": given, "generate": generate}
    new = generate["max_new_tokens"]
    wanted = folders.reference(name, inputs, generate)["sequences"]
    # What stands before the new tokens is given, and transformers no longer gives it back for Whisper.
    assert unpacked(transformers_js(request)["sequences"])[:, -new:].tolist() == wanted[:, -new:].tolist()


@pytest.mark.parametrize("name", ["bert-model", "sentence-encoder"])
def test_the_pipeline_of_vectors_of_sentences(folders: Any, transformers_js: Any, root: Path, name: str) -> None:
    from transformers import AutoTokenizer

    arguments = {"pooling": "mean", "normalize": True}
    request = {"root": str(root), "model": name, "pipeline": "feature-extraction", "text": SENTENCE}
    answer = transformers_js({**request, "arguments": arguments})
    given = dict(AutoTokenizer.from_pretrained(folders.sources / name)([SENTENCE]))
    tokens = folders.reference("bert-model", given, None)["last_hidden_state"]
    wanted = torch.nn.functional.normalize(tokens.mean(1))
    torch.testing.assert_close(unpacked(answer["features"]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        pytest.param("gpt2-causal-lm", "text-generation", id="gpt2"),
        pytest.param("llama-causal-lm", "text-generation", id="llama"),
        pytest.param("t5-conditional-generation", "text2text-generation", id="t5"),
    ],
)
def test_the_pipelines_of_text(folders: Any, transformers_js: Any, root: Path, name: str, pipeline: str) -> None:
    """From text to text, so that the tokenizer's files are read as well."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders.sources / name)
    inputs = dict(tokenizer([SENTENCE]))
    wanted = folders.reference(name, {key: inputs[key] for key in ("input_ids", "attention_mask")}, GREEDY)
    request = {"root": str(root), "model": name, "pipeline": pipeline, "text": SENTENCE, "arguments": GREEDY}
    [answer] = transformers_js(request)
    [text] = tokenizer.batch_decode(wanted["sequences"], skip_special_tokens=True)
    assert answer["generated_text"] == text
