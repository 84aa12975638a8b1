"""Texts with sounds whose mask says how many features they have: what is found of them, and what they generate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from onnx_config import UniversalOnnxConfig
from onnx_config.export.fusion_generation import compare_fusion_generation
from onnx_config.part_models import part_model
from onnx_config.parts import Role, fusion_parts, role_of
from onnx_config.probe import flat_outputs
from onnx_config.runtime.told_features import told_features

FRAMES, MELS, PLACE = 64, 8, 59


def listener() -> Any:
    return transformers.AudioFlamingo3Config(
        audio_config={"num_mel_bins": MELS, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                      "hidden_size": 16, "max_source_positions": FRAMES // 2},
        text_config={"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
                     "eos_token_id": 2, "pad_token_id": 0},
        audio_token_id=PLACE,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Computed:
    """A part as PyTorch computes it, behind the face of a session."""

    model: Any
    spec: Any
    factor: float = 1.0

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=tensor.name, shape=tensor.shape) for tensor in self.spec.inputs]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=tensor.name) for tensor in self.spec.outputs]

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        with torch.no_grad():
            returned = self.model(**{name: torch.from_numpy(value) for name, value in feed.items()})
        made = dict(flat_outputs(returned))
        return [made[name].numpy() * self.factor for name in names]


@pytest.fixture(scope="module")
def heard() -> Any:
    config = listener()
    config.architectures = ["AudioFlamingo3ForConditionalGeneration"]
    universal = UniversalOnnxConfig(config)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that the random model was not trained
        torch.manual_seed(0)
        model = transformers.AudioFlamingo3ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
    return SimpleNamespace(universal=universal, spec=universal.spec, model=model)


def test_a_mask_of_a_sound_is_as_long_as_the_sound(heard: Any) -> None:
    found = {tensor.name: tensor.shape for tensor in heard.spec.inputs}
    assert found["input_features"] == ("batch_size", MELS, FRAMES)
    assert found["input_features_mask"] == ("batch_size", FRAMES)
    assert heard.spec.values["input_ids"].tokens == ((PLACE, FRAMES // 4, None),)


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_what_texts_with_sounds_generate_is_compared(heard: Any, factor: float) -> None:
    parts = fusion_parts(heard.spec)
    assert [role_of(part) for part in parts] == [Role.AUDIO_ENCODER, Role.EMBED_TOKENS, Role.DECODER_MERGED]
    sessions = {
        role_of(part): Computed(part_model(heard.model, part), part, factor if part is parts[0] else 1.0)
        for part in parts
    }
    made = compare_fusion_generation(sessions, heard.model, heard.spec, parts[-1], heard.universal)
    assert (made.refusal, made.tokens, made.rows) == (None, 32, 3)
    assert (made.difference is None) == (factor == 1.0)


def test_how_features_are_handed_on_is_told_where_the_class_looks_at_a_mask() -> None:
    with torch.device("meta"):
        base = transformers.AudioFlamingo3ForConditionalGeneration(listener()).eval().base_model
    mask = torch.ones(2, FRAMES, dtype=torch.int64)
    mask[1, FRAMES // 2 :] = 0
    feed = {"input_features": torch.zeros(2, MELS, FRAMES), "input_features_mask": mask}
    told = told_features(base, base.get_audio_features, feed, count=24).pooler_output
    assert (tuple(told.shape), told.device.type) == ((24, 16), "meta")
