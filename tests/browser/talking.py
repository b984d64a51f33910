"""What visitors do on the page, in a word each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page


def ask(page: Page, text: str) -> None:
    """Write, and press Enter."""
    page.fill("#text", text)
    page.press("#text", "Enter")


def answers(page: Page) -> list[str]:
    """The texts of all answers on the page."""
    return [text.strip() for text in page.locator(".answer .prose").all_inner_texts()]


def wait_answered(page: Page, count: int = 1) -> None:
    """Until so many answers are there, and none is under way."""
    page.wait_for_function(
        "count => document.querySelectorAll('.answer[aria-busy=false]').length === count", arg=count
    )


def wait_text(page: Page, text: str, where: str = "main") -> None:
    page.locator(where).get_by_text(text).first.wait_for()
