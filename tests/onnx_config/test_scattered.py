"""What a mask picks is computed with and put back, also where it picks nothing."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from onnx_config.export import escapes, symbolic
from onnx_config.export.escapes import escapes_of
from tests.onnx_config.test_trace import Small, run, traced


class Routed(Small):
    """Computes with the marked tokens otherwise than with the others."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        marked = x[..., 0] > 0.5
        y = x.masked_scatter(marked.unsqueeze(-1), x[marked] * self.scale)
        return {"y": y.masked_scatter(~marked.unsqueeze(-1), x[~marked] + 3)}


class Added(Small):
    """Adds to the marked tokens, and to the others, in place."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        marked = x[..., 0] > 0.5
        y = x + 0
        y[marked] += x[marked] * self.scale
        y[~marked] += 3 * x[~marked]
        return {"y": y}


class Lacking(Small):
    """Has one value too few for the places that it marks."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        marked = x > 0.5
        return {"y": x.masked_scatter(marked, x[marked][1:] * self.scale)}


@pytest.fixture(autouse=True)
def _this_module_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_MODELS", __name__)
    monkeypatch.setattr(escapes, "_MODELS", __name__)


@pytest.mark.parametrize("model", [Routed(), Added()], ids=["scattered", "written"])
def test_nothing_is_put_back_where_nothing_was_picked(model: Small, tmp_path: Path) -> None:
    feed = {"x": torch.rand(2, 5, 3)}
    shape = {"x": (("batch_size", 2), ("sequence_length", 5), ("", 3))}
    result = traced(model, shape, ["y"], escapes=lambda: (feed, escapes_of(lambda given: model(**given), [feed])))
    for x in (torch.rand(3, 4, 3), torch.zeros(1, 4, 3), torch.ones(2, 7, 3)):
        got = run(result, tmp_path / "model.onnx", x=x)
        torch.testing.assert_close(torch.from_numpy(got["y"]), model(x)["y"].detach())


def test_fewer_values_than_places_are_refused(tmp_path: Path) -> None:
    model, feed = Lacking(), {"x": torch.rand(2, 5)}
    shape = {"x": (("batch_size", 2), ("sequence_length", 5))}
    with pytest.raises(RuntimeError, match="source"):
        model(feed["x"])
    result = traced(model, shape, ["y"])
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(result, tmp_path / "model.onnx", x=feed["x"])
