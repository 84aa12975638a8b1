"""Parity binds: whatever is wrong in a stored graph is a mismatch, and nothing that is right is accused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_config import UniversalOnnxConfig
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export import parity
from onnx_config.export.checkpoint import load_model
from onnx_config.export.parity import Outcome, ParityResult, check_parity, max_difference
from onnx_config.export.reference import Reference, compute_references
from onnx_config.export.session import choose_device, open_session
from onnx_config.export.shapes import CheckShape, Float64, check_shapes
from onnx_config.input_generator import generate_inputs
from tests.onnx_config.converted import Converted, edited

ROOT = Path(__file__).parents[2]
Graph = onnx.ModelProto


def references_of(converted: Converted) -> list[Reference]:
    spec, universal = converted.spec, UniversalOnnxConfig.from_model_path(converted.source)
    masked = any(tensor.name == "attention_mask" for tensor in spec.inputs)
    feeds = []
    for shape in check_shapes(spec.sizes, spec.axis_ranges, masked=masked):
        options = {"seed": shape.seed, "padding": shape.padding}
        inputs = generate_inputs(spec.inputs, universal.config, universal.declaration, shape.sizes, **options)
        feeds.append((shape, inputs))
    model = load_model(universal.model_class, universal.config, converted.source)
    references, refused = compute_references(model, feeds, flags={})
    assert not refused
    return references


@pytest.fixture(scope="module")
def bert_references(bert: Converted) -> list[Reference]:
    return references_of(bert)


@pytest.fixture(scope="module")
def vit_references(vit: Converted) -> list[Reference]:
    return references_of(vit)


def judge(graph: Path, references: Sequence[Reference]) -> ParityResult:
    names = references[0].outputs
    return check_parity(open_session(graph, device="cpu"), references, expected=names)


# ------------------------------------------------------------------------------------------------- healthy graphs


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_healthy_graph_is_verified(name: str, request: pytest.FixtureRequest) -> None:
    converted: Converted = request.getfixturevalue(name)
    for graph in (converted.traced, converted.stored):
        result = converted.parity(graph)
        assert result["outcome"] == "verified", result["detail"]
        assert result["axes_proven"] == tuple(sorted(converted.spec.sizes))
        assert result["shapes"] >= 5
        assert result["skipped"] == ()
        assert {o["name"] for o in result["outputs"]} == {t.name for t in converted.spec.outputs}
        # Not by a wide tolerance.
        assert all(0 <= o["max_abs_diff"] < o["tolerance"] / 4 < 2e-5 for o in result["outputs"])


# ------------------------------------------------------------------------------------------------- planted faults


def matrices(model: Graph) -> Iterator[TensorProto]:
    """Yield the weights that are no vectors and no tables of whole numbers."""
    yield from (i for i in model.graph.initializer if len(i.dims) > 1 and i.data_type == TensorProto.FLOAT)


def replace_value(tensor: TensorProto, value: Any) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, numpy_helper.to_array(tensor).dtype), tensor.name))


def nodes(model: Graph, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def constant(model: Graph, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def producer(model: Graph, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def rename(model: Graph, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def on_output(op: str, *extra: Any, output: int = 0, dtype: int | None = None, **attributes: Any) -> Any:
    """Return a change that puts a node behind an output."""

    def change(model: Graph) -> None:
        value = model.graph.output[output]
        rename(model, value.name, "before_the_fault")
        inputs = [constant(model, f"fault_{i}", array) for i, array in enumerate(extra)]
        model.graph.node.append(helper.make_node(op, ["before_the_fault", *inputs], [value.name], **attributes))
        value.type.tensor_type.ClearField("shape")
        if dtype is not None:
            value.type.tensor_type.elem_type = dtype

    return change


def swap_weights(model: Graph) -> None:
    first, second = [m for m in matrices(model) if list(m.dims) == [32, 32]][1:3]
    a, b = numpy_helper.to_array(first), numpy_helper.to_array(second)
    replace_value(first, b)
    replace_value(second, a)


def bake_the_traced_batch(model: Graph) -> None:
    made = {node.output[0]: node for node in nodes(model, "Concat")}
    shape = next(made[node.input[1]] for node in nodes(model, "Reshape") if node.input[1] in made)
    shape.input[0] = constant(model, "traced_batch", np.array([2], np.int64))


def ignore_the_mask(model: Graph) -> None:
    one = numpy_helper.from_array(np.array([1], np.int64))
    rename(model, "attention_mask", "all_ones")
    model.graph.node.insert(0, helper.make_node("Shape", ["input_ids"], ["shape_of_ids"]))
    model.graph.node.insert(1, helper.make_node("ConstantOfShape", ["shape_of_ids"], ["all_ones"], value=one))


def scale_attention_wrongly(model: Graph) -> None:
    scale = next(
        i for i in model.graph.initializer if not i.dims and np.isclose(numpy_helper.to_array(i), 8**-0.25, atol=1e-6)
    )
    replace_value(scale, 8**-0.5)


def bypass_norm(number: int) -> Callable[[Graph], None]:
    def change(model: Graph) -> None:
        node = nodes(model, "LayerNormalization")[number]
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]

    return change


def approximate_gelu(model: Graph) -> None:
    for node in nodes(model, "Gelu"):
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))


def rename_output(model: Graph) -> None:
    rename(model, "last_hidden_state", "hidden")
    model.graph.output[0].name = "hidden"


def return_one_more(model: Graph) -> None:
    model.graph.output.append(
        helper.make_tensor_value_info(nodes(model, "Softmax")[0].output[0], TensorProto.FLOAT, None)
    )


def return_one_less(model: Graph) -> None:
    del model.graph.output[1]


def at_batch(size: int, table: Sequence[float]) -> Callable[[Graph], None]:
    """Return a change that adds ``table[batch]`` to the first output; past its end, ONNX Runtime stops."""

    def change(model: Graph) -> None:
        on_output("Add", np.float32(0))(model)
        one = constant(model, "batch_axis", np.array(0, np.int64))
        model.graph.node[-1].input[1] = "by_batch"
        made = [
            helper.make_node("Shape", ["input_ids"], ["shape_of_ids"]),
            helper.make_node("Gather", ["shape_of_ids", one], ["batch"]),
            helper.make_node("Gather", [constant(model, "table", np.array(table, np.float32)), "batch"], ["by_batch"]),
        ]
        for position, node in enumerate(made):
            model.graph.node.insert(position, node)

    assert size <= len(table)
    return change


def answer_otherwise_each_time(model: Graph) -> None:
    on_output("Add", np.float32(0))(model)
    noise = helper.make_node("RandomNormalLike", ["before_the_fault"], ["noise"], scale=1e-3)
    model.graph.node[-1].input[1] = "noise"
    model.graph.node.insert(len(model.graph.node) - 1, noise)


FAULTS = [
    pytest.param(answer_otherwise_each_time, "differs by", id="nondeterministic-output"),
    pytest.param(swap_weights, r"differs by .* at .*, where .* is allowed", id="two-weights-swapped"),
    pytest.param(bake_the_traced_batch, r"differs by .* at one row \(batch_size=1", id="traced-batch-baked-in"),
    pytest.param(ignore_the_mask, r"differs by .* at padded rows", id="mask-ignored"),
    pytest.param(scale_attention_wrongly, "differs by", id="attention-scale"),
    *(pytest.param(bypass_norm(i), "differs by", id=f"norm-{i}-bypassed") for i in range(5)),
    pytest.param(approximate_gelu, "differs by", id="another-gelu"),
    pytest.param(on_output("Mul", np.float32("nan")), r"has \d+ NaN where PyTorch has none", id="nan-output"),
    pytest.param(on_output("Mul", np.float32("inf")), "NaN|infinite", id="infinite-output"),
    pytest.param(rename_output, "the graph lacks the output last_hidden_state", id="output-renamed"),
    pytest.param(return_one_more, "is an output of the graph only", id="output-too-many"),
    pytest.param(return_one_less, "the graph lacks the output pooler_output", id="output-lost"),
    pytest.param(
        on_output("Cast", dtype=TensorProto.DOUBLE, to=TensorProto.DOUBLE), "is float64 for float32", id="output-dtype"
    ),
    pytest.param(
        on_output("Unsqueeze", np.array([0], np.int64)),
        r"has shape \(1, 1, 13, 32\) for",
        id="output-with-another-axis",
    ),
    pytest.param(on_output("Add", np.float32(1e-4)), "differs by 0.0001", id="output-shifted"),
    pytest.param(on_output("Mul", np.float32(1 + 1e-4), output=1), "pooler_output differs", id="second-output-scaled"),
    pytest.param(
        at_batch(4, [0.0] * 4), r"stops at another batch \(batch_size=4, sequence_length=16\)", id="stops-at-one-shape"
    ),
    pytest.param(at_batch(5, [0.0] * 4 + [0.01]), r"differs by 0.01 at another batch", id="wrong-at-one-shape"),
    pytest.param(at_batch(6, [0.0] * 4 + [0.01, 0.0]), "differs by 0.01 at another batch", id="wrong-at-another"),
]


@pytest.mark.parametrize(("change", "detail"), FAULTS)
def test_a_planted_fault_is_a_mismatch(
    bert: Converted, bert_references: list[Reference], tmp_path: Path, change: Callable[[Graph], None], detail: str
) -> None:
    result = judge(edited(bert.stored, change, tmp_path / "model.onnx"), bert_references)
    assert result.outcome is Outcome.MISMATCH
    assert result.detail is not None
    assert re.search(detail, result.detail), result.detail


@pytest.mark.parametrize("share", [1e-2, 1e-3])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_any_weight_that_is_off_is_a_mismatch(
    name: str, share: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    converted: Converted = request.getfixturevalue(name)
    references = request.getfixturevalue(f"{name}_references")
    model = onnx.load(str(converted.stored))
    missed = []
    for tensor in matrices(model):
        kept = tensor.SerializeToString()
        replace_value(tensor, numpy_helper.to_array(tensor) * (1 + share))
        onnx.save(model, str(tmp_path / "model.onnx"))
        if judge(tmp_path / "model.onnx", references).outcome is not Outcome.MISMATCH:
            missed.append(tensor.name)
        tensor.ParseFromString(kept)
    assert not missed


def test_a_fault_is_found_through_the_step_too(bert: Converted, tmp_path: Path) -> None:
    result = bert.parity(edited(bert.stored, return_one_less, tmp_path / "model.onnx"))
    assert (result["outcome"], result["detail"]) == ("mismatch", "the graph lacks the output pooler_output")


def test_weights_other_than_the_folders_are_a_mismatch(bert: Converted, tmp_path: Path) -> None:
    import tiny_models

    other = tiny_models.build("bert-model", tmp_path, seed=1)
    assert bert.parity(folder=str(other))["outcome"] == "mismatch"


def break_an_operator(model: Graph) -> None:
    nodes(model, "Softmax")[0].op_type = "Softmacks"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="unknown-operator"),
        pytest.param(b"", id="empty-file"),
        pytest.param(b"<html>not found</html>", id="not-a-graph"),
    ],
)
def test_what_onnx_runtime_refuses_is_said_so(bert: Converted, tmp_path: Path, content: bytes | None) -> None:
    graph = tmp_path / "model.onnx"
    if content is None:
        edited(bert.stored, break_an_operator, graph)
    else:
        graph.write_bytes(content)
    with pytest.raises(ModelError, match=r"refuses the graph model\.onnx|is no ONNX graph") as caught:
        bert.parity(graph)
    assert caught.value.kind is ErrorKind.RUNTIME_FAILED


# -------------------------------------------------------------------------------------- the verdict, on plain numbers


def session(outputs: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]], *inputs: str) -> Any:
    """Return what stands for an ONNX Runtime session that answers ``outputs``."""
    answer = outputs if callable(outputs) else lambda feed: outputs
    names = list(answer({"x": np.zeros((1, 1), np.float32)}))
    return SimpleNamespace(
        get_outputs=lambda: [SimpleNamespace(name=name) for name in names],
        get_inputs=lambda: [SimpleNamespace(name=name) for name in inputs],
        get_providers=lambda: ["CPUExecutionProvider"],
        run=lambda asked, feed: [np.asarray(answer(feed)[name]) for name in asked],
    )


def same_reference(want: Any, precise: Any = None, count: int = 4) -> list[Reference]:
    shapes = [CheckShape(label=f"shape {i}", sizes={"batch_size": i + 1}) for i in range(count)]
    return [
        Reference(
            shape=shape,
            inputs={},
            outputs={"y": np.asarray(want)},
            precise=None if precise is None else {"y": np.asarray(precise)},
        )
        for shape in shapes
    ]


NAN, INF, LOWEST = float("nan"), float("inf"), float(np.finfo(np.float32).min)


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def doubles(*values: float) -> Any:
    return np.array(values, np.float64)


@pytest.mark.parametrize(
    ("got", "want", "precise", "outcome"),
    [
        pytest.param(floats(1, 2), floats(1, 2), doubles(1, 2), "verified", id="equal"),
        pytest.param(floats(1, 2 + 1.5e-5), floats(1, 2), doubles(1, 2), "verified", id="within-the-base-tolerance"),
        pytest.param(floats(1, 2 + 3e-5), floats(1, 2), doubles(1, 2), "mismatch", id="beyond-it"),
        pytest.param(floats(1, 2 + 3e-5), floats(1, 2), doubles(1, 2 + 4e-6), "verified", id="within-its-own-spread"),
        pytest.param(floats(1000, 1.005), floats(1000, 1), doubles(1000, 1), "verified", id="relative-to-the-largest"),
        # Normalised embeddings and probabilities are small, and so is what may differ.
        pytest.param(floats(0.05, 0.020005), floats(0.05, 0.02), doubles(0.05, 0.02), "mismatch", id="small-outputs"),
        pytest.param(floats(1e-9, 0), floats(0, 0), doubles(0, 0), "verified", id="next-to-nothing"),
        pytest.param(floats(1, 2), floats(1, 2), doubles(1, 3), "unstable", id="equal-by-luck"),
        pytest.param(floats(1, 2.9), floats(1, 2), doubles(1, 3), "unstable", id="off-as-pytorch-is-itself"),
        pytest.param(floats(1, 20), floats(1, 2), doubles(1, 3), "mismatch", id="off-by-more-than-pytorch-is"),
        pytest.param(floats(1, NAN), floats(1, NAN), doubles(1, NAN), "verified", id="nan-at-the-same-place"),
        pytest.param(floats(1, INF), floats(1, INF), doubles(1, INF), "verified", id="infinite-at-the-same-place"),
        pytest.param(floats(1, -INF), floats(1, INF), doubles(1, INF), "mismatch", id="infinite-the-other-way"),
        pytest.param(floats(1, NAN), floats(1, 2), doubles(1, 2), "mismatch", id="nan-in-the-graph"),
        pytest.param(floats(1, 2), floats(1, NAN), doubles(1, NAN), "mismatch", id="nan-in-pytorch"),
        pytest.param(floats(1, 2), floats(1, INF), doubles(1, INF), "mismatch", id="infinite-in-pytorch"),
        pytest.param(floats(1, NAN), floats(1, NAN), doubles(1, 2), "unstable", id="nan-in-float32-only"),
        pytest.param(floats(NAN, NAN), floats(NAN, NAN), doubles(NAN, NAN), "unstable", id="nothing-but-nan"),
        pytest.param(
            floats(1, LOWEST), floats(1, LOWEST), doubles(1, np.finfo(np.float64).min), "verified", id="a-masked-value"
        ),
        pytest.param(
            floats(1.1, LOWEST),
            floats(1, LOWEST),
            doubles(1, np.finfo(np.float64).min),
            "mismatch",
            id="a-masked-value-hides-nothing",
        ),
        pytest.param(floats(1, 2.0001), floats(1, 2), None, "verified", id="without-float64"),
        pytest.param(floats(1, 2.0003), floats(1, 2), None, "mismatch", id="without-float64-beyond-the-fallback"),
        pytest.param(floats(1, 2.0001), floats(1, 2), doubles(1, NAN), "verified", id="nan-in-float64-only"),
        pytest.param(floats(1, 2.0003), floats(1, 2), doubles(NAN, NAN), "mismatch", id="nan-is-no-excuse"),
        pytest.param(np.int64([1, 2]), np.int64([1, 2]), np.int64([1, 2]), "verified", id="whole-numbers"),
        pytest.param(np.int64([1, 3]), np.int64([1, 2]), np.int64([1, 2]), "mismatch", id="whole-numbers-are-exact"),
        pytest.param(np.int64([1, 3]), np.int64([1, 2]), np.int64([1, 3]), "unstable", id="whole-numbers-in-doubt"),
        pytest.param(np.int32([1, 2]), np.int64([1, 2]), np.int64([1, 2]), "mismatch", id="another-integer-type"),
        pytest.param(np.array([True]), np.array([False]), np.array([False]), "mismatch", id="truth-values"),
        pytest.param(floats(1, 2), np.int64([1, 2]), np.int64([1, 2]), "mismatch", id="numbers-for-whole-numbers"),
        pytest.param(floats(1), floats(1, 2), doubles(1, 2), "mismatch", id="another-shape"),
        pytest.param(floats(1, 2), floats(1, 2), doubles(1), "unstable", id="another-shape-in-float64"),
        pytest.param(floats(), floats(), doubles(), "unstable", id="nothing-at-any-shape"),
    ],
)
def test_the_verdict_on_one_output(got: Any, want: Any, precise: Any, outcome: str) -> None:
    result = check_parity(session({"y": got}), same_reference(want, precise))
    assert (result.outcome.value, result.shapes) == (outcome, 4), result.detail
    assert (result.detail is None) == (outcome == "verified")


def test_an_output_may_be_empty_where_it_is_not_at_other_shapes() -> None:
    full, *empty = same_reference(floats(1), doubles(1))
    empty = [replace(r, outputs={"y": floats()}, precise={"y": doubles()}, inputs={"x": floats()}) for r in empty]
    references = [replace(full, inputs={"x": floats(1)}), *empty]
    assert check_parity(session(lambda feed: {"y": feed["x"]}, "x"), references).outcome.value == "verified"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_than_four_shapes_are_too_little_to_judge(count: int) -> None:
    references = same_reference(floats(1), doubles(1), count)
    with pytest.raises(ModelError, match=rf"accepts only {count} of the shapes .* It said: large: too long") as caught:
        check_parity(session({"y": floats(1)}), references, refused=["large: too long"])
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_the_tolerance_shown_is_that_of_the_closest_call() -> None:
    references = [
        Reference(shape=r.shape, inputs={"x": floats(i)}, outputs=r.outputs, precise=r.precise)
        for i, r in enumerate(same_reference(floats(1, 1), doubles(1, 1)))
    ]
    result = check_parity(session(lambda feed: {"y": floats(1, 1 + 2e-6 * feed["x"].flat[0])}, "x"), references)
    (only,) = result.outputs
    assert only.max_abs_diff == pytest.approx(6e-6, rel=0.05)
    assert only.tolerance == pytest.approx(1e-5)
    assert result.axes_proven == ("batch_size",)


def test_an_axis_seen_at_one_size_is_not_proven() -> None:
    references = [
        Reference(
            shape=CheckShape(label=str(i), sizes={"width": 32, "batch_size": i}), inputs={}, outputs={}, precise={}
        )
        for i in range(4)
    ]
    assert check_parity(session({}), references).axes_proven == ("batch_size",)


def test_max_difference_is_symmetric_in_infinities() -> None:
    assert max_difference(floats(INF, 1), doubles(INF, 3)) == (2.0, None)
    assert max_difference(floats(1), doubles(INF))[0] == max_difference(floats(INF), doubles(1))[0] == INF


# --------------------------------------------------------------------------------------------------- the reference


class Cancelling(torch.nn.Module):
    """Sums that float32 cannot hold: float64 gives 1, float32 0."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": (x + 1e8) + 1 - (x + 1e8)}


