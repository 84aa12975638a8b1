"""Tiny encoder-decoders as graphs of their parts, as a conversion stores them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers

from onnx_config.export import steps
from onnx_config.export.artifact import copy_side_files, list_files, write_ferry_file
from onnx_config.export.graph_file import read_graph, summarize
from onnx_config.parts import GRAPH_FILES, Role, encoder_decoder_parts
from onnx_config.spec import ModelSpec

__all__ = ["VISION", "convert_parts", "register"]

VISION = "vision-encoder-decoder"
"""An image to a text: a ViT and a GPT-2 that looks at it, which no table of tiny models has."""


def convert_parts(name: str, folder: Path, *, with_past: bool = True) -> tuple[Path, Path]:
    """Build the tiny model ``name`` and its graphs; return its folder and theirs, which has a ``ferry.json``."""
    source, artifact = folder / "source", folder / "artifact"
    artifact.mkdir(parents=True)
    _build(name, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
        detected = steps.detect({"folder": str(source)})
        spec = ModelSpec.from_json(detected)
        paths: dict[Role, Path] = {}
        for part in encoder_decoder_parts(spec, with_past=with_past):
            paths[Role(part.part)] = artifact / GRAPH_FILES[Role(part.part)]
            request = {"folder": str(source), "spec": part.to_json(), "dtype": "float32", "opset": None}
            steps.export({**request, "output": str(paths[Role(part.part)])})
        if with_past:
            _merge(paths, artifact)
    copy_side_files(source, artifact)
    register(artifact, spec.architecture)
    return source, artifact


def _merge(paths: Mapping[Role, Path], artifact: Path) -> None:
    from onnx_config.export.part_steps import merge

    decoders = {role.value: str(paths[role]) for role in (Role.DECODER, Role.DECODER_WITH_PAST)}
    merge({**decoders, "output": str(artifact / GRAPH_FILES[Role.DECODER_MERGED])})


def _build(name: str, folder: Path) -> None:
    if name != VISION:
        tiny_models.build(name, folder)
        return
    encoder = tiny_models.config("vit-model")
    decoder = transformers.GPT2Config(
        vocab_size=tiny_models.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True,
        is_decoder=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.VisionEncoderDecoderModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Weights as they are made give the same token whatever the image.
                parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    images = tiny_models.FAMILIES["vit-image-classification"].files
    texts = tiny_models.FAMILIES["gpt2-causal-lm"].files
    assert images is not None
    assert texts is not None
    images(folder)
    texts(folder)


def register(folder: Path, architecture: str, verdict: str = "verified") -> None:
    """Write the ``ferry.json`` of what lies in a folder."""
    roles = {file: role for role, file in GRAPH_FILES.items()}
    graphs = [
        {"role": roles[path.name].value, "path": path.name, **asdict(summarize(read_graph(path)))}
        for path in sorted(folder.glob("*.onnx"))
    ]
    entry = {"id": "tiny", "architecture": architecture, "graphs": graphs, "parity": {"verdict": verdict}}
    write_ferry_file(folder, entry, list_files(folder))
