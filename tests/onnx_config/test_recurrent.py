"""Recurrent layers are one operator of the graph each, for any length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from onnx_config.export.recurrent import recurrent_layers_whole
from tests.onnx_config.test_trace import Small, run, shapes, traced


class Recurrent(Small):
    """Tells what a recurrent layer says of each step, and its states at the end."""

    def __init__(self, layer: torch.nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        steps, state = self.layer(x * self.scale)
        states = state if isinstance(state, tuple) else (state,)
        return {"y": steps, **{f"state_{number}": value for number, value in enumerate(states)}}


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_layers": 2, "bidirectional": True}, id="both-directions"),
        pytest.param({"num_layers": 2, "bias": False, "batch_first": True}, id="without-biases"),
    ],
)
def test_a_layer_is_one_operator_for_any_length(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recurrent(getattr(torch.nn, kind)(3, 5, **options)).eval()
    axes = [("batch_size", 2), ("sequence_length", 7)]
    first = options.get("batch_first", False)
    names = ["y", "state_0", *(["state_1"] if kind == "LSTM" else [])]
    result = traced(model, {"x": (*(axes if first else axes[::-1]), ("", 3))}, names)
    assert shapes(result)["x"] == (*(name for name, _ in (axes if first else axes[::-1])), 3)
    assert Counter(node.op_type for node in result.model.graph)[kind] == options.get("num_layers", 1)
    for batch, length in ((1, 1), (3, 12), (2, 40)):
        x = torch.rand((batch, length, 3) if first else (length, batch, 3))
        for name, value in run(result, tmp_path / "model.onnx", x=x).items():
            torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's word about its own speed
def test_what_onnx_has_no_layer_for_is_left_to_torch() -> None:
    projecting, packed = torch.nn.LSTM(3, 5, proj_size=2), torch.nn.GRU(3, 5)
    x = torch.rand(4, 2, 3)
    rows = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]))
    wanted = projecting(x)[0], packed(rows)[0].data
    original = torch._VF.lstm
    with recurrent_layers_whole(), torch.no_grad():
        torch.testing.assert_close((projecting(x)[0], packed(rows)[0].data), wanted)
    assert torch._VF.lstm is original
