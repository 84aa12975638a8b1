"""Sizes of one axis are one symbol from the start of a trace."""

from __future__ import annotations

from typing import Any

import torch

from onnx_config.export.one_symbol import one_symbol_per_axis

Auto = torch.export.Dim.AUTO
PLACES = {("ids", 0): "batch", ("past.0.key", 0): "batch", ("ids", 1): "columns", ("past.0.key", 1): "others"}


class Apart(torch.nn.Module):
    """Never brings its inputs together, so that nothing says that they have as many rows."""

    def forward(self, ids: torch.Tensor, past: dict[str, dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return ids * 2, past["0"]["key"] + 1


def sizes(rows: int) -> list[list[str]]:
    inputs = {"ids": torch.ones(2, 5), "past": {"0": {"key": torch.ones(rows, 5)}}}
    dims = {0: Auto, 1: Auto}
    program = torch.export.export(Apart(), (), inputs, dynamic_shapes={"ids": dims, "past": {"0": {"key": dims}}})
    given: Any = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    return [[str(size) for size in tensor.shape] for tensor in given]


def test_an_axis_is_one_symbol_also_where_it_is_of_a_nested_input() -> None:
    (batch, columns), (batch_again, others) = sizes(2)
    assert batch != batch_again
    with one_symbol_per_axis(PLACES):
        (batch, columns), (batch_again, others) = sizes(2)
    assert batch == batch_again
    assert len({batch, columns, others}) == 3


def test_sizes_that_differ_are_not_one() -> None:
    with one_symbol_per_axis(PLACES):
        (batch, _), (batch_again, _) = sizes(3)
    assert batch != batch_again


def test_a_place_that_is_no_axis_has_its_own_symbol() -> None:
    with one_symbol_per_axis({}):
        (batch, _), (batch_again, _) = sizes(2)
    assert batch != batch_again
