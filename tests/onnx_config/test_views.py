"""What a model writes into a part of a tensor at indices is there where it reads the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onnx_config.export import escapes, symbolic
from onnx_config.export.escapes import escapes_of
from onnx_config.export.views import written_parts_kept
from tests.onnx_config.test_trace import Small, run, traced


class Slice(Small):
    """Writes into some columns."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * self.scale
        rows, steps = (x[:, :, 0] > 0.5).nonzero(as_tuple=True)
        y[rows, steps, :2] = -5.0
        return {"y": y}


class Whole(Small):
    """Writes into all that lies behind two indices, whose size is a symbol, of a transposed tensor."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = torch.einsum("bld,bsd->bls", x * self.scale, x).transpose(1, 2)
        rows, steps = (x[:, :, 0] > 0.5).nonzero(as_tuple=True)
        scores[rows, steps, :] = -5.0
        return {"y": scores.transpose(1, 2).sum(-1)}


class Before(Small):
    """Reads a part that was taken before the whole was written into."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * self.scale
        columns = y.transpose(1, 2)[:, :2]
        rows, steps = (x[:, :, 0] > 0.5).nonzero(as_tuple=True)
        y[rows, steps] = -5.0
        return {"y": y, "columns": columns * 2}


class Direct(Small):
    """Writes into the whole, which is all that it reads."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * self.scale
        rows, steps = (x[:, :, 0] > 0.5).nonzero(as_tuple=True)
        y[rows, steps] = x[rows, steps] - 3
        return {"y": y}


@pytest.mark.parametrize("cls", [Slice, Whole, Before, Direct])
def test_what_is_written_is_read(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    monkeypatch.setattr(escapes, "_MODELS", __name__)
    model = cls()
    made = torch.Generator().manual_seed(0)
    feeds = [{"x": torch.rand(rows, length, 3, generator=made)} for rows, length in ((2, 9), (3, 7), (1, 8))]
    result = traced(
        model,
        {"x": (("batch_size", 2), ("sequence_length", 9), ("", 3))},
        list(model(**feeds[0])),
        escapes=lambda: (feeds[0], escapes_of(lambda feed: model(**feed), feeds)),
    )
    assert any(node.op_type == "ScatterND" for node in result.model.graph)
    for feed in feeds:
        wanted = model(**feed)
        for name, value in run(result, tmp_path / "model.onnx", **feed).items():
            torch.testing.assert_close(torch.from_numpy(value), wanted[name].detach())


def test_the_exporter_is_left_as_it_was() -> None:
    from transformers.exporters import exporter_onnx  # noqa: F401  # makes its list of changes
    from transformers.exporters.utils import _FX_NODE_FIXES

    before = list(_FX_NODE_FIXES["onnx"])
    with written_parts_kept():
        # A release that does without the change needs none of ours.
        assert sum(one is not other for one, other in zip(_FX_NODE_FIXES["onnx"], before, strict=True)) <= 1
    assert _FX_NODE_FIXES["onnx"] == before
