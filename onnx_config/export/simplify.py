"""onnxsim over an exported graph; the result is taken only where it is better and takes and gives the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from onnx_config.export.graph_file import GraphSummary, read_graph, summarize

__all__ = ["Simplification", "simplify_file"]

# Makes one MatMul and one Add over three axes into Shape, Slice, Concat, two Reshapes and a Gemm.
_SKIPPED_OPTIMIZERS = ("fuse_matmul_add_bias_into_gemm_batched",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplification:
    """What onnxsim made of a graph."""

    model: onnx_ir.Model | None
    """The simplified graph; ``None`` where the plain one is to be kept."""

    before: GraphSummary
    """Of the plain graph."""

    after: GraphSummary
    """Of the graph to be kept."""

    reason: str | None
    """Why the plain graph is kept; ``None`` where it is not."""


def simplify_file(path: Path) -> Simplification:
    """Run onnxsim over a file, which stays as it is.

    onnxsim may crash the process, so call this in a child.

    Raises:
        ModelError: If the file is no ONNX graph.
    """
    import onnxsim

    plain = read_graph(path)
    before = summarize(plain)
    try:
        # onnxsim holds the graph in memory as one protobuf message.
        simplified, _ = onnxsim.simplify(
            str(path), check_n=0, tensor_size_threshold="10MB", skipped_optimizers=list(_SKIPPED_OPTIMIZERS)
        )
        model = onnx_ir.from_proto(simplified)
        _restore_signature(model, plain)
        after = summarize(model)
    # Neither onnxsim nor the C++ passes below it say what they raise.
    except Exception as error:  # noqa: BLE001
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Simplification(model=None, before=before, after=before, reason=f"onnxsim failed with {why}")
    reason = None
    if after.nodes > before.nodes:
        reason = f"onnxsim made {after.nodes} nodes of {before.nodes}"
    elif [(t.name, t.dtype) for t in after.inputs] != [(t.name, t.dtype) for t in before.inputs]:
        reason = "onnxsim changed the inputs"
    elif [(t.name, t.dtype) for t in after.outputs] != [(t.name, t.dtype) for t in before.outputs]:
        reason = "onnxsim changed the outputs"
    elif after.limits != before.limits:
        reason = "onnxsim took out what refuses sizes beyond the graph's limits"
    if reason is not None:
        return Simplification(model=None, before=before, after=before, reason=reason)
    return Simplification(model=model, before=before, after=after, reason=None)


def _restore_signature(model: onnx_ir.Model, plain: onnx_ir.Model) -> None:
    """Give inputs and outputs the axis names that the plain graph has; onnxsim's inference may rename them."""
    for values, originals in ((model.graph.inputs, plain.graph.inputs), (model.graph.outputs, plain.graph.outputs)):
        shapes = {value.name: value.shape for value in originals}
        for value in values:
            if shapes.get(value.name) is not None:
                value.shape = shapes[value.name]
