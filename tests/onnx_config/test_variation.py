"""Axes that move alone, that move together, and that do not move: laws of invented models, and modules that run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from onnx_config.declarations import declare
from onnx_config.draft import Draft
from onnx_config.probe import ProbeResult
from onnx_config.spec import ValueRule
from onnx_config.variation import vary_axes
from tests.onnx_config import picky_modules as picky
from tests.onnx_config.picky_modules import Picky, Settings, inferred, shapes

TEXT = ("batch_size", "sequence_length")


class Two(Picky):
    def forward(self, input_ids, crops):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        crops (`torch.FloatTensor` of shape `(num_crops, crop_size)`):
            Crops.
        """


def drafted(sizes: Mapping[str, int], *, limits: Settings | None = None) -> Draft:
    draft = Draft(declare(Two), Settings(), ["input_ids", "crops"], limits=limits or Settings())
    draft.sizes.update(sizes)
    return draft


def model(draft: Draft, law: Callable[[Mapping[str, int]], bool]) -> Callable[[Mapping[str, int]], ProbeResult]:
    """Return a model that accepts inputs whose sizes, by their documented names, obey ``law``."""

    def run(sizes: Mapping[str, int]) -> ProbeResult:
        found = [size for shape, _ in draft.shapes(sizes).values() for size in shape]
        if not law(dict(zip(SIZES, found, strict=True))):
            return ProbeResult(outputs=None, refusal="no")
        return ProbeResult(outputs={"output": ((sum(found),), "float32")}, refusal=None)

    return run


SIZES = {"batch_size": 2, "sequence_length": 16, "num_crops": 8, "crop_size": 8}


@pytest.mark.parametrize(
    ("law", "ids", "crops", "note"),
    [
        pytest.param(lambda s: True, TEXT, ("num_crops", "crop_size"), None, id="all-free"),
        pytest.param(
            lambda s: s["num_crops"] == s["crop_size"], TEXT, ("crop_size", "crop_size"),
            "num_crops moves with crop_size", id="equal",
        ),
        pytest.param(
            lambda s: s["num_crops"] == 4 * s["batch_size"], TEXT, ("4*batch_size", "crop_size"),
            "num_crops moves with batch_size", id="a-multiple-of-the-rows",
        ),
        pytest.param(
            lambda s: s["sequence_length"] == 2 * s["crop_size"], ("batch_size", "2*crop_size"),
            ("num_crops", "crop_size"), "sequence_length moves with crop_size", id="a-multiple-named-first",
        ),
        pytest.param(
            lambda s: s["crop_size"] == 8, TEXT, ("num_crops", 8), "crop_size is fixed at 8: no", id="frozen"
        ),
        pytest.param(
            lambda s: s["batch_size"] == 2 and s["num_crops"] == 8, (2, "sequence_length"), (8, "crop_size"),
            "batch_size is fixed at 2: no", id="frozen-together",
        ),
    ],
)  # fmt: skip
def test_axes_are_tied_and_frozen(law, ids, crops, note):
    draft = drafted(SIZES)
    moved = vary_axes(draft, model(draft, law))
    assert {name: spec.shape for name, spec in draft.specs.items()} == {"input_ids": ids, "crops": crops}
    assert set(moved) == set(draft.axes())
    assert draft.learned[:1] == ([note] if note else [])


@pytest.mark.parametrize(
    ("sizes", "law", "ids", "crops"),
    [
        pytest.param(
            {"crop_size": 16}, lambda s: s["crop_size"] == s["sequence_length"], TEXT,
            ("num_crops", "sequence_length"), id="the-usual-name-stays",
        ),
        pytest.param(
            {"crop_size": 32}, lambda s: s["crop_size"] == 2 * s["sequence_length"], TEXT,
            ("num_crops", "2*sequence_length"), id="the-larger-is-the-multiple",
        ),
        pytest.param(
            {"crop_size": 12}, lambda s: 4 * s["crop_size"] == 3 * s["sequence_length"], ("batch_size", 16),
            ("num_crops", 12), id="no-multiple-is-no-tie",
        ),
    ],
)  # fmt: skip
def test_which_of_two_names_stays(sizes, law, ids, crops):
    draft = drafted(SIZES | sizes)
    vary_axes(draft, model(draft, law))
    assert {name: spec.shape for name, spec in draft.specs.items()} == {"input_ids": ids, "crops": crops}


