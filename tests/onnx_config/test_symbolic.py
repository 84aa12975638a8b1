"""Sizes that a model's code takes through Python's own functions stay symbols."""

from __future__ import annotations

import builtins
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnx_config.export import symbolic
from onnx_config.export.symbolic import Positions, symbolic_builtins
from tests.onnx_config.test_trace import Small, run, shapes, traced


class Counting(Small):
    """Asks Python for the number of its rows, and makes a list of its positions."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = [-1]
        positions = first + list(range(x.shape[1]))[1:][::2]
        behind = torch.arange(positions[-1] + 1, device=x.device)
        backwards = torch.tensor(list(range(x.shape[1]))[::-1], device=x.device)
        return {"y": x.reshape(len(x), -1) * self.scale + backwards, "z": behind * len(positions)}


class Whole(Small):
    """Goes through its rows by pieces, of which the first is the whole."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        length = x.shape[1]
        pieces = [x[:, start : start + length] * self.scale for start in range(0, length, length)]
        late = [x[:, start:] for start in range(1, length + 1, length)]
        return {"y": torch.stack(pieces), "z": torch.stack(late)}


def test_a_range_of_one_step_over_an_axis_leaves_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    model = Whole()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y", "z"])
    assert shapes(result)["x"] == ("batch_size", "sequence_length")
    x = torch.rand(5, 9)
    for name, value in run(result, tmp_path / "model.onnx", x=x).items():
        torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())


class Planning(Small):
    """Makes arrays of NumPy as long as its rows, and tensors of those."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        length = x.shape[1]
        rows = np.stack([np.zeros((length, 2), dtype=np.int32)[1:], np.ones((length - 1, 2), dtype=np.int32)], axis=0)
        steps = np.concatenate([np.arange(length), np.arange(3)])
        halves = np.array([length, 4]) // 2
        same = torch.tensor(np.zeros(3) + np.arange(3.0), dtype=torch.float32)
        return {
            "y": x * self.scale * torch.tensor(rows, dtype=torch.long).sum(),
            "steps": torch.tensor(steps),
            "halves": torch.tensor(halves),
            "same": same * self.scale,
        }


@cache
def weights_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1]).reshape(shape)


class Remembering(Small):
    """Makes what depends on its sizes by a function that remembers what it made."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.scale + weights_of((x.shape[0], x.shape[1]))}


def test_what_is_remembered_by_a_size_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    weights_of.cache_clear()
    model = Remembering()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y"])
    assert shapes(result)["x"] == ("batch_size", "sequence_length")
    assert weights_of.cache_info().currsize == 0
    x = torch.rand(5, 9)
    torch.testing.assert_close(torch.from_numpy(run(result, tmp_path / "model.onnx", x=x)["y"]), model(x)["y"].detach())


def test_an_array_of_as_many_rows_stays_dynamic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    model = Planning()
    names = ["y", "steps", "halves", "same"]
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 6))}, names)
    assert shapes(result)["x"] == ("batch_size", "sequence_length")
    x = torch.rand(5, 9)
    for name, value in run(result, tmp_path / "model.onnx", x=x).items():
        torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach(), check_dtype=False)
    assert vars(sys.modules[__name__])["np"] is np


def test_a_length_asked_of_python_stays_dynamic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    model = Counting()
    result = traced(model, {"x": (("batch_size", 2), ("sequence_length", 6))}, ["y", "z"])
    assert shapes(result)["x"] == ("batch_size", "sequence_length")
    x = torch.rand(5, 9)
    for name, value in run(result, tmp_path / "model.onnx", x=x).items():
        torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())


@pytest.mark.parametrize(
    "key", [slice(1, -1), slice(None, None, 2), slice(1, None), slice(2, None, 3), slice(None, -1)]
)
@pytest.mark.parametrize("again", [slice(None, None, 2), slice(1, -1), slice(3, None, 2), slice(0, 2), slice(-2, None)])
def test_positions_are_what_the_list_would_be(key: slice, again: slice) -> None:
    for count in (6, 9):
        positions: Any = [-1] + Positions([], start=0, step=1, count=count)[key]
        plain = [-1, *builtins.list(range(count))[key]]
        assert builtins.list(positions) == plain
        assert builtins.list(positions[again]) == plain[again]
        assert (positions[0], positions[-1], len(positions)) == (plain[0], plain[-1], len(plain))
        assert positions.tensor().tolist() == plain


def test_the_names_mean_the_same_for_all_else_and_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    module = sys.modules[__name__]
    tensor = torch.tensor
    with symbolic_builtins(Counting()):
        bound = vars(module)
        assert bound["len"]([1, 2]) == 2
        assert bound["list"]((1, 2)) == [1, 2]
        assert bound["list"](bound["range"](1, 4)) == [1, 2, 3]
        assert isinstance([], bound["list"])
        assert not isinstance((), bound["list"])
        assert torch.tensor([1.5]).tolist() == [1.5]
    assert not {"len", "list", "range"} & vars(module).keys()
    assert torch.tensor is tensor


@pytest.mark.parametrize("options", [{}, {"dim": 1}, {"axis": 1}], ids=str)
def test_tensors_are_joined_along_any_axis_by_either_name(options: dict[str, int]) -> None:
    one, two = torch.zeros(2, 3), torch.ones(2, 3)
    want = torch.cat([one, two], **options), torch.stack([one, two], **options)
    with symbolic_builtins(torch.nn.Identity()):
        found = torch.cat([one, two], **options), torch.stack([one, two], **options)
    assert all(map(torch.equal, found, want))
