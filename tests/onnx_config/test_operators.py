"""Operators that torch traces with the sample's sizes keep their symbols, and compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onnx_config.export import symbolic
from onnx_config.export.operators import symbolic_operators
from tests.onnx_config.test_trace import Small, run, shapes, traced


class Pooled(Small):
    """Pools rows, and cuts them into chunks by a quotient that torch makes a tensor of."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.nn.MaxPool1d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        halves = torch.div(x.shape[-1] + 1, 2, rounding_mode="trunc")
        length = torch.tensor(x.shape[-1], device=x.device)
        return {"y": self.pool(x) * self.scale, "z": torch.nn.functional.pad(x, (0, 1))[..., :halves] * length}


class Spaced(Small):
    """Makes as many numbers as there are columns, or half as many, and tensors of sizes."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        length = x.shape[-1]
        places = torch.linspace(0.5, length - 0.5, length, dtype=x.dtype, device=x.device) / length
        halves = torch.linspace(-1, 1, length // 2)
        sizes = torch.as_tensor([(length, 2), (x.shape[0], length - 1)], dtype=torch.long, device=x.device)
        shares = torch.tensor([1.5, length])
        return {"y": x * places * self.scale, "z": halves, "sizes": sizes, "shares": shares}


class Cells(Small):
    """Pools to a number of cells that need not divide its sizes, may be larger, and may be a size itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = torch.nn.AdaptiveAvgPool2d((3, 4))
        self.columns = torch.nn.AdaptiveAvgPool1d(20)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        halves = torch.nn.functional.adaptive_avg_pool2d(x, (None, x.shape[-1] // 2))
        return {"y": self.cells(x.unsqueeze(1)) * self.scale, "z": self.columns(x), "halves": halves}


class Picked(Small):
    """Reads and writes at one place of each row, which a range over the rows names."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        ends = (x > 0.5).sum((1, 2)) % x.shape[1]
        marked = x.clone()
        marked[range(x.shape[0]), ends] = 7.0
        return {"y": marked * self.scale, "z": x[range(x.shape[0]), ends], "rows": x[list(range(len(x)))[::-1]]}


class Itself(Small):
    """Hides each column from itself, and from one beyond the last."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        length = x.shape[-1]
        others = 1 - torch.eye(length, dtype=x.dtype, device=x.device)
        beyond = torch.eye(length, length + 1)
        # Nothing but sizes goes in, and what is made of it is taken apart.
        return {"y": x @ others * self.scale, "z": (x @ beyond).tril(), "eye": torch.eye(length, dtype=torch.int64)}


class Doubled(torch.autograd.Function):
    """A function with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.tensor(2.0, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class Functional(Small):
    """Keeps such a function, as quantised models do."""

    def __init__(self) -> None:
        super().__init__()
        self.function = Doubled.apply

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.function(x) * self.scale + Doubled.apply(x)}


@pytest.mark.parametrize("cls", [Pooled, Spaced, Cells, Picked, Itself, Functional])
def test_sizes_stay_symbols(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    model = cls()
    names = list(model(torch.rand(2, 3, 9)))
    result = traced(model, {"x": (("batch_size", 2), ("", 3), ("sequence_length", 9))}, names)
    assert shapes(result)["x"] == ("batch_size", 3, "sequence_length")
    x = torch.rand(3, 3, 14)
    for name, value in run(result, tmp_path / "model.onnx", x=x).items():
        torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())


def test_torch_is_left_as_it_was() -> None:
    model = Functional()
    before = (torch.nn.functional.max_pool1d, torch.div, torch.linspace, vars(torch.autograd.Function)["apply"])
    kept = vars(model)["function"]
    with symbolic_operators(model):
        assert torch.div is not before[1]
        assert torch.div(torch.tensor(7.0), 2, rounding_mode="floor").item() == 3
        assert vars(model)["function"] is not kept
    after = (torch.nn.functional.max_pool1d, torch.div, torch.linspace, vars(torch.autograd.Function)["apply"])
    assert after == before
    # A tensor whose members were asked for is no sequence of them to Python afterwards.
    assert torch.tensor([torch.tensor(7)]).tolist() == [7]
    assert vars(model)["function"] is kept


class Filled(Small):
    """Fills its rows up to whole blocks, and cuts that off where it is something."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        missing = (4 - x.shape[1] % 4) % 4
        filled = torch.nn.functional.pad(x, (0, 0, 0, missing)) * self.scale
        if missing > 0:
            return {"y": filled[:, :-missing], "z": filled.transpose(1, 2)[..., :-missing]}
        return {"y": filled, "z": filled.transpose(1, 2)}


def test_what_is_cut_off_may_be_nothing(tmp_path: Path) -> None:
    model = Filled()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 9), ("", 3))}, ["y", "z"])
    assert shapes(result)["x"] == ("batch_size", "sequence_length", 3)
    for length in (5, 8):
        x = torch.rand(3, length, 3)
        for name, value in run(result, tmp_path / "model.onnx", x=x).items():
            torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())


class Squeezed(Small):
    """Takes an axis away that is of size one for one row only, as code does that was written for one row."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.squeeze(0) * self.scale, "z": torch.squeeze(x, dim=1).sum(-1), "w": x[x[..., 0] > 0].squeeze(1)}


def test_an_axis_of_more_than_one_step_stays(tmp_path: Path) -> None:
    model = Squeezed()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 9), ("", 3))}, ["y", "z", "w"])
    x = torch.rand(3, 5, 3) - 0.5
    for name, value in run(result, tmp_path / "model.onnx", x=x).items():
        torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())
