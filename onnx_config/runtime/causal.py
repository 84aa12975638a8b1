"""Generation with a decoder that carries its cache, through transformers' own loop and all its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from onnx_config.cache_layout import KEY_OR_VALUE
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.merge import SWITCH
from onnx_config.parts import GRAPH_FILES, Role
from onnx_config.runtime.asked import refuse_outputs
from onnx_config.runtime.cache_layers import PlainCache, empty_past, held, refill
from onnx_config.runtime.graph_session import GraphSession

__all__ = ["CausalGraph"]

_PAST = "past_key_values"
_PRESENT = "present"


class CausalGraph(PlainCache, GenerationMixin):
    """Graphs that are called like a causal model of transformers, and generate like one."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, graphs: Mapping[Role, GraphSession], config: Any, generation_config: Any) -> None:
        """Take one graph that reads a text and goes on with it, or one for each.

        Raises:
            InputError: If the one that goes on is missing (``not_found``).
            ModelError: If the past is not laid out by rows and heads (``unsupported``).
        """
        one = graphs.get(Role.MODEL) or graphs.get(Role.DECODER_MERGED)
        begun, continued = one or graphs[Role.DECODER], one or graphs.get(Role.DECODER_WITH_PAST)
        if continued is None:
            raise InputError(
                f"A decoder that begins a text is there, and {GRAPH_FILES[Role.DECODER_WITH_PAST]}, which goes on, is "
                "missing. Copy the whole folder again, or convert the model again.",
                kind=ErrorKind.NOT_FOUND,
            )
        if "logits" not in continued.output_types:
            raise ModelError(
                f"The graph carries a cache and gives {', '.join(continued.output_names[:3])}, but no logits, so "
                "nothing can be generated with it.",
                kind=ErrorKind.UNSUPPORTED,
            )
        self.config = config
        """The transformers config."""
        self.generation_config = generation_config
        """What ``generate`` does unless told otherwise."""
        self.device = continued.device
        """Where tensors are handed over."""
        self.dtype = continued.output_types["logits"]
        """Element type of the logits."""
        self._begun, self._continued = begun, continued
        self._past: dict[str, tuple[int, bool]] = {}
        for name, value in continued.inputs.items():
            if found := KEY_OR_VALUE.fullmatch(name):
                self._past[name] = int(found[1]), found[2] == "key"
            if name.startswith(_PAST) and (found is None or len(value.shape) != 4):
                raise ModelError(
                    f"The graph takes its past as {name} {list(value.shape)}; keys and values by rows, heads, steps "
                    "and width are what this version goes on with.",
                    kind=ErrorKind.UNSUPPORTED,
                )

    def can_generate(self) -> bool:
        """Return whether it generates: always."""
        return True

    def is_remote_code(self) -> bool:
        """Return whether the model's code is its own, which transformers asks: never."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return how a mixture of experts is computed, which transformers may want to change: there is no choice."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """Call `forward`."""
        return self.forward(*args, **kwargs)

    def forward(  # noqa: PLR0917 - as the models of transformers have it
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **asked: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the new tokens, and the cache after them unless ``use_cache`` is false.

        Args:
            input_ids: New tokens (batch_size, sequence_length).
            attention_mask: 1 for tokens that count (batch_size, past and new length); ``None``: all do.
            position_ids: Where the new tokens stand (batch_size, sequence_length); ``None``: one after the other, from
                the past on, as transformers counts them.
            token_type_ids: Segments of the new tokens (batch_size, sequence_length); ``None``: all of the first.
            past_key_values: What an earlier call returned; ``None``, or empty: a text begins.

        Raises:
            InputError: If the text and its past are longer than the model takes, or ONNX Runtime cannot run the graph.
        """
        refuse_outputs(asked)
        rows, length = input_ids.shape
        past = self._held(past_key_values)
        before = next(iter(past.values())).shape[2] if past else 0
        self._check_length(before + length)
        if attention_mask is None:
            attention_mask = torch.ones(rows, before + length, dtype=torch.int64)
        if position_ids is None:
            position_ids = torch.arange(before, before + length).expand(rows, -1)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        graph = self._continued if before else self._begun
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"token_type_ids": token_type_ids, SWITCH: torch.tensor([before > 0]), **past}
        for name in self._past:
            if name in graph.inputs and name not in given:
                given[name] = empty_past(graph.inputs[name], rows)
        if missing := [name for name in graph.inputs if name not in given]:
            raise InputError(
                f"The graph takes {', '.join(map(repr, missing))}, which cannot be given beside a text here."
            )
        feed = {name: given[name] for name in graph.inputs}
        if use_cache is False:
            return CausalLMOutputWithPast(logits=graph.run(feed, ["logits"])["logits"])
        answer = graph.run(feed)
        layers: dict[int, dict[bool, torch.Tensor]] = {}
        for name, (number, is_key) in self._past.items():
            layers.setdefault(number, {})[is_key] = answer[name.replace(_PAST, _PRESENT, 1)]
        present = refill(past_key_values, {number: (both[True], both[False]) for number, both in layers.items()})
        return CausalLMOutputWithPast(logits=answer["logits"], past_key_values=present)

    def _held(self, cache: Any) -> dict[str, torch.Tensor]:
        """Return the past by the names of the inputs; empty where a text begins."""
        past = {}
        for name, (number, is_key) in self._past.items():
            layer = held(cache, number)
            if layer is not None:
                past[name] = layer[0 if is_key else 1]
        return past

    def _check_length(self, length: int) -> None:
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(most, int) and length > most and _has_table(self.config):
            raise InputError(
                f"The text has {length} tokens with what came before; the model knows {most} positions. Shorten the "
                "prompt, or ask for fewer new tokens."
            )


def _has_table(config: Any) -> bool:
    """Return whether positions are rows of a table, which ends, rather than angles, which go on."""
    return not any(hasattr(config, name) for name in ("rope_theta", "rope_parameters", "rope_scaling"))
