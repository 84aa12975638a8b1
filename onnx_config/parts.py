"""Models that become several graphs: which parts there are, and what each takes and gives.

An encoder-decoder is called in two ways while it generates: its encoder once, its decoder for every token. A model that
reads texts with images or sounds among them turns each into embeddings first, and then goes on as a text generator.
Each part is a graph of its own under the name that the ecosystem's loaders look for. What a part takes and gives
follows from the spec of the whole model; the modules that compute it are in `onnx_config.part_models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

from onnx_config.cache_layout import KEY_OR_VALUE, PAST_AXIS, CacheLayout
from onnx_config.config_sizes import modality_of
from onnx_config.image_embeddings import IMAGE, POINTS
from onnx_config.spec import ModelSpec, TensorSpec, ValueRule

__all__ = [
    "EMBEDDINGS",
    "ENCODER_AXIS",
    "ENCODER_MASK",
    "ENCODER_STATES",
    "FEATURES",
    "GRAPH_ENTRY",
    "GRAPH_FILES",
    "Role",
    "dual_encoder_parts",
    "encoder_decoder_parts",
    "fusion_parts",
    "prompt_parts",
    "role_of",
    "text_alone",
    "without_images",
]

ENCODER_STATES = "encoder_hidden_states"
"""The decoder's input that holds what the encoder made of the input."""

ENCODER_MASK = "encoder_attention_mask"
"""The decoder's input that tells which steps of the encoder count."""

ENCODER_AXIS = "encoder_sequence_length"
"""Steps that the encoder gives."""

EMBEDDINGS = "inputs_embeds"
"""A text as embeddings, those of images and sounds in their places."""

GRAPH_ENTRY = "onnx_ferry.graph"
"""Entry of a graph's birth certificate that says its role."""

_IDS = "decoder_input_ids"
_DECODER_AXIS = "decoder_sequence_length"
_STATES = "encoder_last_hidden_state"
_MASK = "attention_mask"
_TELLING_LENGTH = 13


class Role(StrEnum):
    """What a graph of a model computes."""

    MODEL = "model"
    ENCODER = "encoder"
    DECODER = "decoder"
    DECODER_WITH_PAST = "decoder_with_past"
    DECODER_MERGED = "decoder_merged"
    """Begins and goes on."""
    EMBED_TOKENS = "embed_tokens"
    VISION_ENCODER = "vision_encoder"
    AUDIO_ENCODER = "audio_encoder"
    PROMPT_DECODER = "prompt_decoder"
    PROMPT_DECODER_WITH_BOXES = "prompt_decoder_with_boxes"
    """Is asked about a box, and points beside it if there are any."""
    TEXT_MODEL = "text_model"
    VISION_MODEL = "vision_model"


FEATURES: Mapping[Role, str] = {
    Role.VISION_ENCODER: "image_features",
    Role.AUDIO_ENCODER: "audio_features",
    Role.TEXT_MODEL: "text_embeds",
    Role.VISION_MODEL: "image_embeds",
}
"""What an encoder gives: embeddings for the placeholders in a text, or one for a whole text or image."""

_READ = {"image": Role.VISION_ENCODER, "audio": Role.AUDIO_ENCODER}

GRAPH_FILES: Mapping[Role, str] = {
    Role.MODEL: "model.onnx",
    Role.ENCODER: "encoder_model.onnx",
    Role.DECODER: "decoder_model.onnx",
    Role.DECODER_WITH_PAST: "decoder_with_past_model.onnx",
    Role.DECODER_MERGED: "decoder_model_merged.onnx",
    Role.EMBED_TOKENS: "embed_tokens.onnx",
    Role.VISION_ENCODER: "vision_encoder.onnx",
    Role.AUDIO_ENCODER: "audio_encoder.onnx",
    Role.PROMPT_DECODER: "prompt_encoder_mask_decoder.onnx",
    Role.PROMPT_DECODER_WITH_BOXES: "prompt_encoder_mask_decoder_with_boxes.onnx",
    Role.TEXT_MODEL: "text_model.onnx",
    Role.VISION_MODEL: "vision_model.onnx",
}
"""Role -> file name, as optimum and transformers.js have them."""


def role_of(spec: ModelSpec) -> Role:
    """Return the role of the graph that ``spec`` describes."""
    return Role(spec.part)


