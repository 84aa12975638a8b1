"""Which preprocessor a model type is used with, and what it makes."""

from __future__ import annotations

import pytest
import tiny_models
from transformers import AutoProcessor, AutoTokenizer

from onnx_config.preprocessors import declared_preprocessors, given_preprocessors


@pytest.mark.parametrize(
    ("model_type", "main", "first_inputs"),
    [
        pytest.param("bert", "BertTokenizer", {"input_ids"}, id="text"),
        pytest.param("vit", "ViTImageProcessor", {"pixel_values"}, id="image"),
        pytest.param("audio-spectrogram-transformer", "ASTFeatureExtractor", {"input_values"}, id="sound"),
        pytest.param("clip", "CLIPProcessor", {"input_ids", "pixel_values"}, id="image-and-text"),
        pytest.param("whisper", "WhisperProcessor", {"input_ids", "input_features"}, id="sound-and-text"),
        pytest.param("patchtst", None, set(), id="none"),
        pytest.param("nonesuch", None, set(), id="unknown"),
    ],
)
def test_what_transformers_declares_for_a_model_type(model_type, main, first_inputs):
    found, parts = declared_preprocessors(model_type)
    assert (found or "").removesuffix("Fast").removesuffix("Pil") == (main or "")
    assert {part.input_names[0] for part in parts} == first_inputs


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        pytest.param("bert", True, id="bert"),
        pytest.param("roberta", False, id="roberta"),
        pytest.param("albert", False, id="albert"),
    ],
)
def test_whether_a_tokenizer_makes_segment_ids(model_type, expected):
    _, parts = declared_preprocessors(model_type)
    assert ("token_type_ids" in parts[0].input_names) is expected


def test_given_preprocessors_are_described_by_what_they_say(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build("bert-model", tmp_path / "bert"))
    processor = AutoProcessor.from_pretrained(tiny_models.build("clip-model", tmp_path / "clip"))
    names = [part.input_names for part in given_preprocessors([tokenizer])]
    assert names == [tuple(tokenizer.model_input_names)]
    made = {name for part in given_preprocessors([processor]) for name in part.input_names}
    assert made == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize("thing", [object(), "bert-base-uncased", None, 3])
def test_what_is_no_preprocessor_makes_nothing(thing):
    assert given_preprocessors([thing]) == ()
