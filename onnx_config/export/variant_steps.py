"""The steps that make a verified graph's variants and judge each, as they run in a child process.

One dict of JSON values in, one out, as in `onnx_config.export.steps`. The model is loaded and run once for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_config.config_sizes import config_for
from onnx_config.errors import ErrorKind, FerryError, ModelError
from onnx_config.export.comparison import as_in_graph, row_elements
from onnx_config.export.limits import AxisLimit, within
from onnx_config.export.loaded import loaded_model
from onnx_config.export.parity import Outcome
from onnx_config.export.reference import Reference, compute_references
from onnx_config.export.session import choose_device, open_session
from onnx_config.export.shapes import CheckShape, Float64, check_shapes
from onnx_config.export.steps import Json
from onnx_config.export.texts import tokenized
from onnx_config.export.variant_parity import TEXTS, VariantResult, compare_variant, run_in_half
from onnx_config.input_generator import Array, generate_inputs, with_room
from onnx_config.spec import ModelSpec, TensorSpec, is_past
from onnx_config.variants import Variant

__all__ = ["compare_merged", "judge", "merge", "variants"]

_MERGED_SHARE = 0.02
_MEASURED = 4
"""Shapes at which magnitudes are measured, and at which PyTorch runs in half precision."""


def variants(request: Json) -> Json:
    """Write the verified float32 ``graph`` in each of ``outputs`` (variant -> file), and compare each with PyTorch.

    ``metadata`` are further entries of the birth certificates; with ``optional`` true, a graph without weights to
    quantize stays as it is under the variant's name, since others of the same model have some.

    Returns per variant its ``graph`` (the summary), ``notes``, ``seconds`` and ``result``; or why there is none
    (``refusal``).
    """
    wanted = {Variant(name): Path(path) for name, path in request["outputs"].items()}
    said = _Said.of(request, wanted)
    made = _Maker(request, said.references, said.halves.get(Variant.FP16, ()))

    def make(variant: Variant, output: Path) -> tuple[list[str], Json]:
        notes = made.make(variant, output)
        return notes, _finish(output, variant, request["metadata"])

    return {"variants": {v.value: _answer(said, made, v, output, make) for v, output in wanted.items()}}


def judge(request: Json) -> Json:
    """Compare each of ``files`` (variant -> graph), variants of ``graph``, with PyTorch once more; nothing is written.

    Where a variant stands in for the float32 graph, ``graph`` is that one itself.

    Returns per variant its ``result``, or why ONNX Runtime refuses it (``refusal``); ``notes``, ``graph`` and
    ``seconds`` as `variants` does.
    """
    wanted = {Variant(name): Path(path) for name, path in request["files"].items()}
    said = _Said.of(request, wanted)
    made = _Maker(request, said.references, said.halves.get(Variant.FP16, ()))

    def look(variant: Variant, path: Path) -> tuple[list[str], Json]:
        made.round(variant, path)
        return [], _summary_of(path)

    return {"variants": {v.value: _answer(said, made, v, path, look) for v, path in wanted.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What PyTorch says, which all variants are compared with."""

    device: str
    threads: int
    references: list[Reference]
    halves: Mapping[Variant, Sequence[Mapping[str, Array] | None]]
    """What it says in the types of those variants that are halves, at the smaller shapes."""

    @classmethod
    def of(cls, request: Json, wanted: Iterable[Variant]) -> _Said:
        spec = ModelSpec.from_json(request["spec"])
        universal, model = loaded_model(request, spec)
        device = choose_device(request["device"])
        shapes, feeds = _feeds(request, spec, universal)
        references, _ = compute_references(
            model, list(zip(shapes, feeds, strict=True)), flags=universal.forward_flags, device=device,
            float64=Float64.NEVER,
        )  # fmt: skip
        # ONNX Runtime needs the memory that the model holds, which ends with this call.
        halves = _halves(request, universal, model, references, wanted)
        return cls(device=device, threads=request["threads"], references=references, halves=halves)


def _answer(
    said: _Said,
    made: _Maker,
    variant: Variant,
    path: Path,
    had: Callable[[Variant, Path], tuple[list[str], Json]],
) -> Json:
    """Return what is to be said of one variant, which ``had`` makes or finds."""
    start = time.monotonic()
    try:
        notes, summary = had(variant, path)
        session = open_session(path, device=said.device, threads=said.threads)
        result = compare_variant(session, said.references, variant=variant, own=said.halves.get(variant, ()))
        result = made.judged(variant, path, result)
        found = {**asdict(result), "outcome": result.outcome.value, "device": said.device}
        answer: Json = {"refusal": None, "graph": summary, "notes": notes, "result": found}
    except FerryError as error:
        if error.kind not in (ErrorKind.UNSUPPORTED, ErrorKind.RUNTIME_FAILED):
            raise
        answer = {"refusal": error.message, "notes": [], "graph": None, "result": None}
    return {**answer, "seconds": round(time.monotonic() - start, 3)}


