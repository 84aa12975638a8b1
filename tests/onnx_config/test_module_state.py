"""A probe leaves nothing behind in the process."""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from onnx_config import UniversalOnnxConfig
from onnx_config.module_state import preserved_state


@pytest.mark.parametrize("name", ["beit-model", "swin-model", "segformer-semantic-segmentation"])
def test_a_model_runs_as_ever_after_its_class_was_probed(name: str, tmp_path: Path) -> None:
    folder = tiny_models.build(name, tmp_path / name)
    onnx_config = UniversalOnnxConfig.from_model_path(folder)
    assert onnx_config.get_output_names()
    model = onnx_config.model_class.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**onnx_config.generate_dummy_inputs())
    assert type(outputs[0]) is torch.Tensor


def test_what_a_forward_writes_into_its_modules_is_undone() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.seen: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen.append(x.shape[0])
            self.register_forward_hook(lambda *_: None)
            return x

    module = Counting()
    with preserved_state(module):
        module(torch.ones(2))
        assert module.calls == 1
    assert (module.calls, module.seen, len(module._forward_hooks)) == (0, [], 0)


@pytest.mark.parametrize(
    "held",
    [{"b": 1, "a": 2}, OrderedDict(b=1, a=2), [3, 1], {3, 1}, {}, []],
    ids=["dict", "ordered", "list", "set", "empty-dict", "empty-list"],
)
@pytest.mark.parametrize("add", [False, True])
def test_a_container_holds_what_it_held_and_is_the_same_one(held: Any, add: bool) -> None:
    module = torch.nn.Module()
    module.held, before = held, copy(held)
    with preserved_state(module):
        held.clear()
        if add:
            getattr(held, "append", getattr(held, "add", lambda value: held.update(new=value)))(9)
    assert module.held is held
    assert held == before
    assert list(held) == list(before)
