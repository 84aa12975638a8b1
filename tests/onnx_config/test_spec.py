"""Specs: resolving axes, and JSON there and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_config.errors import ModelError
from onnx_config.spec import ModelSpec, TensorSpec

names = st.text("abcdefgh_", min_size=1, max_size=8)
tensors = st.builds(
    TensorSpec,
    name=names,
    dtype=st.sampled_from(["int64", "float32", "bool"]),
    shape=st.lists(st.integers(1, 99) | names, max_size=4).map(tuple),
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
    cache=st.lists(tensors, max_size=2).map(tuple),
    declared=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    proven=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    assumed=st.lists(st.text(max_size=9), max_size=2).map(tuple),
)


@given(specs)
def test_a_spec_comes_back_from_json_as_it_was(spec):
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(tensors)
def test_resolving_replaces_exactly_the_dynamic_axes(tensor):
    resolved = tensor.resolve(dict.fromkeys(tensor.axes.values(), 7))
    assert resolved == tuple(7 if i in tensor.axes else size for i, size in enumerate(tensor.shape))


def test_resolving_names_the_axes_without_a_size():
    tensor = TensorSpec(name="pixel_values", dtype="float32", shape=("batch_size", 3, "height", "width"))
    with pytest.raises(ModelError, match=r"pixel_values: no size for \['height', 'width'\]"):
        tensor.resolve({"batch_size": 1})


@pytest.mark.parametrize(("parameters", "expected"), [(None, None), (0, 0), (25, 100)])
def test_the_size_of_the_weights(parameters, expected):
    spec = ModelSpec.from_json(
        {
            "model_type": "bert", "task": "t", "task_family": "t", "architecture": "A", "inputs": [], "outputs": [],
            "axis_ranges": {}, "sizes": {}, "preprocessor": None, "parameters": parameters, "cache": [],
            "declared": [], "proven": [], "assumed": [],
        }
    )  # fmt: skip
    assert spec.size_bytes == expected
