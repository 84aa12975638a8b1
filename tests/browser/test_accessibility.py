"""axe-core, which looks for what keeps people from reading a page, finds nothing serious on any."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.pages import PAGES, address

pytestmark = pytest.mark.browser

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text(encoding="utf-8")
LOOK = "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)"


@pytest.mark.parametrize("name", PAGES)
def test_nothing_serious_is_found(open_page: OpenPage, dashboard: Dashboard, name: str) -> None:
    page = open_page(address(name, dashboard.contents))
    # What is folded away is looked at as well.
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.evaluate(AXE)
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        found = [
            f"{fault['impact']} {fault['id']}: {fault['help']}: {fault['nodes'][0]['html'][:300]}"
            for fault in page.evaluate(LOOK)
            if fault["impact"] in ("serious", "critical")
        ]
        assert (scheme, width, found) == (scheme, width, [])


def test_what_is_looked_with_sees(open_page: OpenPage) -> None:
    page = open_page("/models")
    page.evaluate("document.querySelector('#q').closest('label').replaceWith(document.querySelector('#q'))")
    page.evaluate("document.querySelector('#q').removeAttribute('placeholder')")
    page.evaluate(AXE)
    assert "label" in [fault["id"] for fault in page.evaluate(LOOK)]