@pytest.mark.parametrize(
    ("law", "smallest"),
    [
        pytest.param(lambda s: True, {}, id="one"),
        pytest.param(lambda s: s["sequence_length"] > 6, {"sequence_length": 7}, id="one-axis"),
        pytest.param(
            lambda s: s["sequence_length"] > 6 and s["crop_size"] > 6, {"sequence_length": 7, "crop_size": 7},
            id="one-limit-for-two",
        ),
        pytest.param(
            lambda s: s["sequence_length"] > 6 and s["crop_size"] > 2, {"sequence_length": 7, "crop_size": 3},
            id="two-limits",
        ),
        pytest.param(lambda s: s["batch_size"] > 1, {"batch_size": 2}, id="rows"),
        pytest.param(
            lambda s: s["sequence_length"] * s["crop_size"] > 60,
            {"sequence_length": 12, "crop_size": 6, "num_crops": 5},
            id="two-limits-together-and-any-rows",
        ),
    ],
)  # fmt: skip
def test_the_smallest_sizes_are_found(law, smallest):
    draft = drafted(SIZES)
    vary_axes(draft, model(draft, law))
    assert draft.smallest == dict.fromkeys(SIZES, 1) | smallest


def test_a_smallest_size_that_is_known_is_not_asked_below():
    draft, asked = drafted(SIZES), []
    draft.smallest["sequence_length"] = 9
    vary_axes(draft, lambda sizes: asked.append(sizes["sequence_length"]) or model(draft, lambda s: True)(sizes))
    assert (min(asked), draft.smallest["sequence_length"]) == (9, 9)


@pytest.mark.parametrize(
    ("size", "largest", "second"),
    [
        pytest.param(16, None, 21, id="longer"),
        pytest.param(16, 16, 15, id="shorter-where-there-is-no-room"),
        pytest.param(16, 21, 21, id="the-longest"),
        pytest.param(4, None, 5, id="small"),
        pytest.param(4000, None, 6000, id="sound"),
    ],
)
def test_the_second_size(size, largest, second):
    draft = drafted(SIZES | {"sequence_length": size}, limits=Settings(max_position_embeddings=largest))
    assert vary_axes(draft, model(draft, lambda s: True))["sequence_length"][0] == second


@pytest.mark.parametrize(
    ("size", "law", "steps", "smallest"),
    [
        pytest.param(16, lambda n: True, {}, 1, id="any"),
        pytest.param(16, lambda n: n % 8 == 0, {"sequence_length": 8}, 8, id="a-divisor-of-the-size"),
        pytest.param(16, lambda n: n % 16 == 0, {"sequence_length": 16}, 16, id="the-size-itself"),
        pytest.param(16, lambda n: n % 4 == 0 and n > 7, {"sequence_length": 4}, 8, id="from-a-smallest-one-on"),
    ],
)
def test_an_axis_may_grow_in_steps(size, law, steps, smallest):
    draft = drafted(SIZES | {"sequence_length": size})
    vary_axes(draft, model(draft, lambda s: law(s["sequence_length"])))
    assert (draft.steps, draft.smallest["sequence_length"]) == (steps, smallest)


def test_an_axis_without_room_is_fixed_without_a_word():
    draft = drafted(SIZES | {"sequence_length": 1}, limits=Settings(max_position_embeddings=1))
    vary_axes(draft, model(draft, lambda s: True))
    assert draft.specs["input_ids"].shape == ("batch_size", 1)
    assert draft.learned == []


def test_why_an_axis_is_fixed_is_not_said_where_values_decide():
    draft = drafted(SIZES)
    vary_axes(draft, lambda sizes: ProbeResult(outputs=None, refusal="data-dependent", undecidable=True))
    assert (draft.axes(), draft.learned) == ([], [])


def test_rules_follow_the_axes_that_they_name():
    draft = drafted(SIZES)
    draft.rules["input_ids"] = ValueRule(sizes=("num_crops", "crop_size"), tokens=((9, 2, "crop_size"),))
    vary_axes(draft, model(draft, lambda s: s["num_crops"] == 4 * s["batch_size"] and s["crop_size"] == 8))
    assert draft.rules["input_ids"] == ValueRule(sizes=("4*batch_size", 8), tokens=((9, 16, None),))


@pytest.mark.parametrize(
    ("cls", "settings", "expected", "note"),
    [
        pytest.param(picky.Pairs, {}, {"input_ids": TEXT, "other_ids": TEXT}, None, id="two-texts-of-one-length"),
        pytest.param(
            picky.Crops, {"feature_size": 3}, {"input_ids": TEXT, "crops": ("4*batch_size", 3)},
            "num_crops moves with batch_size", id="four-crops-a-row",
        ),
        pytest.param(
            picky.Books, {"num_codebooks": 4},
            {"input_ids": ("4*batch_size", "sequence_length"), "attention_mask": TEXT}, None, id="a-documented-product",
        ),
    ],
)  # fmt: skip
def test_modules_show_what_moves_together(cls, settings, expected, note):
    found = inferred(cls, **settings)
    assert (found.refusal, shapes(found)) == (None, expected)
    assert note is None or note in found.learned


