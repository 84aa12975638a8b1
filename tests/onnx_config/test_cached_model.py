from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from onnx_config.cache_layout import with_past
from onnx_config.export import steps, template_steps
from onnx_config.export.generation import NEW_TOKENS, compare_generation
from onnx_config.export.loaded import loaded_model
from onnx_config.export.session import open_session
from onnx_config.spec import ModelSpec
from tests.onnx_config.converted import check_request

# One of each kind: learned positions, rotary ones and grouped heads, a window in some layers, a window in all.
FAMILIES = ("gpt2-causal-lm", "llama-causal-lm", "gemma2-causal-lm", "mistral-causal-lm")


class Continued:
    """A tiny model's graph with its cache."""

    def __init__(self, name: str, folder: Path) -> None:
        self.source = tiny_models.build(name, folder / "source")
        self.graph = folder / "model.onnx"
        plain = folder / "plain.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
            self.spec = with_past(ModelSpec.from_json(steps.detect({"folder": str(self.source)})))
            asked = {"folder": str(self.source), "spec": self.spec.to_json()}
            template_steps.trace({**asked, "dtype": "float32", "opset": None, "output": str(plain)})
            template_steps.bind({**asked, "graph": str(plain), "output": str(self.graph), "metadata": {}})

    def parity(self, source: Path | None = None) -> dict[str, Any]:
        request = {"folder": str(source or self.source), "spec": self.spec.to_json()}
        return steps.parity({**request, **check_request(self.graph)})


@pytest.fixture(scope="module", params=FAMILIES)
def continued(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    return Continued(request.param, tmp_path_factory.mktemp(request.param))


def test_one_graph_reads_a_text_and_goes_on_with_it(continued: Continued) -> None:
    result = continued.parity()
    assert result["outcome"] == "verified", result["detail"]
    assert result["axes_proven"] == ("batch_size", "past_sequence_length", "sequence_length")
    assert result["shapes"] == 10
    assert result["notes"] == [
        f"generates the {NEW_TOKENS} tokens that PyTorch does, after 3 prompts padded on the left"
    ]


def test_its_axes_have_the_names_of_the_field(continued: Continued) -> None:
    session = open_session(continued.graph, device="cpu")
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    whole = "past_sequence_length + sequence_length"
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", whole]
    for layer in range(2):
        for part in ("key", "value"):
            past, present = inputs[f"past_key_values.{layer}.{part}"], outputs[f"present.{layer}.{part}"]
            assert past[::2] == ["batch_size", "past_sequence_length"]
            assert present == [*past[:2], whole, past[3]]


class Disturbed:
    """A session whose answers are changed."""

    def __init__(self, session: Any, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        self.session, self.change = session, change

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        answer = dict(zip(names, self.session.run(names, feed), strict=True))
        self.change(feed, answer)
        return [answer[name] for name in names]


def forget_what_was_said(_: dict[str, Any], answer: dict[str, Any]) -> None:
    for name, value in answer.items():
        if name.startswith("present."):
            value[:] = 0


def prefer_another_token(feed: dict[str, Any], answer: dict[str, Any]) -> None:
    # After many steps only, where no single call would show it.
    if feed["attention_mask"].shape[1] > 30:
        answer["logits"][1, :, 7] = answer["logits"].max() + 1


def answer_nothing(_: dict[str, Any], answer: dict[str, Any]) -> None:
    answer["logits"][:] = np.nan


@pytest.mark.parametrize("change", [forget_what_was_said, prefer_another_token, answer_nothing])
def test_another_text_is_told_apart(continued: Continued, change: Any) -> None:
    request = {"folder": str(continued.source), "spec": continued.spec.to_json()}
    universal, model = loaded_model(request, continued.spec)
    session = open_session(continued.graph, device="cpu")
    for changed, whole in ((session, True), (Disturbed(session, change), False)):
        generated = compare_generation(changed, model, continued.spec, universal)
        assert generated.refusal is None
        assert (generated.difference is None) == whole, generated


def test_another_checkpoint_is_another_text(tmp_path: Path) -> None:
    one = Continued("gpt2-causal-lm", tmp_path / "one")
    other = tiny_models.build("gpt2-causal-lm", tmp_path / "two", seed=1)
    assert one.parity(other)["outcome"] == "mismatch"
    weights = load_file(one.source / "model.safetensors")
    save_file({name: value * 1.0 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert one.parity(other)["outcome"] == "verified"
