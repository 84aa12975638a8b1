"""What stands in the YAML of a manifest, and what is wrong with it: each problem with its line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from flows.manifest_keys import OLDEST_OPSET, Dtype, Sort, Weights
from onnx_config.errors import InputError
from onnx_config.variants import Variant
from tasks.request import Device

__all__ = [
    "Problems",
    "is_null",
    "keys_of",
    "kind_of",
    "line_of",
    "validated",
    "value_of",
]

_SHOWN_PROBLEMS = 20
_TAG = "tag:yaml.org,2002:"

_Keys = TypeVar("_Keys", bound=BaseModel)


class Problems(list[tuple[int, str]]):
    """What is wrong, with lines counted from 1; 0 is the file as a whole."""

    def add(self, line: int, text: str) -> None:
        self.append((line, text))

    def error(self, path: Path) -> InputError:
        """Return all of it as one error."""
        ordered = sorted(self, key=lambda problem: problem[0])
        shown = [f"line {line}: {text}" if line else text for line, text in ordered[:_SHOWN_PROBLEMS]]
        if more := len(ordered) - len(shown):
            shown.append(f"and {more} more")
        count = f"{len(ordered)} problems: " if len(ordered) > 1 else ""
        return InputError(f"Manifest {str(path)!r}: {count}{'; '.join(shown)}.")


def keys_of(node: MappingNode, problems: Problems, model: type[BaseModel], where: str) -> dict[str, Node]:
    """Return the known keys' values; an unknown or repeated key becomes a problem."""
    known = tuple(model.model_fields)
    lines: dict[str, int] = {}
    values: dict[str, Node] = {}
    for key_node, value in node.value:
        key = key_node.value if isinstance(key_node, ScalarNode) else None
        if key is None:
            problems.add(line_of(key_node), f"a key of {where} must be a word, not {kind_of(key_node)}")
        elif key in lines:
            problems.add(line_of(key_node), f"the key {key!r} is given twice; it stands on line {lines[key]} already")
        else:
            lines[key] = line_of(key_node)
            if is_null(value):
                value.start_mark = key_node.start_mark  # An absent value is marked at the next word of the file.
            if key in known:
                values[key] = value
            else:
                problems.add(line_of(key_node), f"unknown key {key!r} of {where}; {_nearest(key, known)}")
    return values


def value_of(node: Node, problems: Problems, key: str) -> Any:
    """Return a scalar as Python has it; of an id and a revision the text as written.

    A commit may consist of digits, or look like ``12e34``; it is a name all the same.
    """
    if key == "variants" and isinstance(node, SequenceNode):
        return [item.value if isinstance(item, ScalarNode) else item for item in node.value]
    if not isinstance(node, ScalarNode):
        return node
    written: str = node.value
    match str(node.tag).removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return written.lower() == "true"
        case "int" | "float" | "timestamp" if key in ("id", "revision"):
            return written
        case "int":
            try:
                return int(written.replace("_", ""), 0)
            except ValueError:
                return written
        case "float":
            try:
                return float(written.replace("_", ""))
            except ValueError:
                return written
        case _:
            return written


def validated(
    model: type[_Keys], values: Mapping[str, Any], nodes: Mapping[str, Node], problems: Problems
) -> _Keys | None:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = str(item["loc"][0])
            given = values.get(key)
            place = item["loc"][1] if len(item["loc"]) > 1 else None
            if isinstance(given, list) and isinstance(place, int):
                given = given[place]
            shown = kind_of(given) if isinstance(given, Node) else repr(given)
            problems.add(line_of(nodes[key]), f"{key!r} is {shown}: {_expected(key, given, item)}")
        return None


def _expected(key: str, given: object, error: Any) -> str:
    """Return what the key takes, in the manifest's words."""
    match key:
        case "device" | "dtype" | "weights":
            allowed = [member.value for member in {"device": Device, "dtype": Dtype, "weights": Weights}[key]]
            close = get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
            return f"it takes {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "require":
            return "it takes cuda, so that a model fails where there is no GPU, or null"
        case "sort":
            close = get_close_matches(str(given).lower(), [order.value for order in Sort], n=1, cutoff=0.5)
            return f"it takes {', '.join(Sort)}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "limit":
            return "it takes a whole number from 1 to 10000"
        case "author" | "search" | "tag" | "library" if error["type"] == "string_type":
            return "it takes a word as the Hub has it"
        case "variants" if error["type"] != "value_error":
            allowed = [variant.value for variant in Variant]
            close = get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
            return f"it takes a list of {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "opset":
            return f"it takes a whole number from {OLDEST_OPSET}, or null for the newest"
        case "simplify" | "trust_remote_code":
            return "it takes true or false"
        case "id":
            return "it takes org/name, org/name@revision or a folder"
        case "task" if error["type"] == "string_type":
            return "it takes a task's name, such as text-classification"
        case "revision" if error["type"] == "string_type":
            return "it takes a branch, a tag or a commit"
        case _:
            message: str = error["msg"]
            return message.removeprefix("Value error, ")


def _nearest(key: str, known: tuple[str, ...]) -> str:
    if close := get_close_matches(key.lower(), known, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    return f"the keys are {', '.join(known)}"


def line_of(node: Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == f"{_TAG}null"


def kind_of(node: Node) -> str:
    match node:
        case MappingNode():
            return "a mapping"
        case SequenceNode():
            return "a list"
        case ScalarNode() if is_null(node):
            return "nothing"
        case _:
            return f"the text {node.value!r}"
