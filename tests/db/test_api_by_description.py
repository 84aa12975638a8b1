"""Whatever the API's own description allows is answered, what it does not is refused, and nothing makes it fail.

schemathesis writes the requests from ``/openapi.json``; they are the same ones in every run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from db import make_engine, upgrade
from db.dashboard import create_app
from db.dashboard.asked import PLACE_FORMAT
from db.listing import PlaceInListing
from tests.browser.contents import fill

OPERATIONS = ("overview", "models", "models/{number}", "runs", "runs/{number}", "runs/{number}/found", "compare")
EXAMPLES = 25

PLACES = st.builds(
    PlaceInListing,
    finished_at=st.datetimes(min_value=datetime(1900, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - Hypothesis asks for it so
    id=st.integers(min_value=0, max_value=10**18 - 1),
)
schemathesis.openapi.format(PLACE_FORMAT, PLACES.map(str))


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory, make_record: Any) -> Any:
    folder = tmp_path_factory.mktemp("described")
    engine = make_engine(f"sqlite:///{folder}/catalog.db")
    upgrade(engine)
    fill(engine, make_record, folder)
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, only_loopback=False))
    engine.dispose()


def test_every_operation_is_asked(description: Any) -> None:
    described = {result.ok().path for result in description.get_all_operations()}
    assert described == {f"/api/v1/{name}" for name in OPERATIONS}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_api_answers_as_it_says(description: Any, name: str, mode: GenerationMode) -> None:
    operation = description[f"/api/v1/{name}"]["GET"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        assert case.call_and_validate().status_code in (200, 404, 422)

    ask()


def test_whatever_is_recorded_is_answered_as_described(description: Any) -> None:
    one = description["/api/v1/models/{number}"]["GET"]
    numbers = [row["id"] for row in _all_models(description)]
    assert len(numbers) == 86
    for number in numbers:
        assert one.Case(path_parameters={"number": number}).call_and_validate().status_code == 200


def test_what_a_run_found_done_is_answered(description: Any) -> None:
    asked = description["/api/v1/runs/{number}/found"]["GET"].Case(path_parameters={"number": 1}, query={"limit": 200})
    assert [row["status"] for row in asked.call_and_validate().json()["models"]] == ["reused"] * 9


def _all_models(description: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    asked: dict[str, Any] = {"limit": 20, "every": True}
    while True:
        answer = description["/api/v1/models"]["GET"].Case(query=asked).call_and_validate().json()
        rows += answer["models"]
        if answer["next"] is None:
            return rows
        asked["after"] = answer["next"]
