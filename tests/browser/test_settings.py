"""Settings, conversations in the browser's storage, and the keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.browser.scripted import MODEL, ScriptedGateway, text
from tests.browser.talking import answers, ask, wait_answered, wait_text

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_settings_go_into_requests_and_stay(page: Page, gateway: ScriptedGateway) -> None:
    gateway.models = [MODEL, {**MODEL, "id": "pirate", "is_adapter": True}]
    page.reload()
    page.wait_for_selector("#health.good")
    page.click("#open-settings")
    page.select_option("#model", "pirate")
    page.uncheck("#temperature-auto")
    page.fill("#temperature", "1.2")
    page.select_option("#length", "128")
    page.fill("#system", "You are a pirate.")
    page.fill("#key", "sesame")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("#model-name:has-text('pirate')")
    gateway.plan_whole("Arr.")
    ask(page, "Hello")
    wait_answered(page)
    asked = gateway.requests[0]
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("pirate", 1.2, 128)
    assert asked["messages"][0] == {"role": "system", "content": "You are a pirate."}
    assert gateway.keys == ["Bearer sesame"]


def test_no_answer_is_asked_for_that_is_longer_than_the_gateway_gives(
    page: Page, gateway: ScriptedGateway
) -> None:
    page.click("#open-settings")
    lengths = page.locator("#length option").evaluate_all("nodes => nodes.map(node => Number(node.value))")
    assert max(lengths) == 1024
    page.evaluate("localStorage.setItem('petal-swarm.settings', JSON.stringify({maxTokens: 8192}))")
    page.reload()
    page.wait_for_selector("#health.good")
    gateway.plan_whole("Well.")
    ask(page, "Hello")
    wait_answered(page)
    assert gateway.requests[0]["max_tokens"] == 1024


def test_a_refused_key_leads_to_the_settings(page: Page, gateway: ScriptedGateway) -> None:
    gateway.refuse(401, {"message": "no key", "code": "invalid_api_key"})
    ask(page, "Hello")
    page.click("text=Open settings")
    page.locator("#key").wait_for(state="visible")


def test_who_needs_a_key_is_told_before_asking(page: Page, gateway: ScriptedGateway) -> None:
    gateway.about = {"needs_key": True, "takes_keys": True}
    page.reload()
    page.wait_for_selector("#health.warn")
    wait_text(page, "This gateway asks for a key.", "#trouble")
    page.click("#open-settings")
    page.fill("#key", "sesame")
    page.keyboard.press("Escape")
    page.wait_for_selector("#health.good")
    assert page.locator("#trouble").is_hidden()


def test_what_a_key_is_good_for_is_said(page: Page, gateway: ScriptedGateway) -> None:
    page.click("#open-settings")
    assert page.locator("#key-hint").inner_text() == "Not needed: this gateway has no keys."
    page.keyboard.press("Escape")
    gateway.about = {"takes_keys": True}
    page.reload()
    page.wait_for_selector("#health.good")
    page.click("#open-settings")
    assert page.locator("#key-hint").inner_text() == "Not needed here. With one, limits may be wider."


def test_texts_are_translated_into_the_browsers_language(
    visit: Callable[..., Page], gateway: ScriptedGateway
) -> None:
    page = visit(gateway.url, locale="de-AT")
    page.click("[data-task=translate]")
    assert page.input_value("#to") == "German"
    wait_text(page, "The early bird", ".examples")
    page.select_option("#to", "English")
    wait_text(page, "L'habit", ".examples")


def test_deleting_a_conversation_can_be_undone(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("Precious.")
    ask(page, "Remember this")
    wait_answered(page)
    page.hover(".conversation")
    page.click("[aria-label='Delete Remember this']")
    assert page.locator(".conversation").count() == 0
    page.click("text=Undo")
    assert answers(page) == ["Precious."]
    page.reload()
    assert page.locator(".conversation").count() == 1


def test_all_conversations_can_be_deleted(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("Gone soon.")
    ask(page, "Hello")
    wait_answered(page)
    page.click("#open-settings")
    page.click("#forget")
    assert page.locator(".conversation").count() == 1, "asks first"
    page.click("#forget")
    page.wait_for_function("() => document.querySelectorAll('.conversation').length === 0")
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('conversation')).length") == 0


def test_what_is_stored_is_not_trusted(page: Page, gateway: ScriptedGateway) -> None:
    stored = {
        "petal-swarm.settings": '"no object"',
        "petal-swarm.conversation.a": "{not json",
        "petal-swarm.conversation.b": '{"task": "chat", "turns": "many"}',
        "petal-swarm.conversation.c": '{"task": "gone", "title": 7, "turns": [null, {"role": "user"},'
        ' {"role": "user", "text": "Sound", "options": 3}, {"role": "assistant", "text": "One", "route": {}},'
        ' {"role": "assistant", "text": "Two", "error": 5, "state": "failed", "route": {"hops": [null]}}]}',
        "petal-swarm.conversation.d": '{"task": "constructor", "title": "odd", "turns": []}',
    }
    page.evaluate("stored => Object.entries(stored).forEach(([k, v]) => localStorage.setItem(k, v))", stored)
    page.reload()
    page.wait_for_selector("#health.good")
    assert page.locator(".conversation").count() == 2
    page.click(".conversation:has-text('odd')")
    assert page.locator("#tasks [aria-pressed=true]").inner_text() == "Chat"
    page.click(".conversation:has-text('7')")
    assert page.locator(".said").all_inner_texts() == ["Sound"]
    assert page.locator(".prose").all_inner_texts() == ["One", "Two"]


def test_the_oldest_conversations_make_room(page: Page, gateway: ScriptedGateway) -> None:
    page.evaluate(
        """() => {
          for (let i = 0; i < 12; i += 1)
            localStorage.setItem(`petal-swarm.conversation.old${i}`, JSON.stringify({
              task: "chat", title: `old ${i}`, updated: i, options: {},
              turns: [{role: "user", text: "x".repeat(400_000), options: {}}],
            }));
        }"""
    )
    page.reload()
    page.wait_for_selector("#health.good")
    gateway.plan_whole("y" * 500_000)
    ask(page, "Is there room?")
    wait_answered(page)
    page.reload()
    titles = page.locator(".conversation-title").all_inner_texts()
    assert titles[0] == "Is there room?"
    assert "old 11" in titles
    assert "old 0" not in titles


def test_everything_is_reached_by_keyboard(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("One line.")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    wait_answered(page)
    assert gateway.requests[0]["messages"][0]["content"] == "Two\nlines"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Ask again"
    gateway.plan(text("Again"))
    page.keyboard.press("Enter")
    wait_text(page, "Again")
    page.keyboard.press("Escape")
    wait_text(page, "You stopped this answer.")
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_those_who_listen_are_told(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("**All** of it.")
    ask(page, "Tell me")
    wait_text(page, "Answer: **All** of it.", "#announcer")
    unnamed = "nodes => nodes.filter(node => !(node.innerText.trim() || node.ariaLabel)).length"
    assert page.locator("button:visible, a:visible").evaluate_all(unnamed) == 0


def test_colours_can_be_told_apart(page: Page) -> None:
    """Text has a contrast of 4.5 on everything it stands on, light and dark (WCAG 1.4.3)."""
    pairs = [
        *((ink, ground) for ink in ("ink", "ink-2", "ink-3") for ground in ("bg", "surface", "sunken")),
        *(("ink", f"{state}-soft") for state in ("good", "warn", "bad", "info", "accent")),
        *((state, f"{state}-soft") for state in ("good", "warn", "bad", "info", "accent")),
        *((state, "sunken") for state in ("good", "warn", "accent")),  # code
        ("accent", "bg"),
        ("info", "bg"),
        ("on-accent", "accent"),
    ]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        names = sorted({name for pair in pairs for name in pair})
        colours = page.evaluate(
            """names => Object.fromEntries(names.map(name =>
              [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`)]))""",
            names,
        )
        low = {pair: _contrast(*(colours[name] for name in pair)) for pair in pairs}
        assert {pair: value for pair, value in low.items() if value < 4.5} == {}, scheme


def _contrast(one: str, other: str) -> float:
    dark, light = sorted(_luminance(colour.strip()) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
