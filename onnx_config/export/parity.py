"""Whether a stored graph computes what the unmodified PyTorch model computes.

The reference runs in a process where no exporter patch was ever applied. The tolerance comes from
the model itself: what it differs by between float32 and float64 on the same inputs. Where that
alone exceeds what anyone would accept, the output is called unstable, never verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_config.cuda import CUDA_PROVIDER, cuda_problem, load_cuda_libraries
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.child import names_memory
from onnx_config.export.shapes import CheckShape, Float64
from onnx_config.module_state import preserved_state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from onnx_config.export.choices import ChoiceWatch, GraphChoice, Pinned, Run

__all__ = [
    "FEWEST_SHAPES",
    "LEVELS",
    "STOPS",
    "Cell",
    "Outcome",
    "OutputCheck",
    "ParityResult",
    "Reference",
    "check_parity",
    "choose_device",
    "compute_references",
    "difference_at",
    "free_device_bytes",
    "max_difference",
    "open_session",
    "refuses",
    "session_facts",
    "session_options",
]

Array = npt.NDArray[Any]
GraphChoices = Callable[[Mapping[str, Array]], Sequence["GraphChoice"]]
"""Returns what a graph chooses on these inputs."""

BASE_TOLERANCE = 1e-5
"""Difference that counts as equal, as a share of an output's largest magnitude."""

SPREAD_FACTOR = 10.0
"""How many times the model's own float32 error a graph may be off."""

MAX_TOLERANCE = 1e-3
"""Share beyond which nothing is called equal, however unsure the model is of itself."""

FALLBACK_TOLERANCE = 1e-4
"""Share allowed where the model was not run in float64."""

FEWEST_SHAPES = 4
"""How many shapes must be compared before a graph is called anything."""

LEVELS = ("disable", "basic", "extended", "all")
"""How far ONNX Runtime rewrites a graph before it runs it; ``all`` is what it does unless told otherwise."""

STOPS = "ONNX Runtime stops"
"""How what is said of a shape begins at which a graph gives nothing."""

_SMALLEST_SCALE = 1e-2
_SMALLEST_FALLBACK_SCALE = 1.0
# Masks are often filled with the lowest number of the element type, which is another one in float64.
_INFINITY = 1e30


class Outcome(StrEnum):
    """What a comparison says."""

    VERIFIED = "verified"
    MISMATCH = "mismatch"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCheck:
    """One output over all shapes."""

    name: str
    max_abs_diff: float
    tolerance: float
    """The tolerance at the shape where the difference came closest to it."""
    spread: float | None = None
    """By how much PyTorch differs from itself in float64 there; ``None`` where that decided nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A graph at one shape, run by one provider at one optimisation level."""

    provider: str
    optimization: str
    """One of `LEVELS`."""
    dtype: str
    """Element type of the graph's weights."""
    shape: str
    """Label of the shape."""
    sizes: Mapping[str, int]
    """Dynamic axis -> size in elements."""
    verdict: Outcome
    output: str | None
    """The output that came closest to its tolerance, or went beyond; ``None`` where nothing was compared."""
    max_abs_diff: float | None
    tolerance: float | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """What was compared, and the verdict."""

    outcome: Outcome
    device: str
    provider: str
    shapes: int
    """Shapes compared."""
    outputs: tuple[OutputCheck, ...]
    axes_proven: tuple[str, ...]
    """Axes compared at two sizes at least."""
    detail: str | None
    """What differed, and where."""
    skipped: tuple[str, ...] = ()
    """Shapes that the PyTorch model itself refuses."""
    notes: tuple[str, ...] = ()
    """Where PyTorch was made to choose as the graph does, among numbers that are equal but for rounding."""
    cells: tuple[Cell, ...] = ()
    """One for each shape."""

    @property
    def first_failure(self) -> int | None:
        """Number of the first shape that does not hold; ``None``: all hold."""
        return next((at for at, cell in enumerate(self.cells) if cell.verdict is not Outcome.VERIFIED), None)


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


