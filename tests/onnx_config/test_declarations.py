"""What a class declares: documented shapes, the role of each argument, output fields, and the debt of patterns."""

from __future__ import annotations

import string

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from onnx_config.declarations import Role, declare, read_shape
from onnx_config.patterns import AXIS_SYNONYMS, pattern_count

# The tables' present length, to stay under 40. A rule that makes an entry superfluous lowers the number.
MOST_PATTERNS = 34


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("of shape `(batch_size, sequence_length)`", ("batch_size", "sequence_length"), id="plain"),
        pytest.param("of shape `(bs, seq_len)`", ("batch_size", "sequence_length"), id="synonyms"),
        pytest.param("of shape `(batch_size, 4)`, *optional*", ("batch_size", 4), id="number"),
        pytest.param("of shape `(batch_size,)`", ("batch_size",), id="one-axis"),
        pytest.param("of shape `(batch_size, config.num_labels)`", ("batch_size", "num_labels"), id="config-attribute"),
        pytest.param("of shape `(batch_size, hidden_size//2)`", ("batch_size", "hidden_size_2"), id="formula"),
        pytest.param("of shape `(1,)`, *optional*", (1,), id="loss"),
        pytest.param(
            "of shape `(batch_size * num_codebooks, bs)`", ("batch_size*num_codebooks", "batch_size"), id="product"
        ),
        pytest.param("`bool`, *optional*", None, id="none"),
        pytest.param("", None, id="empty"),
        pytest.param("of shape '(batch_size, num_boxes, 4)'", ("batch_size", "num_boxes", 4), id="other-quotes"),
        pytest.param("of shape (batch_size, 3)", ("batch_size", 3), id="not-marked-as-code"),
    ],
)
def test_a_shape_is_read_from_a_docstring(text, expected):
    assert read_shape(text) == expected


axis_names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12).filter(
    lambda name: name.strip("_") and name == name.strip("_") and "__" not in name
)
documented = st.lists(st.integers(1, 4096) | axis_names, min_size=1, max_size=5)


@given(documented, st.text(string.ascii_letters + " *", max_size=20))
def test_what_is_documented_is_read(axes, tail):
    written = ", ".join(str(axis) for axis in axes)
    found = read_shape(f"`torch.Tensor` of shape `({written})`{tail}")
    assert found == tuple(AXIS_SYNONYMS.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_error(text):
    shape = read_shape(text)
    assert shape is None or all(isinstance(axis, str) or axis > 0 for axis in shape)


@pytest.mark.parametrize(
    ("class_name", "argument", "role"),
    [
        pytest.param("BertForSequenceClassification", "input_ids", Role.DATA, id="ids"),
        pytest.param("BertForSequenceClassification", "labels", Role.LABEL, id="labels"),
        pytest.param("BertForQuestionAnswering", "start_positions", Role.LABEL, id="span"),
        pytest.param("BertModel", "inputs_embeds", Role.ALTERNATIVE, id="embeddings"),
        pytest.param("BertModel", "past_key_values", Role.STATE, id="cache"),
        pytest.param("T5ForConditionalGeneration", "encoder_outputs", Role.STATE, id="encoder-outputs"),
        pytest.param("GPT2LMHeadModel", "use_cache", Role.OPTION, id="flag"),
        pytest.param("ViTModel", "interpolate_pos_encoding", Role.OPTION, id="optional-flag"),
        pytest.param("PatchTSTForPrediction", "future_values", Role.LABEL, id="future"),
        pytest.param("DetrModel", "pixel_mask", Role.DATA, id="mask"),
        pytest.param("UdopModel", "bbox", Role.DATA, id="annotated-as-dict-of-anything"),
    ],
)
def test_the_role_of_an_argument(class_name, argument, role):
    assert declare(getattr(transformers, class_name)).argument(argument).role is role


@pytest.mark.parametrize(
    ("class_name", "main_input", "modalities"),
    [
        pytest.param("BertModel", "input_ids", ("text",), id="text"),
        pytest.param("ViTModel", "pixel_values", ("image",), id="image"),
        pytest.param("WhisperModel", "input_features", ("audio", "text"), id="audio"),
        pytest.param("CLIPModel", "input_ids", ("image", "text"), id="image-and-text"),
    ],
)
def test_what_a_class_is_fed_with(class_name, main_input, modalities):
    declared = declare(getattr(transformers, class_name))
    assert (declared.main_input, declared.modalities) == (main_input, modalities)


@pytest.mark.parametrize(
    ("class_name", "flags"),
    [
        pytest.param(
            "BertForSequenceClassification",
            {"loss": "labels", "logits": None, "hidden_states": "output_hidden_states",
             "attentions": "output_attentions"},
            id="head",
        ),
        pytest.param(
            "GPT2LMHeadModel",
            {"loss": "labels", "logits": None, "past_key_values": "use_cache"},
            id="cache",
        ),
        pytest.param("CLIPModel", {"loss": "labels", "logits_per_image": None, "text_embeds": None}, id="contrastive"),
    ],
)  # fmt: skip
def test_which_flag_turns_an_output_on(class_name, flags):
    fields = {field.name: field.flag for field in declare(getattr(transformers, class_name)).outputs}
    assert {name: fields[name] for name in flags} == flags


def test_an_index_is_bounded_by_what_its_docstring_says():
    declared = declare(transformers.LayoutLMModel)
    limits = {name: declared.argument(name).index_limit for name in ("bbox", "token_type_ids", "input_ids")}
    assert limits == {"bbox": "max_2d_position_embeddings", "token_type_ids": 2, "input_ids": None}


class Undocumented(transformers.PreTrainedModel):
    def forward(self, pixel_values, mask: bool = False):
        return pixel_values, mask


def test_a_class_that_declares_little_says_what_is_missing():
    declared = declare(Undocumented)
    assert declared.outputs == ()
    assert declared.unread == (
        "pixel_values is not documented", "mask is not documented", "forward names no output class",
    )  # fmt: skip


def test_a_class_without_forward_is_refused():
    with pytest.raises((TypeError, AttributeError)):
        declare(object)


def test_the_debt_of_patterns_does_not_grow(record_property):
    count = pattern_count()
    record_property("pattern_count", count)
    assert sum(count.values()) <= MOST_PATTERNS, count


def test_a_synonym_leads_to_a_name_that_is_none():
    assert not set(AXIS_SYNONYMS.values()) & set(AXIS_SYNONYMS)


@pytest.mark.parametrize(("home", "role"), [("transformers.models.made", Role.DATA), ("somebody.made", Role.OPTION)])
def test_what_the_library_asks_for_and_says_nothing_of_is_data(home: str, role: Role) -> None:
    def forward(self, hidden_states, scale=1.0):  # type: ignore[no-untyped-def]  # which is the point
        return hidden_states * scale

    declared = declare(type("Made", (torch.nn.Module,), {"forward": forward, "__module__": home}))
    assert [argument.role for argument in declared.arguments] == [role, Role.OPTION]
