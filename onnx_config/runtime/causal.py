"""Generation with a graph that carries its cache, through transformers' own loop and all its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from onnx_config.cache_layout import KEY_OR_VALUE
from onnx_config.cached_model import cache_of, held_in
from onnx_config.errors import InputError

__all__ = ["CausalGraph"]

_PAST = "past_key_values."
_TYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class CausalGraph(GenerationMixin):
    """A session that is called like a causal model of transformers, and generates like one."""

    main_input_name = "input_ids"

    def __init__(self, session: Any, config: Any, folder: Path) -> None:
        self.session = session
        """An ONNX Runtime session whose inputs are ids, mask, positions where the model takes them, and the past."""
        self.config = config
        """The transformers config."""
        self.generation_config = _generation_config(folder, config)
        """What ``generate`` does unless told otherwise."""
        self.device = torch.device("cpu")
        """Where tensors are handed over."""
        self.dtype = torch.float32
        """Element type of the logits."""
        self._wanted = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._past = [name for name in self._wanted if name.startswith(_PAST)]
        self._keys = next((name for name in self._past if KEY_OR_VALUE.fullmatch(name)), None)
        # What is added up in a state cannot be taken back, which some ways to generate would do.
        self._is_stateful = any(
            all(isinstance(size, int) for size in self._wanted[name].shape[1:]) for name in self._past
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

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Return the mask as it is: the graph makes what each kind of layer takes of it."""
        return attention_mask

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """Call `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the new tokens, and the cache after them.

        Args:
            input_ids: New tokens (batch_size, sequence_length).
            attention_mask: 1 for tokens that count (batch_size, past and new length); ``None``: all do. Of a model that
                attends to nothing, the end of it is read, which is of the new tokens.
            position_ids: Where the new tokens stand (batch_size, sequence_length); ``None``: one after the other, from
                the past on, as transformers counts them.
            token_type_ids: Segments of the new tokens (batch_size, sequence_length); ``None``: all of the first.
            past_key_values: What an earlier call returned; ``None``, or empty: a text begins.

        Raises:
            InputError: If the text and its past are longer than the model takes, or ONNX Runtime cannot run the graph.
        """
        rows, length = input_ids.shape
        held = {} if past_key_values is None else held_in(past_key_values, self._past)
        past = self._arrays(held, rows)
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
            covered = slice(0 if self._keys else first, before + last)
            given = {
                "input_ids": input_ids[:, first:last],
                "attention_mask": attention_mask[:, covered],
                "position_ids": position_ids[:, first:last],
                "token_type_ids": token_type_ids[:, first:last],
            }
            feed = {n: np.ascontiguousarray(given[n].cpu().numpy()) for n in given.keys() & self._wanted.keys()}
            answer = dict(zip(self._outputs, self._run({**feed, **past}), strict=True))
            logits.append(answer["logits"])
            present = {name: answer[name.replace("past_key_values", "present", 1)] for name in self._past}
            if last < length:
                past = self._arrays(present, rows)
        return CausalLMOutputWithPast(
            logits=logits[0] if len(logits) == 1 else torch.cat(logits, dim=1),
            past_key_values=self._refilled(past_key_values, present, length),
        )

    def _run(self, feed: Mapping[str, Any]) -> list[torch.Tensor]:
        binding = self.session.io_binding()
        for name, value in feed.items():
            binding.bind_cpu_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        try:
            self.session.run_with_iobinding(binding)
        # ONNX Runtime's exceptions share no base class of their own.
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items() if name not in self._past)
            raise InputError(f"ONNX Runtime cannot run the graph on {shapes}: {error}") from error
        # The runtime's own memory, not copies of it.
        return [torch.utils.dlpack.from_dlpack(value.to_dlpack()) for value in binding.get_outputs_as_ortvaluevector()]

    def _arrays(self, held: Mapping[str, torch.Tensor], rows: int) -> dict[str, Any]:
        """Return the past by the names of the inputs; of no length, or of zeros, where there is none."""
        arrays = {}
        for name in self._past:
            tensor = held.get(name)
            if tensor is None:
                value = self._wanted[name]
                shape = [rows, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
                arrays[name] = np.zeros(shape, _TYPES[value.type])
            else:
                arrays[name] = np.ascontiguousarray(tensor.cpu().numpy())
        return arrays

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
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)  # type: ignore[misc]  # no PreTrainedModel, and like one
        if given is None and self._keys is None and "past_key_values" in model_kwargs:
            model_kwargs["past_key_values"] = _StateCache()

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


def _generation_config(folder: Path, config: Any) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(folder))
    return GenerationConfig.from_model_config(config)


class _StateCache(DynamicCache):
    """A cache of states alone, which do not tell how many tokens they were made of."""

    seen = 0
    """Tokens so far."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens it was made of."""
        return self.seen
