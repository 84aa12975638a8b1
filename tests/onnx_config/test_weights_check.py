"""Numbers that no comparison of outputs reaches are compared one by one; what a graph made of others is not accused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from onnx_config import UniversalOnnxConfig
from onnx_config.export.checkpoint import load_model
from onnx_config.export.weights_check import weight_difference
from tests.onnx_config.converted import Converted, edited


@pytest.fixture(scope="module")
def model(bert: Converted) -> Any:
    universal = UniversalOnnxConfig.from_model_path(bert.source)
    return load_model(universal.model_class, universal.config, bert.source)


def table(model: onnx.ModelProto) -> Any:
    """Return the embedding of tokens."""
    return next(i for i in model.graph.initializer if "word_embeddings" in i.name)


def changed(change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        tensor = table(model)
        array = numpy_helper.to_array(tensor).copy()
        array = change(array)
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))

    return apply


def one_off(array: Any) -> Any:
    array[-1, 3] *= 1.001
    return array


def rows_swapped(array: Any) -> Any:
    array[[-1, -2]] = array[[-2, -1]]
    return array


def row_lost(array: Any) -> Any:
    array[-1] = 0
    return array


@pytest.mark.parametrize(("change", "wrong"), [(one_off, 1), (rows_swapped, 64), (row_lost, 32)])
def test_a_number_that_no_input_reaches_is_found(
    bert: Converted, model: Any, tmp_path: Path, change: Any, wrong: int
) -> None:
    graph = edited(bert.stored, changed(change), tmp_path / "model.onnx")
    found = weight_difference(graph, model)
    assert found is not None
    assert f"word_embeddings.weight but for {wrong} of" in found
    assert bert.parity(graph)["outcome"] == "mismatch"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda array: array, id="as-it-is"),
        pytest.param(lambda array: array * 2, id="scaled"),
        pytest.param(lambda array: array + 1e-6, id="all-moved"),
    ],
)
def test_what_is_no_parameter_as_it_stands_is_not_accused(
    bert: Converted, model: Any, tmp_path: Path, change: Any
) -> None:
    assert weight_difference(edited(bert.stored, changed(change), tmp_path / "model.onnx"), model) is None


def test_a_model_that_is_float64_by_now_is_the_same(bert: Converted) -> None:
    universal = UniversalOnnxConfig.from_model_path(bert.source)
    doubled = load_model(universal.model_class, universal.config, bert.source).double()
    assert next(doubled.parameters()).dtype is torch.float64
    assert weight_difference(bert.stored, doubled) is None
