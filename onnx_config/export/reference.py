"""What the unmodified PyTorch model returns, in float32 and in float64.

It runs in a process where no exporter patch was ever applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_config.export.child import names_memory
from onnx_config.export.shapes import CheckShape, Float64
from onnx_config.module_state import preserved_state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from onnx_config.export.choices import ChoiceWatch, Run

__all__ = ["Array", "Reference", "compute_references"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the PyTorch model returns at one shape."""

    shape: CheckShape
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    precise: Mapping[str, Array] | None
    """The same in float64; ``None`` where the model was not run in it."""
    device: str = "cpu"
    in_float64: Callable[[], Mapping[str, Array] | None] | None = None
    """Runs the model in float64, where that was put off until it is needed; ``None``: it cannot be run any more."""
    run: Run | None = None
    """Runs the model once more and has it take certain choices; ``None``: it cannot be run any more."""

    def precisely(self) -> Mapping[str, Array] | None:
        """Return the outputs in float64, computing them now where that was put off; ``None`` if there are none."""
        return self.in_float64() if self.precise is None and self.in_float64 is not None else self.precise


def compute_references(
    model: PreTrainedModel,
    shapes: Iterable[tuple[CheckShape, Mapping[str, Array]]],
    *,
    flags: Mapping[str, Any],
    device: str = "cpu",
    float64: Float64 = Float64.HALF,
    reload: Callable[[], PreTrainedModel] | None = None,
) -> tuple[list[Reference], list[str]]:
    """Run the PyTorch model at each shape in float32, and at some in float64.

    The model is moved to ``device`` and then turned into float64, since it may be too large to be held twice. Shapes
    that are not to be doubled are left alone. At the other shapes a reference runs it in float64 once it is asked to:
    where nothing differs by more than what counts as equal, the model's own error decides nothing.

    Args:
        model: The model; not to be used afterwards.
        shapes: Where to run it, with the inputs.
        flags: Further keyword arguments of ``forward``.
        device: ``cpu`` or ``cuda``.
        float64: When it is run in float64.
        reload: Returns the model anew, for runs in float64 that are put off: it is then not held until they are asked
            for.

    Returns:
        The references, and what the model said to the shapes that it refused.

    Raises:
        MemoryError: If memory ran out; PyTorch's own errors that say so are raised as they are.
    """
    import torch

    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    model = model.to(device)  # type: ignore[arg-type]
    references: list[Reference] = []
    refused: list[str] = []
    for shape, inputs in shapes:
        outputs = _run_torch(model, inputs, flags, device, None)
        if isinstance(outputs, str):
            refused.append(f"{shape.label}: {outputs}")
            continue
        if empty := _without_numbers(outputs):
            # A deviation over one frame, say: such a size has no answer that could be right or wrong.
            refused.append(f"{shape.label}: {empty} holds no finite number")
            continue
        references.append(Reference(shape=shape, inputs=inputs, outputs=outputs, precise=None, device=device))
    if float64 is Float64.NEVER:
        return references, refused
    at_once = _Again(partial(_itself, model), flags, device)
    later = at_once if reload is None else _Again(reload, flags, device)
    # A model that is not stable is so at small sizes too; the time goes into the large ones.
    by_size = sorted(range(len(references)), key=lambda i: sum(value.size for value in references[i].inputs.values()))
    half = -(-len(references) // 2) if float64 is Float64.HALF else 0
    for number, at in enumerate(by_size):
        reference = replace(references[at], run=partial(later.run, references[at].inputs))
        if not reference.shape.doubled:
            references[at] = reference
        elif number < half:
            references[at] = replace(reference, precise=at_once.run(reference.inputs, torch.float64))
        else:
            references[at] = replace(reference, in_float64=cache(partial(later.run, reference.inputs, torch.float64)))
    return references, refused


def _itself(model: PreTrainedModel) -> PreTrainedModel:
    return model


class _Again:
    """Runs a model in float64, or once more in float32; it is loaded when it is first asked to."""

    def __init__(self, load: Callable[[], PreTrainedModel], flags: Mapping[str, Any], device: str) -> None:
        self._load, self._flags, self._device = load, flags, device
        self._model: PreTrainedModel | None = None
        self._is_single = False

    def run(
        self, inputs: Mapping[str, Array], dtype: torch.dtype, watch: ChoiceWatch | None = None
    ) -> dict[str, Array] | None:
        """Return the outputs by name; ``None`` where the model refuses the element type."""
        import torch

        if self._model is None:
            self._model = self._load().to(self._device)  # type: ignore[arg-type]  # a device's name
            tensors = (*self._model.parameters(), *self._model.buffers())
            # What is all float32 is the same again after it was float64.
            self._is_single = all(t.dtype in (torch.float32, torch.float64) for t in tensors if t.is_floating_point())
        if dtype is torch.float32 and not self._is_single:
            return None
        self._model = self._model.double() if dtype is torch.float64 else self._model.float()
        answer = _run_torch(self._model, inputs, self._flags, self._device, dtype, watch=watch)
        return None if isinstance(answer, str) else answer


def _run_torch(
    model: Any,
    inputs: Mapping[str, Array],
    flags: Mapping[str, Any],
    device: str,
    dtype: torch.dtype | None,
    *,
    watch: ChoiceWatch | None = None,
) -> dict[str, Array] | str:
    """Return the outputs by name, or what the model said when it refused."""
    import torch

    from onnx_config.export.double import DoubleOperators
    from onnx_config.probe import flat_outputs

    tensors = {}
    for name, value in inputs.items():
        tensor = torch.from_numpy(value).to(device)
        tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    torch.manual_seed(0)
    try:
        doubled = DoubleOperators() if dtype is torch.float64 else nullcontext()
        with torch.no_grad(), preserved_state(model), doubled, watch or nullcontext():
            returned = model(**tensors, **flags)
    # The model's own code decides what it raises for a size that it does not take.
    except Exception as error:
        if isinstance(error, MemoryError) or names_memory(str(error)):
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {
        name: value.detach().cpu().numpy() for name, value in flat_outputs(returned) if value.dtype != torch.bfloat16
    }


def _without_numbers(outputs: Mapping[str, Array]) -> str | None:
    """Return the first output that is not empty and has no finite number, if there is one."""
    return next(
        (name for name, v in outputs.items() if v.dtype.kind == "f" and v.size and not np.isfinite(v).any()), None
    )
