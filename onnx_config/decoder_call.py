"""What a model that reads texts with images hands its decoder: positions, and what else it made of the images.

Where a class counts the positions of tokens by the grids of its images, it gives each token several: frame, row and
column. It does so in Python, value by value, so that no graph does it: the decoder's graph takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from onnx_config.errors import InputError
from onnx_config.spec import DecoderCall, LayeredFeatures

if TYPE_CHECKING:
    from onnx_config.input_generator import Array
    from onnx_config.trial import Trial

__all__ = ["POSITIONS", "decoder_call", "decoder_calls", "in_rows", "made_of_images"]

POSITIONS = "position_ids"
"""What a decoder calls the positions of the tokens that it is given."""

_RANK = 3
_METHOD = "get_image_features"
_BOTH = ("features", "mask")
_USUAL = frozenset({"input_ids", "inputs_embeds", "attention_mask", POSITIONS, "past_key_values", "cache_position"})


def decoder_call(
    trial: Trial, arrays: Mapping[str, Array], flags: Mapping[str, Any], *, stand_ins: Sequence[int] = ()
) -> DecoderCall:
    """Return how the decoder of a model that ``trial`` holds is called for inputs that it accepts.

    ``stand_ins`` are the tokens that stand for images.
    """
    with decoder_calls(trial.model) as calls, _features_made(trial.model) as made:
        trial.run(arrays, **flags)
    if not calls:
        return DecoderCall()
    positions = calls[0].get(POSITIONS)
    several = isinstance(positions, torch.Tensor) and positions.dim() == _RANK
    handed = made_of_images(calls[0])
    places = torch.from_numpy(np.isin(arrays["input_ids"], stand_ins)) if stand_ins else None
    layered = None if places is None else _layered({name: calls[0][name] for name in handed}, made, places)
    return DecoderCall(
        position_rows=positions.shape[0] if several and positions is not None else None,
        handed=() if layered is not None else tuple(handed),
        layered=layered,
    )


@contextmanager
def _features_made(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Note the lists of features that a model makes of images, each of all images together, until the exit."""
    base = model.base_model if hasattr(model, "base_model") else model
    found: dict[str, list[torch.Tensor]] = {}
    method = getattr(base, _METHOD, None)
    if method is None:
        yield found
        return

    def noted(*args: Any, **kwargs: Any) -> Any:
        returned = method(*args, **kwargs)
        for name, value in returned.items() if hasattr(returned, "items") else ():
            if isinstance(value, (list, tuple)) and all(isinstance(v, (list, tuple, torch.Tensor)) for v in value):
                found[name] = [part if isinstance(part, torch.Tensor) else torch.cat(list(part)) for part in value]
        return returned

    with patch.dict(base.__dict__, {_METHOD: noted}):
        yield found


def _layered(
    handed: Mapping[str, Any], made: Mapping[str, list[torch.Tensor]], places: torch.Tensor
) -> LayeredFeatures | None:
    """Return what a decoder is handed where that is features as they were made and where they belong; else ``None``."""
    masks = [name for name, value in handed.items() if isinstance(value, torch.Tensor) and torch.equal(value, places)]
    for argument, value in handed.items():
        for field, features in made.items() if isinstance(value, (list, tuple)) and len(handed) == len(_BOTH) else ():
            if masks and len(value) == len(features) and all(map(torch.equal, value, features)):
                return LayeredFeatures(field=field, argument=argument, mask=masks[0], count=len(value))
    return None


@contextmanager
def decoder_calls(model: Any) -> Iterator[list[dict[str, Any]]]:
    """Note the arguments by name of each call of a model's decoder, until the exit."""
    calls: list[dict[str, Any]] = []
    decoder = model.get_decoder()
    signature = inspect.signature(decoder.forward)

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        calls.append(given | (given.pop(rest, {}) if rest is not None else {}))

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def made_of_images(given: Mapping[str, Any]) -> list[str]:
    """Return which of a decoder's arguments are tensors, or lists of such, that no text alone comes with.

    >>> made_of_images({"inputs_embeds": torch.zeros(1), "deepstack": [torch.zeros(1)], "use_cache": True})
    ['deepstack']
    """
    return [name for name, value in given.items() if name not in _USUAL and _holds_tensor(value)]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def in_rows(positions: torch.Tensor, rows: int, texts: int, length: int) -> torch.Tensor:
    """Return positions as a graph takes them that gives each token ``rows`` of them (rows, texts, length).

    A class may give each token one position (texts, length), which then holds for all rows, as it does where a text
    goes on; and one row more at first, which tells packed texts apart.

    >>> in_rows(torch.tensor([[4]]), 3, 1, 1).tolist()
    [[[4]], [[4]], [[4]]]

    Raises:
        InputError: If there are more or fewer.
    """
    found = positions[None] if positions.dim() == _RANK - 1 else positions
    if found.dim() == _RANK and found.shape[0] == rows + 1:
        found = found[1:]
    fits = found.dim() == _RANK and found.shape[0] in (1, rows) and found.shape[1] in (1, texts)
    if not fits or found.shape[2] != length:
        raise InputError(
            f"The decoder's graph takes {rows} positions for each token; the class gives {list(positions.shape)} for "
            f"{texts} texts of {length} tokens."
        )
    return found.expand(rows, texts, length)
