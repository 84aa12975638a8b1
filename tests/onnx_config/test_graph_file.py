"""``.onnx`` files: where the weights go, what they say of their origin, what is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export import graph_file
from onnx_config.export.graph_file import read_graph, summarize, write_graph
from tests.onnx_config.converted import CERTIFICATE, Converted


def answers(path: Path) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.arange(12, dtype=np.int64).reshape(3, 4) + 7
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return [np.asarray(value) for value in session.run(None, feed)]


def test_weights_within_the_limit_stay_inside(bert: Converted) -> None:
    assert [path.name for path in bert.stored.parent.iterdir()] == ["model.onnx"]
    assert not any(tensor.external_data for tensor in onnx.load(str(bert.stored)).graph.initializer)


def test_weights_beyond_the_limit_go_to_a_file_beside_it(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_file, "EMBED_LIMIT_BYTES", 10_000)
    path = tmp_path / "model.onnx"
    written = write_graph(read_graph(bert.stored), path, metadata={})
    assert written == (path, tmp_path / "model.onnx_data")
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}
    assert path.stat().st_size < bert.stored.stat().st_size / 2
    assert all(np.array_equal(a, b) for a, b in zip(answers(path), answers(bert.stored), strict=True))
    # It is read from there, and can be written back into one file.
    monkeypatch.undo()
    again = tmp_path / "again"
    again.mkdir()
    assert write_graph(read_graph(path), again / "model.onnx") == (again / "model.onnx",)
    assert all(np.array_equal(a, b) for a, b in zip(answers(again / "model.onnx"), answers(path), strict=True))


def test_the_limit_is_inclusive(bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_graph(bert.stored)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    for limit, files in ((size, 1), (size - 1, 2)):
        monkeypatch.setattr(graph_file, "EMBED_LIMIT_BYTES", limit)
        assert len(write_graph(model, tmp_path / f"{limit}.onnx")) == files


@pytest.mark.parametrize("name", ["stored", "traced"])
def test_a_written_graph_says_where_it_is_from_and_nothing_else(bert: Converted, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.onnx"
    write_graph(read_graph(getattr(bert, name)), path, metadata=CERTIFICATE)
    model = onnx.load(str(path))
    assert {entry.key: entry.value for entry in model.metadata_props} == CERTIFICATE
    assert not model.graph.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(bert.source).encode() not in content


def test_without_a_certificate_the_origins_are_kept(bert: Converted, tmp_path: Path) -> None:
    write_graph(read_graph(bert.stored), tmp_path / "model.onnx")
    assert dict(read_graph(tmp_path / "model.onnx").metadata_props) == CERTIFICATE


def test_the_stored_graph_has_its_certificate(bert: Converted) -> None:
    assert dict(read_graph(bert.stored).metadata_props) == CERTIFICATE


def branching() -> onnx.ModelProto:
    """Return a graph of one ``If`` whose branches have one and two nodes."""
    one = helper.make_node("Relu", ["x"], ["a"])
    two = [helper.make_node("Neg", ["x"], ["b"]), helper.make_node("Abs", ["b"], ["c"])]

    def output(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    branch = helper.make_node(
        "If",
        ["condition"],
        ["y"],
        then_branch=helper.make_graph([one], "then", [], [output("a", "n", 3)]),
        else_branch=helper.make_graph(two, "else", [], [output("c", "n", 3)]),
    )
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    graph = helper.make_graph([branch], "g", [condition, output("x", "n", 3)], [output("y", "n", 3)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_a_summary_counts_the_nodes_of_branches() -> None:
    summary = summarize(onnx_ir.from_proto(branching()))
    assert (summary.nodes, summary.opset) == (4, 19)
    assert summary.operators == {"Abs": 1, "If": 1, "Neg": 1, "Relu": 1}
    assert [(t.name, t.dtype, t.shape) for t in summary.inputs] == [
        ("condition", "bool", ()),
        ("x", "float32", ("n", 3)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in summary.outputs] == [("y", "float32", ("n", 3))]


def test_an_axis_without_a_name_gets_one() -> None:
    output = helper.make_tensor_value_info("a.b", TensorProto.INT64, [None, 2])
    node = helper.make_node("Identity", ["x"], ["a.b"])
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 2])], [output])
    assert summarize(onnx_ir.from_proto(helper.make_model(graph))).outputs[0].shape == ("a_b_dim_0", 2)


@pytest.mark.parametrize("content", [b"\xff\xff\xff", b"<html>"], ids=["noise", "a-web-page"])
def test_a_file_that_is_no_graph_is_said_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="is no ONNX graph") as caught:
        read_graph(tmp_path / "model.onnx")
    assert caught.value.kind is ErrorKind.RUNTIME_FAILED
    with pytest.raises(FileNotFoundError):
        read_graph(tmp_path / "none.onnx")


def test_weights_of_branches_count_for_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = branching()
    then = next(attribute.g for attribute in model.graph.node[0].attribute if attribute.name == "then_branch")
    then.initializer.append(numpy_helper.from_array(np.ones((100, 3), np.float32), "w"))
    then.node[0].op_type = "Add"
    then.node[0].input.append("w")
    monkeypatch.setattr(graph_file, "EMBED_LIMIT_BYTES", 1199)
    _, data = write_graph(onnx_ir.from_proto(model), tmp_path / "model.onnx")
    assert data.stat().st_size >= 1200
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"condition": np.array(True), "x": np.zeros((100, 3), np.float32)}
    assert np.array_equal(np.asarray(session.run(None, feed)[0]), np.ones((100, 3)))


def test_shapes_between_inputs_and_outputs_are_for_the_runtime_to_infer(bert: Converted) -> None:
    graph = onnx.load(str(bert.stored)).graph
    weights = {tensor.name for tensor in graph.initializer}
    between = [value for value in graph.value_info if value.name not in weights]
    assert not any(value.type.tensor_type.HasField("shape") for value in between)
    assert all(value.type.tensor_type.HasField("shape") for value in (*graph.input, *graph.output))
