"""Among equal values a graph takes those that PyTorch takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onnx_config.export.ties import TieWatch
from tests.onnx_config.test_trace import Small, run, traced


class Router(Small):
    """Sends each row to two of four experts by scores that may all be equal."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        values, experts = (x * self.scale).topk(2, dim=1)
        return {"values": values, "experts": experts}


@pytest.mark.parametrize("scores", [pytest.param(torch.zeros(3, 4), id="equal"), pytest.param(None, id="different")])
def test_a_top_k_chooses_as_pytorch_does(scores: torch.Tensor | None, tmp_path: Path) -> None:
    x = torch.rand(3, 4) if scores is None else scores
    model = Router()
    result = traced(model, {"x": (("batch_size", 2), ("", 4))}, ["values", "experts"], tied=True)
    wanted = model(x)
    for name, value in run(result, tmp_path / "model.onnx", x=x).items():
        assert value.tolist() == wanted[name].tolist()


def test_a_graph_without_ties_has_nothing_to_look_up() -> None:
    plain = traced(Router(), {"x": (("batch_size", 2), ("", 4))}, ["experts"])
    assert "Gather" not in {node.op_type for node in plain.model.graph}


@pytest.mark.parametrize(
    ("x", "count", "seen"),
    [
        pytest.param(torch.zeros(3, 4), 2, True, id="all-equal"),
        pytest.param(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), 1, True, id="one-row"),
        pytest.param(torch.zeros(3, 4), 4, False, id="all-are-taken"),
        pytest.param(torch.arange(4.0), 2, False, id="different"),
        pytest.param(torch.zeros(0, 4), 2, False, id="no-rows"),
    ],
)
def test_ties_are_seen(x: torch.Tensor, count: int, seen: bool) -> None:
    with TieWatch() as watch:
        x.topk(count, dim=-1)
    assert watch.seen is seen
