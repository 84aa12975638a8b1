"""A module that is loaded already to a verified artifact, in one call.

The comparison is the same as for any model, with one difference: all happens in the caller's process, since a module of
any class cannot be sent to another one. PyTorch's answers are therefore computed first, before the exporter has patched
anything; only onnxsim, which may crash, runs in a child.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, FerryError, InputError, InternalError, ModelError
from onnx_config.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from onnx_config.export.graph_file import GraphSummary
    from onnx_config.export.parity import ParityResult
    from onnx_config.export.reference import Reference
    from onnx_config.universal_config import UniversalOnnxConfig

__all__ = ["ConvertedModule", "convert_module"]

_GRAPH = "model.onnx"
_SIMPLIFY_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedModule:
    """A module's verified artifact."""

    folder: Path
    """Where it is: ``model.onnx``, ``ferry.json``, and ``config.json`` of a transformers model."""

    spec: ModelSpec
    """What was found out about inputs, outputs and axes."""

    parity: ParityResult
    """What was compared; its outcome is ``verified``."""

    simplified: bool
    """Whether the graph is the simplified one."""

    notes: tuple[str, ...]
    """What a reader should know."""


def convert_module(
    module: torch.nn.Module,
    folder: str | Path,
    *,
    task: str | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    opset: int | None = None,
    device: str = "cpu",
    simplify: bool = True,
    threads: int = 1,
) -> ConvertedModule:
    """Convert a loaded module, compare the graph with it, and write the artifact to ``folder``.

    ::

        converted = convert_module(MyNetwork().eval(), "onnx/my-network")
        AutoModelForONNX.from_pretrained(converted.folder)(x=x).output

    The module is the same after the call; it is copied once, in float64, for the comparison. ``folder`` is written only
    if the graph is verified, and must not exist or be empty.

    Args:
        module: A module on the CPU with float32 weights; compared in evaluation mode, whatever its own is.
        folder: Where to write.
        task: As for `UniversalOnnxConfig.from_model`.
        example_inputs: The same.
        opset: ONNX opset; ``None``: the exporter's default.
        device: Where the graph is compared: ``cpu``, ``cuda`` or ``auto``.
        simplify: Whether onnxsim runs over the graph; its result is taken only where it holds.
        threads: Threads of ONNX Runtime in the comparison.

    Raises:
        InputError: If the inputs cannot be told, the device is not there, or ``folder`` is not empty.
        ModelError: If the module accepts no inputs, cannot be traced, or its graph does not hold (``mismatch``).
    """
    from onnx_config.export.graph_choices import choices_of_graph
    from onnx_config.export.parity import Outcome, check_parity
    from onnx_config.export.reference import compute_references
    from onnx_config.export.session import choose_device, open_session
    from onnx_config.universal_config import UniversalOnnxConfig

    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} is not empty. Give a folder that does not exist yet.")
    device = choose_device(device)
    _check_dtype(module)
    universal = UniversalOnnxConfig.from_model(module, task, example_inputs=example_inputs)
    spec = universal.spec
    named = _named(_copy(module).eval())
    flags = universal.forward_flags
    feeds = _feeds(universal, spec)
    references, refused = compute_references(
        _copy(named),  # type: ignore[arg-type]  # any module will do
        feeds,
        flags=flags,
        device=device,
    )
    with tempfile.TemporaryDirectory(prefix="ferry-module-") as scratch:
        plain = Path(scratch) / "traced.onnx"
        notes = [*spec.notes, *_trace(named, universal, spec, plain, opset=opset)]
        narrowed = _as_in_graph(spec, plain)
        if narrowed != spec:
            # Axes that could not be traced are the same in every comparison; PyTorch has to be asked again.
            spec = narrowed
            known = [(reference.shape, reference.inputs) for reference in references[:1]]
            again, refused = compute_references(
                _copy(named),  # type: ignore[arg-type]  # any module will do
                [*known, *_feeds(universal, spec)],
                flags=flags,
                device=device,
            )
            if references and not _is_equal(references[0], again[0]):
                raise InternalError(
                    "The exporter left something behind: PyTorch answers otherwise after it than before."
                )
            references = again[len(known) :]

        def compared(graph: Path) -> ParityResult:
            session = open_session(graph, device=device, threads=threads)
            return check_parity(
                session,
                references,
                refused=refused,
                expected=[t.name for t in spec.outputs],
                choices=partial(choices_of_graph, graph, device=device, threads=threads),
            )

        graph, why = (_simplified(plain, Path(scratch), threads=threads), None) if simplify else (None, None)
        result: ParityResult | None = None
        if graph is not None:
            try:
                result = compared(graph)
                why = result.detail
            except FerryError as error:
                why = error.message
        if graph is None or result is None or result.outcome is not Outcome.VERIFIED:
            if simplify:
                notes.append(f"the plain graph is kept: {why or 'onnxsim made nothing better of it'}")
            graph, result = plain, compared(plain)
        if result.outcome is not Outcome.VERIFIED:
            raise ModelError(
                f"The graph of {spec.architecture} does not compute what PyTorch computes ({result.outcome.value}): "
                f"{result.detail}. Nothing was written.",
                kind=ErrorKind.MISMATCH,
            )
        notes += result.notes
        made = ConvertedModule(
            folder=target, spec=spec, parity=result, simplified=graph is not plain, notes=tuple(dict.fromkeys(notes))
        )
        _write(made, module, graph, plain)
    return made