@dataclass(slots=True)
class _Tally:
    worst: dict[str, OutputCheck] = field(default_factory=dict)
    mismatch: str | None = None
    unstable: str | None = None
    sizes: dict[str, set[int]] = field(default_factory=dict)
    compared: int = 0
    own_choices: list[str] = field(default_factory=list)
    """Where float64 took the choices of float32."""
    graph_choices: list[str] = field(default_factory=list)
    """Where PyTorch took the choices of the graph."""

    @property
    def is_clean(self) -> bool:
        return self.mismatch is None and self.unstable is None

    def saw(self, shape: CheckShape) -> None:
        """Count a shape that was compared."""
        self.compared += 1
        for axis, size in shape.sizes.items():
            self.sizes.setdefault(axis, set()).add(size)

    def add(self, other: _Tally) -> None:
        """Take over what was found in one more comparison."""
        for check in other.worst.values():
            self.note(check.name, check.max_abs_diff, check.tolerance, check.spread)
        self.mismatch = self.mismatch or other.mismatch
        self.unstable = self.unstable or other.unstable
        self.own_choices += other.own_choices
        self.graph_choices += other.graph_choices

    def notes(self) -> Iterator[str]:
        """Yield what has to be known of how was compared."""
        among = "among numbers that are equal but for rounding"
        if self.own_choices:
            yield f"in float64 PyTorch was made to choose as in float32, {among}, at {', '.join(self.own_choices)}"
        if self.graph_choices:
            yield f"PyTorch was made to choose as the graph does, {among}, at {', '.join(self.graph_choices)}"

    def note(self, name: str, difference: float, tolerance: float, spread: float | None = None) -> None:
        old = self.worst.get(name)
        if old is None or _ratio(difference, tolerance) > _ratio(old.max_abs_diff, old.tolerance):
            self.worst[name] = OutputCheck(name=name, max_abs_diff=difference, tolerance=tolerance, spread=spread)

    @property
    def outcome(self) -> Outcome:
        return Outcome.MISMATCH if self.mismatch else Outcome.UNSTABLE if self.unstable else Outcome.VERIFIED

    def cell(self, shape: CheckShape, *, provider: str, level: str, dtype: str) -> Cell:
        """Return what was found, where that was at one shape only."""
        closest = max(self.worst.values(), key=lambda c: _ratio(c.max_abs_diff, c.tolerance), default=None)
        return Cell(
            provider=provider,
            optimization=level,
            dtype=dtype,
            shape=shape.label,
            sizes=dict(shape.sizes),
            verdict=self.outcome,
            output=None if closest is None else closest.name,
            max_abs_diff=None if closest is None else closest.max_abs_diff,
            tolerance=None if closest is None else closest.tolerance,
            detail=self.mismatch or self.unstable,
        )


def _ratio(difference: float, tolerance: float) -> float:
    return difference / tolerance if tolerance else (0.0 if difference == 0 else float("inf"))


def choose_device(asked: str) -> str:
    """Return ``"cpu"`` or ``"cuda"`` for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: If ``cuda`` is asked for and PyTorch or ONNX Runtime cannot use it, or the name is another one.
    """
    problem = cuda_problem() if asked in ("auto", "cuda") else None
    if asked == "cuda" and problem is not None:
        raise InputError(
            f"The device 'cuda' was asked for, but {problem} Install the GPU builds, or ask for the device 'auto' or "
            "'cpu'."
        )
    if asked == "auto":
        return "cpu" if problem else "cuda"
    if asked not in ("cpu", "cuda"):
        raise InputError(f"The device {asked!r} was asked for; the devices are 'auto', 'cpu' and 'cuda'.")
    return asked


