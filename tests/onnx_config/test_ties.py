"""Among equal values a graph takes those that PyTorch takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnx_config.export.parity import Outcome, check_parity, compute_references, open_session
from onnx_config.export.shapes import CheckShape
from onnx_config.export.ties import OpenChoices, TieWatch, first_of_equal
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


@pytest.mark.parametrize(
    ("row", "count", "largest", "first"),
    [
        pytest.param([5.0, 0, 7, 0, 0], 3, True, [2, 0, 1], id="some-of-the-equal"),
        pytest.param([5.0, 9, 7, 9, 9], 2, False, [0, 2], id="none-of-the-equal"),
        pytest.param([9.0, 5, 9, 9, 7], 3, False, [1, 4, 0], id="the-smallest"),
        pytest.param([5.0, 0, 7, 0, 1], 3, True, None, id="no-choice-among-the-equal"),
        pytest.param([0.0, 0, 0, 0, 0], 3, True, None, id="equal-all-over"),
        pytest.param([5.0, -np.inf, 7, -np.inf, -np.inf], 3, True, None, id="hidden"),
        pytest.param([5.0, 0, 7, 0, 0], 5, True, None, id="all-are-taken"),
    ],
)
def test_of_equal_values_the_first_are_taken_where_pytorch_leaves_it_open(
    row: list[float], count: int, largest: bool, first: list[int] | None
) -> None:
    x = torch.tensor([[0.0, 1, 2, 3, 4], row])
    plain = x.topk(count, largest=largest)
    with OpenChoices() as choices:
        seen = torch.topk(input=x, k=count, largest=largest)
    assert torch.equal(seen.indices, plain.indices)
    assert choices.rows == (first is not None and count == 3)
    assert choices.level_rows == (len(set(row)) == 1)
    with first_of_equal(level=False):
        settled = x.topk(count, -1, largest, True)
    assert torch.equal(settled.values, plain.values)
    assert settled.indices[1].tolist() == (first or plain.indices[1].tolist())
    assert torch.equal(settled.indices[0], plain.indices[0])
    if choices.level_rows:
        with first_of_equal(level=True):
            assert x.topk(count).indices[1].tolist() == [0, 1, 2]


class Sparse(Small):
    """Attends to the three best of scores that are cut off at zero."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        chosen = torch.relu(x * self.scale).topk(3, dim=-1).indices
        return {"y": x.gather(-1, chosen).sum(-1) * self.scale}


def sparse_feeds() -> list[tuple[CheckShape, dict[str, Any]]]:
    generator = np.random.default_rng(0)
    return [
        (
            CheckShape(label=f"length {n}", sizes={"length": n}),
            {"x": generator.standard_normal((4, n)).astype(np.float32) - np.float32(1.3)},
        )
        for n in (3, 9, 14, 20, 25)
    ]


@pytest.mark.parametrize(
    ("off", "outcome", "settled"),
    [
        pytest.param(0.0, Outcome.VERIFIED, True, id="the-first-of-equal-values"),
        pytest.param(1e-2, Outcome.MISMATCH, False, id="something-else"),
    ],
)
def test_a_graph_is_compared_with_an_answer_that_pytorch_may_give(
    tmp_path: Path, off: float, outcome: Outcome, settled: bool
) -> None:
    model = Sparse()
    shape = (("rows", 4), ("length", 19))
    result = traced(model, {"x": shape}, ["y"])
    run(result, tmp_path / "model.onnx", x=torch.rand(4, 19))
    with torch.no_grad():
        model.scale += off
    references, refused = compute_references(model, sparse_feeds(), flags={})
    assert not refused
    # Three of three are no choice.
    assert [bool(reference.settled) for reference in references] == [False, True, True, True, True]
    answer = check_parity(open_session(tmp_path / "model.onnx", device="cpu"), references, expected=["y"])
    assert answer.outcome is outcome, answer.detail
    assert bool(answer.settled) is settled
    assert all("length" in where for where in answer.settled)
