"""The fixture `browser_page` itself: what it fails a test for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import browser as browser_module
from tests import conftest
from tests.browser import screenshot

pytestmark = pytest.mark.xdist_group("chromium")


def test_a_quiet_page(browser_page: Any, tmp_path: Path) -> None:
    browser_page.set_content("<p style='margin-top: 2000px'>hello</p>")
    assert browser_page.inner_text("p") == "hello"
    assert screenshot(browser_page, tmp_path / "page.png").stat().st_size > 500


@pytest.mark.parametrize(
    "page, message",
    [
        ("<script>console.error('odd')</script>", "odd"),
        ("<script>nothing()</script>", "script: "),
        ("<img src='http://a.invalid/b.png'>", "another machine: http://a.invalid/b.png"),
    ],
)
def test_what_a_page_must_not_do(browser: Any, page: str, message: str) -> None:
    made = browser_module.watched_page(browser)
    next(made).set_content(page)
    with pytest.raises(AssertionError, match=message):
        next(made)


def test_a_missing_chromium_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser_module, "NAMES", ())
    with pytest.raises(pytest.skip.Exception, match="chromium: none of"):
        next(browser_module.running_browser())
    monkeypatch.setattr(conftest, "REQUIRED", ["chromium"])
    with pytest.raises(pytest.fail.Exception, match="RAL_REQUIRE=chromium"):
        next(browser_module.running_browser())
