"""The page of a real gateway, over a real swarm of a tiny model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import LocalSwarm, ServerProcess, server_arguments, wait_ready
from petal_swarm.span import Span
from tests.browser.talking import answers, ask, wait_answered, wait_text
from tests.checkpoints import VOCABULARY, save_bloom
from tests.cli.tokenizers_of_tests import CHAT_TEMPLATE, words

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")

#: Long enough to be in the middle of an answer when a server dies; within what the servers' caches hold.
SETTINGS = {"temperature": 0, "maxTokens": 1024}
START_S = 60
QUESTION = "w7 w42 <b>w300</b>"


@dataclass(frozen=True)
class Door:
    """A gateway, and the servers behind it by name: the second and the third have the same blocks."""

    url: str
    servers: dict[str, ServerProcess]


@pytest.fixture(scope="module")
def door(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Asks for a browser first: without one there is nothing to start servers for."""
    folder = save_bloom(tmp_path_factory.mktemp("page") / "tiny-bloom", blocks=4)
    tokenizer = words(VOCABULARY)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    with (
        LocalSwarm() as swarm,
        LocalSwarm(command=(sys.executable, "-m", "petal_swarm.cli.gateway")) as doors,
    ):

        def start(name: str, span: Span, address: str | None) -> ServerProcess:
            return swarm.start(
                name, server_arguments(str(folder), span, name=name, threads=1, address=address)
            )

        first = start("first", Span(0, 2), None)
        address = first.address.result(START_S)
        others = [start(name, Span(2, 4), address) for name in ("second", "third")]
        gateway = doors.start("gateway", ["--model", str(folder), "--port", "0", "--initial-peers", address])
        wait_ready([*others, gateway], timeout_s=START_S, on_ready=lambda server: None)
        yield Door(gateway.address.result(), {server.name: server for server in (first, *others)})


@pytest.fixture
def page(visit: Callable[..., Page], door: Door) -> Page:
    opened = visit(door.url)
    opened.evaluate("text => localStorage.setItem('petal-swarm.settings', text)", json.dumps(SETTINGS))
    opened.reload()
    opened.wait_for_selector("#health.good")
    return opened


def test_ask_stop_reload_and_switch_task(page: Page) -> None:
    ask(page, QUESTION)
    page.locator(".prose p").wait_for()
    page.keyboard.press("Escape")
    wait_text(page, "You stopped this answer.")
    assert page.locator(".said").inner_text() == QUESTION
    stopped = answers(page)
    assert stopped[0]
    page.reload()
    assert answers(page) == stopped
    names = page.locator(".hop-name").all_inner_texts()
    assert names in (["you", "first", other, "you"] for other in ("second", "third"))
    page.click("[data-task=translate]")
    page.click("#open-settings")
    page.select_option("#length", "64")
    page.keyboard.press("Escape")
    ask(page, "w9")
    wait_answered(page)
    assert len(answers(page)[0].split()) == 64
    assert "64 tokens" in page.locator(".figures").inner_text()


def test_a_server_killed_in_mid_answer_is_not_noticed(page: Page, door: Door) -> None:
    ask(page, QUESTION)
    wait_answered(page)
    undisturbed = answers(page)[0]
    page.click("#new")
    ask(page, QUESTION)
    page.locator(".hop-name").nth(2).wait_for()
    victim = page.locator(".hop-name").nth(2).inner_text()
    os.kill(door.servers[victim].pid, signal.SIGKILL)
    assert page.locator("#stop").is_visible(), "it was in the middle of the answer"
    wait_answered(page)
    assert answers(page) == [undisturbed]
    assert "a server left, another took over" in page.locator(".figures").inner_text()
    survivor = {"second": "third", "third": "second"}[victim]
    assert page.locator(".hop-name").all_inner_texts() == ["you", "first", survivor, "you"]
