"""What a model and its graph choose among numbers that are equal but for rounding is told from what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from onnx_config.export.choices import ChoiceWatch, Order, Threshold
from onnx_config.export.graph_choices import choices_of_graph
from onnx_config.export.graph_file import write_graph
from onnx_config.export.parity import Outcome, ParityResult, check_parity
from onnx_config.export.reference import Reference, compute_references
from onnx_config.export.session import open_session
from onnx_config.export.shapes import CheckShape
from tests.onnx_config.converted import edited
from tests.onnx_config.test_trace import Small, traced

QUERIES, FEATURES = 6, 8


class Detector(Small):
    """Takes the best queries of many by scores that rounding makes equal, as those of a model never trained are."""

    def build(self) -> None:
        self.score = torch.nn.Linear(FEATURES, 3)
        self.box = torch.nn.Linear(FEATURES, 4)
        self.layer = torch.nn.Linear(FEATURES, FEATURES)
        # So large a bias leaves of the scores what is beyond a fifty-thousandth of it.
        self.score.bias.data = torch.tensor([900.0, 901.0, 902.0])
        self.score.weight.data *= 2e-3

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.score(x)
        best, places = scores.max(-1).values.topk(QUERIES, dim=1)
        taken = x.gather(1, places.unsqueeze(-1).expand(-1, -1, FEATURES))
        hidden = torch.tanh(self.layer(taken))
        logits = torch.nn.functional.linear(hidden, self.score.weight)
        return {"logits": logits, "boxes": self.box(hidden) * self.scale, "best": best}


class Sparse(Small):
    """Attends to the best of scores that are cut off at zero, and sends each row to its own expert."""

    def build(self) -> None:
        self.query = torch.nn.Linear(FEATURES, FEATURES)
        self.router = torch.nn.Linear(FEATURES, 2)
        self.experts = torch.nn.Parameter(torch.randn(2, FEATURES, FEATURES) / 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = torch.relu(self.query(x) @ x.transpose(1, 2) - 1)
        chosen = scores.topk(QUERIES, dim=-1).indices
        hidden = torch.zeros_like(scores).scatter(-1, chosen, 1.0) @ x
        rows = hidden.flatten(0, 1)
        weight, routed = torch.softmax(self.router(rows), -1).max(-1)
        if torch.compiler.is_exporting():
            # What the exporter is given in place of the product by groups, as transformers does.
            mixed = torch.bmm(rows.unsqueeze(1), self.experts[routed]).squeeze(1)
        else:
            order = routed.argsort(stable=True)
            ends = torch.bincount(routed, minlength=2).cumsum(0).to(torch.int32)
            mixed = torch.empty_like(rows)
            mixed[order] = torch.nn.functional.grouped_mm(rows[order], self.experts, offs=ends)
        return {"y": (mixed * weight.unsqueeze(-1)).view_as(x) * self.scale}


class Masking(Small):
    """Lets through what lies above a threshold, at which many numbers lie but for rounding."""

    def build(self) -> None:
        self.inner = torch.nn.Linear(FEATURES, FEATURES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        moved = self.inner(x) * self.scale
        return {"y": torch.where(moved**3 + 100 > 100, moved, -moved)}


class Nearest(Small):
    """Replaces each vector by the nearest of a few, of which there are pairs."""

    def build(self) -> None:
        book = torch.randn(5, FEATURES)
        self.book = torch.nn.Parameter(torch.cat([book, book + 1e-6 * torch.randn(5, FEATURES)]))
        self.names = torch.nn.Parameter(torch.randn(10, 2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        apart = (x.unsqueeze(-2) - self.book).square().sum(-1)
        return {"y": self.names[(apart + 1000).argmin(-1)] * self.scale, "apart": apart}


MODELS: dict[str, tuple[type[Small], tuple[str, ...]]] = {
    "top-k": (Detector, ("logits", "boxes", "best")),
    "top-k-of-zeros": (Sparse, ("y",)),
    "threshold": (Masking, ("y",)),
    "argmin": (Nearest, ("y", "apart")),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Reference]]:
    """Return a graph and what PyTorch says at four shapes."""
    made, names = MODELS[request.param]
    torch.manual_seed(0)
    model = made()
    path: Path = tmp_path_factory.mktemp("choices") / "model.onnx"
    result = traced(model, {"x": (("batch_size", 2), ("rows", 40), ("", FEATURES))}, names)
    write_graph(result.model, path, metadata={})
    random = np.random.default_rng(0)
    feeds = [
        (
            CheckShape(label=f"shape {rows}", sizes={"batch_size": batch, "rows": rows}),
            {"x": random.standard_normal((batch, rows, FEATURES)).astype(np.float32)},
        )
        for batch, rows in ((1, 50), (3, 47), (1, 30), (2, 90))
    ]
    return path, compute_references(model, feeds, flags={})[0]


def judge(path: Path, references: list[Reference], *, with_choices: bool = True) -> ParityResult:
    choices = partial(choices_of_graph, path, device="cpu", threads=1) if with_choices else None
    session = open_session(path, device="cpu")
    return check_parity(session, references, expected=references[0].outputs, choices=choices)


def test_equal_numbers_may_be_chosen_among(case: tuple[Path, list[Reference]]) -> None:
    path, references = case
    assert judge(path, references, with_choices=False).outcome is not Outcome.VERIFIED
    result = judge(path, references)
    assert result.outcome is Outcome.VERIFIED, result.detail
    assert result.shapes == 4
    assert any("equal but for rounding, at shape" in note for note in result.notes)
    # Not by a wide tolerance: what follows a choice is compared as strictly as ever.
    assert all(o.max_abs_diff <= o.tolerance for o in result.outputs)
    assert all(o.tolerance < 1e-3 for o in result.outputs if o.name != "best")


def test_any_weight_that_is_off_is_found_behind_a_choice_too(
    case: tuple[Path, list[Reference]], tmp_path: Path
) -> None:
    path, references = case
    model = onnx.load(str(path))
    weights = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and _size(i) > 1]
    assert weights
    for weight in weights:
        kept = weight.SerializeToString()
        values = numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array((values * 1.001).astype(np.float32), weight.name))
        onnx.save(model, str(tmp_path / "model.onnx"))
        result = judge(tmp_path / "model.onnx", references)
        assert result.outcome is Outcome.MISMATCH, (weight.name, result.detail)
        weight.ParseFromString(kept)


def test_a_graph_that_does_not_say_what_lies_inside_has_the_same_choices(tmp_path: Path) -> None:
    class Late(Small):
        """Takes the best of what lies behind the first row."""

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            late = torch.arange(x.shape[1]) > torch.ones(1, dtype=torch.int64) * x.shape[0] - 1
            return {"y": torch.where(late, x * self.scale, -9.0).topk(2, dim=-1).indices}

    path = tmp_path / "model.onnx"
    write_graph(traced(Late(), {"x": (("batch_size", 2), ("rows", 40))}, ["y"]).model, path, metadata={})

    def forget(model: onnx.ModelProto) -> None:
        assert {"Greater", "TopK"} <= {node.op_type for node in model.graph.node}
        del model.graph.value_info[:]

    untold = edited(path, forget, tmp_path / "untold.onnx")
    x = np.random.default_rng(0).standard_normal((1, 9)).astype(np.float32)
    told, found = (choices_of_graph(p, {"x": x}, device="cpu", threads=1) for p in (path, untold))
    # Not the comparison of whole numbers.
    assert len(told) == len(found) == 1
    np.testing.assert_array_equal(told[0].places, found[0].places)
    np.testing.assert_array_equal(told[0].scores, found[0].scores)


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims))


class Unseen(Small):
    """Takes queries by scores that no output shows, and that are close to one another."""

    def build(self) -> None:
        self.score = torch.nn.Linear(FEATURES, 1)
        self.score.bias.data.fill_(2.3)
        self.score.weight.data.copy_(0.01 * torch.tensor([1.0, -1.3, 0.7, 0.4, -0.8, 1.1, 0.6, -0.5]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        _, places = (self.score(x) + 0 * self.scale).squeeze(-1).topk(QUERIES, dim=1)
        return {"taken": x.gather(1, places.unsqueeze(-1).expand(-1, -1, FEATURES))}


def test_what_makes_other_scores_is_no_exchange_of_equal_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Unseen(), tmp_path / "model.onnx"
    result = traced(model, {"x": (("batch_size", 2), ("rows", 40), ("", FEATURES))}, ["taken"])
    write_graph(result.model, path, metadata={})
    random = np.random.default_rng(0)
    feeds = []
    for batch, rows in ((1, 50), (3, 48), (1, 30), (2, 90)):
        half = random.standard_normal((batch, rows // 2, FEATURES)).astype(np.float32)
        # Each row has a twin of the same score, made up of other features.
        twin = half.copy()
        twin[..., 0] += 1e-3 / 0.01
        twin[..., 1] += 1e-3 / 0.013
        shape = CheckShape(label=f"shape {rows}", sizes={"batch_size": batch, "rows": rows})
        feeds.append((shape, {"x": np.concatenate([half, twin], axis=1)}))
    references, _ = compute_references(model, feeds, flags={})
    assert judge(path, references).outcome is Outcome.VERIFIED

    def tilt(graph: onnx.ModelProto) -> None:
        (weight,) = (i for i in graph.graph.initializer if _size(i) == FEATURES)
        values = numpy_helper.to_array(weight).copy()
        values.flat[0] *= 1.001
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    wrong = edited(path, tilt, tmp_path / "wrong.onnx")
    taken = [open_session(p, device="cpu").run(None, dict(references[0].inputs))[0] for p in (path, wrong)]
    assert np.abs(taken[0] - taken[1]).max() > 0, "the fault takes no other rows, and nothing could be found"
    assert judge(wrong, references).outcome is Outcome.MISMATCH


def take_the_worst(model: onnx.ModelProto) -> None:
    (top,) = (node for node in model.graph.node if node.op_type == "TopK")
    for attribute in top.attribute:
        if attribute.name == "largest":
            top.attribute.remove(attribute)
    top.attribute.append(helper.make_attribute("largest", 0))


def take_the_second_best(model: onnx.ModelProto) -> None:
    """Leave the best of each row out."""
    (top,) = (node for node in model.graph.node if node.op_type == "TopK")
    places = top.output[1]
    top.output[1] = "one_more"
    add = [
        numpy_helper.from_array(np.array([QUERIES + 1], np.int64), "count_of_more"),
        numpy_helper.from_array(np.array([1], np.int64), "from_the_second"),
        numpy_helper.from_array(np.array([QUERIES + 1], np.int64), "to_the_end"),
    ]
    model.graph.initializer.extend(add)
    top.input[1] = "count_of_more"
    at = list(model.graph.node).index(top)
    cut = helper.make_node("Slice", ["one_more", "from_the_second", "to_the_end", "from_the_second"], [places])
    model.graph.node.insert(at + 1, cut)


def take_one_twice(model: onnx.ModelProto) -> None:
    (top,) = (node for node in model.graph.node if node.op_type == "TopK")
    places = top.output[1]
    top.output[1] = "once"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0] * QUERIES, np.int64), "the_first"))
    at = list(model.graph.node).index(top)
    model.graph.node.insert(at + 1, helper.make_node("Gather", ["once", "the_first"], [places], axis=1))


@pytest.mark.parametrize("case", ["top-k"], indirect=True)
@pytest.mark.parametrize("change", [take_the_worst, take_the_second_best, take_one_twice])
def test_a_choice_that_is_none_is_a_mismatch(
    case: tuple[Path, list[Reference]], tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    path, references = case
    # Scores that differ by more than rounding, so that there is one right answer.
    result = judge(edited(path, change, tmp_path / "model.onnx"), references)
    assert result.outcome is Outcome.MISMATCH, result.detail


# --------------------------------------------------------------------------------------------------- what is noted


X = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]])


@pytest.mark.parametrize(
    ("call", "places"),
    [
        pytest.param(lambda x: x.topk(2), [[0, 2], [1, 2]], id="topk"),
        pytest.param(lambda x: x.topk(1, dim=0, largest=False), [[1], [0], [0]], id="topk-along-another-axis"),
        pytest.param(lambda x: x[None].topk(2, dim=1), [[[0, 1], [1, 0], [1, 0]]], id="topk-between-other-axes"),
        pytest.param(lambda x: x.sort(), [[1, 2, 0], [0, 2, 1]], id="sort"),
        pytest.param(lambda x: x.sort(dim=-1, descending=True, stable=True), [[0, 2, 1], [1, 2, 0]], id="stable"),
        pytest.param(lambda x: x.argsort(-1), [[1, 2, 0], [0, 2, 1]], id="argsort"),
        pytest.param(lambda x: x.max(-1), [[0], [1]], id="max"),
        pytest.param(lambda x: x.min(0, keepdim=True), [[1], [0], [0]], id="min-that-keeps-the-axis"),
        pytest.param(lambda x: x.argmax(0), [[0], [1], [1]], id="argmax"),
        pytest.param(lambda x: x.argmin(), [1], id="argmin-of-all"),
        pytest.param(lambda x: x > 2.5, [[True, False, False], [False, True, True]], id="greater"),
        pytest.param(lambda x: x <= x[:, :1], [[True, True, True], [True, False, False]], id="less-or-equal"),
    ],
)
def test_choices_are_written_down_and_made_the_same_again(call: Callable[[Any], Any], places: Any) -> None:
    with ChoiceWatch() as watch:
        wanted = call(X)
    (choice,) = watch.choices
    assert choice.places.tolist() == places
    with ChoiceWatch(lambda number, own: watch.choices[number].places) as again:
        found = call(X)
    assert again.exchanged == 0
    plain, *watched = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (call(X), wanted, found))
    for tensors in watched:
        assert all(torch.equal(one, other) for one, other in zip(plain, tensors, strict=True))
        # A model may take another view of what it got.
        assert [t.stride() for t in tensors] == [t.stride() for t in plain]


def test_another_choice_comes_with_its_own_numbers() -> None:
    with ChoiceWatch(lambda number, own: torch.tensor([[2, 1], [0, 2]])) as watch:
        values, places = X.topk(2)
    assert (values.tolist(), places.tolist()) == ([[2.0, 1.0], [1.0, 4.0]], [[2, 1], [0, 2]])
    assert watch.exchanged == 1


def test_whole_numbers_are_never_chosen_among() -> None:
    with ChoiceWatch() as watch:
        torch.tensor([3, 1, 2]).topk(2)
        torch.arange(4) > 2  # noqa: B015
    assert watch.choices == []


@pytest.mark.parametrize(
    ("places", "distance"),
    [
        pytest.param([0, 2], 0.0, id="the-same"),
        pytest.param([2, 0], 1.0, id="in-another-order"),
        pytest.param([0, 1], 1.0, id="another-one"),
        pytest.param([0, 0], None, id="one-twice"),
        pytest.param([0, 3], None, id="what-is-not-there"),
        pytest.param([0], None, id="too-few"),
    ],
)
def test_how_far_a_choice_is_from_the_best(places: list[int], distance: float | None) -> None:
    order = Order(scores=X[0], places=torch.tensor([0, 2]), sorted=True, axis=0)
    assert order.distance(torch.tensor(places)) == distance


def test_the_order_of_what_is_not_sorted_is_no_choice() -> None:
    order = Order(scores=X[0], places=torch.tensor([0, 2]), sorted=False, axis=0)
    assert order.distance(torch.tensor([2, 0])) == 0.0


def test_how_far_a_number_is_from_its_threshold() -> None:
    threshold = Threshold(scores=torch.tensor([0.5, -0.25]), places=torch.tensor([True, False]))
    assert threshold.distance(torch.tensor([True, True])) == 0.25
    assert threshold.distance(torch.tensor([1, 0])) is None
