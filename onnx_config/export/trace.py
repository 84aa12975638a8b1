"""From a loaded model to an ONNX graph, through ``transformers.exporters``.

The only module that knows the exporter. It is given explicit dynamic shapes, since its own automatic
ones leave opaque axes that are not tied, and the axes get their names back afterwards. An axis
that cannot be traced as dynamic is fixed and reported, never silently.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import onnx_ir
import torch
from onnx_ir.passes.common import NameFixPass

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.alike_layers import alike_layers, shortened, without_layers
from onnx_config.export.asked_sizes import asked_of_sizes
from onnx_config.export.attention import attention_as_in_torch
from onnx_config.export.cpu_limit import OutOfTimeError, cpu_limit
from onnx_config.export.decompose import decomposed_where_needed
from onnx_config.export.escapes import DecisionError, Escapes, replayed
from onnx_config.export.fourier import transforms_by_tables
from onnx_config.export.granted import condition_name, conditions_returned, refuse_otherwise
from onnx_config.export.graph_names import keep_outputs, name_axes, name_like_forward
from onnx_config.export.grids import grids_in_tensors
from onnx_config.export.idle_work import no_idle_work
from onnx_config.export.kept_numbers import numbers_of_tensors
from onnx_config.export.loops import loops_as_scans
from onnx_config.export.narrowed import narrowed_sizes_told
from onnx_config.export.one_chunk import one_chunk_behind, refused_one_chunk
from onnx_config.export.one_symbol import Place, one_symbol_per_axis
from onnx_config.export.operators import symbolic_operators
from onnx_config.export.recurrent import recurrent_layers_whole
from onnx_config.export.repeated_layers import Repetition
from onnx_config.export.rewriting import exact_patterns
from onnx_config.export.rows import row_axis, scan_rows
from onnx_config.export.scattered import scattered_if_any
from onnx_config.export.symbolic import symbolic_builtins
from onnx_config.export.ties import ties_as_in_torch
from onnx_config.export.vacuous import no_vacuous_equations
from onnx_config.export.views import written_parts_kept
from onnx_config.export.whole_chunks import reckoned_by_chunks
from onnx_config.module_state import preserved_state
from onnx_config.spec import TensorSpec, axes_of, base_axis, is_sum, size_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NO_SIZE", "Trace", "reads_values", "trace_model"]

NO_SIZE = (
    "Neither config.json nor preprocessor_config.json says which size images are brought to, so that there is none "
    "to fix."
)
"""Why a graph for one size of images was not made."""

_IMAGE_AXES = ("height", "width")
_FREE_AXES = ("batch_size", "sequence_length")
_UNBOUNDED = 2**31
_SMALL_IMAGE = 64

# Windows and patches of an image whose size is unknown can take torch's solver minutes.
_IMAGE_AXES_CPU_SECONDS = 80.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A graph and what was learned while it was made."""

    model: onnx_ir.Model
    """The graph with its weights."""

    notes: tuple[str, ...]
    """Axes that had to be fixed, and why."""

    untried: tuple[tuple[str, int], ...] = ()
    """Axes with the sizes next to those that torch vouches for: there, the model's code took another branch."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Dynamic axis -> size that it was traced at; empty: those of the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """One way of tracing."""

    axes: frozenset[str]
    """Axes that stay dynamic."""
    automatic: bool
    """Whether torch may find out how the axes relate, rather than being told that they do not."""
    cpu_seconds: float | None = None
    """Processor time after which it is given up; ``None``: none."""
    rows: str | None = None
    """The axis that counts rows, where they are computed one after another; ``None``: all at once."""


class _FixedAxesError(ValueError):
    """The model's code fixes axes without which a graph is of no use."""

    def __init__(self, axes: Iterable[str]) -> None:
        self.axes = frozenset(axes)
        super().__init__(f"the model's code fixes {', '.join(sorted(self.axes))} at the size that it is traced at")


_LASTING = (OutOfTimeError, _FixedAxesError)
"""How an attempt ends that the next one with the same axes would end in, too."""


