"""Whether a graph in fewer bits still says what the float32 model in PyTorch says.

The reference is the unmodified model in float32, at the shapes at which the float32 graph was compared. What is allowed
depends on the precision:

- float16 and bfloat16: what PyTorch itself is off by when the same model runs in that type on the same inputs, times a
  factor; at least a few times the type's own rounding, at most a share beyond which nothing is called equal. Where
  PyTorch cannot run the type, or what comes out is not finite, the share alone decides.
- 8 and 4 bits: the error as a share of what a row of the output amounts to (root of the mean square), and the cosine
  between the two, over what a mask does not hide. Rounding a model's weights so coarsely is meant to change its
  numbers; whether the quantizer did what it should is seen from the weights
  (`onnx_config.export.quantized.weight_faults`).

NaN and infinity where PyTorch has numbers are a mismatch at any precision. Where an output holds scores of classes or
of tokens, the share of equal choices is counted, which is what users of such files ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_config.export.child import names_memory
from onnx_config.export.parity import STOPS, Outcome, max_difference
from onnx_config.export.reference import Reference
from onnx_config.variants import Variant

__all__ = [
    "Agreement",
    "Limits",
    "VariantOutput",
    "VariantResult",
    "compare_variant",
    "limits_of",
    "run_in_half",
]

Array = npt.NDArray[Any]

OWN_FACTOR = 4.0
"""How many times PyTorch's own error in half precision a graph may be off: it rounds at other places."""

_HALVES = (Variant.FP16, Variant.BF16)
_INFINITY = 1e30
_SMALLEST = 1e-6
TEXTS = "sentences"
"""Label of the shape whose values are a tokenizer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a precision allows, as shares of an output's magnitude."""

    least: float
    """Error that is always allowed."""

    most: float
    """Error that is never allowed to be exceeded, whatever PyTorch is off by."""

    least_cosine: float
    """Cosine between what comes out and what should."""


_LIMITS: Mapping[Variant, Limits] = {
    Variant.FP16: Limits(least=2.0**-9, most=0.02, least_cosine=0.999),
    Variant.BF16: Limits(least=2.0**-6, most=0.08, least_cosine=0.99),
    Variant.INT8: Limits(least=0.25, most=0.25, least_cosine=0.96),
    Variant.QUANTIZED: Limits(least=0.25, most=0.25, least_cosine=0.96),
    Variant.Q4: Limits(least=0.4, most=0.4, least_cosine=0.9),
    Variant.Q4F16: Limits(least=0.4, most=0.4, least_cosine=0.9),
}


