"""Texts with images, prompts about images, and texts beside images: several graphs answer as the one model does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
import torch
import transformers

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export import part_steps, steps
from onnx_config.export.artifact import copy_side_files
from onnx_config.parts import GRAPH_FILES, Role, dual_encoder_parts, fusion_parts, prompt_parts
from onnx_config.spec import ModelSpec
from tests.onnx_config.converted import edited
from tests.onnx_config.converted_parts import register
from tests.tiny_segmenters import SEGMENTERS, make_telling

IMAGE_TOKEN, VOCABULARY, PATCHES = 7, 60, 16


def llava() -> Any:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 2, "projection_dim": 16}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def sam() -> Any:
    return transformers.SamModel(SEGMENTERS["SamModel"]())


def make_strong(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights as they are made give the same token whatever the image.
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A tiny model as several graphs, and the one that they came from."""

    source: Path
    folder: Path
    spec: ModelSpec
    parts: tuple[ModelSpec, ...]
    reference: Any

    def together(self, changed: Mapping[Role, Path] | None = None) -> dict[str, Any]:
        """Compare what the graphs say together with the model."""
        graphs = {part.part: str(self.folder / GRAPH_FILES[Role(part.part)]) for part in self.parts}
        graphs |= {role.value: str(path) for role, path in (changed or {}).items()}
        return part_steps.generation({
            "folder": str(self.source), "spec": self.spec.to_json(), "parts": [part.to_json() for part in self.parts],
            "graphs": graphs, "device": "cpu", "threads": 1,
        })  # fmt: skip


def make(
    build: Callable[[], Any],
    divide: Callable[[ModelSpec], tuple[ModelSpec, ...]],
    folder: Path,
    change: Callable[[torch.nn.Module], None] = make_strong,
) -> Parts:
    source, artifact = folder / "source", folder / "artifact"
    artifact.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
        torch.manual_seed(0)
        model = build().eval()
        change(model)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(source)
        spec = ModelSpec.from_json(steps.detect({"folder": str(source)}))
        parts = divide(spec)
        for part in parts:
            request = {"folder": str(source), "spec": part.to_json(), "dtype": "float32", "opset": None}
            steps.export({**request, "output": str(artifact / GRAPH_FILES[Role(part.part)])})
    copy_side_files(source, artifact)
    register(artifact, spec.architecture)
    return Parts(source=source, folder=artifact, spec=spec, parts=parts, reference=model)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make(llava, fusion_parts, tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make(sam, prompt_parts, tmp_path_factory.mktemp("sam"), make_telling)


def prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, VOCABULARY, (2, PATCHES + 7), generator=generator)
    ids[:, 2 : 2 + PATCHES] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
    }  # fmt: skip


def test_the_parts_have_the_files_of_the_field(captioner: Parts, segmenter: Parts) -> None:
    assert {path.name for path in captioner.folder.glob("*.onnx")} == {
        "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx",
    }  # fmt: skip
    assert {path.name for path in segmenter.folder.glob("*.onnx")} == {
        "vision_encoder.onnx", "prompt_encoder_mask_decoder.onnx", "prompt_encoder_mask_decoder_with_boxes.onnx",
    }  # fmt: skip


def test_together_they_generate_what_pytorch_generates(captioner: Parts) -> None:
    assert captioner.together() == {
        "difference": None, "note": "generates the 32 tokens that PyTorch does, for 3 inputs at once",
    }  # fmt: skip


def test_together_they_answer_what_pytorch_answers(segmenter: Parts) -> None:
    assert segmenter.together() == {
        "difference": None,
        "note": "image and prompts in 3 graphs answer what the model does in one call: points, and other points, "
        "boxes, and boxes with points, all about one batch of images",
    }


@pytest.mark.parametrize(
    ("role", "asked"),
    [(Role.VISION_ENCODER, "points"), (Role.PROMPT_DECODER, "points"), (Role.PROMPT_DECODER_WITH_BOXES, "boxes")],
)
def test_a_weight_that_is_off_in_a_graph_of_a_segmenter_is_found(
    segmenter: Parts, role: Role, asked: str, tmp_path: Path
) -> None:
    graph = segmenter.folder / GRAPH_FILES[role]
    wrong = edited(graph, _scaled(1.05), tmp_path / graph.name)
    assert segmenter.together({role: wrong})["difference"].startswith(f"asked about {asked}, ")