def encoder_decoder_parts(spec: ModelSpec, *, with_past: bool = True) -> tuple[ModelSpec, ...]:
    """Return the specs of an encoder, of a decoder that begins and of one that goes on; empty where there are none.

    There are none where the model is no encoder-decoder that generates tokens, keeps other states than keys and
    values, or masks its input at another length than the one its encoder gives.

    Args:
        spec: The whole model, as one call of ``forward``.
        with_past: Whether the decoder gives its cache, and there is one that takes it.
    """
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    states, logits = outputs.get(_STATES), outputs.get("logits")
    if states is None or logits is None or len(states.shape) != 3 or not _is_text(inputs.get(_IDS)):
        return ()
    if with_past and not _keeps_keys_and_values(spec):
        return ()
    length = states.shape[1]
    mask = inputs.get(_MASK)
    if mask is not None and mask.shape != (states.shape[0], length):
        return ()
    renamed: dict[int | str, str] = {length: ENCODER_AXIS} if isinstance(length, str) else {}
    entering = [_renamed(replace(states, name=ENCODER_STATES), renamed)]
    if mask is not None:
        entering.insert(0, _renamed(replace(mask, name=ENCODER_MASK), renamed))
    entering.insert(len(entering) - 1, replace(inputs[_IDS], name="input_ids"))
    begun = _decoder(spec, Role.DECODER, tuple(entering), (logits,), length)
    encoder = _encoder(spec, states)
    if not with_past:
        return encoder, begun
    cache = tuple(_at_length(tensor, ENCODER_AXIS if renamed else length) for tensor in spec.cache)
    own = tuple(tensor for tensor in cache if PAST_AXIS in tensor.shape)
    first = CacheLayout(past=cache, step_axis=_DECODER_AXIS).present(continued=False)
    begun = replace(begun, outputs=(logits, *first))
    going_on = tuple(tensor for tensor in entering if tensor.name != ENCODER_STATES)
    later = CacheLayout(past=own, step_axis=_DECODER_AXIS).present()
    continued = _decoder(spec, Role.DECODER_WITH_PAST, (*going_on, *cache), (logits, *later), length)
    return encoder, begun, continued


def fusion_parts(spec: ModelSpec) -> tuple[ModelSpec, ...]:
    """Return the specs of what embeds a text and an image or a sound, and of the decoder; empty where there are none.

    There are none where the model does not generate from a text with placeholders for one kind of data, keeps no keys
    and values that grow, or needs more than embeddings, a mask and positions to go on.
    """
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    ids, mask = inputs.get("input_ids"), inputs.get(_MASK)
    logits = next((tensor for tensor in spec.outputs if tensor.name == "logits"), None)
    layout = CacheLayout(past=spec.cache, step_axis=spec.step_axis)
    # What marks the placeholders, positions are counted by, outside of all graphs.
    others = tuple(
        tensor
        for tensor in spec.inputs
        if tensor.name not in ("input_ids", _MASK) and not spec.values.get(tensor.name, ValueRule()).marks
    )
    kinds = {modality_of(tensor.name) for tensor in others}
    role = _READ.get(next(iter(kinds))) if len(kinds) == 1 else None
    placeholders = spec.values.get("input_ids", ValueRule()).stand_ins
    # Images that the text's own graph does without are read by one that is described apart.
    images = spec.images
    if images is not None:
        role, placeholders = Role.VISION_ENCODER, (images.token,)
    if (
        ids is None
        or mask is None
        or logits is None
        or role is None
        or spec.embedding_size is None
        or not placeholders
        or spec.decoder_call.handed
        or not layout.is_carried
        or not any(KEY_OR_VALUE.fullmatch(tensor.name) for tensor in spec.cache)
        or spec.step_axis != ids.shape[-1]
    ):
        return ()
    embeddings = TensorSpec(name=EMBEDDINGS, dtype="float32", shape=(*ids.shape, spec.embedding_size))
    features = TensorSpec(name=FEATURES[role], dtype="float32", shape=(f"{FEATURES[role]}_count", spec.embedding_size))
    embed = _freed(_part(spec, Role.EMBED_TOKENS, (ids,), (embeddings,)))
    entering = layout.extended((embeddings, mask), positions=spec.takes_positions, rows=spec.decoder_call.position_rows)
    given: tuple[TensorSpec, ...] = (features,)
    if spec.decoder_call.layered is not None:
        given += tuple(replace(features, name=name) for name in spec.decoder_call.layered.made)
        # For each token of a text, so that a graph need not look for those of images.
        beside = tuple(replace(embeddings, name=name) for name in spec.decoder_call.layered.taken)
        entering = (entering[0], *beside, *entering[1:])
    decoder = _freed(_part(spec, Role.DECODER_MERGED, entering, (logits, *layout.present())))
    decoder = replace(
        decoder,
        axis_ranges={**decoder.axis_ranges, **layout.axis_ranges},
        sizes={**decoder.sizes, **layout.sizes},
    )
    return _part(spec, role, others, given) if images is None else images.encoder, embed, decoder


