"""Lets sizes that are one axis be one symbol while a model is traced.

torch gives each dimension of each input a symbol of its own, whatever it was told of them, and finds out that two are
the same where the model's code brings them together. Until then it reckons with both, which takes a multiple of the
time where a text is filled up to whole blocks and its mask with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

__all__ = ["Place", "one_symbol_per_axis", "place_of"]

Place = tuple[str, int]
"""An input's name and the position of one of its dimensions."""

_KEY = re.compile(r"\['([^']+)'\]")


def one_symbol_per_axis(axes: Mapping[Place, str]) -> Any:
    """Have torch take sizes for one from the start where they are the same of ``axes``, until the exit."""
    from torch._dynamo.source import TensorProperty, TensorPropertySource
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    original = ShapeEnv.create_symbol
    # Of each environment: a trace may need more than one.
    known: dict[tuple[int, str], Any] = {}

    def create_symbol(environment: Any, size: Any, source: Any, *arguments: Any, **options: Any) -> Any:
        sized = isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE
        axis = axes.get(place_of(source)) if sized else None
        if axis is None:
            return original(environment, size, source, *arguments, **options)
        symbol = known.get((id(environment), axis))
        if symbol is None or environment.backed_var_to_val.get(symbol) != size:
            symbol = original(environment, size, source, *arguments, **options)
            known[id(environment), axis] = symbol
        else:
            environment.source_to_var[source.name] = symbol
            environment.var_to_sources[symbol].append(source)
        return symbol

    return patch.object(ShapeEnv, "create_symbol", create_symbol)


def place_of(source: Any) -> Place:
    """Return the place of a size such as ``L['past_key_values']['0']['key'].size()[2]``."""
    return ".".join(_KEY.findall(source.base.name)), source.idx
