"""Tracing: axes are named and tied over inputs and outputs, and what could not be traced is said."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export import trace as trace_module
from onnx_config.export.graph_file import summarize, write_graph
from onnx_config.export.graph_names import keep_outputs, name_axes
from onnx_config.export.trace import Trace, trace_model
from onnx_config.spec import TensorSpec
from tests.onnx_config.converted import Converted

OPAQUE = re.compile(r"\b[su]\d+\b|_dim_\d+|unk__")


class SmallConfig(PreTrainedConfig):
    model_type = "small"


class Small(PreTrainedModel):
    """One weight, so that a graph has one."""

    config_class = SmallConfig

    def __init__(self) -> None:
        super().__init__(SmallConfig())
        self.scale = torch.nn.Parameter(torch.tensor([0.5]))
        self.build()
        self.eval()

    def build(self) -> None:
        """Make further weights."""


class Halving(Small):
    """Halves an image, so that its output's axes are formulas."""

    def build(self) -> None:
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(pixel_values) * self.scale
        return {"features": features, "pooled": features.mean((2, 3)), "doubled": torch.cat([features, features], 2)}


class RowByRow(Small):
    """Walks over its rows in Python, which makes their number a part of the graph."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        shared = 0.0 if y is None else y.sum()
        rows = torch.stack([row * self.scale + shared for row in x])
        return {"rows": rows, "first": rows[:, 0], "total": rows.flatten()}


class RowsInOne(Small):
    """Makes one long row of all rows, and shifts nothing from the one to the next."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = [torch.stack([row * self.scale, row.cumsum(0)], dim=-1) for row in x]
        return {"y": torch.cat(rows, dim=0)[None]}


class Tiny(Small):
    """Adds next to nothing, to next to nothing."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.rsqrt(x + 1e-8) * self.scale}


class Stepped(Small):
    """Computes otherwise from nine columns on."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.scale if x.shape[1] <= 8 else x + self.scale}


class Adapting(Small):
    """Keeps the way of computing that the first few columns let it choose."""

    adapted = False

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.adapted and x.shape[1] <= 8:
            self.adapted = True
        return {"y": x * self.scale if self.adapted else x + self.scale}


class ByValue(Small):
    """Takes another way by what is in its input, which no graph can."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.scale if x.sum() > 0 else x[:, :2]}


class Echo(Small):
    """Returns an input under its own name."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.scale * attention_mask, "attention_mask": attention_mask}


class Unknown(Small):
    """Needs an operator that the exporter does not know."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.linalg.eigvalsh(x) * self.scale}


class Sum(Small):
    """Adds what must be of one length, although its docstring could say otherwise."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": (left + right) * self.scale}


def traced(
    model: PreTrainedModel, inputs: Mapping[str, tuple[tuple[str, int], ...]], outputs: Iterable[str], **options: Any
) -> Trace:
    """Trace with float inputs; an axis is a name and the size of the sample, a fixed one has no name."""
    sample = {name: torch.rand([size for _, size in shape]) for name, shape in inputs.items()}
    specs = [
        TensorSpec(name=name, dtype="float32", shape=tuple(axis or size for axis, size in shape))
        for name, shape in inputs.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
        return trace_model(model, sample, specs, outputs, **{"axis_ranges": {}, "opset": None, "flags": {}} | options)


def run(result: Trace, path: Path, **inputs: torch.Tensor) -> dict[str, Any]:
    write_graph(result.model, path, metadata={})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True))


def shapes(result: Trace) -> dict[str, tuple[int | str, ...]]:
    summary = summarize(result.model)
    return {tensor.name: tensor.shape for tensor in (*summary.inputs, *summary.outputs)}


IMAGE = {"pixel_values": (("batch_size", 2), ("", 3), ("height", 33), ("width", 47))}


@pytest.fixture(scope="module")
def halving() -> tuple[Halving, Trace]:
    torch.manual_seed(0)
    model = Halving()
    return model, traced(model, IMAGE, ["features", "pooled", "doubled"])


