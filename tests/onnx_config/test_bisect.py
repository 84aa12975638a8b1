"""Where a graph parts from another run of itself, or from the model's modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_config import UniversalOnnxConfig
from onnx_config.export.bisect import first_module_apart, first_node_apart
from onnx_config.export.checkpoint import load_model
from onnx_config.export.failure_case import CASE_FILE, SCRIPT_FILE
from tests.onnx_config.converted import Converted, edited

ROUNDS = 12


def chain(path: Path, *, at: int, adds: str) -> Path:
    """Write a graph of ``ROUNDS`` additions, the one ``at`` of which adds ``adds``."""
    nodes = [
        helper.make_node("Add", [f"x{n}", adds if n == at else "one"], [f"x{n + 1}"], f"n{n}") for n in range(ROUNDS)
    ]
    value = helper.make_tensor_value_info
    inputs = [value("x0", TensorProto.FLOAT, [2]), value("other", TensorProto.FLOAT, [2])]
    one = numpy_helper.from_array(np.float32([1, 1]), "one")
    graph = helper.make_graph(nodes, "chain", inputs, [value(f"x{ROUNDS}", TensorProto.FLOAT, [2])], [one])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def test_two_runs_of_one_graph_are_nowhere_apart(bert: Converted) -> None:
    inputs = UniversalOnnxConfig.from_model_path(bert.source).generate_dummy_inputs(framework="np")
    usual, other = {"device": "cpu", "level": "disable"}, {"device": "cpu", "level": "all"}
    assert first_node_apart(bert.stored, inputs, usual=usual, other=other) is None


@pytest.mark.parametrize("at", [0, 5, ROUNDS - 1])
def test_the_first_node_apart_is_found_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    from onnx_config.export import session

    right, wrong = (
        chain(tmp_path / "right.onnx", at=at, adds="one"),
        chain(tmp_path / "wrong.onnx", at=at, adds="other"),
    )
    asked = []
    open_session = session.open_session

    def other_graph(path: Path, *, wrongly: bool = False, graph: bytes | None = None, **how: object) -> object:
        asked.append(wrongly)
        model = onnx.load_from_string(graph or b"")
        if wrongly:
            model.graph.node[at].CopyFrom(onnx.load(str(wrong)).graph.node[at])
        return open_session(path, graph=model.SerializeToString(), device="cpu")

    monkeypatch.setattr(session, "open_session", other_graph)
    inputs = {"x0": np.float32([1, 2]), "other": np.float32([5, 5])}
    found = first_node_apart(right, inputs, usual={}, other={"wrongly": True})
    assert found is not None
    assert (found.node, found.operator, found.value, found.max_abs_diff) == (f"n{at}", "Add", f"x{at + 1}", 4.0)
    assert len(asked) <= 2 * 4


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_module_apart_is_named(bert: Converted, tmp_path: Path, layer: int) -> None:
    def change(model: onnx.ModelProto) -> None:
        weight = next(i for i in model.graph.initializer if f"layer.{layer}.intermediate.dense.bias" in i.name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(0.5), weight.name))

    universal = UniversalOnnxConfig.from_model_path(bert.source)
    model = load_model(universal.model_class, universal.config, bert.source)
    inputs = universal.generate_dummy_inputs(framework="np")
    graph = edited(bert.stored, change, tmp_path / "model.onnx")
    found = first_module_apart(graph, model, inputs, flags={})
    assert found is not None
    assert found.module == f"encoder.layer.{layer}.intermediate.dense"
    assert first_module_apart(bert.stored, model, inputs, flags={}) is None


def test_a_failure_leaves_what_shows_it_again(bert: Converted, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        bias = next(i for i in model.graph.initializer if "pooler.dense.bias" in i.name)
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), bias.name))

    graph = edited(bert.stored, change, tmp_path / "model.onnx")
    result = bert.parity(graph, case=str(tmp_path / "case"), bisect=True)
    assert result["outcome"] == "mismatch"
    assert any("the module pooler.dense" in note for note in result["notes"]), result["notes"]
    case = json.loads((tmp_path / "case" / CASE_FILE).read_text())
    assert (case["graph"], case["shape"], case["optimization"]) == (str(graph), "one row", "all")
    for shown, code in ((graph, 1), (bert.stored, 0)):
        run = subprocess.run(
            [sys.executable, tmp_path / "case" / SCRIPT_FILE, shown], capture_output=True, text=True, check=False
        )
        assert run.returncode == code, run.stderr
        assert "pooler_output: differs by" in run.stdout
