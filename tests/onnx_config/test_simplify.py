"""onnxsim's graph is taken where it is better and takes and gives the same; else the plain one, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxsim
import pytest
from onnx import TensorProto, helper

from onnx_config.errors import ModelError
from onnx_config.export import steps
from onnx_config.export.graph_file import read_graph, summarize
from onnx_config.export.simplify import simplify_file
from tests.onnx_config.converted import CERTIFICATE, Converted, edited

Change = Callable[[onnx.ModelProto], object]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_simplified_graph_is_smaller_and_takes_and_gives_the_same(name: str, request: pytest.FixtureRequest) -> None:
    converted: Converted = request.getfixturevalue(name)
    before, after = summarize(read_graph(converted.traced)), summarize(read_graph(converted.stored))
    assert after.nodes < before.nodes
    assert (after.inputs, after.outputs, after.opset) == (before.inputs, before.outputs, before.opset)
    assert (converted.simplified["simplified"], converted.simplified["reason"]) == (True, None)
    assert converted.simplified["nodes_before"] == before.nodes
    assert converted.simplified["operators_before"] == before.operators
    assert sum(after.operators.values()) == after.nodes
    assert converted.simplified["graph"]["nodes"] == after.nodes


def test_the_file_that_was_simplified_stays_as_it_is(bert: Converted) -> None:
    before = bert.traced.read_bytes()
    assert simplify_file(bert.traced).model is not None
    assert bert.traced.read_bytes() == before


def test_the_plain_graph_is_written_when_asked_for(bert: Converted, tmp_path: Path) -> None:
    output = tmp_path / "model.onnx"
    answer = steps.simplify(
        {"graph": str(bert.traced), "output": str(output), "metadata": CERTIFICATE, "simplify": False}
    )
    assert (answer["simplified"], answer["reason"]) == (False, None)
    assert answer["graph"]["nodes"] == answer["nodes_before"] == len(onnx.load(str(output)).graph.node)
    assert bert.parity(output)["outcome"] == "verified"


def raising(model: onnx.ModelProto) -> None:
    raise RuntimeError("shape inference\nfailed")


_ADDED = 30


def growing(model: onnx.ModelProto) -> None:
    for i in range(_ADDED):
        model.graph.node.append(helper.make_node("Neg", ["last_hidden_state"], [f"more_{i}"]))


def losing_an_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def swapping_outputs(model: onnx.ModelProto) -> None:
    first, second = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([second, first])


def losing_an_input(model: onnx.ModelProto) -> None:
    del model.graph.input[1]


def narrowing_an_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def widening_an_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(raising, "onnxsim failed with RuntimeError: shape inference failed", id="raises"),
        pytest.param(growing, "onnxsim made {more} nodes of {before}", id="grows"),
        pytest.param(losing_an_output, "onnxsim changed the outputs", id="loses-an-output"),
        pytest.param(swapping_outputs, "onnxsim changed the outputs", id="swaps-outputs"),
        pytest.param(widening_an_output, "onnxsim changed the outputs", id="another-output-type"),
        pytest.param(losing_an_input, "onnxsim changed the inputs", id="loses-an-input"),
        pytest.param(narrowing_an_input, "onnxsim changed the inputs", id="another-input-type"),
    ],
)
def test_a_worse_graph_gives_way_to_the_plain_one(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, reason: str
) -> None:
    def simplify(path: str, **options: Any) -> tuple[onnx.ModelProto, bool]:
        model = onnx.load(str(bert.stored))
        change(model)
        return model, True

    monkeypatch.setattr(onnxsim, "simplify", simplify)
    output = tmp_path / "model.onnx"
    answer = steps.simplify(
        {"graph": str(bert.traced), "output": str(output), "metadata": CERTIFICATE, "simplify": True}
    )
    assert (answer["simplified"], answer["graph"]["nodes"]) == (False, answer["nodes_before"])
    before = answer["nodes_before"]
    assert answer["reason"].startswith(
        reason.format(before=before, more=summarize(read_graph(bert.stored)).nodes + _ADDED)
    )
    written = read_graph(output)
    assert summarize(written) == summarize(read_graph(bert.traced))
    assert dict(written.metadata_props) == CERTIFICATE


def test_a_simplified_graph_with_other_numbers_is_left_to_parity(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_a_norm(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]

    wrong = edited(bert.stored, without_a_norm, tmp_path / "wrong.onnx")
    monkeypatch.setattr(onnxsim, "simplify", lambda path, **options: (onnx.load(str(wrong)), True))
    output = tmp_path / "model.onnx"
    request = {"graph": str(bert.traced), "output": str(output), "metadata": {}}
    assert steps.simplify({**request, "simplify": True})["simplified"]
    assert bert.parity(output)["outcome"] == "mismatch"
    steps.simplify({**request, "simplify": False})
    assert bert.parity(output)["outcome"] == "verified"


def test_axes_get_their_names_back(bert: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    def simplify(path: str, **options: Any) -> tuple[onnx.ModelProto, bool]:
        model = onnx.load(str(bert.stored))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "unk__0"
        return model, True

    monkeypatch.setattr(onnxsim, "simplify", simplify)
    result = simplify_file(bert.traced)
    assert result.model is not None
    assert (result.after.inputs, result.after.outputs) == (result.before.inputs, result.before.outputs)


def test_a_small_graph_is_made_smaller_and_runs(tmp_path: Path) -> None:
    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("MatMul", ["same", "w"], ["y"])]
    weights = onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    graph = helper.make_graph(nodes, "g", [value("x", "batch_size", 3)], [value("y", "batch_size", 2)], [weights])
    path = tmp_path / "plain.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    result = simplify_file(path)
    assert result.model is not None
    assert (result.before.nodes, result.after.nodes) == (2, 1)
    onnx_ir.save(result.model, str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert np.asarray(session.run(None, {"x": np.ones((1, 3), np.float32)})[0]).tolist() == [[3, 3]]


def test_what_is_no_graph_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plain.onnx").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="is no ONNX graph"):
        simplify_file(tmp_path / "plain.onnx")
