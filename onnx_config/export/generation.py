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
from onnx_config.input_generator import generate_inputs
from onnx_config.spec import ModelSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnx_config.cached_model import CachedModel

__all__ = ["NEW_TOKENS", "Generated", "compare_generation"]

NEW_TOKENS = 32
"""Tokens that are generated after each prompt, where the model has room for so many."""

_FED = ("input_ids", "attention_mask", "position_ids")
_PROMPTS = 3
_PROMPT_LENGTH = 11
_LONGEST_WINDOW = 256
# Share of the largest logit that counts as equal, as where the model was not run in float64.
_TOLERANCE = 1e-4

Array = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came of it."""

    tokens: int
    """Tokens generated after each prompt."""

    rows: int
    """Prompts, of which the later ones are padded on the left."""

    difference: str | None
    """The first token that the graph would choose otherwise; ``None``: there is none."""


def compare_generation(session: Any, model: CachedModel, spec: ModelSpec, universal: Any) -> Generated | None:
    """Generate greedily with the model and with its graph.

    Args:
        session: As `onnx_config.export.parity.open_session` returns it.
        model: The loaded model.
        spec: What the graph takes and gives.
        universal: Its configuration.

    Returns:
        What came of it; ``None`` where transformers does not generate with this model, the graph takes more than a
        text, or there is no room for a prompt.
    """
    inner = model.model
    most = spec.axis_ranges.get("sequence_length", (1, None))[1]
    length = _prompt_length(universal.config, most)
    steps = NEW_TOKENS if most is None else min(NEW_TOKENS, most - length)
    fed = all(t.name in _FED or t.name.startswith("past_key_values.") for t in spec.inputs)
    if not getattr(inner, "can_generate", lambda: False)() or not fed or steps < 1:
        return None
    prompt = _prompts(spec, universal, length)
    told = _generate(inner, prompt, steps)
    if told is None:
        return None
    tokens, logits = told
    for step, got in enumerate(_replay(session, spec, prompt, tokens)):
        want = logits[step]
        scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max()))
        for row in range(_PROMPTS):
            chosen, other = int(tokens[row, step]), int(got[row].argmax())
            # Of two tokens that are all but equal, either is right.
            gap = float(want[row, chosen] - want[row, other])
            if not np.isfinite(got[row]).any() or (chosen != other and gap > _TOLERANCE * scale):
                text = (
                    f"greedy generation differs at token {step + 1} of {steps} of prompt {row + 1}: "
                    f"{other} for {chosen}, which PyTorch prefers by {gap:.3g}"
                )
                return Generated(tokens=steps, rows=_PROMPTS, difference=text)
    return Generated(tokens=steps, rows=_PROMPTS, difference=None)


def _prompt_length(config: Any, most: int | None) -> int:
    """Return how long a prompt is: with the new tokens it goes beyond a window, where one is short enough."""
    window = getattr(config_for(config, "text"), "sliding_window", None)
    length = _PROMPT_LENGTH
    if isinstance(window, int) and NEW_TOKENS // 2 < window <= _LONGEST_WINDOW:
        length = max(length, window - NEW_TOKENS // 2)
    return length if most is None else min(length, max(1, most - NEW_TOKENS))


def _prompts(spec: ModelSpec, universal: Any, length: int) -> dict[str, Array]:
    texts = [t for t in spec.inputs if t.name in ("input_ids", "attention_mask")]
    texts = [type(t)(name=t.name, dtype=t.dtype, shape=("batch_size", "sequence_length")) for t in texts]
    sizes = {"batch_size": _PROMPTS, "sequence_length": length}
    return generate_inputs(
        texts, universal.config, universal.declaration, sizes, seed=11, padding=True, padding_side="left"
    )


def _generate(
    inner: Any, prompt: Mapping[str, Array], steps: int
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[Any]]] | None:
    """Return the tokens (rows, steps) that the model chooses, and its logits at each step."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=steps,
        min_new_tokens=steps,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tensors = {name: torch.from_numpy(value) for name, value in prompt.items()}
    kept, inner.generation_config = inner.generation_config, config
    try:
        with torch.no_grad():
            answer = inner.generate(**tensors, generation_config=config)
    # The model's own code decides what it raises where it cannot generate from text alone.
    except Exception:  # noqa: BLE001
        return None
    finally:
        inner.generation_config = kept
    new = answer.sequences[:, prompt["input_ids"].shape[1] :].numpy()
    return new, [step.float().numpy() for step in answer.logits]


def _replay(
    session: Any, spec: ModelSpec, prompt: Mapping[str, Array], tokens: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[Any]]:
    """Yield the graph's logits (rows, vocabulary) for the next token, while it is given ``tokens`` one by one."""
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    ids = prompt["input_ids"]
    mask = prompt.get("attention_mask", np.ones_like(ids))
    sizes = {**spec.sizes, "batch_size": len(ids), "past_sequence_length": 0}
    past = {t.name: np.zeros(t.resolve(sizes), t.dtype) for t in spec.inputs if t.name.startswith("past_key_values.")}
    for step in range(tokens.shape[1]):
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        answer = dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True))
        yield answer["logits"][:, -1]
        past = {name: answer[name.replace("past_key_values", "present", 1)] for name in past}
        ids = tokens[:, step : step + 1]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
