"""What a batch says at its end, and to whom; tests/flows/test_deploy.py has a server that passes it on."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from flows.batch import BatchEnd
from flows.batch_event import OUTCOME_LABEL, describe
from flows.deployment_file import Notification
from flows.notifications import check_urls
from onnx_config.errors import InputError
from tasks.report import Engine, ModelEntry, Report, Status


def ended(*statuses: Status) -> BatchEnd:
    nothing = dict.fromkeys(
        ("revision", "task", "model_type", "architecture", "artifact", "template", "parity", "peak_rss_bytes", "error")
    )
    entries = [ModelEntry(id="a/b", status=status, simplified=False, attempts=1, **nothing) for status in statuses]
    report = Report.of(entries, started_at=datetime(2026, 1, 1, tzinfo=UTC), seconds=1)
    return BatchEnd(batch_id=7, engine=Engine.PREFECT, worked=True, report=report)


GOOD, KNOWN, BAD, OFF = Status.CONVERTED, Status.REUSED, Status.FAILED, Status.MISMATCH


@pytest.mark.parametrize(
    ("statuses", "threshold", "rate", "outcome"),
    [
        pytest.param((GOOD, KNOWN), 0.0, 0.0, "fine", id="none-failed"),
        pytest.param((GOOD, BAD), 0.5, 0.5, "fine", id="as-many-as-may"),
        pytest.param((GOOD, BAD), 0.49, 0.5, "failing", id="one-too-many"),
        pytest.param((GOOD, GOOD, GOOD, OFF), 0.2, 0.25, "failing", id="what-differs-failed-too"),
        pytest.param((KNOWN, BAD), 0.0, 0.5, "failing", id="none-may-fail"),
        pytest.param((BAD, BAD), 1.0, 1.0, "fine", id="all-may-fail"),
        pytest.param((), 0.0, 0.0, "fine", id="no-models"),
    ],
)
def test_a_batch_is_failing_beyond_the_threshold(
    statuses: tuple[Status, ...], threshold: float, rate: float, outcome: str
) -> None:
    event = describe(ended(*statuses), threshold=threshold)
    assert event["resource"]["prefect.resource.id"] == "onnx-ferry.batch.7"
    assert event["resource"][OUTCOME_LABEL] == outcome
    assert event["payload"]["failure_rate"] == rate
    assert event["payload"]["models"] == len(statuses)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param("", "NOTIFY_URL, which is not set", id="unset"),
        pytest.param("secret", r"NOTIFY_URL, which is no http:// or https:// URL", id="no-url"),
    ],
)
def test_a_url_that_is_not_there_is_said_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    monkeypatch.setenv("NOTIFY_URL", value)
    with pytest.raises(InputError, match=words) as raised:
        check_urls([Notification(name="team", url_variable="NOTIFY_URL")])
    assert "secret" not in raised.value.message
