"""The keys of a manifest: what each takes, and what it means."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

from flows.model_names import hidden, revision_problem
from onnx_config.variants import Variant
from tasks.request import Device

__all__ = [
    "OLDEST_OPSET",
    "Dtype",
    "Manifest",
    "ManifestModel",
    "ModelOptions",
    "Query",
    "Require",
    "Sort",
    "Weights",
]

OLDEST_OPSET = 7
"""The oldest opset that ONNX Runtime runs, by its compatibility table."""


class Dtype(StrEnum):
    """Element type of the weights in the graph."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Weights(StrEnum):
    """Where a graph's weights lie."""

    COPY = "copy"
    LINK = "link"


def _plain_text(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or hidden(value)):
        raise ValueError("is empty" if not value.strip() else "has a control character")
    return value


def _readable_revision(revision: str) -> str:
    if problem := revision_problem(revision):
        raise ValueError(problem)
    return revision


def _once(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    if twice := [variant for variant in Variant if variants.count(variant) > 1]:
        raise ValueError(f"names {twice[0].value!r} twice")
    # However they were written, they are the same wish.
    return tuple(variant for variant in Variant if variant in variants)


_Task = Annotated[str, BeforeValidator(_plain_text)]
_Revision = Annotated[str, AfterValidator(_readable_revision)]


class Require(StrEnum):
    """What a model is not converted without."""

    CUDA = "cuda"
    """A GPU on which it is compared; without this key, ``device: auto`` is content with a CPU."""


class ModelOptions(BaseModel):
    """The keys that hold for every model unless it says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Device = Device.AUTO
    """Where the graph is compared with PyTorch; ``auto`` is CUDA where there is a GPU."""

    require: Require | None = None
    """``cuda``: a model that cannot be compared on a GPU fails."""

    opset: Annotated[StrictInt, Field(ge=OLDEST_OPSET)] | None = None
    """ONNX opset; without it, the newest that the installed ONNX Runtime runs."""

    dtype: Dtype = Dtype.FLOAT32
    """Element type of the weights in the graph."""

    simplify: StrictBool = True
    """Whether onnxsim runs over the exported graph; its result is taken only where it holds."""

    weights: Weights = Weights.COPY
    """``copy``: the weights lie in the graph's file or beside it; ``link``: the graph points into the checkpoint's own
    file, which is hard-linked beside it."""

    trust_remote_code: StrictBool = False
    """Whether code from the model's own folder may run. No such code runs in this version: with ``true`` a model that
    brings some is refused, and without it is read as transformers knows it."""

    variants: Annotated[tuple[Variant, ...], AfterValidator(_once)] = ()
    """Further files beside the float32 graphs, in fewer bits, each with a verdict of its own."""


class ManifestModel(ModelOptions):
    """The keys of one model."""

    id: str
    """A Hub id (``org/name``, ``org/name@revision``) or a folder; a relative one starts at the current folder."""

    revision: _Revision | None = None
    """Branch, tag or commit of a Hub model; without it, ``main``."""

    task: _Task | None = None
    """Task by name; without it, what the config declares."""


class Sort(StrEnum):
    """The order in which the Hub lists what a query finds, the most or newest first."""

    DOWNLOADS = "downloads"
    LIKES = "likes"
    TRENDING = "trending_score"
    CREATED = "created_at"
    MODIFIED = "last_modified"


class Query(BaseModel):
    """The keys of a query: models of the Hub that have all that is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    author: _Task | None = None
    """The user or organisation whose models they are."""

    search: _Task | None = None
    """Words that their ids have."""

    task: _Task | None = None
    """The task that their pages name."""

    tag: _Task | None = None
    """A tag that they have."""

    library: _Task = "transformers"
    """The library that loads them."""

    sort: Sort = Sort.DOWNLOADS
    """What the most of comes first."""

    limit: Annotated[StrictInt, Field(ge=1, le=10_000)]
    """How many at most."""

    def arguments(self) -> dict[str, Any]:
        """Return what the Hub is asked."""
        said = {"author": self.author, "search": self.search, "pipeline_tag": self.task, "sort": self.sort.value}
        # Files that could not be converted anyway would use up the limit.
        tags = [self.library, "safetensors", *([self.tag] if self.tag else [])]
        return {name: value for name, value in said.items() if value is not None} | {"filter": tags}


class Manifest(BaseModel):
    """The keys at the top; each part is checked by itself, so that all of its errors are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    defaults: Any = None
    models: Any = None
    query: Any = None
