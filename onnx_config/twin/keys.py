"""What a value of a config means, read from its key in the field's own words.

No model type is named. A guess that is wrong shows when the class is built and looked at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeGuard

from onnx_config.twin.values import is_int

if TYPE_CHECKING:
    pass

__all__ = [
    "CHOSEN",
    "COUNTED",
    "DEPTH",
    "DEPTHS",
    "DEPTH_FACTOR",
    "EXPERTS",
    "EXPERT_GROUPS",
    "FEATURES",
    "GROUPS",
    "HEADS",
    "HEAD_DIM",
    "INDEXES_ONLY",
    "INNER_WIDTH",
    "LAST_LAYERS",
    "LAYER_COUNT",
    "LAYER_INDEX",
    "LAYER_NUMBER",
    "NO_DEPTH",
    "NO_SCOPE",
    "POSITIONS",
    "PROTECTED",
    "ROPE_FACTORS",
    "ROPE_SECTIONS",
    "TOKEN_ID",
    "VOCABULARY",
    "is_heads",
    "is_indexes",
    "is_width",
]

NO_SCOPE = re.compile(r"id2label|label2id|^rope_|quantization|task_specific|vocabulary_map|pruned_heads")


DEPTH = re.compile(r"(^|_)(layers?|depth|blocks)(_per_stack)?$|^n_layers?$")


NO_DEPTH = re.compile(
    r"conv|feat|adapter|iou|head_depth|kv_|_with|freq|share|window|every|interval|nextn|mtp|predict|group|per_|drop|"
    r"temporal_depth|pos|dense|hash|hidden_layers_to|norm|resnet|res_|residual|subsampl|image_depth|color"
)


DEPTHS = re.compile(
    r"(^|_)depths?$|^(num_|n_)?(layers|blocks)$|blocks_per_stage|block_repeats$|stage_num\w*_(blocks|of_layers)$|"
    r"^(encoder|decoder|num_hidden)_layers$|^block_sizes$"
)


_INDEXES = re.compile(r"(index|indexes|indices|idx|idxs|layer_ids?|layer_idx|layers|_blocks|_at|hook_ids|return_idx)$")


INDEXES_ONLY = re.compile(r"global|cross|indexes|attention_layers|moe_layers")


DEPTH_FACTOR = re.compile(r"^depth_(coefficient|multiplier)$")


_NO_INDEXES = re.compile(r"token|^_?out_features$|expert|select|^num_|^n_")


FEATURES = re.compile(r"out_|feature|deepstack|return|hook|extract|intermediate|target|proj|visual")


LAYER_INDEX = re.compile(r"layer_(id|idx|index)$|feature_layers?$|layer_(start|end)_index$|_vision_layer$")


LAYER_COUNT = re.compile(r"layers$|first_k_dense|(^|_)n_dense|dense_replace$|max_window_layers")


LAST_LAYERS = re.compile(r"shared|last")


VOCABULARY = re.compile(r"vocab|^n_words$|codebook_size|num_embeddings|num_(bpe|wordpiece)_labels|hash_buckets")


TOKEN_ID = re.compile(r"(token_?(ids?|index|idx)|(start|end|bos|eos|pad|sep|unk|mask|patch|newline)_(id|index))$")


POSITIONS = re.compile(r"position_embeddings$|n_positions$|max_(text_)?(seq_len|sequence_length|positions)$|n_ctx$")


EXPERTS = re.compile(r"(^|_)(num|n)(_(local|routed|moe|sparse))?_experts$|^moe_num_experts$|^expert_num$")


EXPERT_GROUPS = re.compile(r"^n_group$|^(num|n)_expert_groups?$")


CHOSEN = re.compile(
    r"experts_per_tok(en)?$|experts_per_topk$|moe_top_?k$|^top_?k_experts$|moe_k$|^num_selected_experts$"
)


HEADS = re.compile(r"(^|_)heads?(_kv|_per_(stage|layer))?$")


HEAD_DIM = re.compile(r"head_?dims?$|dim_head$|^d_kv$|d_head$|head_size$|kv_channels$|size_per_head$|heads_dim$")


GROUPS = re.compile(r"n_groups?$|ngroups$|mamba_num_groups$")


_WIDTH = re.compile(
    r"hidden|(^|_)dims?(_|$)|size|channel|rank|width|filter|planes|embd|units|inner|^d_|_d_ssm|dff|ffn|feedforward|"
    r"feats$|lowrank|d_latents|d_model"
)


INNER_WIDTH = re.compile(r"intermediate_(size|dim)$")


PROTECTED = re.compile(
    r"(image|img|^input|clip|video|query|beam|key_?frame)_?(size|shape|h|w|feat|height|width)s?$|patch(?!_embed)|"
    r"kernel|stride|window|mel(_|s$)|pool(_|ing|$)|roi|grid|crop|tile|tubelet|position|vocab|codebook_size|batch|chunk|block_size|"
    r"context|state|seq|length|(^|_)(num|audio|image|img|input)_channels$|in_chans$|feature_size|sampling|sampl\w*_(rate|factor|size)|frame|hop|"
    r"fft|conv$|cache|merge|group_size|n_groups?$|shard|bucket|threshold|^(max|min)_|depth|label|time_|tempor|temper|period|scale(?!d)|factor|"
    r"ratio|eps|drop|bias|loss|cost|coefficient|prob|seed|token(?!_embed)|interval|top_?k|act_dim|feat_(dim|size)|"
    r"feature_sizes|visual_pos|levels|dilat|capacity|divis|rate|rope|num_hidden|hidden_act|posemb|multiplier|"
    r"num_hidden_layers|hidden_groups|layers|expan|local|overlap|fpn_(k|s|p)|d_conv|axes|reduction"
)


_TIED = re.compile(r"_(input|in)_(size|dim)$")


COUNTED = re.compile(r"^(num|n|max|min|top)_(?!pos_feats)")


ROPE_SECTIONS = re.compile(r"section|axes_dims?$")


ROPE_FACTORS = re.compile(r"(short|long)_factor$")


LAYER_NUMBER = re.compile(r"idx|index|layer_id|layer_number|name|block_id|^_|training|num_layers")


def is_indexes(value: object, key: str) -> TypeGuard[list[int]]:
    if not _INDEXES.search(key) or _NO_INDEXES.search(key) or not isinstance(value, list):
        return False
    return all(is_int(v) for v in value) and value == sorted(set(value))


def is_width(key: str) -> bool:
    others = (PROTECTED, HEADS, HEAD_DIM, _TIED)
    return bool(_WIDTH.search(key)) and not any(other.search(key) for other in others)


def is_heads(key: str) -> bool:
    return bool(HEADS.search(key)) and not HEAD_DIM.search(key)
