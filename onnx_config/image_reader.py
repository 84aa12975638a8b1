"""What makes features of images for a model whose text can be converted without images only.

How many features an image has may depend on the values of its inputs: on how large a picture was that came as tiles,
or on which tiles there are at all. No one graph of the forward pass holds that, and so it is one of the text alone.
The features can still be had of a graph of their own, and take the places of a token in the text. Which inputs the
model makes them of is proposed by what its ``get_image_features`` takes, and shown by the small model: it returns
features as wide as a token's embedding, and a text takes as many as it has places, and no other number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.config_sizes import config_size, embedding_size, image_size, modality_of, sub_configs
from onnx_config.declarations import Role as ArgumentRole
from onnx_config.draft import GEOMETRY, Draft
from onnx_config.illustrated import illustrated_texts
from onnx_config.input_generator import Array, generate_inputs
from onnx_config.input_lessons import TEXT_ONLY
from onnx_config.spec import ImageReader, ModelSpec, PictureRule, TensorSpec, ValueRule
from onnx_config.tile_models import IMAGE, Arrangement, features_method, packing_of, takes_sizes
from onnx_config.value_lessons import placeholder_ids

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration
    from onnx_config.settlement import Settled
    from onnx_config.trial import Trial

__all__ = ["FoundImages", "find_images", "with_images"]

_ROWS, _PICTURES, _TILES, _MEMBERS = "batch_size", "image_batch_size", "num_tiles", "num_images"
_SAMPLES = "text_batch_size"
_SHARES = "batch_num_images"
_IMAGES_OF_A_ROW = 3
_USUAL_TILES = 5
_SIDES = ("height", "width")
_COLOURS = 3
_BLOCKS = 6
_LEAST_BLOCKS = 2
_WORDS = 5
_SEED = 3
_MOST_PICTURES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundImages:
    """What a model makes features of images of."""

    inputs: tuple[TensorSpec, ...]
    token: int
    """Id of the token in whose places they go."""
    axis_ranges: Mapping[str, tuple[int, int | None]]
    sizes: Mapping[str, int]
    axis_steps: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, ValueRule] = field(default_factory=dict)


def find_images(
    declaration: Declaration, config: Any, settled: Settled, flags: Mapping[str, Any]
) -> FoundImages | None:
    """Return what a model makes features of images of, where its settled inputs are text only; ``None``: nothing known.

    Args:
        declaration: What its class declares.
        config: The full model's config.
        settled: What was found out about it, and its small model.
        flags: Keyword arguments of ``forward`` beside the inputs.
    """
    trial, twin = settled.trial, settled.twin
    names = {tensor.name for tensor in settled.inference.inputs}
    # Images as they are, side by side, are better read one at a time where that can be at their own size.
    if trial is None or twin is None or names - {IMAGE} != {"input_ids", "attention_mask"}:
        return None
    if features_method(trial.model) is None or not getattr(trial.model, "can_generate", lambda: False)():
        return None
    for arrangement, sides in _proposals(declaration, trial.model):
        if IMAGE in names and arrangement is not Arrangement.ALONE:
            continue
        small = _inputs(arrangement, sides, declaration, twin.config, packing_of(trial.model))
        if small is None:
            continue
        subject = _Subject(trial, twin.config, declaration, settled, flags, arrangement)
        proven = subject.proven(small)
        if proven is None:
            continue
        step, place = proven
        packing = packing_of(settled.shallow().model) if settled.shallow is not None else packing_of(trial.model)
        full = _inputs(arrangement, sides, declaration, config, packing)
        tokens = placeholder_ids(config, "image")
        if full is None or place >= len(tokens):
            return None
        # Steps of whole blocks are those of the full model's blocks.
        step = step if step in (None, 1) else _block(config)
        return replace(_with_sides(full, step, config), token=tokens[place])
    return None


def with_images(spec: ModelSpec, found: FoundImages | None) -> ModelSpec:
    """Return the spec of a model with what makes features of its images."""
    if found is None or spec.embedding_size is None:
        return spec
    features = TensorSpec(name="image_features", dtype="float32", shape=("image_features_count", spec.embedding_size))
    encoder = replace(
        spec,
        part="vision_encoder",
        inputs=found.inputs,
        outputs=(features,),
        axis_ranges=found.axis_ranges,
        sizes=found.sizes,
        axis_steps=found.axis_steps,
        values=found.values,
        cache=(),
        step_axis=None,
        images=None,
    )
    names = ", ".join(tensor.name for tensor in found.inputs)
    told = f"{names} make features of images, which take the places of token {found.token} in a text"
    # What was shown of images is of those of one size, side by side.
    takes_images = any(tensor.name == IMAGE for tensor in spec.inputs)
    left_out = spec.proven if takes_images else tuple(n for n in spec.assumed if n.startswith(TEXT_ONLY))
    shown = tuple(note for note in spec.proven if note not in left_out)
    assumed = tuple(note for note in spec.assumed if note not in left_out)
    reader = ImageReader(encoder=encoder, token=found.token, left_out="; ".join(left_out) or TEXT_ONLY)
    return replace(spec, images=reader, assumed=assumed, proven=(*shown, told))


def _proposals(declaration: Declaration, model: Any) -> Iterator[tuple[Arrangement, tuple[str, ...]]]:
    """Yield how images may be given, with what is given beside them."""
    import inspect

    data = {a.name for a in declaration.arguments if a.role is ArgumentRole.DATA}
    taken = [name for name in inspect.signature(features_method(model)).parameters if name in data]
    if IMAGE not in taken and not (declaration.argument(IMAGE) and IMAGE in data):
        return
    sizes = takes_sizes(model)
    if sizes is None:
        masks = tuple(name for name in taken if name.endswith("mask") and modality_of(name) == "image")
        yield Arrangement.TILES, masks
        return
    if packing_of(model) is not None:
        yield Arrangement.SIZED_TILES, (sizes, *(name for name in taken if name == _SHARES))
    yield Arrangement.ALONE, ()


def _inputs(
    arrangement: Arrangement, sides: Sequence[str], declaration: Declaration, config: Any, packing: Any
) -> FoundImages | None:
    """Return the inputs of an arrangement at the sizes that a config declares; ``None``: it does not."""
    size = image_size(config)
    if size is None:
        return None
    channels = config_size(config, "num_channels", "image") or _COLOURS
    dtypes = {name: Draft(declaration, config, [name]).specs[name].dtype for name in sides}
    if arrangement is Arrangement.TILES:
        shape: tuple[int | str, ...] = (_ROWS, _MEMBERS, channels, *size)
        inputs = {IMAGE: shape, **dict.fromkeys(sides, (_ROWS, _MEMBERS, *size))}
        return FoundImages(
            inputs=_specs(inputs, dtypes, declaration),
            token=-1,
            axis_ranges={_ROWS: (1, None), _MEMBERS: (1, None)},
            sizes={_ROWS: 2, _MEMBERS: _IMAGES_OF_A_ROW},
            values={IMAGE: ValueRule(blanks=True)},
        )
    if arrangement is Arrangement.ALONE:
        step = _block(config)
        if step is None:
            return None
        return FoundImages(
            inputs=_specs({IMAGE: (1, channels, *_SIDES)}, dtypes, declaration),
            token=-1,
            **_sides(step, step),
        )
    if packing is None:
        return None
    pictures = _pictures(packing)
    tiles = sorted({count for _, _, count in pictures})
    usual = max((count for count in tiles if count <= _USUAL_TILES), default=tiles[0])
    shapes: dict[str, tuple[int | str, ...]] = {IMAGE: (_PICTURES, _TILES, channels, *size)}
    values = {}
    ranges: dict[str, tuple[int, int | None]] = {_PICTURES: (1, None), _TILES: (tiles[0], None)}
    sizes = {_PICTURES: 2, _TILES: max(usual, 2)}
    for name in sides:
        if GEOMETRY.search(name):
            shapes[name] = (_PICTURES, 2)
            values[name] = ValueRule(pictures=PictureRule(sizes=pictures, tiles=_TILES))
        else:
            shapes[name] = (_SAMPLES,)
            values[name] = ValueRule(shares=_PICTURES)
            ranges[_SAMPLES], sizes[_SAMPLES] = (1, None), 2
    return FoundImages(
        inputs=_specs(shapes, dtypes, declaration), token=-1, axis_ranges=ranges, sizes=sizes, values=values
    )


def _specs(
    shapes: Mapping[str, tuple[int | str, ...]], dtypes: Mapping[str, str], declaration: Declaration
) -> tuple[TensorSpec, ...]:
    """Return inputs in the order of ``forward``."""
    order = [argument.name for argument in declaration.arguments]
    specs = [TensorSpec(name=n, dtype=dtypes.get(n, "float32"), shape=shape) for n, shape in shapes.items()]
    return tuple(sorted(specs, key=lambda spec: order.index(spec.name)))


def _block(config: Any) -> int | None:
    """Return the edge in pixels of what becomes one feature; ``None`` where the config does not say."""
    edge = config_size(config, "patch_size", "image")
    if edge is None:
        return None
    merged = (getattr(part, "spatial_merge_size", None) for part in sub_configs(config))
    return edge * next((m for m in merged if isinstance(m, int) and m > 0), 1)


def _pictures(packing: Any) -> tuple[tuple[int, int, int], ...]:
    """Return sizes of pictures of several kinds, with the number of tiles that each becomes."""
    from transformers.image_processing_utils import select_best_resolution

    resolutions = [list(pair) for pair in packing.resolutions]
    # Spread over those that there are, from the smallest to the largest.
    spread = sorted(packing.resolutions, key=lambda pair: pair[0] * pair[1])
    spread = spread[:: max(1, len(spread) * 4 // _MOST_PICTURES)]
    wanted = [
        size
        for height, width in spread
        for size in ((height, width), (height * 2 // 3, width), (height, width * 3 // 5), (height * 2 + 1, width + 3))
    ]
    wanted += [(packing.tile // 3 + 1, packing.tile), (packing.tile, packing.tile // 4 + 1)]
    found = []
    for height, width in dict.fromkeys(wanted):
        best = select_best_resolution((height, width), resolutions)
        if best is not None and height > 0 and width > 0:
            found.append((height, width, (best[0] // packing.tile) * (best[1] // packing.tile) + 1))
    return tuple(found)


def _with_sides(found: FoundImages, step: int | None, config: Any) -> FoundImages:
    """Return the inputs with the sides of images free, in steps of so many; ``None``: they stay."""
    edge = _block(config)
    if step is None or edge is None:
        return found
    inputs = tuple(
        replace(tensor, shape=(*tensor.shape[:-2], *_SIDES))
        if len(tensor.shape) >= len(("rows", "images", *_SIDES))
        else tensor
        for tensor in found.inputs
    )
    sides = _sides(edge, step)
    return replace(
        found,
        inputs=inputs,
        sizes={**found.sizes, **sides["sizes"]},
        axis_ranges={**found.axis_ranges, **sides["axis_ranges"]},
        axis_steps=sides["axis_steps"],
    )


def _sides(edge: int, step: int) -> dict[str, Any]:
    """Return sizes, ranges and steps of the sides of images, which are cut into blocks of so many pixels."""
    return {
        # Neither as high as wide, nor a multiple of the other.
        "sizes": dict(zip(_SIDES, (_BLOCKS * edge, (_BLOCKS + 1) * edge), strict=True)),
        "axis_ranges": dict.fromkeys(_SIDES, (edge * _LEAST_BLOCKS, None)),
        "axis_steps": dict.fromkeys(_SIDES, step) if step > 1 else {},
    }


@dataclass(frozen=True, slots=True)
class _Subject:
    """A small model that is asked what it makes of images."""

    trial: Trial
    config: Any
    declaration: Declaration
    settled: Settled
    flags: Mapping[str, Any]
    arrangement: Arrangement

    def proven(self, inputs: FoundImages) -> tuple[int | None, int] | None:
        """Return in which steps the sides of images are free, and which of the tokens stands for features.

        ``None`` where the model does not take these inputs, or not in a text.
        """
        sides = self._free_sides(inputs) if self.arrangement is Arrangement.TILES else None
        inputs = _with_sides(inputs, sides, self.config)
        # As few tiles as a picture can have tell as much as many.
        arrays = self._arrays(inputs, {**inputs.sizes, _TILES: inputs.axis_ranges.get(_TILES, (1, None))[0]})
        counts = self._counts(arrays)
        if not counts or (self.arrangement is Arrangement.TILES and not _drops_blanks(counts)):
            return None
        if self.arrangement is Arrangement.ALONE:
            if not self._is_alone(inputs):
                return None
        elif not self._ones_are_none(inputs, arrays):
            return None
        place = self._place(arrays, counts)
        return None if place is None else (sides, place)

    def _arrays(self, inputs: FoundImages, sizes: Mapping[str, int]) -> dict[str, Array]:
        return generate_inputs(inputs.inputs, self.config, self.declaration, sizes, rules=inputs.values, seed=_SEED)

    def _features(self, arrays: Mapping[str, Array]) -> list[Array] | None:
        """Return the features (count, width) of each image or row; ``None``: the model refuses, or they do not fit."""
        given = dict(arrays)
        if self.arrangement is Arrangement.ALONE and (name := takes_sizes(self.trial.model)) not in given:
            assert name is not None
            given[name] = np.array([arrays[IMAGE].shape[-2:]], np.int64)
        features = self.trial.features(given)
        width = embedding_size(self.config)
        if not features or any(part.ndim != 2 or part.shape[-1] != width for part in features):
            return None
        return features if all(np.isfinite(part).all() for part in features) else None

    def _counts(self, arrays: Mapping[str, Array]) -> list[int]:
        return [len(part) for part in self._features(arrays) or ()]

    def _ones_are_none(self, inputs: FoundImages, arrays: Mapping[str, Array]) -> bool:
        """Return whether what is optional and left out is taken for all ones."""
        optional = {a.name for a in self.declaration.arguments if not a.required}
        sides = [
            s.name for s in inputs.inputs if s.name != IMAGE and s.name in optional and not GEOMETRY.search(s.name)
        ]
        if not sides:
            return True
        given = {name: np.ones_like(array) if name in sides else array for name, array in arrays.items()}
        with_ones = self._features(given)
        without = self._features({name: array for name, array in given.items() if name not in sides})
        return _same(with_ones, without)

    def _is_alone(self, inputs: FoundImages) -> bool:
        """Return whether an image among others, in the corner of a larger one, is what it is alone."""
        name = takes_sizes(self.trial.model)
        assert name is not None
        step = inputs.axis_steps[_SIDES[0]]
        small, large = (self._arrays(inputs, dict.fromkeys(_SIDES, edge * step))[IMAGE] for edge in (3, 4))
        small = small[..., : 2 * step, :]
        both = np.zeros((2, *large.shape[1:]), large.dtype)
        both[0], both[1, :, : small.shape[-2], : small.shape[-1]] = large[0], small[0]
        sizes = np.array([large.shape[-2:], small.shape[-2:]], np.int64)
        together = self._features({IMAGE: both, name: sizes})
        alone = [self._features({IMAGE: image}) for image in (large, small)]
        return None not in alone and _same(together, [part for parts in alone for part in parts or ()])

    def _free_sides(self, inputs: FoundImages) -> int | None:
        """Return in which steps either side of images is free; ``None``: they are fixed."""
        edge = _block(self.config)
        if edge is None:
            return None
        free = _with_sides(inputs, edge, self.config)

        def accepted(by: int) -> bool:
            return bool(self._counts(self._arrays(free, {**free.sizes, "height": free.sizes["height"] + by})))

        if not accepted(0):
            return None
        return 1 if accepted(1) else edge

    def _place(self, arrays: Mapping[str, Array], counts: Sequence[int]) -> int | None:
        """Return which of the ids that may stand for images does: a text takes as many as there are features only."""
        mask = next(t.dtype for t in self.settled.inference.inputs if t.name == "attention_mask")
        given = dict(arrays)
        if self.arrangement is Arrangement.ALONE and (name := takes_sizes(self.trial.model)) is not None:
            given[name] = np.array([arrays[IMAGE].shape[-2:]], np.int64)
        for number, token in enumerate(placeholder_ids(self.config, "image")):

            def answer(counts: Sequence[int], token: int = token) -> Any:
                text = illustrated_texts(
                    counts, token, config=self.config, declaration=self.declaration, words=_WORDS, seed=_SEED, mask=mask
                )
                return self.trial.run({**text, **given}, **self.flags)

            if answer(counts).outputs is None:
                continue
            if answer([counts[0] - 1, *counts[1:]]).outputs is None:
                return number
        return None


def _drops_blanks(counts: Sequence[int]) -> bool:
    """Return whether what is all zeros has no features, in the second row of two."""
    return len(counts) == 2 and counts[1] * _IMAGES_OF_A_ROW == counts[0] * (_IMAGES_OF_A_ROW - 1)


def _same(one: Sequence[Array] | None, other: Sequence[Array] | None) -> bool:
    if one is None or other is None or sum(map(len, one)) != sum(map(len, other)):
        return False
    return bool(np.allclose(np.concatenate(one), np.concatenate(other), rtol=1e-3, atol=1e-4))