def text_alone(spec: ModelSpec, *, always: bool = False) -> ModelSpec:
    """Return what a model takes and gives without its images, where their grids would be values in its graph.

    Any other model's is its own, unless the text alone is ``always`` wanted.
    """
    if spec.values.get("input_ids", ValueRule()).places is None and not always:
        return spec
    left = [tensor.name for tensor in spec.inputs if tensor.name not in ("input_ids", _MASK)]
    inputs = tuple(tensor for tensor in spec.inputs if tensor.name not in left)
    known = {axis for tensor in inputs for axis in tensor.axis_names}
    outputs = tuple(
        tensor for tensor in spec.outputs if modality_of(tensor.name) == "text" and known.issuperset(tensor.axis_names)
    )
    text = _freed(_part(spec, Role.MODEL, inputs, outputs))
    note = f"the graph takes text only; {', '.join(left)} was left out"
    if spec.decoder_call.handed:
        note += f": its decoder is handed {', '.join(spec.decoder_call.handed)} of the images beside embeddings"
    call = replace(spec.decoder_call, position_rows=None)
    return replace(text, cache=spec.cache, step_axis=spec.step_axis, decoder_call=call, assumed=(*spec.assumed, note))


def without_images(spec: ModelSpec) -> ModelSpec:
    """Return the spec of what is converted without them, the text alone or images of one size, which says so."""
    if spec.images is None:
        return spec
    return replace(spec, images=None, assumed=(*spec.assumed, spec.images.left_out))


def dual_encoder_parts(spec: ModelSpec) -> tuple[ModelSpec, ...]:
    """Return the specs of the whole model, of its text side and of its image side; empty where it has no such sides.

    It has where it compares texts with images: it gives an embedding of each, and no input belongs to both.
    """
    given = {tensor.name: tensor for tensor in spec.outputs}
    sides = (Role.TEXT_MODEL, "text"), (Role.VISION_MODEL, "image")
    parts = []
    for role, kind in sides:
        inputs = tuple(tensor for tensor in spec.inputs if modality_of(tensor.name) == kind)
        if not inputs or FEATURES[role] not in given:
            return ()
        parts.append(_part(spec, role, inputs, (given[FEATURES[role]],)))
    apart = sum(len(part.inputs) for part in parts) == len(spec.inputs)
    axes = [{axis for tensor in part.inputs for axis in tensor.axis_names} for part in parts]
    return (spec, *parts) if apart and not axes[0] & axes[1] else ()


def prompt_parts(spec: ModelSpec) -> tuple[ModelSpec, ...]:
    """Return the specs of what embeds an image and of what answers prompts about it; empty where there are none.

    Where prompts may be boxes there are two that answer: points alone are padded otherwise than points beside a box, so
    that one graph cannot do without a box by leaving it empty.
    """
    image = tuple(tensor for tensor in spec.inputs if tensor.name == IMAGE)
    prompts = tuple(tensor for tensor in spec.inputs if tensor.name != IMAGE)
    if not spec.embeddings or not image or not prompts:
        return ()
    # Some classes give back the embeddings that they were asked about.
    taken = {tensor.name for tensor in spec.embeddings}
    answers = tuple(tensor for tensor in spec.outputs if tensor.name not in taken)
    encoder = _part(spec, Role.VISION_ENCODER, image, spec.embeddings)
    decoder = _part(spec, Role.PROMPT_DECODER, (*spec.embeddings, *prompts), answers)
    if not spec.boxes:
        return encoder, decoder
    boxed = _part(spec, Role.PROMPT_DECODER_WITH_BOXES, (*spec.embeddings, *prompts, *spec.boxes), answers)
    points = next(tensor for tensor in prompts if tensor.name == POINTS).shape[-2]
    ranges = {axis: (0, most) if axis == points else (least, most) for axis, (least, most) in boxed.axis_ranges.items()}
    return encoder, decoder, replace(boxed, axis_ranges=ranges)


