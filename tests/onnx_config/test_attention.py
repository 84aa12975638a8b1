"""Attention over nothing is in a graph what it is in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.onnx_config.test_trace import Small, run, traced


class Attention(Small):
    """Lets each position see those that a float says are there."""

    lowest = torch.finfo(torch.float32).min

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = self.mask(attention_mask > 0)[:, None, None]
        heads = x[:, None] * self.scale
        return {"y": torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)}

    def mask(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, self.lowest)


class InfiniteMask(Attention):
    lowest = float("-inf")


class BooleanMask(Attention):
    def mask(self, seen: torch.Tensor) -> torch.Tensor:
        return seen


@pytest.mark.parametrize("kind", [Attention, InfiniteMask, BooleanMask])
def test_a_row_that_sees_nothing(kind: type[Attention], tmp_path: Path) -> None:
    model = kind()
    axes = (("batch_size", 2), ("sequence_length", 6))
    result = traced(model, {"x": (*axes, ("", 4)), "attention_mask": axes}, ["y"])
    x, mask = torch.rand(3, 5, 4), torch.tensor([[1.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0], [0.0] * 5])
    got = run(result, tmp_path / "model.onnx", x=x, attention_mask=mask)["y"]
    torch.testing.assert_close(torch.from_numpy(got), model(x, mask)["y"].detach())


class ManyHeads(Small):
    """Attends with a mask of numbers or without one."""

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"y": torch.nn.functional.scaled_dot_product_attention(x, 2 * x, x + 1, attn_mask=added) * self.scale}


@pytest.mark.parametrize("masked", [False, True])
def test_keys_are_transposed_at_once(masked: bool, tmp_path: Path) -> None:
    model = ManyHeads()
    length = ("sequence_length", 6)
    inputs = {"x": (("batch_size", 2), ("", 3), length, ("", 4))}
    if masked:
        inputs["added"] = (("batch_size", 2), ("", 3), length, length)
    result = traced(model, inputs, ["y"])
    # Torch's translation takes the keys' axes apart and puts them together again.
    assert not {"Reshape", "Concat"} & {node.op_type for node in result.model.graph}
    given = {"x": torch.rand(3, 3, 5, 4)} | ({"added": torch.rand(3, 3, 5, 5)} if masked else {})
    got = run(result, tmp_path / "model.onnx", **given)["y"]
    torch.testing.assert_close(torch.from_numpy(got), model(**given)["y"].detach())


class AnyAxes(Small):
    """Attends over states of other than four axes."""

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"y": torch.nn.functional.scaled_dot_product_attention(x * self.scale, x, x[..., :3], attn_mask=added)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("before", [(), (3, 2), (3, 2, 2)], ids=["three", "five", "six"])
def test_states_of_any_number_of_axes(before: tuple[int, ...], masked: bool, tmp_path: Path) -> None:
    length = ("sequence_length", 6)
    rows = (("batch_size", 2), *(("", size) for size in before))
    inputs = {"x": (*rows, length, ("", 4))}
    if masked:
        inputs["added"] = (*rows, length, length)
    result = traced(AnyAxes(), inputs, ["y"])
    given = {"x": torch.rand(5, *before, 7, 4)} | ({"added": torch.rand(5, *before, 7, 7)} if masked else {})
    got = run(result, tmp_path / "model.onnx", **given)["y"]
    torch.testing.assert_close(torch.from_numpy(got), AnyAxes()(**given)["y"].detach())


class Causal(Small):
    """Has transformers make a causal mask, or none where that is what its layer does anyway."""

    def __init__(self, *, is_causal: bool, told: bool | None, made: Any = create_causal_mask) -> None:
        super().__init__()
        self.told = told
        self.made = made
        self.settings = transformers.LlamaConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1)
        self.settings._attn_implementation = "sdpa"
        self.layer = torch.nn.Identity()
        self.layer.is_causal = is_causal

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        past = {"past_key_values": None} if self.made is create_causal_mask else {}
        mask = self.made(config=self.settings, inputs_embeds=x, attention_mask=attention_mask, **past)
        heads = x[:, None] * self.scale
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        seen, _ = attend(self.layer, heads, heads, heads, mask, is_causal=self.told)
        return {"y": seen}


@pytest.mark.parametrize(
    ("made", "is_causal", "told", "hears"),
    [
        pytest.param(create_causal_mask, False, None, [True, False], id="not-causal"),
        pytest.param(create_causal_mask, True, None, [False, False], id="causal"),
        # As CLIP's texts are.
        pytest.param(create_causal_mask, False, True, [False, False], id="told-to-be"),
        pytest.param(create_causal_mask, True, False, [True, False], id="told-not-to-be"),
        pytest.param(create_bidirectional_mask, False, None, [True, True], id="for-all-not-causal"),
        # As the images of Phi-4 are.
        pytest.param(create_bidirectional_mask, True, None, [False, True], id="for-all-causal"),
        pytest.param(create_bidirectional_mask, True, False, [True, True], id="for-all-told-not-to-be"),
    ],
)
def test_a_layer_looks_at_what_it_does_in_pytorch_where_a_mask_hides_nothing_and_elsewhere(
    made: Any, is_causal: bool, told: bool | None, hears: list[bool], tmp_path: Path
) -> None:
    assert sees_later_tokens_by_padding(Causal(is_causal=is_causal, told=told, made=made), tmp_path) == hears


def test_where_nothing_can_be_hidden_there_is_no_mask(tmp_path: Path) -> None:
    """Three operators over all scores of each layer are 5 % of a ViT's time."""
    model = Causal(is_causal=False, told=None, made=create_bidirectional_mask)
    result = traced(model, {"x": (("batch_size", 2), ("patches", 6), ("", 4))}, ["y"])
    assert not {"Where", "Not", "Less", "Expand"} & {node.op_type for node in result.model.graph}
    x = torch.rand(3, 5, 4)
    got = run(result, tmp_path / "model.onnx", x=x)["y"]
    torch.testing.assert_close(torch.from_numpy(got), model(x)["y"].detach())


def sees_later_tokens_by_padding(model: Causal, tmp_path: Path) -> list[bool]:
    """Return whether the first token hears of the others, without and with padding, in PyTorch as in its graph."""
    axes = (("batch_size", 2), ("sequence_length", 6))
    result = traced(model, {"x": (*axes, ("", 4)), "attention_mask": axes}, ["y"])
    padded = torch.ones(2, 5)
    padded[1, 3:] = 0
    heard = []
    for mask in (torch.ones(2, 5), padded):
        x = torch.rand(2, 5, 4)
        other = x.clone()
        other[0, -1] += 1
        answers = []
        for given in (x, other, x[:, :1]):
            want = model(given, mask[:, : given.shape[1]])["y"].detach()
            got = run(result, tmp_path / "model.onnx", x=given, attention_mask=mask[:, : given.shape[1]])["y"]
            torch.testing.assert_close(torch.from_numpy(got), want)
            answers.append(want[0, 0])
        heard.append(not torch.equal(answers[0], answers[1]))
    return heard
