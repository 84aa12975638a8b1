"""A model written for float32 computes in float64 what it means."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import grouped_mm, scaled_dot_product_attention

from onnx_config.export.double import DoubleOperators


@pytest.mark.parametrize("by_position", [pytest.param(True, id="by-position"), pytest.param(False, id="by-name")])
def test_a_mask_of_another_element_type_is_read_as_numbers(by_position: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    seen = torch.rand(2, 2, 20, 20) > 0.4
    mask = seen.float().masked_fill(~seen, -1e9)
    wanted = torch.softmax(query @ key.transpose(-1, -2) / 2 + mask.double(), -1) @ value
    with DoubleOperators():
        if by_position:
            found = scaled_dot_product_attention(query, key, value, mask)
        else:
            found = scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)
        truth = scaled_dot_product_attention(query, key, value, seen)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        truth, torch.softmax((query @ key.transpose(-1, -2) / 2).masked_fill(~seen, -1e9), -1) @ value
    )


@pytest.mark.parametrize("by_position", [pytest.param(True, id="by-position"), pytest.param(False, id="by-name")])
def test_a_product_by_groups_of_rows_is_computed_in_float64(by_position: bool) -> None:
    torch.manual_seed(0)
    rows, matrices = torch.randn(7, 4, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    # The second matrix has no rows, and the last row is no matrix's.
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    with DoubleOperators():
        if by_position:
            found = grouped_mm(rows, matrices, offs=ends)
        else:
            found = grouped_mm(mat_a=rows, mat_b=matrices, offs=ends, bias=None)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found[:6], torch.cat([rows[:2] @ matrices[0], rows[2:6] @ matrices[2]]))
    assert not found[6:].any()


def test_a_product_by_groups_of_rows_in_float32_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    rows, matrices, ends = torch.randn(4, 4), torch.randn(2, 4, 8), torch.tensor([1, 4], dtype=torch.int32)
    with DoubleOperators():
        assert torch.equal(grouped_mm(rows, matrices, offs=ends), grouped_mm(rows, matrices, offs=ends))
        assert grouped_mm(rows, matrices, offs=ends).dtype is torch.float32
