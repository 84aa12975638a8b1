"""YAML whose values know on which line they stand, for messages that name it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from onnx_config.errors import InputError

__all__ = ["YamlText", "nearest"]

Place = tuple[str | int, ...]
"""Keys and positions from the top of a document to a value."""

_Checked = TypeVar("_Checked", bound=BaseModel)
_SHOWN_PROBLEMS = 20


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint at the word that was meant.

    >>> nearest("schedule", ["schedules", "tags"])
    "did you mean 'schedules'?"
    """
    if close := get_close_matches(word.lower(), known, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    return f"the keys are {', '.join(known)}"


def _scalar(node: ScalarNode) -> Any:
    written: str = node.value
    try:
        match str(node.tag).rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return written.lower() == "true"
            case "int":
                return int(written.replace("_", ""), 0)
            case "float":
                return float(written.replace("_", ""))
            case _:
                return written
    except ValueError:
        return written


@dataclass(slots=True)
class YamlText:
    """A YAML file as plain values, with the line of each, and what is wrong with it so far."""

    what: str
    """How messages call the file, with its path."""

    values: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, what: str) -> YamlText:
        """Return what a file holds; what is wrong with it as YAML is among its problems.

        Raises:
            InputError: If it cannot be read, or is no UTF-8 text.
        """
        found = cls(f"{what} {str(path)!r}")
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError as error:
            raise InputError(
                f"{found.what}: there is no such file in {str(Path.cwd())!r}. Check the name, or give another one."
            ) from error
        except OSError as error:
            raise InputError(
                f"{found.what}: cannot be read ({error.strerror}). Give a file that is readable."
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{found.what}: not UTF-8 text. Save the file as UTF-8.") from error
        try:
            top = YAML(typ="safe", pure=True).compose(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            said = ", ".join(part for part in (error.context, error.problem) if part)
            found.problems.append((mark.line + 1 if mark else 0, f"not YAML: {said}"))
        except (YAMLError, RecursionError) as error:
            found.problems.append((0, f"not YAML: {getattr(error, 'reason', None) or type(error).__name__}"))
        else:
            found.values = None if top is None else found._read(top, ())
        return found

    def _read(self, node: Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        match node:
            case MappingNode():
                values: dict[str, Any] = {}
                for key_node, value in node.value:
                    line = key_node.start_mark.line + 1
                    if not isinstance(key_node, ScalarNode):
                        self.problems.append((line, "a key must be a word"))
                        continue
                    key = key_node.value
                    if key in values:
                        first = self.lines[*place, key]
                        self.problems.append(
                            (line, f"the key {key!r} is given twice; it stands on line {first} already")
                        )
                        continue
                    self.lines[*place, key] = line
                    values[key] = self._read(value, (*place, key))
                return values
            case SequenceNode():
                return [self._read(item, (*place, number)) for number, item in enumerate(node.value)]
            case ScalarNode():
                return _scalar(node)
            case _:
                return None

    def add(self, place: Place, text: str) -> None:
        """Note what is wrong with the value at a place, on its line or the nearest that is known."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.lines:
                self.problems.append((self.lines[place[:length]], text))
                return
        self.problems.append((0, text))

    def check(self, model: type[_Checked], keys: dict[tuple[str, ...], Sequence[str]]) -> _Checked | None:
        """Return the values as ``model``; ``None`` where they do not fit, which becomes problems.

        Args:
            model: What the document is to be.
            keys: Place without positions -> the keys that a mapping there may have.
        """
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self.add(item["loc"], self._said(item, keys))
            return None

    def _said(self, item: Any, keys: dict[tuple[str, ...], Sequence[str]]) -> str:
        name = str(item["loc"][-1]) if item["loc"] else "the file"
        around = tuple(part for part in item["loc"][:-1] if isinstance(part, str))
        match item["type"]:
            case "extra_forbidden":
                return f"unknown key {name!r}; {nearest(name, keys.get(around, ()))}"
            case "missing":
                return f"the key {name!r} is missing"
            case "model_type" | "model_attributes_type" | "dict_type":
                return f"{name!r} takes keys with values"
            case "enum":
                allowed = [str(member) for member in re.findall(r"'(.*?)'", item["ctx"]["expected"])]
                close = get_close_matches(str(item["input"]).lower(), allowed, n=1, cutoff=0.5)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                return f"{name!r} is {item['input']!r}: it takes {', '.join(allowed)}{hint}"
            case "list_type" | "tuple_type":
                return f"{name!r} takes a list, each item after '- '"
            case _:
                message: str = item["msg"]
                return f"{name!r}: {message.removeprefix('Value error, ')}"

    def error(self) -> InputError:
        """Return all that is wrong as one error."""
        ordered = sorted(set(self.problems))
        shown = [f"line {line}: {text}" if line else text for line, text in ordered[:_SHOWN_PROBLEMS]]
        if more := len(ordered) - len(shown):
            shown.append(f"and {more} more")
        count = f"{len(ordered)} problems: " if len(ordered) > 1 else ""
        return InputError(f"{self.what}: {count}{'; '.join(shown)}.")
