"""Texts with places for images: as many of a token as there are features, in each row as many as its images have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.input_generator import Array, generate_inputs
from onnx_config.spec import TensorSpec

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration

__all__ = ["illustrated_texts"]

_IDS, _MASK = "input_ids", "attention_mask"


def illustrated_texts(
    counts: Sequence[int], token: int, *, config: Any, declaration: Declaration, words: int, seed: int, mask: str
) -> dict[str, Array]:
    """Return a row of ``input_ids`` and ``attention_mask`` for each of ``counts``, padded on the left.

    Args:
        counts: How many places for features each row has.
        token: The id that stands there.
        config: The model's config, for its vocabulary and special tokens.
        declaration: What its class declares.
        words: How many other tokens each row has, two at least.
        seed: Equal seeds give equal words.
        mask: The mask's element type.
    """
    specs = tuple(
        TensorSpec(name=name, dtype=dtype, shape=("batch_size", "sequence_length"))
        for name, dtype in ((_IDS, "int64"), (_MASK, mask))
    )
    length = max(counts) + words
    sizes = {"batch_size": len(counts), "sequence_length": length}
    plain = generate_inputs(specs, config, declaration, sizes, seed=seed)
    padded = generate_inputs(specs, config, declaration, sizes, seed=seed, padding=True, padding_side="left")
    # What fills a row up is what fills up a later one.
    filling = padded[_IDS][-1, 0] if len(counts) > 1 and not padded[_MASK][-1, 0] else 0
    ids, shown = plain[_IDS], plain[_MASK]
    for row, count in enumerate(counts):
        begin = length - words - count
        ids[row, :begin], shown[row, :begin] = filling, np.zeros((), shown.dtype)
        ids[row, begin + 1 : begin + 1 + count] = token
    return {_IDS: ids, _MASK: shown}