def trace_model(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    specs: Iterable[TensorSpec],
    outputs: Iterable[str],
    *,
    axis_ranges: Mapping[str, tuple[int, int | None]],
    opset: int | None,
    flags: Mapping[str, Any],
    optimize: bool = True,
    fixed: Iterable[str] = (),
    tied: bool = False,
    escapes: Callable[[], tuple[Mapping[str, torch.Tensor], Escapes]] | None = None,
    reading: Escapes | None = None,
    decides: str | None = None,
    sides: bool = True,
    before_optimizing: Callable[[onnx_ir.Model], None] | None = None,
    lengths: Collection[int] = (),
    joined: Collection[str] = (),
    repeats: bool = False,
) -> Trace:
    """Return the graph of ``model`` with named axes and only the outputs asked for.

    Args:
        model: The loaded model; it is the same after the call.
        inputs: Sample inputs, no dynamic axis of size 1.
        specs: The inputs' names, shapes and axes.
        outputs: Output names to keep, of those that the model returns.
        axis_ranges: Dynamic axis -> smallest and largest size.
        opset: ONNX opset; ``None``: the exporter's default.
        flags: Further keyword arguments of ``forward``, such as ``use_cache=False``.
        optimize: Whether the exporter folds constants and removes dead nodes.
        fixed: Axes to fix at the sample's size although they are declared dynamic.
        tied: Whether the model has a top-k that chooses among equal values.
        escapes: Returns inputs to trace with instead, and what the model's code reads of its tensors, for a model that
            cannot be traced without; ``None``: not known.
        reading: What it reads of them, where that is known already.
        decides: A decision that ``reading`` is always the same about; whether it is so is a further output then.
        sides: Whether the size of images may be fixed at the sample's, since that is the one that they are brought to.
        before_optimizing: Is given the graph as translated, of which constants are then folded; changes it in place.
        lengths: The sizes in ``inputs`` that are the length of a text and may be another one.
        joined: Outputs in which all rows lie one after another.
        repeats: Whether layers that differ in nothing but their weights may be traced once.

    Raises:
        OneChunkError: If the model works through its text by chunks, and one of ``lengths`` is within the first.
        ModelError: If every attempt failed (``export_failed``); the message is that of the last one. Where the model
            decides by the values of its inputs, its cause is a `DecisionError`.
    """
    tensors = tuple(specs)
    kept = (*outputs, *([] if decides is None else [condition_name(decides)]))
    axes = frozenset(a for spec in tensors for a in spec.axis_names) - frozenset(fixed)
    notes: list[str] = []
    failures: list[tuple[_Attempt, Exception]] = []
    attempts = _attempts(axes, sides=sides)
    while attempts := attempts or _attempts_by_rows(failures, tensors):
        attempt = attempts.pop(0)
        if failures and isinstance(failures[-1][1], _LASTING) and failures[-1][0].axes == attempt.axes:
            continue
        try:
            with cpu_limit(attempt.cpu_seconds):
                export = partial(_repeated, outputs=kept) if repeats and attempt.rows is None else _export
                program, bounds, taken, asked = export(
                    model,
                    inputs if attempt.rows is None else _one_row(inputs, tensors, attempt.rows),
                    tensors,
                    attempt,
                    axis_ranges=axis_ranges,
                    opset=opset,
                    flags=flags,
                    optimize=optimize,
                    tied=tied,
                    # What was read of many rows says nothing about what is read of one.
                    reading=reading if attempt.rows is None else None,
                    before_optimizing=before_optimizing,
                    lengths=lengths,
                )
        # torch, onnxscript and the exporter each raise their own; any of them ends this attempt only.
        except Exception as error:  # noqa: BLE001
            if (one_chunk := one_chunk_behind(error)) is not None:
                raise one_chunk from None
            failures.append((attempt, error))
            if isinstance(error, DecisionError):
                break
            if attempt.rows is None and reading is None and escapes is not None and reads_values(error):
                inputs, reading = escapes()
                attempts = _attempts(axes, sides=sides)
            continue
        refuse_otherwise(program, kept)
        names, said, lost = name_axes(program, tensors, attempt.axes)
        if useless := _useless(lost):
            failures.append((attempt, _FixedAxesError(useless)))
            continue
        if untraceable := sorted(axes - attempt.axes - {attempt.rows}):
            why = [error for failed, error in failures if failed.axes.issuperset(untraceable)]
            notes.append(
                f"{', '.join(untraceable)} could not be traced as dynamic and is fixed: {_first_line(why[-1])}"
            )
        keep_outputs(program, kept)
        if attempt.rows is not None:
            try:
                over = [t.name for t in tensors if t.shape and t.shape[0] == attempt.rows]
                scan_rows(program, attempt.rows, over, joined=joined)
            except ValueError as error:
                failures.append((attempt, error))
                continue
            NameFixPass()(program)
            notes.append(f"the rows of {attempt.rows} are computed one after another, as the model's code does")
        return Trace(model=program, notes=(*notes, *taken, *said), untried=_untried(names, bounds, axis_ranges, asked))
    last = failures[-1][1]
    open_sides = not sides and any(axis.endswith(_IMAGE_AXES) for axis in axes)
    hint = f". {NO_SIZE}" if open_sides else ""
    raise ModelError(
        f"{type(model).__name__} could not be traced in {len(failures)} attempts. "
        f"The last one ended with {_first_line(last)}{hint}",
        kind=ErrorKind.EXPORT_FAILED,
    ) from last


