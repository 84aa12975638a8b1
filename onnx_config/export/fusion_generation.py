"""Whether the graphs of a model that reads texts with images or sounds generate together what PyTorch generates.

The model generates by itself, with transformers' own loop and cache. The graphs are then driven as loaders drive them:
the image and the text are embedded, the placeholders in the text give way to the image's embeddings, and the decoder
goes on token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.config_sizes import modality_of
from onnx_config.decoder_call import POSITIONS, decoder_calls, in_rows
from onnx_config.export.generation import (
    NEW_TOKENS,
    PROMPTS,
    Generated,
    generate_greedily,
    run_named,
    token_difference,
)
from onnx_config.illustrated import illustrated_texts
from onnx_config.input_generator import Array, generate_inputs, positions_of, with_room
from onnx_config.one_image import image_by_image, takes_one_image
from onnx_config.parts import EMBEDDINGS, FEATURES, Role
from onnx_config.spec import LayeredFeatures, ModelSpec, is_past
from onnx_config.tile_models import feature_counts, with_sizes

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["compare_fusion_generation"]

_SEED = 11
_ROOM = 5


def compare_fusion_generation(
    sessions: Mapping[Role, Any], model: Any, spec: ModelSpec, decoder: ModelSpec, universal: Any
) -> Generated:
    """Generate greedily with the model, and compare the graphs' logits and choices at every step.

    Args:
        sessions: A session for each part.
        model: The loaded model of transformers.
        spec: What the whole model takes.
        decoder: What the decoder takes and gives.
        universal: The whole model's configuration.

    Raises:
        MemoryError: If memory ran out; PyTorch's own errors that say so are raised as they are.
    """
    if not getattr(model, "can_generate", lambda: False)():
        refusal = "transformers does not generate with this class"
        return Generated(tokens=0, rows=0, difference=None, refusal=refusal)
    if spec.images is not None:
        made = _illustrated(model, spec, universal)
        return made if isinstance(made, Generated) else _compared(sessions, model, decoder, made)
    sizes = {axis: PROMPTS if axis.endswith("batch_size") else size for axis, size in spec.sizes.items()}
    sizes = with_room(spec.inputs, spec.values, sizes)
    text = next(tensor for tensor in spec.inputs if tensor.name == "input_ids").shape[-1]
    most = spec.axis_ranges.get(str(text), (1, None))[1]
    if isinstance(text, str):
        sizes[text] += _ROOM if most is None or sizes[text] + _ROOM + NEW_TOKENS <= most else 0
    steps = NEW_TOKENS if most is None else min(NEW_TOKENS, most - sizes.get(str(text), 0))
    if steps < 1:
        refusal = "the model has no room for a text with an image and an answer"
        return Generated(tokens=0, rows=0, difference=None, refusal=refusal)
    prompt = generate_inputs(
        spec.inputs,
        universal.config,
        universal.declaration,
        sizes,
        rules=spec.values,
        seed=_SEED,
        padding=True,
        padding_side="left",
    )
    placeholders = list(spec.values["input_ids"].stand_ins)
    layered = spec.decoder_call.layered
    made = _compared(sessions, model, decoder, _Task(prompt, placeholders, steps, layered))
    shown = _nothing_hidden(prompt)
    if made.refusal is None or not shown:
        return made
    # A shorter sound has fewer features, and the text has places for a whole one.
    return _compared(
        sessions, model, decoder, _Task({**prompt, **shown}, placeholders, steps, spec.decoder_call.layered)
    )


def _nothing_hidden(prompt: Mapping[str, Array]) -> dict[str, Array]:
    """Return the masks of what is no text, as they are where they hide nothing."""
    hiding = {n: a for n, a in prompt.items() if n.endswith("mask") and modality_of(n) != "text" and not a.all()}
    return {name: np.ones_like(array) for name, array in hiding.items()}


@dataclass(frozen=True, slots=True)
class _Task:
    """What is gone on with."""

    prompt: dict[str, Array]
    placeholders: list[int]
    """Ids of the tokens whose places features take."""
    steps: int
    """How many tokens are generated."""
    layered: LayeredFeatures | None = None
    """Features for the layers of the decoder."""


def _illustrated(model: Any, spec: ModelSpec, universal: Any) -> _Task | Generated:
    """Return texts with images of which the model itself tells how many features they have; or why there are none."""
    images = spec.images
    assert images is not None
    encoder = images.encoder
    sizes = {axis: PROMPTS if axis.endswith("batch_size") else size for axis, size in encoder.sizes.items()}
    feed = generate_inputs(
        encoder.inputs, universal.config, universal.declaration, sizes, rules=encoder.values, seed=_SEED
    )
    counts = feature_counts(model, feed)
    mask = next(tensor.dtype for tensor in spec.inputs if tensor.name == "attention_mask")
    text = illustrated_texts(
        counts,
        images.token,
        config=universal.config,
        declaration=universal.declaration,
        words=_ROOM,
        seed=_SEED,
        mask=mask,
    )
    text_axis = next(tensor for tensor in spec.inputs if tensor.name == "input_ids").shape[-1]
    most = spec.axis_ranges.get(str(text_axis), (1, None))[1]
    length = text["input_ids"].shape[-1]
    steps = NEW_TOKENS if most is None else min(NEW_TOKENS, most - length)
    if steps < 1:
        refusal = f"the model has no room for a text of {length} tokens with an image and an answer"
        return Generated(tokens=0, rows=0, difference=None, refusal=refusal)
    return _Task({**text, **with_sizes(model, feed)}, [images.token], steps)


def _compared(sessions: Mapping[Role, Any], model: Any, decoder: ModelSpec, task: _Task) -> Generated:
    """Generate so many tokens after each text with the model, and compare the graphs' logits and choices."""
    prompt, steps = task.prompt, task.steps
    rows = _position_rows(decoder)
    with ExitStack() as stack:
        calls = [] if rows is None else stack.enter_context(decoder_calls(model))
        told = generate_greedily(model, prompt, steps)
    if isinstance(told, str):
        return Generated(tokens=0, rows=0, difference=None, refusal=told)
    tokens, logits = told
    positions = None if rows is None else _positions(calls, rows, len(tokens), steps)
    if isinstance(positions, str):
        return Generated(tokens=0, rows=0, difference=None, refusal=positions)
    embedded = _embedded(sessions, task)
    if isinstance(embedded, str):
        return Generated(tokens=steps, rows=len(tokens), difference=embedded)
    replayed = _replay(sessions, decoder, embedded, prompt["attention_mask"], tokens, several=positions)
    for step, (want, got) in enumerate(zip(logits, replayed, strict=True)):
        if (why := token_difference(want, got, tokens[:, step])) is not None:
            text = f"greedy generation differs at token {step + 1} of {steps}: {why}"
            return Generated(tokens=steps, rows=len(tokens), difference=text)
    return Generated(tokens=steps, rows=len(tokens), difference=None)


