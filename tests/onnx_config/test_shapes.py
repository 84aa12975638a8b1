"""Laws of the shapes at which a graph is compared, whatever its axes and their ranges are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_config.export.shapes import CheckShape, check_shapes

AXES = (
    "batch_size",
    "image_batch_size",
    "text_batch_size",
    "sequence_length",
    "decoder_sequence_length",
    "num_choices",
    "height",
    "width",
)
IMAGE = ("height", "width")


@st.composite
def traced_axes(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, tuple[int, int | None]]]:
    """Draw sizes of a traced graph and ranges that they lie in; an axis may have no range."""
    sizes: dict[str, int] = {}
    ranges: dict[str, tuple[int, int | None]] = {}
    for axis in draw(st.lists(st.sampled_from(AXES), unique=True)):
        low = draw(st.integers(1, 70))
        high = draw(st.none() | st.integers(low, low + 200))
        sizes[axis] = draw(st.integers(low, low + 200 if high is None else high))
        if low > 1 or high is not None or draw(st.booleans()):
            ranges[axis] = (low, high)
    return sizes, ranges


def can_move(limits: tuple[int, int | None], sizes: int = 2) -> bool:
    """Return whether a range holds that many sizes."""
    low, high = limits
    return high is None or high - low + 1 >= sizes


@given(traced_axes(), st.booleans())
def test_the_laws(drawn: tuple[dict[str, int], dict[str, tuple[int, int | None]]], masked: bool) -> None:
    sizes, ranges = drawn
    shapes = check_shapes(sizes, ranges, masked=masked)
    limits = {axis: ranges.get(axis, (1, None)) for axis in sizes}
    movable = [axis for axis in sizes if can_move(limits[axis])]

    assert len(shapes) >= (5 if sizes else 4)
    assert len({shape.seed for shape in shapes}) == len(shapes)
    assert len({shape.label for shape in shapes}) == len(shapes)
    assert [shape.padding for shape in shapes].count(True) == masked
    for shape in shapes:
        assert shape.sizes.keys() == sizes.keys()
        for axis, size in shape.sizes.items():
            low, high = limits[axis]
            assert low <= size
            assert high is None or size <= high
        if movable:
            assert dict(shape.sizes) != sizes
    for axis in sizes:
        found = {shape.sizes[axis] for shape in shapes}
        # With two sizes and no other axis to move, one of the two is the traced shape itself.
        if can_move(limits[axis], 3) or (can_move(limits[axis]) and len(movable) > 1):
            assert len(found) >= 2, axis
        if axis in IMAGE and (can_move(limits[axis], 3) or (limits[axis][0] % 32 and movable != [axis])):
            assert any(size % 32 for size in found), axis


def sizes_of(shapes: tuple[CheckShape, ...], label: str) -> dict[str, int]:
    return next(dict(shape.sizes) for shape in shapes if shape.label == label)


def test_text_is_checked_at_one_row_odd_small_long_and_padded() -> None:
    shapes = check_shapes(
        {"batch_size": 2, "sequence_length": 16}, {"batch_size": (1, None), "sequence_length": (1, 128)}, masked=True
    )
    assert sizes_of(shapes, "one row") == {"batch_size": 1, "sequence_length": 13}
    assert sizes_of(shapes, "smallest sizes") == {"batch_size": 1, "sequence_length": 1}
    assert sizes_of(shapes, "large sizes")["sequence_length"] > 2 * 16
    padded = next(shape for shape in shapes if shape.padding)
    assert padded.sizes["batch_size"] > 1
    assert padded.sizes["sequence_length"] >= 3  # shorter rows are not padded


def test_what_takes_seconds_a_row_is_not_run_at_the_same_sizes_again_and_again() -> None:
    def found(**sizes: int) -> list[dict[str, int]]:
        limits = dict.fromkeys(sizes, (1, None))
        return [dict(s.sizes) for s in check_shapes(sizes, limits, masked=False, row_elements=3 * 1024**2)]

    # As many as a verdict needs.
    assert found(batch_size=2) == [{"batch_size": 1}, {"batch_size": 1}, {"batch_size": 1}, {"batch_size": 3}]
    # Where something else tells them apart, none is left out.
    assert len(found(batch_size=2, height=1024)) == 5


@pytest.mark.parametrize(("most", "length"), [(None, 300), (512, 300), (128, 128), (41, None)])
def test_a_text_is_as_long_as_several_chunks_once(most: int | None, length: int | None) -> None:
    sizes = {"batch_size": 2, "sequence_length": 16, "past_sequence_length": 8, "height": 32}
    shapes = check_shapes(sizes, {"sequence_length": (1, most), "past_sequence_length": (0, None)}, masked=True)
    found = [shape for shape in shapes if shape.label == "a long text"]
    assert [shape.sizes["sequence_length"] for shape in found] == ([] if length is None else [length])
    assert all(shape.sizes["batch_size"] == 1 and shape.sizes["height"] == 32 for shape in found)


def test_a_graph_that_was_proven_with_other_weights_is_compared_at_all_but_the_long_text() -> None:
    sizes, ranges = {"batch_size": 2, "sequence_length": 16}, {"sequence_length": (1, 512)}
    whole = check_shapes(sizes, ranges, masked=True)
    assert [s for s in whole if s.label != "a long text"] == list(check_shapes(sizes, ranges, masked=True, proven=True))
    assert len(whole) == 7


@pytest.mark.parametrize(
    "traced", [{"height": 224, "width": 224}, {"height": 96, "width": 128}, {"height": 32, "width": 32}]
)
def test_an_image_model_that_takes_multiples_of_32_only_still_has_four_shapes(traced: dict[str, int]) -> None:
    shapes = check_shapes({"batch_size": 2, **traced}, {"height": (32, None), "width": (32, None)}, masked=False)
    whole = [s for s in shapes if s.sizes["height"] % 32 == s.sizes["width"] % 32 == 0]
    assert len(whole) == 4
    assert len({s.sizes["height"] for s in whole}) >= 2


def test_two_batches_of_one_model_differ() -> None:
    shapes = check_shapes({"image_batch_size": 3, "text_batch_size": 2}, {}, masked=False)
    assert any(shape.sizes["image_batch_size"] != shape.sizes["text_batch_size"] for shape in shapes)


def test_without_dynamic_axes_only_values_differ() -> None:
    assert [dict(shape.sizes) for shape in check_shapes({}, {}, masked=False)] == [{}] * 4
    assert [shape.padding for shape in check_shapes({}, {}, masked=True)] == [False] * 4 + [True]


def test_rows_that_come_in_groups_are_compared_in_several_numbers_of_groups() -> None:
    shapes = check_shapes({"batch_size": 16}, {"batch_size": (8, None)}, steps={"batch_size": 8}, masked=False)
    assert {s.sizes["batch_size"] for s in shapes} >= {8, 24, 32, 40}
    assert all(s.sizes["batch_size"] % 8 == 0 for s in shapes)


def test_of_large_images_batches_are_small() -> None:
    limits = {"batch_size": (1, None)}
    plain, large = (
        [s.sizes["batch_size"] for s in check_shapes({"batch_size": 2}, limits, masked=False, row_elements=elements)]
        for elements in (3 * 224**2, 3 * 1024**2)
    )
    assert (max(plain), sorted(large)) == (5, [1, 1, 1, 3])


def test_a_text_is_begun_and_gone_on_with() -> None:
    sizes = {"batch_size": 2, "sequence_length": 16, "past_sequence_length": 8}
    limits = {"batch_size": (1, None), "sequence_length": (1, 40), "past_sequence_length": (0, None)}
    found = {s.label: s for s in check_shapes(sizes, limits, masked=True)}
    assert found["nothing before"].sizes["past_sequence_length"] == 0
    assert found["nothing before"].sizes["sequence_length"] > 1
    # Then transformers makes no mask at all.
    alone = found["nothing before, nothing hidden"]
    assert (alone.sizes["past_sequence_length"], alone.padding) == (0, False)
    assert alone.sizes["sequence_length"] > 1
    assert found["one token after many"].sizes["past_sequence_length"] == 33
    assert found["one token after many"].sizes["sequence_length"] == 1
    assert all(s.sizes["past_sequence_length"] + s.sizes["sequence_length"] <= 40 for s in found.values())
    assert "past_sequence_length" not in check_shapes({"batch_size": 2}, {}, masked=True)[0].sizes


@pytest.mark.parametrize("past", [{}, {"past_sequence_length": 8}], ids=["states-alone", "beside-keys"])
def test_a_model_with_states_begins_texts_of_all_sizes_and_goes_on_with_some(past: dict[str, int]) -> None:
    sizes = {"batch_size": 2, "sequence_length": 16, **past}
    limits = {axis: (0 if axis in past else 1, None) for axis in sizes}
    found = check_shapes(sizes, limits, masked=True, states=True)
    begun, going_on = ([s for s in found if s.begins is begins] for begins in (True, False))
    assert (len(begun), len(going_on)) == (7, 3)
    assert {s.sizes["sequence_length"] for s in begun} >= {1, 41, 300}
    assert {s.sizes["sequence_length"] for s in going_on} == {1, 5}
    assert {s.sizes["batch_size"] for s in going_on} == {1, 2, 3}
    assert len({s.seed for s in found}) == len({s.label for s in found}) == 10
    if past:
        assert {s.sizes["past_sequence_length"] for s in begun} == {0}
        assert all(s.sizes["past_sequence_length"] > 0 for s in going_on)


def test_what_is_picked_is_compared_with_nothing_picked() -> None:
    limits: dict[str, tuple[int, int | None]] = {"batch_size": (1, None), "sequence_length": (1, 512)}
    sizes = {"batch_size": 2, "sequence_length": 16}
    shapes = check_shapes(sizes, limits, masked=True, chooses=True)
    none = [shape for shape in shapes if not shape.chosen]
    assert len({shape.sizes["sequence_length"] for shape in none}) == 2
    assert shapes[: -len(none)] == check_shapes(sizes, limits, masked=True)
