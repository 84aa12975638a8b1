"""What detection learns from a refusal: one small module for each way to refuse."""

from __future__ import annotations

import time

import pytest
import torch

from onnx_config import shape_inference
from onnx_config.declarations import declare
from onnx_config.draft import Draft
from onnx_config.lessons import candidates
from onnx_config.probe import ProbeResult
from onnx_config.spec import ValueRule
from tests.onnx_config import picky_modules as picky
from tests.onnx_config.picky_modules import Settings, inferred, shapes

TEXT = ("batch_size", "sequence_length")
VIDEO = ("batch_size", "num_frames", 3, "height", "width")
IMAGE_TOKEN = {"image_token_id": 9, "image_eos_token_id": 8}


@pytest.mark.parametrize(
    ("cls", "settings", "expected", "note"),
    [
        pytest.param(
            picky.Frames, {"num_frames": 4}, {"pixel_values": ("batch_size", 4, 3, "height", "width")},
            "pixel_values has the axes of: batch, frames, channels, height, width = pixel_values.shape",
            id="a-shape-taken-apart",
        ),
        pytest.param(picky.Frames, {}, {"pixel_values": VIDEO}, "has the axes of", id="an-axis-that-no-config-knows"),
        pytest.param(
            picky.Rows, {"feature_size": 8}, {"input_features": ("batch_size", "steps", 8)},
            "input_features has the axes of: batch, steps = hidden.size()[:-1]", id="all-axes-but-the-last",
        ),
        pytest.param(
            picky.Spelled, {}, {"pixel_values": VIDEO}, "pixel_values has the shape of: Expected", id="a-shape-in-words"
        ),
        pytest.param(
            picky.Quoted, {"num_channels": 3},
            {
                "pixel_values": ("batch_size", 3, "height", "width"),
                "input_points": ("batch_size", "point_batch_size", "num_points", 2),
            },
            "input_points has the shape of: The input_points must be", id="a-shape-of-quoted-axes",
        ),
        pytest.param(
            picky.Labelled, {"patch_size": 16},
            {
                "input_points": ("batch_size", "point_batch_size", "num_points", 2),
                "input_labels": ("batch_size", "point_batch_size", "num_points"),
            },
            "input_points has the axes of input_labels: tuple index", id="an-axis-of-the-input-beside",
        ),
        pytest.param(
            picky.Looking, {},
            {
                "input_ids": TEXT,
                "pixel_values": ("batch_size", "num_images", 3, "height", "width"),
                "image_attention_mask": (*TEXT, "num_images"),
            },
            "image_attention_mask has the axes of input_ids and of pixel_values: ", id="which-token-which-image",
        ),
        pytest.param(
            picky.Named, {}, {"input_ids": TEXT, "positions": TEXT}, "positions was added", id="asked-for-by-name"
        ),
        pytest.param(
            picky.Capital, {}, {"input_ids": TEXT, "positions": TEXT}, "positions was added", id="asked-for-in-capitals"
        ),
        pytest.param(
            picky.Exclusive, {}, {"pixel_values": ("batch_size", 3, "height", "width")},
            "inputs was left out: You cannot use both", id="one-of-two",
        ),
        pytest.param(
            picky.Unnamed, {}, {"input_ids": TEXT, "positions": TEXT}, "positions was added", id="none-where-needed"
        ),
        pytest.param(
            picky.Entities, {},
            {"input_ids": TEXT, "entity_ids": ("batch_size", "entity_length"),
             "entity_spans": ("batch_size", "entity_length", "span_length")},
            "entity_ids, entity_spans were added, of which a result was missing", id="a-group-whose-result-is-none",
        ),
        pytest.param(
            picky.Covered, {"feature_size": 8},
            {"input_features": ("batch_size", "num_frames", 8), "input_features_mask": ("batch_size", "num_frames")},
            "input_features_mask was added since the model asks for it", id="a-mask-of-the-steps-there-are",
        ),
        pytest.param(
            picky.Embedded, {"hidden_size": 8}, {"inputs_embeds": (*TEXT, 8)},
            "inputs_embeds is given in the place of input_ids", id="not-expected",
        ),
        pytest.param(
            picky.Convolved, {"axes": 2}, {"hidden_states": ("batch_size", 5, "height", "width")},
            "hidden_states has the axes of a convolution: Expected 3D", id="a-convolution-of-images",
        ),
        pytest.param(
            picky.Convolved, {"axes": 1}, {"hidden_states": ("batch_size", 6, "sequence_length")},
            "hidden_states has the axes of a convolution: Given groups=3", id="a-convolution-in-groups",
        ),
        pytest.param(
            picky.Steps, {}, {"hidden_states": (*TEXT, 9)}, "hidden_states has steps, of 9 numbers each",
            id="steps-of-features",
        ),
        pytest.param(
            picky.Letters, {"patch_size": 20, "num_channels": 3},
            {"pixel_values": ("batch_size", "num_frames", "height", "width", 3)}, "b, t, h, w, c = pixel_values.shape",
            id="axes-called-by-letters",
        ),
        pytest.param(
            picky.Speakers, {}, {"input_features": TEXT, "speaker": ("batch_size", 1)},
            "speaker holds whole numbers: Expected tensor", id="whole-numbers",
        ),
        pytest.param(
            picky.Spectrum, {"num_mel_bins": 80}, {"input_features": ("batch_size", 80, "sequence_length")},
            "input_features has its features before its steps", id="features-before-steps",
        ),
        pytest.param(picky.Codebooks, {}, {"input_ids": (*TEXT, 3)}, "input_ids has 3 columns", id="columns"),
        pytest.param(
            picky.Channelled, {"num_bins": 11}, {"past_values": (*TEXT, 11)},
            "past_values has a further axis of size 11 at position 2", id="one-axis-more",
        ),
        pytest.param(
            picky.Solved, {}, {"past_values": ("batch_size", 10)}, "axis 1 of past_values has size 10: mat1",
            id="solved",
        ),
        pytest.param(
            picky.Squares, {}, {"pixel_values": ("batch_size", 3, 32, 32)}, "images of 32 pixels",
            id="images-of-one-size",
        ),
        pytest.param(
            picky.Single, {}, {"input_ids": (1, "sequence_length")}, "the batch is fixed at one row", id="one-row"
        ),
    ],
)  # fmt: skip
def test_shapes_and_types_are_learned(cls, settings, expected, note):
    found = inferred(cls, **settings)
    assert (found.refusal, shapes(found)) == (None, expected)
    assert any(note in line for line in found.learned)


