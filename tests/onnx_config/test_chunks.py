"""Models that work through a text by chunks: their graphs hold for any number of those."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import transformers

from onnx_config.errors import ModelError
from onnx_config.export import loops, sample, triangular
from onnx_config.export.generation import NEW_TOKENS
from onnx_config.export.one_chunk import OneChunkError, one_chunk_behind
from onnx_config.export.session import open_session
from onnx_config.export.substitutions import HELPER
from onnx_config.export.trace import Trace
from onnx_config.spec import ModelSpec, TensorSpec, is_past
from tests.onnx_config.test_cached_model import Continued
from tests.onnx_config.test_trace import Small, run, shapes, traced

Tensor = torch.Tensor

LENGTHS = (1, 7, 8, 9, 16, 17, 45)
CHUNK = 8


class Chunked(Small):
    """Fills its text up to whole chunks and hands a state from each to the next."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        length = x.shape[1]
        lacking = (CHUNK - length % CHUNK) % CHUNK
        whole = torch.nn.functional.pad(x, (0, 0, 0, lacking))
        chunks = whole.reshape(x.shape[0], -1, CHUNK, x.shape[-1])
        within = chunks @ chunks.transpose(-1, -2)
        within = -within.tril(-1) * 0.1
        for i in range(1, CHUNK):
            row = within[..., i, :i].clone()
            above = within[..., :i, :i].clone()
            within[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
        chunks = chunks + within @ chunks
        state = torch.zeros_like(x[:, 0])
        made = torch.zeros_like(chunks)
        for i in range((length + lacking) // CHUNK):
            made[:, i] = chunks[:, i] + state[:, None] * self.scale
            state = state * self.scale + chunks[:, i].sum(1)
        return {"y": made.flatten(1, 2)[:, :length], "state": state}


class Windowed(Small):
    """Takes so many tokens after the other, at the end as many as there are."""

    size = CHUNK

    def build(self) -> None:
        self.decay = torch.nn.Parameter(torch.linspace(0.5, 0.9, CHUNK)[:, None])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        length = x.shape[1]
        state = torch.zeros_like(x[:, 0])
        made, marks = [], []
        for i in range((length + self.size - 1) // self.size):
            start = i * self.size
            end = min(start + self.size, length)
            here = end - start
            part = x[:, start:end]
            made.append(part * self.decay[-here:] + state[:, None])
            marks.append(state)
            state = state * torch.exp(-self.scale * here) + (part * self.decay[:here]).sum(1)
        joined = torch.cat(made, dim=1)
        entries = []
        last = state
        for i in range(length):
            last = last * self.scale + joined[:, i : i + 1].mean(1)
            entries.append(last[:, None])
        return {
            "y": joined,
            "each": torch.cat(entries, dim=-2),
            "state": state,
            "last": last,
            "marks": torch.stack(marks, dim=1),
        }


class Blocked(Small):
    """Lets every other token see those of its block, the last of which is filled up."""

    def build(self) -> None:
        self.queries = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x[:, ::2] * self.scale
        length = x.shape[1]
        seen = torch.ones(x.shape[:2], dtype=torch.bool)
        lacking = -length % CHUNK
        if lacking > 0:
            x = torch.nn.functional.pad(x, (0, 0, 0, lacking))
            seen = torch.nn.functional.pad(seen, (0, lacking), value=False)
        number = x.shape[0] * (x.shape[1] // CHUNK)
        blocks = self.queries(x).reshape(number, CHUNK, 2, -1).transpose(1, 2)
        scores = blocks @ blocks.transpose(-1, -2)
        scores = scores.masked_fill(~seen.reshape(number, CHUNK)[:, None, None], -1e9).softmax(-1)
        return {"y": (scores @ blocks).transpose(1, 2).reshape(x.shape[0], -1, x.shape[-1])[:, :length]}


def of_length(length: int) -> dict[str, tuple[tuple[str, int], ...]]:
    return {"x": (("batch_size", 2), ("sequence_length", length), ("", 4))}


def test_a_graph_holds_for_any_number_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_MODELS", __name__)
    model = Chunked()
    result = traced(model, of_length(19), ["y", "state"], lengths={19})
    assert shapes(result)["y"] == ("batch_size", "sequence_length", 4)
    operators = [node.op_type for node in result.model.graph]
    assert operators.count("Scan") == 1
    # Nothing is left of the loop over the rows of a chunk.
    assert "ScatterND" not in operators
    assert len(operators) < 80
    for batch in (1, 3):
        for length in LENGTHS:
            x = torch.rand(batch, length, 4)
            wanted = model(x)
            for name, value in run(result, tmp_path / "model.onnx", x=x).items():
                torch.testing.assert_close(torch.from_numpy(value), wanted[name].detach())


def test_a_block_of_each_row_is_one_chunk_of_it(tmp_path: Path) -> None:
    model = Blocked()
    with pytest.raises(OneChunkError) as caught:
        traced(model, of_length(13), ["y"], lengths={13})
    assert caught.value.most == 2 * CHUNK
    result = traced(model, of_length(19), ["y"], lengths={19})
    assert shapes(result)["x"] == ("batch_size", "sequence_length", 4)
    for batch, length in ((1, 3), (3, 16), (2, 17), (3, 32), (1, 45)):
        x = torch.rand(batch, length, 4)
        got = run(result, tmp_path / "model.onnx", x=x)
        torch.testing.assert_close(torch.from_numpy(got["y"]), model(x)["y"].detach())


def test_so_many_tokens_after_the_other_are_as_many_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_MODELS", __name__)
    model, names = Windowed(), ["y", "each", "state", "last", "marks"]
    with pytest.raises(OneChunkError) as caught:
        traced(model, of_length(5), names, lengths={5})
    assert (caught.value.size, caught.value.most) == (5, CHUNK)
    result = traced(model, of_length(21), names, lengths={21})
    assert shapes(result)["x"] == ("batch_size", "sequence_length", 4)
    assert [node.op_type for node in result.model.graph].count("Scan") == 2
    for batch in (1, 3):
        for length in LENGTHS:
            x = torch.rand(batch, length, 4)
            wanted = model(x)
            for name, value in run(result, tmp_path / "model.onnx", x=x).items():
                torch.testing.assert_close(torch.from_numpy(value), wanted[name].detach())


def test_a_trace_for_one_chunk_says_how_long_that_is() -> None:
    model = Chunked()
    with pytest.raises(OneChunkError) as caught:
        traced(model, of_length(5), ["y", "state"], lengths={5})
    assert (caught.value.size, caught.value.most) == (5, CHUNK)
    assert one_chunk_behind(caught.value) is caught.value
    # A size that is not said to be the length of a text is what it is.
    assert traced(model, of_length(5), ["y", "state"], lengths={6}).model.graph


def test_what_was_refused_is_found_behind_what_others_made_of_it() -> None:
    refused, made = OneChunkError(5, 8), RuntimeError("while tracing")
    made.__context__ = refused
    assert one_chunk_behind(made) is refused
    assert one_chunk_behind(ModelError("no")) is None
    assert one_chunk_behind(None) is None


def writes_its_chunk(x: Any, n: Any) -> Any:
    made = x * 0
    state = x[0] * 0
    for i in range(n):
        state = state + x[i * 8 : (i + 1) * 8].sum(0)
        made[i * 8 : (i + 1) * 8] = state
    return made


def counts_its_chunks(x: Any, n: Any) -> Any:
    state = x[0] * 0
    for i in range(n):
        state = state * i + x[i * 8 : (i + 1) * 8].sum(0)
    return state


def moves_on_by_itself(x: Any, n: Any) -> Any:
    state, start = x[0] * 0, 0
    for i in range(n):
        start = start + i
        state = state + x[start : start + 8].sum(0)
    return state


@pytest.mark.parametrize(
    "function",
    [writes_its_chunk, counts_its_chunks],
    ids=lambda function: function.__name__.replace("_", "-"),
)
def test_what_does_more_with_its_number_than_take_a_chunk_is_left_alone(function: Callable[..., Any]) -> None:
    assert isinstance(function, FunctionType)
    assert loops.rewritten(function) is None


def takes_overlapping_chunks(x: Any, n: Any, size: int) -> Any:
    state = x[0] * 0
    for i in range(n):
        start = i * size
        state = state + x[start : start + size + 1].sum(0)
    return state


def takes_every_other_chunk(x: Any, n: Any, size: int) -> Any:
    state = x[0] * 0
    for i in range(n):
        start = 2 * i * size
        state = state + x[start : start + size].sum(0)
    return state


def weighs_by_its_place(x: Any, n: Any, size: int) -> Any:
    state = x[0] * 0
    for i in range(n):
        start = i * size
        state = state + x[start : start + size].sum(0) * start
    return state


@pytest.mark.parametrize(
    "function",
    [takes_overlapping_chunks, takes_every_other_chunk, weighs_by_its_place, moves_on_by_itself],
    ids=lambda function: function.__name__.replace("_", "-"),
)
def test_chunks_that_do_not_lie_one_behind_the_other_are_not_taken_for_such(function: Callable[..., Any]) -> None:
    assert isinstance(function, FunctionType)
    code = loops.rewritten(function)
    steps = function if code is None else FunctionType(code, {**loops._HELPERS, "range": range})

    class AnyLength(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return steps(x, (x.shape[0] + 7) // 8, *((8,) if steps.__code__.co_argcount > 2 else ()))

    length = {0: torch.export.Dim.AUTO}
    traced = torch.export.export(AnyLength(), (torch.rand(21, 2),), dynamic_shapes={"x": length}, strict=False)
    assert "scan" not in str(traced.graph)


FREE = ModelSpec(
    model_type="m",
    task="t",
    task_family="t",
    preprocessor=None,
    parameters=None,
    architecture="A",
    inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),),
    outputs=(),
    sizes={"batch_size": 2, "sequence_length": 19},
    axis_ranges={"batch_size": (1, None), "sequence_length": (1, None)},
)
EIGHTS = replace(FREE, sizes={"batch_size": 2, "sequence_length": 24}, axis_steps={"sequence_length": 8})
SHORT = replace(FREE, axis_ranges={"batch_size": (1, None), "sequence_length": (1, 64)})


@pytest.mark.parametrize(
    ("spec", "fixed", "chunks", "refused", "tried", "untried"),
    [
        pytest.param(FREE, (), (), False, [19], [], id="no-chunks"),
        pytest.param(FREE, (), (64,), False, [19, 75], [], id="one-chunk-becomes-two"),
        pytest.param(FREE, (), (64, 256), False, [19, 75, 267], [], id="chunks-of-two-lengths"),
        # Longer than all that is compared otherwise.
        pytest.param(FREE, (), (512,), False, [19, 523], [513], id="long-chunks"),
        pytest.param(FREE, (), (64,), True, [19, 75, 19], [65], id="the-longer-one-cannot-be-traced"),
        pytest.param(SHORT, (), (64,), False, [19, 19], [], id="the-model-takes-one-chunk-at-most"),
        pytest.param(FREE, ("sequence_length",), (64,), False, [19], [], id="a-length-that-is-fixed-anyway"),
        pytest.param(EIGHTS, (), (64,), False, [24, 80], [], id="a-text-of-whole-eights"),
    ],
)
def test_a_sample_of_one_chunk_is_made_longer(
    spec: ModelSpec,
    fixed: tuple[str, ...],
    chunks: tuple[int, ...],
    refused: bool,
    tried: list[int],
    untried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def trace(spec: ModelSpec, at: dict[str, int], inputs: Any, lengths: Collection[int] = ()) -> Trace:
        size = at["sequence_length"]
        sizes.append(size)
        assert inputs == size
        if (longest := next((c for c in chunks if size <= c), None)) is not None and size in lengths:
            raise OneChunkError(size, longest)
        if refused and size > spec.sizes["sequence_length"]:
            raise ModelError("too long")
        return Trace(model=onnx_ir.Model(onnx_ir.Graph([], [], nodes=[]), ir_version=10), notes=())

    monkeypatch.setattr(sample, "tensors_of", lambda spec, universal, sizes: sizes["sequence_length"])
    given: Any = SimpleNamespace(sizes=spec.sizes, inputs=spec.sizes["sequence_length"])
    found = sample._of_any_number_of_chunks(trace, spec, None, given, fixed=fixed)
    assert sizes == tried
    assert {**spec.sizes, **found.sizes}["sequence_length"] == tried[-1]
    assert list(found.untried) == [("sequence_length", size) for size in untried]


# ---------------------------------------------------------------------------------------- rows of a triangular system


def adds_the_rows_above(a: Any, n: int) -> None:
    for i in range(1, n):
        row = a[..., i, :i].clone()
        above = a[..., :i, :i].clone()
        a[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)


def adds_them_at_once(a: Any, n: int) -> None:
    for i in range(n):
        a[..., i, :i] = a[..., i, :i] + (a[..., i : i + 1, :i] @ a[..., :i, :i]).squeeze(-2)


def takes_them_away(a: Any, n: int) -> None:
    for i in range(1, n):
        a[..., i, :i] = a[..., i, :i] - (a[..., i, :i].unsqueeze(-1) * a[..., :i, :i]).sum(-2)


def adds_what_was_there(a: Any, n: int) -> None:
    before = a.clone()
    for i in range(1, n):
        a[..., i, :i] = a[..., i, :i] + (a[..., i, :i].unsqueeze(-1) * before[..., :i, :i]).sum(-2)


def forgets_the_first(a: Any, n: int) -> None:
    for i in range(2, n):
        a[..., i, 1:i] = a[..., i, 1:i] + (a[..., i, 1:i].unsqueeze(-1) * a[..., 1:i, 1:i]).sum(-2)


def one_matrix_of_all(a: Any, n: int) -> None:
    for i in range(1, n):
        a[0, i, :i] = a[0, i, :i] + (a[0, i, :i].unsqueeze(-1) * a[0, :i, :i]).sum(-2)


def counts(a: Any, n: int) -> None:
    for i in range(n):
        a[..., i, :i] = a[..., i, :i] + i


@pytest.mark.parametrize(
    ("loop", "does"),
    [
        (adds_the_rows_above, True),
        (adds_them_at_once, True),
        (takes_them_away, False),
        (adds_what_was_there, False),
        (forgets_the_first, False),
        (one_matrix_of_all, False),
        (counts, False),
    ],
    ids=lambda value: value.__name__.replace("_", "-") if callable(value) else "",
)
def test_a_loop_that_solves_a_triangular_system_is_told_by_what_it_leaves(
    loop: Callable[..., None], does: bool
) -> None:
    assert isinstance(loop, FunctionType)
    assert [triangular.inverts(loop, torch.zeros(2, size, size), size) for size in (5, 8, 64)] == [does] * 3
    # Not all of the rows, rows that are not as many as columns, and what is no matrix.
    assert not triangular.inverts(loop, torch.zeros(2, 8, 8), 7)
    assert not triangular.inverts(loop, torch.zeros(2, 8, 9), 8)
    assert not triangular.inverts(loop, [[0.0]], 1)


@pytest.mark.parametrize("rows", [2, 3, 16, 37, 64])
@pytest.mark.parametrize("above", [False, True])
def test_a_few_products_leave_what_the_rows_leave(rows: int, above: bool) -> None:
    torch.manual_seed(rows)
    given = torch.randn(3, rows, rows) * rows**-0.5
    given = given if above else given.tril(-1)
    wanted, found = given.double(), given.clone()
    adds_the_rows_above(wanted, rows)
    triangular.inverted_in_place(found)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_like_tokens_of_a_chunk_are_no_loss_of_digits() -> None:
    # Powers of this matrix are as large as 1e18, and its inverse has ones alone.
    given = -torch.ones(64, 64).tril(-1)
    wanted, found = given.double(), given.clone()
    adds_the_rows_above(wanted, 64)
    triangular.inverted_in_place(found)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def reads_another(a: Any, b: Any, n: int) -> Any:
    for i in range(1, n):
        a[..., i, :i] = a[..., i, :i] + (a[..., i, :i].unsqueeze(-1) * b[..., :i, :i]).sum(-2)
    return a


def writes_two(a: Any, b: Any, n: int) -> Any:
    for i in range(1, n):
        a[..., i, :i] = a[..., i, :i] * 2
        b[..., i, :i] = b[..., i, :i] * 2
    return a


def bends(a: Any, n: int) -> Any:
    for i in range(1, n):
        a[..., i, :i] = a[..., i, :i].relu()
    return a


def calls_what_it_likes(a: Any, n: int) -> Any:
    for i in range(1, n):
        a[..., i, :i] = torch.exp(a[..., i, :i])
    return a


@pytest.mark.parametrize(
    "function",
    [reads_another, writes_two, bends, calls_what_it_likes],
    ids=lambda function: function.__name__.replace("_", "-"),
)
def test_other_loops_over_rows_are_left_alone(function: Callable[..., Any]) -> None:
    assert isinstance(function, FunctionType)
    assert loops.rewritten(function) is None


def test_a_loop_over_rows_means_the_same_where_it_is_rewritten() -> None:
    assert isinstance(adds_the_rows_above, FunctionType)
    code = loops.rewritten(adds_the_rows_above)
    assert code is not None
    given = torch.randn(2, 3, 8, 8).tril(-1)
    wanted, found = given.clone(), given.clone()
    adds_the_rows_above(wanted, 8)
    FunctionType(code, {HELPER: triangular, "range": range})(found, 8)
    torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.slow
def test_texts_of_any_length_begin_and_go_on_across_the_end_of_a_chunk(tmp_path: Path) -> None:
    made = Continued("qwen3_next-causal-lm", tmp_path)
    result = made.parity()
    assert result["outcome"] == "verified", result["detail"]
    assert result["notes"] == [
        f"generates the {NEW_TOKENS} tokens that PyTorch does, after 3 prompts padded on the left"
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(made.source).eval()
    session = open_session(made.graph, device="cpu")
    names = [value.name for value in session.get_outputs()]
    states = [t for t in made.spec.inputs if is_past(t.name)]
    sizes = {**made.spec.sizes, "batch_size": 2, "past_sequence_length": 0}
    whole = [((), length) for length in (1, 2, 63, 64, 65, 128, 129, 300)]
    for cuts, length in [*whole, ((60, 61, 62, 63, 64, 65), 90), ((1, 66), 130), ((65, 195), 200)]:
        ids = torch.randint(1, 60, (2, length))
        past: dict[str, Any] = {t.name: np.zeros(t.resolve(sizes), t.dtype) for t in states}
        kept, end = None, 0
        for part in torch.tensor_split(ids, cuts, dim=1):
            start, end = end, end + part.shape[1]
            with torch.no_grad():
                wanted = model(input_ids=part, past_key_values=kept, use_cache=True)
            kept = wanted.past_key_values
            positions = np.arange(start, end)[None].repeat(2, 0)
            feed = {"input_ids": part.numpy(), "attention_mask": np.ones((2, end), np.int64), "position_ids": positions}
            answer = dict(zip(names, session.run(names, {**feed, **past}), strict=True))
            torch.testing.assert_close(torch.from_numpy(answer["logits"]), wanted.logits, rtol=1e-4, atol=1e-5)
            past = {name: answer[name.replace("past_key_values", "present", 1)] for name in past}