def _scaled(factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
        found = sorted(floats, key=lambda t: -int(np.prod(t.dims)))
        values = onnx.numpy_helper.to_array(found[0]) * np.float32(factor)
        found[0].CopyFrom(onnx.numpy_helper.from_array(values, found[0].name))

    return change


@pytest.mark.parametrize("role", [Role.VISION_ENCODER, Role.EMBED_TOKENS, Role.DECODER_MERGED])
def test_a_weight_that_is_off_in_one_of_them_is_found(captioner: Parts, role: Role, tmp_path: Path) -> None:
    graph = captioner.folder / GRAPH_FILES[role]
    wrong = edited(graph, _scaled(1.05), tmp_path / graph.name)
    assert "differs" in captioner.together({role: wrong})["difference"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": False}, id="greedy"),
        pytest.param({"num_beams": 3, "do_sample": False}, id="beams"),
        pytest.param({"do_sample": True, "top_k": 5}, id="sampled"),
        pytest.param({"do_sample": False, "repetition_penalty": 1.5}, id="penalty"),
    ],
)
def test_texts_about_images_are_those_of_pytorch(captioner: Parts, options: dict[str, Any]) -> None:
    model = AutoModelForONNX.from_pretrained(captioner.folder, threads=1)
    asked = {**prompts(), **options, "max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    answers = []
    for one in (captioner.reference, model):
        torch.manual_seed(5)
        answers.append(one.generate(**asked))
    assert torch.equal(*answers)


def test_one_call_gives_the_logits_of_pytorch(captioner: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(captioner.folder, threads=1)
    with torch.no_grad():
        want = captioner.reference(**prompts()).logits
    torch.testing.assert_close(model(**prompts()).logits, want, atol=2e-5, rtol=1e-4)


def test_an_image_without_a_place_in_the_text_is_refused(captioner: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(captioner.folder, threads=1)
    inputs = prompts()
    inputs["input_ids"][:, 2] = 9
    with pytest.raises(ValueError, match=r"[Ii]mage features and image tokens do not match"):
        model(**inputs)


def test_positions_of_another_kind_are_refused(captioner: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(captioner.folder, threads=1)
    inputs = prompts()
    rows, length = inputs["input_ids"].shape
    positions = torch.arange(length).expand(3, rows, length)
    with pytest.raises(InputError, match="a position for each token"):
        model(**inputs, position_ids=positions)
    # One row of positions holds for all.
    plain = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=positions[0, :1]).logits, plain)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_tokens_that_see_later_ones_are_refused(captioner: Parts, dtype: torch.dtype) -> None:
    model = AutoModelForONNX.from_pretrained(captioner.folder, threads=1)
    inputs = prompts()
    rows, length = inputs["input_ids"].shape
    seen = torch.ones(rows, 1, length, length, dtype=torch.bool)
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    with pytest.raises(ModelError, match="lets tokens see later ones"):
        model(**{**inputs, "attention_mask": mask})


def test_a_part_that_is_missing_is_named(captioner: Parts, tmp_path: Path) -> None:
    for path in captioner.folder.iterdir():
        if path.name not in ("embed_tokens.onnx", "ferry.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"are only|lacks") as error:
        AutoModelForONNX.from_pretrained(tmp_path, threads=1).generate(**prompts())
    assert error.value.kind is ErrorKind.NOT_FOUND


def _close(got: Any, want: Any) -> None:
    for name in ("pred_masks", "iou_scores"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=5e-5, rtol=1e-4)


def _prompts(*names: str, things: int = 3, points: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(things + points)
    asked = {
        "input_points": torch.rand(2, things, points, 2, generator=generator) * 32,
        # Of the object, not of it, of the background, and one that fills a place.
        "input_labels": torch.tensor([1, 0, -1, -10])[torch.randint(0, 4, (2, things, points), generator=generator)],
        "input_boxes": torch.rand(2, things, 2, 2, generator=generator).sort(dim=-2).values.flatten(-2) * 32,
    }
    return {name: asked[name] for name in names}


POINTS = ("input_points", "input_labels")


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(_prompts(*POINTS), id="points"),
        pytest.param(_prompts(*POINTS, things=1, points=1), id="one point"),
        pytest.param(_prompts("input_points", points=5), id="points of the object"),
        pytest.param(_prompts("input_boxes"), id="boxes"),
        pytest.param(_prompts("input_boxes", things=1), id="one box"),
        pytest.param(_prompts(*POINTS, "input_boxes", things=4, points=3), id="boxes with points"),
    ],
)
def test_a_segmenter_is_asked_about_an_image_that_was_embedded_once(
    segmenter: Parts, asked: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForONNX.from_pretrained(segmenter.folder, threads=1)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = segmenter.reference(pixel_values=image, **asked)
    embeddings = model.get_image_embeddings(image)
    torch.testing.assert_close(embeddings, segmenter.reference.get_image_embeddings(image), atol=2e-5, rtol=1e-4)
    _close(model(image_embeddings=embeddings, **asked), want)
    # The same in one call, by what a processor returns, as arrays.
    arrays = {name: value.numpy() for name, value in {"pixel_values": image, **asked}.items()}
    got = model(**arrays, original_sizes=np.array([[32, 32]] * 2))
    assert isinstance(got.pred_masks, np.ndarray)
    assert type(got) is type(want)
    np.testing.assert_allclose(got.pred_masks, want.pred_masks, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param({"multimask_output": False}, "given multimask_output", id="another answer"),
        pytest.param({"input_masks": torch.zeros(2, 1, 32, 32)}, "given input_masks", id="a mask"),
        pytest.param({"image_embeddings": torch.zeros(2, 16, 8, 8)}, "both were given", id="two images"),
        pytest.param({"pixel_values": None}, "neither was given", id="no image"),
        pytest.param({"input_points": None, "input_labels": None}, "'input_points' is missing", id="no prompt"),
    ],
)
def test_what_a_segmenter_would_answer_otherwise_is_refused(segmenter: Parts, given: dict[str, Any], said: str) -> None:
    model = AutoModelForONNX.from_pretrained(segmenter.folder, threads=1)
    asked = {"pixel_values": torch.zeros(2, 3, 32, 32), **_prompts(*POINTS)}
    _ = model(**asked, multimask_output=True)
    with pytest.raises(InputError, match=said):
        model(**{**asked, **given})


def test_a_segmenter_without_a_graph_for_boxes_refuses_them(segmenter: Parts, tmp_path: Path) -> None:
    for path in segmenter.folder.iterdir():
        if path.name not in ("ferry.json", GRAPH_FILES[Role.PROMPT_DECODER_WITH_BOXES]):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = AutoModelForONNX.from_pretrained(tmp_path, threads=1)
    with pytest.raises(InputError, match="answer points only"):
        model(pixel_values=torch.zeros(2, 3, 32, 32), **_prompts("input_boxes"))


def test_other_models_embed_no_image(captioner: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(captioner.folder, threads=1)
    with pytest.raises(InputError, match="makes none to be asked about"):
        model.get_image_embeddings(torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    def build() -> Any:
        return transformers.CLIPModel(tiny_models.config("clip-model"))

    return make(build, dual_encoder_parts, tmp_path_factory.mktemp("clip"))


def test_a_dual_encoder_answers_as_a_whole(dual: Parts) -> None:
    model = AutoModelForONNX.from_pretrained(dual.folder, threads=1)
    config = dual.reference.config
    generator = torch.Generator().manual_seed(4)
    size = config.vision_config.image_size
    inputs = {
        "input_ids": torch.randint(3, config.text_config.vocab_size, (3, 6), generator=generator),
        "attention_mask": torch.ones(3, 6, dtype=torch.int64),
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
    }
    with torch.no_grad():
        want = dual.reference(**inputs).logits_per_image
    torch.testing.assert_close(model(**inputs).logits_per_image, want, atol=1e-4, rtol=1e-4)


def test_its_sides_give_what_its_methods_give(dual: Parts) -> None:
    side = next(part for part in dual.parts if part.part == Role.VISION_MODEL)
    graph = dual.folder / GRAPH_FILES[Role.VISION_MODEL]
    request = {"folder": str(dual.source), "spec": side.to_json(), "graph": str(graph), "device": "cpu", "threads": 1}
    inputs = [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in side.inputs]
    found = steps.parity({**request, "inputs": inputs, "float64": "half", "mapped": False})
    assert (found["outcome"], found["detail"]) == ("verified", None)
