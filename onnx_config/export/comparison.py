"""A stored graph beside the model that it is of: the step of a conversion that ends in a verdict.

It runs in a child process like the steps in `onnx_config.export.steps`: one dict of JSON values in, one out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.export.limits import AxisLimit, within
from onnx_config.export.loaded import loaded_model
from onnx_config.export.shapes import FEWEST_SHAPES, CheckShape, Float64, check_shapes
from onnx_config.export.turns import size_beyond
from onnx_config.input_generator import generate_inputs, picks_tokens, with_room
from onnx_config.parts import Role, role_of
from onnx_config.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from onnx_config.export.matrix import Way
    from onnx_config.export.parity import ParityResult
    from onnx_config.export.reference import Reference

__all__ = ["as_in_graph", "compare", "row_elements"]

Json = dict[str, Any]

_PADDED = 2


def compare(request: Json) -> Json:
    """Compare the stored ``graph`` with the PyTorch model in ``folder`` on ``device``.

    The spec's inputs are narrowed to ``inputs``, those of the graph, axes that the graph fixed stay at their size, and
    those that it limits (``limits``) are compared up to there and must be refused beyond.
    ``float64`` says when the model is run in float64 too, and ``mapped`` whether ONNX Runtime leaves the weights on the
    disk until they are read. Where ``levels`` names more than one of ONNX Runtime's optimisation levels, a graph that
    holds at the first is run at the others too, and on a GPU also by the CPU; ``count`` shapes are compared at least.
    A graph that was ``proven`` with other weights is not compared at a long text, unless there is too little else.
    What does not hold is written into the folder ``case``, and with ``bisect`` its first node that goes wrong is looked
    for. Returns the result as JSON.

    Raises:
        InputError: If the device is not there.
        ModelError: If ONNX Runtime refuses the graph.
    """
    from onnx_config.export.graph_choices import choices_of_graph
    from onnx_config.export.matrix import keep_failure, more_ways, where_they_part
    from onnx_config.export.parity import Outcome, check_parity
    from onnx_config.export.session import choose_device, free_device_bytes, open_session, session_facts

    device, threads = choose_device(request["device"]), request["threads"]
    pair, model = _Pair.of(request, device)
    answers = _answers(pair, model)
    # ONNX Runtime needs the memory that the model holds.
    del model
    usual, *levels = request.get("levels") or ["all"]
    before = free_device_bytes(device)
    session = open_session(pair.path, device=device, threads=threads, mapped=request["mapped"], level=usual)
    result = check_parity(
        session,
        answers.references,
        refused=answers.refused,
        expected=[t.name for t in pair.spec.outputs],
        choices=partial(choices_of_graph, pair.path, device=device, threads=threads),
        level=usual,
    )
    device_bytes = None if before is None else max(0, before - (free_device_bytes(device) or 0))
    if levels:
        ways = _ways(device, usual, levels)
        result = more_ways(result, pair.path, answers.references, ways, threads=threads)
    for wrong in (answers.wrong_weight, _allowed_beyond(pair, session)):
        if wrong is not None:
            result = replace(result, outcome=Outcome.MISMATCH, detail=result.detail or wrong)
    notes = list(result.notes)
    if pair.spec.continues and role_of(pair.spec) is Role.MODEL and result.outcome is Outcome.VERIFIED:
        result, more = _generated(pair, session, result)
        notes += more
    if request.get("case") and result.outcome is not Outcome.VERIFIED:
        keep_failure(result, pair.path, answers.references, Path(request["case"]))
    if request.get("bisect") and result.outcome is not Outcome.VERIFIED:
        parted = where_they_part(
            result,
            pair.path,
            answers.references,
            load=lambda: pair.load()[1],
            flags=pair.universal.forward_flags,
            threads=threads,
        )
        notes.append(f"first apart: {parted}" if parted else "the first node that goes wrong could not be found")
    return {
        **asdict(result),
        "outcome": result.outcome.value,
        "notes": notes,
        "session": session_facts(device, level=usual, threads=threads, mapped=request["mapped"]),
        "device_memory_bytes": device_bytes,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A graph and its model, with what is asked of the two."""

    request: Mapping[str, Any]
    device: str
    path: Path
    spec: ModelSpec
    """Its axes go as far as the graph's."""
    universal: Any
    limits: tuple[AxisLimit, ...]
    inputs: tuple[TensorSpec, ...]
    """Those of the graph."""
    sizes: Mapping[str, int]
    """Of their axes."""

    @classmethod
    def of(cls, request: Mapping[str, Any], device: str) -> tuple[_Pair, Any]:
        """Return what a request asks for, and the model."""
        limits = tuple(AxisLimit(**limit) for limit in request.get("limits", ()))
        spec = ModelSpec.from_json(request["spec"])
        spec = replace(spec, axis_ranges=within(spec.axis_ranges, limits))
        inputs = as_in_graph(spec, request["inputs"])
        axes = {axis for tensor in inputs for axis in tensor.axis_names}
        universal, model = loaded_model(request, spec)
        pair = cls(
            request=request,
            device=device,
            path=Path(request["graph"]),
            spec=spec,
            universal=universal,
            limits=limits,
            inputs=inputs,
            sizes={axis: size for axis, size in spec.sizes.items() if axis in axes},
        )
        return pair, model

    @property
    def masked(self) -> bool:
        return any(tensor.name.endswith("mask") for tensor in self.inputs)

    def load(self) -> tuple[Any, Any]:
        """Return (config object, model) anew."""
        return loaded_model(self.request, self.spec)

    def feed_of(self, shape: CheckShape) -> dict[str, Any]:
        return generate_inputs(
            self.inputs,
            self.universal.config,
            self.universal.declaration,
            {**self.spec.sizes, **shape.sizes},
            rules=self.spec.values,
            seed=shape.seed,
            padding=shape.padding,
            begins=shape.begins,
            chosen=shape.chosen,
        )

    def shapes(self, ranges: Mapping[str, tuple[int, int | None]]) -> tuple[CheckShape, ...]:
        return check_shapes(
            self.sizes,
            ranges,
            steps=self.spec.axis_steps,
            masked=self.masked,
            row_elements=row_elements(self.inputs, self.spec.sizes),
            states=bool(self.spec.states),
            chooses=picks_tokens(self.inputs),
            count=self.request.get("count", 0),
            proven=self.request.get("proven", False),
        )

    def answers_at(self, shapes: Iterable[CheckShape], model: Any) -> tuple[list[Reference], list[str]]:
        """Return what the model computes at shapes, with room for the values that inputs must have, and refusals."""
        from onnx_config.export.reference import compute_references

        return compute_references(
            model,
            [(shape, self.feed_of(shape)) for shape in map(self._roomy, shapes)],
            flags=self.universal.forward_flags,
            device=self.device,
            float64=Float64(self.request["float64"]),
            reload=lambda: self.load()[1],
        )

    def _roomy(self, shape: CheckShape) -> CheckShape:
        room = with_room(self.inputs, self.spec.values, {**self.spec.sizes, **shape.sizes})
        return replace(shape, sizes={axis: room[axis] for axis in shape.sizes})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """What the model says."""

    references: list[Reference]
    refused: list[str]
    """Shapes that it refuses."""
    wrong_weight: str | None
    """How a weight differs that no input reaches."""