class Choosy(torch.nn.Module):
    """Takes rows of even length only; says what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(x.dtype)
        if x.shape[1] % 2:
            raise ValueError("odd\nlengths are not taken")
        return {"y": x.sum() * self.weight, "half": x.to(torch.bfloat16)}


def feeds(*lengths: int) -> list[tuple[CheckShape, dict[str, Any]]]:
    return [(CheckShape(label=f"length {n}", sizes={"length": n}), {"x": np.ones((1, n), np.float32)}) for n in lengths]


def test_a_model_that_disagrees_with_itself_is_unstable_even_where_the_graph_agrees() -> None:
    references, _ = compute_references(Cancelling(), feeds(1, 2, 3, 4), flags={})  # type: ignore[arg-type]
    result = check_parity(
        session(lambda feed: {"y": (feed["x"] + 1e8) + 1 - (feed["x"] + 1e8)}, "x"),
        [
            Reference(shape=r.shape, inputs={"x": r.inputs["x"]}, outputs=r.outputs, precise=r.precise)
            for r in references
        ],
    )
    assert result.outcome is Outcome.UNSTABLE
    assert "differs from itself in float64" in str(result.detail)


def test_shapes_that_the_model_refuses_are_reported_in_one_line() -> None:
    references, refused = compute_references(Choosy(), feeds(2, 3, 4), flags={})  # type: ignore[arg-type]
    assert [r.shape.label for r in references] == ["length 2", "length 4"]
    assert refused == ["length 3: ValueError: odd lengths are not taken"]


class Spreading(torch.nn.Module):
    """Has no answer for a single number: a deviation needs two."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.flatten().std(correction=int(x.numel() > 1), keepdim=True) / (x.numel() - 1)}


