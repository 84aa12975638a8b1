"""Sizes that are reckoned of numbers which a model keeps as tensors stay symbols."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onnx_config.export.kept_numbers import numbers_of_tensors
from tests.onnx_config.test_trace import Small, run, shapes, traced


class Strided(Small):
    """Fills its rows up to whole strides before it convolves them, as audio codecs do, and cuts what was filled up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(2, 2, 6, stride=4)
        self.up = torch.nn.ConvTranspose1d(2, 2, 4, stride=4)
        stride, kernel = torch.tensor(4), torch.tensor(6)
        self.register_buffer("stride", stride, persistent=False)
        self.register_buffer("kernel", kernel, persistent=False)
        self.register_buffer("counted", torch.tensor(3))
        # A plain attribute, no buffer.
        self.before = kernel - stride

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        length = x.shape[-1]
        frames = (length - self.kernel + self.before) / self.stride + 1
        frames = torch.ceil(frames).to(torch.int64) - 1
        behind = frames * self.stride + self.kernel - self.before - length
        mode = "reflect" if length > max(self.before, behind) else "constant"
        filled = torch.nn.functional.pad(x, (self.before, behind), mode)
        half = self.before // 2 + self.before.item()
        return {"y": self.up(self.conv(filled))[..., :length] * self.scale, "z": x[..., : length - half]}


def test_a_length_that_is_filled_up_stays_a_symbol(tmp_path: Path) -> None:
    model = Strided()
    result = traced(model, {"x": (("batch_size", 2), ("", 2), ("sequence_length", 13))}, ["y", "z"])
    assert shapes(result)["x"] == ("batch_size", 2, "sequence_length")
    for length in (12, 15, 22):
        x = torch.rand(3, 2, length)
        for name, value in run(result, tmp_path / "model.onnx", x=x).items():
            torch.testing.assert_close(torch.from_numpy(value), model(x)[name].detach())


def test_the_tensors_are_there_again_afterwards() -> None:
    model = Strided()
    buffers, kept = dict(model.named_buffers()), model.before
    with numbers_of_tensors(model):
        assert (type(model.before) is not torch.Tensor, model.stride + 1, model.before > 1) == (True, 5, True)
        # What a checkpoint holds is a weight.
        assert list(dict(model.named_buffers())) == ["counted"]
        assert torch.equal(torch.ones(2) * model.kernel, torch.full((2,), 6.0))
        assert (model.kernel.dtype, model.kernel.to(torch.float32).dtype) == (torch.int64, torch.float32)
    assert model.before is kept
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys()
    assert all(after[name] is buffers[name] for name in after)
    assert "stride" not in vars(model)


@pytest.mark.parametrize("over", [6, 7, 8, 9])
def test_quotients_are_exact(over: int) -> None:
    model = Strided()
    plain = torch.tensor(over) / model.stride + 1
    with numbers_of_tensors(model):
        quotient = over / model.stride + 1
        assert (torch.ceil(quotient).to(torch.int64) - 1).item() == int(torch.ceil(plain)) - 1
        assert torch.floor(quotient).long().item() == int(torch.floor(plain))
        assert torch.ceil(quotient) * model.stride == int(torch.ceil(plain)) * 4
        assert torch.ceil(quotient) * 3 == int(torch.ceil(plain)) * 3
