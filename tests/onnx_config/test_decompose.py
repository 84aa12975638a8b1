"""Programs that need no second trace compute the same without it; those that need one get it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch

from onnx_config.export.decompose import decomposed_where_needed


class Called(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(torch.nn.functional.linear(x, self.weight))


def a_chain_of_writes(y: torch.Tensor) -> torch.Tensor:
    y.add_(1.0)
    y.mul_(2.0)
    return y + y.clamp_(min=3.0)


def a_write_seen_through_a_view(y: torch.Tensor) -> torch.Tensor:
    flat = y.view(-1)
    y.add_(1.0)
    return flat * 2


def a_view_between_two_writes(y: torch.Tensor) -> torch.Tensor:
    y.add_(1.0)
    flat = y.view(-1)
    y.mul_(3.0)
    return flat + 1


def a_write_into_a_part(y: torch.Tensor) -> torch.Tensor:
    y[:, 0].add_(5.0)
    return y * 1.0


def a_write_under_two_names(y: torch.Tensor) -> torch.Tensor:
    z = y.to(torch.float32)
    z.add_(1.0)
    return y + z


def a_write_of_a_larger_type(y: torch.Tensor) -> torch.Tensor:
    return y.add_(torch.full((3,), 1.0 / 3, dtype=torch.float64)) * 3


def masks(y: torch.Tensor) -> torch.Tensor:
    kept = (y > 0) & (y < 50) | (y > 60)
    return torch.max(y, y.to(torch.float64).to(torch.float32) * 2) * kept.to(y.dtype) + torch.min(y, -y)


def best_of_two(y: torch.Tensor) -> torch.Tensor:
    values, _ = y.topk(2, dim=-1)
    values.div_(values.sum(dim=-1, keepdim=True))
    return values


def a_new_tensor_written_to(y: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(y).scatter_add_(1, torch.zeros_like(y, dtype=torch.int64), y)


def a_conversion_to_what_it_is(y: torch.Tensor) -> torch.Tensor:
    return (y + 1).to(torch.float32)


def a_write_to_what_is_returned(y: torch.Tensor) -> torch.Tensor:
    y.add_(1.0)
    return y


def a_constant(y: torch.Tensor) -> torch.Tensor:
    return y * torch.tensor([1.0, 2.0, 3.0])


def a_batch_norm(y: torch.Tensor) -> torch.Tensor:
    mean, variance, scale = torch.arange(3.0), torch.arange(1.0, 4.0), torch.full((3,), 0.5)
    return torch.nn.functional.batch_norm(y, mean, variance, scale, mean, eps=0.25)


def poolings_to_one(y: torch.Tensor) -> torch.Tensor:
    whole = torch.nn.functional.adaptive_avg_pool2d(y[None, None], (1, 1)).reshape(1)
    return y * whole + torch.nn.functional.adaptive_avg_pool1d(y[None], 1)[0]


def a_pooling_to_more(y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(torch.cat([y, y, y], dim=1)[None, None, :1], (1, 3))[0, 0] + y


def a_clip(y: torch.Tensor) -> torch.Tensor:
    return torch.clip(y, 2.0, 30.0) + torch.clip(y, torch.tensor(1.0), torch.tensor(9.0))


def a_truth_about_all(y: torch.Tensor) -> torch.Tensor:
    return y + torch.ops.aten._is_all_true(y > 0) + torch.ops.aten._is_any_true(y > 40)


def a_truth_and_a_write_into_a_part(y: torch.Tensor) -> torch.Tensor:
    return a_write_into_a_part(a_truth_about_all(y))


def grids(y: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(y.shape[0]), torch.arange(3), indexing="ij")
    return y * rows + (1 - torch.outer(y[:, 0], y[0])) + columns.reshape_as(y)


def turns(y: torch.Tensor) -> torch.Tensor:
    turned = torch.view_as_complex(torch.stack([y, y + 1], dim=-1)) * torch.polar(y, y)
    return turned.real + turned.imag


def statistics(y: torch.Tensor) -> torch.Tensor:
    return torch.std(y, dim=-1, keepdim=True) + y.square() + torch.nn.functional.one_hot(y.argmax(-1), 3)


def an_operator_of_parts_that_is_written_to(y: torch.Tensor) -> torch.Tensor:
    seen = torch.movedim(y, 0, 1)
    y.add_(1.0)
    return seen.movedim(0, 1) * 2


def a_step_that_compares_sizes(y: torch.Tensor) -> torch.Tensor:
    state = torch.zeros(y.shape[0], 2)
    weights, hidden = torch.ones(6, 3) / 8, torch.ones(6, 2) / 4
    return torch.gru_cell(y, state, weights, hidden) + y[:, :2]


def writes_into_parts_of_parts(y: torch.Tensor) -> torch.Tensor:
    grid = torch.zeros(y.shape[0], 3, 4, 2)
    turned = grid.transpose(1, 2)
    turned[:, 1:3, 0] = y.new_ones(2)
    turned[:, -1:, :2, 1].add_(y[:, :2].unsqueeze(1))
    rows = turned[:, 2]
    grid[:, 0, 2:] = 7
    grid.unsqueeze(1)[:, :, 1].mul_(2.0)
    return torch.cat([grid.flatten(1), rows.flatten(1) * y[:, :1], turned.sum(1).flatten(1)], 1)


def a_write_of_a_larger_whole_number(y: torch.Tensor) -> torch.Tensor:
    counts = (y * 10).to(torch.int32) + 1
    counts[:, 1:].mul_(torch.tensor([3, 2_000_000_000]))
    return y + counts


def paddings_in_words(y: torch.Tensor) -> torch.Tensor:
    weight = torch.arange(1.0, 4.0).view(1, 1, 3)
    rows = torch.conv1d(y.unsqueeze(1), weight, padding="same") + torch.conv1d(
        y.unsqueeze(1), weight[..., :2], padding="valid"
    ).sum(-1, keepdim=True)
    flat = torch.conv2d(y.view(-1, 1, 1, y.shape[1]), torch.ones(1, 1, 1, 1), padding="valid")
    return rows.squeeze(1) + flat.flatten(1)


def one_of_several_parts(y: torch.Tensor) -> torch.Tensor:
    first = y.split(2, 1)[0]
    y[:, 0].add_(5.0)
    return first * 1.0


def an_axis_is_added_in_place(y: torch.Tensor) -> torch.Tensor:
    row = y[:, 0]
    row.unsqueeze_(1)
    return row + y


def writes_into_a_product_and_a_reshaped_copy(y: torch.Tensor) -> torch.Tensor:
    product = torch.einsum("ij,kj->ik", y, y[:2]).unsqueeze_(1)
    product.mul_(2.0)
    copy = (y + 1).reshape(-1, 3, 1)
    copy[:, :2].mul_(3.0)
    filled = y.new_zeros(y.shape[0], 6).view(y.shape[0], 3, 2).transpose(1, 2)
    filled[:, 0].copy_(y)
    return filled.flatten(1) + product.sum(2) + copy.flatten(1).repeat(1, 2)


def a_write_that_nobody_reads(y: torch.Tensor) -> torch.Tensor:
    torch.empty(3).detach().uniform_(0.0, 1.0)
    return y + 1


def a_division(y: torch.Tensor) -> torch.Tensor:
    return (y * 7).floor_divide_(torch.arange(1.0, 4.0)) + y


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SPARED = [
    a_write_to_what_is_returned,
    a_chain_of_writes,
    masks,
    best_of_two,
    a_new_tensor_written_to,
    a_constant,
    a_write_under_two_names,
    a_conversion_to_what_it_is,
    a_batch_norm,
    poolings_to_one,
    a_clip,
    a_truth_about_all,
    a_pooling_to_more,
    grids,
    turns,
    statistics,
    a_write_seen_through_a_view,
    a_view_between_two_writes,
    a_write_into_a_part,
    a_truth_and_a_write_into_a_part,
    writes_into_parts_of_parts,
    a_write_that_nobody_reads,
    a_division,
    paddings_in_words,
    writes_into_a_product_and_a_reshaped_copy,
    an_operator_of_parts_that_is_written_to,
]
TRACED_AGAIN = [
    a_write_of_a_larger_type,
    one_of_several_parts,
    a_write_of_a_larger_whole_number,
    an_axis_is_added_in_place,
    a_step_that_compares_sizes,
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    run = torch.export.ExportedProgram.run_decompositions

    def counting(*args: object, **options: object) -> object:
        calls.append(None)
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counting)
    return calls


@pytest.mark.parametrize(
    ("function", "again"),
    [*((f, False) for f in SPARED), *((f, True) for f in TRACED_AGAIN)],
    ids=[f.__name__ for f in (*SPARED, *TRACED_AGAIN)],
)
def test_what_is_traced_again_and_what_is_not_computes_the_same(
    function: Callable[[torch.Tensor], torch.Tensor], again: bool, counted: list[None]
) -> None:
    model = Called(function).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes={"x": {0: batch}}, strict=False)
    with decomposed_where_needed():
        made = torch.onnx.export(program, args=(), verbose=False)
    assert bool(counted) == again
    assert made is not None
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    for rows in (1, 2, 5):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-5, atol=1e-5)


def test_torch_is_left_as_it_was() -> None:
    from torch.onnx._internal.exporter import _fx_passes

    before = _fx_passes.decompose_with_registry
    with decomposed_where_needed():
        assert _fx_passes.decompose_with_registry is not before
    assert _fx_passes.decompose_with_registry is before
