"""Values that a model's code reads become constants where they are always the same, and a clear refusal where not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export import escapes, symbolic
from onnx_config.export.escapes import escapes_of
from onnx_config.export.trace import Trace
from tests.onnx_config.test_trace import Small, run, shapes, traced

AXES = {"x": (("batch_size", 2), ("", 4))}


class Plain(Small):
    """Reads nothing."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.scale}


class Masking(Small):
    """Asks whether anything is marked, which no ordinary input does."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if (x > 100).any():
            x = x * 0
        return {"y": x * self.scale}


class Deciding(Small):
    """Takes one way or the other, as its inputs are."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * self.scale if x.sum() > 0 else x}


class Scaled(Small):
    """Computes with NumPy what comes of its weights alone."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = torch.from_numpy((self.scale.data.numpy() * 3).reshape(1)) * self.scale.data / self.scale
        return {"y": x * factor * self.scale.item()}


class Experts(Small):
    """Runs each expert that has something to do."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        chosen = torch.nn.functional.one_hot(x.argmax(dim=-1), num_classes=4)
        result = torch.zeros_like(x)
        for expert in torch.greater(chosen.sum(dim=0), 0).nonzero():
            number = expert[0]
            if number == 4:
                continue
            (rows,) = torch.where(chosen[:, number])
            result.index_add_(0, rows, x[rows] * (number + 1))
        return {"y": result * self.scale}


class Counted(Small):
    """Compares with a number that it read."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        filled = (x > -1000).sum().item()
        return {"y": x * self.scale if filled < 1000 else x}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    monkeypatch.setattr(escapes, "_MODELS", __name__)


def feeds() -> list[Mapping[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(rows, 4, generator=made)} for rows in (2, 3, 1, 5)]


def read_and_traced(model: Any) -> Trace:
    return traced(model, AXES, ["y"], escapes=lambda: (feeds()[0], escapes_of(lambda feed: model(**feed), feeds())))


@pytest.mark.parametrize(
    ("cls", "note"),
    [
        pytest.param(Masking, "is taken to find False", id="a decision"),
        pytest.param(Scaled, "is taken to read what it does", id="numbers of the weights"),
        pytest.param(Experts, None, id="experts"),
        pytest.param(Counted, None, id="a count"),
    ],
)
def test_what_is_always_read_is_a_constant(cls: type, note: str | None, tmp_path: Path) -> None:
    model = cls()
    result = read_and_traced(model)
    assert shapes(result)["x"] == ("batch_size", 4)
    assert [n for n in result.notes if "is taken to" in n] if note else not result.notes
    assert note is None or note in result.notes[0]
    for feed in feeds():
        got = run(result, tmp_path / "model.onnx", **feed)["y"]
        torch.testing.assert_close(torch.from_numpy(got), model(**feed)["y"].detach())


class Twice(Small):
    """Asks twice, of numbers that its input has and of ones that no input changes."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if (self.scale > 1e6).any():
            x = x + 1
        if int((x > 1000).sum()) == 0 and bool((x < 1000).all()):
            x = x * self.scale
        return {"count": (x > 0).sum(), "y": x}


@pytest.mark.parametrize("cls", [Masking, Twice])
def test_a_graph_refuses_what_its_model_decides_otherwise(cls: type, tmp_path: Path) -> None:
    model = cls()
    result = read_and_traced(model)
    feed = feeds()[0]
    torch.testing.assert_close(
        torch.from_numpy(run(result, tmp_path / "model.onnx", **feed)["y"]), model(**feed)["y"].detach()
    )
    marked = {"x": feed["x"].clone()}
    marked["x"][1, 2] = 2000
    with pytest.raises(Exception, match=r"test_escapes_py_\d+_is_taken_to_(find|read)"):
        run(result, tmp_path / "model.onnx", **marked)
    checks = [node for node in result.model.graph if "taken" in (node.name or "")]
    assert checks
    assert all(node.op_type == "Expand" for node in checks)
    # What the weights alone decide needs no check.
    assert len(checks) == (1 if cls is Masking else 2)


def test_a_decision_by_the_inputs_is_refused_with_its_place() -> None:
    with pytest.raises(ModelError, match=r"decides by the values of its inputs \(test_escapes.py:\d+\)") as caught:
        read_and_traced(Deciding())
    assert caught.value.kind is ErrorKind.EXPORT_FAILED


def test_a_model_that_reads_nothing_is_not_run_for_it() -> None:
    asked: list[None] = []
    traced(Plain(), AXES, ["y"], escapes=lambda: asked.append(None))
    assert not asked


def test_inputs_that_are_refused_are_left_out_but_for_the_first() -> None:
    def call(feed: int) -> None:
        if feed == 7:
            raise ValueError("no")

    assert escapes_of(call, [1, 7]).read(("file", 1, "item"), 0) == (False, None, False)
    with pytest.raises(ValueError, match="no"):
        escapes_of(call, [7, 1])