def test_a_shape_without_a_finite_answer_is_not_compared_and_said_so() -> None:
    references, refused = compute_references(Spreading(), feeds(1, 2, 3), flags={})  # type: ignore[arg-type]
    assert [r.shape.label for r in references] == ["length 2", "length 3"]
    assert refused == ["length 1: y holds no finite number"]


def test_the_model_is_held_once_and_float64_comes_last() -> None:
    model = Choosy()
    references, _ = compute_references(model, feeds(2, 4), flags={})  # type: ignore[arg-type]
    small, large = references
    assert small.precise is not None
    assert small.precise["y"].dtype == np.float64
    assert model.weight.dtype == torch.float64
    # At the larger half of the shapes only once somebody asks.
    assert large.precise is None
    answer = large.precisely()
    assert answer is not None
    assert answer["y"].dtype == np.float64
    assert large.precisely() is answer
    assert [r.outputs.keys() for r in references] == [{"y"}, {"y"}]  # NumPy has no bfloat16


def test_float64_is_asked_where_a_difference_is_more_than_nothing() -> None:
    references, _ = compute_references(Choosy(), feeds(2, 4, 6, 8), flags={})  # type: ignore[arg-type]
    asked: list[str] = []

    def watched(reference: Reference) -> Reference:
        if reference.in_float64 is None:
            return reference
        return replace(reference, in_float64=lambda: asked.append(reference.shape.label))

    def checked(factor: float) -> Outcome:
        graph = session(lambda feed: {"y": np.full(4, feed["x"].sum() * factor, np.float32)}, "x")
        return check_parity(graph, [watched(r) for r in references]).outcome

    assert (checked(1.0), asked) == (Outcome.VERIFIED, [])
    assert (checked(1.01), asked) == (Outcome.MISMATCH, ["length 6", "length 8"])


