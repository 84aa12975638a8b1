"""What may be asked of a model of transformers that its graph does not give."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from onnx_config.errors import InputError

__all__ = ["ASKED_OUTPUTS", "refuse_outputs"]

ASKED_OUTPUTS: Mapping[str, str] = {"output_attentions": "attentions", "output_hidden_states": "hidden_states"}
"""Flags of ``forward`` that ask for more outputs -> those outputs' name, or the end of it."""


def refuse_outputs(given: Mapping[str, Any], names: Collection[str] = ()) -> None:
    """Refuse flags that ask for what is not among the outputs ``names``.

    Raises:
        InputError: If there is such a flag.
    """
    for flag, output in ASKED_OUTPUTS.items():
        if given.get(flag) and not any(name.partition(".")[0].endswith(output) for name in names):
            raise InputError(
                f"{flag} was asked for, and the graph gives no {output}. Leave it out, and options that need it: the "
                "times of single words, say."
            )
