"""Whether the files of an artifact are those that were verified, by what its ``ferry.json`` says of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnx_config.errors import InputError
from onnx_config.file_hash import sha256_of
from onnx_config.runtime.layout import companions

__all__ = ["check_files", "missing_weights"]


def check_files(folder: Path, listed: Mapping[str, Any], graphs: Collection[str], *, hashes: bool = True) -> None:
    """Compare the graphs that are to be loaded, and the weights beside them, with what was written down of them.

    Configs and tokenizers are not looked at: they are copies that a user may edit.

    Args:
        folder: The artifact's folder.
        listed: Its ``ferry.json``.
        graphs: The graphs, relative to it.
        hashes: Whether the contents are read and hashed; else only the sizes are compared.

    Raises:
        InputError: If a file is missing, or is another one than was verified; the message names it.
    """
    known = listed.get("files") or {}
    for graph in graphs:
        for name in (graph, *companions(known, graph)):
            written = known.get(name)
            if written is None:
                continue
            path = folder / name
            if not path.is_file():
                raise InputError(
                    f"{str(folder)!r} lacks {name}, which its ferry.json lists. Copy the whole folder again, or "
                    "convert the model again."
                )
            size, wanted = path.stat().st_size, written.get("size_bytes")
            if size != wanted:
                raise _changed(folder, name, f"it has {size} bytes, and {wanted} were verified")
            if hashes and (found := sha256_of(path)) != written.get("sha256"):
                raise _changed(folder, name, f"its SHA-256 begins with {found[:12]}, not {written.get('sha256')!s:.12}")


def _changed(folder: Path, name: str, how: str) -> InputError:
    return InputError(
        f"{name} in {str(folder)!r} is not the file that was compared with PyTorch: {how}. Copy the folder again, or "
        "convert the model again."
    )


def missing_weights(graph: Path) -> str | None:
    """Return the first file with weights that a graph names and that is not beside it; ``None``: all are there."""
    from onnx_config.export.graph_file import read_graph

    try:
        model = read_graph(graph)
        tensors = [value.const_value for value in model.graph.initializers.values()]
    # Whatever the file holds, it is no graph, which somebody else says.
    except Exception:  # noqa: BLE001
        return None
    locations = {str(location) for tensor in tensors if (location := getattr(tensor, "location", None)) is not None}
    return next((name for name in sorted(locations) if not (graph.parent / name).is_file()), None)
