"""What a conversion will need, told from the config alone: bytes, and a rough time.

Nothing here is measured on the model in question; every figure is an estimate and is shown as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.memory import estimate_bytes

__all__ = ["DTYPE_BYTES", "Estimate", "count_layers", "estimate"]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one parameter in the graph, by the manifest's names."""

# Processor seconds on 2 cores, without the imports that a batch does once, as measured and as these three give them:
# all-MiniLM-L6-v2 (6 layers, 23 million parameters) 13 and 17, a BERT of 3 layers and 46 million 16 and 18, one of 12
# layers and 110 million 46 and 41.
_BASE_SECONDS = 5.0
"""What the smallest models need: detection, children, comparisons."""
_LAYER_SECONDS = 1.2
"""Tracing, simplifying and comparing grow with the graph."""
_MILLION_SECONDS = 0.2
"""Reading, writing and computing with each million of parameters, in float64 too."""

_GRAPH_BYTES = 40_000
_LAYER_BYTES = 40_000
_SIDE_BYTES = 3_000_000
_LAYER_KEYS = frozenset(
    (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "num_decoder_layers",
        "depth",
        "depths",
    )
)
_NO_KEY_LAYERS = 12
_DEEPEST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one conversion needs."""

    weight_bytes: int
    """Of the weights in the graph."""

    peak_memory_bytes: int
    """Resident, of one conversion; the same figure by which a batch lets conversions in."""

    disk_bytes: int
    """Of the artifact: weights, graph, tokenizer and other files. A conversion needs twice the weights more while it
    runs."""

    seconds: float
    """Wall time of one conversion on a quiet machine."""


def estimate(
    parameters: int, config: Mapping[str, Any], *, dtype: str = "float32", side_bytes: int | None = None
) -> Estimate:
    """Return what converting a model will need.

    Args:
        parameters: Number of parameters.
        config: ``config.json``; the number of layers is looked for in it.
        dtype: Element type in the graph.
        side_bytes: Bytes of tokenizer and other files; ``None``: not known, a usual figure is taken.

    >>> needed = estimate(110_000_000, {"num_hidden_layers": 12})
    >>> needed.weight_bytes, round(needed.seconds)
    (440000000, 41)
    """
    weight_bytes = parameters * DTYPE_BYTES[dtype]
    layers = count_layers(config) or _NO_KEY_LAYERS
    return Estimate(
        weight_bytes=weight_bytes,
        # The check holds the model in float32 whatever the graph's element type is.
        peak_memory_bytes=estimate_bytes(parameters * DTYPE_BYTES["float32"]),
        disk_bytes=weight_bytes
        + _GRAPH_BYTES
        + _LAYER_BYTES * layers
        + (_SIDE_BYTES if side_bytes is None else side_bytes),
        seconds=round(_BASE_SECONDS + _LAYER_SECONDS * layers + _MILLION_SECONDS * parameters / 1e6, 1),
    )


def count_layers(config: Mapping[str, Any], *, _depth: int = 0) -> int:
    """Return how many layers a config names, those of its parts included; 0 if it names none.

    >>> count_layers({"text_config": {"num_hidden_layers": 4}, "vision_config": {"depths": [2, 2]}})
    8
    """
    count = 0
    for key, value in config.items():
        if isinstance(value, Mapping) and _depth < _DEEPEST:
            count += count_layers(value, _depth=_depth + 1)
        elif key in _LAYER_KEYS:
            sizes = value if isinstance(value, list) else [value]
            count += sum(n for n in sizes if isinstance(n, int) and not isinstance(n, bool) and n > 0)
    return count
