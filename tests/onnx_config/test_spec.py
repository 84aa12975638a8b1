"""Specs: resolving axes, and JSON there and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_config.errors import ModelError
from onnx_config.spec import (
    DecoderCall,
    ImageReader,
    LayeredFeatures,
    ModelSpec,
    PictureRule,
    TensorSpec,
    ValueRule,
    base_axis,
    size_of,
)

names = st.text("abcdefgh_", min_size=1, max_size=8)
tensors = st.builds(
    TensorSpec,
    name=names,
    dtype=st.sampled_from(["int64", "float32", "bool"]),
    shape=st.lists(st.integers(1, 99) | names, max_size=4).map(tuple),
)
rules = st.builds(
    ValueRule,
    below=st.none() | st.integers(1, 9),
    ones=st.none() | st.integers(1, 9),
    sizes=st.lists(st.integers(0, 9) | names, max_size=3).map(tuple),
    tokens=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.none() | names), max_size=2).map(tuple),
    pictures=st.none() | st.builds(PictureRule, sizes=st.just(((8, 16, 3),)), tiles=st.integers(2, 9) | names),
    shares=st.none() | names,
    blanks=st.booleans(),
)
calls = st.builds(
    DecoderCall,
    position_rows=st.none() | st.integers(2, 4),
    handed=st.lists(names, max_size=2).map(tuple),
    layered=st.none() | st.builds(LayeredFeatures, field=names, argument=names, mask=names, count=st.integers(1, 3)),
)
ranges = st.tuples(st.integers(1, 9), st.none() | st.integers(10, 99))
specs = st.builds(
    ModelSpec,
    model_type=names,
    task=names,
    task_family=names,
    architecture=names,
    inputs=st.lists(tensors, max_size=3).map(tuple),
    outputs=st.lists(tensors, max_size=3).map(tuple),
    axis_ranges=st.dictionaries(names, ranges, max_size=3),
    sizes=st.dictionaries(names, st.integers(1, 99), max_size=3),
    preprocessor=st.none() | names,
    parameters=st.none() | st.integers(0, 10**12),
    axis_steps=st.dictionaries(names, st.integers(1, 9), max_size=2),
    values=st.dictionaries(names, rules, max_size=2),
    cache=st.lists(tensors, max_size=2).map(tuple),
    decoder_call=calls,
    declared=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    proven=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    assumed=st.lists(st.text(max_size=9), max_size=2).map(tuple),
)


@given(specs)
def test_a_spec_comes_back_from_json_as_it_was(spec):
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(specs)
def test_how_a_decoder_is_called_stands_beside_the_rest_as_in_files_that_are_there(spec):
    written, call = spec.to_json(), spec.decoder_call
    assert (written["position_rows"], written["handed"]) == (call.position_rows, list(call.handed))
    assert "decoder_call" not in written
    without = {name: value for name, value in written.items() if name not in ("position_rows", "handed", "layered")}
    assert ModelSpec.from_json(without) == replace(spec, decoder_call=DecoderCall())


def test_what_reads_images_comes_back_from_json_too():
    text, encoder = (
        ModelSpec(
            model_type="m",
            task="t",
            task_family="t",
            architecture="M",
            inputs=(),
            outputs=(),
            axis_ranges={},
            sizes={"rows": 2},
            preprocessor=None,
            parameters=None,
            part=part,
        )
        for part in ("model", "vision_encoder")
    )
    spec = replace(text, images=ImageReader(encoder=encoder, token=7, left_out="text only"))
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(tensors)
def test_resolving_replaces_exactly_the_dynamic_axes(tensor):
    resolved = tensor.resolve(dict.fromkeys(tensor.axes.values(), 7))
    assert resolved == tuple(7 if i in tensor.axes else size for i, size in enumerate(tensor.shape))


def test_resolving_names_the_axes_without_a_size():
    tensor = TensorSpec(name="pixel_values", dtype="float32", shape=("batch_size", 3, "height", "width"))
    with pytest.raises(ModelError, match=r"pixel_values: no size for \['height', 'width'\]"):
        tensor.resolve({"batch_size": 1})


@pytest.mark.parametrize(
    ("axis", "base", "size"),
    [
        pytest.param("batch_size", "batch_size", 3, id="plain"),
        pytest.param("4*batch_size", "batch_size", 12, id="multiple"),
        pytest.param("12*height", "height", 60, id="two-digits"),
    ],
)
def test_an_axis_may_be_a_multiple_of_another(axis, base, size):
    assert base_axis(axis) == base
    assert size_of(axis, {"batch_size": 3, "height": 5}) == size


def test_a_fixed_size_is_itself():
    assert size_of(7, {}) == 7


@pytest.mark.parametrize("axis", ["width", "2*width"])
def test_a_size_that_nobody_gave_is_told(axis):
    with pytest.raises(KeyError, match="width"):
        size_of(axis, {"height": 5})
    with pytest.raises(ModelError, match=r"x: no size for \['width'\]"):
        TensorSpec(name="x", dtype="bool", shape=(axis,)).resolve({"height": 5})


@given(st.lists(st.integers(1, 9) | names | st.tuples(st.integers(2, 9), names), max_size=4), st.integers(1, 9))
def test_multiples_resolve_to_multiples_of_one_axis(axes, size):
    shape = tuple(f"{a[0]}*{a[1]}" if isinstance(a, tuple) else a for a in axes)
    tensor = TensorSpec(name="x", dtype="bool", shape=shape)
    bases = {a[1] if isinstance(a, tuple) else a for a in axes if not isinstance(a, int)}
    assert set(tensor.axis_names) == bases
    assert len(tensor.axis_names) == len(bases)
    expected = tuple(a if isinstance(a, int) else size * (a[0] if isinstance(a, tuple) else 1) for a in axes)
    assert tensor.resolve(dict.fromkeys(bases, size)) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param((), [], id="none"),
        pytest.param(((9, 4, None),), [(9, 4)], id="fixed"),
        pytest.param(((9, 4, "num_images"), (8, 1, None)), [(9, 12), (8, 1)], id="for-each-image"),
    ],
)
def test_placeholders_follow_an_axis(tokens, expected):
    assert ValueRule(tokens=tokens).placeholders({"num_images": 3}) == expected


@pytest.mark.parametrize(("parameters", "expected"), [(None, None), (0, 0), (25, 100)])
def test_the_size_of_the_weights(parameters, expected):
    spec = ModelSpec.from_json(
        {
            "model_type": "bert", "task": "t", "task_family": "t", "architecture": "A", "inputs": [], "outputs": [],
            "axis_ranges": {}, "sizes": {}, "preprocessor": None, "parameters": parameters,
            "cache": [], "values": {}, "axis_steps": {},
            "declared": [], "proven": [], "assumed": [],
        }
    )  # fmt: skip
    assert spec.size_bytes == expected