def _useless(fixed: Iterable[str]) -> list[str]:
    """Return the axes without which a graph is of no use.

    One for the one image size that a preprocessor makes is; one for the batch or the length that happened to be traced
    is not.
    """
    return sorted(axis for axis in fixed if axis.endswith(_FREE_AXES))


def reads_values(error: BaseException | None) -> bool:
    """Return whether a trace failed since the model's code reads values that a trace does not have."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    reads = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    told = (".numpy() is not supported", "a fake tensor in the exported program constant")
    return isinstance(error, reads) or any(words in str(error) for words in told)


def _attempts(axes: frozenset[str], *, sides: bool) -> list[_Attempt]:
    """Return what to try, in this order: with all axes, and, of images, with the size that preprocessors make."""
    attempts = []
    if found := {axis for axis in axes if axis.endswith(_IMAGE_AXES)}:
        attempts = [_Attempt(axes=axes, automatic=a, cpu_seconds=_IMAGE_AXES_CPU_SECONDS) for a in (False, True)]
        if not sides:
            return attempts
        axes -= found
    return [*attempts, _Attempt(axes=axes, automatic=False), _Attempt(axes=axes, automatic=True)]


def _attempts_by_rows(failures: Iterable[tuple[_Attempt, Exception]], specs: tuple[TensorSpec, ...]) -> list[_Attempt]:
    """Return the attempts that failed for the number of rows alone, now with one row; none the second time."""
    again = []
    for attempt, error in failures:
        if attempt.rows is not None:
            return []
        rows = row_axis(specs, attempt.axes)
        if rows is not None and isinstance(error, _FixedAxesError) and error.axes == {rows}:
            again.append(replace(attempt, axes=attempt.axes - {rows}, automatic=True, rows=rows))
    return again


def _one_row(inputs: Mapping[str, torch.Tensor], specs: tuple[TensorSpec, ...], axis: str) -> dict[str, torch.Tensor]:
    counted = {spec.name for spec in specs if spec.shape and spec.shape[0] == axis}
    return {name: tensor[:1] if name in counted else tensor for name, tensor in inputs.items()}


def _repeated(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    specs: tuple[TensorSpec, ...],
    attempt: _Attempt,
    *,
    outputs: Sequence[str],
    **options: Any,
) -> tuple[onnx_ir.Model, dict[str, tuple[int, int]], list[str], set[str]]:
    """Return what `_export` does, of a trace of few layers where all others are like them."""
    stacks = alike_layers(model, inputs) if options["optimize"] else ()
    if not stacks:
        return _export(model, inputs, specs, attempt, **options)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    few = {name: inputs[name] for name in without_layers(stacks, inputs)}
    repetition = Repetition(stacks=stacks, tensors=tensors, inputs=list(inputs), outputs=outputs)
    try:
        with shortened(model, stacks):
            few_specs = tuple(spec for spec in specs if spec.name in few)
            return _export(model, few, few_specs, attempt, repetition=repetition, **options)
    # What would end the trace of all layers too, and as late.
    except (*_LASTING, DecisionError, torch._dynamo.exc.UserError):
        raise
    # Whatever else a model that lacks layers raises, with all of them it need not.
    except Exception as error:
        if one_chunk_behind(error) is not None or reads_values(error):
            raise
        return _export(model, inputs, specs, attempt, **options)


def _export(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    specs: tuple[TensorSpec, ...],
    attempt: _Attempt,
    *,
    axis_ranges: Mapping[str, tuple[int, int | None]],
    opset: int | None,
    flags: Mapping[str, Any],
    optimize: bool,
    tied: bool,
    reading: Escapes | None,
    before_optimizing: Callable[[onnx_ir.Model], None] | None,
    lengths: Collection[int],
    repetition: Repetition | None = None,
) -> tuple[onnx_ir.Model, dict[str, tuple[int, int]], list[str], set[str]]:
    """Return the graph, the sizes for which its trace holds, by torch's symbols, and what it takes for granted.

    And the symbols of the sizes that the model's code compares with one.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.exporter_onnx import OnnxExporter

    bounds: dict[str, tuple[int, int]] = {}
    places = {(s.name, i): axis for s in specs for i, axis in s.axes.items() if attempt.axes & set(axes_of(axis))}

    def refuse_constants(constant: Collection[Place]) -> None:
        fixed = {axis for place in constant if place in places for axis in axes_of(places[place])}
        # The graph would be made in vain.
        if useless := _useless(fixed):
            raise _FixedAxesError(useless)

    # Stands between the two, where the traced program passes by.
    class Listening(DynamoExporter):
        def export_program(self, *arguments: Any, **options: Any) -> Any:
            with narrowed_sizes_told(refuse_constants) as range_of:
                traced, metadata = super().export_program(*arguments, **options)
            for symbol, declared in _ranges(traced):
                limits = declared & range_of(symbol)
                # Numbers that were read of values may be negative without an end.
                bounds[str(symbol)] = (int(max(limits.lower, 0)), int(min(limits.upper, _UNBOUNDED)))
            return traced, metadata

    class Exporter(OnnxExporter, Listening): ...

    exporter = Exporter()  # type: ignore[no-untyped-call]

    dims: dict[str, Any] = {}
    sums = {axis for spec in specs for axis in spec.axes.values() if is_sum(axis) and attempt.axes & set(axes_of(axis))}
    for axis in attempt.axes | sums:
        largest = axis_ranges.get(axis, (1, None))[1]
        # torch reads a lower bound of 2 or less as "not specialised"; a graph traced so runs at 1 too. Of a sum, it
        # insists on what that makes.
        lowest = 2 * len(axes_of(axis)) if is_sum(axis) else _least_vouched_for(axis, specs, inputs)
        dims[axis] = (
            torch.export.Dim.AUTO if attempt.automatic else torch.export.Dim(_symbol(axis), min=lowest, max=largest)
        )
    shapes = {
        spec.name: {
            position: _dimension(axis, dims, automatic=attempt.automatic)
            for position, axis in spec.axes.items()
            if base_axis(axis) in dims
        }
        for spec in specs
    }
    config = OnnxConfig(
        dynamic_shapes=_nested(shapes),
        opset_version=opset,
        optimize=optimize,
        prefer_deferred_runtime_asserts_over_guards=not attempt.automatic,
    )
    with _while_traced(model, lengths), contextlib.ExitStack() as stack:
        asked = stack.enter_context(asked_of_sizes())
        stack.enter_context(one_symbol_per_axis(places))
        if tied:
            stack.enter_context(ties_as_in_torch())
        if before_optimizing is not None:
            stack.enter_context(_hooked(before_optimizing))
        if repetition is not None:
            # Entered last, and therefore called first.
            stack.enter_context(_hooked(repetition.complete))
        replay = None if reading is None else stack.enter_context(replayed(reading))
        grids = stack.enter_context(grids_in_tensors(model))
        stack.enter_context(conditions_returned(model, grids.granted, {} if replay is None else replay.granted))
        exported = exporter.export(model, {**_nested(inputs), **flags}, config)
    program = exported.program
    if not isinstance(program, onnx_ir.Model):
        raise TypeError(f"the exporter returned a {type(program).__name__}")
    if repetition is not None:
        repetition.name(program)
    name_like_forward(program)
    return program, bounds, [] if replay is None else replay.notes, {str(size.node.expr) for size in asked}