def limits_of(variant: Variant) -> Limits:
    """Return what a variant may be off by."""
    return _LIMITS[variant]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantOutput:
    """One output over all shapes, at the one where it came closest to failing."""

    name: str
    max_abs_diff: float
    relative_error: float
    """The difference as a share of the output: of its largest number for halves, of the worst row's root of the mean
    square for 8 and 4 bits."""
    tolerance: float
    """What was allowed of it, as a share."""
    largest: float
    """Largest magnitude of the output."""
    cosine: float
    """Smallest over all shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How often two graphs choose alike."""

    rate: float
    """Share of equal choices, 0 to 1."""

    choices: int
    """How many were counted."""

    over: str
    """Of what, and on which inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantResult:
    """The verdict on one graph in one variant."""

    outcome: Outcome
    provider: str
    shapes: int
    outputs: tuple[VariantOutput, ...]
    agreement: Agreement | None
    detail: str | None
    """What was off, and where; ``None``: nothing."""


@dataclass(slots=True)
class _Tally:
    by_row: bool
    """Whether an error is measured by rows."""
    outputs: dict[str, VariantOutput] = field(default_factory=dict)
    problem: str | None = None
    equal: int = 0
    chosen: int = 0

    def note(self, output: VariantOutput) -> None:
        old = self.outputs.get(output.name)
        if old is None:
            self.outputs[output.name] = output
            return
        worst = max(old, output, key=lambda o: o.relative_error / o.tolerance if o.tolerance else o.relative_error)
        self.outputs[output.name] = VariantOutput(
            name=output.name,
            max_abs_diff=max(old.max_abs_diff, output.max_abs_diff),
            relative_error=worst.relative_error,
            tolerance=worst.tolerance,
            largest=worst.largest,
            cosine=min(old.cosine, output.cosine),
        )


def compare_variant(
    session: Any,
    references: Sequence[Reference],
    *,
    variant: Variant,
    own: Sequence[Mapping[str, Array] | None] = (),
) -> VariantResult:
    """Compare a session with what PyTorch computes in float32.

    Args:
        session: As `onnx_config.export.session.open_session` returns it.
        references: What PyTorch computed.
        variant: What the graph's numbers are.
        own: What PyTorch computed in the variant's own type, reference by reference; shorter where it was not asked,
            ``None`` where it could not.
    """
    limits, tally = limits_of(variant), _Tally(by_row=variant not in _HALVES)
    names = [value.name for value in session.get_outputs()]
    takes = {value.name for value in session.get_inputs()}
    texts = [reference for reference in references if reference.shape.label == TEXTS]
    compared = 0
    for number, reference in enumerate(references):
        where = f"{reference.shape.label} ({', '.join(f'{k}={v}' for k, v in reference.shape.sizes.items())})"
        try:
            values = session.run(names, {name: value for name, value in reference.inputs.items() if name in takes})
        # ONNX Runtime's exceptions share no base class of their own.
        except Exception as error:
            if names_memory(str(error)):
                raise
            said = " ".join(str(error).split())[:300]
            tally.problem = tally.problem or f"{STOPS} at {where}: {said}"
            continue
        compared += 1
        half = own[number] if number < len(own) else None
        for name, got in zip(names, map(np.asarray, values), strict=True):
            key = name.removeprefix("output.")
            want = reference.outputs.get(key)
            if want is None or want.shape != got.shape:
                tally.problem = tally.problem or f"{name} has the shape {got.shape} at {where}, which PyTorch's has not"
                continue
            if not want.size:
                continue
            compared_to = _Wanted(
                values=want,
                half=None if half is None else half.get(key),
                mask=reference.inputs.get("attention_mask"),
                where=where,
            )
            _compare(tally, name, got, compared_to, limits)
            if not texts or reference in texts:
                _choose(tally, name, got, want, reference.inputs.get("attention_mask"))
    over = "the choices among the scores of " + ("sentences" if texts else "random inputs")
    return VariantResult(
        outcome=Outcome.MISMATCH if tally.problem else Outcome.VERIFIED,
        provider=session.get_providers()[0],
        shapes=compared,
        outputs=tuple(tally.outputs.values()),
        agreement=Agreement(rate=tally.equal / tally.chosen, choices=tally.chosen, over=over) if tally.chosen else None,
        detail=tally.problem,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """One output of PyTorch at one shape."""

    values: Array
    half: Array | None
    """The same in half precision, where it was run in it."""
    mask: Array | None
    """What of the input counts."""
    where: str


def _compare(tally: _Tally, name: str, got: Array, wanted: _Wanted, limits: Limits) -> None:
    want, half, where = wanted.values, wanted.half, wanted.where
    if want.dtype.kind in "iub":
        share = float((got.astype(want.dtype) != want).mean())
        tally.note(
            VariantOutput(
                name=name, max_abs_diff=share, relative_error=share, tolerance=limits.most, largest=1.0, cosine=1.0
            )
        )
        if share > limits.most:
            tally.problem = tally.problem or f"{name}: {share:.1%} of the values are others at {where}"
        return
    difference, problem = max_difference(got, want)
    if problem is not None:
        tally.problem = tally.problem or f"{name} {problem} at {where}"
        return
    if tally.by_row and wanted.mask is not None and wanted.mask.shape == want.shape[:2] and want.ndim > 2:
        # Nobody reads what a model says of padding, and rounding moves it the most.
        seen = wanted.mask.astype(bool).reshape(*wanted.mask.shape, *[1] * (want.ndim - 2))
        got, want = np.where(seen, got, 0), np.where(seen, want, 0)
    error, cosine = _errors(got, want, by_row=tally.by_row)
    allowed = limits.most
    if half is not None and half.shape == want.shape and max_difference(half, want)[1] is None:
        own, _ = _errors(half, want, by_row=tally.by_row)
        allowed = min(limits.most, max(limits.least, OWN_FACTOR * own))
    finite = np.abs(want[np.abs(want) < _INFINITY])
    tally.note(
        VariantOutput(
            name=name,
            max_abs_diff=difference,
            relative_error=error,
            tolerance=allowed,
            largest=float(finite.max(initial=0.0)),
            cosine=cosine,
        )
    )
    if error > allowed:
        tally.problem = tally.problem or f"{name} is off by {error:.2%} at {where}, where {allowed:.2%} is allowed"
    elif cosine < limits.least_cosine:
        tally.problem = tally.problem or (
            f"{name} points elsewhere at {where}: its cosine is {cosine:.4f}, where {limits.least_cosine} is asked for"
        )


def _errors(got: Array, want: Array, *, by_row: bool) -> tuple[float, float]:
    """Return the relative error, of the worst row or by the largest number, and the cosine of all.

    A row that amounts to little beside the others, or is zero, is measured by the others.
    """
    a, b = (values.astype(np.float64).reshape(len(values) if values.ndim > 1 else 1, -1) for values in (got, want))
    usable = np.isfinite(b) & (np.abs(b) < _INFINITY) & np.isfinite(a)
    a, b = np.where(usable, a, 0.0), np.where(usable, b, 0.0)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = min(1.0, float((a * b).sum()) / norms) if norms > _SMALLEST**2 else 1.0
    if not by_row:
        return float(np.abs(a - b).max(initial=0.0)) / max(_SMALLEST, float(np.abs(b).max(initial=0.0))), cosine
    lengths = np.sqrt((b**2).sum(axis=1))
    typical = float(np.sqrt((lengths**2).mean())) if lengths.size else 0.0
    floor = max(typical, _SMALLEST * np.sqrt(max(1, b.shape[1])))
    error = float((np.sqrt(((a - b) ** 2).sum(axis=1)) / np.maximum(lengths, floor)).max(initial=0.0))
    return error, cosine


def _choose(tally: _Tally, name: str, got: Array, want: Array, mask: Array | None) -> None:
    """Count equal choices where an output holds scores: of classes, of tokens, of places in a text."""
    if not name.endswith("logits") or want.ndim < 2 or want.shape[-1] < 2:
        return
    # Of an image, classes come before its sides.
    axis = 1 if want.ndim == 4 else -1
    equal = got.argmax(axis=axis) == want.argmax(axis=axis)
    if mask is not None and equal.ndim == 2 and mask.ndim == 2 and mask.shape[1] >= equal.shape[1]:
        equal = equal[mask[:, mask.shape[1] - equal.shape[1] :] != 0]
    tally.equal += int(equal.sum())
    tally.chosen += int(equal.size)


def run_in_half(
    model: Any,
    feeds: Iterable[Mapping[str, Array]],
    *,
    variant: Variant,
    flags: Mapping[str, Any],
    keep: Callable[[int], bool] = lambda _: True,
) -> list[dict[str, Array] | None]:
    """Return what a model computes in float16 or bfloat16 by name; ``None`` where it cannot. It stays in that type."""
    import torch

    from onnx_config.module_state import preserved_state
    from onnx_config.probe import flat_outputs

    dtype = torch.float16 if variant in (Variant.FP16, Variant.Q4F16) else torch.bfloat16
    model = model.to(dtype)
    found: list[dict[str, Array] | None] = []
    for number, inputs in enumerate(feeds):
        if not keep(number):
            found.append(None)
            continue
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        torch.manual_seed(0)
        try:
            with torch.no_grad(), preserved_state(model):
                returned = model(**tensors, **flags)
        # Not every operator of PyTorch has every type on every device.
        except Exception as error:
            if isinstance(error, MemoryError) or names_memory(str(error)):
                raise
            found.append(None)
            continue
        found.append(
            {
                name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
                for name, value in flat_outputs(returned)
            }
        )
    return found
