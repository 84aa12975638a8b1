"""Twins: small enough to run, and like the model in everything that its inputs depend on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.twin import PARAMETER_BUDGET, Twin, default_config, shrink, twins

LLAMA_3 = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
QWEN2_VL = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14},
}
LLAVA = {
    "text_config": {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "num_hidden_layers": 32},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "image_token_index": 32000,
}
SWIN = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # id -> class, model type, what differs from the type's default config
    "llama-3": ("LlamaForCausalLM", "llama", LLAMA_3),
    "bert": ("BertModel", "bert", {}),
    "mixtral": ("MixtralForCausalLM", "mixtral", {"num_key_value_heads": 8}),
    "gemma-2": ("Gemma2ForCausalLM", "gemma2", {}),
    "deepseek-3": ("DeepseekV3ForCausalLM", "deepseek_v3", {}),
    "jamba": ("JambaForCausalLM", "jamba", {"use_mamba_kernels": False}),
    "mamba": ("MambaForCausalLM", "mamba", {"hidden_size": 2560, "num_hidden_layers": 64}),
    "t5-xxl": ("T5Model", "t5", {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}),
    "whisper": ("WhisperModel", "whisper", {}),
    "vit": ("ViTModel", "vit", {}),
    "swin": ("SwinModel", "swin", SWIN),
    "qwen-2-vl": ("Qwen2VLForConditionalGeneration", "qwen2_vl", QWEN2_VL),
    "llava": ("LlavaForConditionalGeneration", "llava", LLAVA),
}
TEXT = ("llama-3", "bert", "mixtral", "gemma-2", "deepseek-3", "jamba", "mamba")


def full(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _, model_type, settings = CASES[name]
    return CONFIG_MAPPING[model_type](**copy.deepcopy(settings))


def class_of(name: str) -> type:
    found: type = getattr(transformers, CASES[name][0])
    return found


@cache
def twin(name: str) -> Twin:
    return shrink(full(name), class_of(name))


def built(name: str) -> Any:
    torch.manual_seed(0)
    return class_of(name)(copy.deepcopy(twin(name).config)).eval()


def parts(config: Any) -> Iterator[Any]:
    """Yield a config and those in it."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from parts(part)