@pytest.mark.parametrize(
    ("one_row", "images", "rule"),
    [
        pytest.param(False, "3*batch_size", ValueRule(tokens=((9, 12, None),)), id="so-many-in-each-text"),
        pytest.param(True, "num_images", ValueRule(tokens=((9, 4, "num_images"),)), id="any-number-in-one-text"),
    ],
)
def test_placeholders_follow_the_number_of_images(one_row, images, rule):
    found = inferred(picky.Album, image_token_id=9, image_size=8, one_row=one_row)
    assert shapes(found)["pixel_values"] == (images, 3, "height", "width")
    assert found.values == {"input_ids": rule}
    assert found.outputs[0].shape == shapes(found)["input_ids"]


def test_a_length_that_only_has_a_largest_size_stays_dynamic():
    draft = drafted(SIZES)
    vary_axes(draft, model(draft, lambda s: s["sequence_length"] <= 16))
    assert "sequence_length" in draft.axes()
    assert draft.ranges()["sequence_length"] == (1, 16)


class Scores(Picky):
    """Compares each text with each image."""

    def forward(self, input_ids: torch.LongTensor, pixel_values: torch.FloatTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        return input_ids.float().mean(dim=1)[:, None] * pixel_values.mean(dim=(1, 2, 3))[None]


class Reshaped(Scores):
    """Sees every text beside its own image, and does not notice one too many."""

    def forward(self, input_ids: torch.LongTensor, pixel_values: torch.FloatTensor):
        return input_ids.float().mean(dim=1) + pixel_values.reshape(input_ids.shape[0], -1).mean(dim=1)

    forward.__doc__ = Scores.forward.__doc__


@pytest.mark.parametrize(
    ("cls", "texts", "images"),
    [
        pytest.param(Scores, "text_batch_size", "image_batch_size", id="a-table-of-scores"),
        pytest.param(Reshaped, "batch_size", "batch_size", id="a-reshape-that-fits-by-chance"),
    ],
)
def test_texts_and_images_are_of_two_numbers_only_where_each_meets_each(cls, texts, images):
    found = shapes(inferred(cls))
    assert (found["input_ids"][0], found["pixel_values"][0]) == (texts, images)


class Strided(Picky):
    """Makes one step of two frames and of three, as the encoder of a sound does."""

    def forward(self, input_values):
        """
        input_values (`torch.FloatTensor` of shape `(batch_size, audio_length)`):
            A sound.
        """
        return input_values.reshape(input_values.shape[0], -1, 4)[:, :: self.config.stride]


@pytest.mark.parametrize(
    ("stride", "size", "steps"),
    [
        pytest.param(1, 8, "output_dim_1", id="seen-at-once"),
        pytest.param(8, 128, "output_dim_1", id="seen-when-longer"),
        pytest.param(1000, 8, 1, id="never-seen"),
    ],
)
def test_an_axis_of_which_one_step_is_made_is_made_longer(stride, size, steps):
    found = inferred(Strided, stride=stride)
    assert found.sizes["audio_length"] == size
    assert found.outputs[0].shape == ("batch_size", steps, 4)
    assert found.axis_ranges["audio_length"][0] == 4


class Coded(Picky):
    """Returns a sound as it came, and one step of it beside, as the codec of a sound does."""

    def forward(self, input_values):
        """
        input_values (`torch.FloatTensor` of shape `(batch_size, num_channels, sequence_length)`):
            A sound.
        """
        return {"values": input_values, "codes": input_values[:, 0, :: self.config.stride]}


@pytest.mark.parametrize(
    ("stride", "size"), [pytest.param(4001 * 3, 4001 * 4, id="longer"), pytest.param(400, 4001, id="long-enough")]
)
def test_one_step_is_seen_beside_outputs_that_move(stride, size):
    found = inferred(Coded, stride=stride, audio_channels=2)
    assert shapes(found) == {"input_values": ("batch_size", 2, "sequence_length")}
    assert found.sizes["sequence_length"] == size


class Noisy(Picky):
    """Draws what it is not given."""

    def forward(self, input_ids, noise=None, shift=None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        noise (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Noise.
        shift (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            A shift.
        """
        drawn = {"noise": noise, "shift": shift}
        for name in self.config.needs:
            drawn[name] = torch.randn(input_ids.shape) if drawn[name] is None else drawn[name]
        return input_ids + sum(drawn[name] for name in self.config.needs)


@pytest.mark.parametrize(
    ("needs", "inputs"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param(["shift"], ["shift"], id="one"),
        pytest.param(["noise", "shift"], ["noise", "shift"], id="all"),
    ],
)
def test_a_model_is_given_what_it_would_draw_at_random(needs, inputs):
    found = inferred(Noisy, needs=needs)
    assert list(shapes(found)) == ["input_ids", *inputs]
    assert any("draws it at random otherwise" in note for note in found.learned) is bool(needs)
