"""The steps that look at all graphs of a model together, as they run in a child process.

One dict of JSON values in, one out, as in `onnx_config.export.steps`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from onnx_config.export.loaded import loaded_model
from onnx_config.export.steps import Json
from onnx_config.parts import GRAPH_ENTRY, Role
from onnx_config.spec import ModelSpec

__all__ = ["generation", "merge"]


def merge(request: Json) -> Json:
    """Write one decoder of the two ``decoder`` and ``decoder_with_past`` to ``output``; returns its summary."""
    from onnx_config.export.graph_file import read_graph, summarize, write_graph
    from onnx_config.export.merge import merge_decoders

    begun, continued = (read_graph(Path(request[role])) for role in (Role.DECODER, Role.DECODER_WITH_PAST))
    merged = merge_decoders(begun, continued)
    certificate = {**merged.metadata_props, GRAPH_ENTRY: Role.DECODER_MERGED.value}
    write_graph(merged, Path(request["output"]), metadata=certificate)
    return {"graph": asdict(summarize(merged))}


def generation(request: Json) -> Json:
    """Compare what the ``graphs`` (role -> path) say together with what the model in ``folder`` says.

    Decoders generate; what answers prompts about an image is asked.

    ``spec`` is that of the whole model, ``parts`` those of its graphs. Returns what differs (``difference``), and a
    note of what was compared.

    Raises:
        ModelError: If ONNX Runtime refuses a graph.
    """
    from onnx_config.export.fusion_generation import compare_fusion_generation
    from onnx_config.export.prompted import prompted_difference, prompts_compared
    from onnx_config.export.seq2seq_generation import compare_seq2seq_generation
    from onnx_config.export.session import choose_device, open_session

    specs = {Role(part["part"]): ModelSpec.from_json(part) for part in request["parts"]}
    universal, model = loaded_model(request, ModelSpec.from_json(request["spec"]))
    device = choose_device(request["device"])
    sessions = {
        Role(role): open_session(Path(path), device=device, threads=request["threads"])
        for role, path in request["graphs"].items()
    }
    if Role.PROMPT_DECODER in specs:
        whole = ModelSpec.from_json(request["spec"])
        if (difference := prompted_difference(sessions, model, whole, universal)) is not None:
            return {"difference": difference, "note": None}
        note = f"image and prompts in {len(specs)} graphs answer what the model does in one call"
        return {"difference": None, "note": f"{note}: {prompts_compared(whole)}, all about one batch of images"}
    if Role.ENCODER in specs:
        generated = compare_seq2seq_generation(sessions, model, specs, universal)
    else:
        whole = ModelSpec.from_json(request["spec"])
        generated = compare_fusion_generation(sessions, model, whole, specs[Role.DECODER_MERGED], universal)
        if generated.refusal is not None:
            # How embeddings take the places of tokens is shown by nothing else.
            return {
                "difference": f"what they generate together could not be compared: {generated.refusal}",
                "note": None,
            }
    if generated.refusal is not None:
        return {"difference": None, "note": f"greedy generation was not compared: {generated.refusal}"}
    note = f"generates the {generated.tokens} tokens that PyTorch does, for {generated.rows} inputs at once"
    return {"difference": generated.difference, "note": None if generated.difference else note}