def _check_dtype(module: torch.nn.Module) -> None:
    import torch

    other = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32})
    if other:
        raise ModelError(
            f"The module has weights of {', '.join(other)}; this version converts float32 only. Call module.float().",
            kind=ErrorKind.UNSUPPORTED,
        )


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(module)
    # A module may hold anything; what cannot be copied raises what it likes.
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} cannot be copied, which comparing it takes: {type(error).__name__}: {error}.",
            kind=ErrorKind.UNSUPPORTED,
        ) from error


def _named(module: torch.nn.Module) -> torch.nn.Module:
    from transformers import PreTrainedModel

    from onnx_config.module.outputs import NamedOutputs

    return module if isinstance(module, PreTrainedModel) else NamedOutputs(module).eval()


def _feeds(universal: UniversalOnnxConfig, spec: ModelSpec) -> list[tuple[Any, dict[str, Any]]]:
    from onnx_config.export.shapes import check_shapes
    from onnx_config.input_generator import generate_inputs

    masked = any(tensor.name.endswith("mask") for tensor in spec.inputs)
    return [
        (
            shape,
            generate_inputs(
                spec.inputs,
                universal.config,
                universal.declaration,
                shape.sizes,
                rules=spec.values,
                seed=shape.seed,
                padding=shape.padding,
            ),
        )
        for shape in check_shapes(spec.sizes, spec.axis_ranges, masked=masked)
    ]


def _as_in_graph(spec: ModelSpec, graph: Path) -> ModelSpec:
    """Return the spec with those axes fixed that are so in the graph."""
    from onnx_config.export.graph_file import read_graph, summarize

    shapes = {tensor.name: tensor.shape for tensor in summarize(read_graph(graph)).inputs}
    inputs = []
    for tensor in spec.inputs:
        there = shapes.get(tensor.name, tensor.shape)
        sizes = (t if isinstance(t, int) else s for s, t in zip(tensor.shape, there, strict=True))
        inputs.append(replace(tensor, shape=tuple(sizes)))
    axes = {axis for tensor in inputs for axis in tensor.axis_names}
    return replace(
        spec,
        inputs=tuple(inputs),
        sizes={axis: size for axis, size in spec.sizes.items() if axis in axes},
        axis_ranges={axis: limits for axis, limits in spec.axis_ranges.items() if axis in axes},
    )


