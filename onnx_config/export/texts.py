"""Sentences as people write them, as a model's own tokenizer reads them: what a rate of agreement is counted over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_config.spec import TensorSpec

__all__ = ["SENTENCES", "tokenized"]

SENTENCES = (
    "The committee will publish its final report on the harbour extension before the end of the month.",
    "I loved every minute of this film, even though the ending made me cry.",
    "Der Zug nach Hamburg faehrt heute wegen einer Stoerung zwanzig Minuten spaeter ab.",
    "def area(radius): return 3.14159 * radius ** 2",
    "Terrible service: we waited an hour, the soup was cold and nobody apologised.",
    "In 1969, Apollo 11 carried Neil Armstrong and Buzz Aldrin to the surface of the Moon.",
    "Wie hoch ist der hoechste Berg der Schweiz, und wer hat ihn zuerst bestiegen?",
    "Mix the flour with two eggs and a pinch of salt, then let the dough rest for thirty minutes.",
    "La bibliotheque est fermee le dimanche, mais le musee reste ouvert jusqu'a dix-huit heures.",
    "Shares of the company fell 4.5% on Tuesday after it cut its forecast for the third quarter.",
    "Please reply by Friday so that we can book the room and order enough chairs.",
    "What is the capital of Australia, and how many people live there?",
)
"""Twelve of different kinds, in ASCII."""

_LONGEST = 64
_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids"})


def tokenized(
    folder: Path, inputs: Sequence[TensorSpec], *, vocabulary: int | None, longest: int | None
) -> Mapping[str, npt.NDArray[Any]] | None:
    """Return the sentences as a graph takes them, padded on the right; ``None`` where there is no tokenizer for it.

    Args:
        folder: The model's folder.
        inputs: What the graph takes; it has to read ids of tokens.
        vocabulary: How many tokens the model knows; ``None``: not known.
        longest: How many tokens it takes at most; ``None``: any number.
    """
    if not any(tensor.name == "input_ids" and len(tensor.shape) == 2 for tensor in inputs):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "right"
        found = tokenizer(
            list(SENTENCES),
            padding=True,
            truncation=True,
            max_length=_LONGEST if longest is None else min(_LONGEST, longest),
            return_tensors="np",
        )
    # A folder may hold no tokenizer, or one that needs packages or files that are not here.
    except Exception:  # noqa: BLE001
        return None
    names = {tensor.name for tensor in inputs}
    arrays = {name: np.asarray(value, np.int64) for name, value in found.items() if name in _TEXT & names}
    ids = arrays.get("input_ids")
    if ids is None or ids.ndim != 2 or not ids.size or (vocabulary is not None and int(ids.max()) >= vocabulary):
        return None
    return arrays
