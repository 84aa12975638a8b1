"""Dummy inputs: seeded values that a model accepts, for any size of its axes.

Values respect what the config and the docstrings declare: ids lie in the vocabulary and are no
special tokens, sequences end as the model expects, boxes have their corners in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_config.config_sizes import config_for, modality_of
from onnx_config.spec import TensorSpec

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration

__all__ = ["Array", "generate_inputs", "special_token_ids"]

Array = npt.NDArray[Any]


def generate_inputs(
    inputs: Sequence[TensorSpec],
    config: Any,
    declaration: Declaration,
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    padding: bool = False,
) -> dict[str, Array]:
    """Return one NumPy array per input, in their order.

    Args:
        inputs: The inputs to make.
        config: The model's config, for vocabularies and special tokens.
        declaration: What the class declares about its arguments.
        sizes: Dynamic axis -> size in elements.
        seed: Equal seeds give equal values.
        padding: Whether the later rows of a batch are shorter and padded on the right, as a
            tokenizer pads: the mask is 0 there, and ids are the padding token. Rows keep two
            thirds of their length.

    Raises:
        ModelError: If ``sizes`` lacks an axis.
    """
    generator = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for spec in inputs:
        arrays[spec.name] = _values(spec, spec.resolve(sizes), config, declaration, generator)
    if padding:
        _pad(arrays, config)
    return arrays


def _values(
    spec: TensorSpec, shape: tuple[int, ...], config: Any, declaration: Declaration, generator: np.random.Generator
) -> Array:
    dtype = np.dtype(spec.dtype)
    if spec.name.endswith("mask") or spec.name.endswith("observed_mask"):
        return np.ones(shape, dtype)
    if dtype.kind == "b":
        return np.zeros(shape, dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if spec.name.endswith("input_ids") or spec.name == "input_ids":
        return _token_ids(spec.name, shape, config, generator).astype(dtype)
    if spec.name == "bbox" or (spec.name.endswith("boxes") and shape[-1:] == (4,)):
        return _boxes(shape, _limit(spec.name, config, declaration, 1000), generator).astype(dtype)
    return generator.integers(0, _limit(spec.name, config, declaration, 2), shape).astype(dtype)


def _limit(name: str, config: Any, declaration: Declaration, default: int) -> int:
    """Return the exclusive upper bound of an index by its documentation and the config."""
    argument = declaration.argument(name)
    limit = argument.index_limit if argument is not None else None
    text = config_for(config, "text")
    if isinstance(limit, str):
        found = getattr(text, limit, getattr(config, limit, None))
        limit = found if isinstance(found, int) else None
    value = limit or default
    if name.startswith("token_type"):
        types = getattr(text, "type_vocab_size", value)
        if isinstance(types, int) and types > 0:
            value = min(value, types)
    return max(1, int(value))


def special_token_ids(config: Any) -> set[int]:
    """Return every id that a config names as a special token, in all its parts."""
    found: set[int] = set()

    def walk(value: Any) -> None:
        for key, item in value.items():
            if isinstance(item, dict):
                walk(item)
            elif isinstance(key, str) and key.endswith(("_token_id", "_token_index", "_token_ids")):
                ids = item if isinstance(item, (list, tuple)) else [item]
                found.update(i for i in ids if isinstance(i, int) and not isinstance(i, bool))

    walk(config.to_dict())
    return found


def _token_ids(name: str, shape: tuple[int, ...], config: Any, generator: np.random.Generator) -> Array:
    decoder = name.startswith("decoder")
    text = _decoder_config(config) if decoder else config_for(config, "text")
    size = next(
        (v for c in (text, config) if isinstance(v := getattr(c, "vocab_size", None), int) and v > 0),
        100,
    )
    special = {i for i in special_token_ids(config) if 0 <= i < size}
    ordinary = np.array([i for i in range(min(size, len(special) + 30_000)) if i not in special] or range(size))
    ids = generator.choice(ordinary, shape)
    start, end = _token(config, text, "decoder_start_token_id"), _token(config, text, "eos_token_id")
    if decoder:
        if start is not None and 0 <= start < size and shape[-1] > 0:
            ids[..., 0] = start
    elif end is not None and 0 <= end < size and shape[-1] > 0:
        # Models that pool at the end of a text look for its last token.
        ids[..., -1] = end
    return np.asarray(ids)


def _decoder_config(config: Any) -> Any:
    decoder = getattr(config, "decoder", None)
    return decoder if hasattr(decoder, "to_dict") else config_for(config, "text")


def _token(config: Any, text: Any, name: str) -> int | None:
    for holder in (text, config):
        value = getattr(holder, name, None)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if isinstance(value, int):
            return value
    return None


def _boxes(shape: tuple[int, ...], limit: int, generator: np.random.Generator) -> Array:
    """Return boxes (x0, y0, x1, y1) with the first corner above and left of the second."""
    corners = generator.integers(0, limit, (*shape[:-1], 2, 2))
    return np.sort(corners, axis=-2).reshape(shape)


def _pad(arrays: dict[str, Array], config: Any) -> None:
    """Shorten all rows but the first of each masked batch, in place."""
    for name, mask in arrays.items():
        if not name.endswith("mask") or mask.ndim < 2 or mask.shape[0] < 2 or mask.shape[-1] < 3:
            continue
        if name.startswith("decoder") or modality_of(name) == "time":
            continue
        keep = max(2, mask.shape[-1] * 2 // 3)
        mask[1:, ..., keep:] = 0
        ids = arrays.get("input_ids")
        if ids is not None and ids.shape == mask.shape and modality_of(name) == "text":
            _pad_ids(ids, keep, config)


def _pad_ids(ids: Array, keep: int, config: Any) -> None:
    text = config_for(config, "text")
    pad = _token(config, text, "pad_token_id")
    end = _token(config, text, "eos_token_id")
    if end is not None and end >= 0:
        ids[1:, ..., keep - 1] = ids[1:, ..., -1]
    if pad is not None and pad >= 0:
        ids[1:, ..., keep:] = pad
