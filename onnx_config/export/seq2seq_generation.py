"""Whether the graphs of an encoder-decoder generate together what the unmodified PyTorch model generates.

The model generates by itself, with transformers' own loop and cache. Its tokens are then given to the graphs step by
step, as loaders do it: the encoder once, the decoder that begins once, then the one that goes on with its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.export.generation import (
    NEW_TOKENS,
    PROMPTS,
    Generated,
    generate_greedily,
    run_named,
    token_difference,
)
from onnx_config.export.merge import SWITCH
from onnx_config.input_generator import Array, generate_inputs
from onnx_config.parts import ENCODER_MASK, ENCODER_STATES, Role
from onnx_config.spec import ModelSpec, is_past

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["compare_seq2seq_generation", "start_token_id"]

_SEED = 11

Step = Callable[[Mapping[str, Array], bool], dict[str, Array]]
"""Runs a decoder on a feed, for the first time or not; returns its outputs by name."""


def start_token_id(config: Any) -> int:
    """Return the token that a decoder begins with, by the config of its model; 0 where it names none."""
    parts = (config, getattr(config, "decoder", None), getattr(config, "text_config", None))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for part in parts:
            if isinstance(value := getattr(part, name, None), int) and value >= 0:
                return value
    return 0


def compare_seq2seq_generation(
    sessions: Mapping[Role, Any], model: Any, specs: Mapping[Role, ModelSpec], universal: Any
) -> Generated:
    """Generate greedily with the model, and compare the graphs' logits and choices at every step.

    Args:
        sessions: A session for the encoder, for each decoder, and for the merged one where there is one.
        model: The loaded model of transformers.
        specs: What the parts take and give.
        universal: The whole model's configuration.

    Raises:
        MemoryError: If memory ran out; PyTorch's own errors that say so are raised as they are.
    """
    encoder = specs[Role.ENCODER]
    most = specs[Role.DECODER].axis_ranges.get("decoder_sequence_length", (1, None))[1]
    steps = NEW_TOKENS if most is None else min(NEW_TOKENS, most - 1)
    refusal = (
        "transformers does not generate with this class"
        if not getattr(model, "can_generate", lambda: False)()
        else "the decoder has no room for an answer"
        if steps < 1
        else None
    )
    if refusal is not None:
        return Generated(tokens=0, rows=0, difference=None, refusal=refusal)
    sizes = {axis: PROMPTS if axis == "batch_size" else size for axis, size in encoder.sizes.items()}
    source = generate_inputs(
        encoder.inputs,
        universal.config,
        universal.declaration,
        sizes,
        rules=encoder.values,
        seed=_SEED,
        padding=any(tensor.name.endswith("mask") for tensor in encoder.inputs),
    )
    start = start_token_id(universal.config)
    told = generate_greedily(model, source, steps, start_token_id=start)
    if isinstance(told, str):
        return Generated(tokens=0, rows=0, difference=None, refusal=told)
    tokens, logits = told
    states = run_named(sessions[Role.ENCODER], source)["last_hidden_state"]
    given = {ENCODER_STATES: states} | ({ENCODER_MASK: source["attention_mask"]} if "attention_mask" in source else {})
    decoders: dict[str, Step] = {"the decoders": _two(sessions)}
    if Role.DECODER_MERGED in sessions:
        decoders["the merged decoder"] = _merged(sessions[Role.DECODER_MERGED], specs[Role.DECODER_WITH_PAST])
    for name, decoder in decoders.items():
        replayed = _replay(decoder, given, start, tokens)
        for step, (want, got) in enumerate(zip(logits, replayed, strict=True)):
            if (why := token_difference(want, got, tokens[:, step])) is not None:
                text = f"greedy generation with {name} differs at token {step + 1} of {steps}: {why}"
                return Generated(tokens=steps, rows=PROMPTS, difference=text)
    return Generated(tokens=steps, rows=PROMPTS, difference=None)


def _replay(
    decoder: Step, given: Mapping[str, Array], start: int, tokens: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[Any]]:
    """Yield a decoder's logits (rows, vocabulary) for the next token, while it is given ``tokens`` one by one."""
    ids = np.full((len(tokens), 1), start, np.int64)
    past: dict[str, Array] = {}
    for step in range(tokens.shape[1]):
        answer = decoder({**given, "input_ids": ids, **past}, not step)
        yield answer["logits"][:, -1]
        # What is kept of the encoder comes once.
        past |= {
            name.replace("present", "past_key_values", 1): value
            for name, value in answer.items()
            if name.startswith("present")
        }
        ids = tokens[:, step : step + 1]


def _two(sessions: Mapping[Role, Any]) -> Step:
    def run(feed: Mapping[str, Array], first: bool) -> dict[str, Array]:
        return run_named(sessions[Role.DECODER if first else Role.DECODER_WITH_PAST], feed)

    return run


def _merged(session: Any, spec: ModelSpec) -> Step:
    def run(feed: Mapping[str, Array], first: bool) -> dict[str, Array]:
        past = {}
        if first:
            rows, length = feed[ENCODER_STATES].shape[:2]
            sizes = {**spec.sizes, "batch_size": rows, "past_sequence_length": 0, "encoder_sequence_length": length}
            past = {t.name: np.zeros(t.resolve(sizes), t.dtype) for t in spec.inputs if is_past(t.name)}
        return run_named(session, {**past, **feed, SWITCH: np.array([not first])})

    return run
