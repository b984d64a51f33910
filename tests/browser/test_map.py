"""The map in a real browser: what happens to a swarm is seen, whoever wrote its names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from petal_swarm.client import watch
from petal_swarm.span import Span
from tests.browser.scripted_swarm import MapSite, ScriptedSwarm

if TYPE_CHECKING:
    from playwright.sync_api import Page

EVIL = "<img src=x onerror=\"document.title='owned'\">\u202e"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WATCHED_S", 0.02)
    monkeypatch.setattr(watch, "SILENT_AGAIN_S", 0.02)
    monkeypatch.setattr(watch, "EXPECTED_AGAIN_S", 0.02)


@pytest.fixture
def swarm() -> ScriptedSwarm:
    swarm = ScriptedSwarm(30)
    swarm.add("alice", 0, 10, block_time_s=0.001)
    swarm.add("bob", 10, 20)
    swarm.add("carol", 20, 30)
    return swarm


@pytest.fixture
def site(swarm: ScriptedSwarm) -> Iterator[MapSite]:
    with MapSite(swarm) as site:
        yield site


@pytest.fixture
def look(visit: Callable[..., Page], site: MapSite) -> Callable[..., Page]:
    """Opens the map."""

    def open_map(**options: object) -> Page:
        page = visit(site.url, **options)
        page.wait_for_selector("#map:not([hidden])")
        return page

    return open_map


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def feed(page: Page) -> list[str]:
    """Newest first, without the times."""
    return [text.split("\n")[0] for text in page.locator("#feed p").all_inner_texts()]


def edges(page: Page, selector: str) -> tuple[float, float]:
    """Where an element begins and ends, in blocks of 30."""
    page.locator(selector).evaluate("e => Promise.all(e.getAnimations().map((each) => each.finished))")
    box = page.locator(selector).bounding_box()
    whole = page.locator("#copies").bounding_box()
    return tuple(
        round(30 * (x - whole["x"]) / whole["width"], 0) for x in (box["x"], box["x"] + box["width"])
    )


def test_each_span_is_a_bar_in_its_place(look: Callable[..., Page]) -> None:
    page = look()
    expect(page.locator("#model")).to_have_text("tiny/Chatty-1B-Instruct")
    expect(page.locator("#verdict")).to_have_text("Every block is served: the model answers.")
    expect(page.locator(".server.serving")).to_have_count(3)
    assert edges(page, ".server:has-text('bob') .bar") == (10, 20)
    expect(page.locator("#gaps > div")).to_have_count(0)
    expect(page.locator("#link")).to_have_text("live")


def test_a_server_that_dies_is_shown_with_its_gap_and_one_that_comes_closes_it(
    look: Callable[..., Page], swarm: ScriptedSwarm
) -> None:
    page = look()
    swarm.silent.add("bob")
    expect(page.locator("#verdict")).to_contain_text("Blocks 10–19 are served by nobody")
    expect(page.locator(".server.silent")).to_contain_text("no answer")
    assert edges(page, "#gaps > div") == (10, 20)
    assert page.locator("#copies i.none").count() == 10
    assert feed(page) == ["Nobody serves blocks 10–19", "bob does not answer; it served blocks 10–19"]
    swarm.add("dave", 10, 20)
    expect(page.locator("#gaps > div")).to_have_count(0)
    expect(page.locator("#verdict")).to_contain_text("Every block is served")
    del swarm.peers["bob"]
    expect(page.locator(".server")).to_have_count(3)
    assert feed(page)[0] == "bob did not come back"


def test_a_server_that_moves_says_where_to(look: Callable[..., Page], swarm: ScriptedSwarm) -> None:
    page = look(reduced_motion="reduce")
    swarm.add("carol", 20, 30, moving_to=Span(10, 20), queue_s=9.0)
    expect(page.locator(".ghost:visible")).to_have_count(1)
    assert edges(page, ".ghost:visible") == (10, 20)
    expect(page.locator(".server.busy")).to_have_count(1)
    swarm.add("carol", 10, 20)
    expect(page.locator(".ghost:visible")).to_have_count(0)
    assert edges(page, ".server:has-text('carol') .bar") == (10, 20)
    assert "carol moved from blocks 20–29 to blocks 10–19" in feed(page)


def test_a_server_that_comes_is_loading_until_it_answers(
    look: Callable[..., Page], swarm: ScriptedSwarm
) -> None:
    page = look()
    swarm.silent.add("dave")
    swarm.add("dave", 10, 20)
    expect(page.locator(".server.joining")).to_contain_text("loading")
    assert feed(page) == []
    swarm.silent.clear()
    expect(page.locator(".server.serving")).to_have_count(4)
    assert feed(page) == ["dave joined with blocks 10–19"]


def test_what_others_wrote_is_text(look: Callable[..., Page], swarm: ScriptedSwarm) -> None:
    page = look()
    swarm.add(
        "evil", 0, 30, name=EVIL, version=EVIL, dtype=EVIL, adapters=((EVIL.replace(" ", "_"), "a" * 32),)
    )
    expect(page.locator(".server")).to_have_count(4)
    page.locator(".server .bar").nth(1).hover()
    expect(page.locator("#card h3 bdi")).to_have_text(EVIL[:-1])
    assert page.locator("#main img, #card img").count() == 0
    assert feed(page)[0].startswith("<img src=x")
    assert page.title() != "owned"


def test_the_keyboard_goes_from_server_to_server(look: Callable[..., Page]) -> None:
    page = look()
    page.locator("[data-view=packed]").focus()
    page.keyboard.press("Tab")
    card = page.locator("#card")
    expect(card).to_contain_text("alice")
    page.keyboard.press("ArrowDown")
    expect(card).to_contain_text("bob")
    page.keyboard.press("End")
    expect(card).to_contain_text("carol")
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "carol serves: blocks 20–29, 48 tokens per second"
    )


@pytest.mark.parametrize("servers", [0, 200])
def test_nothing_is_cut_off_on_a_phone(look: Callable[..., Page], swarm: ScriptedSwarm, servers: int) -> None:
    swarm.peers.clear()
    for number in range(servers):
        swarm.add(f"server-{number}", number % 25, number % 25 + 5)
    page = look(viewport={"width": 320, "height": 640}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    if servers:
        expect(page.locator("#sheet")).to_have_class(re.compile("packed"))
        page.locator("[data-view=list]").tap()
        expect(page.locator("#sheet")).not_to_have_class(re.compile("packed"))
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        page.locator(".server .bar").first.tap()
        expect(page.locator("#card")).to_contain_text("server-0")
        page.reload()
        expect(page.locator("[data-view=list]")).to_have_attribute("aria-pressed", "true")
    else:
        expect(page.locator("#verdict")).to_have_text("Nobody is here yet.")
        expect(page.locator(".empty")).to_contain_text("petal-swarm run-server")


def test_a_gateway_that_goes_is_said_to_have_gone_and_one_that_comes_back_is_read_again(
    look: Callable[..., Page], site: MapSite, swarm: ScriptedSwarm
) -> None:
    page = look()
    swarm.add("dave", 0, 30)
    expect(page.locator("#feed li")).to_have_count(1)
    site.stop()
    expect(page.locator("#notes")).to_contain_text("The connection to this gateway is lost")
    expect(page.locator("#sheet")).to_have_class(re.compile("stale"))
    del swarm.peers["alice"]
    site.start()
    expect(page.locator("#notes")).to_be_empty(timeout=10_000)
    expect(page.locator(".server")).to_have_count(3)
    del swarm.peers["bob"]
    expect(page.locator("#feed li")).to_have_count(2)


def test_a_swarm_that_cannot_be_asked_is_said_to_be_out_of_reach(
    look: Callable[..., Page], swarm: ScriptedSwarm
) -> None:
    page = look()
    swarm.is_reachable = False
    expect(page.locator("#notes")).to_contain_text("cannot reach the swarm")
    expect(page.locator(".server.silent")).to_have_count(3)
    assert "203.0.113.9" not in page.content()
    swarm.is_reachable = True
    expect(page.locator("#verdict")).to_contain_text("Every block is served")


def test_a_browser_that_keeps_nothing_sees_the_map_too(look: Callable[..., Page]) -> None:
    page = look()
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('', 'no'); } });"
    )
    page.reload()
    expect(page.locator(".server.serving")).to_have_count(3)
    page.click("[data-view=packed]")
    expect(page.locator("[data-view=packed]")).to_have_attribute("aria-pressed", "true")
