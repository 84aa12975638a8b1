"""Encoder-decoders of several graphs, generating through the very class of transformers that they came from.

The class is built without weights, on the meta device, and what computes in it is replaced: the encoder's ``forward``
and its own run graphs. All else is the class's: how it prepares inputs, its own ways to generate (Whisper's timestamps
and long sounds), its options and what it says to unknown ones.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.merge import SWITCH
from onnx_config.parts import ENCODER_MASK, ENCODER_STATES, GRAPH_FILES, Role
from onnx_config.runtime.asked import ASKED_OUTPUTS, refuse_outputs
from onnx_config.runtime.cache_layers import empty_past, held, refill
from onnx_config.runtime.fill import filled
from onnx_config.runtime.graph_session import GraphSession
from onnx_config.runtime.served import generating_class, served_model

__all__ = ["seq2seq_model"]

_PAST = "past_key_values."
_HALVES = ("decoder", "encoder")
_KEPT = re.compile(r"past_key_values\.(\d+)\.(decoder|encoder)\.(key|value)")


def seq2seq_model(class_name: str, config: Any, generation_config: Any, graphs: Mapping[Role, GraphSession]) -> Any:
    """Return a model of the class ``class_name`` of transformers, without weights, that runs ``graphs``.

    Args:
        class_name: A class that generates with an encoder and a decoder.
        config: Its config.
        generation_config: What ``generate`` does unless told otherwise.
        graphs: The encoder, and a decoder: merged, or one that begins, and one that goes on unless the first carries no
            cache.

    Raises:
        InputError: If the encoder is missing, or the decoder that goes on (``not_found``).
        ModelError: If transformers has no such class, or it cannot be built (``unsupported``).
    """
    cls = generating_class(class_name)
    decoders = _Decoders(graphs)
    model = served_model(
        cls, config, forward=partial(_forward, cls), device=graphs[Role.ENCODER].device, dtype=decoders.dtype
    )
    # Not through the module's own way to set attributes, which looks for modules in them.
    model.__dict__["graphs"] = _Graphs(graphs[Role.ENCODER], decoders, model)
    encoder = model.get_encoder()
    encoder.forward = _encoder_like(encoder, model.__dict__["graphs"])
    model.generation_config = generation_config
    if not decoders.carry_a_cache:
        model.generation_config.use_cache = False
    return model


class _Decoders:
    """The decoder, which begins a text and goes on with it, as one graph or two."""

    def __init__(self, graphs: Mapping[Role, GraphSession]) -> None:
        merged = graphs.get(Role.DECODER_MERGED)
        begun = merged or graphs.get(Role.DECODER)
        continued = merged or graphs.get(Role.DECODER_WITH_PAST)
        if Role.ENCODER not in graphs:
            raise _missing(Role.ENCODER)
        if begun is None:
            raise _missing(Role.DECODER)
        if "logits" not in begun.output_types:
            raise ModelError(
                f"The decoder's graph gives {', '.join(begun.output_names[:3])} and no logits, so nothing can be "
                "generated with it.",
                kind=ErrorKind.UNSUPPORTED,
            )
        self.carry_a_cache = any(name.startswith("present") for name in begun.output_names) and continued is not None
        """Whether a text can be gone on with."""
        self.dtype = begun.output_types["logits"]
        """Type of the logits."""
        self.begun, self.continued = begun, continued
        kept = () if continued is None else (name for name in continued.inputs if name.startswith(_PAST))
        self.past: dict[str, tuple[int, str, bool]] = {}
        """What goes on takes, by name: layer, half of the cache, whether it is keys."""
        for name in kept:
            found = _KEPT.fullmatch(name)
            if found is None:
                raise ModelError(
                    f"The decoder's graph keeps {name}; what this version goes on with are keys and values of the "
                    "decoder and of what it sees of the encoder.",
                    kind=ErrorKind.UNSUPPORTED,
                )
            self.past[name] = int(found[1]), found[2], found[3] == "key"

    def begin(self, feed: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the logits and, if they are to be kept, all keys and values."""
        given = dict(feed)
        if SWITCH in self.begun.inputs:
            rows = feed["input_ids"].shape[0]
            for name in self.past:
                given[name] = empty_past(self.begun.inputs[name], rows)
            given[SWITCH] = torch.zeros(1, dtype=torch.bool)
        outputs = ["logits", *(n for n in self.begun.output_names if keep and n.startswith("present"))]
        return self.begun.run(_fed(self.begun, given), outputs)

    def go_on(self, feed: Mapping[str, torch.Tensor], cache: Any) -> dict[str, torch.Tensor]:
        """Return the logits, and the keys and values of the decoder's own half."""
        graph = self.continued
        assert graph is not None  # asked before
        given = dict(feed)
        halves = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
        for name, (number, half, is_key) in self.past.items():
            layer = held(halves[half], number)
            if layer is None:
                raise InputError(f"The cache that was given has nothing of layer {number} of the {half}.")
            given[name] = layer[0 if is_key else 1]
        if SWITCH in graph.inputs:
            given[SWITCH] = torch.ones(1, dtype=torch.bool)
        if ENCODER_STATES in graph.inputs and ENCODER_STATES not in given:
            # Not read, but a graph wants all of its inputs.
            keys = next(value for name, value in given.items() if name.endswith(".encoder.key"))
            width = graph.inputs[ENCODER_STATES].shape[2]
            given[ENCODER_STATES] = torch.zeros(keys.shape[0], keys.shape[2], width if isinstance(width, int) else 1)
        # What is kept of the encoder does not change, even where a graph gives it back.
        own = [name for name in graph.output_names if name.startswith("present") and ".encoder." not in name]
        return graph.run(_fed(graph, given), ["logits", *own])