def open_session(
    path: Path,
    *,
    device: str,
    threads: int = 1,
    mapped: bool = False,
    providers: Sequence[Any] | None = None,
    options: Any = None,
    graph: bytes | None = None,
    level: str = "all",
) -> Any:
    """Return an ONNX Runtime session, at the optimisation level of production unless told otherwise.

    A ``mapped`` one does not rearrange weights into a faster layout, so that those beside the graph are pages of their
    file: the system reads them when they are needed and drops them when memory is. ``providers`` and ``options``, as
    ONNX Runtime takes them, stand in for those of the device and of all else. A ``graph`` takes the place of the one
    in the file, beside which its weights may lie.

    Raises:
        InputError: If the device is ``cuda`` and ONNX Runtime falls back to the CPU.
        ModelError: If ONNX Runtime refuses the graph (``runtime_failed``).
    """
    import onnxruntime

    if options is None:
        options = session_options(threads=threads, level=level)
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if device == "cuda":
        load_cuda_libraries()
    if providers is None:
        providers = ["CPUExecutionProvider"]
        if device == "cuda":
            providers = [(CUDA_PROVIDER, {"use_tf32": 0}), *providers]
    try:
        session = onnxruntime.InferenceSession(
            str(path) if graph is None else graph, options, providers=list(providers)
        )
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        if names_memory(str(error)):
            raise
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the graph {path.name}: {error}",
            kind=ErrorKind.RUNTIME_FAILED,
        ) from error
    # Where CUDA cannot start, ONNX Runtime warns and goes on with the CPU.
    if device == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        raise InputError(
            f"The device 'cuda' was asked for, but ONNX Runtime {onnxruntime.__version__} could not start its "
            "CUDAExecutionProvider and fell back to the CPU. Install the CUDA libraries that it names in its log, "
            "or ask for the device 'cpu'."
        )
    return session


def session_options(*, threads: int = 1, level: str = "all") -> Any:
    """Return the options of a session at one of `LEVELS`."""
    import onnxruntime

    name = "ORT_DISABLE_ALL" if level == "disable" else f"ORT_ENABLE_{level.upper()}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, name)
    return options


def session_facts(device: str, *, level: str, threads: int, mapped: bool) -> dict[str, Any]:
    """Return how `open_session` asks ONNX Runtime to run, for the record."""
    facts: dict[str, Any] = {"graph_optimization_level": level, "intra_op_num_threads": threads}
    if mapped:
        facts["session.disable_prepacking"] = "1"
    if device == "cuda":
        facts["use_tf32"] = 0
    return facts


def free_device_bytes(device: str) -> int | None:
    """Return how much memory of the GPU nobody holds; ``None`` on the CPU."""
    if device != "cuda":
        return None
    import torch

    free: int = torch.cuda.mem_get_info()[0]
    return free


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


def check_parity(
    session: Any,
    references: Sequence[Reference],
    *,
    refused: Sequence[str] = (),
    expected: Iterable[str] = (),
    choices: GraphChoices | None = None,
    level: str = "all",
    dtype: str = "float32",
) -> ParityResult:
    """Compare a session with the references.

    Args:
        session: As `open_session` returns it.
        references: What PyTorch computed, at shapes other than the traced one.
        refused: Shapes that PyTorch refused, for the record.
        expected: Outputs that the graph must have, where PyTorch returns them.
        choices: Returns the places that the graph chooses, where it and the model choose among numbers; ``None``:
            they are not to be told from a difference.
        level: The session's optimisation level, for the record.
        dtype: Element type of its weights, for the record.

    Raises:
        ModelError: If there are fewer than four references: too little to call anything verified.
    """
    if len(references) < FEWEST_SHAPES:
        raise ModelError(
            f"The PyTorch model accepts only {len(references)} of the shapes it was to be compared at; "
            "four are needed. "
            f"It said: {'; '.join(refused)[:500]}",
            kind=ErrorKind.UNSUPPORTED,
        )
    tally = _Tally()
    names = {o.name.removeprefix("output.") for o in session.get_outputs()}
    returned = references[0].outputs.keys()
    if lost := sorted(returned & set(expected) - names):
        tally.mismatch = f"the graph lacks the output {', '.join(lost)}"
    if bare := sorted(name for name in returned & names if not any(r.outputs[name].size for r in references)):
        tally.unstable = f"{', '.join(bare)} is empty at all shapes: there is nothing to compare"
    provider = session.get_providers()[0]
    cells = []
    for reference in references:
        found = _Tally()
        if _run_and_compare(found, session, reference, choices):
            tally.saw(reference.shape)
        cells.append(found.cell(reference.shape, provider=provider, level=level, dtype=dtype))
        tally.add(found)
    return ParityResult(
        outcome=tally.outcome,
        device=references[0].device,
        provider=provider,
        shapes=tally.compared,
        outputs=tuple(tally.worst.values()),
        axes_proven=tuple(sorted(a for a, s in tally.sizes.items() if len(s) > 1)),
        detail=tally.mismatch or tally.unstable,
        skipped=tuple(refused),
        notes=tuple(tally.notes()),
        cells=tuple(cells),
    )


