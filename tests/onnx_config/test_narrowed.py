"""A trace that holds for fewer sizes than were declared is one; of a size that became a number, it is made in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onnx_config.export.narrowed import narrowed_sizes_told

Dim = torch.export.Dim


class Model(torch.nn.Module):
    """Computes by the number of columns in a way of its own."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.way = way

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.way(ids)  # type: ignore[no-any-return]  # a tensor


def export(way: Any, **limits: int) -> Any:
    dims = {0: Dim("rows", min=1), 1: Dim("columns", min=1, **limits)}
    return torch.export.export(Model(way), (), {"ids": torch.ones(2, 7)}, dynamic_shapes={"ids": dims})


def long_or_short(ids: torch.Tensor) -> torch.Tensor:
    return ids * 2 if ids.shape[1] > 4 else ids


def seven(ids: torch.Tensor) -> torch.Tensor:
    return ids + torch.ones(7)


def test_a_narrower_range_is_told_and_not_refused() -> None:
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        export(long_or_short)
    constants: list[Any] = []
    with narrowed_sizes_told(constants.extend) as range_of:
        program = export(long_or_short)
    (given,) = [n for n in program.graph.nodes if n.op == "placeholder"]
    rows, columns = (range_of(size.node.expr) for size in given.meta["val"].shape)
    assert (int(columns.lower), int(rows.lower)) == (5, 2)
    assert not constants
    assert torch.equal(program.module()(ids=torch.ones(3, 9)), torch.full((3, 9), 2.0))


def test_a_size_that_became_a_number_is_told_and_refused() -> None:
    constants: list[Any] = []
    with narrowed_sizes_told(constants.extend), pytest.raises(torch._dynamo.exc.UserError, match="Constraints viol"):
        export(seven)
    assert constants == [("ids", 1)]


def test_a_range_of_which_one_size_is_left_is_a_number() -> None:
    constants: list[Any] = []
    with narrowed_sizes_told(constants.extend), pytest.raises(torch._dynamo.exc.UserError, match="Constraints viol"):
        export(lambda ids: ids * 2 if ids.shape[0] < 3 else ids)
    assert constants == [("ids", 0)]
