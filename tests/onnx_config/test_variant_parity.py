"""What is allowed of a variant: by row or by the largest number, calibrated or not, and what counts as a choice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnx_config.export.reference import Reference
from onnx_config.export.shapes import CheckShape
from onnx_config.export.variant_parity import VariantResult, compare_variant
from onnx_config.variants import Variant

WANT = np.random.default_rng(0).standard_normal((4, 6, 16)).astype(np.float32)
MASK = np.array([[1] * 6, [1] * 6, [1] * 6, [1, 1, 1, 0, 0, 0]])


def session(got: np.ndarray, name: str = "logits") -> Any:
    """Return what answers ``got`` to anything."""
    return SimpleNamespace(
        get_outputs=lambda: [SimpleNamespace(name=name)],
        get_inputs=lambda: [SimpleNamespace(name="attention_mask")],
        get_providers=lambda: ["CPUExecutionProvider"],
        run=lambda _names, _feed: [got],
    )


def judge(
    got: np.ndarray, variant: Variant, *, want: np.ndarray = WANT, own: np.ndarray | None = None, name: str = "logits"
) -> VariantResult:
    shape = CheckShape(label="odd sizes", sizes={"batch_size": 4})
    reference = Reference(shape=shape, inputs={"attention_mask": MASK}, outputs={name: want}, precise=None)
    halves = [None if own is None else {name: own}]
    return compare_variant(session(got, name), [reference], variant=variant, own=halves)


def spoilt(place: Any, value: float) -> np.ndarray:
    got = WANT.copy()
    got[place] = value
    return got


ONE_ROW_LOST = spoilt(2, 0.0)
NOISE = np.random.default_rng(1).standard_normal(WANT.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("got", "variant", "said"),
    [
        pytest.param(WANT + 0.001, Variant.FP16, None, id="half-rounding"),
        pytest.param(WANT + 0.3 * NOISE, Variant.FP16, "is off by .* at odd sizes", id="half-far"),
        pytest.param(spoilt((1, 2, 3), 60000.0), Variant.FP16, "is off by", id="half-one-number"),
        pytest.param(spoilt((1, 2, 3), np.inf), Variant.FP16, "infinite", id="half-overflow"),
        pytest.param(spoilt((1, 2, 3), np.nan), Variant.Q4, "has 1 NaN where PyTorch has none", id="nan"),
        pytest.param(WANT + 0.1 * NOISE, Variant.INT8, None, id="int8-noise"),
        pytest.param(WANT + 0.3 * NOISE, Variant.INT8, "is off by", id="int8-far"),
        pytest.param(WANT + 0.3 * NOISE, Variant.Q4, None, id="q4-noise"),
        pytest.param(spoilt((3, slice(3, None)), 9.0), Variant.INT8, None, id="int8-behind-the-mask"),
        pytest.param(spoilt((3, slice(0, 3)), 9.0), Variant.INT8, "is off by", id="int8-before-the-mask"),
        pytest.param(spoilt((3, slice(3, None)), 9.0), Variant.FP16, "is off by", id="half-behind-the-mask"),
        pytest.param(ONE_ROW_LOST, Variant.Q4, "is off by 100", id="one-row-lost"),
        pytest.param(WANT[:3], Variant.Q4, "has the shape", id="shape"),
    ],
)
def test_what_is_allowed(got: np.ndarray, variant: Variant, said: str | None) -> None:
    result = judge(got, variant)
    if said is None:
        assert (result.outcome, result.detail) == ("verified", None)
    else:
        assert result.outcome == "mismatch"
        with pytest.raises(ValueError, match=said):
            raise ValueError(result.detail)


@pytest.mark.parametrize(
    ("own", "holds"),
    [
        pytest.param(WANT + 0.01, True, id="torch-is-off-as-much"),
        pytest.param(WANT + 0.0001, False, id="torch-is-closer"),
        pytest.param(None, True, id="torch-cannot"),
        pytest.param(spoilt((0, 0, 0), np.inf), True, id="torch-overflows"),
    ],
)
def test_halves_are_measured_by_what_torch_is_off_by(own: np.ndarray | None, holds: bool) -> None:
    result = judge(WANT + np.float32(0.03), Variant.FP16, own=own)
    assert result.outcome == ("verified" if holds else "mismatch")


def test_however_far_torch_is_off_there_is_an_end() -> None:
    assert judge(WANT * 1.1, Variant.FP16, own=WANT * 1.2).outcome == "mismatch"


def test_choices_are_counted_where_something_was_said() -> None:
    got = WANT.copy()
    got[3, 3:] = -got[3, 3:]  # behind the mask
    got[0, 0] = np.roll(got[0, 0], 1)
    agreement = judge(got, Variant.Q4).agreement
    assert agreement is not None
    assert (agreement.choices, agreement.rate) == (21, 20 / 21)
    assert judge(WANT, Variant.Q4, name="last_hidden_state").agreement is None
