"""The functions that do the work of a conversion, as a value, so that Prefect's tasks can take their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_config.spec import ModelSpec
from tasks.detect import detect
from tasks.export import Exported, export
from tasks.job import StepCost
from tasks.join import Joined, join
from tasks.parity import Checked, check
from tasks.register import register
from tasks.report import ModelEntry
from tasks.retry import with_retries
from tasks.simplify import Simplified, simplify
from tasks.variants import Varied, vary

__all__ = ["PLAIN_STEPS", "Steps"]


_VARY = with_retries(vary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The functions that do the work, each with its retry rule."""

    detect: Callable[..., tuple[ModelSpec, StepCost]]
    export: Callable[..., Exported]
    simplify: Callable[..., Simplified]
    parity: Callable[..., Checked]
    join: Callable[..., Joined]
    register: Callable[..., ModelEntry]
    vary: Callable[..., Varied] = _VARY


PLAIN_STEPS = Steps(
    detect=with_retries(detect),
    export=with_retries(export),
    simplify=with_retries(simplify),
    parity=with_retries(check),
    join=with_retries(join),
    register=with_retries(register),
)
"""The steps without Prefect."""