def test_without_precise_nothing_is_run_in_float64() -> None:
    model = Choosy()
    references, _ = compute_references(model, feeds(2, 4), flags={}, float64=Float64.NEVER)  # type: ignore[arg-type]
    assert [r.precise for r in references] == [None, None]
    assert model.weight.dtype == torch.float32


def test_where_it_decides_nothing_float64_is_not_run(bert: Converted) -> None:
    model = Choosy()
    references, _ = compute_references(model, feeds(2, 4), flags={}, float64=Float64.NEEDED)  # type: ignore[arg-type]
    assert [r.precise for r in references] == [None, None]
    assert model.weight.dtype == torch.float32
    answer = references[0].precisely()
    assert answer is not None
    assert answer["y"].dtype == np.float64


def test_the_step_spares_float64_when_told_to(bert: Converted) -> None:
    result = bert.parity(float64="never", mapped=True)
    assert result["outcome"] == "verified"
    assert all(o["tolerance"] >= parity.FALLBACK_TOLERANCE for o in result["outputs"])


class Float32Only(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x @ torch.ones(x.shape[1], 1)}


def test_a_model_that_cannot_run_in_float64_gets_the_fallback_tolerance() -> None:
    references, refused = compute_references(Float32Only(), feeds(1, 2, 3, 4), flags={})  # type: ignore[arg-type]
    assert [r.precise for r in references] == [None] * 4
    assert not refused
    result = check_parity(session(lambda feed: {"y": feed["x"].sum(1, keepdims=True)}, "x"), references)
    assert (result.outcome, result.outputs[0].tolerance) == (Outcome.VERIFIED, pytest.approx(1e-4))


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(MemoryError("too much"), id="python"),
        pytest.param(
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), id="torch"
        ),
    ],
)
def test_lack_of_memory_is_no_refusal(error: Exception) -> None:
    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            raise error

    with pytest.raises(type(error), match=r"memory|too much"):
        compute_references(Greedy(), feeds(2), flags={})  # type: ignore[arg-type]


