"""The steps of a conversion as they run in a child process: one dict of JSON values in, one out.

Paths in requests are absolute. Nothing is written but the files that a request names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.cache_layout import PAST_AXIS
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.limits import AxisLimit, is_worth_having, limit_axis, within
from onnx_config.export.sample import SIDES, Sample, escapes_at, sample_of, ties_in_padding, trace_sample
from onnx_config.parts import Role, role_of
from onnx_config.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from onnx_config.export.parity import ParityResult
    from onnx_config.export.shapes import CheckShape
    from onnx_config.export.trace import Trace

__all__ = [
    "Branch",
    "as_in_graph",
    "branches_of",
    "check_options",
    "detect",
    "export",
    "loaded_model",
    "parity",
    "row_elements",
    "simplify",
    "stamp",
    "without_branches",
]

Json = dict[str, Any]

_LARGEST_TRIED = 4096
_NEXT_TRIED = 32
_MOST_TURNS = 2
_PADDED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Sizes of an axis at which a model computes otherwise than its graph."""

    axis: str

    size: int
    """The one next to those that the graph holds for."""

    why: str
    """What differs there."""

    stops: bool = False
    """Whether the graph gives nothing there, rather than other numbers: it refuses such sizes by itself."""


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
    from onnx_config.export.session import choose_device

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
    from onnx_config.export.checkpoint import load_model
    from onnx_config.hub import config_from_dict, read_config_dict
    from onnx_config.part_models import part_model
    from onnx_config.universal_config import UniversalOnnxConfig

    folder = Path(request["folder"])
    config = config_from_dict(read_config_dict(folder), origin=f"{folder}/config.json")
    universal = UniversalOnnxConfig.from_config_in(folder, config, task=spec.task, use_past=spec.continues)
    if universal.source is not None:
        return universal, universal.source.load(folder)
    model = load_model(universal.model_class, config, folder, check_values=check_values)
    return universal, part_model(model, spec)


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

    def trace_with(fixed: tuple[str, ...], turns: tuple[AxisLimit, ...]) -> tuple[Trace, tuple[Branch, ...]]:
        trace = trace_sample(
            spec,
            universal,
            model,
            sample,
            turns=turns,
            opset=request["opset"],
            fixed=fixed,
            tied=tied,
            escapes=lambda spec, sizes: escapes_at(spec, universal, model, sizes),
        )
        write_graph(trace.model, path)
        return trace, branches_of(trace.untried, path, spec, universal, model)

    trace, notes = without_branches(spec, sample, fixed, trace_with, write=lambda t: write_graph(t.model, path))
    return {"graph": _summary(summarize(trace.model)), "notes": [*sample.notes(spec), *notes, *trace.notes]}


def without_branches(
    spec: ModelSpec,
    sample: Sample,
    fixed: tuple[str, ...],
    trace_with: Callable[[tuple[str, ...], tuple[AxisLimit, ...]], tuple[Trace, tuple[Branch, ...]]],
    *,
    write: Callable[[Trace], object],
) -> tuple[Trace, list[str]]:
    """Return a trace that holds at all sizes of its axes or refuses those at which it does not, and notes of that.

    Args:
        spec: What the model takes and gives.
        sample: What it is traced with.
        fixed: Axes that are fixed from the start.
        trace_with: Traces with the given axes fixed, in another way beyond each of the given turns, and writes that;
            returns also where the model branches.
        write: Writes a trace whose graph was changed.

    Raises:
        ModelError: If it computes otherwise at other sizes of an axis that can neither be fixed, nor be traced in both
            ways, nor be limited to sizes that are of use (``export_failed``).
    """
    notes: list[str] = []
    sides = {axis for axis in spec.axis_ranges if axis.endswith(SIDES)}
    turns: tuple[AxisLimit, ...] = ()
    trace, found = trace_with(fixed, turns)
    while True:
        branches = tuple(branch for branch in found if not _refuses_by_itself(branch, spec, sample))
        free = sides - set(fixed)
        moving = sorted(branch.axis for branch in branches if branch.axis in free)
        if sample.image_size is not None and moving:
            # An image can be brought to the one size that preprocessors make.
            why = next(branch.why for branch in branches if branch.axis == moving[0])
            notes.append(
                f"{', '.join(sorted(free))} is fixed, since the model computes otherwise at other sizes: {why}"
            )
            fixed = (*fixed, *free)
        elif (turn := _turn_at(branches, spec, sample, turns)) is not None:
            turns = (*turns, turn)
        else:
            break
        try:
            trace, found = trace_with(fixed, turns)
        except ModelError:
            if not turns:
                raise
            # The other way cannot be traced.
            turns = turns[:-1]
            break
    for turn in turns:
        notes.append(
            f"up to {turn.axis} {turn.most} the graph computes in one way, and in another beyond, as the model does"
        )
    for branch in branches:
        limit = _limit_before(branch, spec, sample)
        limit_axis(trace.model, limit, spec.inputs)
        notes.append(
            f"{limit.axis} is at most {limit.most}, and the graph refuses more: the model computes otherwise then, and "
            f"one graph holds one way of computing only ({branch.why})"
        )
    for branch in found:
        if _refuses_by_itself(branch, spec, sample):
            notes.append(
                f"beside the traced sizes of the other axes, {branch.axis} is at most {branch.size - 1}: the model"
                " makes its tables longer then, and the graph stops"
            )
    if branches:
        write(trace)
    return trace, notes


