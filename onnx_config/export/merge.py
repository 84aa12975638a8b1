"""One decoder of two: a graph that begins a text or goes on with one, as an input says, and holds the weights once.

Loaders of the ecosystem (transformers.js, optimum) look for it under the name ``decoder_model_merged.onnx``. It is an
ONNX ``If`` over the input ``use_cache_branch``; what both branches read of weights lies outside of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

from onnx_config.export.either import Condition, either_way

__all__ = ["SWITCH", "merge_decoders"]

SWITCH = "use_cache_branch"
"""Input of the merged graph, of one element: whether there is a past to go on with."""

_PAST = "past_key_values"
_PRESENT = "present"
_OF_THE_ENCODER = ".encoder."
_PAST_OF_THE_ENCODER = "past_encoder_sequence_length"


def merge_decoders(begun: onnx_ir.Model, continued: onnx_ir.Model) -> onnx_ir.Model:
    """Return one model that computes ``begun`` or ``continued``; both are taken apart for it.

    Its inputs are those of both; whoever begins gives a past of any length, which is not read, and whoever goes on
    the encoder's states, which are not read either. What ``continued`` does not give back of the cache, since it does
    not change, it gives back as it came.

    Args:
        begun: A decoder without a past, whose outputs are ``logits`` and ``present.*``.
        continued: The same decoder with one, whose further inputs are ``past_key_values.*``.
    """
    for value in (*begun.graph.inputs, *continued.graph.inputs):
        value.shape = _loose_input(value)
    for value in (*begun.graph.outputs, *continued.graph.outputs):
        value.shape = _loose_output(value)
    switch = onnx_ir.Value(name=SWITCH, type=onnx_ir.TensorType(onnx_ir.DataType.BOOL), shape=onnx_ir.Shape([1]))
    given = [value.name or "" for value in begun.graph.outputs]

    def asked(_: Mapping[str, onnx_ir.Value], __: onnx_ir.Graph) -> Condition:
        squeezed = onnx_ir.node("Squeeze", [switch])
        return Condition([squeezed], squeezed.outputs[0])

    merged = either_way(
        continued,
        begun,
        ("with_past", "without_past"),
        asked,
        instead={name: name.replace(_PRESENT, _PAST, 1) for name in given},
    )
    merged.graph.inputs.append(switch)
    merged.graph.name = "merged"
    return merged


def _loose_input(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    """Return the shape of an input of either branch: a past that is not read is of any length.

    Loaders begin with a past of no tokens, also where the encoder gives a fixed number of states, as that of Whisper.
    """
    if value.shape is None:
        return None
    sizes = list(value.shape)
    name = value.name or ""
    if name.startswith(_PAST) and _OF_THE_ENCODER in name and isinstance(sizes[2], int):
        sizes[2] = onnx_ir.SymbolicDim(_PAST_OF_THE_ENCODER)
    return onnx_ir.Shape(sizes)


def _loose_output(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    """Return the shape of an output of either branch: the decoder's own cache is longer where there was a past."""
    if value.shape is None:
        return None
    grows = (value.name or "").startswith(_PRESENT) and _OF_THE_ENCODER not in (value.name or "")
    sizes = list(value.shape)
    if grows:
        sizes[2] = onnx_ir.SymbolicDim("present_sequence_length")
    return onnx_ir.Shape(sizes)
