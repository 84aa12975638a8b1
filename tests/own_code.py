"""A model's folder with code of its own: a small text model in two files, as a repository of the Hub brings it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["AUTO_MAP", "write_own_code"]

AUTO_MAP = {
    "AutoConfig": "configuration_ripple.RippleConfig",
    "AutoModel": "modeling_ripple.RippleModel",
    "AutoModelForSequenceClassification": "modeling_ripple.RippleForSequenceClassification",
    "AutoModelForCausalLM": "modeling_ripple.RippleForCausalLM",
}

_CONFIGURATION = """
from transformers import PretrainedConfig


class RippleConfig(PretrainedConfig):
    model_type = "ripple"

    def __init__(self, vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        super().__init__(**kwargs)
"""

_MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from .configuration_ripple import RippleConfig


class RippleLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.mixed = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, states, hidden):
        rows, length, width = states.shape
        query, key, value = self.mixed(states).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        found = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ value
        return self.norm(states + self.out(found.transpose(1, 2).reshape(rows, length, width)))


class RipplePreTrainedModel(PreTrainedModel):
    config_class = RippleConfig
    base_model_prefix = "ripple"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.3)


class RippleModel(RipplePreTrainedModel):
    def __init__(self, config, ahead=True):
        super().__init__(config)
        self.ahead = ahead
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RippleLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids=None, attention_mask=None, return_dict=True):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = attention_mask[:, None, None, :] == 0
        if not self.ahead:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            hidden = hidden | (places[None, :] > places[:, None])
        states = self.embeddings(input_ids)
        for layer in self.layers:
            states = layer(states, hidden)
        return BaseModelOutput(last_hidden_state=states)


class RippleForSequenceClassification(RipplePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.ripple = RippleModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, return_dict=True):
        states = self.ripple(input_ids, attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(states[:, 0]))


class RippleForCausalLM(RipplePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.ripple = RippleModel(config, ahead=False)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, return_dict=True):
        return CausalLMOutput(logits=self.head(self.ripple(input_ids, attention_mask).last_hidden_state))
"""


def write_own_code(
    folder: Path, architecture: str = "RippleForSequenceClassification", *, weights: bool = True, **config: Any
) -> Path:
    """Write a folder with config.json, two Python files and seeded weights; ``config`` goes into config.json."""
    folder.mkdir(parents=True)
    (folder / "configuration_ripple.py").write_text(_CONFIGURATION)
    (folder / "modeling_ripple.py").write_text(_MODELING)
    values = {"model_type": "ripple", "architectures": [architecture], "auto_map": AUTO_MAP, "num_labels": 4, **config}
    (folder / "config.json").write_text(json.dumps(values))
    if weights:
        import torch

        from onnx_config.remote_code import RemoteCode

        code = RemoteCode(folder, values)
        torch.manual_seed(0)
        model = code.model_class(architecture)(code.config_of(values))
        text = (folder / "config.json").read_text()
        model.save_pretrained(folder)
        (folder / "config.json").write_text(text)
    return folder