def _refuses_by_itself(branch: Branch, spec: ModelSpec, sample: Sample) -> bool:
    """Return whether a graph ends where a model only makes a table of positions longer, and is of use up to there."""
    if not branch.stops or branch.size <= sample.sizes.get(branch.axis, branch.size):
        return False
    ranges = spec.axis_ranges
    largest = ranges.get(branch.axis, (1, None))[1]
    if largest is None and branch.axis == PAST_AXIS:
        # A past is as long as the texts that it is of.
        steps = [high for axis, (_, high) in ranges.items() if axis.endswith("sequence_length") and high is not None]
        largest = max(steps, default=None)
    return is_worth_having(AxisLimit(axis=branch.axis, most=branch.size - 1), largest)


def _turn_at(
    branches: tuple[Branch, ...], spec: ModelSpec, sample: Sample, turns: tuple[AxisLimit, ...]
) -> AxisLimit | None:
    """Return the size after which a model that branches could be traced once more; ``None``: there is none to try."""
    if len(turns) >= _MOST_TURNS or spec.states:
        return None
    for branch in branches:
        traced = sample.sizes.get(branch.axis)
        if traced is None or branch.axis.endswith((*SIDES, "batch_size")):
            continue
        most = branch.size - 1 if branch.size > traced else branch.size
        turn = AxisLimit(axis=branch.axis, most=most, refuses=False)
        if turn not in turns:
            return turn
    return None


def _limit_before(branch: Branch, spec: ModelSpec, sample: Sample) -> AxisLimit:
    """Return the limit up to which a graph holds.

    Raises:
        ModelError: If the model computes otherwise below some size, or already at sizes that are in daily use.
    """
    limit = AxisLimit(axis=branch.axis, most=branch.size - 1)
    largest = spec.axis_ranges.get(branch.axis, (1, None))[1]
    above = branch.size > sample.sizes.get(branch.axis, branch.size)
    if above and is_worth_having(limit, largest):
        return limit
    up_to = f" The graph would hold up to {limit.most} only, which is too little to be of use." if above else ""
    raise ModelError(
        f"{spec.architecture} computes otherwise at other sizes of {branch.axis}, and one graph holds one way of "
        f"computing only: {branch.why}.{up_to}",
        kind=ErrorKind.EXPORT_FAILED,
    )


