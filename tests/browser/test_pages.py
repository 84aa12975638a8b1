"""What a person meets who looks at the dashboard: every page and filter, a run as it goes, keys instead of a mouse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from db import BatchTotals, finish_batch, make_engine, record_conversion, session_scope, start_batch, upgrade
from tests.browser.conftest import Dashboard, OpenPage, running_dashboard
from tests.browser.contents import HARM
from tests.browser.pages import PAGES, address

pytestmark = pytest.mark.browser

PHONE = 390
Shoot = Callable[[Any, str], None]


def wait_for_address(page: Any, pattern: str) -> None:
    page.wait_for_url(re.compile(pattern))


def choose(page: Any, label: str, value: str) -> None:
    page.get_by_role("combobox", name=label, exact=True).select_option(value)


def models(page: Any) -> list[str]:
    return page.locator("#results .listing tbody th").all_inner_texts()


# Parts of a page that can be moved sideways, but not by keys.
STUCK = """[...document.querySelectorAll("main *")].filter(e => e.scrollWidth > e.clientWidth + 1
    && ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.tabIndex < 0)
    .map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_nothing_on_the_console_and_fits_its_window(
    open_page: OpenPage, dashboard: Dashboard, shoot: Shoot, name: str
) -> None:
    page = open_page(address(name, dashboard.contents))
    assert page.locator("h1").count() == 1
    assert page.title().endswith("onnx-ferry")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1280, PHONE):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(STUCK) == []
            shoot(page, f"{name}-{scheme}-{width}")


@pytest.mark.parametrize("name", [name for name in PAGES if "hostile" in name or name in ("overview", "models", "run")])
def test_text_that_means_harm_is_text(open_page: OpenPage, dashboard: Dashboard, name: str) -> None:
    page = open_page(address(name, dashboard.contents))
    assert page.evaluate("window.harm") is None
    assert page.locator("img[onerror], main script").count() == 0
    content = page.locator("main").text_content()
    assert HARM.partition(" ")[0] in content
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", content)


def test_a_search_may_be_harm_too(open_page: OpenPage) -> None:
    page = open_page("/models")
    page.get_by_role("searchbox").fill(HARM)
    wait_for_address(page, "q=")
    assert page.evaluate("window.harm") is None
    page.reload()
    assert page.get_by_role("searchbox").input_value() == HARM


def test_the_overview_shows_another_period_without_loading_anew(open_page: OpenPage) -> None:
    page = open_page("/")
    page.evaluate("window.kept = true")
    choose(page, "Period", "24h")
    wait_for_address(page, r"\?period=24h$")
    choose(page, "Task", "text-generation")
    wait_for_address(page, "task=text-generation")
    page.wait_for_function("() => document.querySelector('.figure.converted .more').textContent.includes('of 1')")
    choose(page, "Family", "whisper")
    page.get_by_text("Nothing ended in this period").wait_for()
    assert page.evaluate("window.kept")


def test_the_chart_is_drawn_and_takes_the_colours_of_the_scheme(open_page: OpenPage) -> None:
    page = open_page("/")
    assert page.locator(".chart canvas").count() == 1

    def drawn() -> str:
        return page.evaluate("document.querySelector('.chart canvas').toDataURL()")

    light = drawn()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("light => document.querySelector('.chart canvas').toDataURL() !== light", arg=light)
    page.get_by_text("Figures").click()
    assert page.get_by_role("region", name="Attempts over time").locator("tbody tr").count() >= 1


def test_models_are_searched_while_typing(open_page: OpenPage) -> None:
    page = open_page("/models")
    page.evaluate("window.kept = true")
    search = page.get_by_role("searchbox")
    search.press_sequentially("EVERYthing")
    wait_for_address(page, "q=EVERYthing")
    page.wait_for_function("() => document.querySelectorAll('#results tbody tr').length === 1")
    assert models(page) == ["org/everything"]
    assert page.evaluate("document.activeElement.id") == "q"
    assert page.evaluate("window.kept")
    page.get_by_label("every attempt").check()
    page.wait_for_function("() => document.querySelectorAll('#results tbody tr').length === 2")
    page.go_back()
    page.wait_for_function("() => document.querySelectorAll('#results tbody tr').length === 1")