def test_axes_are_named_and_tied(bert: Converted) -> None:
    for graph in (bert.exported["graph"], bert.simplified["graph"]):
        found = {tensor["name"]: tensor["shape"] for tensor in (*graph["inputs"], *graph["outputs"])}
        assert found == {
            "input_ids": ("batch_size", "sequence_length"),
            "attention_mask": ("batch_size", "sequence_length"),
            "token_type_ids": ("batch_size", "sequence_length"),
            "last_hidden_state": ("batch_size", "sequence_length", 32),
            "pooler_output": ("batch_size", 32),
        }
    assert bert.exported["notes"] == []
    assert bert.exported["graph"]["opset"] == 20


def test_no_opaque_axis_is_left_in_any_input_or_output(
    bert: Converted, vit: Converted, halving: tuple[Halving, Trace]
) -> None:
    summaries = [summarize(onnx_ir.load(c.stored)) for c in (bert, vit)] + [summarize(halving[1].model)]
    for summary in summaries:
        for tensor in (*summary.inputs, *summary.outputs):
            assert not [axis for axis in tensor.shape if isinstance(axis, str) and OPAQUE.search(axis)], tensor


def test_an_axis_that_is_computed_is_a_formula_of_names(halving: tuple[Halving, Trace], tmp_path: Path) -> None:
    model, result = halving
    found = shapes(result)
    assert found["pixel_values"] == ("batch_size", 3, "height", "width")
    assert found["pooled"] == ("batch_size", 4)
    batch, channels, height, width = found["features"]
    assert (batch, channels) == ("batch_size", 4)
    # The formula holds, at a size other than the traced one.
    image = torch.rand(1, 3, 20, 31)
    answer = run(result, tmp_path / "model.onnx", pixel_values=image)
    sizes = {"height": 20, "width": 31}
    assert eval(str(height), dict(sizes)) == answer["features"].shape[2] == 9  # noqa: S307
    assert eval(str(width), dict(sizes)) == answer["features"].shape[3] == 15  # noqa: S307
    assert eval(str(found["doubled"][2]), dict(sizes)) == 18  # noqa: S307
    with torch.no_grad():
        assert torch.allclose(model(image)["features"], torch.from_numpy(answer["features"]), atol=1e-6)
    assert not result.notes


def test_only_the_outputs_asked_for_and_what_they_need_are_kept(bert: Converted) -> None:
    source = onnx_ir.load(bert.traced)
    before = len(list(source.graph))
    keep_outputs(source, ("last_hidden_state",))
    assert [value.name for value in source.graph.outputs] == ["last_hidden_state"]
    assert len(list(source.graph)) == before - 3
    assert not {"pooler.dense.weight", "pooler.dense.bias"} & source.graph.initializers.keys()


def test_the_model_is_the_same_after_the_call() -> None:
    model = Halving()
    before = copy.deepcopy(model.state_dict()), model.config.to_dict()
    image = torch.rand(1, 3, 9, 9)
    answer = model(image)["features"]
    attention = torch.nn.functional.scaled_dot_product_attention
    traced(model, IMAGE, ["features"])
    assert model.config.to_dict() == before[1]
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert torch.equal(model(image)["features"], answer)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert not model.training


def test_an_axis_that_cannot_be_dynamic_is_fixed_and_said_so(tmp_path: Path) -> None:
    result = traced(RowByRow(), {"x": (("rows", 2), ("sequence_length", 6))}, ["rows"])
    assert shapes(result)["x"] == (2, "sequence_length")
    assert result.notes == ("rows of x is fixed at 2 in the graph",)
    x = torch.rand(2, 9)
    assert run(result, tmp_path / "model.onnx", x=x)["rows"].shape == (2, 9)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"x": (("decoder_sequence_length", 2), ("width", 6))}, id="no-rows"),
        pytest.param(
            {"x": (("batch_size", 2), ("width", 6)), "y": (("image_batch_size", 3), ("width", 6))},
            id="rows-of-two-kinds",
        ),
        pytest.param(
            {"x": (("batch_size", 2), ("width", 6)), "y": (("width", 6), ("batch_size", 2))}, id="rows-inside"
        ),
    ],
)
def test_a_graph_for_the_size_that_happened_to_be_traced_is_no_graph(
    inputs: dict[str, tuple[tuple[str, int], ...]],
) -> None:
    axis = inputs["x"][0][0]
    with pytest.raises(ModelError, match=f"the model's code fixes {axis} at the size that it is traced at") as caught:
        traced(RowByRow(), inputs, ["rows"])
    assert caught.value.kind is ErrorKind.EXPORT_FAILED


