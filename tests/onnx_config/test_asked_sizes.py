"""What code of a model hears of sizes that nobody knows while a graph is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from onnx_config.errors import ModelError
from onnx_config.export.asked_sizes import asked_of_sizes
from tests.onnx_config.test_trace import Small, run, traced

# As the experts of LongCat-Flash spare themselves work; whose code it is, is told by its module.
CODE = """
def added(x, total):
    token, = torch.where((x > 0).all(-1))
    if token.numel() == 0:
        return total
    return total.index_add(0, token, 2 * x[token])
"""


class Picking(Small):
    """Adds twice the rows that are above zero throughout, which may be none."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self.code: dict[str, Any] = {"torch": torch, "__name__": home}
        exec(CODE, self.code)  # noqa: S102  # code of ours

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.code["added"](x, x * self.scale)}


def test_a_model_that_asks_whether_anything_was_picked_hears_that_it_was(tmp_path: Path) -> None:
    model = Picking("transformers.models.made")
    result = traced(model, {"x": (("batch_size", 4), ("", 3))}, ["y"])
    for x in (torch.rand(3, 3) + 1, -torch.rand(5, 3), torch.tensor([[1.0, 2, 3], [-1, 2, 3]])):
        got = run(result, tmp_path / "model.onnx", x=x)["y"]
        torch.testing.assert_close(torch.from_numpy(got), model(x)["y"].detach())


def test_anybody_else_is_refused_an_answer() -> None:
    with pytest.raises(ModelError, match="data-dependent"):
        traced(Picking("somebody.made"), {"x": (("batch_size", 4), ("", 3))}, ["y"])


def test_sizes_that_a_model_compares_with_one_are_noted_and_no_others() -> None:
    code: dict[str, Any] = {"__name__": "transformers.models.made"}
    exec("def asks(size): return size == 1, size == 2, size > 0", code)  # noqa: S102  # code of ours
    environment = ShapeEnv()
    size = environment.create_unbacked_symint()
    torch._check(size >= 2)
    with asked_of_sizes() as found:
        assert (size == 1) is not None  # nobody's code
        assert not found
        code["asks"](size)
    assert len(found) == 1
    assert found[0] is size