@pytest.mark.parametrize(
    ("cls", "settings", "size", "smallest", "steps", "note"),
    [
        pytest.param(
            picky.Folded, {}, 20, 5, {"sequence_length": 5}, "past_values has size 20: a multiple of 5", id="multiple"
        ),
        pytest.param(picky.Recording, {}, 16000, 6000, {}, "sequence_length was made larger: Calculated", id="sound"),
        pytest.param(picky.Lagged, {"context_length": 8}, 15, 15, {}, "size 15: lags cannot go further", id="history"),
    ],
)  # fmt: skip
def test_lengths_are_learned(cls, settings, size, smallest, steps, note):
    found = inferred(cls, **settings)
    assert (found.refusal, found.sizes["sequence_length"]) == (None, size)
    assert (found.axis_ranges["sequence_length"], found.axis_steps) == ((smallest, None), steps)
    assert any(note in line for line in found.learned)


def test_images_that_are_too_small_are_made_larger():
    found = inferred(picky.Photograph)
    assert found.refusal is None
    assert (found.axis_ranges["height"], found.axis_ranges["width"]) == ((150, None), (150, None))
    assert (found.sizes["height"], found.sizes["width"]) == (192, 256)


@pytest.mark.parametrize(
    ("cls", "settings", "rules"),
    [
        pytest.param(picky.Looked, {"rows": 22}, {"input_ids": ValueRule(below=22)}, id="table"),
        pytest.param(picky.Looked, {"rows": 200}, {}, id="a-table-that-is-large-enough"),
        pytest.param(picky.Indexed, {"rows": 22}, {"input_ids": ValueRule(below=22)}, id="index"),
        pytest.param(picky.Placed, {"rows": 2}, {"pixel_values": ValueRule(below=2)}, id="a-place-among-fractions"),
        pytest.param(picky.Marked, {}, {"token_mask": ValueRule(ones=3)}, id="marks"),
        pytest.param(
            picky.Captions, IMAGE_TOKEN | {"image_size": 16, "max_position_embeddings": 99},
            {"input_ids": ValueRule(tokens=((9, 4, None),))}, id="placeholders",
        ),
        pytest.param(
            picky.Captions, IMAGE_TOKEN | {"image_size": 64, "max_position_embeddings": 30},
            {"input_ids": ValueRule(tokens=((9, 16, None),))}, id="placeholders-of-a-smaller-image",
        ),
    ],
)  # fmt: skip
def test_values_are_learned(cls, settings, rules):
    found = inferred(cls, **settings)
    assert (found.refusal, found.values) == (None, rules)


