"""Makes a config smaller: fewer layers, a smaller vocabulary, fewer experts, narrower widths.

Everything that is tied to a width is divided by one number over the whole config, so that what was equal, a product
or a sum of widths stays so: ``hidden_size = heads * head_dim``, the text's width given again in the vision config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from onnx_config.twin.built import MOST_KINDS, numbered
from onnx_config.twin.keys import (
    CHOSEN,
    COUNTED,
    DEPTH,
    DEPTH_FACTOR,
    DEPTHS,
    EXPERT_GROUPS,
    EXPERTS,
    FEATURES,
    GROUPS,
    HEAD_DIM,
    HEADS,
    INDEXES_ONLY,
    INNER_WIDTH,
    LAST_LAYERS,
    LAYER_COUNT,
    LAYER_INDEX,
    NO_DEPTH,
    NO_SCOPE,
    POSITIONS,
    PROTECTED,
    ROPE_FACTORS,
    ROPE_SECTIONS,
    TOKEN_ID,
    VOCABULARY,
    is_heads,
    is_indexes,
    is_width,
)
from onnx_config.twin.values import Values, is_count, is_int, is_ints, mapped, numbers

if TYPE_CHECKING:
    pass

__all__ = ["MOST_PREFIX", "Cutter", "Rung", "prefix"]

MOST_PREFIX = 10
"""Layers kept from the front so that every kind remains; where more are needed, layers are picked instead."""


_SMALL_VOCABULARY = 320
"""Rows of the smallest of the tables that were cut; the next larger one gets 8 more, so that sizes tell them apart."""


_SMALLEST_CUT_VOCABULARY = 4096
"""Smaller tables stay: those of codecs are counted in by the ids of other parts of the model."""


_SMALL_POSITIONS = 512


_SMALLEST_WIDTH = 16


_PER_16_BYTES = 4


_SMALLEST_TIED_WIDTH = 64
"""A value whose key tells nothing is a width where it is at least this, and equal to one."""


_MOST_SPECIAL_IDS = 16
"""Longer lists of ids are no special tokens but what generation suppresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One way of making a config smaller."""

    depth: str
    """``prefix``: the first layers; ``picked``: some of them; ``full``: all."""

    vocabulary: bool = True
    experts: bool = True
    heads: str = "fewer"
    """``fewer``: their number is divided, as far as it goes, before their width; ``kept``: only their width is;
    ``wide``: only their number is, and what is left of the factor is not applied to them."""

    positions: bool = False
    factor: int = 1
    """What widths are divided by."""

    def __str__(self) -> str:
        said = {"prefix": "first layers", "picked": "picked layers", "full": "all layers"}[self.depth]
        parts = [said]
        parts += ["small vocabulary"] if self.vocabulary else []
        parts += ["few experts"] if self.experts else []
        parts += ["few positions"] if self.positions else []
        parts += [f"widths divided by {self.factor}"] if self.factor > 1 else []
        return ", ".join(parts)


def prefix(kinds: tuple[int, ...]) -> int:
    """Return how many of the first layers hold every kind."""
    return kinds.index(max(kinds)) + 1


@dataclass(slots=True)
class _Scope:
    """One config of a composite one: its values, and how its layers were cut."""

    path: tuple[str, ...]
    values: Values
    layers: int | None = None
    """Layers of the full model; ``None`` where this config has no stack of its own."""
    kept: tuple[int, ...] = ()
    """Layers that remain, by their number in the full model."""
    cut: set[str] = field(default_factory=set)
    """Keys of the numbers of layers that were cut."""


class Cutter:
    """Makes the values of a config smaller in place, by one rung."""

    def __init__(self, values: Values, stacks: Mapping[str, tuple[int, ...]], rung: Rung) -> None:
        self._scopes = list(_scopes(values))
        self._stacks = stacks
        self._rung = rung

    def cut(self) -> None:
        if self._rung.depth != "full":
            for scope in self._scopes:
                self._cut_layers(scope)
            for scope in self._scopes:
                self._cut_indexes(scope)
        if self._rung.vocabulary:
            _cut_vocabulary(self._scopes)
        if self._rung.experts:
            for scope in self._scopes:
                _cut_experts(scope.values)
        if self._rung.positions:
            for scope in self._scopes:
                _cap(scope.values, POSITIONS, _SMALL_POSITIONS)
        if self._rung.factor > 1:
            _cut_widths([scope.values for scope in self._scopes], self._rung)

    # Depth

    def _cut_layers(self, scope: _Scope) -> None:
        values = scope.values
        stages = _numbers_of_stages(values)
        if stages:
            scope.kept = _kept_of_stages(values)
        for key, value in values.items():
            if is_ints(value) and DEPTHS.search(key) and not INDEXES_ONLY.search(key):
                scope.layers = scope.layers or sum(value)
                values[key] = [min(v, 2) for v in value]
            elif isinstance(value, float) and DEPTH_FACTOR.search(key):
                values[key] = min(value, 1.0)
        for key in [k for k, v in values.items() if is_count(v) and DEPTH.search(k) and not NO_DEPTH.search(k)]:
            layers = values[key]
            if layers in stages or layers < 3:
                continue
            kept = self._kept(scope, layers)
            values[key] = len(kept)
            scope.cut.add(key)
            if scope.layers is None or layers > scope.layers or key == "num_hidden_layers":
                scope.layers, scope.kept = layers, kept
            self._cut_lists(values, layers, kept)

    def _cut_lists(self, values: Values, layers: int, kept: tuple[int, ...]) -> None:
        for key, value in values.items():
            if not isinstance(value, list) or len(value) != layers or re.search(r"conv|kernel|stride|stage", key):
                continue
            if is_indexes(value, key) and value != list(range(layers)):
                continue
            chosen = [value[i] for i in kept]
            values[key] = list(range(len(kept))) if value == list(range(layers)) else chosen

    def _kept(self, scope: _Scope, layers: int) -> tuple[int, ...]:
        """Return which of ``layers`` layers remain, by number."""
        lists = [
            numbered([repr(v) for v in value])
            for key, value in scope.values.items()
            if isinstance(value, list) and len(value) == layers and not is_indexes(value, key)
        ]
        lists += [kinds for kinds in self._stacks.values() if len(kinds) == layers]
        lists = [kinds for kinds in lists if max(kinds) < MOST_KINDS]
        needed = max([2, *map(prefix, lists), *_features_wanted(scope.values, layers)])
        if self._rung.depth == "prefix":
            return tuple(range(min(needed, layers)))
        firsts = {kinds.index(kind) for kinds in lists for kind in set(kinds)}
        lasts = {layers - 1 - kinds[::-1].index(kind) for kinds in lists for kind in set(kinds)}
        chosen = firsts | {0, layers - 1} | (lasts if len(firsts | lasts) <= MOST_PREFIX else set())
        for number in range(layers):
            if len(chosen) >= min(layers, max(4, *_features_wanted(scope.values, layers), 4)):
                break
            chosen.add(number)
        return tuple(sorted(chosen))

    def _cut_indexes(self, scope: _Scope) -> None:
        """Move the numbers of layers that a config names to layers that remain."""
        layers, kept = scope.layers, scope.kept
        if layers is None:
            inner = [s for s in self._scopes if s.layers and s.path[: len(scope.path)] == scope.path and s.path]
            inner.sort(key=lambda s: not any("vision" in name or "backbone" in name for name in s.path))
            if not inner:
                return
            layers, kept = inner[0].layers, inner[0].kept
        assert layers is not None
        if len(kept) >= layers:
            return
        values = scope.values
        by_stage = _has_stages(values)
        for key, value in list(values.items()):
            if by_stage and FEATURES.search(key):
                continue
            if is_indexes(value, key) and value and max(value) <= layers and value != list(range(len(kept))):
                values[key] = _moved(key, value, layers, kept)
            elif LAYER_INDEX.search(key) and (is_int(value) or is_ints(value)):
                values[key] = mapped(value, partial(_moved_one, layers=layers, kept=kept))
            elif key not in scope.cut and is_count(value) and LAYER_COUNT.search(key) and value <= layers:
                first = layers - value if LAST_LAYERS.search(key) else 0
                values[key] = max(1, sum(first <= number < first + value for number in kept))
        if "stage_names" in values and values.get("out_indices", values.get("_out_indices")):
            _rename_stages(values)


def _numbers_of_stages(values: Values) -> set[int]:
    return {len(v) for k, v in values.items() if DEPTHS.search(k) and is_ints(v)}


def _first_depths(values: Values) -> list[int]:
    return next(v for k, v in values.items() if DEPTHS.search(k) and is_ints(v))


def _kept_of_stages(values: Values) -> tuple[int, ...]:
    """Return which layers remain of stages that are cut to two: the first, and the next that a config names."""
    named = {
        number
        for key, value in values.items()
        if is_indexes(value, key) and not FEATURES.search(key)
        for number in value
    }
    kept: list[int] = []
    start = 0
    for depth in _first_depths(values):
        stage = range(start, start + depth)
        kept += [*stage[:1], *sorted(stage[1:], key=lambda number: number not in named)[:1]]
        start += depth
    return tuple(kept)


def _has_stages(values: Values) -> bool:
    """Return whether features are taken out of stages, all of which remain, rather than out of layers."""
    names = values.get("stage_names")
    # The stem is one of them.
    return isinstance(names, list) and len(names) - 1 in _numbers_of_stages(values)


def _features_wanted(values: Values, layers: int) -> list[int]:
    """Return how many layers hold as many features as are taken out of them."""
    return [
        min(layers, len(value) + 1)
        for key, value in values.items()
        if is_indexes(value, key) and FEATURES.search(key) and value and max(value) <= layers
    ]


def _moved(key: str, indexes: list[int], layers: int, kept: tuple[int, ...]) -> list[int]:
    if not FEATURES.search(key):
        return [new for new, old in enumerate(kept) if old in indexes]
    # As many features as before, from layers spread as before; one past the last is the last one's output.
    moved: list[int] = []
    for position, index in enumerate(indexes):
        if index < 0:
            moved.append(max(index, -len(kept)))
            continue
        highest = len(kept) - (0 if indexes[-1] == layers else 1) - (len(indexes) - 1 - position)
        lowest = moved[-1] + 1 if moved else 0
        moved.append(max(lowest, min(highest, index * len(kept) // layers)))
    return moved


def _moved_one(index: int, layers: int, kept: tuple[int, ...]) -> int:
    if index < 0:
        return max(index, -len(kept))
    if index < len(kept):
        return index
    return len(kept) if index >= layers else len(kept) - 1


def _rename_stages(values: Values) -> None:
    """Drop the names of stages: the config class makes them again, from the depth and the indexes."""
    for key in ("stage_names", "out_features", "_out_features"):
        values.pop(key, None)
    if "_out_indices" in values:
        values["out_indices"] = values.pop("_out_indices")


def _cut_vocabulary(scopes: list[_Scope]) -> None:
    """Make big tables small, each size another one, and move the ids of special tokens into the smallest of them."""
    sizes = sorted(
        {
            v
            for scope in scopes
            for k, v in scope.values.items()
            if VOCABULARY.search(k) and is_count(v) and v > _SMALLEST_CUT_VOCABULARY
        }
    )
    if not sizes or any(isinstance(s.values.get("vocabulary_map"), dict) for s in scopes):
        return
    shared = [scope for scope in scopes if not _has_own_small_vocabulary(scope)]
    ids = {i for scope in shared for _, _, found in _token_ids(scope) for i in found}
    smallest = _SMALL_VOCABULARY
    while len(high := sorted(i for i in ids if i >= smallest - len(ids))) > smallest // 2:
        smallest *= 2
    moved = {old: smallest - len(high) + rank for rank, old in enumerate(high)}
    small = {old: smallest + 8 * rank for rank, old in enumerate(sizes)}
    for scope in scopes:
        if not _has_own_small_vocabulary(scope):
            for key, value, found in list(_token_ids(scope)):
                new = [moved.get(i, i) for i in found]
                scope.values[key] = new if isinstance(value, list) else new[0]
        for key, value in scope.values.items():
            if VOCABULARY.search(key) and is_count(value) and value in small:
                scope.values[key] = small[value]


def _has_own_small_vocabulary(scope: _Scope) -> bool:
    size = scope.values.get("vocab_size")
    return is_count(size) and size <= _SMALLEST_CUT_VOCABULARY


def _token_ids(scope: _Scope) -> Iterator[tuple[str, object, list[int]]]:
    for key, value in scope.values.items():
        if not TOKEN_ID.search(key):
            continue
        if is_int(value) and value >= 0:
            yield key, value, [value]
        elif is_ints(value) and 0 < len(value) <= _MOST_SPECIAL_IDS:
            yield key, value, list(value)


def _cap(values: Values, pattern: re.Pattern[str], most: int) -> None:
    for key, value in values.items():
        if pattern.search(key) and is_count(value):
            values[key] = min(value, most)


def _cut_experts(values: Values) -> None:
    """Keep enough experts for a choice among them, and for every group of them."""
    counts = {k: v for k, v in values.items() if EXPERTS.search(k) and is_count(v) and v > 4}
    if not counts:
        return
    groups = max((v for k, v in values.items() if EXPERT_GROUPS.search(k) and is_count(v)), default=1)
    chosen_keys = [k for k, v in values.items() if CHOSEN.search(k) and (is_count(v) or is_ints(v))]
    for key in chosen_keys:
        value = values[key]
        values[key] = [min(v, 2) for v in value] if isinstance(value, list) else min(value, 2)
    for key, count in counts.items():
        values[key] = min(count, max(4, 2 * groups))


def _cut_widths(scopes: list[Values], rung: Rung) -> None:
    """Divide everything that is as wide as something else by one number over all scopes."""
    factor = rung.factor
    strong = {v for values in scopes for k, value in values.items() if is_width(k) for v in numbers(value)}
    strong = {v for v in strong if v >= _SMALLEST_TIED_WIDTH}
    for values in scopes:
        fewer = 1 if rung.heads == "kept" else _head_factor(values, factor, least=1 if rung.heads == "wide" else 2)
        narrower = 1 if rung.heads == "wide" else factor // fewer
        for key, value in values.items():
            if HEAD_DIM.search(key):
                values[key] = mapped(value, partial(_divided, factor=narrower))
            elif HEADS.search(key):
                values[key] = mapped(value, partial(_divided_exactly, factor=fewer))
            elif is_width(key):
                divided = _divided_evenly if INNER_WIDTH.search(key) else _divided
                values[key] = mapped(value, partial(divided, factor=factor))
            elif key.startswith("rope_") and isinstance(value, dict):
                values[key] = _narrow_rope(value, narrower)
            elif not PROTECTED.search(key) and not COUNTED.search(key):
                values[key] = mapped(value, partial(_divided, factor=factor, among=frozenset(strong)))


def _head_factor(values: Values, most: int, *, least: int) -> int:
    """Return what all numbers of heads of a config can be divided by: the ratios stay, and ``least`` heads of each."""
    counts = [v for key, value in values.items() if is_heads(key) for v in numbers(value) if v > 0]
    if not counts or min(counts) == 1:
        return 1
    groups = [values[k] for k in values if GROUPS.search(k) and is_count(values[k])]
    factor = 1
    while (
        factor * 2 <= most
        and all(count % (factor * 2) == 0 for count in counts)
        and min(counts) // (factor * 2) >= least
        and all(count // (factor * 2) % group == 0 for group in groups for count in counts if count % group == 0)
    ):
        factor *= 2
    return factor


def _divided_exactly(value: int, *, factor: int) -> int:
    return value if value % factor else value // factor


def _divided(value: int, *, factor: int, among: frozenset[int] | None = None) -> int:
    if value < _SMALLEST_WIDTH or factor == 1 or (among is not None and value not in among):
        return value
    if value % factor == 0:
        return value // factor
    # Not tied to anything that divides: as even as it was, for what is split in halves.
    step = math.gcd(value, 8)
    return -(-value // (factor * step)) * step


def _divided_evenly(value: int, *, factor: int) -> int:
    # Products over groups of tokens, as experts have them, take rows of whole 16 bytes only: four numbers of float32.
    divided = _divided(value, factor=factor)
    return divided if value % _PER_16_BYTES else -(-divided // _PER_16_BYTES) * _PER_16_BYTES


def _narrow_rope(rope: Values, narrower: int) -> Values:
    """Return rotary settings for heads ``narrower`` times as narrow: only what is counted in pairs of channels."""
    narrowed: Values = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            narrowed[key] = _narrow_rope(value, narrower)
        elif ROPE_SECTIONS.search(key) and is_ints(value):
            narrowed[key] = _narrow_sections(value, narrower)
        elif ROPE_FACTORS.search(key) and isinstance(value, list):
            narrowed[key] = value[: max(1, len(value) // narrower)]
        else:
            narrowed[key] = value
    return narrowed


def _narrow_sections(sections: list[int], narrower: int) -> list[int]:
    """Return sections with a ``narrower``-th of the sum; what does not divide goes to the one that has no equal."""
    narrowed = [v // narrower for v in sections]
    alone = next((i for i, v in enumerate(sections) if sections.count(v) == 1), 0)
    narrowed[alone] += sum(sections) // narrower - sum(narrowed)
    return narrowed


def _scopes(values: Values, path: tuple[str, ...] = ()) -> Iterator[_Scope]:
    """Yield a config and the configs in it; dictionaries that are no configs (labels, rotary settings) left out."""
    yield _Scope(path, values)
    for key, value in values.items():
        if isinstance(value, dict) and not NO_SCOPE.search(key) and all(isinstance(name, str) for name in value):
            yield from _scopes(value, (*path, key))
