"""A class built without numbers has the modules and shapes of one that has them."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers

from onnx_config.meta_build import built_on_meta


@pytest.mark.parametrize("name", ["bert-masked-lm", "swin-model", "t5-conditional-generation", "beit-model"])
def test_it_has_the_shapes_of_one_with_numbers(name: str) -> None:
    cls, config = getattr(transformers, tiny_models.FAMILIES[name].architecture), tiny_models.config(name)
    real, built = cls(config), built_on_meta(cls, config)
    tensors = [(*model.named_parameters(), *model.named_buffers()) for model in (built, real)]
    described = [[(n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in found] for found in tensors]
    assert described[0] == described[1]
    assert all(t.is_meta for _, t in built.named_parameters())


def test_only_what_has_no_numbers_is_left_unfilled() -> None:
    class Counted(torch.nn.Module):
        def __init__(self, _: object) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.nn.init.ones_(torch.empty(3)))
            self.steps = torch.nn.init.constant_(torch.empty(4, device="cpu"), 7.0)

    built = built_on_meta(Counted, None)
    assert built.weight.is_meta
    assert built.steps.tolist() == [7.0] * 4
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_it_takes_nothing_from_the_generator() -> None:
    before = torch.random.get_rng_state()
    built_on_meta(transformers.BertModel, tiny_models.config("bert-model"))
    assert torch.equal(torch.random.get_rng_state(), before)