@pytest.mark.parametrize(
    ("label", "value", "column"),
    [("Status", "failed", 1), ("Task", "text-generation", 2), ("Family", "vit", 3), ("Error", "timeout", 1)],
)
@pytest.mark.parametrize("script", [True, False], ids=["script", "no-script"])
def test_a_filter_leaves_what_fits(open_page: OpenPage, label: str, value: str, column: int, script: bool) -> None:
    page = open_page("/models", script=script)
    choose(page, label, value)
    button = page.get_by_role("button", name="Search")
    if script:
        assert not button.is_visible()
    else:
        button.click()
    wait_for_address(page, f"={value}")
    page.get_by_text(re.compile("^[0-9]+ conversions, newest first")).wait_for()
    cells = page.locator(f"#results .listing tbody tr > :nth-child({column + 1})").all_inner_texts()
    assert cells
    assert all(value in cell for cell in cells)


def test_the_pages_of_a_list_go_on_and_come_back(open_page: OpenPage) -> None:
    page = open_page("/models?every=true")
    first = models(page)
    assert len(first) == 50
    page.get_by_role("link", name="Older").click()
    wait_for_address(page, "after=")
    second = models(page)
    assert second
    assert not {*first} & {*second} - {"org/everything"}
    page.get_by_role("link", name="Newest").click()
    wait_for_address(page, r"models\?every=true$")
    assert models(page) == first