@pytest.mark.parametrize(
    ("image_size", "longest", "pixels", "texts"),
    [
        pytest.param(16, 99, 16, (6, 99), id="as-declared"),
        pytest.param(64, 30, 32, (18, 30), id="smaller-where-no-text-would-hold-it"),
    ],
)
def test_a_text_has_room_for_its_image(image_size, longest, pixels, texts):
    found = inferred(picky.Captions, **IMAGE_TOKEN, image_size=image_size, max_position_embeddings=longest)
    assert shapes(found) == {"input_ids": TEXT, "pixel_values": ("batch_size", 3, pixels, pixels)}
    assert found.axis_ranges["sequence_length"] == texts
    assert texts[0] <= found.sizes["sequence_length"] <= texts[1]


def test_marked_positions_have_room():
    assert inferred(picky.Marked).axis_ranges["sequence_length"] == (5, None)


@pytest.mark.parametrize(
    ("cls", "note"),
    [
        pytest.param(picky.Maskless, "attention_mask was left out: masks do not work here", id="mask"),
        pytest.param(
            picky.Tiles,
            "the graph takes text only; pixel_values was left out: sizes would depend on the values of image_sizes",
            id="sizes-would-depend-on-values",
        ),
    ],
)
def test_what_is_left_out_is_assumed_not_proven(cls, note):
    found = inferred(cls)
    assert (found.refusal, shapes(found)) == (None, {"input_ids": TEXT})
    assert (found.learned, found.assumed) == ((), (note,))


@pytest.mark.parametrize("cls", [picky.Unnamed, picky.Frames, picky.Solved])
def test_a_lesson_is_told_once(cls):
    learned = inferred(cls).learned
    assert len(set(learned)) == len(learned)


def test_a_class_that_takes_nothing_is_given_up_in_its_own_words():
    found = inferred(picky.Stubborn)
    assert found.refusal == "never 2, 16"
    assert (shapes(found), found.learned) == ({"input_ids": TEXT}, ())
    assert found.assumed == ("a run was refused: never 2, 16",)


def test_the_last_refusal_counts_not_the_first():
    found = inferred(picky.Halfway)
    assert found.refusal == "and now something else"
    assert "positions was added since the model asks for it" in found.learned


@pytest.mark.parametrize(("most", "expected"), [(3, 4), (250, 8)])
def test_runs_are_bounded(most, expected, monkeypatch):
    runs = []
    monkeypatch.setattr(shape_inference, "_MAX_RUNS", most)
    monkeypatch.setattr(picky.Stubborn, "seen", lambda self, ids: runs.append(ids))
    assert inferred(picky.Stubborn).refusal
    assert len(runs) == expected


def test_time_is_bounded(monkeypatch):
    runs = []
    monkeypatch.setattr(shape_inference, "_MAX_SECONDS", 0.25)
    monkeypatch.setattr(picky.Stubborn, "seen", lambda self, ids: runs.append(time.sleep(0.1)))
    assert inferred(picky.Stubborn).refusal
    assert 1 <= len(runs) <= 4


def test_no_proposal_is_run_twice(monkeypatch):
    seen = []
    monkeypatch.setattr(picky.Stubborn, "seen", lambda self, ids: seen.append(ids.shape))
    inferred(picky.Stubborn)
    assert len(seen) == len(set(seen)) > 1


def test_one_row_is_told_as_such_and_not_as_an_axis_that_does_not_move():
    assert len(inferred(picky.Single).learned) == 1


def test_the_token_of_the_image_is_tried_before_those_around_it():
    config = Settings(boi_image_token_id=7, image_token_index=9, image_eos_token_id=8, num_image_tokens=3)
    draft = Draft(declare(picky.Captions), config, ["input_ids", "pixel_values"])
    refusal = ProbeResult(outputs=None, refusal="image tokens: 0, features: 8")
    rules = [c.draft.rules["input_ids"].tokens for c in candidates(draft, refusal, lambda _: refusal) if c.draft.rules]
    assert [token for ((token, _, _),) in rules[:3]] == [9, 7, 8]