@contextlib.contextmanager
def _while_traced(model: Any, lengths: Collection[int]) -> Iterator[None]:
    """Have torch, transformers and the exporter do what traces of all models need, until the exit."""
    with (
        # torch.onnx prints its progress and its failure reports to stdout, which belongs to our caller.
        contextlib.redirect_stdout(io.StringIO()),
        # A model that adapts itself to the sizes it meets would hide that from the next attempt.
        preserved_state(model),
        symbolic_builtins(model),
        loops_as_scans(model),
        numbers_of_tensors(model),
        symbolic_operators(model),
        recurrent_layers_whole(),
        _nothing_prepared(),
        written_parts_kept(),
        scattered_if_any(),
        transforms_by_tables(model),
        decomposed_where_needed(),
        exact_patterns(),
        no_idle_work(),
        no_vacuous_equations(),
        refused_one_chunk(lengths),
        reckoned_by_chunks(),
        # To keep a result of symbolic sizes for the next time takes longer than to work it out again.
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        attention_as_in_torch(),
    ):
        yield


def _least_vouched_for(axis: str, specs: Iterable[TensorSpec], inputs: Mapping[str, torch.Tensor]) -> int:
    """Return the smallest size for which torch is to vouch; what is smaller is for the comparison to show.

    Of an image so small that its patches or its windows run out, models make another one first, and torch would insist
    on hearing that at the end of a whole trace.
    """
    if not axis.endswith(_IMAGE_AXES):
        return 1
    sizes = [inputs[s.name].shape[i] for s in specs for i, name in s.axes.items() if name == axis and s.name in inputs]
    return _SMALL_IMAGE if sizes and min(sizes) >= 2 * _SMALL_IMAGE else 1


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the parts of their dotted names, which no argument of a function can have.

    >>> _nested({"ids": 1, "past.0.key": 2})
    {'ids': 1, 'past': {'0': {'key': 2}}}
    """
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *parts, last = name.split(".")
        place = nested
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def _hooked(hook: Callable[[onnx_ir.Model], None]) -> Any:
    """Call ``hook`` with a translated graph before torch optimizes it."""
    original = torch.onnx.ONNXProgram.optimize

    def optimize(program: torch.onnx.ONNXProgram) -> None:
        hook(program.model)
        original(program)

    return patch.object(torch.onnx.ONNXProgram, "optimize", optimize)


def _nothing_prepared() -> Any:
    """Keep the exporter from computing further inputs out of those given.

    It would compute positions, say, from the sample's token ids, and the graph would take them for every text's.
    """
    from transformers.exporters import utils

    return patch.object(utils, "precompute_export_inputs", lambda model, inputs: None)


def _ranges(traced: Any) -> Iterable[tuple[Any, Any]]:
    return [(symbol, bounds) for symbol, bounds in traced.range_constraints.items() if bounds.is_int]


def _untried(
    names: Mapping[str, str],
    bounds: Mapping[str, tuple[int, int]],
    declared: Mapping[str, tuple[int, int | None]],
    asked: Collection[str],
) -> tuple[tuple[str, int], ...]:
    """Return the axes with those sizes that are declared to be possible, next to the ones that the trace holds for."""
    found = []
    for symbol, axis in names.items():
        if is_sum(axis):
            continue  # Its terms are tried.
        lowest, highest = bounds.get(symbol, (0, _UNBOUNDED))
        low, high = declared.get(axis, (1, None))
        # Size 1 is compared at in any case; torch sets all else apart from it.
        if lowest > max(low, 2):
            found.append((axis, lowest - 1))
        if symbol in asked and low <= 1:
            found.append((axis, 1))
        if highest < (_UNBOUNDED if high is None else high):
            found.append((axis, highest + 1))
    return tuple(sorted(set(found)))


def _dimension(axis: str, dims: Mapping[str, Any], *, automatic: bool) -> Any:
    """Return torch's dimension for an axis, which may be a multiple of another one."""
    dim = dims[base_axis(axis)]
    return dim if automatic or base_axis(axis) == axis else dim * size_of(axis, {base_axis(axis): 1})


def _symbol(axis: str) -> str:
    return re.sub(r"\W", "_", axis)


def _first_line(error: BaseException) -> str:
    """Return in one line what ended an attempt, and what lay at the bottom of it."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    # torch.onnx wraps what went wrong in an error that only says at which of its steps.
    telling = [e for e in chain if "of exporting the model to ONNX" not in str(e)] or chain
    said = dict.fromkeys(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}" for e in (telling[0], telling[-1]))
    return ", caused by ".join(said)
