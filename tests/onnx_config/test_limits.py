"""A graph that holds up to a size or from it on refuses what is beyond, by itself, whatever optimisers do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest

from onnx_config.export import simplify as simplify_module
from onnx_config.export.graph_file import read_graph, summarize, write_graph
from onnx_config.export.limits import AxisLimit, limit_axis, limits_in
from onnx_config.export.session import open_session, refuses
from onnx_config.export.simplify import simplify_file
from onnx_config.spec import TensorSpec
from tests.onnx_config.converted import Converted

LIMIT = AxisLimit(axis="sequence_length", most=8)
FLOOR = AxisLimit(axis="sequence_length", least=8)
LIMITS = [pytest.param(LIMIT, id="most"), pytest.param(FLOOR, id="least")]


def limited(folder: Path, *, shape: tuple[int | str, ...], limit: AxisLimit = LIMIT) -> Path:
    """A graph that doubles what it is given, up to the limit; its axes are named, its first input is not used."""
    given = {
        name: onnx_ir.Value(name=name, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(shape))
        for name in ("unused", "x")
    }
    doubled = onnx_ir.node("Add", [given["x"], given["x"]], name="double")
    doubled.outputs[0].name, doubled.outputs[0].type = "y", given["x"].type
    doubled.outputs[0].shape = onnx_ir.Shape(shape)
    graph = onnx_ir.Graph(
        list(given.values()), [doubled.outputs[0]], nodes=[doubled], opset_imports={"": 20}, name="doubling"
    )
    model = onnx_ir.Model(graph, ir_version=10)
    limit_axis(model, limit, [TensorSpec(name=name, dtype="float32", shape=shape) for name in given])
    write_graph(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(("batch_size", "sequence_length"), id="last"),
        pytest.param(("sequence_length", "batch_size"), id="first"),
        pytest.param(("batch_size", "sequence_length", 3), id="middle"),
        pytest.param(("sequence_length",), id="only"),
    ],
)
@pytest.mark.parametrize("simplified", [pytest.param(False, id="plain"), pytest.param(True, id="simplified")])
@pytest.mark.parametrize("limit", LIMITS)
def test_up_to_the_limit_nothing_changes_and_beyond_nothing_comes_out(
    shape: tuple[int | str, ...], simplified: bool, limit: AxisLimit, tmp_path: Path
) -> None:
    path = limited(tmp_path, shape=shape, limit=limit)
    if simplified:
        result = simplify_file(path)
        assert result.reason is None
        assert result.model is not None
        write_graph(result.model, path)
    assert limits_in(read_graph(path)) == summarize(read_graph(path)).limits == (limit,)
    session = open_session(path, device="cpu")
    for size in (0, 1, 2, 7, 8, 9, 16, 800):
        sizes = {"batch_size": 2, "sequence_length": size}
        x = np.random.default_rng(0).standard_normal([sizes.get(str(axis), axis) for axis in shape])
        feed = {"unused": x.astype(np.float32), "x": x.astype(np.float32)}
        if size > 8 if limit is LIMIT else size < 8:
            with pytest.raises(Exception, match=rf"'{limit.node}'.*invalid expand shape"):
                session.run(None, feed)
            assert refuses(session, feed, by=limit.node)
            assert not refuses(session, feed, by="another node")
        else:
            np.testing.assert_array_equal(session.run(None, feed)[0], 2 * feed["x"])
            assert not refuses(session, feed, by=limit.node)


def test_an_axis_that_no_input_has_cannot_be_limited(bert: Converted) -> None:
    graph = read_graph(bert.stored)
    with pytest.raises(ValueError, match="no input that the graph uses has the axis height"):
        limit_axis(graph, AxisLimit(axis="height", most=64), bert.spec.inputs)
    assert limits_in(graph) == ()


def test_a_simplified_graph_without_its_limit_gives_way_to_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = limited(tmp_path, shape=("batch_size", "sequence_length"))

    def forgetful(model: onnx_ir.Model, plain: onnx_ir.Model) -> None:
        (node,) = (node for node in model.graph if node.name == LIMIT.node)
        node.name = "expand"

    monkeypatch.setattr(simplify_module, "_restore_signature", forgetful)
    result = simplify_file(path)
    assert result.model is None
    assert result.reason == "onnxsim took out what refuses sizes beyond the graph's limits"


@pytest.mark.parametrize("limit", LIMITS)
def test_the_limit_survives_every_optimisation_of_onnx_runtime(limit: AxisLimit, tmp_path: Path) -> None:
    path = limited(tmp_path, shape=("batch_size", "sequence_length"), limit=limit)
    levels: Any = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        beyond = np.zeros((2, limit.beyond), np.float32)
        assert refuses(session, {"unused": beyond, "x": beyond}, by=limit.node)
