"""Which graphs a model of texts with images becomes: its parts where they hold, else its text alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onnx_config.errors import ErrorKind, FerryError, ModelError, ResourceError
from onnx_config.parts import Role
from onnx_config.spec import DecoderCall, GridRule, ModelSpec, PlacesRule, TensorSpec, ValueRule
from tasks.graphs import best_graphs
from tasks.report import Verdict


def _tensor(name: str, *shape: int | str, dtype: str = "int64") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def reader(**changes: Any) -> ModelSpec:
    cache = tuple(
        _tensor(f"past_key_values.0.{half}", "batch_size", 2, "past_sequence_length", 8, dtype="float32")
        for half in ("key", "value")
    )
    values: dict[str, Any] = {
        "model_type": "any", "task": "image-text-to-text", "task_family": "image-text-to-text", "architecture": "Any",
        "inputs": (
            _tensor("input_ids", "batch_size", "sequence_length"),
            _tensor("attention_mask", "batch_size", "sequence_length"),
            _tensor("pixel_values", "total_patches", 12, dtype="float32"), _tensor("image_grid_thw", "num_images", 3),
        ),
        "outputs": (_tensor("logits", "batch_size", "sequence_length", 9, dtype="float32"),),
        "axis_ranges": {"batch_size": (1, None), "sequence_length": (8, None), "total_patches": (4, None),
                        "num_images": (1, None)},
        "sizes": {"batch_size": 2, "sequence_length": 16, "total_patches": 24, "num_images": 2},
        "preprocessor": None, "parameters": None, "cache": cache, "step_axis": "sequence_length", "embedding_size": 6,
        "takes_positions": True, "decoder_call": DecoderCall(position_rows=3),
        "values": {
            "input_ids": ValueRule(places=PlacesRule(token=5, grid="image_grid_thw")),
            "image_grid_thw": ValueRule(grid=GridRule(patches="total_patches", step=2)),
        },
    }  # fmt: skip
    return ModelSpec(**{**values, **changes})


class _Progress:
    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.notes: list[str] = []
        self.spec: ModelSpec | None = None

    @contextmanager
    def during(self, step: Any) -> Iterator[None]:
        yield

    def saw(self, cost: Any) -> None: ...


REFUSED = ModelError("It could not be traced.", kind=ErrorKind.EXPORT_FAILED)


def _steps(failing: Role | None, error: FerryError, *, one_image: bool = False) -> Any:
    entry = SimpleNamespace(verdict=Verdict.VERIFIED, shapes=5, outputs=(), axes_proven=(), detail=None, device="cpu",
                            provider="CPU", cells=(), session=None, device_memory_bytes=None)  # fmt: skip

    def export(job: Any, spec: ModelSpec, **_: Any) -> Any:
        loops = one_image and any(axis == "num_images" for tensor in spec.inputs for axis in tensor.shape)
        if spec.part == failing and (loops or not one_image):
            raise error
        return SimpleNamespace(cost=None, notes=(), template=None, use="direct")

    graph = SimpleNamespace(inputs=())
    stored = SimpleNamespace(cost=None, reason=None, simplified=True, graph=graph)
    return SimpleNamespace(
        export=export,
        simplify=lambda *_, **__: stored,
        parity=lambda *_, **__: SimpleNamespace(cost=None, entry=entry, notes=()),
        join=lambda *_, **__: SimpleNamespace(cost=None, notes=(), merged=None, difference=None),
    )


def _graphs_of(
    spec: ModelSpec,
    folder: Path,
    failing: Role | None = None,
    *,
    error: FerryError = REFUSED,
    one_image: bool = False,
    attempts: int = 1,
) -> tuple[Any, list[str]]:
    options = SimpleNamespace(task=None, simplify=True)
    request = SimpleNamespace(options=options, model_id=str(folder))
    job: Any = SimpleNamespace(request=request, scratch=folder, revision="r", key="k")
    progress: Any = _Progress(attempts)
    return best_graphs(progress, job, spec, _steps(failing, error, one_image=one_image)), progress.notes


@pytest.mark.parametrize("failing", [Role.VISION_ENCODER, Role.DECODER_MERGED])
def test_where_a_part_cannot_be_had_the_text_alone_takes_its_place(tmp_path: Path, failing: Role) -> None:
    found, notes = _graphs_of(reader(), tmp_path, failing)
    assert [part.spec.part for part in found.parts] == ["model"]
    assert [tensor.name for tensor in found.parts[0].spec.inputs] == ["input_ids", "attention_mask"]
    assert notes == [
        "as one graph, since its parts do not hold: It could not be traced.",
        "the graph takes text only; pixel_values, image_grid_thw was left out",
    ]


def captioner() -> ModelSpec:
    """Return a reader of images of one size, each of which takes four places in a text."""
    image = _tensor("pixel_values", "batch_size", 3, 8, 8, dtype="float32")
    return reader(
        inputs=(*reader().inputs[:2], image), axis_ranges={"batch_size": (1, None), "sequence_length": (8, None)},
        sizes={"batch_size": 2, "sequence_length": 16}, decoder_call=DecoderCall(),
        values={"input_ids": ValueRule(tokens=((5, 4, None),))},
    )  # fmt: skip


RAN_OUT = [ErrorKind.TIMEOUT, ErrorKind.OUT_OF_MEMORY]


@pytest.mark.parametrize("kind", RAN_OUT)
@pytest.mark.parametrize("spec", [reader(), captioner()], ids=["grids", "one-size"])
def test_where_reading_images_runs_out_also_alone_the_text_alone_takes_its_place(
    tmp_path: Path, spec: ModelSpec, kind: ErrorKind
) -> None:
    error = ResourceError("It ran out.", kind=kind)
    found, notes = _graphs_of(spec, tmp_path, Role.VISION_ENCODER, error=error, attempts=2)
    (part,) = found.parts
    assert [tensor.name for tensor in part.spec.inputs] == ["input_ids", "attention_mask"]
    assert part.spec.axis_ranges == {"batch_size": (1, None), "sequence_length": (1, None)}
    assert part.spec.values["input_ids"].stand_ins == ()
    assert notes == [
        "as one graph, since its parts do not hold: the graph of the vision_encoder could not be had: It ran out.",
        f"the graph takes text only; {', '.join(t.name for t in spec.inputs[2:])} was left out",
    ]


@pytest.mark.parametrize(
    ("failing", "kind", "attempts"),
    [
        *(pytest.param(Role.VISION_ENCODER, kind, 1, id=f"{kind}-not-yet-alone") for kind in RAN_OUT),
        pytest.param(Role.VISION_ENCODER, ErrorKind.CRASHED, 2, id="a-crash"),
        pytest.param(Role.DECODER_MERGED, ErrorKind.TIMEOUT, 2, id="the-decoder"),
    ],
)
def test_what_else_runs_out_ends_it(tmp_path: Path, failing: Role, kind: ErrorKind, attempts: int) -> None:
    with pytest.raises(ResourceError) as raised:
        _graphs_of(captioner(), tmp_path, failing, error=ResourceError("It ran out.", kind=kind), attempts=attempts)
    assert raised.value.kind is kind


def test_a_segmenter_whose_boxes_do_not_hold_is_asked_about_points(tmp_path: Path) -> None:
    image = _tensor("pixel_values", "batch_size", 3, 8, 8, dtype="float32")
    points = _tensor("input_points", "batch_size", "point_batch_size", "num_points", 2, dtype="float32")
    spec = reader(
        inputs=(image, points), cache=(), values={}, decoder_call=DecoderCall(),
        axis_ranges=dict.fromkeys(("batch_size", "point_batch_size", "num_points"), (1, None)),
        embeddings=(_tensor("image_embeddings", "batch_size", 4, 2, 2, dtype="float32"),),
        boxes=(_tensor("input_boxes", "batch_size", "point_batch_size", 4, dtype="float32"),),
    )  # fmt: skip
    whole, _ = _graphs_of(spec, tmp_path)
    found, notes = _graphs_of(spec, tmp_path, Role.PROMPT_DECODER_WITH_BOXES)
    roles = ["vision_encoder", "prompt_decoder", "prompt_decoder_with_boxes"]
    assert [part.spec.part for part in whole.parts] == roles
    assert [part.spec.part for part in found.parts] == roles[:2]
    assert notes == [
        "the graphs are asked about points only, since with boxes they do not hold: It could not be traced."
    ]


def test_more_of_an_image_than_embeddings_leaves_the_text_alone(tmp_path: Path) -> None:
    found, notes = _graphs_of(reader(decoder_call=DecoderCall(handed=("routes",))), tmp_path)
    assert [part.spec.part for part in found.parts] == ["model"]
    assert notes[-1].endswith("was left out: its decoder is handed routes of the images beside embeddings")


def test_an_encoder_that_goes_from_image_to_image_is_one_of_one_image(tmp_path: Path) -> None:
    found, notes = _graphs_of(reader(), tmp_path, Role.VISION_ENCODER, one_image=True)
    assert [part.spec.part for part in found.parts] == ["vision_encoder", "embed_tokens", "decoder_merged"]
    assert [tensor.shape for tensor in found.parts[0].spec.inputs] == [("total_patches", 12), (1, 3)]
    assert notes == ["the graph of the vision_encoder takes one image at a time: It could not be traced."]
