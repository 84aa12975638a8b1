"""What models keep from step to step: names, sizes, axes and types, and that the model takes it back."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

from onnx_config import UniversalOnnxConfig
from onnx_config.cache_layout import CacheLayout
from onnx_config.spec import TensorSpec

ROWS, PAST = "batch_size", "past_sequence_length"


@cache
def configured(config_class: str, **settings: object) -> UniversalOnnxConfig:
    return UniversalOnnxConfig(getattr(transformers, config_class)(**settings))


def layout_of(config_class: str, **settings: object) -> CacheLayout:
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return configured(config_class, **plain).cache_layout


def keys(*shape: int | str, part: str = "") -> dict[str, tuple[int | str, ...]]:
    return {f"{part}key": shape, f"{part}value": shape}


FULL_SIZE = [
    pytest.param("GPT2Config", 12, {0: keys(ROWS, 12, PAST, 64)}, id="gpt2"),
    pytest.param("LlamaConfig", 32, {0: keys(ROWS, 32, PAST, 128), 31: keys(ROWS, 32, PAST, 128)}, id="llama"),
    pytest.param("MistralConfig", 32, {0: keys(ROWS, 8, PAST, 128)}, id="mistral-every-layer-slides"),
    pytest.param("FalconConfig", 32, {0: keys(ROWS, 1, PAST, 64)}, id="falcon-one-key-for-all-heads"),
    pytest.param(
        "Gemma2Config", 26, {0: keys(ROWS, 4, PAST, 256), 1: keys(ROWS, 4, PAST, 256)}, id="gemma2-slides-every-other"
    ),
    pytest.param(
        "Gemma3TextConfig", 26, {4: keys(ROWS, 4, PAST, 256), 5: keys(ROWS, 4, PAST, 256)}, id="gemma3-slides-mostly"
    ),
    pytest.param(
        "DeepseekV3Config", 61,
        {60: {"key": (ROWS, 1, PAST, 512), "value": (ROWS, 1, PAST, 64)}},
        id="deepseek-compressed",
    ),
    pytest.param(
        "T5Config", 6,
        {5: keys(ROWS, 8, PAST, 64, part="decoder.") | keys(ROWS, 8, "sequence_length", 64, part="encoder.")},
        id="t5",
    ),
    pytest.param(
        "BartConfig", 12,
        {11: keys(ROWS, 16, PAST, 64, part="decoder.") | keys(ROWS, 16, "sequence_length", 64, part="encoder.")},
        id="bart",
    ),
    pytest.param(
        "WhisperConfig", 4,
        {3: keys(ROWS, 6, PAST, 64, part="decoder.") | keys(ROWS, 6, 1500, 64, part="encoder.")},
        id="whisper-sounds-of-one-length",
    ),
    pytest.param(
        "MambaConfig", 32, {31: {"conv_states": (ROWS, 1536, 4), "recurrent_states": (ROWS, 1536, 16)}}, id="mamba"
    ),
    pytest.param(
        "JambaConfig", 32,
        {0: {"conv_states": (ROWS, 8192, 4), "recurrent_states": (ROWS, 8192, 16)}, 4: keys(ROWS, 8, PAST, 128)},
        id="jamba-states-and-keys",
    ),
    pytest.param("LlavaConfig", 32, {0: keys(ROWS, 32, PAST, 128)}, id="llava-the-texts"),
    pytest.param("xLSTMConfig", 32, {
        31: {"rnn_state.0": (ROWS, 8, 256, 512), "rnn_state.1": (ROWS, 8, 256), "rnn_state.2": (ROWS, 8, 1)}
    }, id="xlstm-a-cache-of-its-own"),
    pytest.param("BertConfig", 0, {}, id="bert-keeps-nothing"),
    pytest.param("ViTConfig", 0, {}, id="vit-takes-no-cache"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("config_class", "layers", "expected"), FULL_SIZE)
def test_what_a_model_of_full_size_keeps(config_class, layers, expected):
    check(layout_of(config_class), layers, expected)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 120}
GROUPED = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY = [
    pytest.param(
        "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, 2, {1: keys(ROWS, 4, PAST, 8)},
        id="gpt2",
    ),
    pytest.param("LlamaConfig", GROUPED, 3, {2: keys(ROWS, 2, PAST, 16)}, id="llama-grouped"),
    pytest.param(
        "MistralConfig", GROUPED | {"sliding_window": 6}, 3, {0: keys(ROWS, 2, PAST, 16)},
        id="a-window-shorter-than-the-text",
    ),
    pytest.param(
        "T5Config", {"d_model": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 2, "d_ff": 64,
                     "vocab_size": 99},
        2, {1: keys(ROWS, 2, PAST, 8, part="decoder.") | keys(ROWS, 2, "sequence_length", 8, part="encoder.")},
        id="t5",
    ),
    pytest.param(
        "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 99},
        2, {1: {"conv_states": (ROWS, 64, 4), "recurrent_states": (ROWS, 64, 8)}},
        id="mamba",
    ),
    pytest.param(
        "RecurrentGemmaConfig",
        SMALL | {"num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 64, "attention_window_size": 32},
        3, {1: {"conv1d_state": (ROWS, 64, 3), "recurrent_states": (ROWS, 64)}, 2: keys(ROWS, 1, PAST, 16)},
        id="states-in-modules-and-a-cache-that-is-not-returned",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config_class", "settings", "layers", "expected"), TINY)
def test_what_a_small_model_keeps(config_class, settings, layers, expected):
    check(layout_of(config_class, **settings), layers, expected)


def check(layout: CacheLayout, layers: int, expected: dict[int, dict[str, tuple[int | str, ...]]]) -> None:
    assert layout.notes == ()
    assert {tensor.dtype for tensor in layout.past} <= {"float32"}
    assert [tensor.name.split(".")[0] for tensor in layout.past] == ["past_key_values"] * len(layout.past)
    assert sorted({int(tensor.name.split(".")[1]) for tensor in layout.past}) == list(range(layers))
    for number, tensors in expected.items():
        prefix = f"past_key_values.{number}."
        found = {t.name.removeprefix(prefix): t.shape for t in layout.past if t.name.startswith(prefix)}
        assert list(found.items()) == list(tensors.items())


def test_the_width_and_depth_of_the_full_model_are_read_though_a_small_one_runs():
    layout = layout_of("LlamaConfig", num_hidden_layers=80, hidden_size=8192, num_attention_heads=64,
                       num_key_value_heads=8, intermediate_size=28672)  # fmt: skip
    check(layout, 80, {79: keys(ROWS, 8, PAST, 128)})


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 6}], ids=["all", "window"])
def test_every_layer_takes_the_whole_past(settings):
    layout = configured("MistralConfig", **GROUPED, **settings).cache_layout
    assert layout.sizes_at(8) == {PAST: 8}
    assert layout.axis_ranges == {PAST: (0, None)}
    assert layout.present()[0].name == "present.0.key"
    assert layout.present()[0].shape[2] == "past_sequence_length + sequence_length"
    assert layout.is_carried


@pytest.mark.parametrize("past_length", [0, 8])
@pytest.mark.parametrize(
    ("config_class", "settings"),
    [pytest.param(p.values[0], p.values[1], id=p.id) for p in TINY if p.id in ("gpt2", "llama-grouped", "t5")],
)
def test_the_model_takes_back_what_the_layout_says_and_gives_what_it_promises(config_class, settings, past_length):
    """The dummy cache goes in, the present comes out in the shapes of the layout."""
    config = getattr(transformers, config_class)(**settings)
    found = UniversalOnnxConfig(config, use_past=True)
    sizes = {"past_sequence_length": past_length}
    inputs = found.generate_dummy_inputs(**sizes)
    held = {name: inputs.pop(name) for name in list(inputs) if name.startswith("past_key_values")}
    torch.manual_seed(0)
    model = found.model_class(config).eval()
    with torch.no_grad():
        returned = model(**inputs, past_key_values=as_cache(held), use_cache=True).past_key_values
    present = as_tensors(returned)
    expected = {t.name: t.resolve(found.sizes | sizes) for t in found.spec.outputs if t.name.startswith("present")}
    assert {name: tuple(value.shape) for name, value in present.items()} == expected


def as_cache(held: dict[str, torch.Tensor]) -> DynamicCache | EncoderDecoderCache:
    """Return the cache object that the flat tensors make up."""

    def part(middle: str) -> DynamicCache:
        count = len({name.split(".")[1] for name in held})
        names = [f"past_key_values.{number}.{middle}" for number in range(count)]
        return DynamicCache([(held[f"{name}key"], held[f"{name}value"]) for name in names])

    if any(".encoder." in name for name in held):
        return EncoderDecoderCache(part("decoder."), part("encoder."))
    return part("")


def as_tensors(returned: DynamicCache | EncoderDecoderCache) -> dict[str, torch.Tensor]:
    halves = {"": returned}
    if isinstance(returned, EncoderDecoderCache):
        halves = {"decoder.": returned.self_attention_cache, "encoder.": returned.cross_attention_cache}
    return {
        f"present.{number}.{part}{name}": value
        for part, half in halves.items()
        for number, layer in enumerate(half.layers)
        for name, value in (("key", layer.keys), ("value", layer.values))
    }


def test_masks_cover_the_past_and_ids_do_not():
    def tensor(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64", shape=shape)

    layout = layout_of("LlamaConfig", **GROUPED)
    steps = (ROWS, "sequence_length")
    inputs = tuple(tensor(name, *steps) for name in ("input_ids", "attention_mask", "token_type_ids"))
    extended = layout.extended(inputs)
    assert [t.shape[1] for t in extended[:3]] == [
        "sequence_length", "past_sequence_length + sequence_length", "sequence_length"
    ]  # fmt: skip
    assert extended[3:] == layout.past


def test_a_mask_covers_what_a_window_forgot():
    found = UniversalOnnxConfig(transformers.MistralConfig(**GROUPED, sliding_window=6), use_past=True)
    inputs = found.generate_dummy_inputs(seq_length=3, past_sequence_length=9)
    assert inputs["attention_mask"].shape == (2, 12)
    assert inputs["past_key_values.0.key"].shape == (2, 2, 9, 16)


def test_states_take_no_part_in_the_length_of_the_mask():
    settings = next(p.values[1] for p in TINY if p.id == "mamba")
    found = UniversalOnnxConfig(transformers.MambaConfig(**settings), use_past=True)
    assert found.inputs["past_key_values.0.conv_states"] == {0: ROWS}
    assert found.sizes.keys() == {ROWS, "sequence_length"}


CARRIED = [
    pytest.param("LlamaConfig", GROUPED, True, id="keys"),
    pytest.param("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}, True, id="states"),
    pytest.param("T5Config", {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}, False, id="two-halves"),
    pytest.param("BertConfig", {"num_hidden_layers": 1}, False, id="nothing"),
]


@pytest.mark.parametrize(("config_class", "settings", "carried"), CARRIED)
def test_what_one_graph_can_carry(config_class, settings, carried):
    assert layout_of(config_class, **settings).is_carried is carried


@pytest.mark.parametrize(
    ("name", "shape", "carried"),
    [
        pytest.param("0.key", (ROWS, 2, PAST, 8), True, id="grows"),
        pytest.param("0.key", (ROWS, 2, 12, 8), False, id="keys-that-do-not-grow"),
        pytest.param("0.indexer_keys", (ROWS, PAST, 8), True, id="others-grow"),
        pytest.param("0.conv_states", (ROWS, 8, 4), True, id="one-size"),
        pytest.param("0.conv_states.1", (ROWS, 8, 4), True, id="several"),
        pytest.param("0.state", (8, ROWS), False, id="rows-elsewhere"),
        pytest.param("0.state", (ROWS, "sequence_length"), False, id="moves-with-the-input"),
        pytest.param("0.encoder.key", (ROWS, 2, PAST, 8), False, id="of-an-encoder"),
    ],
)
def test_which_tensor_a_graph_can_carry(name, shape, carried):
    tensor = TensorSpec(name=f"past_key_values.{name}", dtype="float32", shape=shape)
    assert CacheLayout(past=(tensor,), step_axis="sequence_length").is_carried is carried


def test_a_run_that_is_refused_is_noted():
    # All its layers keep states, and its mask asks for the length of the keys.
    layout = layout_of("BambaConfig", num_hidden_layers=2, hidden_size=64, mamba_n_heads=16, mamba_d_head=8,
                       num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)  # fmt: skip
    assert layout.past == ()
    assert "a run with the cache on was refused" in layout.notes[0]