def difference_at(session: Any, reference: Reference) -> str | None:
    """Return how a session differs from the model at one shape, or ``None`` where it does not."""
    tally = _Tally()
    _run_and_compare(tally, session, reference)
    return tally.mismatch


def refuses(session: Any, inputs: Mapping[str, Array], *, by: str) -> bool:
    """Return whether a session stops at these inputs, and at the node named ``by``."""
    try:
        session.run(None, _wanted(session, inputs))
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:  # noqa: BLE001
        return f"'{by}'" in str(error)
    return False


def _wanted(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    names = {i.name for i in session.get_inputs()}
    return {name: value for name, value in inputs.items() if name in names}


def _run_and_compare(tally: _Tally, session: Any, reference: Reference, choices: GraphChoices | None = None) -> bool:
    """Note what differs at one shape; return whether the session ran there."""
    names = [o.name for o in session.get_outputs()]
    try:
        values = session.run(names, _wanted(session, reference.inputs))
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:  # noqa: BLE001
        tally.mismatch = tally.mismatch or f"{STOPS} at {_where(reference)}: {' '.join(str(error).split())[:300]}"
        return False
    got = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
    found = _compare_all(got, reference)
    if not found.is_clean and reference.run is not None and choices is not None:
        found = _compare_where_chosen(got, reference, reference.run, choices) or found
    tally.add(found)
    return True


def _compare_all(got: Mapping[str, Array], reference: Reference) -> _Tally:
    tally = _Tally()
    for name, value in got.items():
        _compare(tally, name, value, reference)
    return tally


def _compare_where_chosen(
    got: Mapping[str, Array], reference: Reference, run: Run, choices: GraphChoices
) -> _Tally | None:
    """Compare with the model made to choose alike in float64, and as the graph does; ``None`` where that is no other.

    A model that takes the better of two equal scores takes another one in float64, and so may a graph.
    """
    from onnx_config.export.choices import as_graph_chose, as_model_chose

    own = as_model_chose(run)
    if own is None or not _is_same(own.outputs, reference.outputs):
        return None
    found = _compare_all(got, _as_chosen(reference, own))
    if found.is_clean:
        found.own_choices.append(_where(reference))
        return found
    other = as_graph_chose(run, own, choices(reference.inputs))
    if other is None:
        return found if own.exchanged else None
    found = _compare_all(got, _as_chosen(reference, other))
    found.graph_choices.append(_where(reference))
    return found


def _as_chosen(reference: Reference, pinned: Pinned) -> Reference:
    return replace(reference, outputs=pinned.outputs, precise=pinned.precise, in_float64=None, run=None)


def _is_same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f") for name, value in one.items()
    )


def _where(reference: Reference) -> str:
    sizes = ", ".join(f"{k}={v}" for k, v in reference.shape.sizes.items())
    return f"{reference.shape.label} ({sizes})" if sizes else reference.shape.label


