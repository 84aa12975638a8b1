"""Inputs, outputs and axes from the config alone: of every tiny model, of full-size ones, and against real weights."""

from __future__ import annotations

from functools import cache

import pytest
import tiny_models
import torch
import transformers
from tiny_models import FAMILIES

from onnx_config import UniversalOnnxConfig
from onnx_config.config_sizes import modality_of
from onnx_config.declarations import declare
from onnx_config.draft import Draft
from onnx_config.errors import InputError
from onnx_config.input_generator import generate_inputs
from onnx_config.preprocessors import declared_preprocessors
from onnx_config.probe import flat_outputs
from onnx_config.shape_inference import infer

EVERY_MODEL = [pytest.param(model, id=name) for name, model in FAMILIES.items()]

# Classes of transformers whose forward is annotated with another output class than it returns.
MISDECLARED = {
    "AlbertForQuestionAnswering": {"start_logits", "end_logits"},
    "AlbertForMultipleChoice": {"logits"},
    "BlipForImageTextRetrieval": {"itm_score", "question_embeds"},
}
TEXT = ("batch_size", "sequence_length")
IMAGE = ("batch_size", 3, "height", "width")


@cache
def detected(name: str) -> UniversalOnnxConfig:
    return UniversalOnnxConfig(tiny_models.config(name))


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_the_config_alone_says_all_of_a_tiny_model(model):
    found = detected(model.name)
    assert found.task == model.task
    assert tuple(name for name in found.get_input_names() if name not in model.optional) == model.inputs
    assert set(found.get_input_names()) <= set(model.inputs) | model.optional
    fields = {field.name for field in found.declaration.outputs}
    assert found.get_output_names()
    fields |= MISDECLARED.get(model.architecture, set())
    assert {name.partition(".")[0] for name in found.get_output_names()} <= fields


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        pytest.param(transformers.BertForMultipleChoice, ("batch_size", "num_choices", "sequence_length"), id="said"),
        pytest.param(
            transformers.DebertaV2ForMultipleChoice,
            ("batch_size", "num_choices", "sequence_length"),
            id="said-of-outputs",
        ),
        pytest.param(transformers.GPT2DoubleHeadsModel, TEXT, id="said-of-another-argument"),
    ],
)
def test_a_text_has_choices_where_its_class_says_so(cls, shape):
    assert Draft(declare(cls), cls.config_class(), ["input_ids"]).specs["input_ids"].shape == shape


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_names_and_axes_follow_the_laws(model):
    spec = detected(model.name).spec
    names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
    axes = {axis for tensor in spec.inputs for axis in tensor.axes.values()}
    assert len(names) == len(set(names))
    assert set(spec.sizes) == set(spec.axis_ranges) == axes
    # The batch is free for every one of these models.
    assert all(str(tensor.shape[0]).endswith("batch_size") for tensor in spec.inputs)
    for axis, (smallest, largest) in spec.axis_ranges.items():
        assert smallest <= spec.sizes[axis] <= (largest or spec.sizes[axis])


# Of each kind of axis one model with real weights: what is said of sizes is held against what comes out.
@pytest.mark.parametrize(
    "name",
    [
        "bert-sequence-classification", "roberta-model", "distilbert-question-answering", "deberta-v2-multiple-choice",
        "gpt2-causal-lm", "t5-conditional-generation", "bart-sequence-classification", "swin-model",
        "convnext-image-classification", "resnet-model", "segformer-semantic-segmentation", "detr-object-detection",
        "yolos-object-detection", "wav2vec2-ctc", "whisper-conditional-generation", "clip-model", "blip-model",
        "layoutlmv3-question-answering", "patchtst-prediction",
    ],
)  # fmt: skip
def test_a_named_axis_has_its_size_in_every_output(name):
    found, spec = detected(name), detected(name).spec
    model = getattr(transformers, spec.architecture)(tiny_models.config(name)).eval()
    named: dict[str, set[tuple[int, ...]]] = {}
    sizes = [
        {axis: 1 if axis.endswith("batch_size") else least for axis, (least, _) in spec.axis_ranges.items()},
        {axis: size + 1 + number for number, (axis, size) in enumerate(sorted(spec.sizes.items()))},
    ]
    for wanted in sizes:
        arrays = generate_inputs(spec.inputs, found.config, found.declaration, wanted)
        with torch.no_grad():
            returned = model(**{key: torch.from_numpy(value) for key, value in arrays.items()}, **found.forward_flags)
        shapes = {key: tuple(value.shape) for key, value in flat_outputs(returned)}
        known = dict(wanted)
        for tensor in spec.outputs:
            for position, axis in tensor.axes.items():
                assert known.setdefault(axis, shapes[tensor.name][position]) == shapes[tensor.name][position]
            assert tensor.resolve(known) == shapes[tensor.name]
            named.setdefault(tensor.name, set()).add(shapes[tensor.name])
    moving = {tensor.name for tensor in spec.outputs if tensor.axes}
    assert all(len(named[key]) == 2 for key in moving)


