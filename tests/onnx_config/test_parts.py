"""Which graphs a model becomes, and what each takes and gives, by the spec of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnx_config.cache_layout import PAST_AXIS
from onnx_config.parts import (
    ENCODER_AXIS,
    GRAPH_FILES,
    Role,
    dual_encoder_parts,
    encoder_decoder_parts,
    fusion_parts,
    prompt_parts,
    role_of,
)
from onnx_config.spec import ModelSpec, TensorSpec, ValueRule

HIDDEN, HEADS, SIZE, WORDS = 32, 4, 8, 99


def tensor(name: str, *shape: int | str, dtype: str = "int64") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def spec(inputs: list[TensorSpec], outputs: list[TensorSpec], **changes: object) -> ModelSpec:
    axes = dict.fromkeys((axis for t in inputs for axis in t.axis_names), (1, None))
    made = ModelSpec(
        model_type="tiny", task="text2text-generation", task_family="text2text-generation", architecture="Tiny",
        inputs=tuple(inputs), outputs=tuple(outputs), axis_ranges=axes, sizes=dict.fromkeys(axes, 12),
        preprocessor=None, parameters=None,
    )  # fmt: skip
    return replace(made, **changes)


def half(name: str, length: int | str) -> tuple[TensorSpec, ...]:
    return tuple(
        tensor(f"past_key_values.0.{name}.{part}", "batch_size", HEADS, length, SIZE, dtype="float32")
        for part in ("key", "value")
    )


LOGITS = tensor("logits", "batch_size", "decoder_sequence_length", WORDS, dtype="float32")


def encoder_decoder(length: int | str = "sequence_length", **changes: object) -> ModelSpec:
    inputs = [
        tensor("input_ids", "batch_size", "sequence_length"),
        tensor("attention_mask", "batch_size", "sequence_length"),
        tensor("decoder_input_ids", "batch_size", "decoder_sequence_length"),
    ]
    states = tensor("encoder_last_hidden_state", "batch_size", length, HIDDEN, dtype="float32")
    whole = spec(
        inputs, [LOGITS, states], cache=(*half("decoder", PAST_AXIS), *half("encoder", length)),
        step_axis="decoder_sequence_length", values={"decoder_input_ids": ValueRule(below=50)},
    )  # fmt: skip
    return replace(whole, **changes)


def names(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return [t.name for t in tensors]


def test_an_encoder_decoder_is_three_graphs() -> None:
    encoder, decoder, continued = encoder_decoder_parts(encoder_decoder())
    assert [role_of(part) for part in (encoder, decoder, continued)] == [
        Role.ENCODER, Role.DECODER, Role.DECODER_WITH_PAST,
    ]  # fmt: skip
    assert names(encoder.inputs) == ["input_ids", "attention_mask"]
    assert names(encoder.outputs) == ["last_hidden_state"]
    assert names(decoder.inputs) == ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    assert names(decoder.outputs)[0] == "logits"
    assert names(decoder.outputs)[1:] == [
        name.replace("past_key_values", "present") for name in names(continued.inputs)[2:]
    ]
    assert names(continued.inputs)[:2] == ["encoder_attention_mask", "input_ids"]
    # What is kept of the encoder does not change, and is not given back.
    assert names(continued.outputs)[1:] == ["present.0.decoder.key", "present.0.decoder.value"]


def test_the_lengths_of_both_sides_are_axes_of_their_own() -> None:
    encoder, decoder, continued = encoder_decoder_parts(encoder_decoder())
    assert encoder.sizes.keys() == {"batch_size", "sequence_length"}
    assert decoder.sizes.keys() == {"batch_size", "decoder_sequence_length", ENCODER_AXIS}
    assert continued.sizes.keys() == decoder.sizes.keys() | {PAST_AXIS}
    assert continued.axis_ranges[PAST_AXIS] == (0, None)
    assert decoder.outputs[3].shape == ("batch_size", HEADS, ENCODER_AXIS, SIZE)
    assert continued.outputs[1].shape[2] == f"{PAST_AXIS} + decoder_sequence_length"


def test_a_length_that_is_fixed_stays_so() -> None:
    sound = [
        tensor("input_features", "batch_size", 80, 3000, dtype="float32"),
        tensor("decoder_input_ids", "batch_size", "decoder_sequence_length"),
    ]
    _, decoder, continued = encoder_decoder_parts(encoder_decoder(1500, inputs=tuple(sound)))
    assert names(decoder.inputs) == ["input_ids", "encoder_hidden_states"]
    assert ENCODER_AXIS not in {axis for part in (decoder, continued) for axis in part.sizes}


def test_tokens_of_the_decoder_lie_in_its_vocabulary() -> None:
    _, decoder, _ = encoder_decoder_parts(encoder_decoder())
    assert decoder.values["input_ids"].below == 50
    _, decoder, _ = encoder_decoder_parts(encoder_decoder(values={}))
    assert decoder.values["input_ids"].below == WORDS


def test_without_its_cache_it_is_two_graphs() -> None:
    encoder, decoder = encoder_decoder_parts(encoder_decoder(cache=(), step_axis=None), with_past=False)
    assert (role_of(encoder), names(decoder.outputs)) == (Role.ENCODER, ["logits"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"cache": ()}, id="keeps-nothing"),
        pytest.param({"step_axis": None}, id="does-not-grow"),
        pytest.param({"cache": half("decoder", PAST_AXIS)}, id="keeps-one-half"),
        pytest.param({"outputs": (LOGITS,)}, id="gives-no-states"),
        pytest.param({"outputs": encoder_decoder().outputs[1:]}, id="gives-no-logits"),
        pytest.param({"inputs": encoder_decoder().inputs[:2]}, id="no-text-to-go-on-with"),
        pytest.param({"outputs": (LOGITS, tensor("encoder_last_hidden_state", "batch_size", "other", HIDDEN))},
                     id="mask-of-another-length"),
    ],
)  # fmt: skip
def test_what_is_no_such_model_has_no_such_parts(changes: dict[str, object]) -> None:
    assert encoder_decoder_parts(encoder_decoder(**changes)) == ()


def fusion(**changes: object) -> ModelSpec:
    inputs = [
        tensor("input_ids", "batch_size", "sequence_length"),
        tensor("pixel_values", "batch_size", 3, 8, 8, dtype="float32"),
        tensor("attention_mask", "batch_size", "sequence_length"),
    ]
    past = tuple(
        tensor(f"past_key_values.0.{part}", "batch_size", HEADS, PAST_AXIS, SIZE, dtype="float32")
        for part in ("key", "value")
    )
    whole = spec(
        inputs, [tensor("logits", "batch_size", "sequence_length", WORDS, dtype="float32")], cache=past,
        step_axis="sequence_length", embedding_size=HIDDEN, takes_positions=True,
        values={"input_ids": ValueRule(tokens=((7, 16, None),))},
        axis_ranges={"batch_size": (1, None), "sequence_length": (18, 128)},
    )  # fmt: skip
    return replace(whole, **changes)


def test_a_text_with_images_is_three_graphs() -> None:
    vision, embed, decoder = fusion_parts(fusion())
    assert [role_of(part) for part in (vision, embed, decoder)] == [
        Role.VISION_ENCODER, Role.EMBED_TOKENS, Role.DECODER_MERGED,
    ]  # fmt: skip
    assert (names(vision.inputs), names(vision.outputs)) == (["pixel_values"], ["image_features"])
    assert embed.outputs[0].shape == ("batch_size", "sequence_length", HIDDEN)
    assert names(decoder.inputs)[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert decoder.inputs[2].shape == ("batch_size", "sequence_length")
    assert names(decoder.outputs) == ["logits", "present.0.key", "present.0.value"]


def test_its_decoder_takes_texts_without_room_for_an_image() -> None:
    _, embed, decoder = fusion_parts(fusion())
    assert decoder.axis_ranges["sequence_length"] == embed.axis_ranges["sequence_length"] == (1, 128)
    assert not embed.values["input_ids"].tokens


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"values": {}}, id="no-placeholders"),
        pytest.param({"inputs": fusion().inputs[::2]}, id="no-images"),
        pytest.param({"inputs": (*fusion().inputs, tensor("input_features", "batch_size", 80, dtype="float32"))},
                     id="images-and-sounds"),
        pytest.param({"inputs": (*fusion().inputs, tensor("token_type_ids", "batch_size", "sequence_length"))},
                     id="more-than-a-mask"),
        pytest.param({"cache": ()}, id="keeps-nothing"),
        pytest.param({"embedding_size": None}, id="unknown-width"),
    ],
)  # fmt: skip
def test_what_needs_more_is_not_taken_apart(changes: dict[str, object]) -> None:
    assert fusion_parts(fusion(**changes)) == ()


def test_a_sound_has_an_encoder_of_its_own() -> None:
    sound = tensor("input_features", "batch_size", 80, 64, dtype="float32")
    inputs = (fusion().inputs[0], sound, fusion().inputs[2])
    audio, *_ = fusion_parts(fusion(inputs=inputs))
    assert (role_of(audio), names(audio.outputs)) == (Role.AUDIO_ENCODER, ["audio_features"])


def dual(**changes: object) -> ModelSpec:
    inputs = [
        tensor("input_ids", "text_batch_size", "sequence_length"),
        tensor("pixel_values", "image_batch_size", 3, 8, 8, dtype="float32"),
        tensor("attention_mask", "text_batch_size", "sequence_length"),
    ]
    outputs = [
        tensor("logits_per_image", "image_batch_size", "text_batch_size", dtype="float32"),
        tensor("text_embeds", "text_batch_size", HIDDEN, dtype="float32"),
        tensor("image_embeds", "image_batch_size", HIDDEN, dtype="float32"),
    ]
    return replace(spec(inputs, outputs), **changes)


def test_texts_and_images_that_are_compared_are_one_graph_and_two() -> None:
    whole, text, vision = dual_encoder_parts(dual())
    assert whole == dual()
    assert (role_of(text), names(text.inputs), names(text.outputs)) == (
        Role.TEXT_MODEL, ["input_ids", "attention_mask"], ["text_embeds"],
    )  # fmt: skip
    assert (role_of(vision), names(vision.inputs)) == (Role.VISION_MODEL, ["pixel_values"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"outputs": dual().outputs[:2]}, id="no-embedding-of-one-side"),
        pytest.param({"inputs": dual().inputs[1:2]}, id="images-only"),
        pytest.param({"inputs": (tensor("input_ids", "batch_size", 4), tensor("pixel_values", "batch_size", 3))},
                     id="one-batch-for-both"),
        pytest.param({"inputs": (*dual().inputs, tensor("past_values", "x", dtype="float32"))}, id="neither-side"),
    ],
)  # fmt: skip
def test_what_has_no_two_sides_stays_whole(changes: dict[str, object]) -> None:
    assert dual_encoder_parts(dual(**changes)) == ()


def test_every_role_has_a_file_of_its_own() -> None:
    assert GRAPH_FILES.keys() == set(Role)
    assert len(set(GRAPH_FILES.values())) == len(Role)


def test_a_spec_keeps_its_part_through_json() -> None:
    for part in encoder_decoder_parts(encoder_decoder()):
        assert ModelSpec.from_json(part.to_json()) == part


def prompted(**changes: object) -> ModelSpec:
    inputs = [
        tensor("pixel_values", "batch_size", 3, 64, 64, dtype="float32"),
        tensor("input_points", "batch_size", "point_batch_size", "num_points", 2, dtype="float32"),
    ]
    embeddings = (tensor("image_embeddings", "batch_size", 16, 4, 4, dtype="float32"),)
    outputs = [tensor("pred_masks", "batch_size", "point_batch_size", 3, 16, 16, dtype="float32")]
    return replace(spec(inputs, outputs, embeddings=embeddings), **changes)


def test_a_segmenter_is_an_image_encoder_and_a_prompt_decoder() -> None:
    encoder, decoder = prompt_parts(prompted())
    assert (role_of(encoder), role_of(decoder)) == (Role.VISION_ENCODER, Role.PROMPT_DECODER)
    assert (names(encoder.inputs), names(encoder.outputs)) == (["pixel_values"], ["image_embeddings"])
    assert (names(decoder.inputs), names(decoder.outputs)) == (["image_embeddings", "input_points"], ["pred_masks"])
    assert encoder.sizes.keys() == {"batch_size"}


def test_boxes_are_asked_about_in_a_graph_of_their_own_with_any_number_of_points() -> None:
    boxes = (tensor("input_boxes", "batch_size", "point_batch_size", 4, dtype="float32"),)
    boxed = prompted(boxes=boxes, axis_ranges=dict.fromkeys(("batch_size", "point_batch_size", "num_points"), (1, 9)))
    _, decoder, other = prompt_parts(ModelSpec.from_json(boxed.to_json()))
    assert role_of(other) is Role.PROMPT_DECODER_WITH_BOXES
    assert other.inputs == (*decoder.inputs, *boxes)
    assert other.outputs == decoder.outputs
    assert {axis: limits[0] for axis, limits in other.axis_ranges.items()} == {
        "batch_size": 1, "point_batch_size": 1, "num_points": 0,
    }  # fmt: skip
    # What was traced of the two others serves where the third does not hold.
    assert prompt_parts(prompted(axis_ranges=boxed.axis_ranges)) == prompt_parts(boxed)[:2]


def test_a_prompt_decoder_gives_no_embeddings_back() -> None:
    again = replace(prompted(), outputs=(*prompted().outputs, *prompted().embeddings))
    assert names(prompt_parts(again)[1].outputs) == ["pred_masks"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"embeddings": ()}, id="embeds-nothing"),
        pytest.param({"inputs": prompted().inputs[:1]}, id="is-asked-nothing"),
        pytest.param({"inputs": prompted().inputs[1:]}, id="sees-nothing"),
    ],
)
def test_what_is_not_asked_about_an_image_has_no_such_parts(changes: dict[str, object]) -> None:
    assert prompt_parts(prompted(**changes)) == ()
