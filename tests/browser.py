"""Pages in headless Chromium: the fixture `browser_page`, for the tests of generated pages.

Chromium is the system's (`apt-get install chromium`), driven by the package playwright, which
downloads nothing here. Where either is missing, the tests skip; `RAL_REQUIRE=chromium` turns the
skip into a failure.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests of a process."""
    yield from running_browser()


def running_browser() -> Iterator[Any]:
    """Chromium, which ends with the iterator."""
    from tests.conftest import skip_or_fail  # which imports this module

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        skip_or_fail("chromium", f"none of {', '.join(NAMES)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        skip_or_fail("chromium", f"the package playwright is missing ({error})")
    with sync_playwright() as driver:
        # Containers run as root and have a small /dev/shm; Chromium's own sandbox needs neither.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        opened = driver.chromium.launch(executable_path=program, args=options)
        yield opened
        opened.close()


@pytest.fixture
def browser_page(browser: Any) -> Iterator[Any]:
    """A new page of desktop width. At the end it must have had no error and asked no other machine.

    It fails the test if its console showed an error, if a script raised, if a file was missing, or
    if it requested anything but files, `data:`, `blob:` and this machine.
    """
    yield from watched_page(browser)


def watched_page(browser: Any) -> Iterator[Any]:
    """What `browser_page` gives."""
    context = browser.new_context(viewport=DESKTOP, reduced_motion="reduce")
    page = context.new_page()
    found: list[str] = []
    page.on("console", lambda said: found.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda asked: found.append(f"not found: {asked.url[:200]}"))
    page.on("request", lambda asked: found.extend(_elsewhere(asked.url)))
    yield page
    context.close()
    assert not found, found


def _elsewhere(url: str) -> list[str]:
    parts = urlsplit(url)
    here = parts.scheme in ("file", "data", "blob", "about")
    if here or parts.hostname in ("localhost", "127.0.0.1"):
        return []
    return [f"another machine: {url[:200]}"]


def screenshot(page: Any, path: Path, *, whole: bool = True) -> Path:
    """Write a picture of a page, of its whole height by default, and return its path."""
    page.screenshot(path=str(path), full_page=whole)
    return path


def main(address: str, path: str, *keys: str) -> None:
    """`python -m tests.browser ADDRESS PNG KEY...`: a picture of a page, after some keys."""
    for opened in running_browser():
        for page in watched_page(opened):
            page.goto(address)
            for key in keys:
                page.keyboard.press(key)
            page.wait_for_timeout(300)
            screenshot(page, Path(path))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
