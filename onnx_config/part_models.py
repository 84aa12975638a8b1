"""The modules that compute the parts of a model: encoders, embeddings, decoders that begin or go on with a cache.

Each calls the model of transformers as its own ``generate`` does, and hands its cache over as plain tensors. What a
part takes and gives is in `onnx_config.parts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onnx_config.cached_model import CachedModel, cache_of, flattened
from onnx_config.image_embeddings import EMBED, arguments_of, by_argument, by_name
from onnx_config.parts import EMBEDDINGS, ENCODER_MASK, ENCODER_STATES, FEATURES, Role, role_of
from onnx_config.spec import LayeredFeatures, ModelSpec
from onnx_config.tile_models import TileModel, arrangement_of

__all__ = [
    "DecoderModel",
    "EmbeddingModel",
    "EncoderModel",
    "FeatureModel",
    "ImageEmbeddingModel",
    "LayeredModel",
    "PromptModel",
    "encoder_decoder_cache",
    "flat_cache",
    "part_model",
]

_PAST = "past_key_values"
_HALVES = ("decoder", "encoder")
_KINDS = {
    Role.VISION_ENCODER: "image",
    Role.AUDIO_ENCODER: "audio",
    Role.TEXT_MODEL: "text",
    Role.VISION_MODEL: "image",
}


def part_model(model: Any, spec: ModelSpec) -> Any:
    """Return what computes the graph that ``spec`` describes, around the loaded ``model`` of transformers."""
    match role_of(spec):
        case Role.MODEL:
            return CachedModel(model) if spec.continues else model
        case Role.ENCODER:
            return EncoderModel(model)
        case Role.DECODER_MERGED:
            layered = spec.decoder_call.layered
            return CachedModel(model) if layered is None else LayeredModel(model, layered)
        case Role.EMBED_TOKENS:
            return EmbeddingModel(model)
        case Role.VISION_ENCODER if spec.embeddings:
            return ImageEmbeddingModel(model, arguments_of(tensor.name for tensor in spec.embeddings))
        case Role.PROMPT_DECODER | Role.PROMPT_DECODER_WITH_BOXES:
            return PromptModel(model, arguments_of(tensor.name for tensor in spec.embeddings))
        case Role.VISION_ENCODER as role if (arrangement := arrangement_of(spec)) is not None:
            return TileModel(model, arrangement=arrangement, output=FEATURES[role])
        case Role.VISION_ENCODER | Role.AUDIO_ENCODER | Role.TEXT_MODEL | Role.VISION_MODEL as role:
            joins = any(rule.grid is not None and rule.grid.packed for rule in spec.values.values())
            field = None if spec.decoder_call.layered is None else spec.decoder_call.layered.field
            return FeatureModel(model, kind=_KINDS[role], output=FEATURES[role], joins=joins, layered=field)
        case Role.DECODER | Role.DECODER_WITH_PAST:
            return DecoderModel(model, keeps_cache=any(tensor.name.startswith("present") for tensor in spec.outputs))


class EncoderModel(torch.nn.Module):
    """Calls a model's encoder alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.get_encoder()  # type: ignore[operator]  # transformers' models have it
        """The encoder, as ``generate`` finds it."""
        self.config = model.config
        """The whole model's config."""

    def forward(self, use_cache: bool | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
        """Return ``last_hidden_state`` (batch_size, encoder_sequence_length, hidden size).

        ``use_cache`` is for the decoder and ignored.
        """
        return {"last_hidden_state": self.model(**inputs, return_dict=True).last_hidden_state}


class EmbeddingModel(torch.nn.Module):
    """Calls what a model embeds a text with."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
        self.config = model.config
        """The whole model's config."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> dict[str, torch.Tensor]:
        """Return ``inputs_embeds`` (batch_size, sequence_length, hidden size); ``use_cache`` is ignored."""
        return {EMBEDDINGS: self.model(input_ids)}


class FeatureModel(torch.nn.Module):
    """Calls what a model turns images, sounds or texts into embeddings with, such as ``get_image_features``."""

    def __init__(
        self, model: torch.nn.Module, *, kind: str, output: str, joins: bool = False, layered: str | None = None
    ) -> None:
        """Call the features of ``kind``, which are ``"image"``, say, by the name ``output``.

        ``joins`` says that those of images of any size come one after another, as many as each has; ``layered`` what
        the model calls those that it makes for layers of its decoder.
        """
        super().__init__()
        self.model = model
        """A model of transformers that has a method such as ``get_image_features``."""
        self._kind = kind
        self._output = output
        self._joins = joins
        self._layered = layered

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, use_cache: bool | None = None, **inputs: Any) -> dict[str, Any]:
        """Return the features as the model hands them on; those of a list as its rows where they are of one size.

        Else one after the other (count, hidden size), and always so where images have grids.

        ``use_cache`` is for the decoder and ignored.
        """
        returned = getattr(self.model, f"get_{self._kind}_features")(**inputs, return_dict=True)
        features = getattr(returned, "pooler_output", returned)
        if not self._joins:
            return {self._output: _as_tensor(features)}
        layers = [] if self._layered is None else [_joined(layer) for layer in returned[self._layered]]
        return {self._output: _joined(features), **({self._layered: layers} if self._layered is not None else {})}