def _freed(spec: ModelSpec) -> ModelSpec:
    """Return the spec of a part that knows no placeholders, and so takes texts without room for them."""
    ranges = {
        axis: (1, limits[1]) if axis.endswith("sequence_length") else limits
        for axis, limits in spec.axis_ranges.items()
    }
    values = {name: replace(rule, tokens=(), places=None) for name, rule in spec.values.items()}
    return replace(spec, axis_ranges=ranges, values=values)


def _is_text(ids: TensorSpec | None) -> bool:
    """Return whether the decoder takes tokens whose number is free."""
    return ids is not None and len(ids.shape) == 2 and ids.shape[1] == _DECODER_AXIS


def _keeps_keys_and_values(spec: ModelSpec) -> bool:
    halves = {".decoder.key", ".decoder.value", ".encoder.key", ".encoder.value"}
    ends = {tensor.name[tensor.name.index(".", len("past_key_values.")) :] for tensor in spec.cache}
    grows = all((PAST_AXIS in tensor.shape) == (".decoder." in tensor.name) for tensor in spec.cache)
    return ends == halves and grows and spec.step_axis == _DECODER_AXIS


def _renamed(tensor: TensorSpec, names: Mapping[int | str, str]) -> TensorSpec:
    return replace(tensor, shape=tuple(names.get(size, size) for size in tensor.shape))


def _at_length(tensor: TensorSpec, length: int | str) -> TensorSpec:
    """Return a tensor of the cache; what is kept of the encoder is as long as what the encoder gives."""
    kept = ".encoder." in tensor.name
    return replace(tensor, shape=(*tensor.shape[:2], length, *tensor.shape[3:])) if kept else tensor


def _encoder(spec: ModelSpec, states: TensorSpec) -> ModelSpec:
    inputs = tuple(tensor for tensor in spec.inputs if not tensor.name.startswith("decoder_"))
    return _part(spec, Role.ENCODER, inputs, (replace(states, name="last_hidden_state"),))


def _decoder(
    spec: ModelSpec,
    role: Role,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    length: int | str,
) -> ModelSpec:
    part = _part(spec, role, inputs, outputs)
    ranges, sizes = dict(part.axis_ranges), dict(part.sizes)
    if isinstance(length, str):
        # What an encoder makes of a text is as long as the text; of a sound or an image, no input says how long.
        ranges[ENCODER_AXIS] = spec.axis_ranges.get(length, (1, None))
        sizes[ENCODER_AXIS] = spec.sizes.get(length, _TELLING_LENGTH)
    if role is Role.DECODER_WITH_PAST:
        layout = CacheLayout(past=spec.cache, step_axis=_DECODER_AXIS)
        ranges |= layout.axis_ranges
        sizes |= layout.sizes
    rule = spec.values.get(_IDS, ValueRule())
    vocabulary = outputs[0].shape[-1]
    if isinstance(vocabulary, int):
        rule = replace(rule, below=vocabulary if rule.below is None else min(rule.below, vocabulary))
    return replace(part, axis_ranges=ranges, sizes=sizes, values={"input_ids": rule})


def _part(spec: ModelSpec, role: Role, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ModelSpec:
    """Return the spec of a part, with what the whole model's says of the axes and values of its inputs."""
    axes = {axis for tensor in inputs for axis in tensor.axis_names}
    names = {tensor.name for tensor in inputs}
    return replace(
        spec,
        part=role.value,
        inputs=inputs,
        outputs=outputs,
        axis_ranges={axis: limits for axis, limits in spec.axis_ranges.items() if axis in axes},
        sizes={axis: size for axis, size in spec.sizes.items() if axis in axes},
        axis_steps={axis: step for axis, step in spec.axis_steps.items() if axis in axes},
        values={name: rule for name, rule in spec.values.items() if name in names},
        cache=(),
        step_axis=None,
        boxes=(),
        images=None,
    )
