"""What a conversion is asked for: values that travel between processes as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from onnx_config.variants import Variant
from tasks.report import ModelEntry, Step

__all__ = ["ConversionOptions", "ConversionRequest", "Device", "Listener", "Refresh", "SilentListener", "Workspace"]


class Device(StrEnum):
    """Where parity runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Refresh(StrEnum):
    """What counts as a change beside a model's commit, its options, and what this code makes of them."""

    VERSIONS = "versions"
    """Other versions of torch, transformers, onnx, ONNX Runtime, onnx-ferry and the like than those installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionOptions:
    """How a model is converted; a part of the key under which the result is found again."""

    task: str | None = None
    """Task by name; ``None``: what the config declares."""

    device: Device = Device.AUTO
    """Where parity runs; ``auto`` is CUDA where there is one."""

    opset: int | None = None
    """ONNX opset; ``None``: the newest that the exporter targets and ONNX Runtime runs."""

    dtype: str = "float32"
    """Element type of the weights in the graph: ``float32``, ``float16`` or ``bfloat16``."""

    simplify: bool = True
    """Whether onnxsim runs over the exported graph."""

    weights: str = "copy"
    """``copy``: the weights go into the graph's file or beside it; ``link``: it points into the checkpoint's files."""

    trust_remote_code: bool = False
    """Whether code from the model's own folder may run."""

    variants: tuple[Variant, ...] = ()
    """Further files beside the float32 graphs, in fewer bits."""

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; variants only where there are some, as before there were any."""
        values = asdict(self)
        variants = values.pop("variants")
        return {**values, "variants": [variant.value for variant in variants]} if variants else values


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRequest:
    """One model to convert."""

    model_id: str
    """Hub id or folder, as the user wrote it."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model; ``None``: ``main``. Folders have none."""

    options: ConversionOptions = field(default_factory=ConversionOptions)
    """How to convert it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where an installation keeps its things, and what it may use."""

    home: Path
    """Folder of the embedded defaults: locks, temporary folders, Prefect's own data. Absolute."""

    catalog_url: str
    """SQLAlchemy URL of the catalog."""

    store: Path | str
    """Folder of the artifact store, absolute; or the URL of one elsewhere, without any secret."""

    memory_limit_bytes: int
    """Resident bytes that all conversions together may use."""

    timeout_seconds: float
    """Wall time that one step of one model may take."""

    threads: int = 1
    """Threads that torch and ONNX Runtime use in one conversion."""

    store_cache_bytes: int = 20 * 1024**3
    """What this machine's copies of artifacts in a store elsewhere may take."""

    @property
    def detections(self) -> Path:
        """Folder of the detections that are kept by content; may be removed at any time."""
        return self.home / "detections"

    @property
    def templates(self) -> Path:
        """Folder of the graphs without weights; may be removed at any time when nothing runs."""
        return self.home / "templates"


class Listener(Protocol):
    """Is told how a batch advances, from several threads."""

    def model_started(self, model_id: str) -> None:
        """A model's conversion began."""

    def step_started(self, model_id: str, step: Step) -> None:
        """A step of a model in work began."""

    def model_finished(self, entry: ModelEntry) -> None:
        """A model ended, whatever its status; also said of those that were not started (reused)."""


class SilentListener:
    """A listener that does nothing."""

    def model_started(self, model_id: str) -> None: ...

    def step_started(self, model_id: str, step: Step) -> None: ...

    def model_finished(self, entry: ModelEntry) -> None: ...
