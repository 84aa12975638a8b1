"""Products of sizes that a model's code asks a shape for stay symbolic while it is traced."""

from __future__ import annotations

import torch

from onnx_config.export.shape_products import products_of_shapes, rewritten


class Counting(torch.nn.Module):
    """Compares with the number of elements of each row, as models do that look for empty images."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        count = pixel_values.shape[1:].numel()
        return (pixel_values == 0).flatten(1).sum(dim=1) != count


def plain(pixel_values: torch.Tensor) -> int:
    return pixel_values.numel()


def test_a_trace_holds_for_other_sizes() -> None:
    model, sample = Counting(), torch.zeros(2, 3, 4)
    sides = ({1: torch.export.Dim("height"), 2: torch.export.Dim("width")},)
    before = Counting.forward.__code__
    with products_of_shapes(model.forward):
        traced = torch.export.export(model, (sample,), dynamic_shapes=sides).module()
    assert Counting.forward.__code__ is before
    other = torch.zeros(2, 5, 6)
    other[0, 1, 1] = 1
    assert traced(other).tolist() == model(other).tolist() == [True, False]


def test_what_asks_no_part_of_a_shape_stays() -> None:
    assert rewritten(plain) is None
    with products_of_shapes(plain):
        assert plain(torch.zeros(2, 3)) == 6
