"""Loops over the steps of a text become a scan that holds for every length, and other loops stay as they are."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch

from onnx_config.export.loops import scanned_loops

NUMBERS = count()


def module_of(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module of one class whose ``forward(x)`` has ``body``, as if it were one of transformers."""
    path = folder / "modeling_scanned.py"
    head = "import torch\n\n\nclass Scanned(torch.nn.Module):\n    def forward(self, x):\n"
    path.write_text(head + indent(dedent(body), " " * 8))
    # torch keeps modules by their names.
    name = f"transformers.models.scanned.modeling_scanned_{next(NUMBERS)}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.Scanned().eval()


def traced(model: torch.nn.Module) -> Any:
    dims = {0: torch.export.Dim("rows", min=1), 1: torch.export.Dim("steps", min=1)}
    with scanned_loops(model):
        return torch.export.export(model, (torch.randn(2, 5, 3),), dynamic_shapes=(dims,), strict=False)


SCANNED = {
    "carried-and-stacked": """
        state = torch.zeros(x.shape[0], x.shape[2])
        found = []
        for step in range(x.shape[1]):
            state = 0.5 * state + x[:, step]
            found.append(state * state)
        return torch.stack(found, dim=1), state
    """,
    "stacked-last": """
        state = torch.zeros(x.shape[0], x.shape[2])
        found = []
        for step in range(x.shape[1]):
            state = state - x[:, step, :]
            found.append(state[:, 0])
        return torch.stack(found, dim=-1), state
    """,
    "written-to-its-place": """
        length = x.shape[1]
        state, found = torch.zeros(x.shape[0], x.shape[2]), torch.zeros_like(x)
        for step in range(0, length):
            turn = x[:, step].float()
            state = torch.maximum(state, turn)
            found[:, step] = (turn - state).to(found.dtype)
        return found, state
    """,
    "added-to": """
        total = torch.zeros(x.shape[0], x.shape[2])
        for step in range(x.shape[1]):
            total += x[:, step] ** 2
        return total, total
    """,
    "two-carried": """
        a, b = torch.zeros(x.shape[0], x.shape[2]), torch.ones(x.shape[0], x.shape[2])
        for step in range(x.shape[1]):
            a, b = b, 0.5 * a + x[:, step]
        return a, b
    """,
    "an-axis-made-beside": """
        state = torch.zeros(x.shape[0], x.shape[2], 1)
        for step in range(x.shape[1]):
            state = 0.9 * state + x[:, step, :, None]
        return state, state
    """,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", [pytest.param(value, id=name) for name, value in SCANNED.items()])
def test_a_loop_holds_for_every_length(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module_of(body, tmp_path, monkeypatch)
    program = traced(model)
    assert "scan" in str(program.graph)
    for rows, steps in ((2, 5), (1, 1), (3, 11)):
        x = torch.randn(rows, steps, 3)
        for got, want in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(got, want)


UNLIKE = {
    "leaves-early": "if step > 3:\n    break\nstate = state + x[:, step]",
    "reads-its-number": "state = state + x[:, step] * step",
    "looks-back": "state = state + x[:, step - 1]",
    "takes-a-part": "state = state + x[:, : step + 1].sum(1)",
    "keeps-in-itself": "self.kept = state = state + x[:, step]",
    "decides": "if True:\n    state = state + x[:, step]",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("turn", [pytest.param(value, id=name) for name, value in UNLIKE.items()])
def test_a_loop_that_does_more_stays_as_it_is(turn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "state = torch.zeros(x.shape[0], x.shape[2])\nfor step in range(x.shape[1]):\n" + indent(turn, "    ")
    model = module_of(f"{loop}\nreturn state", tmp_path, monkeypatch)
    code = type(model).forward.__code__
    with scanned_loops(model):
        assert type(model).forward.__code__ is code


def test_functions_are_their_own_again_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module_of(SCANNED["carried-and-stacked"], tmp_path, monkeypatch)
    code, stack = type(model).forward.__code__, torch.stack
    with scanned_loops(model):
        assert type(model).forward.__code__ is not code
    assert type(model).forward.__code__ is code
    assert torch.stack is stack


def test_where_lengths_are_numbers_it_is_the_loop_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module_of(SCANNED["written-to-its-place"], tmp_path, monkeypatch)
    x = torch.randn(2, 4, 3)
    want = model(x)
    with scanned_loops(model):
        for got, expected in zip(model(x), want, strict=True):
            assert torch.equal(got, expected)