def _answers(pair: _Pair, model: Any) -> _Answers:
    """Return what the model says at all shapes; it may end in float64."""
    from onnx_config.export.weights_check import weight_difference

    spec, sizes = pair.spec, pair.sizes
    wrong_weight = weight_difference(pair.path, model)
    shapes = pair.shapes(spec.axis_ranges)
    at_limits = [shape for limit in pair.limits for shape in _around(limit, sizes, spec, masked=pair.masked)]
    references, refused = pair.answers_at([*shapes, *at_limits], model)
    if len(references) < FEWEST_SHAPES and pair.request.get("proven"):
        pair = replace(pair, request={**pair.request, "proven": False})
        _, model = pair.load()  # the first one may have ended in float64
        shapes = pair.shapes(spec.axis_ranges)
        references, refused = pair.answers_at([*shapes, *at_limits], model)
    if len(references) < FEWEST_SHAPES and (sides := [axis for axis in sizes if axis.endswith(("height", "width"))]):
        # The model may take images of one size only; of that size there are others to compare, and whoever asks for
        # proven axes sees that these are not.
        ranges = {**spec.axis_ranges, **{axis: (sizes[axis], sizes[axis]) for axis in sides}}
        _, model = pair.load()  # the first one ended in float64
        more, _ = pair.answers_at(pair.shapes(ranges), model)
        references += more
    return _Answers(references=references, refused=refused, wrong_weight=wrong_weight)


