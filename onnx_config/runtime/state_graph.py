"""Generation with a graph that carries other states than keys and values, alone or beside such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from onnx_config.cache_layout import KEY_OR_VALUE
from onnx_config.cached_model import cache_of, held_in
from onnx_config.runtime.asked import refuse_outputs
from onnx_config.runtime.causal import CausalGraph
from onnx_config.runtime.graph_session import GraphSession

__all__ = ["StateGraph"]

_PAST = "past_key_values"
_PRESENT = "present"


class StateGraph(CausalGraph):
    """A graph that is called like a recurrent or hybrid model of transformers, and generates like one."""

    def __init__(self, graph: GraphSession, config: Any, generation_config: Any) -> None:
        self.config = config
        """The transformers config."""
        self.generation_config = generation_config
        """What ``generate`` does unless told otherwise."""
        self.device = graph.device
        """Where tensors are handed over."""
        self.dtype = graph.output_types["logits"]
        """Element type of the logits."""
        self._graph = graph
        self._names = [name for name in graph.inputs if name.startswith(f"{_PAST}.")]
        self._keys = next((name for name in self._names if KEY_OR_VALUE.fullmatch(name)), None)
        # What is added up in a state cannot be taken back, which some ways to generate would do.
        self._is_stateful = any(
            all(isinstance(size, int) for size in graph.inputs[name].shape[1:]) for name in self._names
        )

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Return the mask as it is: the graph makes what each kind of layer takes of it."""
        return attention_mask

    def forward(  # noqa: PLR0917  # as the models of transformers have it
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
            past_key_values: What an earlier call returned; ``None``, or empty: a text begins.
            token_type_ids: Segments of the new tokens (batch_size, sequence_length); ``None``: all of the first.

        Raises:
            InputError: If the text and its past are longer than the model takes, or ONNX Runtime cannot run the graph.
        """
        refuse_outputs({name: value for name, value in asked.items() if name != "cache_params"})
        cache = past_key_values if past_key_values is not None else asked.get("cache_params")
        rows, length = input_ids.shape
        held = {} if cache is None else held_in(cache, self._names)
        past = self._filled(held, rows)
        before = 0 if self._keys is None else past[self._keys].shape[2]
        self._check_length(before + length)
        if attention_mask is None:
            attention_mask = torch.ones(rows, before + length, dtype=torch.int64)
        if position_ids is None:
            position_ids = torch.arange(before, before + length).expand(rows, -1)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        attention_mask = attention_mask[:, attention_mask.shape[1] - before - length :]
        # Not every model of transformers reads many tokens from a state on as it would read them one by one.
        step = 1 if held and self._is_stateful else length
        logits = []
        for first in range(0, length, step):
            last = first + step
            given = {
                "input_ids": input_ids[:, first:last],
                "attention_mask": attention_mask[:, slice(0 if self._keys else first, before + last)],
                "position_ids": position_ids[:, first:last],
                "token_type_ids": token_type_ids[:, first:last],
            }
            feed = {name: tensor for name, tensor in given.items() if name in self._graph.inputs}
            answer = self._graph.run({**feed, **past})
            logits.append(answer["logits"])
            past = {name: answer[name.replace(_PAST, _PRESENT, 1)] for name in self._names}
        every = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
        if use_cache is False:
            return CausalLMOutputWithPast(logits=every)
        return CausalLMOutputWithPast(logits=every, past_key_values=self._refilled(cache, past, length))

    def _filled(self, held: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        """Return the past by the names of the inputs; of no length, or of zeros, where there is none."""
        past = {}
        for name in self._names:
            tensor = held.get(name)
            if tensor is None:
                wanted = self._graph.inputs[name]
                shape = [rows, *(size if isinstance(size, int) else 0 for size in wanted.shape[1:])]
                tensor = torch.zeros(shape, dtype=wanted.dtype)
            past[name] = tensor
        return past

    def _refilled(self, cache: Any, present: Mapping[str, torch.Tensor], length: int) -> Any:
        """Return a cache that holds ``present``: the one given, since whoever generates keeps that."""
        filled = cache_of(present)
        if cache is None:
            cache = filled if self._keys else _StateCache()
        cache.layers[:] = filled.layers
        if isinstance(cache, _StateCache):
            cache.seen += length
        return cache

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *others: Any) -> Any:
        """Prepare what ``generate`` hands over first; transformers asks it how many tokens it has seen."""
        given = model_kwargs.get(_PAST)
        GenerationMixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *others)  # type: ignore[arg-type]  # no PreTrainedModel, and like one
        if given is None and self._keys is None and _PAST in model_kwargs:
            model_kwargs[_PAST] = _StateCache()


class _StateCache(DynamicCache):
    """A cache of states alone, which do not tell how many tokens they were made of."""

    seen = 0
    """Tokens so far."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens it was made of."""
        return self.seen