def _is_equal(first: Reference, second: Reference) -> bool:
    import numpy as np

    pairs = [(value, second.outputs.get(name)) for name, value in first.outputs.items()]
    return all(b is not None and np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def _trace(
    module: torch.nn.Module, universal: UniversalOnnxConfig, spec: ModelSpec, path: Path, *, opset: int | None
) -> Sequence[str]:
    from onnx_config.export.graph_file import write_graph
    from onnx_config.export.trace import trace_model

    trace = trace_model(
        module,  # type: ignore[arg-type]  # the exporter takes any module
        universal.generate_dummy_inputs(),
        spec.inputs,
        [t.name for t in spec.outputs],
        axis_ranges=spec.axis_ranges,
        opset=opset,
        flags=universal.forward_flags,
    )
    write_graph(trace.model, path)
    return trace.notes


def _simplified(plain: Path, scratch: Path, *, threads: int) -> Path | None:
    """Return the simplified graph; ``None`` where it is no better, or onnxsim crashed."""
    from onnx_config.export import isolate

    output = scratch / "simplified.onnx"
    work = scratch / "onnxsim"
    work.mkdir()
    try:
        answer = isolate.run(
            "onnx_config.export.steps:simplify",
            {"graph": str(plain), "output": str(output), "metadata": {}, "simplify": True},
            folder=work,
            timeout_seconds=_SIMPLIFY_SECONDS,
            memory_limit_bytes=8 * plain.stat().st_size + 4 * 1024**3,
            threads=threads,
            name="simplify",
        )
    except (FerryError, isolate.ChildError):
        return None
    return output if answer.value["simplified"] else None


def _write(made: ConvertedModule, module: torch.nn.Module, graph: Path, plain: Path) -> None:
    """Write the artifact aside and move it to its place."""
    from onnx_config.export.artifact import list_files, write_ferry_file
    from onnx_config.export.graph_file import forget_shapes, read_graph, summarize, write_graph

    made.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ferry-", dir=made.folder.parent) as aside:
        folder = Path(aside) / "artifact"
        folder.mkdir()
        before, model = summarize(read_graph(plain)), read_graph(graph)
        certificate = {
            "onnx_ferry.source": "module",
            "onnx_ferry.task": made.spec.task,
            "onnx_ferry.architecture": made.spec.architecture,
            "onnx_ferry.verdict": made.parity.outcome.value,
        }
        summary = summarize(model)
        forget_shapes(model)
        write_graph(model, folder / _GRAPH, metadata=certificate)
        if made.spec.model_type != "custom":
            module.config.save_pretrained(folder)  # type: ignore[union-attr, operator]  # a transformers model has one
        write_ferry_file(folder, _entry(made, summary, before), list_files(folder))
        if made.folder.is_dir():
            made.folder.rmdir()
        shutil.move(folder, made.folder)


def _entry(made: ConvertedModule, graph: GraphSummary, before: GraphSummary) -> dict[str, Any]:
    """Return what the artifact says of itself, in the form of a report's entry."""
    parity = made.parity
    largest = max((o.max_abs_diff for o in parity.outputs), default=None)
    closest = max(parity.outputs, key=lambda o: o.max_abs_diff / o.tolerance if o.tolerance else 0.0, default=None)
    return {
        "id": made.spec.architecture,
        "revision": None,
        "status": "converted",
        "task": made.spec.task,
        "model_type": made.spec.model_type,
        "architecture": made.spec.architecture,
        "artifact": None,
        "graphs": [
            {
                "role": "model",
                "path": _GRAPH,
                "opset": graph.opset,
                "nodes": graph.nodes,
                "nodes_before_simplify": before.nodes,
                "operators": dict(graph.operators),
                "operators_before_simplify": dict(before.operators),
                "inputs": [asdict(t) for t in graph.inputs],
                "outputs": [asdict(t) for t in graph.outputs],
            }
        ],
        "template": "direct",
        "simplified": made.simplified,
        "parity": {
            "verdict": parity.outcome.value,
            "device": parity.device,
            "provider": parity.provider,
            "shapes": parity.shapes,
            "max_abs_diff": largest,
            "tolerance": None if closest is None else closest.tolerance,
            "axes_proven": list(parity.axes_proven),
            "outputs": [asdict(o) for o in parity.outputs],
            "detail": parity.detail,
        },
        "seconds": {},
        "peak_rss_bytes": None,
        "attempts": 1,
        "notes": list(made.notes),
        "error": None,
    }
