"""Generation with a graph that carries its cache, through transformers' own loop and all its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from onnx_config.cached_model import cache_of
from onnx_config.errors import InputError

__all__ = ["CausalGraph"]

_PAST = "past_key_values."
_TYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class CausalGraph(GenerationMixin):
    """A session that is called like a causal model of transformers, and generates like one."""

    main_input_name = "input_ids"
    _is_stateful = False

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
            attention_mask: 1 for tokens that count (batch_size, past and new length); ``None``: all do.
            position_ids: Where the new tokens stand (batch_size, sequence_length); ``None``: one after the other, from
                the past on, as transformers counts them.
            token_type_ids: Segments of the new tokens (batch_size, sequence_length); ``None``: all of the first.
            past_key_values: What an earlier call returned; ``None``, or empty: a text begins.

        Raises:
            InputError: If the text and its past are longer than the model takes, or ONNX Runtime cannot run the graph.
        """
        rows, length = input_ids.shape
        past = self._arrays(past_key_values, rows)
        before = next(iter(past.values())).shape[2]
        self._check_length(before + length)
        if attention_mask is None:
            attention_mask = torch.ones(rows, before + length, dtype=torch.int64)
        if position_ids is None:
            position_ids = torch.arange(before, before + length).expand(rows, -1)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given["token_type_ids"] = token_type_ids
        feed = {name: np.ascontiguousarray(given[name].cpu().numpy()) for name in given.keys() & self._wanted.keys()}
        answer = dict(zip(self._outputs, self._run({**feed, **past}), strict=True))
        present = {name: answer[name.replace("past_key_values", "present", 1)] for name in self._past}
        return CausalLMOutputWithPast(logits=answer["logits"], past_key_values=_refilled(past_key_values, present))

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

    def _arrays(self, cache: Any, rows: int) -> dict[str, Any]:
        """Return the past by the names of the inputs; of no length where there is none."""
        layers = [] if cache is None else cache.layers
        arrays = {}
        for name in self._past:
            _, number, part = name.split(".")
            layer = layers[int(number)] if int(number) < len(layers) else None
            if layer is not None and layer.is_initialized:
                arrays[name] = np.ascontiguousarray((layer.keys if part == "key" else layer.values).numpy())
            else:
                value = self._wanted[name]
                shape = [rows, value.shape[1], 0, value.shape[3]]
                arrays[name] = np.zeros(shape, _TYPES[value.type])
        return arrays

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


def _refilled(cache: Any, present: Mapping[str, torch.Tensor]) -> Any:
    """Return a cache that holds ``present``: the one given, since whoever generates keeps that."""
    filled = cache_of(present)
    if cache is None:
        return filled
    cache.layers[:] = filled.layers
    return cache
