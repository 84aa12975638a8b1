"""The steps of a conversion as they run in a child process: one dict of JSON values in, one out.

Paths in requests are absolute. Nothing is written but the files that a request names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.sample import SIDES, Sample, escapes_at, sample_of, ties_in_padding, trace_sample
from onnx_config.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from onnx_config.export.parity import ParityResult
    from onnx_config.export.trace import Trace

__all__ = [
    "branching_axes",
    "check_options",
    "detect",
    "export",
    "loaded_model",
    "parity",
    "simplify",
    "stamp",
    "without_branches",
]

Json = dict[str, Any]

_LARGEST_TRIED = 4096


def detect(request: Json) -> Json:
    """Return the spec of the model in ``folder`` (or by ``config``, its dict), for ``task``.

    Raises:
        InputError: If the config cannot be read or the task is not possible.
        ModelError: If the model's class is unknown or cannot be built.
    """
    spec, _ = _configure(request)
    return spec.to_json()


def check_options(request: Json) -> Json:
    """Refuse a ``dtype``, an ``opset`` or a ``device`` with which no model can be converted here.

    Raises:
        InputError: If the opset is not one that is written, or the device is not there.
        ModelError: If the element type is not supported.
    """
    from onnx_config.export.parity import choose_device

    _check_dtype(request["dtype"])
    _check_opset(request["opset"])
    choose_device(request["device"])
    return {}


def _configure(request: Json) -> tuple[ModelSpec, Any]:
    from onnx_config.hub import config_from_dict, read_config_dict
    from onnx_config.task_detector import normalize_task
    from onnx_config.universal_config import UniversalOnnxConfig

    value = read_config_dict(Path(request["folder"]))
    if "auto_map" in value and request.get("trust_remote_code"):
        raise ModelError(
            "The model brings its own code (auto_map in config.json). This version of onnx-ferry runs no code of "
            "models, also where it is allowed; only classes of transformers are converted.",
            kind=ErrorKind.UNSUPPORTED,
        )
    config = config_from_dict(value, origin=f"{request['folder']}/config.json")
    task = request.get("task")
    # The cache is told beside the inputs; `onnx_config.cache_layout.with_past` makes it one of them.
    plain = None if task is None else normalize_task(task)[0]
    universal = UniversalOnnxConfig.from_config_in(Path(request["folder"]), config, task=plain)
    return universal.spec, universal


def loaded_model(request: Json, spec: ModelSpec, *, check_values: bool = True) -> tuple[Any, Any]:
    """Return (config object, model) for a spec that `detect` made.

    Raises:
        InputError: If the weights are not there, not whole, or not finite and ``check_values`` is true.
        ModelError: If the class cannot be loaded.
    """
    from onnx_config.cached_model import CachedModel
    from onnx_config.export.checkpoint import load_model
    from onnx_config.hub import config_from_dict, read_config_dict
    from onnx_config.universal_config import UniversalOnnxConfig

    folder = Path(request["folder"])
    config = config_from_dict(read_config_dict(folder), origin=f"{folder}/config.json")
    universal = UniversalOnnxConfig.from_config_in(folder, config, task=spec.task, use_past=spec.continues)
    if universal.source is not None:
        return universal, universal.source.load(folder)
    model = load_model(universal.model_class, config, folder, check_values=check_values)
    return universal, CachedModel(model) if spec.continues else model


def export(request: Json) -> Json:
    """Trace the model in ``folder`` as ``spec`` says and write it to ``output``.

    Returns the graph's summary, and notes.

    Raises:
        InputError: If the weights are not there, not whole or not finite.
        ModelError: If the model cannot be traced.
    """
    from onnx_config.export.graph_file import summarize, write_graph

    _check_dtype(request["dtype"])
    _check_opset(request["opset"])
    spec = ModelSpec.from_json(request["spec"])
    universal, model = loaded_model(request, spec)
    fixed = tuple(request.get("fixed", ()))
    sample = sample_of(spec, universal, model, Path(request["folder"]), fixed=fixed)
    tied = sample.watch.seen or (sample.watch.chose and ties_in_padding(spec, universal, model, sample.sizes))
    path = Path(request["output"])

    def trace_with(fixed: tuple[str, ...]) -> tuple[Trace, dict[str, str]]:
        trace = trace_sample(
            spec,
            universal,
            model,
            sample,
            opset=request["opset"],
            fixed=fixed,
            tied=tied,
            escapes=lambda: escapes_at(spec, universal, model, sample.sizes),
        )
        write_graph(trace.model, path)
        return trace, branching_axes(trace.untried, path, spec, universal, model)

    trace, notes = without_branches(spec, sample, fixed, trace_with)
    return {"graph": _summary(summarize(trace.model)), "notes": [*sample.notes(spec), *notes, *trace.notes]}


def without_branches(
    spec: ModelSpec,
    sample: Sample,
    fixed: tuple[str, ...],
    trace_with: Callable[[tuple[str, ...]], tuple[Trace, dict[str, str]]],
) -> tuple[Trace, list[str]]:
    """Return a trace that holds at all sizes of its axes, and notes of those that were fixed for it.

    Args:
        spec: What the model takes and gives.
        sample: What it is traced with.
        fixed: Axes that are fixed from the start.
        trace_with: Traces with the given axes fixed; returns also at the other sizes of which axes the model takes
            another branch, and what differs there.

    Raises:
        ModelError: If it computes otherwise at other sizes of an axis that cannot be fixed (``export_failed``).
    """
    notes: list[str] = []
    sides = {axis for axis in spec.axis_ranges if axis.endswith(SIDES)}
    while True:
        trace, branching = trace_with(fixed)
        free = sides - set(fixed)
        if sample.image_size is None or not branching.keys() & free:
            break
        # An image can be brought to the one size that preprocessors make.
        why = next(branching[axis] for axis in sorted(branching.keys() & free))
        notes.append(f"{', '.join(sorted(free))} is fixed, since the model computes otherwise at other sizes: {why}")
        fixed = (*fixed, *free)
    for axis, why in branching.items():
        raise ModelError(
            f"{spec.architecture} computes otherwise at other sizes of {axis}, and one graph holds one way of "
            f"computing only: {why}.",
            kind=ErrorKind.EXPORT_FAILED,
        )
    return trace, notes


def branching_axes(
    untried: tuple[tuple[str, int], ...], path: Path, spec: ModelSpec, universal: Any, model: Any
) -> dict[str, str]:
    """Return the axes at whose other sizes the model takes another branch than its graph, with what differs there."""
    from onnx_config.export.parity import compute_references, difference_at, open_session
    from onnx_config.export.shapes import CheckShape, Float64
    from onnx_config.input_generator import generate_inputs

    feeds = []
    for axis, size in untried:
        if size <= _LARGEST_TRIED:
            shape = CheckShape(label="another branch", sizes={**spec.sizes, axis: size})
            arrays = generate_inputs(
                spec.inputs, universal.config, universal.declaration, shape.sizes, rules=spec.values
            )
            feeds.append((shape, arrays))
    if not feeds:
        return {}
    # What the model itself refuses is no branch of it.
    references, _ = compute_references(model, feeds, flags=universal.forward_flags, device="cpu", float64=Float64.NEVER)
    session = open_session(path, device="cpu", threads=1) if references else None
    found = {}
    for reference in references:
        if (why := difference_at(session, reference)) is not None:
            found.update({axis: why for axis, size in untried if reference.shape.sizes[axis] == size})
    return found


def _check_dtype(dtype: str) -> None:
    if dtype != "float32":
        raise ModelError(
            f"The dtype {dtype!r} was asked for; this version converts float32 only. Leave dtype unset.",
            kind=ErrorKind.UNSUPPORTED,
        )


def _check_opset(opset: int | None) -> None:
    import onnx.defs

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 18 <= opset <= newest:
        raise InputError(f"The opset {opset} was asked for; the exporter writes opsets 18 to {newest}.")


def simplify(request: Json) -> Json:
    """Simplify ``graph`` into ``output`` with the birth certificate ``metadata``.

    With ``simplify`` false the plain graph is written. Returns the summary of what was written, the nodes
    before, whether it is the simplified graph, and why not.
    """
    from onnx_config.export.graph_file import forget_shapes, read_graph, summarize, write_graph
    from onnx_config.export.simplify import simplify_file

    path, output = Path(request["graph"]), Path(request["output"])
    if not request["simplify"]:
        model = read_graph(path)
        summary = summarize(model)
        forget_shapes(model)
        write_graph(model, output, metadata=request["metadata"])
        return {"graph": _summary(summary), "nodes_before": summary.nodes, "simplified": False, "reason": None}
    result = simplify_file(path)
    model = result.model or read_graph(path)
    forget_shapes(model)
    write_graph(model, output, metadata=request["metadata"])
    return {
        "graph": _summary(result.after),
        "nodes_before": result.before.nodes,
        "simplified": result.model is not None,
        "reason": result.reason,
    }


def stamp(request: Json) -> Json:
    """Change entries of the birth certificate of ``graph`` to those in ``metadata``."""
    from onnx_config.export.graph_file import read_graph, write_graph

    path = Path(request["graph"])
    model = read_graph(path)
    write_graph(model, path, metadata={**model.metadata_props, **request["metadata"]})
    return {}


def parity(request: Json) -> Json:
    """Compare the stored ``graph`` with the PyTorch model in ``folder`` on ``device``.

    The spec's inputs are narrowed to ``inputs``, those of the graph, and axes that the graph fixed stay at their size.
    ``float64`` says when the model is run in float64 too, and ``mapped`` whether ONNX Runtime leaves the weights on the
    disk until they are read. Returns the result as JSON.

    Raises:
        InputError: If the device is not there.
        ModelError: If ONNX Runtime refuses the graph.
    """
    from onnx_config.export.parity import (
        FEWEST_SHAPES,
        Outcome,
        Reference,
        check_parity,
        choose_device,
        compute_references,
        open_session,
    )
    from onnx_config.export.shapes import CheckShape, Float64, check_shapes
    from onnx_config.input_generator import generate_inputs, with_room

    device = choose_device(request["device"])
    spec = ModelSpec.from_json(request["spec"])
    path = Path(request["graph"])
    inputs = _as_in_graph(spec, request["inputs"])
    axes = {axis for tensor in inputs for axis in tensor.axis_names}
    sizes = {axis: size for axis, size in spec.sizes.items() if axis in axes}
    masked = any(tensor.name.endswith("mask") for tensor in inputs)
    universal, model = loaded_model(request, spec)

    def roomy(shape: CheckShape) -> CheckShape:
        room = with_room(inputs, spec.values, {**spec.sizes, **shape.sizes})
        return replace(shape, sizes={axis: room[axis] for axis in shape.sizes})

    def compute(shapes: Iterable[CheckShape], model: Any) -> tuple[list[Reference], list[str]]:
        feeds = [
            (
                shape,
                generate_inputs(
                    inputs,
                    universal.config,
                    universal.declaration,
                    {**spec.sizes, **shape.sizes},
                    rules=spec.values,
                    seed=shape.seed,
                    padding=shape.padding,
                ),
            )
            for shape in (roomy(shape) for shape in shapes)
        ]
        return compute_references(
            model,
            feeds,
            flags=universal.forward_flags,
            device=device,
            float64=Float64(request["float64"]),
            reload=lambda: loaded_model(request, spec)[1],
        )

    rows: dict[str, Any] = {
        "steps": spec.axis_steps,
        "masked": masked,
        "row_elements": _row_elements(inputs, spec.sizes),
    }
    references, refused = compute(check_shapes(sizes, spec.axis_ranges, **rows), model)
    if len(references) < FEWEST_SHAPES and (sides := [axis for axis in sizes if axis.endswith(("height", "width"))]):
        # The model may take images of one size only; of that size there are others to compare, and whoever asks for
        # proven axes sees that these are not.
        ranges = {**spec.axis_ranges, **{axis: (sizes[axis], sizes[axis]) for axis in sides}}
        _, model = loaded_model(request, spec)  # the first one ended in float64
        more, _ = compute(check_shapes(sizes, ranges, **rows), model)
        references += more
    # ONNX Runtime needs the memory that the model holds.
    del model
    session = open_session(path, device=device, threads=request["threads"], mapped=request["mapped"])
    result = check_parity(session, references, refused=refused, expected=[t.name for t in spec.outputs])
    notes: list[str] = []
    if spec.continues and result.outcome is Outcome.VERIFIED:
        if request["mapped"]:
            notes = ["greedy generation was not compared, since every token would read all weights from the disk"]
        else:
            result, notes = _generated(result, session, spec, universal, loaded_model(request, spec)[1])
    return {**asdict(result), "outcome": result.outcome.value, "notes": notes}


def _row_elements(inputs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> int:
    """Return how many numbers one row of the largest input has."""
    return max((prod(tensor.resolve(sizes)[1:]) for tensor in inputs), default=0)


def _generated(
    result: ParityResult, session: Any, spec: ModelSpec, universal: Any, model: Any
) -> tuple[ParityResult, list[str]]:
    """Return the result with what generating says, and a note of how much was generated."""
    from onnx_config.export.generation import compare_generation
    from onnx_config.export.parity import Outcome

    generated = compare_generation(session, model, spec, universal)
    if generated.refusal is not None:
        return result, [f"greedy generation was not compared: {generated.refusal}"]
    if generated.difference is not None:
        return replace(result, outcome=Outcome.MISMATCH, detail=generated.difference), []
    return result, [
        f"generates the {generated.tokens} tokens that PyTorch does, after {generated.rows} prompts padded on the left"
    ]


def _as_in_graph(spec: ModelSpec, graph: Sequence[Json]) -> tuple[TensorSpec, ...]:
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


def _summary(summary: Any) -> Json:
    return asdict(summary)
