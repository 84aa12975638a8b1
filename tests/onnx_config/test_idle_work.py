from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from onnx_config.export.idle_work import no_idle_work
from onnx_config.export.rewriting import exact_patterns
from onnx_config.export.trace import trace_model
from onnx_config.spec import TensorSpec


class MixedTypes(torch.nn.Module):
    """Operands of every pair of types, so that casts are inserted and what follows them sees their results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        scaled = ids * self.weight + mask
        ratio = ids / 3 + (mask > 0) * 0.5
        power = torch.pow(ids, 2) * 0.25
        counted = (ids + mask.to(torch.int32)).cumsum(-1) / ids.shape[1]
        chosen = torch.where(mask > 0, ids, scaled)
        values, places = torch.topk(chosen + ratio, 2)
        return {"y": torch.cat([values + power[:, :2], counted[:, :2]], dim=-1), "places": places}


def graph_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    specs = [TensorSpec(name=name, dtype="int64", shape=("batch_size", 8)) for name in inputs]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return trace_model(
            model,  # type: ignore[arg-type]  # any module is traced
            inputs,
            specs,
            ["y", "places"],
            axis_ranges={"batch_size": (1, None)},
            opset=None,
            flags={},
        ).model


def test_a_graph_is_the_same_without_idle_work(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"ids": torch.arange(16).reshape(2, 8), "mask": torch.ones(2, 8, dtype=torch.int64)}
    spared = graph_of(MixedTypes(), inputs)
    monkeypatch.setattr("onnx_config.export.trace.no_idle_work", contextlib.nullcontext)
    monkeypatch.setattr("onnx_config.export.trace.exact_patterns", contextlib.nullcontext)
    plain = graph_of(MixedTypes(), inputs)
    assert Counter(n.op_type for n in spared.graph) == Counter(n.op_type for n in plain.graph)
    assert [str(v.type) for n in spared.graph for v in n.outputs] == [
        str(v.type) for n in plain.graph for v in n.outputs
    ]
    assert any(n.op_type == "Cast" for n in spared.graph)


class Moving(torch.nn.Module):
    """Brings a part to an element type whenever it is called."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.inner = self.inner.to(self.dtype)
        return {"y": self.inner(ids.to(self.dtype)), "places": ids}


def test_a_part_is_brought_to_the_type_that_it_has_while_it_is_traced() -> None:
    graph = graph_of(Moving(torch.float32), {"ids": torch.arange(16).reshape(2, 8)})
    assert [v.name for v in graph.graph.outputs] == ["y", "places"]
    with no_idle_work():
        linear = torch.nn.Linear(2, 2)
        assert linear.to("cpu", torch.float32) is linear
        assert linear.to(torch.float64).weight.dtype is torch.float64


def test_what_is_spared_is_the_libraries_own_work() -> None:
    """A release that is built otherwise would do all of it again, and nobody would notice but for the time."""
    from onnxscript._internal.values import TracedOnnxFunction
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._rewrite_rule import RewriteRule
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

    owners = (
        (TracedOnnxFunction, "function_ir"),
        (_TypePromotionInterpreter, "run_node"),
        (RewriteRule, "try_rewrite"),
        (SimplePatternMatcher, "match"),
    )
    before = [vars(owner)[name] for owner, name in owners]
    with no_idle_work(), exact_patterns():
        assert torch.fx.config.do_not_emit_stack_traces
        assert all(vars(owner)[name] is not old for (owner, name), old in zip(owners, before, strict=True))
    assert not torch.fx.config.do_not_emit_stack_traces
    assert [vars(owner)[name] for owner, name in owners] == before


class Halved(torch.nn.Module):
    """Halves many values, as layers with rotary embeddings do."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.arange(count * 4, dtype=torch.float32).reshape(count, 4))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        values = ids.float() + 0.5
        for weight in self.weights:
            values = values * weight.sum()
            values = torch.cat([-values[:, 4:], values[:, :4]], dim=-1)
        return {"y": values, "places": ids}


def test_two_parts_of_one_value_are_looked_for_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    compared: list[Any] = []
    original = SimplePatternMatcher._multi_match

    def multi_match(self: Any, candidate: Any, **options: Any) -> Any:
        compared.append(candidate)
        return original(self, candidate, **options)

    monkeypatch.setattr(SimplePatternMatcher, "_multi_match", multi_match)
    counts, inputs = [], {"ids": torch.arange(16).reshape(2, 8)}
    for count in (4, 8):
        compared.clear()
        graph_of(Halved(count), inputs)
        counts.append(len(compared))
    assert 0 < counts[1] <= 2 * counts[0]


def test_functions_name_their_domain_as_they_would_after_parsing() -> None:
    from onnxscript._framework_apis.torch_2_5 import get_torchlib_ops

    parsed = [(f.qualified_name, f.domain, f.name, f.is_complex) for f in get_torchlib_ops()]
    with no_idle_work():
        assert [(f.qualified_name, f.domain, f.name, f.is_complex) for f in get_torchlib_ops()] == parsed


class WithoutGradients(torch.nn.Module):
    """Turns gradients off in every step, as rotary embeddings and quantized layers do."""

    def forward(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        for _ in range(3):
            with torch.no_grad():
                values = values * 2
            values = values + 1
        return {"y": values}


def test_a_program_is_not_cut_apart_where_gradients_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export.passes import replace_set_grad_with_hop_pass as cuts

    def cut(*arguments: Any) -> Any:
        raise AssertionError("cut apart")

    monkeypatch.setattr(cuts, "sequential_split", cut)
    inputs = {"values": torch.ones(2, 8)}
    with no_idle_work(), torch.no_grad():
        program = torch.export.export(WithoutGradients(), (), inputs)
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == [
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ] * 3
    assert torch.equal(program.module()(**inputs)["y"], torch.full((2, 8), 15.0))
    with torch.no_grad(), pytest.raises(AssertionError, match="cut apart"):
        torch.export.export(WithoutGradients(), (), inputs)


def test_how_values_lie_in_memory_is_not_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.passes import shape_prop

    def ask(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(shape_prop, "is_contiguous_for_memory_format_or_false", ask)
    inputs = {"values": torch.ones(2, 8)}
    with no_idle_work(), torch.no_grad():
        torch.export.export(WithoutGradients(), (), inputs)
    with torch.no_grad(), pytest.raises(AssertionError, match="asked"):
        torch.export.export(WithoutGradients(), (), inputs)
