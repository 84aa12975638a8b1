"""Writes the parts of the reference that the code itself knows: commands, manifest keys, settings, the report.

A page says ``<!-- generated: NAME -->`` where such a part stands; mkdocs calls `on_page_markdown` for each page.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

__all__ = ["PARTS", "command_table", "commands", "field_strings", "filled", "on_page_markdown"]

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its generated parts; what mkdocs calls."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """Return the text with its generated parts.

    Raises:
        KeyError: If one is not known.
    """
    return _MARK.sub(lambda found: PARTS[found[1]](), markdown)


# Commands


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command with its words, such as ``ferry catalog list``."""
    from flows.cli import app

    yield from _commands("ferry", typer.main.get_command(app))


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield words, command
        return
    for name in children:
        yield from _commands(f"{words} {name}", children[name])


def command_table() -> str:
    """Return a section for each command: what it does, its arguments and options."""
    return "\n\n".join(_command(words, command) for words, command in commands())


def _command(words: str, command: Any) -> str:
    rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    described = textwrap.dedent(command.help or "").strip()
    table = "| argument or option | means | default |\n|---|---|---|\n" + "\n".join(rows)
    return f"## {words} {{ #{words.replace(' ', '-')} }}\n\n{described}\n\n{table if rows else ''}"


def _parameter(parameter: Any) -> str:
    metavar = (parameter.metavar or "").strip("[]{}")
    if getattr(parameter, "param_type_name", "") == "argument":
        name = f"`{metavar or (parameter.name or '').upper()}`"
    else:
        value = metavar or "|".join(_choices(parameter))
        name = f"`{', '.join(parameter.opts)}{' ' + value if value else ''}`"
    default = parameter.default
    shown = "" if default in (None, False, ()) or callable(default) else f"`{_word(default)}`"
    needed = "required" if parameter.required else shown
    return f"| {_cell(name)} | {_cell(getattr(parameter, 'help', None) or '')} | {_cell(needed)} |"


def _choices(parameter: Any) -> list[str]:
    """Return the words that an option takes; none where it takes others, or nothing."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return [word.value for word in kind]
    # Typer's older versions are made of click's own parts.
    return [_word(word) for word in getattr(getattr(parameter, "type", None), "choices", ())]


# Keys and settings


def field_strings(cls: type) -> dict[str, str]:
    """Return the string that stands under each field of a class, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] not in ("flows", "tasks", "onnx_config", "db"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(words))):
                        found[field.target.id] = " ".join(words.split())
    return found


def _keys(cls: type[BaseModel], *, of: tuple[str, ...] = ()) -> str:
    said = field_strings(cls)
    rows = [
        f"| `{name}` | {_cell(said[name])} | {_cell(_values(field.annotation))} | {_cell(_default(field))} |"
        for name, field in cls.model_fields.items()
        if not of or name in of
    ]
    return "| key | means | values | default |\n|---|---|---|---|\n" + "\n".join(rows)


def _manifest_defaults() -> str:
    from flows.manifest_keys import ModelOptions

    return _keys(ModelOptions)


def _manifest_model() -> str:
    from flows.manifest_keys import ManifestModel, ModelOptions

    return _keys(ManifestModel, of=tuple(ManifestModel.model_fields.keys() - ModelOptions.model_fields.keys()))


def _manifest_query() -> str:
    from flows.manifest_keys import Query

    return _keys(Query)


def _settings() -> str:
    from flows.settings import Settings

    said = field_strings(Settings)
    defaults = {name: _SETTING_DEFAULTS.get(name) or _default(field) for name, field in Settings.model_fields.items()}
    rows = [
        f"| `FERRY_{name.upper()}` | `{name}` | {_cell(said[name])} | {_cell(default)} |"
        for name, default in defaults.items()
    ]
    return "| variable | key of `ferry.toml` | means | default |\n|---|---|---|---|\n" + "\n".join(rows)


# Those that are worked out from others, or from the machine.
_SETTING_DEFAULTS = {
    "home": "`./ferry-data`",
    "catalog_url": "`sqlite:///$FERRY_HOME/catalog.db`",
    "store_url": "`file://$FERRY_HOME/artifacts`",
    "store_cache": "20 GiB",
    "memory_limit": "three quarters of the machine",
    "timeout": "`3600`: an hour",
}


def _report() -> str:
    from tasks import report

    wanted = (report.Report, report.ModelEntry, report.GraphEntry, report.ParityEntry, report.VariantEntry)
    return "\n\n".join(_entry(cls) for cls in (*wanted, report.ErrorEntry))


def _entry(cls: type[BaseModel]) -> str:
    said = field_strings(cls)
    rows = [
        f"| `{field.alias or name}` | {_cell(said.get(name, ''))} | {_cell(_values(field.annotation))} |"
        for name, field in cls.model_fields.items()
    ]
    title = cls.__name__.removesuffix("Entry")
    table = "| key | means | values |\n|---|---|---|\n" + "\n".join(rows)
    return f"## {title}\n\n{inspect.getdoc(cls)}\n\n{table}"


def _kinds() -> str:
    from onnx_config.errors import ErrorKind

    return "\n".join(f"| [`{kind}`](#{kind}) | {_next(kind)} |" for kind in ErrorKind)


def _next(kind: Any) -> str:
    if kind.transient:
        return "tried again at once, and in the next run"
    if kind.retried_alone:
        return "tried once more, alone on the machine; and in the next run"
    return "remembered; `--retry-failed` tries again" if kind.remembered else "tried again in the next run"


def _values(annotation: Any) -> str:
    """Return in words what a field takes."""
    if get_origin(annotation) is Annotated:
        return _values(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        found = [_values(part) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(found) + (", or nothing" if type(None) in get_args(annotation) else "")
    if get_origin(annotation) in (tuple, list):
        return f"a list: {_values(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"a mapping: {' -> '.join(_values(part) for part in get_args(annotation))}"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{word.value}`" for word in annotation)
    names = {str: "text", int: "a whole number", float: "a number", bool: "`true` or `false`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).removesuffix("Entry"))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "" if value in (None, (), PydanticUndefined) else f"`{_word(value)}`"


def _word(value: object) -> str:
    match value:
        case StrEnum():
            return value.value
        case bool():
            return str(value).lower()
        case Path():
            return str(value)
        case _:
            return str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


PARTS: dict[str, Callable[[], str]] = {
    "commands": command_table,
    "error-kinds": lambda: "| kind | what happens next |\n|---|---|\n" + _kinds(),
    "manifest-defaults": _manifest_defaults,
    "manifest-model": _manifest_model,
    "manifest-query": _manifest_query,
    "report": _report,
    "settings": _settings,
}
"""What each generated part is called, and what writes it."""
