"""Folders as sentence-transformers writes them, small, with random weights and without the library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_models

__all__ = ["HIDDEN", "write_sentence_folder"]

HIDDEN = 32
"""Size of a token's vector in the small models."""

Module = tuple[str, Mapping[str, Any] | None]
"""Name of a module's class, and its config.json; None where it has none."""


def write_sentence_folder(
    folder: Path, modules: Sequence[Module], *, name: str = "bert-model", inner: str = "", old_types: bool = True
) -> Path:
    """Write a tiny model with ``modules`` after it and return the folder.

    The transformer lies in the subfolder ``inner``. Weights of modules are random.
    """
    import torch
    from safetensors.torch import save_file

    tiny_models.build(name, folder / inner)
    (folder / inner / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 64, "do_lower_case": False})
    )
    listed = [("Transformer", inner)]
    torch.manual_seed(1)
    for number, (kind, settings) in enumerate(modules, start=1):
        path = f"{number}_{kind.rpartition('.')[2]}"
        listed.append((kind, path))
        if settings is None:
            continue
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(settings))
        if weights := _weights(kind, settings):
            save_file({key: torch.randn(size) for key, size in weights.items()}, folder / path / "model.safetensors")
    package = "sentence_transformers.models."
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": kind if "." in kind else package + kind}
        for i, (kind, path) in enumerate(listed)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def _weights(kind: str, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    match kind:
        case "Dense":
            rows, columns = settings["out_features"], settings["in_features"]
            shapes: dict[str, tuple[int, ...]] = {"linear.weight": (rows, columns)}
            if settings.get("bias", True):
                shapes["linear.bias"] = (rows,)
            if settings.get("use_residual") and rows != columns:
                shapes["residual.weight"] = (rows, columns)
            return shapes
        case "LayerNorm":
            return {"norm.weight": (settings["dimension"],), "norm.bias": (settings["dimension"],)}
        case _:
            return {}
