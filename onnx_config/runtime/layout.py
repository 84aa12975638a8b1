"""Which graphs a folder or repository holds: by its ``ferry.json``, or by the names that the ecosystem uses.

Works on names alone, so that of a repository only what is run needs to be downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.parts import GRAPH_FILES, Role
from onnx_config.variants import variant_file

__all__ = ["Choice", "companions", "find_graphs", "graphs_to_load"]

_DECODERS = (Role.DECODER, Role.DECODER_WITH_PAST, Role.DECODER_MERGED)
# Models published for transformers.js have their graphs in a folder of their own.
_PLACES = ("", "onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of several graphs of a kind are meant."""

    file_name: str | None = None
    """The one graph to load; ``None``: by the names of the ecosystem."""

    subfolder: str | None = None
    """Where the graphs lie; ``None``: at the top, or in ``onnx``."""

    variant: str | None = None
    """What stands at the end of the files' names, before ``.onnx``: ``quantized``, ``fp16``; ``None``: nothing."""

    merged: bool | None = None
    """Whether the decoder is the merged graph, which holds the weights once, or the two that it was made of; ``None``:
    whichever is there, the merged one first."""

    @property
    def plain(self) -> bool:
        """Whether nothing is said of files, so that what ``ferry.json`` lists is meant."""
        return self.file_name is None and self.subfolder is None and self.variant is None


def find_graphs(
    names: Collection[str], *, origin: str, listed: Mapping[str, Any] | None = None, choice: Choice | None = None
) -> dict[Role, str]:
    """Return the paths of the graphs by what they compute, all that belong together; empty where there are none.

    Args:
        names: The files that are there, relative and with forward slashes.
        origin: What they are files of, for messages.
        listed: ``ferry.json``, where there is one.
        choice: Which are meant, where there are several.

    Raises:
        InputError: If a graph is missing without which the others are of no use, or the one asked for is not there.
        ModelError: If the artifact has graphs that this version cannot run (``unsupported``).
    """
    choice = Choice() if choice is None else choice
    if listed is not None and choice.plain and (graphs := _listed(listed, origin)):
        for role, path in graphs.items():
            if path not in names:
                raise _missing(origin, path, f"the {role} that its ferry.json lists")
        return graphs
    if choice.file_name is not None:
        return _named(names, origin, choice)
    for place in _PLACES if choice.subfolder is None else (choice.subfolder,):
        found = {
            role: path
            for role, file in GRAPH_FILES.items()
            if (path := _inside(place, variant_file(file, choice.variant))) in names
        }
        if found:
            return _complete(found, origin, place, choice)
    if choice.variant is not None and (there := _variants_in(names, choice)):
        raise InputError(
            f"{origin} has no graph of the variant {choice.variant!r}; it has {', '.join(there)}. Convert the model "
            f"with --variant {choice.variant}, or load another.",
            kind=ErrorKind.NOT_FOUND,
        )
    return {}


def _variants_in(names: Collection[str], choice: Choice) -> list[str]:
    """Return the variants that are there, and ``float32`` for files without one."""
    places = _PLACES if choice.subfolder is None else (choice.subfolder,)
    found = set()
    for place in places:
        for file in GRAPH_FILES.values():
            stem = re.escape(_inside(place, file.removesuffix(".onnx")))
            of_file = re.compile(rf"{stem}(?:_([a-z0-9]+))?\.onnx")
            found |= {match[1] or "" for name in names if (match := of_file.fullmatch(name))}
    # A merged decoder is one of the graphs, and no variant of the decoder.
    return [variant or "float32, which is loaded without one" for variant in sorted(found - {"merged"})]


def _listed(listed: Mapping[str, Any], origin: str) -> dict[Role, str]:
    graphs: dict[Role, str] = {}
    for entry in listed["model"].get("graphs") or ():
        role, path = entry.get("role"), entry.get("path")
        if not isinstance(path, str) or not _is_inside(path):
            raise InputError(f"The ferry.json of {origin} lists a graph at {path!r}, which is no file of the artifact.")
        if role not in tuple(Role):
            raise ModelError(
                f"{origin} has a graph that computes its {role}, which this version of onnx-ferry cannot run.",
                kind=ErrorKind.UNSUPPORTED,
            )
        graphs[Role(role)] = path
    return graphs


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts


def _named(names: Collection[str], origin: str, choice: Choice) -> dict[Role, str]:
    file = choice.file_name or ""
    places = _PLACES if choice.subfolder is None else (choice.subfolder,)
    for place in places:
        if (path := _inside(place, file)) in names:
            merged = PurePosixPath(file).name.startswith(PurePosixPath(GRAPH_FILES[Role.DECODER_MERGED]).stem)
            return {Role.DECODER_MERGED if merged else Role.MODEL: path}
    where = " or ".join(f"{place}/" if place else "its top" for place in places)
    raise InputError(f"{origin} has no file {file!r} in {where}.", kind=ErrorKind.NOT_FOUND)


def _complete(found: dict[Role, str], origin: str, place: str, choice: Choice) -> dict[Role, str]:
    """Return those that belong together of what lies in one place."""

    def path_of(role: Role) -> str:
        return _inside(place, variant_file(GRAPH_FILES[role], choice.variant))

    decoders = found.keys() & set(_DECODERS)
    if Role.MODEL in found and Role.ENCODER not in found:
        # A decoder that carries its cache in one graph, with an older layout of the same beside it.
        return {Role.MODEL: found[Role.MODEL]}
    if Role.ENCODER in found and not decoders:
        raise _missing(origin, path_of(Role.DECODER), "the decoder of its encoder")
    if decoders == {Role.DECODER_WITH_PAST}:
        raise _missing(origin, path_of(Role.DECODER), "the decoder that begins a text")
    return {role: path for role, path in found.items() if role is not Role.MODEL}


def graphs_to_load(graphs: Mapping[Role, str], choice: Choice, *, origin: str) -> dict[Role, str]:
    """Return those of ``graphs`` that are needed, in the order in which they run: of two ways to have a decoder, one.

    Raises:
        InputError: If the way asked for is not there (``not_found``).
    """
    if Role.MODEL in graphs:
        # The sides of a dual encoder lie beside the whole.
        return {Role.MODEL: graphs[Role.MODEL]}
    has = {True: Role.DECODER_MERGED in graphs, False: Role.DECODER in graphs}
    if not any(has.values()):
        return {role: graphs[role] for role in Role if role in graphs}
    merged = has[True] if choice.merged is None else choice.merged
    if not has[merged]:
        wanted = GRAPH_FILES[Role.DECODER_MERGED if merged else Role.DECODER]
        raise InputError(
            f"{origin} was to be loaded with merged={merged}, and has no {wanted}.", kind=ErrorKind.NOT_FOUND
        )
    left = (Role.DECODER, Role.DECODER_WITH_PAST) if merged else (Role.DECODER_MERGED,)
    return {role: graphs[role] for role in Role if role in graphs and role not in left}


def companions(names: Collection[str], graph: str) -> Iterator[str]:
    """Yield the files with a graph's weights beside it, by their names: ``model.onnx_data``, ``model.onnx.data``."""
    beside = re.compile(re.escape(graph) + r"[._]data([._-]?\d+)?")
    return (name for name in sorted(names) if beside.fullmatch(name))


def _inside(place: str, file: str) -> str:
    return f"{place.rstrip('/')}/{file}" if place else file


def _missing(origin: str, path: str, what: str) -> InputError:
    return InputError(
        f"{origin} lacks {path}, {what}. Copy the whole folder again, or convert the model again.",
        kind=ErrorKind.NOT_FOUND,
    )