def test_a_text_alone_holds_no_places_for_images():
    draft = Draft(declare(picky.Tiles), Settings(), ["input_ids", "pixel_values"])
    draft.rules["input_ids"] = ValueRule(tokens=((9, 4, None),))
    refusal = ProbeResult(outputs=None, refusal="image_sizes is required")
    first = next(iter(candidates(draft, refusal, lambda _: refusal)))
    assert (list(first.draft.specs), first.draft.rules, first.leaves_out) == (["input_ids"], {}, True)


def test_a_shape_of_as_many_axes_teaches_nothing():
    draft = Draft(declare(picky.Squares), Settings(), ["pixel_values"])
    refusal = ProbeResult(outputs=None, refusal="wants shape (batch_size, num_channels, rows, columns)")
    assert not [c for c in candidates(draft, refusal, lambda _: refusal) if "has the shape of" in c.why]


def test_a_candidate_leaves_the_draft_as_it_was():
    draft = Draft(declare(picky.Named), Settings(), ["input_ids"])
    before = draft.signature
    refusal = ProbeResult(outputs=None, refusal="You have to specify positions, 16 and 3 do not match")
    found = list(candidates(draft, refusal, lambda _: refusal))
    assert list(found[0].draft.specs) == ["input_ids", "positions"]
    assert draft.signature == before
    assert all(candidate.draft.signature != before for candidate in found)