def _compare(tally: _Tally, name: str, got: Array, reference: Reference) -> None:
    """Compare one output at one shape and note the result."""
    key = name.removeprefix("output.")
    want = reference.outputs.get(key)
    if want is None:
        tally.mismatch = tally.mismatch or f"{name} is an output of the graph only"
        return
    if got.shape != want.shape:
        tally.mismatch = tally.mismatch or f"{name} has shape {got.shape} for {want.shape} at {_where(reference)}"
        return
    if got.dtype != want.dtype:
        tally.mismatch = tally.mismatch or f"{name} is {got.dtype} for {want.dtype} at {_where(reference)}"
        return
    if not got.size:
        tally.note(name, 0.0, BASE_TOLERANCE)
        return
    if reference.precise is None and reference.in_float64 is not None and _is_equal(tally, name, got, want):
        return
    found = reference.precisely()
    precise = None if found is None else found.get(key)
    if precise is not None and precise.shape != want.shape:
        tally.unstable = tally.unstable or f"{name} has another shape in float64 at {_where(reference)}"
        return
    if precise is not None and (np.isnan(precise) & ~np.isnan(want)).any():
        # The lowest float64 times a float32 zero is NaN: where masks are made so, float64 says nothing of rounding.
        precise = None
    if want.dtype.kind in "iub":
        _compare_exact(tally, name, got, want=want, precise=precise, reference=reference)
        return
    difference, problem = max_difference(got, want)
    if problem is not None:
        tally.mismatch = tally.mismatch or f"{name} {problem} at {_where(reference)}"
        tally.note(name, difference, 0.0)
        return
    finite = np.abs(want[_is_finite(want)])
    if not finite.size:
        tally.unstable = tally.unstable or (
            f"{name} has no finite number in PyTorch at {_where(reference)}: there is nothing to compare"
        )
        return
    largest = float(finite.max())
    own = None
    if precise is None:
        allowed = FALLBACK_TOLERANCE * max(largest, _SMALLEST_FALLBACK_SCALE)
    else:
        scale = max(largest, _SMALLEST_SCALE)
        own, _ = max_difference(want, precise)
        allowed = min(max(BASE_TOLERANCE * scale, SPREAD_FACTOR * own), MAX_TOLERANCE * scale)
        if own > MAX_TOLERANCE * scale:
            # Agreement says nothing here: both may be off by the same rounding, and by another one elsewhere.
            tally.unstable = tally.unstable or (
                f"{name} differs from itself in float64 by {own:.3g} in PyTorch at {_where(reference)}"
            )
    tally.note(name, difference, allowed, own)
    if difference <= allowed:
        return
    if own is not None and difference <= SPREAD_FACTOR * own:
        tally.unstable = tally.unstable or (
            f"{name} differs by {difference:.3g} at {_where(reference)}, "
            f"where PyTorch differs from itself in float64 by {own:.3g}"
        )
    else:
        tally.mismatch = tally.mismatch or (
            f"{name} differs by {difference:.3g} at {_where(reference)}, where {allowed:.3g} is allowed"
        )


def _is_equal(tally: _Tally, name: str, got: Array, want: Array) -> bool:
    """Return whether an output is what it has to be, whatever the model's own error is, and note it if so."""
    if want.dtype.kind in "iub":
        if equal := bool((got == want).all()):
            tally.note(name, 0.0, 0.0)
        return equal
    difference, problem = max_difference(got, want)
    finite = np.abs(want[_is_finite(want)])
    if problem is not None or not finite.size:
        return False
    allowed = BASE_TOLERANCE * max(float(finite.max()), _SMALLEST_SCALE)
    if equal := difference <= allowed:
        tally.note(name, difference, allowed)
    return equal


def _is_finite(values: Array) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(values) < _INFINITY)  # NaN is not less either


def _compare_exact(
    tally: _Tally, name: str, got: Array, *, want: Array, precise: Array | None, reference: Reference
) -> None:
    different = int((got.astype(want.dtype) != want).sum())
    tally.note(name, float(different), 0.0)
    if not different:
        return
    if precise is not None and (precise != want).any():
        tally.unstable = tally.unstable or f"{name}: {different} values differ at {_where(reference)}, as in float64"
    else:
        tally.mismatch = tally.mismatch or f"{name}: {different} of {want.size} values differ at {_where(reference)}"


def max_difference(got: Array, want: Array) -> tuple[float, str | None]:
    """Return the largest absolute difference, and what makes the two incomparable (NaN, infinity).

    A number beyond 1e30 counts as infinite: masks are filled with the lowest number of their type.

    >>> max_difference(np.array([1.0, np.nan]), np.array([1.5, np.nan]))
    (0.5, None)
    >>> max_difference(np.array([np.nan]), np.array([1.0]))
    (inf, 'has 1 NaN where PyTorch has none')
    """
    a, b = got.astype(np.float64), want.astype(np.float64)
    extra = np.isnan(a) & ~np.isnan(b)
    if extra.any():
        return float("inf"), f"has {int(extra.sum())} NaN where PyTorch has none"
    if (np.isnan(b) & ~np.isnan(a)).any():
        return float("inf"), "has numbers where PyTorch has NaN"
    infinite = (np.abs(a) >= _INFINITY) | (np.abs(b) >= _INFINITY)
    both = (np.abs(a) >= _INFINITY) & (np.abs(b) >= _INFINITY) & (np.sign(a) == np.sign(b))
    if (infinite & ~both).any():
        return float("inf"), "differs where one side is infinite"
    usable = ~(np.isnan(b) | infinite)
    return (float(np.abs(a[usable] - b[usable]).max()) if usable.any() else 0.0), None
