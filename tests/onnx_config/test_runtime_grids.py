"""Texts with images of any size, whose grids are told: the parts generate what PyTorch generates."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from onnx_config import AutoModelForONNX
from onnx_config.errors import InputError, ModelError
from onnx_config.parts import Role, fusion_parts, role_of, text_alone
from onnx_config.runtime.fusion import _Decoder
from onnx_config.runtime.graph_session import GraphInput
from onnx_config.runtime.told_features import handed_on, told_features
from onnx_config.spec import ModelSpec
from onnx_config.universal_config import UniversalOnnxConfig
from tests.onnx_config.test_runtime_fusion import Parts, make

IMAGE_TOKEN, WIDTH, MERGE = 7, 2 * 3 * 4 * 4, 2
SPECIAL = {"image_token_id": IMAGE_TOKEN, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 10}
TEXT = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2}  # fmt: skip
VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": MERGE, "temporal_patch_size": 2}


def qwen2_vl() -> Any:
    angles = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": angles},
        vision_config={**VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **SPECIAL,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def prompts(*texts: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """Return texts, padded on the left, with images of these grids in each."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for grids in texts:
        row = [20]
        for frames, height, width in grids:
            row += [21, *[IMAGE_TOKEN] * (frames * height * width // MERGE**2), 22]
        rows.append(row + torch.randint(30, 90, (5,), generator=generator).tolist())
    length = max(map(len, rows))
    ids = torch.tensor([[2] * (length - len(row)) + row for row in rows])
    grid = torch.tensor([grid for grids in texts for grid in grids])
    pixels = torch.randn(int(grid.prod(-1).sum()), WIDTH, generator=generator)
    return {
        "input_ids": ids, "attention_mask": (ids != 2).long(), "pixel_values": pixels, "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }  # fmt: skip


BATCHES = [
    pytest.param([[(1, 4, 6)]], id="one"),
    pytest.param([[(1, 4, 6)], [(1, 8, 2)]], id="two-grids"),
    pytest.param([[(1, 2, 2), (1, 6, 4)], [(1, 4, 10)], []], id="two-in-one-text-and-none-in-another"),
]


def convert(folder: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Return where the model is, and its spec and those of its parts; in a process of its own."""
    made = make(qwen2_vl, fusion_parts, folder)
    return made.folder, made.spec.to_json(), [part.to_json() for part in made.parts]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    # Where a graph was traced, torch no longer makes a tensor of numbers that are tensors, as positions are counted.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        folder, spec, parts = apart.submit(convert, tmp_path_factory.mktemp("qwen2_vl")).result()
    source = folder.parent / "source"
    return Parts(
        source=source,
        folder=folder,
        spec=ModelSpec.from_json(spec),
        parts=tuple(map(ModelSpec.from_json, parts)),
        reference=transformers.Qwen2VLForConditionalGeneration.from_pretrained(source).eval(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("texts", BATCHES)
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=["greedy", "beams"]
)
def test_texts_about_images_of_any_size_are_those_of_pytorch(
    reader: Parts, texts: list[list[tuple[int, int, int]]], options: dict[str, Any]
) -> None:
    model = AutoModelForONNX.from_pretrained(reader.folder, threads=1)
    asked = {**prompts(*texts), **options, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 2}
    with torch.no_grad():
        want = reader.reference.generate(**asked)
    assert torch.equal(model.generate(**asked), want)


@pytest.mark.slow
def test_one_call_gives_the_logits_of_pytorch(reader: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(reader.folder, threads=1)
    inputs = prompts([(1, 4, 6)], [(1, 8, 2)])
    with torch.no_grad():
        want = reader.reference(**inputs).logits
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[shown], want[shown], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_together_they_generate_what_pytorch_generates(reader: Parts) -> None:
    assert reader.together()["difference"] is None


@pytest.mark.slow
def test_a_grid_of_other_patches_than_there_are_is_refused(reader: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(reader.folder, threads=1)
    inputs = prompts([(1, 4, 6)])
    with pytest.raises(InputError, match="cannot run the graph on pixel_values"):
        model(**{**inputs, "image_grid_thw": torch.tensor([[1, 4, 8]])})


@pytest.mark.slow
def test_a_grid_of_other_blocks_than_a_text_has_room_for_is_refused(reader: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(reader.folder, threads=1)
    inputs = prompts([(1, 4, 6)])
    inputs["input_ids"][0, -1] = IMAGE_TOKEN
    with pytest.raises(ValueError, match="do not match"):
        model(**inputs)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    with pytest.raises(InputError, match="other places for images than the grids of the images tell"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.fixture(scope="module")
def found() -> Any:
    config = qwen2_vl().config
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    # More than the small model has that it is found out with.
    config.text_config.vocab_size = 5000
    return UniversalOnnxConfig(config)


def test_grids_patches_and_tokens_are_found_out(found: Any) -> None:
    assert found.inputs == {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "sequence_length"},
        "pixel_values": {0: "total_patches"},
        "image_grid_thw": {0: "num_images"},
        "mm_token_type_ids": {0: "batch_size", 1: "sequence_length"},
    }
    vision, embed, decoder = fusion_parts(found.spec)
    assert [role_of(part) for part in (vision, embed, decoder)] == [
        Role.VISION_ENCODER, Role.EMBED_TOKENS, Role.DECODER_MERGED,
    ]  # fmt: skip
    assert [tensor.name for tensor in vision.inputs] == ["pixel_values", "image_grid_thw"]
    positions = next(tensor for tensor in decoder.inputs if tensor.name == "position_ids")
    assert positions.shape == (3, "batch_size", "sequence_length")


@pytest.mark.parametrize("sizes", [{}, {"batch_size": 1, "num_images": 2}, {"batch_size": 3, "total_patches": 128}])
def test_dummy_inputs_are_accepted_at_any_grid(found: Any, sizes: dict[str, int]) -> None:
    inputs = found.generate_dummy_inputs(**sizes)
    tokens = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    assert tokens * MERGE**2 == int(inputs["image_grid_thw"].prod(-1).sum()) == len(inputs["pixel_values"])
    with torch.no_grad():
        logits = transformers.Qwen2VLForConditionalGeneration(found.config).eval()(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape


def test_without_images_it_takes_a_text(found: Any) -> None:
    alone = text_alone(found.spec)
    assert [tensor.name for tensor in alone.inputs] == ["input_ids", "attention_mask"]
    assert [tensor.name for tensor in alone.outputs] == ["logits"]
    assert alone.axis_ranges["sequence_length"][0] == 1
    assert alone.assumed[-1].startswith("the graph takes text only; pixel_values, image_grid_thw, mm_token_type_ids")
    assert text_alone(alone) == alone


def test_features_are_handed_on_image_by_image() -> None:
    with torch.device("meta"):
        base = qwen2_vl().base_model
    inputs = prompts([(1, 4, 6), (1, 2, 2)])
    feed = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    told = told_features(base, base.get_image_features, feed, count=7).pooler_output
    assert [tuple(part.shape) for part in told] == [(6, 32), (1, 32)]
    made = torch.randn(7, 32)
    assert [len(part) for part in handed_on(made, told)] == [6, 1]
    assert torch.equal(torch.cat(handed_on(made, told)), made)
    with pytest.raises(InputError, match=r"5 features of images that have 6 \+ 1"):
        handed_on(made[:5], told)


class _Graph:
    """A graph that answers with zeros, and remembers what it was given."""

    def __init__(self, *names: str) -> None:
        shape = (None, 2, None, 4)
        self.inputs = {
            name: GraphInput(name=name, dtype=torch.float32, shape=(None, 3) if "states" in name else shape)
            for name in names
        }
        self.fed: list[dict[str, torch.Tensor]] = []

    def run(self, feed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.fed.append(feed)
        rows, length = feed["inputs_embeds"].shape[:2]
        present = {name.replace("past_key_values", "present"): t for name, t in feed.items() if "past" in name}
        for name, tensor in present.items():
            if tensor.ndim == 4:
                present[name] = torch.cat([tensor, torch.ones(rows, 2, length, 4)], dim=2)
            else:
                present[name] = tensor + length
        return {"logits": torch.zeros(rows, length, 5), **present}


KEYS = ("past_key_values.0.key", "past_key_values.0.value")


def test_features_for_layers_stand_where_the_images_do() -> None:
    graph: Any = _Graph("inputs_embeds", "deep.0", "deep.1", *KEYS)
    decoder = _Decoder(graph)
    mask = torch.tensor([[False, True, True]])
    features = [torch.ones(2, 4), 2 * torch.ones(2, 4)]
    answer = decoder.forward(inputs_embeds=torch.zeros(1, 3, 4), deep=features, at=mask)
    assert graph.fed[0]["deep.1"][0, :, 0].tolist() == [0, 2, 2]
    # What comes after is a text.
    decoder.forward(inputs_embeds=torch.zeros(1, 1, 4), past_key_values=answer.past_key_values)
    assert not graph.fed[1]["deep.0"].any()
    assert graph.fed[1]["past_key_values.0.key"].shape[2] == 3


@pytest.mark.parametrize(
    "handed",
    [
        pytest.param({"deep": [torch.zeros(1, 4)], "at": torch.ones(1, 2)}, id="fewer-layers"),
        pytest.param({"deep": [torch.zeros(1, 4)] * 2}, id="nowhere"),
        pytest.param({"kinds": torch.zeros(1, 2)}, id="something-else"),
    ],
)
def test_more_of_an_image_than_the_graph_takes_is_refused(handed: dict[str, Any]) -> None:
    graph: Any = _Graph("inputs_embeds", "deep.0", "deep.1", *KEYS)
    with pytest.raises(
        ModelError, match=r"hands its decoder .* beside the embeddings, and the graph takes deep.0, deep.1"
    ):
        _Decoder(graph).forward(inputs_embeds=torch.zeros(1, 2, 4), **handed)


def test_states_are_carried_and_many_tokens_after_them_are_read_one_by_one() -> None:
    graph: Any = _Graph("inputs_embeds", "attention_mask", *KEYS, "past_key_values.1.conv_states")
    decoder = _Decoder(graph)
    cache = decoder.forward(inputs_embeds=torch.zeros(1, 3, 4)).past_key_values
    assert not graph.fed[0]["past_key_values.1.conv_states"].any()
    answer = decoder.forward(inputs_embeds=torch.zeros(1, 2, 4), past_key_values=cache)
    assert [feed["inputs_embeds"].shape[1] for feed in graph.fed] == [3, 1, 1]
    assert [feed["attention_mask"].shape[1] for feed in graph.fed] == [3, 4, 5]
    assert [int(feed["past_key_values.1.conv_states"][0, 0]) for feed in graph.fed] == [0, 3, 4]
    assert answer.last_hidden_state.shape[:2] == (1, 2)
    assert answer.past_key_values is cache


def test_sizes_of_outputs_are_those_of_the_full_model(found: Any) -> None:
    assert found.spec.outputs[0].shape == ("batch_size", "sequence_length", 5000)
    assert found.spec.assumed == ()


def test_where_no_tokens_are_found_for_images_a_text_alone_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_config.value_lessons.placed_drafts", lambda *_: iter(()))
    monkeypatch.setattr("onnx_config.shape_inference._MAX_RUNS", 6)
    config = qwen2_vl().config
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    spec = UniversalOnnxConfig(config).spec
    assert [tensor.name for tensor in spec.inputs] == ["input_ids", "attention_mask"]
    assert spec.assumed[0].startswith("the graph takes text only; pixel_values, image_grid_thw")
