"""A real browser, headless, and the scripted gateway. Skipped where there is no Chromium.

While playwright's synchronous interface is open, its event loop counts as running in this thread: nothing in
this folder may call `asyncio.run`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.scripted import ScriptedGateway

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
WAIT_MS = 15_000
PHONE = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}
#: What Chromium says by itself of answers that are errors; all else in the console fails a test.
EXPECTED = "Failed to load resource: "


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on PATH (scripts/test installs Debian's, where it may)")
    arguments = ["--disable-dev-shm-usage", "--disable-gpu"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="package")
def _gateway() -> Iterator[ScriptedGateway]:
    gateway = ScriptedGateway()
    yield gateway
    gateway.close()


@pytest.fixture
def gateway(_gateway: ScriptedGateway) -> ScriptedGateway:
    _gateway.forget()
    return _gateway


class Visitors:
    """Opens pages, and listens to what their consoles say."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.complaints: list[str] = []

    def new(self, **options: Any) -> Page:
        """A page of a new visitor."""
        context = self._browser.new_context(**{"viewport": {"width": 1100, "height": 720}, **options})
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        page.on("dialog", lambda dialog: self.complaints.append(f"a script ran: {dialog.message}"))
        return page

    def check(self) -> None:
        """Nothing but answers that are errors was complained of since the last time."""
        said, self.complaints = self.complaints, []
        assert [text for text in said if not text.startswith(EXPECTED)] == []


@pytest.fixture(scope="package")
def visitors(browser: Browser) -> Visitors:
    return Visitors(browser)


@pytest.fixture
def visit(visitors: Visitors) -> Iterator[Callable[..., Page]]:
    """`visit(url, **options)`: a page of a new visitor, whose console stays quiet."""
    pages = []

    def open_page(url: str, **options: Any) -> Page:
        pages.append(visitors.new(**options))
        pages[-1].goto(url)
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()
    visitors.check()


@pytest.fixture(scope="package")
def _wide(visitors: Visitors) -> Iterator[Page]:
    """Opened once: a new browser context for each test takes longer than most tests."""
    page = visitors.new()
    yield page
    page.context.close()


@pytest.fixture
def page(_wide: Page, visitors: Visitors, gateway: ScriptedGateway) -> Iterator[Page]:
    """The page of the scripted gateway, on a wide screen, of somebody who was never here."""
    _wide.goto(f"{gateway.url}/static/logo.svg")  # of the same origin, and without a script
    _wide.evaluate("localStorage.clear()")
    _wide.goto(gateway.url)
    _wide.wait_for_selector("#health.good")
    yield _wide
    _wide.emulate_media(color_scheme="light")
    visitors.check()