class LayeredModel(CachedModel):
    """Calls a model with a cache, whose decoder adds features of images in its layers."""

    def __init__(self, model: torch.nn.Module, layered: LayeredFeatures) -> None:
        super().__init__(model)
        self._layers = layered

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Return the model's outputs, and its cache after the call.

        The features come for each token (batch_size, sequence_length, hidden size), by dotted names or as one
        dictionary; zeros change nothing.
        """
        names = self._layers.taken
        given = {name: inputs.pop(name) for name in names if name in inputs}
        given |= flattened(inputs.pop(self._layers.argument, {}), self._layers.argument)
        features = [given[name].flatten(0, 1) for name in names]
        rows, length = given[names[0]].shape[:2]
        everywhere = torch.ones(rows, length, dtype=torch.bool, device=features[0].device)
        handed = {self._layers.argument: features, self._layers.mask: everywhere}

        def hand(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, **handed}

        handle = self.model.get_decoder().register_forward_pre_hook(hand, with_kwargs=True)  # type: ignore[operator]  # transformers' models have it
        try:
            return super().forward(**inputs)
        finally:
            handle.remove()


class ImageEmbeddingModel(torch.nn.Module):
    """Calls what a segmenter embeds an image with."""

    def __init__(self, model: torch.nn.Module, arguments: Sequence[str]) -> None:
        """Call what it gives by the names of the ``arguments`` of ``forward`` that take it."""
        super().__init__()
        self.model = model
        """A model of transformers that has a method ``get_image_embeddings``."""
        self._arguments = arguments

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the embeddings of images (batch_size, channels, height, width), those of a list numbered."""
        returned = getattr(self.model, EMBED)(pixel_values)
        members = returned if len(self._arguments) > 1 else [returned]
        named: dict[str, torch.Tensor] = {}
        for argument, member in zip(self._arguments, members, strict=True):
            named |= by_name(argument, member)
        return named


class PromptModel(torch.nn.Module):
    """Calls a segmenter with an image's embeddings in the place of the image."""

    def __init__(self, model: torch.nn.Module, arguments: Sequence[str]) -> None:
        """Take the embeddings for these ``arguments`` of ``forward``."""
        super().__init__()
        self.model = model
        """A model of transformers whose ``forward`` takes ``image_embeddings``."""
        self._arguments = arguments

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, **inputs: Any) -> Any:
        """Return what the model says; several embeddings come by dotted names, or as one dictionary."""
        embeddings: dict[str, Any] = {}
        for name in [name for name in inputs if name.partition(".")[0] in self._arguments]:
            embeddings |= by_name(name, inputs.pop(name))
        return self.model(**inputs, **by_argument(embeddings))