def _ways(device: str, usual: str, levels: Sequence[str]) -> list[Way]:
    """Return the other ways to run the graph: at further levels, and by the CPU where a GPU was asked for."""
    from onnx_config.export.matrix import Way

    ways = [Way(device, level) for level in levels]
    return ways + ([Way("cpu", level) for level in (usual, *levels)] if device == "cuda" else [])


def _allowed_beyond(pair: _Pair, session: InferenceSession) -> str | None:
    """Return which limit the graph does not keep; ``None``: it refuses what is beyond each."""
    from onnx_config.export.session import refuses

    for limit in pair.limits:
        beyond = CheckShape(label="beyond the limit", sizes={**pair.sizes, limit.axis: limit.beyond})
        if limit.refuses and not refuses(session, pair.feed_of(beyond), by=limit.node):
            return f"the graph does not refuse {limit.axis}={limit.beyond}, where the model computes otherwise"
    return None


def _around(limit: AxisLimit, sizes: Mapping[str, int], spec: ModelSpec, *, masked: bool) -> Iterator[CheckShape]:
    """Yield the shapes at which a limit is compared: the last that it allows, and, where a graph turns, some beyond."""
    if not limit.refuses and spec.states:
        # That of a model with states, which is compared at one token and at more in any case.
        return
    yield CheckShape(label="at the limit", sizes={**sizes, limit.axis: limit.bound})
    if limit.refuses:
        return
    largest = spec.axis_ranges[limit.axis][1]
    for number, size in enumerate((limit.bound + 1, *(size_beyond(limit, largest, whole=w) for w in (True, False)))):
        yield CheckShape(
            label=("after the turn", "blocks after the turn", "padded rows after the turn")[number],
            sizes={**sizes, limit.axis: size},
            padding=masked and number == _PADDED,
            seed=20 + number,
        )


def _generated(pair: _Pair, session: InferenceSession, result: ParityResult) -> tuple[ParityResult, list[str]]:
    """Return the result with what generating says, and a note of how much was generated."""
    from onnx_config.export.generation import compare_generation
    from onnx_config.export.parity import Outcome

    if pair.request["mapped"]:
        return result, ["greedy generation was not compared, since every token would read all weights from the disk"]
    generated = compare_generation(session, pair.load()[1], pair.spec, pair.universal)
    if generated.refusal is not None:
        return result, [f"greedy generation was not compared: {generated.refusal}"]
    if generated.difference is not None:
        return replace(result, outcome=Outcome.MISMATCH, detail=generated.difference), []
    return result, [
        f"generates the {generated.tokens} tokens that PyTorch does, after {generated.rows} prompts padded on the left"
    ]


def row_elements(inputs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> int:
    """Return how many numbers one row of the largest input has."""
    return max((prod(tensor.resolve(sizes)[1:]) for tensor in inputs), default=0)


def as_in_graph(spec: ModelSpec, graph: Sequence[Json]) -> tuple[TensorSpec, ...]:
    """Return the spec's inputs with those axes fixed, or tied to one another, that are so in the graph."""
    shapes = {tensor["name"]: tensor["shape"] for tensor in graph}
    narrowed = []
    for tensor in spec.inputs:
        shape = shapes.get(tensor.name)
        if shape is None or len(shape) != len(tensor.shape):
            narrowed.append(tensor)
            continue
        sizes = tuple(
            there if isinstance(there, int) or (isinstance(here, str) and there in spec.sizes) else here
            for here, there in zip(tensor.shape, shape, strict=True)
        )
        narrowed.append(TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=sizes))
    return tuple(narrowed)