class _Maker:
    """Writes variants of one graph; what several of them need is computed once."""

    def __init__(
        self, request: Json, references: Sequence[Reference], own: Sequence[Mapping[str, Array] | None]
    ) -> None:
        self._graph, self._optional = Path(request["graph"]), request.get("optional", True)
        self._threads = request["threads"]
        self._references, self._own = references, own
        self._largest: dict[str, float] | None = None
        self._rounded: dict[Variant, VariantResult] = {}

    def make(self, variant: Variant, output: Path) -> list[str]:
        """Write one; return notes."""
        from onnx_config.export.half import write_bfloat16

        match variant:
            case Variant.FP16:
                return [self._float16(output, variant)]
            case Variant.BF16:
                write_bfloat16(self._graph, output)
                return ["weights are bfloat16; every operator computes in float32"]
            case Variant.INT8 | Variant.QUANTIZED | Variant.Q4:
                return [self._quantize(self._graph, output, variant)]
            case Variant.Q4F16:
                half = output.with_name(f"half_{output.name}")
                note = self._float16(half, variant)
                try:
                    return [note, self._quantize(half, output, variant)]
                finally:
                    for left in (half, half.with_name(f"{half.name}_data")):
                        left.unlink(missing_ok=True)

    def judged(self, variant: Variant, output: Path, result: VariantResult) -> VariantResult:
        """Return the verdict on a variant: what came out of it, and what its weights and its roundings say."""
        from onnx_config.export.quantized import weight_faults

        if result.outcome is not Outcome.VERIFIED:
            return result
        if (exact := self._rounded.get(variant)) is not None:
            if exact.outcome is not Outcome.VERIFIED:
                detail = f"with every number rounded to float16, as on a GPU, {exact.detail}"
                return replace(result, outcome=exact.outcome, detail=detail)
            if variant is Variant.FP16:
                # What a GPU gives is further off than what the CPU does.
                result = exact
        if variant not in (Variant.FP16, Variant.BF16) and (faults := weight_faults(self._graph, output)):
            return replace(result, outcome=Outcome.MISMATCH, detail=str(faults[0]))
        return result

    def _quantize(self, graph: Path, output: Path, variant: Variant) -> str:
        from onnx_config.export.quantized import quantize

        count = quantize(graph, output, variant)
        if not count and not self._optional:
            raise ModelError("The graph has no weight of a matrix product to quantize.", kind=ErrorKind.UNSUPPORTED)
        return f"{count} weights are quantized"

    def _float16(self, output: Path, variant: Variant) -> str:
        """Write the graph in float16, and see what it computes with every number rounded to that."""
        from onnx_config.export import half

        if self._largest is None:
            measured = [r.inputs for r in self._references[:_MEASURED]] + _texts_of(self._references)
            self._largest = half.magnitudes(self._graph, measured)
        made = half.write_float16(self._graph, output, largest=self._largest)
        self._round(variant, output)
        return made.note()

    def round(self, variant: Variant, path: Path) -> None:
        """See what a graph in float16 computes with every number rounded to that; of other variants, nothing."""
        if variant is Variant.FP16:
            self._round(variant, path)

    def _round(self, variant: Variant, path: Path) -> None:
        from onnx_config.export import half

        session = open_session(path, device="cpu", threads=self._threads, graph=half.rounded(path))
        self._rounded[variant] = compare_variant(session, self._references, variant=Variant.FP16, own=self._own)


def _texts_of(references: Iterable[Reference]) -> list[Mapping[str, Array]]:
    return [reference.inputs for reference in references if reference.shape.label == TEXTS]


def _feeds(request: Json, spec: ModelSpec, universal: Any) -> tuple[list[CheckShape], list[dict[str, Array]]]:
    """Return at which shapes the variants are compared, and the inputs there; the last may be sentences."""
    limits = tuple(AxisLimit(**limit) for limit in request.get("limits", ()))
    spec = replace(spec, axis_ranges=within(spec.axis_ranges, limits))
    inputs = as_in_graph(spec, request["inputs"])
    axes = {axis for tensor in inputs for axis in tensor.axis_names}
    sizes = {axis: size for axis, size in spec.sizes.items() if axis in axes}
    shapes = list(
        check_shapes(
            sizes,
            spec.axis_ranges,
            steps=spec.axis_steps,
            masked=any(tensor.name.endswith("mask") for tensor in inputs),
            row_elements=row_elements(inputs, spec.sizes),
            states=bool(spec.states),
        )
    )
    feeds = []
    for number, shape in enumerate(shapes):
        room = with_room(inputs, spec.values, {**spec.sizes, **shape.sizes})
        shapes[number] = replace(shape, sizes={axis: room[axis] for axis in shape.sizes})
        feeds.append(
            generate_inputs(
                inputs,
                universal.config,
                universal.declaration,
                {**spec.sizes, **shapes[number].sizes},
                rules=spec.values,
                seed=shape.seed,
                padding=shape.padding,
                begins=shape.begins,
            )
        )
    if (spoken := _sentences(request, spec, inputs, sizes, universal)) is not None:
        shapes.append(spoken[0])
        feeds.append(spoken[1])
    return shapes, feeds