@pytest.mark.parametrize("name", ["swin-model", "convnext-model", "wav2vec2-model", "wav2vec2-xvector", "yolos-model"])
def test_below_the_smallest_size_the_model_refuses(name):
    found, spec = detected(name), detected(name).spec
    model = getattr(transformers, spec.architecture)(tiny_models.config(name)).eval()
    for axis, (least, _) in spec.axis_ranges.items():
        if least > 1:
            sizes = {**spec.sizes, axis: least - 1}
            arrays = generate_inputs(spec.inputs, found.config, found.declaration, sizes)
            with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
                model(**{key: torch.from_numpy(value) for key, value in arrays.items()})
            with pytest.raises(InputError, match=f"takes whole numbers from {least}"):
                found.generate_dummy_inputs(**{axis: least - 1})


@pytest.mark.parametrize(
    ("name", "last"),
    [
        pytest.param("bert-model", 128, id="positions-from-0"),
        pytest.param("roberta-model", 128, id="positions-after-the-padding-id"),
        pytest.param("mpnet-model", 128, id="the-same-elsewhere"),
        pytest.param("bart-model", 128, id="offset-inside-the-table"),
        pytest.param("t5-model", None, id="relative-positions"),
    ],
)
def test_the_largest_size_is_the_last_one_that_runs(name, last):
    found, spec = detected(name), detected(name).spec
    assert spec.axis_ranges["sequence_length"] == (1, last)
    if last is None:
        return
    model = getattr(transformers, spec.architecture)(tiny_models.config(name)).eval()
    for size in (last, last + 1):
        arrays = generate_inputs(spec.inputs, found.config, found.declaration, {**spec.sizes, "sequence_length": size})
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
        with torch.no_grad():
            if size == last:
                assert model(**tensors, **found.forward_flags)[0].shape[0] == spec.sizes["batch_size"]
            else:
                with pytest.raises((RuntimeError, IndexError)):
                    model(**tensors, **found.forward_flags)


DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
}


@cache
def full_size(prefix: str, head: str | None = None) -> UniversalOnnxConfig:
    config = getattr(transformers, f"{prefix}Config")(**(DETR if prefix == "Detr" else {}))
    config.architectures = [f"{prefix}{head}"] if head else None
    return UniversalOnnxConfig(config)


@pytest.mark.parametrize(
    ("prefix", "inputs", "outputs"),
    [
        pytest.param("Bert", {"input_ids": TEXT}, {"last_hidden_state": (*TEXT, 768)}, id="bert"),
        pytest.param("Llama", {"input_ids": TEXT, "attention_mask": TEXT}, {"logits": (*TEXT, 32000)}, id="llama-7b"),
        pytest.param(
            "T5", {"decoder_input_ids": ("batch_size", "decoder_sequence_length")},
            {"logits": ("batch_size", "decoder_sequence_length", 32128), "encoder_last_hidden_state": (*TEXT, 512)},
            id="t5",
        ),
        pytest.param(
            "ViT", {"pixel_values": ("batch_size", 3, 224, 224)}, {"last_hidden_state": ("batch_size", 197, 768)},
            id="vit",
        ),
        pytest.param("Swin", {"pixel_values": IMAGE}, {"pooler_output": ("batch_size", 768)}, id="swin"),
        pytest.param("ConvNext", {"pixel_values": IMAGE}, {"pooler_output": ("batch_size", 768)}, id="convnext"),
        pytest.param("ResNet", {"pixel_values": IMAGE}, {"pooler_output": ("batch_size", 2048, 1, 1)}, id="resnet"),
        pytest.param("Segformer", {"pixel_values": IMAGE}, {}, id="segformer"),
        pytest.param(
            "Detr", {"pixel_values": IMAGE, "pixel_mask": ("batch_size", "height", "width")},
            {"last_hidden_state": ("batch_size", 100, 256)}, id="detr",
        ),
        pytest.param(
            "Whisper", {"input_features": ("batch_size", 80, 3000)},
            {"encoder_last_hidden_state": ("batch_size", 1500, 384)}, id="whisper",
        ),
        pytest.param(
            "AST", {"input_values": ("batch_size", 1024, 128)}, {"last_hidden_state": ("batch_size", 1214, 768)},
            id="ast",
        ),
        pytest.param(
            "CLIP",
            {"input_ids": ("text_batch_size", "sequence_length"), "pixel_values": ("image_batch_size", 3, 224, 224)},
            {"logits_per_image": ("image_batch_size", "text_batch_size"), "text_embeds": ("text_batch_size", 512)},
            id="clip",
        ),
        pytest.param("LayoutLM", {"bbox": (*TEXT, 4)}, {"last_hidden_state": (*TEXT, 768)}, id="layoutlm"),
        pytest.param("LayoutLMv3", {"bbox": (*TEXT, 4), "input_ids": TEXT}, {}, id="layoutlmv3"),
        pytest.param("PatchTST", {"past_values": ("batch_size", 32, 1)}, {}, id="patchtst"),
        pytest.param("Wav2Vec2", {"input_values": TEXT}, {"logits": ("batch_size", "logits_dim_1", 32)}, id="wav2vec2"),
    ],
)  # fmt: skip
def test_a_full_size_model_from_its_config(prefix, inputs, outputs):
    spec = full_size(prefix).spec
    assert {t.name: t.shape for t in spec.inputs} == {t.name: t.shape for t in spec.inputs} | inputs
    assert {t.name: t.shape for t in spec.outputs} == {t.name: t.shape for t in spec.outputs} | outputs