def special_ids(config: Any) -> dict[str, int]:
    """Return the ids of special tokens by dotted path."""
    found: dict[str, int] = {}

    def walk(values: dict[Any, Any], path: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            elif re.search(r"token_(id|index)$", str(key)):
                ids = value if isinstance(value, list) else [value]
                found.update({f"{path}{key}.{n}": i for n, i in enumerate(ids) if i is not None and i >= 0})

    walk(config.to_dict(), "")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_twin_is_small_and_the_full_model_is_not(name: str) -> None:
    full_parameters = twin(name).full_parameters
    assert full_parameters is not None
    assert twin(name).parameters <= PARAMETER_BUDGET < full_parameters


@pytest.mark.parametrize("name", CASES)
def test_a_twin_is_like_the_full_model(name: str) -> None:
    assert twin(name).alike, twin(name).notes


@pytest.mark.parametrize("name", CASES)
def test_a_twin_is_of_the_same_classes(name: str) -> None:
    assert [type(part) for part in parts(twin(name).config)] == [type(part) for part in parts(full(name))]


@pytest.mark.parametrize("name", CASES)
def test_the_class_has_as_many_parameters_as_said(name: str) -> None:
    assert sum(p.numel() for p in dict.fromkeys(built(name).parameters())) == twin(name).parameters


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_stay_apart_and_inside_the_vocabulary(name: str) -> None:
    before, after = special_ids(full(name)), special_ids(twin(name).config)
    vocabulary = getattr(twin(name).config.get_text_config(), "vocab_size", None)
    assert before.keys() == after.keys()
    if vocabulary is not None:
        assert all(i < vocabulary for i in after.values())
    by_old: dict[int, set[int]] = {}
    for key, old in before.items():
        by_old.setdefault(old, set()).add(after[key])
    assert all(len(new) == 1 for new in by_old.values()), "one id became two"
    assert len({i for new in by_old.values() for i in new}) == len(by_old), "two ids became one"


@pytest.mark.parametrize("name", CASES)
def test_what_an_input_is_measured_by_stays(name: str) -> None:
    kept = ("patch_size", "image_size", "num_channels", "num_mel_bins", "temporal_patch_size", "spatial_merge_size")
    for old, new in zip(parts(full(name)), parts(twin(name).config), strict=True):
        assert [getattr(new, key, None) for key in kept] == [getattr(old, key, None) for key in kept]


@pytest.mark.parametrize("name", CASES)
def test_the_ratio_of_query_to_key_heads_stays(name: str) -> None:
    for old, new in zip(parts(full(name)), parts(twin(name).config), strict=True):
        if getattr(old, "num_key_value_heads", None):
            assert (
                old.num_attention_heads * new.num_key_value_heads == new.num_attention_heads * old.num_key_value_heads
            )


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_stays(name: str) -> None:
    for old, new in zip(parts(full(name)), parts(twin(name).config), strict=True):
        for key in ("layer_types", "layers_block_type", "mlp_layer_types", "layers_num_experts"):
            assert (getattr(old, key, None) is None) == (getattr(new, key, None) is None)
            assert {str(kind) for kind in getattr(new, key, None) or ()} >= {
                str(kind) for kind in getattr(old, key, None) or () if not isinstance(kind, int)
            }


@pytest.mark.parametrize(
    ("name", "module", "kinds"),
    [
        ("deepseek-3", "model.layers", {"DeepseekV3MLP", "DeepseekV3MoE"}),
        ("jamba", "model.layers", {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer", "JambaSparseMoeBlock"}),
        ("swin", "encoder.layers", {"SwinPatchMerging"}),
    ],
)
def test_modules_of_every_kind_are_built(name: str, module: str, kinds: set[str]) -> None:
    assert kinds <= {type(part).__name__ for part in built(name).get_submodule(module).modules()}


def test_layers_counted_from_the_end_in_no_order_are_moved_to_layers_that_remain() -> None:
    config = transformers.VipLlavaConfig(vision_feature_layers=[-2, -5, -8, -11, 6])
    small = shrink(config, transformers.VipLlavaForConditionalGeneration).config
    left = small.vision_config.num_hidden_layers
    assert left < 11
    assert len(small.vision_feature_layers) == 5
    # The states of a tower are one more than its layers.
    assert all(-left - 1 <= number <= left for number in small.vision_feature_layers)


@pytest.mark.parametrize("stages", [["stage4"], ["stage2", "stage3", "stage4"], ["stage1", "stage3"]])
def test_features_are_taken_out_of_the_same_stages(stages: list[str]) -> None:
    config = transformers.ResNetConfig(depths=[3, 4, 6, 3], out_features=stages)
    small = shrink(config, transformers.ResNetBackbone).config
    assert sum(small.depths) < 16
    assert small.out_features == stages


def test_a_mixture_still_chooses() -> None:
    config = twin("mixtral").config
    assert config.num_experts_per_tok < config.num_local_experts < 8


def test_layers_that_are_named_within_a_stage_stay_within_it() -> None:
    config = transformers.Sam2HieraDetConfig(blocks_per_stage=[1, 2, 7, 2], global_attention_blocks=[5, 7, 9])
    small = shrink(config, transformers.Sam2HieraDetModel).config
    assert small.blocks_per_stage == [1, 2, 2, 2]
    # The second of the third stage, where the first of the fourth takes every other row and cannot see all.
    assert small.global_attention_blocks == [4]


def test_experts_stay_wide_enough_for_products_over_groups_of_tokens() -> None:
    config = transformers.Qwen3MoeConfig(hidden_size=1536, intermediate_size=4224, moe_intermediate_size=2064)
    small = shrink(config, transformers.Qwen3MoeForCausalLM).config
    # An eighth of it is 258. PyTorch takes rows of whole 16 bytes there.
    assert small.moe_intermediate_size < 2064
    assert small.moe_intermediate_size % 4 == small.intermediate_size % 4 == 0


def test_rotary_sections_fill_a_narrower_head() -> None:
    text = twin("qwen-2-vl").config.text_config
    assert 2 * sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads


def test_equal_widths_of_two_parts_stay_equal() -> None:
    config = twin("qwen-2-vl").config
    assert config.vision_config.hidden_size == config.text_config.hidden_size


def image_and_text(config: Any) -> dict[str, torch.Tensor]:
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    size = config.vision_config.image_size
    ids = torch.full((1, tokens + 2), config.image_token_id)
    ids[0, 0] = ids[0, -1] = 5
    return {"input_ids": ids, "pixel_values": torch.rand(1, 3, size, size)}


def tokens(_: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 27).view(2, 12)}


def images(config: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(2, config.num_channels, config.image_size, config.image_size)}


def sounds(config: Any) -> dict[str, torch.Tensor]:
    return {"input_features": torch.rand(1, config.num_mel_bins, 3000), "decoder_input_ids": torch.ones(1, 4).long()}


def two_texts(config: Any) -> dict[str, torch.Tensor]:
    return tokens(config) | {"decoder_input_ids": torch.ones(2, 5).long()}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        *((name, tokens) for name in TEXT),
        ("t5-xxl", two_texts),
        ("whisper", sounds),
        ("vit", images),
        ("swin", images),
        ("llava", image_and_text),
    ],
)
def test_a_twin_runs(name: str, inputs: Callable[[Any], dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        output = built(name)(**inputs(twin(name).config))[0]
    assert output.isfinite().all()


def test_the_same_config_gives_the_same_twin() -> None:
    again = shrink(full("qwen-2-vl"), class_of("qwen-2-vl"))
    assert again.config.to_dict() == twin("qwen-2-vl").config.to_dict()
    assert list(again.changes.items()) == list(twin("qwen-2-vl").changes.items())


@pytest.mark.parametrize("name", ["llama-3", "llava", "swin"])
def test_the_config_given_stays_as_it_is(name: str) -> None:
    config = full(name)
    before = copy.deepcopy(config.to_dict())
    small = shrink(config, class_of(name)).config
    assert config.to_dict() == before
    assert not {id(part) for part in parts(config)} & {id(part) for part in parts(small)}


@pytest.mark.parametrize("name", sorted(tiny_models.FAMILIES))
def test_a_small_model_is_its_own_twin(name: str) -> None:
    config = tiny_models.config(name)
    found = shrink(config, getattr(transformers, tiny_models.FAMILIES[name].architecture))
    assert found.is_full
    assert found.config is not config
    assert found.config.to_dict() == config.to_dict()
    assert found.to_full(17) == 17


@pytest.mark.parametrize(
    ("name", "attribute", "size"),
    [
        pytest.param("llama-3", "hidden_size", 4096, id="width"),
        pytest.param("llama-3", "vocab_size", 128256, id="vocabulary"),
        pytest.param("llama-3", "intermediate_size", 14336, id="inner width"),
    ],
)
def test_a_size_is_found_again_in_the_full_model(name: str, attribute: str, size: int) -> None:
    assert twin(name).to_full(getattr(twin(name).config, attribute)) == size


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        pytest.param({"a": (64, 8), "b": (64, 8)}, 8, 64, id="two values, one answer"),
        pytest.param({"a": (64, 8), "b": (32, 8)}, 8, None, id="two answers"),
        pytest.param({"a": (64, 8)}, 9, None, id="no answer"),
        pytest.param({"a": ([64, 128], [8, 16])}, 16, 128, id="one of a list"),
        pytest.param({"a": ([64, 128], [8])}, 8, None, id="a list that was cut"),
        pytest.param({"eos_token_id": (50256, 319)}, 319, None, id="an id is no size"),
    ],
)
def test_to_full(changes: dict[str, tuple[Any, Any]], size: int, expected: int | None) -> None:
    config = transformers.BertConfig()
    assert Twin(config=config, parameters=1, full_parameters=2, changes=changes).to_full(size) == expected


