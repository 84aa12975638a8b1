"""What a model that reads texts with images hands its decoder: positions, and what else it made of the images.

Where a class counts the positions of tokens by the grids of its images, it gives each token several: frame, row and
column. It does so in Python, value by value, so that no graph does it: the decoder's graph takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from onnx_config.errors import InputError

if TYPE_CHECKING:
    from onnx_config.input_generator import Array
    from onnx_config.trial import Trial

__all__ = ["POSITIONS", "DecoderCall", "decoder_call", "decoder_calls", "in_rows", "made_of_images"]

POSITIONS = "position_ids"
"""What a decoder calls the positions of the tokens that it is given."""

_RANK = 3
_USUAL = frozenset({"input_ids", "inputs_embeds", "attention_mask", POSITIONS, "past_key_values", "cache_position"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCall:
    """How a decoder is called for a text with images."""

    position_rows: int | None = None
    """How many positions each token is given; ``None``: one, or none."""

    handed: tuple[str, ...] = ()
    """Tensors that it is given beside embeddings, a mask, positions and its cache, by its own names."""


def decoder_call(trial: Trial, arrays: Mapping[str, Array], flags: Mapping[str, Any]) -> DecoderCall:
    """Return how the decoder of a model that ``trial`` holds is called for inputs that it accepts."""
    with decoder_calls(trial.model) as calls:
        trial.run(arrays, **flags)
    if not calls:
        return DecoderCall()
    positions = calls[0].get(POSITIONS)
    several = isinstance(positions, torch.Tensor) and positions.dim() == _RANK
    return DecoderCall(
        position_rows=positions.shape[0] if several and positions is not None else None,
        handed=tuple(made_of_images(calls[0])),
    )


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
