"""Where the graphs of a model are, by what a user calls it: a folder, an id of a catalog, or a Hub id."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from onnx_config import hub
from onnx_config.errors import ErrorKind, InputError
from onnx_config.export.artifact import read_ferry_file
from onnx_config.parts import GRAPH_FILES, Role
from onnx_config.runtime.layout import Choice, companions, find_graphs, graphs_to_load

__all__ = ["PLACES", "Located", "locate"]

PLACES = "onnx_ferry.places"
"""Group of entry points: functions that take a model's id, with ``@`` and a revision or not, and return the folder of
an artifact that they know by it, or ``None``. The catalog is one; the library itself knows no catalog."""

_MOST_FILES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A folder with graphs that belong together."""

    folder: Path
    """Where they are, and the config beside them."""

    graphs: Mapping[Role, str]
    """Those that are to be loaded, relative to the folder."""

    known: dict[str, Any] | None
    """What ``ferry.json`` says; ``None``: there is none, since somebody else made the graphs."""


def locate(model: str | Path, *, revision: str | None = None, choice: Choice | None = None) -> Located:
    """Return where a model's graphs are; one of the Hub is downloaded, the graphs that are meant and what is small.

    A folder comes first, then what a place knows (see `PLACES`), then the Hub. A folder of a model that was converted,
    without graphs in it, is what became of its present content.

    Args:
        model: A folder, an id that a place knows, or a Hub id; ids with ``@`` and a revision or not.
        revision: The same revision, for an id without one.
        choice: Which of several graphs are meant.

    Raises:
        InputError: If nothing is called so, or it holds no graphs, or not all that belong together.
        ModelError: If it has graphs that this version cannot run.
        TransientError: If a catalog or the Hub does not answer.
    """
    choice = Choice() if choice is None else choice
    folder = Path(model).expanduser()
    if folder.is_dir() and (found := _in_folder(folder, choice)) is not None:
        return found
    name = _as_converted(folder) if folder.is_dir() else str(model) if revision is None else f"{model}@{revision}"
    for known in _known_places(name) if name is not None else ():
        if (found := _in_folder(known, choice)) is not None:
            return found
    if name is not None and not folder.is_dir() and isinstance(model, str) and hub.is_repository(name):
        folder = hub.download_chosen(name, lambda names: _wanted(names, name, choice))
        if (found := _in_folder(folder, choice)) is not None:
            return found
        raise InputError(
            f"{name!r} on the Hub holds no {GRAPH_FILES[Role.MODEL]}, nor graphs of parts under the names that are in "
            "use. Convert it with `ferry convert`, or name a repository with ONNX files.",
            kind=ErrorKind.NOT_FOUND,
        )
    raise InputError(
        f"{str(model)!r} {'holds' if folder.is_dir() else 'is no folder, nor known to the catalog: it holds'} no "
        f"{GRAPH_FILES[Role.MODEL]}. Give the folder of a converted model; "
        "`ferry catalog list` shows where they are.",
        kind=ErrorKind.NOT_FOUND,
    )


def _as_converted(folder: Path) -> str | None:
    """Return the id of a model in a folder at its present content; ``None`` where there is none in it."""
    try:
        return f"{folder.resolve()}@{hub.resolve(str(folder.resolve())).revision}"
    except InputError:
        return None


def _in_folder(folder: Path, choice: Choice) -> Located | None:
    known = read_ferry_file(folder)
    origin = repr(str(folder))
    found = find_graphs(_names_in(folder), origin=origin, listed=known, choice=choice)
    if not found:
        return None
    return Located(folder=folder, graphs=graphs_to_load(found, choice, origin=origin), known=known)


def _names_in(folder: Path) -> set[str]:
    """Return the files of a folder and of its folders; not of theirs, since somebody may give a whole disk."""
    files = (path for place in (folder.iterdir(), folder.glob("*/*")) for path in place)
    names = set()
    for path, _ in zip(files, range(_MOST_FILES), strict=False):
        if path.is_file():
            names.add(path.relative_to(folder).as_posix())
    return names


def _known_places(name: str) -> Iterator[Path]:
    for point in entry_points(group=PLACES):
        if (folder := point.load()(name)) is not None:
            yield Path(folder)


def _wanted(names: Collection[str], origin: str, choice: Choice) -> Iterator[str]:
    """Yield the files of a repository that are to be downloaded, beside its small ones."""
    graphs = graphs_to_load(
        find_graphs(names, origin=f"{origin!r} on the Hub", choice=choice), choice, origin=f"{origin!r} on the Hub"
    )
    for graph in graphs.values():
        yield graph
        yield from companions(names, graph)