def _sentences(
    request: Json, spec: ModelSpec, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], universal: Any
) -> tuple[CheckShape, dict[str, Array]] | None:
    """Return sentences as the graph takes them, with nothing before; ``None`` where it reads no texts."""
    if spec.states or "sequence_length" not in sizes or "batch_size" not in sizes:
        return None
    config = config_for(universal.config, "text")
    longest = spec.axis_ranges.get("sequence_length", (1, None))[1]
    found = tokenized(Path(request["folder"]), inputs, vocabulary=getattr(config, "vocab_size", None), longest=longest)
    if found is None:
        return None
    rows, length = found["input_ids"].shape
    past = {axis: 0 for axis in sizes if axis.startswith("past_")}
    shape = CheckShape(label=TEXTS, sizes={**sizes, "batch_size": rows, "sequence_length": length, **past})
    feed = generate_inputs(
        inputs, universal.config, universal.declaration, {**spec.sizes, **shape.sizes}, rules=spec.values, begins=True
    )
    if any(feed[name].shape != value.shape for name, value in found.items()):
        return None
    return shape, {**feed, **found}


def _halves(
    request: Json, universal: Any, model: Any, references: Sequence[Reference], wanted: Iterable[Variant]
) -> dict[Variant, list[dict[str, Array] | None]]:
    """Return what PyTorch computes in the types of those variants that are halves, at the smaller shapes."""
    found: dict[Variant, list[dict[str, Array] | None]] = {}
    texts = {number for number, reference in enumerate(references) if reference.shape.label == TEXTS}
    inputs = [reference.inputs for reference in references]
    for variant in (Variant.FP16, Variant.BF16):
        if variant in wanted:
            if found:
                _, model = loaded_model(request, ModelSpec.from_json(request["spec"]))
            found[variant] = run_in_half(
                model.to("cpu"),
                inputs,
                variant=variant,
                flags=universal.forward_flags,
                keep=lambda number: number not in texts,
            )
    return found


def _finish(output: Path, variant: Variant, metadata: Mapping[str, str]) -> Json:
    """Write the birth certificate into a graph; return its summary."""
    from onnx_config.export.streamed import stamp

    stamp(output, {**metadata, "onnx_ferry.variant": variant.value})
    return _summary_of(output)


def _summary_of(path: Path) -> Json:
    from onnx_config.export.graph_file import read_graph, summarize

    return asdict(summarize(read_graph(path)))


def merge(request: Json) -> Json:
    """Write one decoder of the two ``decoder`` and ``decoder_with_past`` of a variant to ``output``.

    Returns its summary, and how it differs from the two (``difference``; ``None``: it does not).

    Raises:
        ModelError: If ONNX Runtime refuses it.
    """
    from onnx_config.export import part_steps

    summary = part_steps.merge(request)
    return {**summary, **compare_merged(request)}


def compare_merged(request: Json) -> Json:
    """Compare the decoder in ``output`` with the two of a variant that it is of; returns the ``difference``.

    Raises:
        ModelError: If ONNX Runtime refuses one of them.
    """
    from onnx_config.export.merge import SWITCH

    device = choose_device(request["device"])
    merged = open_session(Path(request["output"]), device=device, threads=request["threads"])
    feeds = {
        role: {tensor["name"]: _some(tensor, request["sizes"]) for tensor in request["inputs"][role]}
        for role in ("decoder", "decoder_with_past")
    }
    names = [value.name for value in merged.get_outputs()]
    takes = [value.name for value in merged.get_inputs()]
    for role, feed in feeds.items():
        session = open_session(Path(request[role]), device=device, threads=request["threads"])
        given = [value.name for value in session.get_outputs()]
        wanted = dict(zip(given, session.run(given, feed), strict=True))
        other = {**feeds["decoder_with_past"], **feeds["decoder"], **feed}
        other[SWITCH] = np.array([role == "decoder_with_past"])
        got = dict(zip(names, merged.run(names, {name: other[name] for name in takes}), strict=True))
        for name, want in wanted.items():
            if got[name].shape != want.shape or not _is_close(got[name], want):
                return {"difference": f"{name} of the merged decoder is another than that of the {role}"}
    return {"difference": None}


def _is_close(got: Array, want: Array) -> bool:
    """Return whether two are alike but for what another order of additions does to numbers that are rounded."""
    difference, length = (np.linalg.norm(values.astype(np.float64)) for values in (got - want, want))
    return bool(difference <= _MERGED_SHARE * length)


def _some(tensor: Json, sizes: Mapping[str, int]) -> Array:
    """Return an input of small numbers: a token that every vocabulary has, a mask that hides nothing."""
    spec = TensorSpec(name=tensor["name"], dtype=tensor["dtype"], shape=tuple(tensor["shape"]))
    shape = spec.resolve(sizes)
    if np.dtype(spec.dtype).kind in "iub":
        return np.ones(shape, spec.dtype)
    generator = np.random.default_rng(len(spec.name))
    return (generator.standard_normal(shape) * (0.1 if is_past(spec.name) else 0.5)).astype(spec.dtype)
