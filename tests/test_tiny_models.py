"""The tiny models are what they say: right classes, inputs that forward takes, tasks that follow one rule."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from tiny_models import FAMILIES

# What a class name's head means, longest first; heads that mean something else in another modality are looked up there.
TASKS_BY_HEAD = {
    "ForImageClassificationWithTeacher": "image-classification",
    "ForAudioFrameClassification": "audio-frame-classification",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForSemanticSegmentation": "semantic-segmentation",
    "ForAudioClassification": "audio-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForImageTextRetrieval": "zero-shot-image-classification",
    "ForQuestionAnswering": "question-answering",
    "ForObjectDetection": "object-detection",
    "ForClassification": "time-series-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForPreTraining": "feature-extraction",
    "ForPrediction": "time-series-forecasting",
    "ForRegression": "time-series-regression",
    "EncoderModel": "feature-extraction",
    "ForMaskedLM": "feature-extraction",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForXVector": "audio-xvector",
    "MTModel": "text2text-generation",
    "ForCTC": "automatic-speech-recognition",
    "Model": "feature-extraction",
}
TASKS_BY_ARCHITECTURE = {
    "BlipForConditionalGeneration": "image-text-to-text",
    "BlipModel": "zero-shot-image-classification",
    "CLIPModel": "zero-shot-image-classification",
    "SiglipModel": "zero-shot-image-classification",
    "HubertForSequenceClassification": "audio-classification",
    "Wav2Vec2ForSequenceClassification": "audio-classification",
    "LayoutLMForQuestionAnswering": "document-question-answering",
    "LayoutLMv3ForQuestionAnswering": "document-question-answering",
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
    "WhisperModel": "automatic-speech-recognition",
    "BartModel": "text2text-generation",
    "MarianModel": "text2text-generation",
    "PegasusModel": "text2text-generation",
    "T5Model": "text2text-generation",
}
TEXT_ENCODERS = ("Bert", "Roberta", "DistilBert", "Albert", "Electra", "DebertaV2", "MPNet", "XLMRoberta")
TEXT_HEADS = (
    "Model",
    "ForPreTraining",
    "ForMaskedLM",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
# fmt: off
PROMISED_MODEL_TYPES = (
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "xlm-roberta", "gpt2", "llama",
    "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gemma2", "t5", "bart", "marian", "pegasus", "vit", "swin",
    "convnext", "resnet", "deit", "beit", "segformer", "detr", "yolos", "wav2vec2", "hubert", "whisper",
    "audio-spectrogram-transformer", "clip", "siglip", "blip", "layoutlm", "layoutlmv3", "patchtst",
)
# fmt: on
EVERY_MODEL = [pytest.param(model, id=name) for name, model in FAMILIES.items()]


def expected_task(architecture: str) -> str:
    if architecture in TASKS_BY_ARCHITECTURE:
        return TASKS_BY_ARCHITECTURE[architecture]
    return next(task for head, task in TASKS_BY_HEAD.items() if architecture.endswith(head))


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_forward_takes_the_inputs_in_this_order(model: tiny_models.TinyModel) -> None:
    arguments = inspect.signature(getattr(transformers, model.architecture).forward).parameters
    assert [name for name in arguments if name in model.inputs] == list(model.inputs)
    assert model.optional <= set(arguments) - set(model.inputs)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_the_task_follows_from_the_head(model: tiny_models.TinyModel) -> None:
    assert model.task == expected_task(model.architecture)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_the_config_names_its_class(model: tiny_models.TinyModel) -> None:
    made = tiny_models.config(model.name)
    assert made.architectures == [model.architecture]
    assert type(made).__name__ == model.config_class
    assert getattr(transformers, model.architecture).config_class is type(made)


@pytest.mark.parametrize("prefix", TEXT_ENCODERS)
def test_text_encoders_have_all_their_heads(prefix: str) -> None:
    there = {prefix + head for head in TEXT_HEADS if hasattr(transformers, prefix + head)}
    assert there <= {model.architecture for model in FAMILIES.values()}


@pytest.mark.parametrize("model_type", PROMISED_MODEL_TYPES)
def test_every_promised_family_is_here(model_type: str) -> None:
    assert model_type in {getattr(transformers, model.config_class).model_type for model in FAMILIES.values()}


@pytest.mark.parametrize("name", ["bert-model", "t5-conditional-generation", "clip-model"])
def test_a_folder_is_built_like_a_repository_and_twice_the_same(name: str, tmp_path: Path) -> None:
    first, second = (tiny_models.build(name, tmp_path / folder) for folder in ("first", "second"))
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (first, second)]
    assert contents[0] == contents[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(contents[0])


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    first, second = (tiny_models.build("vit-model", tmp_path / str(seed), seed) for seed in (0, 1))
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_building_leaves_the_random_state_of_torch_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    tiny_models.build("bert-model", tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def example_inputs(model: tiny_models.TinyModel) -> dict[str, torch.Tensor]:
    """Inputs of two rows for ``model``; written out by hand, so that they do not lean on the detection under test."""
    config: Any = tiny_models.config(model.name)
    height, width = (64, 96) if model.name.startswith(("detr", "yolos")) else (32, 32)
    rows: tuple[int, ...] = (2, 3) if model.task == "multiple-choice" else (2,)
    ids = torch.randint(5, 200, (*rows, 12))
    if model.architecture in ("BartForSequenceClassification", "CLIPModel"):
        # Both read the answer at the end mark; without one CLIP reads it at the first token, which sees no other.
        ids[..., -1] = config.get_text_config().eos_token_id
    sound = (2, config.max_length, config.num_mel_bins) if model.name.startswith("ast") else (2, 4000)
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "decoder_input_ids": torch.randint(5, 200, (2, 7)),
        "bbox": torch.tensor([10, 20, 300, 400]).expand(2, 12, 4),
        "pixel_values": torch.randn(2, 3, height, width),
        "pixel_mask": torch.ones(2, height, width, dtype=torch.long),
        "input_values": torch.randn(sound),
        "input_features": torch.randn(2, getattr(config, "num_mel_bins", 1), 100),
        "past_values": torch.randn(2, getattr(config, "context_length", 1), 3),
    }
    return {name: made[name] for name in model.inputs}


@pytest.mark.slow
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_a_model_runs_on_its_inputs_and_each_input_matters(model: tiny_models.TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.build(model.name, tmp_path)
    cls = getattr(transformers, model.architecture)
    module, loading = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert sum(parameter.numel() for parameter in module.parameters()) < 1_000_000
    inputs = example_inputs(model)
    with torch.no_grad():
        before = [value for value in module(**inputs).to_tuple() if isinstance(value, torch.Tensor)]
    assert before
    assert all(torch.isfinite(value).all() for value in before)
    for name, value in inputs.items():
        changed = value.clone()
        flat = changed.view(2, -1)
        # Other values in half of the first row, its end mark excepted: other tokens, pixels, masked positions.
        half = slice(flat.shape[1] // 2, -1)
        flat[0, half] = 1 - flat[0, half] if value.dtype == torch.float32 or "mask" in name or "type" in name else 3
        with torch.no_grad():
            after = [value for value in module(**{**inputs, name: changed}).to_tuple() if torch.is_tensor(value)]
        assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True)), name