UNPATCHED = """
import importlib, json, sys
import transformers.exporters.exporter_onnx
from transformers.exporters import utils

def originals():
    found = {}
    for path, attribute, _ in utils._PATCHES["onnx"] + utils._PATCHES.get("dynamo", []):
        owner = utils.import_dotted_path(path, missing_ok=True)
        if owner is not None and hasattr(owner, attribute):
            found[path + "." + attribute] = getattr(owner, attribute)
    return found

def refused(*args, **kwargs):
    raise AssertionError("an exporter patch was applied")

utils.apply_patches = utils.patch_attributes = utils.patch_attribute = refused
before = originals()
assert "torch.nn.functional.scaled_dot_product_attention" in before, sorted(before)
from onnx_config.export import steps
result = steps.parity(json.load(sys.stdin))
assert result["outcome"] == "verified", result
after = originals()
assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
print(len(before), "originals")
"""


def test_the_reference_knows_no_patch_of_the_exporter(bert: Converted) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNPATCHED],
        input=json.dumps(bert.check_request()),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("originals")


# ------------------------------------------------------------------------------------------------------- the device


def no_cuda(monkeypatch: pytest.MonkeyPatch, *, torch_sees: bool, providers: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)


BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("asked", "torch_sees", "providers", "chosen"),
    [
        pytest.param("cpu", True, BOTH, "cpu", id="cpu"),
        pytest.param("cuda", True, BOTH, "cuda", id="cuda"),
        pytest.param("auto", True, BOTH, "cuda", id="auto-with-a-gpu"),
        pytest.param("auto", False, BOTH, "cpu", id="auto-without"),
        pytest.param("auto", True, BOTH[1:], "cpu", id="auto-without-the-provider"),
    ],
)
def test_the_device_chosen(
    monkeypatch: pytest.MonkeyPatch, asked: str, torch_sees: bool, providers: list[str], chosen: str
) -> None:
    no_cuda(monkeypatch, torch_sees=torch_sees, providers=providers)
    assert choose_device(asked) == chosen


@pytest.mark.parametrize(
    ("asked", "torch_sees", "providers", "said"),
    [
        pytest.param("cuda", False, BOTH, "PyTorch sees no CUDA device", id="no-device"),
        pytest.param("cuda", True, BOTH[1:], "ONNX Runtime has no CUDAExecutionProvider", id="no-provider"),
        pytest.param("tpu", False, BOTH, "the devices are 'auto', 'cpu' and 'cuda'", id="another-name"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, asked: str, torch_sees: bool, providers: list[str], said: str
) -> None:
    no_cuda(monkeypatch, torch_sees=torch_sees, providers=providers)
    with pytest.raises(InputError, match=said):
        choose_device(asked)


def test_a_silent_fall_back_to_the_cpu_is_an_error(bert: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened = onnxruntime.InferenceSession

    def without_cuda(path: str, options: Any, providers: Any) -> Any:
        return opened(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with pytest.raises(InputError, match="fell back to the CPU"):
        open_session(bert.stored, device="cuda")
