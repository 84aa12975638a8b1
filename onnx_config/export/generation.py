"""Whether a graph with a cache generates what the unmodified PyTorch model generates.

The model generates by itself, with transformers' own loop and cache; the graph is then given the same tokens step by
step, its own cache carried from each step to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.config_sizes import config_for
from onnx_config.export.child import names_memory
from onnx_config.export.parity import FALLBACK_TOLERANCE, max_difference
from onnx_config.input_generator import Array, generate_inputs, positions_of
from onnx_config.spec import ModelSpec, TensorSpec, is_past

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnx_config.cached_model import CachedModel

__all__ = [
    "NEW_TOKENS",
    "PROMPTS",
    "Generated",
    "compare_generation",
    "generate_greedily",
    "run_named",
    "token_difference",
]

NEW_TOKENS = 32
"""Tokens that are generated after each prompt, where the model has room for so many."""

_FED = ("input_ids", "attention_mask", "position_ids")
PROMPTS = 3
"""Rows that are generated for at once."""

_PROMPT_LENGTH = 11
_LONGEST_WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came of it."""

    tokens: int
    """Tokens generated after each prompt."""

    rows: int
    """Prompts, of which the later ones are padded on the left."""

    difference: str | None
    """What the graph says otherwise first, a token or its logits; ``None``: nothing."""

    refusal: str | None = None
    """Why nothing was compared; ``None``: it was."""


def compare_generation(session: Any, model: CachedModel, spec: ModelSpec, universal: Any) -> Generated:
    """Generate greedily with the model, and compare the graph's logits and its choice at every step.

    Args:
        session: As `onnx_config.export.session.open_session` returns it.
        model: The loaded model.
        spec: What the graph takes and gives.
        universal: Its configuration.

    Raises:
        MemoryError: If memory ran out; PyTorch's own errors that say so are raised as they are.
    """
    inner = model.model
    most = spec.axis_ranges.get("sequence_length", (1, None))[1]
    length = _prompt_length(universal.config, most)
    steps = NEW_TOKENS if most is None else min(NEW_TOKENS, most - length)
    others = [t.name for t in spec.inputs if t.name not in _FED and not is_past(t.name)]
    refusal = (
        "transformers does not generate with this class"
        if not getattr(inner, "can_generate", lambda: False)()
        else f"the graph takes {', '.join(others)} beside a text"
        if others
        else "the model has no room for a prompt and an answer"
        if steps < 1
        else None
    )
    if refusal is not None:
        return Generated(tokens=0, rows=0, difference=None, refusal=refusal)
    prompt = _prompts(spec, universal, length)
    told = generate_greedily(inner, prompt, steps)
    if isinstance(told, str):
        return Generated(tokens=0, rows=0, difference=None, refusal=told)
    tokens, logits = told
    for step, (want, got) in enumerate(zip(logits, _replay(session, spec, prompt, tokens), strict=True)):
        if (why := token_difference(want, got, tokens[:, step])) is not None:
            text = f"greedy generation differs at token {step + 1} of {steps}: {why}"
            return Generated(tokens=steps, rows=PROMPTS, difference=text)
    return Generated(tokens=steps, rows=PROMPTS, difference=None)


def token_difference(want: Array, got: Array, chosen: Array) -> str | None:
    """Return how logits (rows, vocabulary) differ, or which other token they choose; ``None`` where they do not."""
    difference, problem = max_difference(got, want)
    allowed = FALLBACK_TOLERANCE * max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))
    if problem is not None or difference > allowed:
        return f"the logits {problem or f'are off by {difference:.3g}, where {allowed:.3g} is allowed'}"
    for row, (token, other) in enumerate(zip(chosen, got.argmax(axis=-1), strict=True)):
        # Of two tokens that are all but equal, either is right.
        if (gap := float(want[row, token] - want[row, other])) > allowed:
            return f"{other} for {token} after prompt {row + 1}, which PyTorch prefers by {gap:.3g}"
    return None


def _prompt_length(config: Any, most: int | None) -> int:
    """Return how long a prompt is: with the new tokens it goes beyond a window, where one is short enough."""
    window = getattr(config_for(config, "text"), "sliding_window", None)
    length = _PROMPT_LENGTH
    if isinstance(window, int) and NEW_TOKENS // 2 < window <= _LONGEST_WINDOW:
        length = max(length, window - NEW_TOKENS // 2)
    return length if most is None else min(length, max(1, most - NEW_TOKENS))


def _prompts(spec: ModelSpec, universal: Any, length: int) -> dict[str, Array]:
    texts = [t for t in spec.inputs if t.name in ("input_ids", "attention_mask")]
    texts = [TensorSpec(name=t.name, dtype=t.dtype, shape=("batch_size", "sequence_length")) for t in texts]
    sizes = {"batch_size": PROMPTS, "sequence_length": length}
    return generate_inputs(
        texts, universal.config, universal.declaration, sizes, seed=11, padding=True, padding_side="left"
    )


def generate_greedily(
    inner: Any, prompt: Mapping[str, Array], steps: int, *, start_token_id: int | None = None
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[Any]]] | str:
    """Return the tokens (rows, steps) that the model chooses and its logits at each step, or what it says if not.

    ``start_token_id`` is what the decoder of an encoder-decoder begins with; ``None``: the prompt is what is gone on
    with.

    Raises:
        MemoryError: If memory ran out; PyTorch's own errors that say so are raised as they are.
    """
    import torch
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=steps,
        min_new_tokens=steps,
        use_cache=True,
        pad_token_id=0,
        decoder_start_token_id=start_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in prompt.items()}
    kept, inner.generation_config = inner.generation_config, config
    try:
        with torch.no_grad():
            # Models with a way of their own to generate (of long sounds, say) do so around this one.
            answer: Any = GenerationMixin.generate(inner, **tensors, generation_config=config)
    # The model's own code decides what it raises where it cannot generate from text alone.
    except Exception as error:
        if isinstance(error, MemoryError) or names_memory(str(error)):
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        inner.generation_config = kept
    new = answer.sequences[:, -steps:].numpy()
    return new, [step.float().numpy() for step in answer.logits]


def _replay(
    session: Any, spec: ModelSpec, prompt: Mapping[str, Array], tokens: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[Any]]:
    """Yield the graph's logits (rows, vocabulary) for the next token, while it is given ``tokens`` one by one."""
    ids = prompt["input_ids"]
    mask = prompt.get("attention_mask", np.ones_like(ids))
    sizes = {**spec.sizes, "batch_size": len(ids), "past_sequence_length": 0}
    past = {t.name: np.zeros(t.resolve(sizes), t.dtype) for t in spec.inputs if is_past(t.name)}
    # Where nothing is attended to, the mask is that of the new tokens.
    whole = any(t.name == "attention_mask" and t.shape[-1] != "sequence_length" for t in spec.inputs)
    for step in range(tokens.shape[1]):
        positions = positions_of(mask, ids.shape[1])
        covering = mask if whole else mask[:, mask.shape[1] - ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": covering, "position_ids": positions, **past}
        answer = run_named(session, feed)
        yield answer["logits"][:, -1]
        past = {name: answer[name.replace("past_key_values", "present", 1)] for name in past}
        ids = tokens[:, step : step + 1]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)


def run_named(session: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Run a session on those of ``feed`` that it takes; return its outputs by name."""
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True))
