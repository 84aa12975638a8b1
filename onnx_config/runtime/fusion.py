"""Models that read texts with images or sounds among them, generating through the very class that they came from.

The class is built without weights, on the meta device, and three things in it run graphs: what embeds tokens, what
makes features of an image or a sound, and the decoder. All else is the class's own: where features go in a text, which
positions tokens have, how inputs are prepared from step to step.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from onnx_config.cache_layout import KEY_OR_VALUE
from onnx_config.cached_model import cache_of, held_in
from onnx_config.decoder_call import POSITIONS, in_rows, made_of_images
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.parts import EMBEDDINGS, FEATURES, Role
from onnx_config.runtime.asked import refuse_outputs
from onnx_config.runtime.cache_layers import empty_past, held, refill
from onnx_config.runtime.graph_session import GraphSession
from onnx_config.runtime.images import images_for, run_images
from onnx_config.runtime.served import generating_class, named_arguments, serve, served_model
from onnx_config.runtime.told_features import handed_on, told_features
from onnx_config.spec import is_past

__all__ = ["fusion_model"]

_COUNTS_POSITIONS = "get_rope_index"
_NUMBERED = re.compile(r"\w+\.\d+")
_METHODS = {Role.VISION_ENCODER: "get_image_features", Role.AUDIO_ENCODER: "get_audio_features"}
_OTHERS = (*_METHODS.values(), "get_video_features")


def fusion_model(class_name: str, config: Any, generation_config: Any, graphs: Mapping[Role, GraphSession]) -> Any:
    """Return a model of the class ``class_name`` of transformers, without weights, that runs ``graphs``.

    Args:
        class_name: A class that generates from texts with images or sounds.
        config: Its config.
        generation_config: What ``generate`` does unless told otherwise.
        graphs: What embeds tokens, what makes features, and the decoder.

    Raises:
        InputError: If one of them is missing (``not_found``).
        ModelError: If transformers has no such class, or it cannot be built (``unsupported``).
    """
    role = next((role for role in _METHODS if role in graphs), None)
    if role is None or not {Role.EMBED_TOKENS, Role.DECODER_MERGED} <= graphs.keys():
        raise InputError(
            f"Of a model that reads texts with images or sounds there are only {', '.join(graphs)}. Copy the whole "
            "folder again, or convert the model again.",
            kind=ErrorKind.NOT_FOUND,
        )
    cls = generating_class(class_name)
    decoder = _Decoder(graphs[Role.DECODER_MERGED])
    model = served_model(
        cls,
        config,
        forward=partial(_forward, decoder),
        device=decoder.graph.device,
        dtype=decoder.graph.output_types["logits"],
    )
    embed, encode = graphs[Role.EMBED_TOKENS], graphs[role]
    model.get_input_embeddings().forward = lambda ids: embed.run({"input_ids": ids})[EMBEDDINGS]
    model.get_decoder().forward = decoder.forward
    base = model.base_model
    if base is not model:
        serve(base, device=decoder.graph.device, dtype=decoder.graph.output_types["logits"])
    for name in set(_OTHERS) - {_METHODS[role]}:
        if hasattr(base, name):
            base.__dict__[name] = partial(_refuse, name)
    base.__dict__[_METHODS[role]] = _features_of(base, getattr(base, _METHODS[role]), encode, FEATURES[role])
    if (counting := getattr(base, _COUNTS_POSITIONS, None)) is not None:
        base.__dict__[_COUNTS_POSITIONS] = partial(_counted, counting)
    model.generation_config = generation_config
    return model


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    kind = name.removeprefix("get_").removesuffix("_features")
    raise InputError(
        f"The text came with {kind}s, and there is no graph that makes features of {kind}s. Leave them out, or use the "
        "model in PyTorch."
    )


class _Decoder:
    """The graph of a decoder in the place of a module; keeps the logits that it gave last."""

    def __init__(self, graph: GraphSession) -> None:
        self.graph = graph
        self.mask: torch.Tensor | None = None
        """The mask (batch_size, past and new length) as it was given; what the class makes of it, the graph makes."""
        self.logits: torch.Tensor | None = None
        self.cache: Any = None
        positions = graph.inputs[POSITIONS].shape if POSITIONS in graph.inputs else ()
        self._rows = positions[0] if len(positions) == len(("rows", "texts", "tokens")) else None
        """How many positions each token has in the graph; ``None``: one, or none."""
        self._past = {
            name: (int(found[1]), found[2] == "key") for name in graph.inputs if (found := KEY_OR_VALUE.fullmatch(name))
        }
        self._states = [name for name in graph.inputs if is_past(name) and name not in self._past]
        """What layers keep in a fixed size, which each token changes."""

    def forward(
        self,
        *,
        inputs_embeds: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Run the graph on a text's embeddings (batch_size, sequence_length, hidden size).

        ``attention_mask`` is what the class made of its inputs for its decoder, which the graph does for itself.

        Raises:
            ModelError: If the class lets tokens see later ones, or hands over more of an image than embeddings, neither
                of which the graph takes (``unsupported``).
        """
        layered = self._layered(inputs_embeds, others)
        rows, length = inputs_embeds.shape[:2]
        layers = {number: held(past_key_values, number) for number, _ in self._past.values()}
        before = next((layer[0].shape[2] for layer in layers.values() if layer is not None), 0)
        if _sees_ahead(attention_mask, before):
            raise ModelError(
                "With these inputs the class lets tokens see later ones, as within an image; the graph of its decoder "
                "lets each see the ones before it only. Leave out token_type_ids, or use the model in PyTorch.",
                kind=ErrorKind.UNSUPPORTED,
            )
        if position_ids is None:
            position_ids = torch.arange(before, before + length)[None]
        if isinstance(self._rows, int):
            position_ids = in_rows(position_ids, self._rows, rows, length)
        elif position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows):
            raise InputError(
                f"The decoder's graph takes a position for each token; the class gives {list(position_ids.shape)} for "
                f"{rows} texts of {length} tokens."
            )
        else:
            position_ids = position_ids.expand(rows, -1)
        mask = torch.ones(rows, before + length, dtype=torch.int64) if self.mask is None else self.mask
        past = self._held(past_key_values, layers, rows)
        # Not every model of transformers reads many tokens from a state on as it would read them one by one.
        step = 1 if before and self._states else length
        logits = []
        for first in range(0, length, step):
            last = first + step
            given = {
                EMBEDDINGS: inputs_embeds[:, first:last],
                **{name: features[:, first:last] for name, features in layered.items()},
                "attention_mask": mask[:, : before + last],
                POSITIONS: position_ids[..., first:last],
                **past,
            }
            answer = self.graph.run({name: given[name] for name in self.graph.inputs})
            logits.append(answer["logits"])
            past = {name: answer[name.replace("past_key_values", "present", 1)] for name in past}
        self.cache = self._kept(past_key_values, past)
        self.logits = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
        return BaseModelOutputWithPast(last_hidden_state=self.logits, past_key_values=self.cache)

    def _layered(self, embeddings: torch.Tensor, others: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return what the graph adds in its layers, for each token; zeros where the class hands over nothing.

        Raises:
            ModelError: If the class hands over what the graph does not take (``unsupported``).
        """
        known = {"attention_mask", EMBEDDINGS, POSITIONS, *self._past, *self._states}
        names = [name for name in self.graph.inputs if name not in known and _NUMBERED.fullmatch(name)]
        given = {name: others[name] for name in made_of_images(others)}
        lists = {name: value for name, value in given.items() if any(n.startswith(f"{name}.") for n in names)}
        masks = [value for value in given.values() if isinstance(value, torch.Tensor)]
        handed = {f"{name}.{number}": part for name, value in lists.items() for number, part in enumerate(value)}
        if given and not (handed.keys() == set(names) and [mask.shape for mask in masks] == [embeddings.shape[:2]]):
            raise ModelError(
                f"With these inputs the class hands its decoder {', '.join(given)} beside the embeddings, and the "
                f"graph takes {', '.join(names) or 'none of them'}. Leave out what they are made of, or use the model "
                "in PyTorch.",
                kind=ErrorKind.UNSUPPORTED,
            )
        layered = {name: torch.zeros_like(embeddings) for name in names}
        for name, features in handed.items():
            layered[name][masks[0]] = features.to(embeddings)
        return layered

    def _held(self, cache: Any, layers: Mapping[int, Any], rows: int) -> dict[str, torch.Tensor]:
        """Return what ``cache`` holds, by the names of the inputs; nothing of it where a text begins."""
        past = {}
        for name, (number, is_key) in self._past.items():
            layer = layers[number]
            past[name] = empty_past(self.graph.inputs[name], rows) if layer is None else layer[0 if is_key else 1]
        states = held_in(cache, self._states) if self._states and cache is not None else {}
        for name in self._states:
            wanted = self.graph.inputs[name]
            sizes = [size if isinstance(size, int) else 0 for size in wanted.shape[1:]]
            state = states.get(name)
            past[name] = torch.zeros(rows, *sizes, dtype=wanted.dtype) if state is None else state
        return past

    def _kept(self, cache: Any, past: Mapping[str, torch.Tensor]) -> Any:
        """Return a cache that holds ``past``: the one given, since whoever generates keeps that."""
        if self._states:
            filled = cache_of(past)
            if cache is None:
                return filled
            cache.layers[:] = filled.layers
            return cache
        layers: dict[int, dict[bool, torch.Tensor]] = {}
        for name, (number, is_key) in self._past.items():
            layers.setdefault(number, {})[is_key] = past[name]
        return refill(cache, {number: (both[True], both[False]) for number, both in layers.items()})


def _listed(made: Mapping[str, Any], output: str) -> BaseModelOutputWithPooling:
    """Return the features of images, each a list of those of each image, as classes that go from one to the next do."""
    features = BaseModelOutputWithPooling(pooler_output=made[output])
    for name in _layers(made, output):
        count = sum(other.startswith(f"{name}.") for other in made)
        features[name] = [made[f"{name}.{number}"] for number in range(count)]
    return features


def _layers(made: Iterable[str], output: str) -> list[str]:
    """Return what features for layers of a decoder are called, of all that a graph gives."""
    return list(dict.fromkeys(name.partition(".")[0] for name in made if name != output))


def _counted(counting: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the positions of tokens that a class counts by the grids of its images.

    Raises:
        InputError: If the text and the grids do not go together.
    """
    try:
        return counting(*args, **kwargs)
    # What the class runs into first depends on what is wrong.
    except (RuntimeError, ValueError, StopIteration, IndexError, TypeError) as error:
        raise InputError(
            "The class cannot count the positions of the tokens: the text has other places for images than the grids "
            f"of the images tell, or mm_token_type_ids marks others ({type(error).__name__}: {error}). Give all that "
            "the processor returned."
        ) from error


def _sees_ahead(masks: Any, before: int) -> bool:
    """Return whether one of a class's masks (batch_size, heads, new, all steps) shows a step to an earlier one."""
    for mask in masks.values() if isinstance(masks, Mapping) else (masks,):
        if isinstance(mask, torch.Tensor) and mask.dim() == len(("batch_size", "heads", "new", "all")):
            shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            if torch.triu(shown, diagonal=before + 1).any():
                return True
    return False


def _forward(decoder: _Decoder, model: Any, given: dict[str, Any]) -> Any:
    refuse_outputs(given)
    for name in ("labels", "return_dict", "logits_to_keep"):
        given.pop(name, None)
    decoder.mask, decoder.logits = given.get("attention_mask"), None
    try:
        model.base_model(**given)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} takes more of its encoder than the graph gives, so that this version cannot "
            f"generate with it: {error}.",
            kind=ErrorKind.UNSUPPORTED,
        ) from error
    if decoder.logits is None:
        raise InputError(f"{type(model).__name__} did not call its decoder, so that there are no logits.")
    return CausalLMOutputWithPast(logits=decoder.logits, past_key_values=decoder.cache)


def _features_of(base: Any, original: Any, graph: GraphSession, output: str) -> Any:
    """Return what takes the place of a method of ``base`` that makes features, and hands them on as that does."""
    signature = inspect.signature(original)

    def made_features(*args: Any, **kwargs: Any) -> Any:
        given = named_arguments(signature, *args, **kwargs)
        feed = images_for(graph, given)
        if missing := [name for name in graph.inputs if feed.get(name) is None]:
            raise InputError(f"The graph takes {', '.join(map(repr, graph.inputs))}; {missing[0]!r} is missing.")
        made: Any = run_images(original, graph, feed, given)
        if made is not None:
            return _listed(made, output)
        answer = graph.run(feed)
        told = told_features(base, original, feed, count=answer[output].shape[0])
        features = BaseModelOutputWithPooling(
            pooler_output=handed_on(answer[output], getattr(told, "pooler_output", told))
        )
        for name in _layers(answer, output):
            features[name] = [handed_on(answer[f"{name}.{number}"], like) for number, like in enumerate(told[name])]
        return features

    # By which `generate` knows what to hand over.
    made_features.__signature__ = signature  # type: ignore[attr-defined]  # as functools.wraps does
    return made_features