def _joined(features: Any) -> torch.Tensor:
    """Return features of all images, one after the other."""
    if isinstance(features, (list, tuple)):
        return torch.cat(list(features), dim=0)
    tensor: torch.Tensor = features
    return tensor


def _as_tensor(features: Any) -> torch.Tensor:
    if isinstance(features, (list, tuple)):
        if len({part.shape for part in features}) == 1:
            return torch.stack(list(features))
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in features], dim=0)
    # What a list of rows is while a model is traced.
    tensor: torch.Tensor = getattr(features, "tensor", features)
    return tensor


class DecoderModel(torch.nn.Module):
    """Calls an encoder-decoder with what its encoder gave, for the decoder's next tokens."""

    def __init__(self, model: torch.nn.Module, *, keeps_cache: bool) -> None:
        super().__init__()
        self.model = model
        """An encoder-decoder of transformers, whose ``forward`` takes ``encoder_outputs``."""
        self._keeps_cache = keeps_cache

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None, **inputs: Any) -> dict[str, Any]:
        """Return ``logits`` (batch_size, decoder_sequence_length, vocabulary) and the cache after the call.

        The encoder's states and their mask come as ``encoder_hidden_states`` and ``encoder_attention_mask``, the past
        by dotted names or as one dictionary of dictionaries. With a past, the states are not needed, since what is
        kept of them is in it; and of the cache only the decoder's own half is given back, since the other one stays.
        ``use_cache`` is ignored: the graph's outputs say whether the cache is given.
        """
        from transformers.modeling_outputs import BaseModelOutput

        past = {name: inputs.pop(name) for name in list(inputs) if name.startswith(f"{_PAST}.")}
        past |= flattened(inputs.pop(_PAST, {}), _PAST)
        states = inputs.pop(ENCODER_STATES, None)
        if states is None:
            states = self._stand_in(past)
        mask = inputs.pop(ENCODER_MASK, None)
        if mask is not None:
            # Of the very length of what is attended to, which torch cannot see from outside.
            inputs["attention_mask"] = mask.narrow(-1, 0, states.shape[1])
        cache = encoder_decoder_cache(past) if self._keeps_cache else None
        returned = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=cache,
            use_cache=self._keeps_cache,
            return_dict=True,
            **inputs,
        )
        halves = _HALVES[:1] if past else _HALVES
        return {"logits": returned.logits, **({} if cache is None else flat_cache(cache, halves))}

    def _stand_in(self, past: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return states of the right shape whose numbers nobody reads."""
        keys = next(value for name, value in past.items() if name.endswith(".encoder.key"))
        width = _encoder_width(self.model)
        return keys[:, 0, :, :1].expand(-1, -1, width)


def _encoder_width(model: Any) -> int:
    """Return how many numbers an encoder gives for each step."""
    config = getattr(model.config, "encoder", model.config)
    for name in ("hidden_size", "d_model"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    return int(model.get_input_embeddings().weight.shape[-1])


def encoder_decoder_cache(past: Mapping[str, torch.Tensor]) -> Any:
    """Return transformers' cache with tensors by the names ``past_key_values.<layer>.decoder|encoder.key|value``."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    own, crossed = (
        cache_of({name.replace(f".{half}.", "."): value for name, value in past.items() if f".{half}." in name})
        if past
        else DynamicCache()
        for half in _HALVES
    )
    cache = EncoderDecoderCache(own, DynamicCache())
    cache.cross_attention_cache = crossed
    # Asking how long the past is would have torch decide it for all lengths.
    cache.is_updated = dict.fromkeys(range(len(crossed.layers)), True)
    return cache


def flat_cache(cache: Any, halves: tuple[str, ...] = _HALVES) -> dict[str, torch.Tensor]:
    """Return what an encoder-decoder's cache holds, as ``present.<layer>.decoder|encoder.key|value``."""
    of_half = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
    flat: dict[str, torch.Tensor] = {}
    for half in halves:
        for number, layer in enumerate(of_half[half].layers):
            flat |= {f"present.{number}.{half}.key": layer.keys, f"present.{number}.{half}.value": layer.values}
    return flat
