"""The steps by which a structure is traced once and bound to many checkpoints, as they run in a child process.

One dict of JSON values in, one out, as in `onnx_config.export.steps`. Paths in requests are absolute; nothing is
written but the files that a request names and the lists of weights beside graphs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.branches import Branch, branches_of, without_branches
from onnx_config.export.loaded import loaded_model
from onnx_config.export.sample import sample_of, trace_sample
from onnx_config.export.steps import Json, check_options
from onnx_config.spec import ModelSpec

if TYPE_CHECKING:
    from onnx_config.export.limits import AxisLimit
    from onnx_config.export.template import TemplateGraph, Weight
    from onnx_config.export.trace import Trace

__all__ = ["bind", "simplify", "trace"]


def trace(request: Json) -> Json:
    """Trace the structure of the model in ``folder`` without its weights; write the graph to ``output``.

    Returns notes, and why the model has to be traced with its weights instead (``direct``; ``None``: it has not).

    Raises:
        InputError: If the weights are not there or not whole.
    """
    from onnx_config.export.graph_file import count_operators, write_graph
    from onnx_config.export.origins import weightless
    from onnx_config.export.template import TemplateGraph, fold_transposes, lift_weights, lifted_weights, unused_removed
    from onnx_config.export.trace import reads_values

    check_options({**request, "device": "cpu"})
    spec = ModelSpec.from_json(request["spec"])
    folder, fixed = Path(request["folder"]), tuple(request.get("fixed", ()))
    with weightless() as origins:
        universal, model = loaded_model(request, spec, check_values=False)
    computed = {name for name, tensor in model.named_parameters(remove_duplicate=False) if origins.of(tensor) is None}
    buffers = {name for name, _ in model.named_buffers()}
    path = Path(request["output"])
    lifted: list[tuple[Weight, ...]] = []

    def trace_with(fixed: tuple[str, ...], turns: tuple[AxisLimit, ...]) -> tuple[Trace, tuple[Branch, ...]]:
        lifted.clear()
        traced = trace_sample(
            spec,
            universal,
            model,
            sample,
            turns=turns,
            opset=request["opset"],
            fixed=fixed,
            # Zeros tie everywhere, and what a checkpoint holds must make no other graph.
            tied=sample.watch.chose,
            repeats=True,
            before_optimizing=lambda graph: lifted.append(
                lift_weights(graph, origins, root=folder, computed=computed, buffers=buffers)
            ),
        )
        weights = fold_transposes(traced.model, unused_removed(traced.model, lifted_weights(traced.model, lifted)))
        write_graph(traced.model, path, metadata={})
        template = TemplateGraph(path=path, weights=weights)
        template.write_weights()
        return traced, _branches_of(template, traced, request)

    try:
        sample = sample_of(spec, universal, model, folder, fixed=fixed)
        traced, notes = without_branches(
            spec, sample, fixed, trace_with, write=lambda limited: write_graph(limited.model, path, metadata={})
        )
    except ModelError as error:
        # With weights, values that the model's code reads can be looked at; and what it refuses, it may take then.
        if error.kind is ErrorKind.EXPORT_FAILED and not reads_values(error.__cause__):
            raise
        return {"direct": f"its structure alone cannot be traced: {error.message}", "notes": []}
    return {
        "direct": None,
        "notes": [*sample.notes(spec), *notes, *traced.notes],
        "nodes": sum(1 for graph in traced.model.graphs() for _ in graph),
        "operators": count_operators(traced.model),
    }


def _branches_of(template: TemplateGraph, traced: Trace, request: Json) -> tuple[Branch, ...]:
    """Return where the model takes another branch than its graph; to see that takes the weights."""
    from onnx_config.export.bind import bind as bind_graph

    if not traced.untried:
        return ()
    universal, model = loaded_model(request, spec := ModelSpec.from_json(request["spec"]))
    path = template.path.with_name("tried.onnx")
    files = bind_graph(template, Path(request["folder"]), path, metadata={}, loaded=lambda: _tensors(model))
    try:
        return branches_of(traced.untried, path, spec, universal, model)
    finally:
        for file in files:
            file.unlink()


def _tensors(model: Any) -> dict[str, Any]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}


def simplify(request: Json) -> Json:
    """Simplify the template ``graph`` into ``output``; returns why there is none to take (``reason``), or ``None``."""
    from onnx_config.export.graph_file import write_graph
    from onnx_config.export.simplify import simplify_file
    from onnx_config.export.template import TemplateGraph, fold_transposes, read_weights, unused_removed

    path, output = Path(request["graph"]), Path(request["output"])
    weights = read_weights(path)
    result = simplify_file(path)
    if result.model is None:
        return {"reason": result.reason}
    kept = fold_transposes(result.model, unused_removed(result.model, weights))
    write_graph(result.model, output, metadata={})
    TemplateGraph(path=output, weights=kept).write_weights()
    return {"reason": None}


def bind(request: Json) -> Json:
    """Write the template ``graph`` with the weights in ``folder`` to ``output``, with its ``metadata``.

    With ``link`` true the graph points into the checkpoint's files, hard-linked beside it.

    Returns the graph's summary.

    Raises:
        InputError: If the checkpoint does not fit.
    """
    from onnx_config.export import bind as binding
    from onnx_config.export.graph_file import read_graph, summarize
    from onnx_config.export.template import TemplateGraph, read_weights

    path = Path(request["graph"])
    graph = TemplateGraph(path=path, weights=read_weights(path))

    binding.bind(
        graph,
        Path(request["folder"]),
        Path(request["output"]),
        metadata=request["metadata"],
        link=request.get("link", False),
        loaded=lambda: _tensors(loaded_model(request, ModelSpec.from_json(request["spec"]))[1]),
    )
    summary = asdict(summarize(read_graph(path)))
    named = {weight.name for weight in graph.weights}
    return {"graph": {**summary, "inputs": [tensor for tensor in summary["inputs"] if tensor["name"] not in named]}}
