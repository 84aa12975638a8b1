"""Records refuse what the catalog could not hold or would lie about."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

import pytest

import db
from db import ErrorRecord, FileRecord, ParityRecord, StepTiming, vocabulary
from onnx_config.errors import ErrorKind
from tasks.report import Engine, Status, Step, Verdict

NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001 - what the records must refuse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"key": "abc"}, "key is 'abc'; it has 64 lower-case hex digits", id="short-key"),
        pytest.param({"key": "A" * 64}, "64 lower-case hex digits", id="upper-case-key"),
        pytest.param({"status": "done"}, "status is 'done'; the catalog knows", id="unknown-status"),
        pytest.param({"template": "copied"}, "template is 'copied'", id="unknown-template"),
        pytest.param({"started_at": NAIVE}, "without a time zone", id="naive-start"),
        pytest.param({"finished_at": NAIVE}, "without a time zone", id="naive-finish"),
        pytest.param({"artifact": None}, "goes with an artifact and without an error", id="converted-to-nothing"),
        pytest.param({"status": "failed"}, "status failed needs an error", id="failed-without-error"),
    ],
)
def test_a_conversion_record_refuses(make_record, changes, message):
    with pytest.raises(ValueError, match=message):
        make_record(**changes)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: FileRecord(path="x", size_bytes=1, sha256="no"), id="file-hash"),
        pytest.param(lambda: StepTiming(step="dream", seconds=1.0), id="step"),
        pytest.param(lambda: ErrorRecord(kind="odd", message="", step="export", reproduce=""), id="error-kind"),
        pytest.param(lambda: ErrorRecord(kind="network", message="", step="x", reproduce=""), id="error-step"),
        pytest.param(
            lambda: ParityRecord(
                verdict="fine",
                device="cpu",
                provider="p",
                shapes=1,
                max_abs_diff=None,
                tolerance=None,
                checked_at=NAIVE.replace(tzinfo=UTC),
            ),
            id="verdict",
        ),
    ],
)
def test_a_part_refuses(make):
    with pytest.raises(ValueError, match=r"catalog knows|hex digits"):
        make()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        pytest.param(Status, vocabulary.ConversionStatus, id="status"),
        pytest.param(Verdict, vocabulary.ParityVerdict, id="verdict"),
        pytest.param(Step, vocabulary.StepName, id="step"),
        pytest.param(Engine, vocabulary.BatchEngine, id="engine"),
        pytest.param(ErrorKind, vocabulary.FailureKind, id="error-kind"),
    ],
)
def test_the_catalog_speaks_the_words_of_the_report(theirs: type[StrEnum], ours: type[StrEnum]):
    assert [word.value for word in theirs] == [word.value for word in ours]


def test_everything_listed_is_there():
    assert sorted(db.__all__) == db.__all__
    assert [name for name in db.__all__ if not hasattr(db, name)] == []