def test_changes_say_what_was_there_and_what_is() -> None:
    assert twin("llama-3").changes["num_hidden_layers"] == (32, 2)
    assert twin("llava").changes["vision_config.num_hidden_layers"][0] == 24


def test_a_larger_budget_cuts_less() -> None:
    assert shrink(full("bert"), class_of("bert"), budget=20_000_000).config.hidden_size == 768


def test_there_are_other_twins_where_the_first_will_not_do() -> None:
    found = twins(full("llama-3"), class_of("llama-3"))
    first, second = next(found), next(found)
    assert first.config.to_dict() != second.config.to_dict()


def test_a_contradictory_config_is_refused_in_the_class_own_words() -> None:
    config = transformers.BertConfig(hidden_size=768, num_attention_heads=7)
    with pytest.raises(
        ModelError, match=r"BertModel .* hidden size \(768\) is not a multiple .* heads \(7\)"
    ) as caught:
        shrink(config, transformers.BertModel)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_a_model_type_gives_its_default_config() -> None:
    assert isinstance(default_config("bert"), transformers.BertConfig)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        pytest.param("no-such-type", "no such model type", id="unknown"),
        pytest.param("nougat", "no default config.*donut_swin", id="its class refuses"),
    ],
)
def test_a_model_type_without_a_default_config_says_why(model_type: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        default_config(model_type)


def base_classes() -> Iterator[tuple[str, type]]:
    for model_type in CONFIG_MAPPING_NAMES:
        names = MODEL_MAPPING_NAMES.get(model_type)
        found = getattr(transformers, names if isinstance(names, str) else (names or ("",))[0], None)
        if found is not None:
            yield model_type, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nearly_every_model_type_has_a_twin() -> None:
    large, unlike, count = [], [], 0
    for model_type, cls in base_classes():
        try:
            found = shrink(default_config(model_type), cls)
        except ModelError:
            continue
        count += 1
        if found.parameters > PARAMETER_BUDGET:
            large.append(f"{model_type}: {found.parameters / 1e6:.0f}M")
        if not found.alike:
            unlike.append(f"{model_type}: {found.notes}")
        assert found.parameters <= 8 * PARAMETER_BUDGET, large[-1]
    assert count > 500
    assert len(large) <= 0.05 * count, large
    assert len(unlike) <= 0.01 * count, unlike
