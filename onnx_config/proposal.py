"""Which arguments of ``forward`` a user of a model feeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx_config.config_sizes import config_for, modality_of
from onnx_config.declarations import Argument, Declaration, Role
from onnx_config.draft import GEOMETRY
from onnx_config.patterns import ALWAYS_GIVEN
from onnx_config.preprocessors import Preprocessor

__all__ = ["propose_inputs"]

_SELF_FED = ("text-classification", "token-classification", "question-answering")


def propose_inputs(
    declaration: Declaration, config: Any, preprocessors: Sequence[Preprocessor], *, task_family: str
) -> tuple[str, ...]:
    """Return the names of the arguments that a user of the model feeds, in ``forward``'s order."""
    accepted = {a.name for a in declaration.arguments}
    made: set[str] = set()
    for part in preprocessors:
        # A tokenizer says nothing about the encoder of a model that takes no ids.
        if part.input_names[0] in accepted:
            made.update(part.input_names)
    if "input_ids" in accepted:
        made.add("attention_mask")
    if task_family in _SELF_FED:
        # Such a head makes its decoder's ids from its encoder's.
        made.discard("decoder_input_ids")
    elif getattr(config, "is_encoder_decoder", False):
        made.add("decoder_input_ids")
    text = config_for(config, "text")
    if getattr(text, "type_vocab_size", None) == 0:
        made.discard("token_type_ids")
    elif getattr(text, "use_bidirectional_attention", False):
        # They tell where tokens see later ones; without them, such a model asks whether anything is padded.
        made.add("token_type_ids")
    chosen = [a for a in declaration.arguments if _is_fed(a, declaration, made)]
    axes = {
        axis
        for a in chosen
        if a.required or a.preprocessed or a.name == declaration.main_input
        for axis in a.shape or ()
    }
    return tuple(
        a.name
        for a in chosen
        # A mask over an axis that no other input has does not fit them.
        if not (a.name.endswith("mask") and not a.required and modality_of(declaration.main_input) == "audio")
        or a.shape is None
        or set(a.shape) <= axes
    )


def _is_fed(argument: Argument, declaration: Declaration, made: set[str]) -> bool:
    name = argument.name
    if argument.required:
        return argument.role in (Role.DATA, Role.ALTERNATIVE)
    if argument.role is not Role.DATA:
        return name == declaration.main_input
    if GEOMETRY.search(name):
        # Sizes in the graph would depend on its values: only where the model cannot do without it.
        return False
    if name in ALWAYS_GIVEN or name == declaration.main_input or name in made:
        return True
    # Videos take the place of images where a model reads both.
    return argument.preprocessed and name in ("input_ids", "pixel_values", "input_features", "input_values")