# Smallest images by arithmetic: Swin's last of four stages needs a whole window of 7 (192 / 4 / 8 is 6), ConvNeXT
# divides by 4 and thrice by 2, SegFormer's first reduction reads 8 x 8 of ceil(n / 4), a ResNet pads down to nothing.
@pytest.mark.parametrize(
    ("prefix", "smallest"), [("Swin", 193), ("ConvNext", 32), ("Segformer", 29), ("ResNet", 1), ("Detr", 1)]
)
def test_images_of_any_size_have_a_smallest_one(prefix, smallest):
    ranges = full_size(prefix).spec.axis_ranges
    assert (ranges["height"], ranges["width"]) == ((smallest, None), (smallest, None))


def test_a_fixed_size_is_told_in_the_models_words():
    spec = full_size("ViT").spec
    assert set(spec.axis_ranges) == {"batch_size"}
    assert any("height is fixed at 224: Input image size" in note for note in spec.notes)


def test_a_model_that_takes_one_row_without_a_padding_token_is_fixed_at_one():
    found = full_size("GPT2", "ForSequenceClassification")
    assert {t.name: t.shape for t in found.spec.inputs} == {
        "input_ids": (1, "sequence_length"),
        "attention_mask": (1, "sequence_length"),
    }
    assert any("the batch is fixed at one row" in note for note in found.spec.notes)
    assert found.generate_dummy_inputs(batch_size=4)["input_ids"].shape == (1, 16)


def test_a_text_is_never_longer_than_the_positions():
    spec = UniversalOnnxConfig(transformers.BertConfig(num_hidden_layers=1, max_position_embeddings=8)).spec
    assert spec.sizes["sequence_length"] <= 8
    assert spec.axis_ranges["sequence_length"] == (1, 8)


def test_a_mask_that_makes_sizes_depend_on_values_is_left_out():
    spec = detected("wav2vec2-xvector").spec
    assert [tensor.name for tensor in spec.inputs] == ["input_values"]
    assert any("attention_mask was left out" in note for note in spec.notes)
    assert "attention_mask" in detected("wav2vec2-ctc").get_input_names()


@pytest.mark.parametrize("architecture", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_what_a_model_would_draw_at_random_is_an_input(architecture):
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=30, patch_size=5,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=37, architectures=[architecture],
    )  # fmt: skip
    found = UniversalOnnxConfig(config)
    assert {tensor.name: tensor.shape for tensor in found.spec.inputs} == {
        "pixel_values": ("batch_size", 3, 30, 30), "noise": ("batch_size", 36),
    }  # fmt: skip
    model = found.model_class(config).eval()
    inputs = found.generate_dummy_inputs(batch_size=3)
    first, second = (dict(flat_outputs(model(**inputs))) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any("draws it at random otherwise" in note for note in found.spec.notes)


def test_what_is_to_hold_sizes_holds_whole_numbers():
    declared = declare(transformers.Qwen2VLForConditionalGeneration)
    assert Draft(declared, transformers.Qwen2VLConfig(), ["image_grid_thw"]).specs["image_grid_thw"].dtype == "int64"
    tower = declare(transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel)
    assert Draft(tower, transformers.Qwen2_5_VLConfig().vision_config, ["grid_thw"]).specs["grid_thw"].dtype == "int64"


def test_without_a_probe_shapes_are_as_documented():
    config = tiny_models.config("bert-sequence-classification")
    declared, parts = declare(transformers.BertForSequenceClassification), declared_preprocessors("bert")[1]
    found = infer(declared, config, parts, None, task_family="text-classification", flags={})
    assert {t.name: t.shape for t in found.inputs} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), TEXT
    )
    assert {t.name: t.shape for t in found.outputs} == {"logits": ("batch_size", 5)}
    assert found.assumed == ("nothing was run: shapes as documented",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("input_ids", "text"), ("bbox", "text"), ("decoder_input_ids", "text"), ("pixel_values", "image"),
        ("pixel_mask", "image"), ("image_grid_thw", "image"), ("input_features", "audio"), ("input_values", "audio"),
        ("past_values", "time"), ("past_observed_mask", "time"),
    ],
)  # fmt: skip
def test_the_kind_of_data_that_an_argument_carries(name, kind):
    assert modality_of(name) == kind
