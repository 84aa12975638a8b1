"""A model that decides by the values of its inputs is traced with either decision, and its graph asks what it asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper

from onnx_config.errors import ModelError
from onnx_config.export import escapes, symbolic
from onnx_config.export.decisions import by_decision
from onnx_config.export.escapes import escapes_of
from onnx_config.export.sample import Sample, trace_sample
from onnx_config.export.ties import TieWatch
from onnx_config.export.trace import Trace
from onnx_config.spec import ModelSpec, TensorSpec
from tests.onnx_config.test_trace import Small, run


class Deciding(Small):
    """Takes one way or the other, as its inputs are, and asks that twice; a third question is always answered alike."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shifted = x * self.scale + 1
        for weight in (self.scale, 3 * self.scale):
            if bool((shifted > 20).any()):
                shifted = shifted.flip(-1) * weight
        if (x < -1000).any():
            shifted = shifted * 0
        return {"y": shifted}


class Wavering(Small):
    """Decides twice, and not alike."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * self.scale
        for edge in (50, 70):
            if (x > edge).any():
                y = y + edge
        return {"y": y}


def feed(rows: int, *, large: bool, edge: float = 60.0) -> dict[str, torch.Tensor]:
    x = torch.rand(rows, 4, generator=torch.Generator().manual_seed(rows))
    if large:
        x[-1, 1] = edge
    return {"x": x}


def in_both_ways(model: Any, feeds: Sequence[Mapping[str, torch.Tensor]], beside: Sequence[Any] = ()) -> Trace:
    tensor = TensorSpec(name="x", dtype="float32", shape=("batch_size", 4))
    output = TensorSpec(name="y", dtype="float32", shape=("batch_size", 4))
    spec = ModelSpec(
        model_type="small", task="custom", task_family="custom", architecture="Small", inputs=(tensor,),
        outputs=(output,), axis_ranges={"batch_size": (1, None)}, sizes={"batch_size": 2}, preprocessor=None,
        parameters=None,
    )  # fmt: skip
    sample = Sample(sizes=spec.sizes, inputs=feeds[0], returned=("y",), watch=TieWatch(), image_size=None)
    universal = SimpleNamespace(forward_flags={})
    return trace_sample(
        spec,
        universal,
        model,
        sample,
        escapes=lambda _, __: (feeds[0], escapes_of(lambda given: model(**given), feeds, beside=beside)),
        opset=None,
    )


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    monkeypatch.setattr(escapes, "_MODELS", __name__)


SMALL = [feed(rows, large=False) for rows in (2, 3, 1)]
LARGE = [feed(rows, large=True) for rows in (3, 1)]


def test_the_graph_decides_as_the_model_does(tmp_path: Path) -> None:
    model = Deciding()
    result = in_both_ways(model, [*SMALL, *LARGE], beside=[feed(2, large=True)])
    assert [n for n in result.notes if "decides by the values of its inputs as the model does" in n]
    # Weights of both ways are there once.
    assert [name for name in result.model.graph.initializers if name.endswith("scale")] == ["as_asked/scale"]
    for given in (*SMALL, *LARGE, feed(5, large=True), feed(5, large=False)):
        got = run(result, tmp_path / "model.onnx", **given)["y"]
        torch.testing.assert_close(torch.from_numpy(got), model(**given)["y"].detach())
    # What is taken for granted is refused as ever, whichever way is taken.
    for large in (False, True):
        odd = feed(3, large=large)
        odd["x"][0, 0] = -2000
        with pytest.raises(Exception, match="is_taken_to_find"):
            run(result, tmp_path / "model.onnx", **odd)


def test_what_decides_in_neither_of_the_ways_is_refused(tmp_path: Path) -> None:
    model = Wavering()
    result = in_both_ways(
        model, [*SMALL, *(feed(r, large=True, edge=80) for r in (3, 1))], beside=[feed(2, large=True, edge=80)]
    )
    for given in (feed(2, large=False), feed(4, large=True, edge=90)):
        got = run(result, tmp_path / "model.onnx", **given)["y"]
        torch.testing.assert_close(torch.from_numpy(got), model(**given)["y"].detach())
    with pytest.raises(Exception, match="is_taken_to_find"):
        run(result, tmp_path / "model.onnx", **feed(3, large=True, edge=60))


@pytest.mark.parametrize(
    ("feeds", "beside"),
    [
        pytest.param([*SMALL, *LARGE], [], id="none-of-the-traced-sizes"),
        pytest.param([*SMALL, LARGE[0]], [feed(2, large=True)], id="compared-once"),
        pytest.param([feed(2, large=False), *LARGE], [feed(2, large=True)], id="the-traced-decision-is-not-compared"),
    ],
)
def test_a_decision_that_too_few_inputs_show_is_none_to_take(feeds: Any, beside: Any) -> None:
    with pytest.raises(ModelError, match=r"decides by the values of its inputs \(test_decisions.py:\d+\)"):
        in_both_ways(Deciding(), feeds, beside)


def test_what_a_question_needs_of_a_loop_is_computed_ahead() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "twice"], ["next"]), helper.make_node("Identity", ["going"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, ["n"]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n"]),
        ],
    )
    asking = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Constant", [], ["times"], value_int=3),
        helper.make_node("Constant", [], ["true"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True])),
        helper.make_node("Loop", ["times", "true", "x"], ["sum"], body=body),
        helper.make_node("ReduceMax", ["sum"], ["largest"], keepdims=0),
        helper.make_node("Constant", [], ["edge"], value_float=70.0),
        helper.make_node("Greater", ["largest", "edge"], ["asked"]),
        helper.make_node("Neg", ["twice"], ["y"]),
    ]
    first, second = (
        graph(nodes, outputs)
        for nodes, outputs in ((asking, ["y", "asked"]), ([helper.make_node("Abs", ["x"], ["y"])], ["y"]))
    )
    model = by_decision(first, second, "asked")
    (chosen,) = (node for node in model.graph if node.op_type == "If")
    assert [node.op_type for node in chosen.attributes["then_branch"].as_graph()] == ["Neg", "Identity"]
    for values, wanted in (([1.0, -9.0], [1.0, 9.0]), ([11.0, 1.0], [-22.0, -2.0])):
        assert answer(model, values) == wanted
    with pytest.raises(ValueError, match="does not tell asked"):
        by_decision(graph(asking[:1], ["twice"]), second, "asked")


def graph(nodes: list[Any], outputs: list[str]) -> onnx_ir.Model:
    types: dict[str, tuple[int, list[str]]] = {"asked": (TensorProto.BOOL, [])}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(name, *types.get(name, (TensorProto.FLOAT, ["n"]))) for name in outputs],
    )
    return onnx_ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def answer(model: onnx_ir.Model, values: list[float]) -> list[float]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["y"], {"x": np.array(values, np.float32)})
    return [float(value) for value in found]
