"""Loops over time become one operator of a graph that runs at every length; other loops stay as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from onnx_config.export import loops, steps_in_turn
from onnx_config.export.loops import loops_as_scans, rewritten
from tests.onnx_config.test_trace import Small, run, shapes, traced

Tensor = torch.Tensor


class Recurrent(Small):
    """Goes over time in the ways in which recurrent models do."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        state = torch.zeros_like(x[:, 0])
        total = torch.zeros_like(x[:, 0])
        written = torch.zeros_like(x)
        entries, pieces = [], []
        turned = x.transpose(1, 2)
        decay = torch.sigmoid(self.scale)
        for i in range(x.shape[1]):
            row, gate = x[:, i], turned[..., i, None]
            state = decay * state + row * gate.mean(1)
            total += state.to(written.dtype)
            written[:, i] = state * 2
            entries.append(torch.tanh(state))
            pieces.append(state[:, None])
        return {
            "written": written,
            "stacked": torch.stack(entries, dim=-1),
            "joined": torch.cat(pieces, dim=1),
            "state": state,
            "total": total,
        }


class Weighted(Small):
    """Reads its weights in each step, and sizes."""

    def build(self) -> None:
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        state = torch.zeros_like(x[:, 0])
        width = torch.ones(x.shape[0], 4)
        for i in range(x.shape[1]):
            state = state * self.scale + x[:, i] @ self.inner.weight + width.reshape(width.shape[0], 4)
        return {"state": state}


class Layered(Small):
    """Counts to a number, which is no axis."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        state = x[:, 0]
        for i in range(3):
            state = state + x[:, i]
        return {"y": state * self.scale}


def test_a_loop_over_time_runs_at_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_MODELS", __name__)
    model = Recurrent()
    names = ["written", "stacked", "joined", "state", "total"]
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 7), ("", 4))}, names)
    assert shapes(result)["x"] == ("batch_size", "sequence_length", 4)
    assert shapes(result)["stacked"] == ("batch_size", 4, "sequence_length")
    # As many nodes as one step has.
    assert [node.op_type for node in result.model.graph].count("Scan") == 1
    for batch, length in ((3, 1), (1, 12)):
        x = torch.rand(batch, length, 4)
        wanted = model(x)
        for name, value in run(result, tmp_path / "model.onnx", x=x).items():
            torch.testing.assert_close(torch.from_numpy(value), wanted[name].detach())


def test_a_step_reads_what_belongs_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_MODELS", __name__)
    model = Weighted()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 7), ("", 4))}, ["state"])
    assert [node.op_type for node in result.model.graph].count("Scan") == 1
    x = torch.rand(3, 12, 4)
    found = run(result, tmp_path / "model.onnx", x=x)["state"]
    torch.testing.assert_close(torch.from_numpy(found), model(x)["state"].detach())


def test_a_loop_that_counts_to_a_number_is_traced_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_MODELS", __name__)
    model = Layered()
    result = traced(model, {"x": (("batch_size", 2), ("", 3), ("", 4))}, ["y"])
    assert "Scan" not in {node.op_type for node in result.model.graph}
    x = torch.rand(5, 3, 4)
    torch.testing.assert_close(torch.from_numpy(run(result, tmp_path / "model.onnx", x=x)["y"]), model(x)["y"].detach())


def test_the_code_is_the_same_afterwards_and_means_the_same_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_MODELS", __name__)
    model, x = Recurrent(), torch.rand(2, 5, 4)
    code, wanted, known = Recurrent.forward.__code__, model(x), set(vars(sys.modules[__name__]))
    with loops_as_scans(model):
        assert Recurrent.forward.__code__ is not code
        found = model(x)
    assert Recurrent.forward.__code__ is code
    assert set(vars(sys.modules[__name__])) == known
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# The functions below stand for a model's code; nothing calls them.


def uses_its_number(x: Any, n: Any) -> Any:
    state = x[0]
    for i in range(n):
        state = state + x[i] * i
    return state


def looks_back(x: Any, n: Any) -> Any:
    state = x[0]
    for i in range(n):
        state = state + x[i - 1]
    return state


def reads_what_it_writes(x: Any, n: Any) -> Any:
    for i in range(n):
        x[i] = x[i] + 1
    return x


def decides(x: Any, n: Any) -> Any:
    state = x[0]
    for i in range(n):
        if n:
            state = state + x[i]
    return state


def starts_late(x: Any, n: Any) -> Any:
    state = x[0]
    for i in range(1, n):
        state = state + x[i]
    return state


def keeps_the_list(x: Any, n: Any) -> Any:
    entries = []
    for i in range(n):
        entries.append(x[i])
    return entries


def shares_the_list(x: Any, n: Any) -> Any:
    others: list[Any]
    entries = others = []
    for i in range(n):
        entries.append(x[i])
    return torch.stack(others)


def has_told_of_the_list(x: Any, n: Any) -> Any:
    entries: list[Any] = []
    told = [entries]
    for i in range(n):
        entries.append(x[i])
    return told


def goes_on_with_the_list(x: Any, n: Any, entries: Any) -> Any:
    for i in range(n):
        entries.append(x[i])
    return torch.stack(entries)


def takes_turns(x: Any, n: Any) -> Any:
    for _ in range(2):
        entries: list[Any] = []
        y = x[0] + len(entries)
        for i in range(n):
            entries.append(x[i])
    return y


def appends_twice(x: Any, n: Any) -> Any:
    entries: list[Any] = []
    for i in range(n):
        entries.append(x[i])
        entries.append(x[i])
    return torch.stack(entries)


def writes_a_part_of_a_row(x: Any, y: Any, n: Any) -> Any:
    for i in range(n):
        y[i, 0] = x[i]
    return y


def takes_no_part(x: Any, n: Any) -> Any:
    for i in range(n):  # noqa: B007
        x = x * 2
    return x


def looks_up(x: Any, places: Any, n: Any) -> Any:
    state = x[0]
    for i in range(n):
        state = state + x[places, i]
    return state


def calls_a_method(x: Any, y: Any, n: Any) -> Any:
    for i in range(n):
        y.add_(x[i])
    return y


@pytest.mark.parametrize(
    "function",
    [
        *(uses_its_number, looks_back, reads_what_it_writes, decides, starts_late, keeps_the_list, appends_twice),
        *(shares_the_list, has_told_of_the_list, goes_on_with_the_list, takes_turns),
        *(writes_a_part_of_a_row, takes_no_part, looks_up, calls_a_method),
    ],
    ids=lambda function: function.__name__.replace("_", "-"),
)
def test_what_is_no_scan_is_left_alone(function: Callable[..., Any]) -> None:
    assert isinstance(function, FunctionType)
    assert rewritten(function) is None


def leaves_something_behind(x: Any, n: Any) -> Any:
    state, last = x[0], None
    for i in range(n):
        last = x[i] * 2
        state = state + last
    return state, last


def test_what_only_the_last_step_would_leave_is_an_error_not_a_guess() -> None:
    assert isinstance(leaves_something_behind, FunctionType)
    code = rewritten(leaves_something_behind)
    assert code is not None
    steps = FunctionType(code, {loops._HELPER: steps_in_turn, "range": range})

    class AnyLength(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return steps(x, x.shape[0])

    length = {0: torch.export.Dim("length")}
    with pytest.raises(UnboundLocalError, match="last"):
        torch.export.export(AnyLength(), (torch.rand(5, 2),), dynamic_shapes={"x": length}, strict=False)
