"""What a model's graph takes and gives: plain values, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from onnx_config.errors import ModelError

__all__ = [
    "DecoderCall",
    "GridRule",
    "ImageReader",
    "LayeredFeatures",
    "ModelSpec",
    "PictureRule",
    "PlacesRule",
    "TensorSpec",
    "ValueRule",
    "axes_of",
    "base_axis",
    "is_past",
    "is_sum",
    "size_of",
]

_FORMULA = re.compile(r"(\d+)\*(\w+)")
_PLUS = " + "


def base_axis(axis: str) -> str:
    """Return the axis that a size is a multiple of; a plain axis is returned as it is.

    >>> base_axis("4*batch_size"), base_axis("height")
    ('batch_size', 'height')
    """
    found = _FORMULA.fullmatch(axis)
    return found[2] if found else axis


def is_past(name: str) -> bool:
    """Return whether an input is a part of the cache.

    >>> is_past("past_key_values.0.key"), is_past("past_values")
    (True, False)
    """
    return name.startswith("past_key_values.")


def is_sum(axis: str) -> bool:
    """Return whether a size is made of several axes, such as ``"past_sequence_length + sequence_length"``."""
    return _PLUS in axis


def axes_of(axis: str) -> tuple[str, ...]:
    """Return the axes that a size is made of.

    >>> axes_of("past_sequence_length + sequence_length"), axes_of("4*batch_size")
    (('past_sequence_length', 'sequence_length'), ('batch_size',))
    """
    return tuple(base_axis(term) for term in axis.split(_PLUS))


def size_of(axis: int | str, sizes: Mapping[str, int]) -> int:
    """Return the size of an axis, which is fixed, named, a multiple of a named one, or a sum of such.

    >>> size_of("4*batch_size", {"batch_size": 3})
    12
    >>> size_of("past_sequence_length + sequence_length", {"past_sequence_length": 8, "sequence_length": 3})
    11

    Raises:
        KeyError: If ``sizes`` lacks the axis.
    """
    if isinstance(axis, int):
        return axis
    if axis not in sizes and _PLUS in axis:
        return sum(size_of(term, sizes) for term in axis.split(_PLUS))
    found = _FORMULA.fullmatch(axis)
    return int(found[1]) * sizes[found[2]] if found else sizes[axis]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One graph input or output: its name, element type and size.

    >>> ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", 16))
    >>> ids.resolve({"batch_size": 2})
    (2, 16)
    """

    name: str
    """Name in the ONNX graph; unique among a model's inputs, or among its outputs."""

    dtype: str
    """NumPy name of one element's type, e.g. ``"int64"``."""

    shape: tuple[int | str, ...]
    """Axis sizes in elements, outermost first; ``()`` is a scalar. An ``int`` is fixed at
    export; a ``str`` names a dynamic axis, one name being one size throughout a model. An input's
    axis may also be a multiple of another one, such as ``"4*batch_size"``, or a sum, such as
    ``"past_sequence_length + sequence_length"``."""

    @property
    def axes(self) -> dict[int, str]:
        """The dynamic axes: position -> name."""
        return {i: size for i, size in enumerate(self.shape) if isinstance(size, str)}

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The names of the dynamic axes, each once; of multiples and sums, the names of what they are made of."""
        return tuple(dict.fromkeys(name for axis in self.axes.values() for name in axes_of(axis)))

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with each dynamic axis looked up in ``sizes``.

        Raises:
            ModelError: If ``sizes`` lacks a dynamic axis.
        """
        if missing := sorted(set(self.axis_names) - sizes.keys()):
            raise ModelError(f"{self.name}: no size for {missing}; sizes given for {sorted(sizes)}")
        return tuple(size_of(d, sizes) for d in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRule:
    """Of an input that says how many rows and columns of patches each image has: which patches these are."""

    patches: int | str
    """Axis of the patches, or their fixed number."""

    step: int = 1
    """What rows and columns are multiples of."""

    packed: bool = True
    """Whether the patches of all images lie one after another; else each image has room for as many as the axis is
    long."""

    frames: bool = False
    """Whether some images may have more than one frame."""

    def least(self, images: int) -> int:
        """Return how many patches there are at least in so many images."""
        return self.step**2 * (images if self.packed else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacesRule:
    """Of a text's ids: which token stands for each block of patches of images whose grids are told."""

    token: int
    """Id of the token."""

    grid: str
    """Input that says how the patches lie in each image."""

    edges: str | None = None
    """Input that says how long the edge of a block is in each image; ``None``: as the grid's rule has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRule:
    """Of an input that says how high and wide pictures were before they were cut into tiles: which sizes these are."""

    sizes: tuple[tuple[int, int, int], ...]
    """(height, width, number of tiles that such a picture becomes)."""

    tiles: int | str
    """Axis of the tiles of one picture, or their fixed number; there may be more than a picture has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRule:
    """What the values of an input must be, beyond what its name and the config say."""

    below: int | None = None
    """Exclusive upper bound of values, none of which is negative; ``None``: as declared."""

    ones: int | None = None
    """How many elements of each row are one, from the second on; the others are zero. ``None``: as ever."""

    sizes: tuple[int | str, ...] = ()
    """What each row (along the last axis) holds: numbers, or axes whose sizes they are. One alone fills all."""

    tokens: tuple[tuple[int, int, str | None], ...] = ()
    """(token id, how often it stands in each row, the axis that it stands so often for each of, or ``None``):
    placeholders of images or sounds in a text."""

    grid: GridRule | None = None
    """How its rows say which patches images have; ``None``: it says nothing of the kind."""

    choices: tuple[int, ...] = ()
    """Values of which each row has another one; empty: as ever."""

    pictures: PictureRule | None = None
    """Which sizes its rows tell of pictures; ``None``: it tells nothing of the kind."""

    shares: int | str | None = None
    """Axis, or number, whose size all values together are: how many of its members belong to each row; ``None``: as
    ever."""

    blanks: bool = False
    """Whether the last member along the second axis is all zeros in every other row: a place that nothing fills."""

    places: PlacesRule | None = None
    """Which of its tokens stand for images whose grids are told; ``None``: none do."""

    marks: bool = False
    """Whether it is one where a token of the text beside it stands for an image, and zero elsewhere."""

    @property
    def stand_ins(self) -> tuple[int, ...]:
        """The tokens that stand for images or sounds."""
        return (*(token for token, _, _ in self.tokens), *(() if self.places is None else (self.places.token,)))

    def placeholders(self, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
        """Return (token id, how often it stands in each row) at ``sizes``."""
        return [(token, count * (sizes[axis] if axis else 1)) for token, count, axis in self.tokens]

    def to_json(self) -> dict[str, Any]:
        """Return the rule as JSON types; `from_json` reads it back."""
        tokens = [list(token) for token in self.tokens]
        more: dict[str, Any] = {} if self.grid is None else {"grid": asdict(self.grid)}
        more |= {"choices": list(self.choices)} if self.choices else {}
        more |= {} if self.places is None else {"places": asdict(self.places)}
        more |= {"marks": True} if self.marks else {}
        if self.pictures is not None:
            more["pictures"] = {"sizes": [list(s) for s in self.pictures.sizes], "tiles": self.pictures.tiles}
        more |= {} if self.shares is None else {"shares": self.shares}
        more |= {"blanks": True} if self.blanks else {}
        return {"below": self.below, "ones": self.ones, "sizes": list(self.sizes), "tokens": tokens, **more}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ValueRule:
        """Read what `to_json` wrote."""
        tokens = tuple((int(token), int(count), axis) for token, count, axis in value["tokens"])
        grid = GridRule(**value["grid"]) if "grid" in value else None
        told = value.get("pictures")
        return cls(
            below=value["below"],
            ones=value["ones"],
            sizes=tuple(value["sizes"]),
            tokens=tokens,
            grid=grid,
            choices=tuple(value.get("choices", ())),
            places=PlacesRule(**value["places"]) if "places" in value else None,
            marks=bool(value.get("marks", False)),
            pictures=None
            if told is None
            else PictureRule(sizes=tuple((h, w, n) for h, w, n in told["sizes"]), tiles=told["tiles"]),
            shares=value.get("shares"),
            blanks=bool(value.get("blanks")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredFeatures:
    """Further features of images, which a decoder adds to what its first layers give, at the tokens of the images."""

    field: str
    """What the encoder's output calls them; a list, one for each layer."""

    argument: str
    """What the decoder's argument is called that takes them."""

    mask: str
    """What the decoder's argument is called that says which tokens stand for images."""

    count: int
    """For how many layers there are some."""

    @property
    def made(self) -> tuple[str, ...]:
        """The names of the encoder's outputs."""
        return tuple(f"{self.field}.{number}" for number in range(self.count))

    @property
    def taken(self) -> tuple[str, ...]:
        """The names of the decoder's inputs, which hold some for each token, zeros where none stands for an image."""
        return tuple(f"{self.argument}.{number}" for number in range(self.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCall:
    """How a decoder is called for a text with images."""

    position_rows: int | None = None
    """How many positions each token of the text is given, such as frame, row and column; ``None``: one, or none, or it
    was not seen."""

    handed: tuple[str, ...] = ()
    """Tensors that it is given of the images beside the embeddings of the text, by its own names: neither a mask, nor
    positions, nor its cache, nor ``layered``."""

    layered: LayeredFeatures | None = None
    """Features of the images that it adds in its layers; ``None``: it adds none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReader:
    """What makes features of images for a text, where the graph of the text alone does without images."""

    encoder: ModelSpec
    """What it takes, and the features that it gives, one after another."""

    token: int
    """Id of the token whose places in a text the features take."""

    left_out: str
    """What is to be said of the text alone, where the graphs are not converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What `UniversalOnnxConfig` found out about a model from its config alone."""

    model_type: str
    """transformers' name of the architecture, e.g. ``"bert"``."""

    task: str
    """Task in the names of ``transformers.pipeline`` and optimum, e.g. ``"text-classification"``."""

    task_family: str
    """The group of tasks that share inputs and checks; equal to ``task`` for most."""

    architecture: str
    """Name of the transformers class that is converted, e.g. ``"BertModel"``."""

    inputs: tuple[TensorSpec, ...]
    """Graph inputs in the order of ``forward``'s parameters."""

    outputs: tuple[TensorSpec, ...]
    """Graph outputs in the order of the output class's fields. An axis that nothing declares is
    named after its output and position; the export knows better."""

    axis_ranges: Mapping[str, tuple[int, int | None]]
    """Dynamic axis -> smallest and largest size that the config allows; ``None``: no limit known."""

    sizes: Mapping[str, int]
    """Dynamic axis -> the size at which dummy inputs are made and the graph is traced."""

    preprocessor: str | None
    """Class name of the tokenizer, image processor, feature extractor or processor that the model
    type is used with; ``None`` where transformers declares none."""

    parameters: int | None
    """Number of parameters by the config, counted on the meta device; ``None`` if not counted."""

    part: str = "model"
    """What of the model its graph computes, by the role that a report names; ``"model"``: all of it."""

    cache: tuple[TensorSpec, ...] = ()
    """What the model keeps from step to step when its cache is on, as inputs of a graph that continues
    (``past_key_values.0.key``, …); empty where it keeps nothing, or was not asked."""

    step_axis: str | None = None
    """Dynamic axis by which the cache grows with each call; ``None``: none is seen to."""

    embedding_size: int | None = None
    """How many numbers stand for one token of a text where the model reads it; ``None``: it reads none, or the config
    does not say."""

    embeddings: tuple[TensorSpec, ...] = ()
    """What the model makes of an image before it is asked about it, in the place of which it can be given; empty where
    it makes nothing of the kind."""

    boxes: tuple[TensorSpec, ...] = ()
    """What it may be asked about beside points, and without any; empty where it is asked about points only, or about
    none."""

    images: ImageReader | None = None
    """What makes features of images for a text whose own inputs are text only; ``None``: nothing that is known, or the
    inputs hold images."""

    takes_positions: bool = False
    """Whether ``forward`` takes ``position_ids``."""

    decoder_call: DecoderCall = DecoderCall()
    """How its decoder is called for a text with images."""

    axis_steps: Mapping[str, int] = field(default_factory=dict)
    """Dynamic axis -> what its size must be a multiple of, where that is more than one."""

    values: Mapping[str, ValueRule] = field(default_factory=dict)
    """Input name -> what its values must be, where that had to be found out."""

    code_sha256: str | None = None
    """What `onnx_config.remote_code.code_sha256` says of the model's own code, which ran; ``None``: none did."""

    declared: tuple[str, ...] = ()
    """How task and class were found, and what their declarations say; a phrase each."""

    proven: tuple[str, ...] = ()
    """What a run of the class showed."""

    assumed: tuple[str, ...] = ()
    """What could neither be read nor be shown."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a report should know: whose code ran, what runs showed, and what was assumed."""
        own = () if self.code_sha256 is None else (f"code of the model's own ran, SHA-256 {self.code_sha256}",)
        return (*own, *self.proven, *self.assumed)

    @property
    def continues(self) -> bool:
        """Whether the graph takes a cache and gives it back."""
        return any(is_past(tensor.name) for tensor in self.inputs)

    @property
    def states(self) -> tuple[TensorSpec, ...]:
        """Inputs that hold what the model keeps of a text in a fixed size, rather than for each of its steps."""
        # All else of a cache has an axis of its own for the steps; what an encoder gave may be of one size always.
        return tuple(
            t
            for t in self.inputs
            if is_past(t.name) and ".encoder." not in t.name and all(isinstance(size, int) for size in t.shape[1:])
        )

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the weights as float32; ``None`` where the parameters were not counted."""
        return None if self.parameters is None else 4 * self.parameters

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON types; `from_json` reads it back."""
        tensors = {
            side: [asdict(t) | {"shape": list(t.shape)} for t in getattr(self, side)]
            for side in ("inputs", "outputs", "cache", "embeddings", "boxes")
        }
        phrases = {name: list(getattr(self, name)) for name in ("declared", "proven", "assumed")}
        ranges = {k: list(v) for k, v in self.axis_ranges.items()}
        values = {name: rule.to_json() for name, rule in self.values.items()}
        images = None
        if self.images is not None:
            images = {**asdict(self.images), "encoder": self.images.encoder.to_json()}
        fields = asdict(self)
        # Its members stand beside the others, as they did before they were one value: files of then are read, too.
        call = {**fields.pop("decoder_call"), "handed": list(self.decoder_call.handed)}
        return {
            **fields,
            **call,
            **tensors,
            **phrases,
            "images": images,
            "axis_ranges": ranges,
            "sizes": dict(self.sizes),
            "axis_steps": dict(self.axis_steps),
            "values": values,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_json` wrote."""
        fields = dict(value)
        for side in ("inputs", "outputs", "cache", "embeddings", "boxes"):
            fields[side] = tuple(
                TensorSpec(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"])) for t in fields.get(side, ())
            )
        fields["axis_ranges"] = {k: (v[0], v[1]) for k, v in fields["axis_ranges"].items()}
        fields["values"] = {k: ValueRule.from_json(v) for k, v in fields["values"].items()}
        for name in ("declared", "proven", "assumed"):
            fields[name] = tuple(fields.get(name, ()))
        layered = fields.pop("layered", None)
        fields["decoder_call"] = DecoderCall(
            position_rows=fields.pop("position_rows", None),
            handed=tuple(fields.pop("handed", ())),
            layered=None if layered is None else LayeredFeatures(**layered),
        )
        if (images := fields.get("images")) is not None:
            fields["images"] = ImageReader(**{**images, "encoder": cls.from_json(images["encoder"])})
        return cls(**fields)