def test_rows_that_a_model_takes_apart_are_computed_one_after_another(tmp_path: Path) -> None:
    model = RowByRow()
    inputs = {"x": (("batch_size", 2), ("sequence_length", 6)), "y": (("", 1), ("sequence_length", 6))}
    result = traced(model, inputs, ["rows", "first"])
    assert result.notes == ("the rows of batch_size are computed one after another, as the model's code does",)
    assert shapes(result) == {
        "x": ("batch_size", "sequence_length"),
        "y": (1, "sequence_length"),
        "rows": ("batch_size", "sequence_length"),
        "first": ("batch_size",),
    }
    for rows in (1, 2, 5):
        x, y = torch.rand(rows, 4), torch.rand(1, 4)
        got = run(result, tmp_path / "model.onnx", x=x, y=y)
        assert got.keys() == {"rows", "first"}
        wanted = model(x, y)
        assert all(torch.allclose(torch.from_numpy(value), wanted[name]) for name, value in got.items())


def test_rows_that_a_model_lays_one_after_another_stay_so(tmp_path: Path) -> None:
    model = RowsInOne()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y"], joined=["y"])
    assert shapes(result) == {"x": ("batch_size", "sequence_length"), "y": (1, "y_dim_1", 2)}
    for rows in (1, 2, 5):
        x = torch.rand(rows, 4)
        got = run(result, tmp_path / "model.onnx", x=x)
        torch.testing.assert_close(torch.from_numpy(got["y"]), model(x)["y"].detach())


def test_rows_are_not_gone_over_where_an_output_has_none() -> None:
    with pytest.raises(ModelError, match=r"the first axis of total.* is not one row"):
        traced(RowByRow(), {"x": (("batch_size", 2), ("sequence_length", 6))}, ["rows", "total"])


