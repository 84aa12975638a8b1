"""Which preprocessor a model type is used with, and what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    SamImageProcessorPil,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from onnx_config.preprocessors import (
    Habits,
    declared_preprocessors,
    given_preprocessors,
    habits_of,
    image_size_in,
)


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


def square(edge):
    return {"height": edge, "width": edge}


@pytest.mark.parametrize(
    ("preprocessor", "sizes"),
    [
        pytest.param(ViTImageProcessorPil(size={"height": 32, "width": 48}), {"height": 32, "width": 48}, id="size"),
        pytest.param(ViTImageProcessorPil(do_resize=False), {}, id="not-resized"),
        pytest.param(CLIPImageProcessorPil(), square(224), id="cropped"),
        pytest.param(
            CLIPImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=False), square(40), id="shortest-edge"
        ),
        pytest.param(SamImageProcessorPil(), square(1024), id="padded"),
        pytest.param(Wav2Vec2FeatureExtractor(), {"samples": 16_000, "frames": 100}, id="a-second-of-sound"),
        pytest.param(
            WhisperFeatureExtractor(chunk_length=5), {"samples": 80_000, "frames": 500}, id="a-chunk-of-sound"
        ),
        pytest.param(object(), {}, id="nothing"),
    ],
)
def test_the_sizes_that_a_preprocessor_makes(preprocessor, sizes):
    assert habits_of(preprocessor) == Habits(sizes=sizes)


def test_how_a_tokenizer_cuts_and_pads(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build("gpt2-causal-lm", tmp_path))
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.pad_token = 40, "left", tokenizer.eos_token
    assert habits_of(tokenizer) == Habits(
        longest_text=40, padding_side="left", pad_token_id=tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    )
    tokenizer.model_max_length = int(1e30)
    assert habits_of(tokenizer).longest_text is None


def test_a_processor_has_the_habits_of_its_parts(tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_models.build("clip-model", tmp_path))
    found = habits_of(processor)
    assert found.sizes.keys() == {"height", "width"}
    assert found.padding_side == processor.tokenizer.padding_side


@pytest.mark.parametrize(
    ("files", "size"),
    [
        pytest.param({}, None, id="no-file"),
        pytest.param({"preprocessor_config.json": "{"}, None, id="no-json"),
        pytest.param({"preprocessor_config.json": "[1]"}, None, id="no-object"),
        pytest.param({"preprocessor_config.json": '{"sampling_rate": 16000}'}, None, id="of-sounds"),
        pytest.param(
            {"preprocessor_config.json": json.dumps({"do_resize": True, "size": {"height": 30, "width": 40}})},
            (30, 40),
            id="resized",
        ),
        pytest.param(
            {
                "preprocessor_config.json": json.dumps(
                    {"do_resize": True, "size": 256, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
                )
            },
            (224, 224),
            id="cropped",
        ),
        pytest.param({"preprocessor_config.json": '{"do_resize": false, "size": 256}'}, None, id="left-as-it-is"),
        pytest.param(
            {"processor_config.json": '{"image_processor": {"do_resize": true, "size": {"shortest_edge": 96}}}'},
            (96, 96),
            id="inside-a-processor",
        ),
    ],
)
def test_a_folder_says_which_size_images_are_brought_to(files, size, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert image_size_in(tmp_path) == size
