"""A model written for float32 computes in float64 what it means."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from onnx_config.export.double import DoubleMasks


@pytest.mark.parametrize("by_position", [pytest.param(True, id="by-position"), pytest.param(False, id="by-name")])
def test_a_mask_of_another_element_type_is_read_as_numbers(by_position: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    seen = torch.rand(2, 2, 20, 20) > 0.4
    mask = seen.float().masked_fill(~seen, -1e9)
    wanted = torch.softmax(query @ key.transpose(-1, -2) / 2 + mask.double(), -1) @ value
    with DoubleMasks():
        if by_position:
            found = scaled_dot_product_attention(query, key, value, mask)
        else:
            found = scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)
        truth = scaled_dot_product_attention(query, key, value, seen)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        truth, torch.softmax((query @ key.transpose(-1, -2) / 2).masked_fill(~seen, -1e9), -1) @ value
    )