def test_an_epsilon_is_not_taken_for_zero(tmp_path: Path) -> None:
    result = traced(Tiny(), {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y"])
    x = torch.full((3, 4), 1e-8)
    assert torch.allclose(torch.from_numpy(run(result, tmp_path / "model.onnx", x=x)["y"]), Tiny()(x)["y"])


def test_the_next_sizes_to_be_doubted_are_those_of_another_branch() -> None:
    result = traced(Stepped(), {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y"])
    assert shapes(result)["x"] == ("batch_size", "sequence_length")
    assert result.untried == (("sequence_length", 9),)
    ranges = {"sequence_length": (1, 8)}
    result = traced(Stepped(), {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y"], axis_ranges=ranges)
    assert result.untried == ()


def test_an_attempt_does_not_change_the_model_for_the_next() -> None:
    model = Adapting()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y"])
    assert not model.adapted
    assert result.untried == (("sequence_length", 9),)


def test_axes_that_must_be_equal_carry_one_name(tmp_path: Path) -> None:
    result = traced(Sum(), {"left": (("left_length", 5),), "right": (("right_length", 5),)}, ["y"])
    assert shapes(result) == {"left": ("left_length",), "right": ("left_length",), "y": ("left_length",)}
    assert result.notes == ("right_length of right is tied to left_length in the graph",)
    assert run(result, tmp_path / "model.onnx", left=torch.ones(3), right=torch.ones(3))["y"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("kept", "outputs"),
    [
        pytest.param(["y"], ["y"], id="the-output-is-not-kept"),
        pytest.param(["y", "attention_mask"], ["y", "output.attention_mask"], id="both-are-kept"),
    ],
)
def test_an_input_is_named_as_forward_names_it(kept: list[str], outputs: list[str], tmp_path: Path) -> None:
    axes = (("batch_size", 2), ("sequence_length", 6))
    result = traced(Echo(), {"x": axes, "attention_mask": axes}, kept)
    summary = summarize(result.model)
    assert [tensor.name for tensor in summary.inputs] == ["x", "attention_mask"]
    assert [tensor.name for tensor in summary.outputs] == outputs
    assert all(tensor.shape == ("batch_size", "sequence_length") for tensor in (*summary.inputs, *summary.outputs))
    answer = run(result, tmp_path / "model.onnx", x=torch.ones(1, 3), attention_mask=torch.tensor([[1.0, 1.0, 0.0]]))
    assert answer["y"].tolist() == [[0.5, 0.5, 0.0]]


def test_axes_can_be_fixed_on_request(tmp_path: Path) -> None:
    result = traced(Halving(), IMAGE, ["pooled"], fixed=["height", "width"])
    assert shapes(result)["pixel_values"] == ("batch_size", 3, 33, 47)
    assert run(result, tmp_path / "model.onnx", pixel_values=torch.rand(5, 3, 33, 47))["pooled"].shape == (5, 4)


def test_image_axes_are_given_up_last_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    export, attempts = trace_module._export, []

    def only_fixed_images(model: Any, inputs: Any, specs: Any, attempt: Any, **options: Any) -> Any:
        attempts.append(sorted(attempt.axes))
        if "height" in attempt.axes:
            raise RuntimeError("cannot\nguard on height")
        return export(model, inputs, specs, attempt, **options)

    monkeypatch.setattr(trace_module, "_export", only_fixed_images)
    result = traced(Halving(), IMAGE, ["pooled"])
    assert attempts == [["batch_size", "height", "width"]] * 2 + [["batch_size"]]
    assert shapes(result)["pixel_values"] == ("batch_size", 3, 33, 47)
    assert result.notes == (
        "height, width could not be traced as dynamic and is fixed: RuntimeError: cannot guard on height",
    )


def test_an_images_size_is_not_fixed_where_nothing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[list[str]] = []

    def export(*args: Any, **_: Any) -> Any:
        attempts.append(sorted(args[3].axes))
        raise RuntimeError("cannot guard on height")

    monkeypatch.setattr(trace_module, "_export", export)
    with pytest.raises(ModelError, match=r"cannot guard on height\. Neither config\.json nor preprocessor_config"):
        traced(Halving(), IMAGE, ["pooled"], sides=False)
    assert attempts == [["batch_size", "height", "width"]] * 2


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        pytest.param(ByValue, r"GuardOnDataDependentSymNode: Could not guard on data-dependent", id="by-value"),
        pytest.param(Unknown, r"Error when translating .*_linalg_eigh.* No ONNX function found", id="unknown-operator"),
    ],
)
def test_a_model_that_cannot_be_traced_says_why_in_one_paragraph(
    model: type[Small], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=f"{model.__name__} could not be traced in 2 attempts") as caught:
        traced(model(), {"x": (("batch_size", 2), ("", 4), ("", 4))}, ["y"])
    message = caught.value.message
    assert caught.value.kind is ErrorKind.EXPORT_FAILED
    assert re.search(cause, message), message
    assert len(message) < 800
    assert "\x1b" not in message
    assert capsys.readouterr().out == ""


def test_sizes_of_inputs_that_are_formulas_or_numbers_get_plain_names() -> None:
    def value(name: str, *shape: int | str | None) -> onnx_ir.Value:
        return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))

    x, y = value("x", "s1", "2*s2", "7"), value("y", "s1", "s2 + 1", "u0", None)
    node = onnx_ir.Node("", "Made", [x], outputs=[y])
    model = onnx_ir.Model(onnx_ir.Graph([x], [y], nodes=[node]), ir_version=10)
    specs = (TensorSpec(name="x", dtype="float32", shape=("batch_size", "height", "width")),)
    named = ({"s1": "batch_size", "2*s2": "height"}, ["width of x is fixed at 7 in the graph"], {"width"})
    assert name_axes(model, specs, {"batch_size", "height", "width"}) == named
    summary = summarize(model)
    assert summary.inputs[0].shape == ("batch_size", "height", 7)
    assert summary.outputs[0].shape == ("batch_size", "y_dim_1", "y_dim_2", "y_dim_3")
