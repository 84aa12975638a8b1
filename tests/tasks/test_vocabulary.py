"""The catalog repeats the words of the report and of the errors, since it imports neither; here they are held equal."""

from __future__ import annotations

from enum import StrEnum

import pytest

from db import vocabulary
from onnx_config.errors import ErrorKind
from tasks.report import Engine, Status, Step, Verdict


@pytest.mark.parametrize(
    ("ours", "catalogs"),
    [
        pytest.param(Status, vocabulary.ConversionStatus, id="status"),
        pytest.param(Verdict, vocabulary.ParityVerdict, id="verdict"),
        pytest.param(Step, vocabulary.StepName, id="step"),
        pytest.param(Engine, vocabulary.BatchEngine, id="engine"),
        pytest.param(ErrorKind, vocabulary.FailureKind, id="error-kind"),
    ],
)
def test_the_catalog_knows_the_same_words(ours: type[StrEnum], catalogs: type[StrEnum]) -> None:
    assert {word.value for word in catalogs} == {word.value for word in ours}
