"""What transformers takes for an input that is not given."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["filled"]


def filled(name: str, given: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what a missing input is taken for beside those ``given``; ``None`` where transformers would refuse."""
    match name:
        case "attention_mask" if "input_ids" in given:
            return torch.ones_like(given["input_ids"], dtype=torch.int64)
        case "attention_mask" if "input_values" in given and given["input_values"].ndim == 2:
            return torch.ones_like(given["input_values"], dtype=torch.int64)
        case "decoder_attention_mask" if "decoder_input_ids" in given:
            return torch.ones_like(given["decoder_input_ids"], dtype=torch.int64)
        case "token_type_ids" if "input_ids" in given:
            return torch.zeros_like(given["input_ids"], dtype=torch.int64)
        case "pixel_mask" if "pixel_values" in given and given["pixel_values"].ndim == 4:
            rows, _, *sides = given["pixel_values"].shape
            return torch.ones(rows, *sides, dtype=torch.int64, device=given["pixel_values"].device)
        case _:
            return None