def _fed(graph: GraphSession, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if missing := [name for name in graph.inputs if name not in given]:
        raise InputError(f"The decoder's graph takes {', '.join(map(repr, missing))}, which nothing here gives.")
    return {name: given[name] for name in graph.inputs}


class _Graphs:
    """The graphs behind a class of transformers."""

    def __init__(self, encoder: GraphSession, decoders: _Decoders, model: Any) -> None:
        self.encoder, self.decoders = encoder, decoders
        self.config = model.config
        self.encoder_limit = _positions(model, model.get_encoder(), _decoder_of(model))
        """Tokens that the encoder has positions for; ``None``: any number."""
        self.decoder_limit = _positions(model, _decoder_of(model), model.get_encoder())
        """The same of the decoder."""

    def encode(self, given: Mapping[str, Any]) -> torch.Tensor:
        """Return what the encoder makes of its inputs.

        Raises:
            InputError: If an input is missing, or longer than the encoder takes.
        """
        refuse_outputs(given)
        feed = {name: given[name] for name in self.encoder.inputs if given.get(name) is not None}
        for value in self.encoder.inputs.values():
            if value.name not in feed:
                found = filled(value.name, feed)
                if found is None:
                    raise InputError(f"The encoder takes {list(self.encoder.inputs)}; {value.name!r} is missing.")
                feed[value.name] = found
        if "input_ids" in feed:
            _check_length(feed["input_ids"].shape[-1], self.encoder_limit, "text")
        return self.encoder.run(feed)["last_hidden_state"]

    def forward(self, given: dict[str, Any]) -> Any:
        """Return what ``forward`` of the class returns for its arguments, by name."""
        refuse_outputs(given)
        ids, mask = given.get("decoder_input_ids"), given.get("attention_mask")
        if ids is None:
            raise InputError(
                "The decoder's tokens are missing: give decoder_input_ids, which begin with "
                f"{_start_token(self.config)}, or call generate()."
            )
        cache = given.get("past_key_values")
        before = 0 if cache is None else cache.get_seq_length()
        _check_ones(given.get("decoder_attention_mask"))
        _check_positions(given.get("decoder_position_ids"), before, ids.shape[-1])
        _check_length(before + ids.shape[-1], self.decoder_limit, "answer")
        if cache is not None and not self.decoders.carry_a_cache:
            raise InputError(
                "The decoder's graph carries no cache, so every token is computed anew: leave out use_cache=True and "
                "past_key_values, or convert the model with a task that ends in -with-past."
            )
        states = self._states(given, needed=not before)
        feed = {"input_ids": ids}
        if states is not None:
            feed[ENCODER_STATES] = states
        if mask is not None or states is not None or before:
            feed[ENCODER_MASK] = self._mask(mask, states, cache)
        keep = self.decoders.carry_a_cache and given.get("use_cache") is not False
        if before:
            answer = self.decoders.go_on(feed, cache)
            cache = _grown(cache, answer)
        else:
            answer = self.decoders.begin(feed, keep=keep)
            cache = _grown(cache, answer) if keep else None
        logits = _kept(answer["logits"], given.get("logits_to_keep"))
        output = Seq2SeqLMOutput(logits=logits, past_key_values=cache, encoder_last_hidden_state=states)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _states(self, given: Mapping[str, Any], *, needed: bool) -> torch.Tensor | None:
        """Return what the encoder gave; ``None`` where it is not known and not needed."""
        outputs = given.get("encoder_outputs")
        if outputs is not None:
            states: torch.Tensor = outputs[0]
            return states
        return self.encode(given) if needed else None

    def _mask(self, mask: Any, states: torch.Tensor | None, cache: Any) -> torch.Tensor:
        if mask is not None:
            found: torch.Tensor = mask
            return found
        if states is None:
            layer = held(cache.cross_attention_cache, 0)
            assert layer is not None  # a cache that has a length has it of both halves
            return torch.ones(layer[0].shape[0], layer[0].shape[2], dtype=torch.int64)
        return torch.ones(states.shape[:2], dtype=torch.int64)


def _forward(cls: type, model: Any, given: dict[str, Any]) -> Any:
    graphs: _Graphs = model.graphs
    takes = _TAKEN | graphs.encoder.inputs.keys()
    names = inspect.signature(cls.forward).parameters.keys()  # type: ignore[attr-defined]  # a model class has it
    if foreign := [n for n, value in given.items() if value is not None and n in names and n not in takes]:
        raise InputError(f"The graphs do not take {', '.join(map(repr, foreign))}, which {cls.__name__} does.")
    return graphs.forward(given)


_TAKEN = frozenset({
    "attention_mask", "decoder_attention_mask", "decoder_input_ids", "decoder_position_ids", "encoder_outputs",
    "logits_to_keep", "past_key_values", "return_dict", "use_cache", *ASKED_OUTPUTS,
})  # fmt: skip


def _kept(logits: torch.Tensor, wanted: int | torch.Tensor | None) -> torch.Tensor:
    """Return the logits of the last ``wanted`` tokens, or of those at certain places; ``None`` and 0: of all.

    ``generate`` asks for the last one only of every class that can be asked so; the graphs compute all of them.
    """
    if wanted is None:
        return logits
    return logits[:, wanted if isinstance(wanted, torch.Tensor) else slice(-wanted, None)]


def _encoder_like(encoder: Any, graphs: _Graphs) -> Any:
    """Return a ``forward`` for the encoder alone."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        names = list(signature.parameters)
        states = graphs.encode({**dict(zip(names, args, strict=False)), **kwargs})
        output = BaseModelOutput(last_hidden_state=states)
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    signature = inspect.signature(encoder.forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]  # as functools.wraps does
    return forward


def _grown(cache: Any, answer: Mapping[str, torch.Tensor]) -> EncoderDecoderCache:
    """Return the cache with what a decoder gave: the one that was given, since whoever generates keeps that."""
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    halves: dict[str, dict[int, dict[str, torch.Tensor]]] = {half: {} for half in _HALVES}
    for name, value in answer.items():
        if name.startswith("present"):
            _, number, half, part = name.split(".")
            halves[half].setdefault(int(number), {})[part] = value
    for half, kept in (("decoder", cache.self_attention_cache), ("encoder", cache.cross_attention_cache)):
        if halves[half]:
            refill(kept, {number: (parts["key"], parts["value"]) for number, parts in halves[half].items()})
    cache.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
    found: EncoderDecoderCache = cache
    return found


def _check_ones(mask: Any) -> None:
    if mask is not None and not bool((mask != 0).all()):
        raise InputError(
            "decoder_attention_mask hides tokens of the decoder, which the graphs cannot: give texts to go on with "
            "that are equally long, or one at a time."
        )


def _check_positions(positions: Any, before: int, length: int) -> None:
    if positions is None:
        return
    wanted = torch.arange(before, before + length, device=positions.device)
    if not bool((positions == wanted).all()):
        raise InputError(
            "decoder_position_ids are not those of tokens one after the other, which is where the graphs see them."
        )


def _check_length(length: int, most: int | None, what: str) -> None:
    if most is not None and length > most:
        raise InputError(
            f"The {what} has {length} tokens; the model knows {most} positions. "
            f"{'Shorten the prompt' if what == 'text' else 'Ask for fewer new tokens'}."
        )


def _decoder_of(model: Any) -> Any:
    return model.get_decoder()


def _positions(model: Any, part: torch.nn.Module, other: torch.nn.Module) -> int | None:
    """Return how many positions a part of the model has, where they are rows of a table; ``None``: it has no table.

    The table is known by its size: what the config says, and a few rows for reasons of its own (BART's two).
    """
    vocabulary = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    tables = [m for m in part.modules() if isinstance(m, torch.nn.Embedding) and id(m) not in vocabulary]
    config = getattr(part, "config", model.config)
    for name in ("max_position_embeddings", "max_target_positions", "max_source_positions", "n_positions"):
        most = getattr(config, name, None)
        if isinstance(most, int) and any(most <= table.num_embeddings <= most + _OWN_ROWS for table in tables):
            return most
    return None


_OWN_ROWS = 4


def _start_token(config: Any) -> str:
    from onnx_config.export.seq2seq_generation import start_token_id

    return f"the token {start_token_id(config)}"


def _missing(role: Role) -> InputError:
    return InputError(
        f"The {role} is missing: {GRAPH_FILES[role]} belongs to an encoder-decoder. Copy the whole folder again, or "
        "convert the model again.",
        kind=ErrorKind.NOT_FOUND,
    )
