"""Variants: the same graph in fewer bits, beside the float32 one, under the names that the ecosystem's loaders know.

A variant is a further file in the artifact's folder, ``model_fp16.onnx`` beside ``model.onnx``, since that is where
transformers.js and optimum look for it: one folder, one config and tokenizer, and the precision chosen when a model is
loaded. Each has a verdict of its own; one that does not hold is not in the folder.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Variant", "variant_file"]


class Variant(StrEnum):
    """What a graph's numbers are; the value is what its file's name ends in."""

    FP16 = "fp16"
    """Weights and most of the arithmetic are float16."""

    BF16 = "bf16"
    """Weights are bfloat16, which computes in float32."""

    INT8 = "int8"
    """Weights of matrix products are int8, and what they are multiplied with is rounded to uint8 as it comes."""

    QUANTIZED = "quantized"
    """The same with uint8 weights, convolutions included; what transformers.js calls ``q8``."""

    Q4 = "q4"
    """Weights of matrix products are blocks of 4-bit numbers, the arithmetic is float32."""

    Q4F16 = "q4f16"
    """The same with float16 in place of float32."""


def variant_file(file: str, variant: str | None) -> str:
    """Return the name of a graph's file in a variant; ``None`` is the float32 one.

    >>> variant_file("decoder_model_merged.onnx", Variant.Q4)
    'decoder_model_merged_q4.onnx'
    """
    return file if variant is None else f"{file.removesuffix('.onnx')}_{variant}.onnx"
