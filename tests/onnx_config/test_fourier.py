"""Fourier transforms are as exact in the graph as in PyTorch, of any number of numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from onnx_config.export.fourier import _MOST
from tests.onnx_config.test_trace import Small, run, traced


class Mixed(Small):
    """Mixes features and steps, correlates steps by way of half a spectrum, and goes there and back again."""

    def build(self) -> None:
        self.transform = partial(torch.fft.fftn, dim=(1, 2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        spectrum = torch.fft.rfft(x * self.scale, n=x.shape[1], dim=1)
        return {
            "kept": self.transform(x).real,
            "mixed": torch.fft.fft(torch.fft.fft(x, axis=-1), axis=1).real,
            "correlated": torch.fft.irfft(spectrum * spectrum.conj(), n=x.shape[1], dim=1),
            "back": torch.fft.ifft(torch.fft.fft(x, norm="ortho"), norm="ortho").real,
        }


class Filled(Small):
    """Transforms more numbers, and fewer, than there are; and more than a table is made for."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        more, fewer = torch.fft.fft(x * self.scale, 9), torch.fft.rfft(x, 4, norm="forward")
        parts = (torch.fft.irfft(more, 5), more.imag, fewer.real, torch.fft.irfft(fewer, 8))
        return {"y": torch.cat(parts, dim=-1), "long": torch.fft.fft(x.repeat(1, _MOST // 6 + 1)).real}


def test_a_transform_is_as_exact_as_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, outputs = Mixed(), ("kept", "mixed", "correlated", "back")
    shape = {"x": (("batch_size", 2), ("sequence_length", 14), ("", 6))}
    result = traced(model, shape, outputs, axis_ranges={"sequence_length": (1, 512)})
    assert "DFT" not in {node.op_type for node in result.model.graph}
    for length in (1, 2, 13, 64, 211, 512):
        x = torch.randn(3, length, 6)
        got = run(result, tmp_path / "model.onnx", x=x)
        with torch.no_grad():
            want, exact = model(x), model.double()(x.double())
        model.float()
        for name in outputs:
            off = (torch.from_numpy(got[name]) - exact[name]).abs().max()
            assert off <= 4 * (want[name] - exact[name]).abs().max() + 1e-6 * exact[name].abs().max(), (name, length)


def test_what_is_cut_off_or_filled_up_is_as_in_torch(tmp_path: Path) -> None:
    model, x = Filled(), torch.randn(3, 6)
    result = traced(model, {"x": (("batch_size", 2), ("", 6))}, ["y", "long"])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(run(result, tmp_path / "model.onnx", x=x)["y"]), model(x)["y"])
    # The long one alone is left to ONNX Runtime.
    assert [node.op_type for node in result.model.graph].count("DFT") == 1
