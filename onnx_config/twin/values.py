"""Values of a config as nested dicts and lists: which are counts, and how two configs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    pass

__all__ = ["Values", "differences", "is_count", "is_int", "is_ints", "mapped", "numbers", "pairs"]

Values = dict[str, Any]


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    return is_int(value) and value > 0


def is_ints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(is_int(v) for v in value)


def numbers(value: object) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif is_int(value):
        yield value


def mapped(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if is_int(value):
        return change(value)
    return value


def differences(full: Any, small: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(full, dict) and isinstance(small, dict):
        for key in sorted(full.keys() | small.keys(), key=str):
            yield from differences(full.get(key), small.get(key), f"{path}.{key}" if path else str(key))
    elif full != small:
        yield path, (full, small)


def pairs(full: object, small: object) -> Iterator[tuple[int, int]]:
    """Yield the changed integers of one value, item by item where it is a list that kept its length."""
    if isinstance(full, list) and isinstance(small, list) and len(full) == len(small):
        for old, new in zip(full, small, strict=True):
            yield from pairs(old, new)
    elif isinstance(full, int) and isinstance(small, int) and full != small:
        yield full, small