def test_the_page_of_a_model_leads_to_its_files_and_its_history(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page(f"/models/{dashboard.contents.whole}")
    with page.expect_download() as download:
        page.get_by_role("link", name="model.onnx").click()
    assert Path(download.value.path()).read_bytes() == b"graph"
    page.get_by_text("ONNX Runtime", exact=True).click()
    assert page.get_by_text("onnxruntime.InferenceSession").is_visible()
    page.get_by_label("Compare with").select_option(str(dashboard.contents.older))
    page.get_by_role("button", name="Compare").click()
    wait_for_address(page, f"compare.a={dashboard.contents.whole}&b={dashboard.contents.older}$")
    differing = page.locator("tr.differs th").all_inner_texts()
    assert any(text.startswith("finished") for text in differing)
    assert not any(text.startswith("task") for text in differing)


def test_a_file_in_quarantine_is_asked_for_by_name(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page(f"/models/{dashboard.contents.quarantined}")
    assert page.get_by_role("note").inner_text().startswith("In quarantine.")
    with page.expect_download() as download:
        page.get_by_role("link", name="model.onnx").click()
    assert "quarantined=true" in download.value.url


def test_conversions_are_compared_by_number(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page("/compare")
    page.get_by_label("First conversion").fill(str(dashboard.contents.failed))
    page.get_by_label("Second conversion").fill(str(dashboard.contents.whole))
    page.get_by_role("button", name="Compare").click()
    wait_for_address(page, "compare.a=")
    assert page.locator("tr.differs", has_text="error").first.is_visible()


def test_a_run_is_followed_as_it_goes(open_page: OpenPage, dashboard: Dashboard, make_record: Any) -> None:
    now = datetime.now(UTC)
    with session_scope(dashboard.engine) as session:
        number = start_batch(session, engine="local", started_at=now)
    page = open_page(f"/runs/{number}")
    page.evaluate("window.kept = true")
    assert page.get_by_text("No model of this run is recorded yet").is_visible()
    badge = page.get_by_text("no end yet", exact=True)
    assert badge.is_visible()
    with session_scope(dashboard.engine) as session:
        record_conversion(session, make_record(300, started_at=now, finished_at=now), batch_id=number)
    page.get_by_role("link", name="org/model-300").wait_for()
    assert page.locator(".figure.converted strong").inner_text() == "1"
    assert page.locator(".gantt rect").count() == 2
    with session_scope(dashboard.engine) as session:
        finish_batch(session, number, BatchTotals(converted=1), finished_at=datetime.now(UTC))
    badge.wait_for(state="detached")
    assert page.evaluate("window.kept")
    assert page.get_by_text(re.compile("took [0-9]")).is_visible()


def test_a_run_shows_what_it_found_done(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page(f"/runs/{dashboard.contents.ended_run}")
    found = page.get_by_role("region", name="Found done")
    assert found.locator("tbody tr").count() == 9
    assert set(found.locator("tbody .status").all_inner_texts()) == {"reused"}
    # The totals of the overview count them as well.
    page = open_page("/?period=all")
    assert page.locator(".figure.reused strong").inner_text() == "9"


def test_what_is_verified_where(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page("/models?q=everything")
    page.get_by_role("link", name="What is verified where").click()
    wait_for_address(page, r"/coverage\?q=everything$")
    heads = page.locator("thead th").all_inner_texts()
    assert heads[2:] == ["cpu CPU all", "cuda CUDA disable", "cuda CUDA basic", "cuda CUDA extended", "cuda CUDA all"]
    cells = page.locator("tbody tr td").all_inner_texts()
    assert [cell.split()[0] for cell in cells[1:]] == ["verified"] * 4 + ["mismatch"]
    page.get_by_role("link", name="Models").last.click()
    wait_for_address(page, r"/models\?q=everything$")
    page = open_page(f"/runs/{dashboard.contents.ended_run}")
    page.get_by_role("link", name="What is verified where").click()
    assert len(page.locator("tbody tr").all()) == 50
    page.get_by_role("link", name="Older").click()
    wait_for_address(page, "before=")
    assert page.locator("tbody tr").count() == 35


def test_the_graph_of_a_model_is_shown_as_a_picture(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page(f"/models/{dashboard.contents.whole}")
    axes = page.get_by_role("img", name="Which inputs and outputs share")
    assert axes.locator(".axis-name").all_text_contents() == ["batch_size", "sequence_length", "past_sequence_length"]
    assert axes.get_by_text("past_key_values.*.key (3)").is_visible()
    table = page.get_by_role("table", name="Nodes by operator")
    assert table.locator("tbody tr").first.inner_text().split() == ["Reshape", "96", "48"]
    assert table.get_by_text("com.microsoft::Gelu").is_visible()


def test_a_run_that_runs_is_on_the_overview(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page("/")
    page.get_by_role("region", name="Running now").get_by_role("link", name=f"Run {dashboard.contents.running}").click()
    wait_for_address(page, f"/runs/{dashboard.contents.running}$")


def test_everything_is_reached_by_keys(open_page: OpenPage) -> None:
    page = open_page("/models")

    def focused() -> Any:
        return page.evaluate("(e => e.id || e.name || e.textContent.trim())(document.activeElement)")

    page.keyboard.press("Tab")
    assert focused() == "Skip to content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert focused() == "main"
    page.keyboard.press("Tab")
    assert focused() == "q"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.type("everything")
    wait_for_address(page, "q=everything")
    page.keyboard.press("Tab")
    assert focused() == "status"
    page.keyboard.type("fail")
    wait_for_address(page, "status=failed")
    page.get_by_text("Nothing fits.").wait_for()
    for name in ("task", "model_type", "error_kind", "worker", "every"):
        page.keyboard.press("Tab")
        assert focused() == name
    for name in ("What is verified where", "Show all."):
        page.keyboard.press("Tab")
        assert focused() == name
    page.keyboard.press("Enter")
    wait_for_address(page, "/models$")


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/models/999999", 404, "No conversion has number 999999"),
        ("/runs/999999", 404, "No batch has number 999999"),
        ("/nowhere", 404, "Not here"),
        ("/models?after=nonsense", 422, "after: Value error, 'nonsense' is no place in a listing"),
        ("/runs/first", 422, "number: Input should be a valid integer"),
    ],
)
def test_what_is_not_there_is_said_on_a_page(open_page: OpenPage, path: str, status: int, words: str) -> None:
    page = open_page(path, expect=status)
    assert words in page.locator("main").inner_text()
    assert page.get_by_role("navigation", name="Pages").is_visible()


def test_an_empty_catalog_says_what_to_type(open_page: OpenPage, tmp_path: Path) -> None:
    with running_dashboard(tmp_path) as url:
        page = open_page("/", base=url, expect=503)
        assert "ferry batch models.yaml" in page.locator("main").inner_text()
        engine = make_engine(f"sqlite:///{tmp_path}/catalog.db")
        upgrade(engine)
        engine.dispose()
        page = open_page("/", base=url)
        assert "convert something" in page.locator("main").inner_text()
        for path in ("/models", "/runs", "/runs?offset=50"):
            open_page(path, base=url)


def test_the_links_at_the_foot_answer(open_page: OpenPage) -> None:
    page = open_page("/")
    for name in ("API", "Metrics", "Health"):
        href = page.get_by_role("contentinfo").get_by_role("link", name=name).get_attribute("href")
        answer = page.request.get(href)
        assert answer.ok
    assert json.loads(page.request.get("/openapi.json").text())["info"]["title"] == "onnx-ferry catalog"