def _embedded(sessions: Mapping[Role, Any], task: _Task) -> dict[str, Array] | str:
    """Return the text's embeddings with the features in the places of its placeholders, or why they do not fit.

    Features for the layers of a decoder stand alone in theirs.
    """
    role = next(role for role in FEATURES if role in sessions)
    prompt = task.prompt
    made = _made(sessions[role], prompt)
    embeddings = run_named(sessions[Role.EMBED_TOKENS], prompt)[EMBEDDINGS]
    places = np.isin(prompt["input_ids"], task.placeholders)
    layers = () if task.layered is None else zip(task.layered.taken, task.layered.made, strict=True)
    wanted = [(EMBEDDINGS, FEATURES[role], embeddings), *((to, of, np.zeros_like(embeddings)) for to, of in layers)]
    embedded = {}
    for name, output, around in wanted:
        flat = made[output].reshape(-1, made[output].shape[-1])
        if int(places.sum()) != len(flat):
            return f"there are {len(flat)} features for {int(places.sum())} placeholders"
        embedded[name] = around.copy()
        embedded[name][places] = flat
    return embedded


def _made(session: Any, prompt: Mapping[str, Array]) -> dict[str, Array]:
    """Return the features of all images, also where the encoder takes them one at a time."""
    taken = {value.name: value.shape for value in session.get_inputs()}
    if not takes_one_image(taken):
        return run_named(session, prompt)
    answers = [run_named(session, one) for one in image_by_image({name: prompt[name] for name in taken})]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def _position_rows(decoder: ModelSpec) -> int | None:
    """Return how many positions the decoder's graph takes of each token; ``None``: one, which follows from the mask."""
    shape = next((tensor.shape for tensor in decoder.inputs if tensor.name == POSITIONS), ())
    return shape[0] if len(shape) == len(("rows", "texts", "tokens")) and isinstance(shape[0], int) else None


def _positions(calls: Sequence[Mapping[str, Any]], rows: int, texts: int, steps: int) -> list[Array] | str:
    """Return the positions that the class gave its decoder at each step, or why there are none."""
    if len(calls) != steps or any(call.get(POSITIONS) is None for call in calls):
        return f"{len(calls)} calls of its decoder were seen for {steps} tokens, not all of them with positions"
    return [in_rows(call[POSITIONS], rows, texts, call[EMBEDDINGS].shape[1]).cpu().numpy() for call in calls]


def _replay(
    sessions: Mapping[Role, Any],
    decoder: ModelSpec,
    embedded: Mapping[str, Array],
    mask: Array,
    tokens: npt.NDArray[np.int64],
    *,
    several: Sequence[Array] | None,
) -> Iterator[npt.NDArray[Any]]:
    """Yield the decoder's logits (rows, vocabulary) for the next token, while it is given ``tokens`` one by one.

    ``several`` are the positions at each step where each token has more than one.
    """
    embeddings = embedded[EMBEDDINGS]
    sizes = {**decoder.sizes, "batch_size": len(tokens), "past_sequence_length": 0}
    past = {t.name: np.zeros(t.resolve(sizes), t.dtype) for t in decoder.inputs if is_past(t.name)}
    for step in range(tokens.shape[1]):
        positions = positions_of(mask, embeddings.shape[1]) if several is None else several[step]
        feed = {**embedded, EMBEDDINGS: embeddings, "attention_mask": mask, POSITIONS: positions, **past}
        answer = run_named(sessions[Role.DECODER_MERGED], feed)
        yield answer["logits"][:, -1]
        past = {name: answer[name.replace("past_key_values", "present", 1)] for name in past}
        ids = tokens[:, step : step + 1]
        embeddings = run_named(sessions[Role.EMBED_TOKENS], {"input_ids": ids})[EMBEDDINGS]
        # Of an image there is nothing in what comes after.
        embedded = {name: np.zeros_like(embeddings) for name in embedded}
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
