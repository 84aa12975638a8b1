"""Dummy values: inside the vocabulary, no special token by accident, ordered boxes, padding as a tokenizer pads."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_config import UniversalOnnxConfig
from onnx_config.declarations import declare
from onnx_config.input_generator import generate_inputs, picks_tokens, special_token_ids
from onnx_config.spec import TensorSpec, ValueRule
from tests.onnx_config import picky_modules as picky

MARKED = ["bert-model", "roberta-model", "t5-conditional-generation", "bart-model", "marian-mt", "gpt2-causal-lm",
          "llama-causal-lm", "qwen2-causal-lm", "whisper-model", "clip-model", "siglip-model", "blip-model",
          "layoutlmv3-model"]  # fmt: skip


@cache
def detected(name: str) -> UniversalOnnxConfig:
    return UniversalOnnxConfig(tiny_models.config(name))


def generate(name, sizes=None, **options):
    found = detected(name)
    inputs = found.inference.inputs
    return generate_inputs(inputs, found.config, found.declaration, {**found.sizes, **(sizes or {})}, **options)


def token(config, name):
    value = getattr(config, name, None)
    return value if value is not None else getattr(config.get_text_config(), name, None)


@pytest.mark.parametrize("name", MARKED)
def test_ids_are_ordinary_tokens_between_start_and_end(name):
    config = tiny_models.config(name)
    special = special_token_ids(config)
    end, start = token(config, "eos_token_id"), token(config, "decoder_start_token_id")
    for seed in range(3):
        arrays = generate(name, seed=seed)
        for key in ("input_ids", "decoder_input_ids"):
            if key not in arrays:
                continue
            ids = arrays[key]
            assert ids.min() >= 0
            assert ids.max() < tiny_models.VOCAB_SIZE
            if key == "decoder_input_ids":
                assert (ids[..., 0] == start).all()
                inner = ids[..., 1:]
            else:
                assert end is None or (ids[..., -1] == end).all()
                inner = ids[..., :-1]
            assert not special & set(inner.ravel().tolist())


@pytest.mark.parametrize("name", ["layoutlm-model", "layoutlmv3-model"])
def test_boxes_have_their_corners_in_order(name):
    boxes = generate(name)["bbox"]
    assert (boxes[..., :2] <= boxes[..., 2:]).all()
    assert 0 <= boxes.min() < boxes.max() < 1024


def test_a_second_mask_over_the_same_tokens_picks_some_of_them():
    found = detected("bert-model")
    axes = ("batch_size", "sequence_length")
    inputs = [*found.inference.inputs, TensorSpec(name="global_attention_mask", dtype="int64", shape=axes)]
    sizes = {**found.sizes, "batch_size": 8, "sequence_length": 12}
    arrays = generate_inputs(inputs, found.config, found.declaration, sizes, padding=True)
    assert arrays["attention_mask"][0].all()
    picked = arrays["global_attention_mask"]
    assert set(np.unique(picked)) == {0, 1}
    # Of each row another number, and never of what is hidden.
    assert len(set(picked.sum(axis=1).tolist())) > 2
    assert not (picked > arrays["attention_mask"]).any()
    # Models look whether it picks any.
    assert picks_tokens(inputs)
    assert not picks_tokens(found.inference.inputs)
    none = generate_inputs(inputs, found.config, found.declaration, sizes, chosen=False)["global_attention_mask"]
    assert not none.any()


@pytest.mark.parametrize("name", ["bert-model", "albert-model", "layoutlm-model", "vit-model", "whisper-model"])
def test_equal_seeds_give_equal_values_and_others_differ(name):
    first, again, other = (generate(name, seed=seed) for seed in (0, 0, 1))
    assert list(first) == list(again) == list(other)
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert any((value != other[key]).any() for key, value in first.items())


@pytest.mark.parametrize("name", ["bert-model", "vit-model", "layoutlm-model", "t5-model", "clip-model", "detr-model"])
@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_arrays_have_the_shapes_and_types_asked_for(name, data):
    inference = detected(name).inference
    sizes = {axis: data.draw(st.integers(1, 9), label=axis) for axis in inference.sizes}
    arrays = generate(name, sizes)
    assert list(arrays) == [spec.name for spec in inference.inputs]
    for spec in inference.inputs:
        assert arrays[spec.name].shape == spec.resolve(sizes)
        assert str(arrays[spec.name].dtype) == spec.dtype


def test_padded_rows_end_with_the_end_mark_and_padding():
    config = tiny_models.config("bart-model")
    arrays = generate("bart-model", {"batch_size": 3, "sequence_length": 12}, padding=True)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    assert mask.tolist() == [[1] * 12] + 2 * [[1] * 8 + [0] * 4]
    assert (ids[1:, 7] == config.eos_token_id).all()
    assert (ids[1:, 8:] == config.pad_token_id).all()
    assert config.pad_token_id not in ids[0]
    assert config.pad_token_id not in arrays["decoder_input_ids"]


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"sequence_length": 2}, {"sequence_length": 1}])
def test_what_is_too_small_to_pad_stays_whole(sizes):
    arrays = generate("bart-model", sizes, padding=True)
    assert arrays["attention_mask"].all()


def ruled(rule, *, shape=("batch_size", "sequence_length"), name="input_ids", **options):
    inputs = [TensorSpec(name=name, dtype="int64", shape=shape)]
    sizes = {"batch_size": 2, "sequence_length": 9, "num_images": 3}
    config, declared = picky.Settings(vocab_size=500, pad_token_id=0), declare(picky.Single)
    return generate_inputs(inputs, config, declared, sizes, rules={name: rule}, **options)[name]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(ValueRule(ones=3), [0, 1, 1, 1, 0, 0, 0, 0, 0], id="ones"),
        pytest.param(ValueRule(sizes=(7,)), [7] * 9, id="one-number-for-all"),
        pytest.param(ValueRule(sizes=("sequence_length",)), [9] * 9, id="the-size-of-an-axis"),
        pytest.param(ValueRule(sizes=("2*num_images",)), [6] * 9, id="a-multiple-of-one"),
        pytest.param(ValueRule(below=1), [0] * 9, id="below"),
        pytest.param(
            ValueRule(below=1, tokens=((99, 2, None), (88, 1, "num_images"))), [0, 99, 99, 88, 88, 88, 0, 0, 0],
            id="tokens",
        ),
    ],
)  # fmt: skip
def test_values_obey_their_rules(rule, expected):
    assert ruled(rule).tolist() == [expected, expected]


def test_a_bound_keeps_values_different():
    values = ruled(ValueRule(below=50))
    assert values.max() < 50
    assert len(set(values.ravel().tolist())) > 3


def test_a_row_of_sizes_stands_in_each_row():
    assert ruled(ValueRule(sizes=(4, "num_images")), shape=("num_images", 2)).tolist() == [[4, 3]] * 3


def test_padding_spares_the_placeholders():
    inputs = [TensorSpec(name=n, dtype="int64", shape=("batch_size", 9)) for n in ("input_ids", "attention_mask")]
    rules = {"input_ids": ValueRule(tokens=((99, 6, None),))}
    config, sizes = picky.Settings(vocab_size=50, pad_token_id=0), {"batch_size": 2}
    arrays = generate_inputs(inputs, config, declare(picky.Maskless), sizes, rules=rules, padding=True)
    assert (arrays["input_ids"] == 99).sum(axis=1).tolist() == [6, 6]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [9, 8]


@pytest.mark.parametrize("begins", [True, False])
def test_where_a_text_begins_all_that_is_kept_is_zeros(begins):
    names = ("past_key_values.0.conv_states", "past_values")
    inputs = [TensorSpec(name=name, dtype="float32", shape=("batch_size", 4, 3)) for name in names]
    arrays = generate_inputs(inputs, picky.Settings(), declare(picky.Maskless), {"batch_size": 2}, begins=begins)
    assert [bool(arrays[name].any()) for name in names] == [not begins, True]


def test_special_tokens_are_found_in_every_part_of_a_config():
    config = tiny_models.config("clip-model")
    config.text_config.eos_token_id = [7, 8]
    assert {0, 1, 7, 8} <= special_token_ids(config)
    assert True not in special_token_ids(transformers.BertConfig(pad_token_id=None))


def test_a_vocabulary_of_special_tokens_only_still_gives_ids():
    config = transformers.LlamaConfig(vocab_size=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    found = detected("llama-causal-lm")
    arrays = generate_inputs(found.inference.inputs, config, found.declaration, found.sizes)
    assert set(arrays["input_ids"].ravel().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    "name",
    ["bert-multiple-choice", "bart-sequence-classification", "layoutlm-model", "detr-model", "siglip-model",
     "wav2vec2-ctc", "patchtst-prediction"],
)  # fmt: skip
@pytest.mark.parametrize("padding", [False, True])
def test_the_model_takes_the_values(name, padding):
    found = detected(name)
    model = getattr(transformers, found.architecture)(tiny_models.config(name)).eval()
    arrays = generate(name, padding=padding)
    with torch.no_grad():
        returned = model(**{key: torch.from_numpy(value) for key, value in arrays.items()}, **found.forward_flags)
    assert all(torch.isfinite(value).all() for value in returned.to_tuple() if isinstance(value, torch.Tensor))
