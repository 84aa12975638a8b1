"""Dummy inputs: seeded values that a model accepts, for any size of its axes.

Values respect what the config and the docstrings declare: ids lie in the vocabulary and are no
special tokens, sequences end as the model expects, boxes have their corners in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_config.config_sizes import config_for, modality_of
from onnx_config.grid_values import grid_rows, room_for_grids, shown_patches
from onnx_config.image_places import mark_places, places_needed, put_places
from onnx_config.picture_values import blanked, picture_sizes, shares
from onnx_config.prompt_values import prompt_values
from onnx_config.spec import TensorSpec, ValueRule, is_past, size_of

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration

__all__ = ["Array", "generate_inputs", "picks_tokens", "positions_of", "special_token_ids", "with_room"]

Array = npt.NDArray[Any]

_POSITIONS_APART = 5


def generate_inputs(
    inputs: Sequence[TensorSpec],
    config: Any,
    declaration: Declaration,
    sizes: Mapping[str, int],
    *,
    rules: Mapping[str, ValueRule] = MappingProxyType({}),
    seed: int = 0,
    padding: bool = False,
    padding_side: str = "right",
    pad_token_id: int | None = None,
    begins: bool = False,
    chosen: bool = True,
) -> dict[str, Array]:
    """Return one NumPy array per input, in their order.

    Args:
        inputs: The inputs to make.
        config: The model's config, for vocabularies and special tokens.
        declaration: What the class declares about its arguments.
        sizes: Dynamic axis -> size in elements.
        rules: Input name -> what its values must be, where that had to be found out.
        seed: Equal seeds give equal values.
        padding: Whether the later rows of a batch are shorter and padded, as a tokenizer pads:
            the mask is 0 there, and ids are the padding token. Rows keep two thirds of their
            length. Where a mask also covers steps before the ids, it is these that are padded.
        padding_side: ``"right"`` or ``"left"``: where texts are padded.
        pad_token_id: What fills them; ``None``: the config's padding token.
        begins: Whether nothing came before, so that all of the cache is zeros.
        chosen: Whether a second mask over the tokens, of those that are to be treated otherwise, picks any.

    Raises:
        ModelError: If ``sizes`` lacks an axis.
    """
    generator = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for spec in inputs:
        values = _values(spec, spec.resolve(sizes), config, declaration, generator)
        rule = rules.get(spec.name)
        if rule is None and _chooses(spec, inputs):
            values = generator.integers(0, 2 if chosen else 1, values.shape).astype(values.dtype)
        arrays[spec.name] = values if rule is None else _obey(rule, values, sizes, generator)
    put_places(rules, arrays)
    if padding:
        placeholders = sum(count for rule in rules.values() for _, count in rule.placeholders(sizes))
        least = max(placeholders + 2, places_needed(inputs, rules, sizes))
        _pad(arrays, config, least=least, side=padding_side, token=pad_token_id)
    mark_places(rules, arrays)
    shown_patches(inputs, rules, arrays)
    if any(map(is_past, arrays)):
        _number_positions(arrays)
    if begins:
        arrays |= {name: np.zeros_like(array) for name, array in arrays.items() if is_past(name)}
    return arrays


def _number_positions(arrays: dict[str, Array]) -> None:
    """Let a continued text's positions count what its mask shows, in place, as transformers does it."""
    mask, positions = arrays.get("attention_mask"), arrays.get("position_ids")
    if mask is None or positions is None:
        return
    counted = positions_of(mask, positions.shape[-1])
    if positions.ndim == len(("rows of positions", "texts", "tokens")):
        # No two rows of positions are alike, so that none is taken for another.
        steps = np.arange(positions.shape[0])[:, None] * np.arange(positions.shape[-1])[None, :]
        counted = counted[None] + (steps % _POSITIONS_APART)[:, None]
    arrays["position_ids"] = counted.astype(positions.dtype)


def positions_of(mask: Array, count: int) -> Array:
    """Return where the last ``count`` tokens of each row stand (…, count), counting what the mask (…, length) shows.

    >>> positions_of(np.array([[0, 1, 1, 1]]), 2)
    array([[1, 2]])
    """
    counted: Array = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    return counted[..., counted.shape[-1] - count :]


def _chooses(spec: TensorSpec, inputs: Sequence[TensorSpec]) -> bool:
    """Return whether an input is a second mask over the very tokens of the first.

    One hides what is no text; the other picks tokens (those of global attention, say), of each row others and not as
    many, and a graph that knows only of all or none is wrong for most.
    """
    hiding = next((tensor for tensor in inputs if tensor.name == "attention_mask"), None)
    beside = spec.name.endswith("_mask") and hiding is not None and spec.name != hiding.name
    return beside and hiding is not None and spec.shape == hiding.shape and spec.dtype == hiding.dtype


def picks_tokens(inputs: Sequence[TensorSpec]) -> bool:
    """Return whether an input is a second mask over the tokens, of those that are to be treated otherwise."""
    return any(_chooses(spec, inputs) for spec in inputs)