def branches_of(
    untried: tuple[tuple[str, int], ...], path: Path, spec: ModelSpec, universal: Any, model: Any
) -> tuple[Branch, ...]:
    """Return at which of the ``untried`` sizes of axes the model takes another branch than its graph.

    Of a length that is too short for the graph's way, it is the longest such: what is next to one is looked at, too.
    """
    from onnx_config.export.parity import STOPS, difference_at
    from onnx_config.export.reference import compute_references
    from onnx_config.export.session import open_session
    from onnx_config.export.shapes import CheckShape, Float64
    from onnx_config.input_generator import generate_inputs

    session = None

    def apart(axis: str, sizes: Iterable[int]) -> Iterator[Branch]:
        """Yield those of the sizes of an axis at which the two differ."""
        nonlocal session
        shapes = [CheckShape(label="another branch", sizes={**spec.sizes, axis: size}) for size in sizes]
        feeds = [
            (
                shape,
                generate_inputs(spec.inputs, universal.config, universal.declaration, shape.sizes, rules=spec.values),
            )
            for shape in shapes
        ]
        # What the model itself refuses is no branch of it.
        references, _ = compute_references(
            model, feeds, flags=universal.forward_flags, device="cpu", float64=Float64.NEVER
        )
        if references and session is None:
            session = open_session(path, device="cpu", threads=1)
        for reference in references:
            if (why := difference_at(session, reference)) is not None:
                yield Branch(axis=axis, size=reference.shape.sizes[axis], why=why, stops=why.startswith(STOPS))

    found = []
    for axis, size in untried:
        if size > _LARGEST_TRIED:
            continue
        for branch in apart(axis, [size]):
            longer = range(size + 1, min(size + _NEXT_TRIED, spec.sizes[axis])) if axis not in SIDES else ()
            last = branch
            for other in apart(axis, longer):
                last = other if other.size == last.size + 1 else last
            found.append(last)
    return tuple(found)


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ModelError(
            f"The dtype {dtype!r} was asked for; there are float32, float16 and bfloat16.", kind=ErrorKind.UNSUPPORTED
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
        return {
            "graph": _summary(summary),
            "nodes_before": summary.nodes,
            "operators_before": summary.operators,
            "simplified": False,
            "reason": None,
        }
    result = simplify_file(path)
    model = result.model or read_graph(path)
    forget_shapes(model)
    write_graph(model, output, metadata=request["metadata"])
    return {
        "graph": _summary(result.after),
        "nodes_before": result.before.nodes,
        "operators_before": result.before.operators,
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

    The spec's inputs are narrowed to ``inputs``, those of the graph, axes that the graph fixed stay at their size, and
    those that it limits (``limits``) are compared up to there and must be refused beyond.
    ``float64`` says when the model is run in float64 too, and ``mapped`` whether ONNX Runtime leaves the weights on the
    disk until they are read. Where ``levels`` names more than one of ONNX Runtime's optimisation levels, a graph that
    holds at the first is run at the others too, and on a GPU also by the CPU; ``count`` shapes are compared at least.
    What does not hold is written into the folder ``case``, and with ``bisect`` its first node that goes wrong is looked
    for. Returns the result as JSON.

    Raises:
        InputError: If the device is not there.
        ModelError: If ONNX Runtime refuses the graph.
    """
    from onnx_config.export.graph_choices import choices_of_graph
    from onnx_config.export.matrix import Way, keep_failure, more_ways, where_they_part
    from onnx_config.export.parity import FEWEST_SHAPES, Outcome, check_parity
    from onnx_config.export.reference import Reference, compute_references
    from onnx_config.export.session import choose_device, free_device_bytes, open_session, refuses, session_facts
    from onnx_config.export.shapes import CheckShape, Float64, check_shapes
    from onnx_config.export.weights_check import weight_difference
    from onnx_config.input_generator import generate_inputs, picks_tokens, with_room

    device = choose_device(request["device"])
    limits = tuple(AxisLimit(**limit) for limit in request.get("limits", ()))
    spec = ModelSpec.from_json(request["spec"])
    spec = replace(spec, axis_ranges=within(spec.axis_ranges, limits))
    path = Path(request["graph"])
    inputs = as_in_graph(spec, request["inputs"])
    axes = {axis for tensor in inputs for axis in tensor.axis_names}
    sizes = {axis: size for axis, size in spec.sizes.items() if axis in axes}
    masked = any(tensor.name.endswith("mask") for tensor in inputs)
    universal, model = loaded_model(request, spec)

    def roomy(shape: CheckShape) -> CheckShape:
        room = with_room(inputs, spec.values, {**spec.sizes, **shape.sizes})
        return replace(shape, sizes={axis: room[axis] for axis in shape.sizes})

    def feed_of(shape: CheckShape) -> dict[str, Any]:
        return generate_inputs(
            inputs,
            universal.config,
            universal.declaration,
            {**spec.sizes, **shape.sizes},
            rules=spec.values,
            seed=shape.seed,
            padding=shape.padding,
            begins=shape.begins,
            chosen=shape.chosen,
        )

    def compute(shapes: Iterable[CheckShape], model: Any) -> tuple[list[Reference], list[str]]:
        return compute_references(
            model,
            [(shape, feed_of(shape)) for shape in map(roomy, shapes)],
            flags=universal.forward_flags,
            device=device,
            float64=Float64(request["float64"]),
            reload=lambda: loaded_model(request, spec)[1],
        )

    rows: dict[str, Any] = {
        "steps": spec.axis_steps,
        "masked": masked,
        "row_elements": row_elements(inputs, spec.sizes),
        "states": bool(spec.states),
        "chooses": picks_tokens(inputs),
        "count": request.get("count", 0),
    }
    shapes = check_shapes(sizes, spec.axis_ranges, **rows)
    at_limits = [shape for limit in limits for shape in _around(limit, sizes, spec, masked=masked)]
    references, refused = compute([*shapes, *at_limits], model)
    if len(references) < FEWEST_SHAPES and (sides := [axis for axis in sizes if axis.endswith(("height", "width"))]):
        # The model may take images of one size only; of that size there are others to compare, and whoever asks for
        # proven axes sees that these are not.
        ranges = {**spec.axis_ranges, **{axis: (sizes[axis], sizes[axis]) for axis in sides}}
        _, model = loaded_model(request, spec)  # the first one ended in float64
        more, _ = compute(check_shapes(sizes, ranges, **rows), model)
        references += more
    wrong_weight = weight_difference(path, model)
    # ONNX Runtime needs the memory that the model holds.
    del model
    threads = request["threads"]
    usual, *levels = request.get("levels") or ["all"]
    before = free_device_bytes(device)
    session = open_session(path, device=device, threads=threads, mapped=request["mapped"], level=usual)
    result = check_parity(
        session,
        references,
        refused=refused,
        expected=[t.name for t in spec.outputs],
        choices=partial(choices_of_graph, path, device=device, threads=threads),
        level=usual,
    )
    device_bytes = None if before is None else max(0, before - (free_device_bytes(device) or 0))
    if levels:
        ways = [Way(device, level) for level in levels]
        ways += [Way("cpu", level) for level in (usual, *levels)] if device == "cuda" else []
        result = more_ways(result, path, references, ways, threads=threads)
    if wrong_weight is not None:
        result = replace(result, outcome=Outcome.MISMATCH, detail=result.detail or wrong_weight)
    for limit in (limit for limit in limits if limit.refuses):
        beyond = CheckShape(label="beyond the limit", sizes={**sizes, limit.axis: limit.most + 1})
        if not refuses(session, feed_of(beyond), by=limit.node):
            detail = f"the graph does not refuse {limit.axis}={limit.most + 1}, where the model computes otherwise"
            result = replace(result, outcome=Outcome.MISMATCH, detail=result.detail or detail)
    notes = list(result.notes)
    if spec.continues and role_of(spec) is Role.MODEL and result.outcome is Outcome.VERIFIED:
        if request["mapped"]:
            notes += ["greedy generation was not compared, since every token would read all weights from the disk"]
        else:
            result, more_notes = _generated(result, session, spec, universal, loaded_model(request, spec)[1])
            notes += more_notes
    if request.get("case") and result.outcome is not Outcome.VERIFIED:
        keep_failure(result, path, references, Path(request["case"]))
    if request.get("bisect") and result.outcome is not Outcome.VERIFIED:
        parted = where_they_part(
            result,
            path,
            references,
            load=lambda: loaded_model(request, spec)[1],
            flags=universal.forward_flags,
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


def _around(limit: AxisLimit, sizes: Mapping[str, int], spec: ModelSpec, *, masked: bool) -> Iterator[CheckShape]:
    """Yield the shapes at which a limit is compared: the last that it allows, and, where a graph turns, some beyond."""
    from onnx_config.export.shapes import CheckShape
    from onnx_config.export.turns import size_beyond

    if not limit.refuses and spec.states:
        # That of a model with states, which is compared at one token and at more in any case.
        return
    yield CheckShape(label="at the limit", sizes={**sizes, limit.axis: limit.most})
    if limit.refuses:
        return
    largest = spec.axis_ranges[limit.axis][1]
    for number, size in enumerate((limit.most + 1, *(size_beyond(limit, largest, whole=w) for w in (True, False)))):
        yield CheckShape(
            label=("after the turn", "blocks after the turn", "padded rows after the turn")[number],
            sizes={**sizes, limit.axis: size},
            padding=masked and number == _PADDED,
            seed=20 + number,
        )


def row_elements(inputs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> int:
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


def _summary(summary: Any) -> Json:
    return asdict(summary)
