"""The steps of a conversion as they run in a child process: one dict of JSON values in, one out.

Paths in requests are absolute. Nothing is written but the files that a request names.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.branches import Branch, branches_of, without_branches
from onnx_config.export.loaded import loaded_model
from onnx_config.export.sample import escapes_at, sample_of, ties_in_padding, trace_sample
from onnx_config.spec import ModelSpec

if TYPE_CHECKING:
    from onnx_config.export.limits import AxisLimit
    from onnx_config.export.trace import Trace

__all__ = ["check_options", "detect", "export", "parity", "simplify", "stamp"]

Json = dict[str, Any]


def detect(request: Json) -> Json:
    """Return the spec of the model in ``folder`` for ``task``; where ``trust_remote_code`` is true, its own code runs.

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
    from onnx_config.task_detector import normalize_task
    from onnx_config.universal_config import UniversalOnnxConfig

    task = request.get("task")
    # The cache is told beside the inputs; `onnx_config.cache_layout.with_past` makes it one of them.
    plain = None if task is None else normalize_task(task)[0]
    trust = bool(request.get("trust_remote_code"))
    universal = UniversalOnnxConfig.from_folder(Path(request["folder"]), trust=trust, task=plain)
    return universal.spec, universal


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
    """Compare the stored ``graph`` with the PyTorch model in ``folder``, as `onnx_config.export.comparison` does."""
    from onnx_config.export.comparison import compare

    return compare(request)


def _summary(summary: Any) -> Json:
    return asdict(summary)