def with_room(inputs: Sequence[TensorSpec], rules: Mapping[str, ValueRule], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return ``sizes`` with texts long enough for their placeholders, and patches enough for the images, at these."""
    room = room_for_grids(inputs, rules, sizes)
    for spec in inputs:
        rule = rules.get(spec.name)
        axis = spec.shape[-1] if spec.shape else None
        if rule is not None and isinstance(axis, str) and axis in room:
            needed = sum(count for _, count in rule.placeholders(sizes))
            room[axis] = max(room[axis], needed + 2 if needed else 0)
            room[axis] = max(room[axis], 0 if rule.places is None else places_needed(inputs, rules, room))
    return room


def _obey(rule: ValueRule, values: Array, sizes: Mapping[str, int], generator: np.random.Generator) -> Array:
    """Change ``values`` as ``rule`` says."""
    if rule.below is not None:
        # The remainder of a small negative fraction is next to the bound.
        values = (np.abs(values) if values.dtype.kind == "f" else values) % max(1, rule.below)
    if rule.ones is not None:
        values = np.zeros_like(values)
        values[..., 1 : 1 + rule.ones] = 1
    if rule.sizes:
        row = [size_of(size, sizes) for size in rule.sizes]
        values = np.broadcast_to(np.array(row, values.dtype), values.shape).copy()
    if rule.grid is not None:
        values = grid_rows(rule.grid, values.shape[0], values.shape[1], sizes).astype(values.dtype)
    if rule.choices:
        values = np.resize(np.array(rule.choices, values.dtype), values.shape[:1]).reshape(-1, *[1] * (values.ndim - 1))
    if rule.pictures is not None:
        first = int(generator.integers(len(rule.pictures.sizes)))
        values = picture_sizes(rule.pictures, values.shape[0], sizes, first=first)
    if rule.shares is not None:
        values = shares(size_of(rule.shares, sizes), values.shape[0]).astype(values.dtype)
    if rule.blanks:
        values = blanked(values)
    position = 1
    for token, count in rule.placeholders(sizes):
        values[..., position : position + count] = token
        position += count
    return values


def _values(
    spec: TensorSpec, shape: tuple[int, ...], config: Any, declaration: Declaration, generator: np.random.Generator
) -> Array:
    dtype = np.dtype(spec.dtype)
    if (asked := prompt_values(spec, shape, config, declaration, generator)) is not None:
        return asked
    if spec.name.endswith("mask") or spec.name.endswith("observed_mask"):
        return np.ones(shape, dtype)
    if dtype.kind == "b":
        return np.zeros(shape, dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if spec.name.endswith("input_ids") or spec.name == "input_ids":
        return _token_ids(spec.name, shape, config, generator).astype(dtype)
    if spec.name.endswith(("bbox", "boxes")) and shape[-1:] == (4,):
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
    special = [i for i in special_token_ids(config) if 0 <= i < size]
    ordinary = np.setdiff1d(np.arange(min(size, len(special) + 30_000)), special, assume_unique=True)
    ids = generator.choice(ordinary if ordinary.size else np.arange(size), shape)
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


def _pad(arrays: dict[str, Array], config: Any, *, least: int, side: str, token: int | None) -> None:
    """Shorten all rows but the first of each masked batch to ``least`` tokens or more, in place."""
    ids = arrays.get("input_ids")
    for name, mask in arrays.items():
        if not name.endswith("mask") or mask.ndim < 2 or mask.shape[0] < 2 or mask.shape[-1] < 3:
            continue
        if name.startswith("decoder") or modality_of(name) == "time":
            continue
        keep = max(least, mask.shape[-1] * 2 // 3)
        # An encoder's mask beside a decoder's tokens is of other steps.
        of_text = ids is not None and modality_of(name) == "text" and not name.startswith("encoder")
        if of_text and ids is not None and ids.shape[-1] < mask.shape[-1] and ids.shape[:-1] == mask.shape[:-1]:
            # The new tokens come last: what is missing is missing in the past.
            mask[1:, ..., : mask.shape[-1] - max(keep, ids.shape[-1])] = 0
        elif of_text and ids is not None and ids.shape == mask.shape:
            mask[1:] = _shifted(mask[1:], keep, side, fill=0)
            _pad_ids(ids, keep, config, side=side, token=token)
        else:
            mask[1:, ..., keep:] = 0


def _shifted(rows: Array, keep: int, side: str, *, fill: int | None) -> Array:
    """Return rows of which the first ``keep`` elements remain, beside what fills them; ``None`` leaves that as is."""
    if keep >= rows.shape[-1]:
        return rows
    shifted = np.roll(rows, rows.shape[-1] - keep, axis=-1) if side == "left" else rows.copy()
    if fill is not None:
        shifted[..., slice(None, rows.shape[-1] - keep) if side == "left" else slice(keep, None)] = fill
    return shifted


def _pad_ids(ids: Array, keep: int, config: Any, *, side: str, token: int | None) -> None:
    text = config_for(config, "text")
    pad = _token(config, text, "pad_token_id") if token is None else token
    end = _token(config, text, "eos_token_id")
    if end is not None and end >= 0:
        ids[1:, ..., keep - 1] = ids[1:, ..., -1]
    ids[1:] = _shifted(ids[1:], keep, side, fill=pad if pad is not None and pad >= 0 else None)