class Regions(picky.Picky):
    """Counts on what a mask is the mask of, and does not ask for it."""

    def forward(self, input_ids, visual_embeds=None, visual_attention_mask=None, visual_token_type_ids=None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        visual_embeds (`torch.FloatTensor` of shape `(batch_size, num_regions, 20)`, *optional*):
            Regions.
        visual_attention_mask (`torch.LongTensor` of shape `(batch_size, num_regions)`, *optional*):
            Their mask.
        visual_token_type_ids (`torch.LongTensor` of shape `(batch_size, num_regions)`, *optional*):
            Their segments.
        """
        if visual_attention_mask is None:
            raise ValueError("visual_attention_mask must be provided")
        regions = 0 if visual_embeds is None else visual_embeds.shape[1]
        if regions != visual_attention_mask.shape[1]:
            raise ValueError(f"{regions} regions and {visual_attention_mask.shape[1]} in their mask")
        return visual_embeds * visual_attention_mask[..., None]


def test_what_a_mask_is_the_mask_of_is_given_with_it():
    found = inferred(Regions)
    assert found.refusal is None
    assert list(shapes(found)) == ["input_ids", "visual_embeds", "visual_attention_mask"]
    assert shapes(found)["visual_embeds"] == ("batch_size", "num_regions", 20)


class Recordings(picky.Picky):
    """Has as many features of a sound as its mask shows, every fourth step of it."""

    def forward(self, input_ids, input_features=None, input_features_mask=None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        input_features (`torch.FloatTensor` of shape `(batch_size, sequence_length, feature_size)`):
            Features.
        input_features_mask (`torch.Tensor` of shape `(batch_size, feature_sequence_length)`):
            Their mask.
        """
        if input_features_mask is None:
            raise ValueError("input_features_mask must be provided")
        if input_features.shape[1] != 40:
            raise ValueError(f"Expected 40 steps, got {input_features.shape[1]}")
        tokens, features = int((input_ids == 9).sum()), int((input_features_mask.sum(-1) // 4).sum())
        if tokens != features:
            raise ValueError(f"Audio features and audio tokens do not match, tokens: {tokens}, features: {features}")
        return input_ids[..., None] * input_features.sum()


def test_the_mask_of_a_sound_is_as_long_as_the_sound():
    found = inferred(Recordings, audio_token_id=9, feature_size=8)
    assert found.refusal is None
    assert shapes(found)["input_features"][1] == shapes(found)["input_features_mask"][1] == 40
    assert found.values["input_ids"].tokens == ((9, 10, None),)


class Pointed(picky.Picky):
    """Documents an argument with too few axes, and says nothing of them when it refuses."""

    def embed(self, input_points):
        """
        input_points (`torch.FloatTensor` of shape `(batch_size, point_batch_size, num_points, 2)`):
            Points.
        """

    def forward(self, pixel_values, input_points):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            An image.
        input_points (`torch.FloatTensor` of shape `(batch_size, num_points, 2)`):
            Points.
        """
        return input_points[:, :, :, 0] * pixel_values.mean()


def test_a_shape_that_another_method_documents_is_tried():
    assert declare(Pointed).argument("input_points").elsewhere == ("batch_size", "point_batch_size", "num_points", 2)
    assert declare(Pointed).argument("pixel_values").elsewhere is None
    found = inferred(Pointed)
    assert found.refusal is None
    assert shapes(found)["input_points"] == ("batch_size", "point_batch_size", "num_points", 2)


class Recording(picky.Picky):
    """Takes sounds of one channel, or what was made of them before."""

    def forward(self, input_values, audio_codes=None):
        """
        input_values (`torch.FloatTensor` of shape `(batch_size, channels, num_samples)`):
            A sound.
        audio_codes (`torch.LongTensor` of shape `(batch_size, codes_length)`, *optional*):
            Codes.
        """
        if audio_codes is not None:
            return audio_codes * 2.0
        if input_values.shape[1] != 1:
            raise ValueError(f"Audio must be mono, but got {input_values.shape[1]}")
        return input_values * 2.0


def test_a_size_that_is_refused_and_none_named_in_its_place_becomes_one():
    found = inferred(Recording)
    assert found.refusal is None
    assert shapes(found) == {"input_values": ("batch_size", 1, "sequence_length")}


class Crossing(picky.Picky):
    """Attends to the states of another model, and asks for them in words."""

    def __init__(self, config):
        super().__init__(config)
        self.keys = torch.nn.Linear(24, config.hidden_size)

    def forward(self, query_embeds, encoder_hidden_states=None):
        """
        query_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Queries.
        encoder_hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            States of another model.
        """
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given for cross-attention layers")
        return query_embeds @ self.keys(encoder_hidden_states).transpose(1, 2)


def test_states_of_another_model_are_given_where_they_are_asked_for_and_have_a_length_of_their_own():
    found = inferred(Crossing, hidden_size=16)
    assert found.refusal is None
    assert shapes(found) == {
        "query_embeds": ("batch_size", "sequence_length", 16),
        "encoder_hidden_states": ("batch_size", "encoder_sequence_length", 24),
    }
    assert {"sequence_length", "encoder_sequence_length"} <= found.sizes.keys()


class Codes(picky.Picky):
    """Reads codes of several books for each token, and hides tokens."""

    def forward(self, input_ids, attention_mask=None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length, num_codebooks) or (batch_size, steps)`):
            Codes.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Their mask.
        """
        return (input_ids + torch.arange(self.config.num_codebooks)).sum(dim=-1) * attention_mask


def test_what_comes_after_the_tokens_is_what_each_is_made_of():
    found = inferred(Codes, num_codebooks=5)
    assert found.refusal is None
    assert shapes(found) == {
        "input_ids": ("batch_size", "sequence_length", 5),
        "attention_mask": ("batch_size", "sequence_length"),
    }


class Gridded(picky.Picky):
    """Says by a name alone how many numbers tell how large an image is."""

    def forward(self, pixel_values, grid_thw):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        grid_thw (`torch.Tensor`):
            Sizes.
        """
        return pixel_values.mean() * grid_thw.reshape(-1, 3).sum(dim=-1)


def test_a_grid_has_a_number_for_each_letter_of_its_name():
    assert Draft(declare(Gridded), Settings(), ["grid_thw"]).specs["grid_thw"].shape == ("num_images", 3)


class Tubelets(picky.Picky):
    """Has a position for each pair of frames."""

    def forward(self, pixel_values):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, frames_read, 4)`):
            Frames.
        """
        pairs = pixel_values.shape[1] // 2
        if pairs != 16:
            raise ValueError(f"The size of tensor a ({pairs}) must match the size of tensor b (16)")
        return pixel_values.mean(dim=-1)


def test_frames_that_count_in_pairs_are_as_many_as_there_are_positions_for():
    found = inferred(Tubelets)
    assert found.refusal is None
    assert shapes(found)["pixel_values"][1] in (32, 33)
