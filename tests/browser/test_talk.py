"""Asking and being answered: what a visitor sees, and what the gateway is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.browser.conftest import PHONE
from tests.browser.scripted import CUT, ScriptedGateway, answering, finish, plain_text, swarm, text
from tests.browser.talking import answers, ask, wait_answered, wait_text

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_tokens_are_shown_as_they_come(page: Page, gateway: ScriptedGateway) -> None:
    answer = gateway.plan(swarm("opening"))
    ask(page, "Why do bees swarm?")
    wait_text(page, "Finding a way through the swarm")
    answer.send(answering("alice", "bob"), text("To find **a new"))
    wait_text(page, "To find **a new")
    answer.send(text(" home**."), finish()).end()
    wait_answered(page)
    assert answers(page) == ["To find a new home."]
    assert page.locator(".prose strong").inner_text() == "a new home"
    assert page.locator(".said").inner_text() == "Why do bees swarm?"
    assert page.input_value("#text") == ""
    asked = gateway.requests[0]
    assert asked["path"] == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "user", "content": "Why do bees swarm?"}]
    assert (asked["model"], asked["stream"]) == ("tiny/Chatty-1B-Instruct", True)
    assert asked["stream_options"]["include_swarm"] is True


def test_the_route_of_an_answer_is_drawn(page: Page, gateway: ScriptedGateway) -> None:
    answer = gateway.plan(answering("alice", "bob"), text("Well"))
    ask(page, "Hello")
    wait_text(page, "alice")
    assert page.locator(".hop-name").all_inner_texts() == ["you", "alice", "bob", "you"]
    assert page.locator(".hop-time").all_inner_texts() == ["1.2 ms", "2.2 ms"]
    answer.send(answering("alice", "carol", repairs=1), finish()).end()
    wait_answered(page)
    assert page.locator(".hop-name").all_inner_texts() == ["you", "alice", "carol", "you"]
    figures = page.locator(".figures").inner_text()
    for shown in ("24 tokens/s", "first after 0.18 s", "57 tokens", "a server left, another took over"):
        assert shown in figures


def test_the_next_turn_carries_the_conversation(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("Hello, you.")
    gateway.plan_whole("Fine.")
    ask(page, "Hello")
    wait_answered(page)
    ask(page, "How are you?")
    wait_answered(page, 2)
    assert [(said["role"], said["content"]) for said in gateway.requests[1]["messages"]] == [
        ("user", "Hello"),
        ("assistant", "Hello, you."),
        ("user", "How are you?"),
    ]


def test_escape_stops_an_answer(page: Page, gateway: ScriptedGateway) -> None:
    answer = gateway.plan(text("So far"))
    ask(page, "Tell me everything")
    wait_text(page, "So far")
    page.keyboard.press("Escape")
    wait_text(page, "You stopped this answer.")
    assert answer.left.wait(10)
    assert answers(page) == ["So far"]
    assert page.locator("#send").is_visible()


def test_the_stop_button_stops_and_the_answer_can_be_asked_for_again(
    page: Page, gateway: ScriptedGateway
) -> None:
    answer = gateway.plan(text("First try"))
    ask(page, "Tell me")
    wait_text(page, "First try")
    page.click("#stop")
    assert answer.left.wait(10)
    wait_answered(page)
    gateway.plan_whole("Second try")
    page.click(".answer [aria-label='Ask again']")
    wait_text(page, "Second try")
    wait_answered(page)
    assert answers(page) == ["Second try"]
    assert gateway.requests[0]["messages"] == gateway.requests[1]["messages"]


def test_a_message_can_be_edited(page: Page, gateway: ScriptedGateway) -> None:
    for said in ("One", "Two"):
        gateway.plan_whole(said)
        ask(page, f"Say {said}")
        wait_text(page, said, ".prose >> nth=-1")
    gateway.plan_whole("Three")
    page.hover(".question >> nth=0")
    page.click(".question [aria-label=Edit] >> nth=0")
    page.fill(".editing textarea", "Say Three")
    page.press(".editing textarea", "Enter")
    wait_text(page, "Three", ".prose")
    wait_answered(page)
    assert answers(page) == ["Three"]
    assert [said["content"] for said in gateway.requests[2]["messages"]] == ["Say Three"]


def test_a_reload_keeps_the_conversation(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("Kept.", answering("alice"))
    ask(page, "Keep this")
    wait_answered(page)
    page.reload()
    assert answers(page) == ["Kept."]
    assert page.locator(".hop-name").all_inner_texts() == ["you", "alice", "you"]
    page.goto(gateway.url)  # without the conversation's name in the address
    assert answers(page) == []
    page.click(".conversation")
    assert answers(page) == ["Kept."]


def test_a_reload_in_mid_answer_keeps_what_had_come(page: Page, gateway: ScriptedGateway) -> None:
    answer = gateway.plan(text("Half an"))
    ask(page, "Tell me")
    wait_text(page, "Half an")
    page.reload()
    assert answer.left.wait(10)
    wait_text(page, "The page was left before this answer was complete.")
    assert answers(page) == ["Half an"]


def test_tasks_ask_in_their_own_way(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("A chat.")
    ask(page, "Hello")
    wait_answered(page)
    page.click("[data-task=translate]")
    page.select_option("#to", "French")
    for said in ("Bonjour.", "Merci."):
        gateway.plan_whole(said)
        ask(page, "A text")
        wait_text(page, said)
    asked = gateway.requests[2]
    assert len(asked["messages"]) == 1, "each translation stands for itself"
    assert "to French" in asked["messages"][0]["content"]
    assert asked["temperature"] == 0
    page.click("[data-task=write]")
    page.select_option("#kind", "A poem")
    gateway.plan_whole("Roses.")
    ask(page, "Red flowers")
    wait_text(page, "Roses.")
    assert gateway.requests[3]["messages"][0]["content"] == "Write a poem about this: Red flowers"
    assert page.locator(".conversation").count() == 3
    page.click(".conversation >> nth=2")
    assert answers(page) == ["A chat."]
    assert page.get_attribute("[data-task=chat]", "aria-pressed") == "true"


def test_models_without_a_chat_template_are_shown_examples(page: Page, gateway: ScriptedGateway) -> None:
    gateway.models = [{"id": "base", "has_chat_template": False, "context_tokens": None, "is_adapter": False}]
    page.reload()
    page.wait_for_selector("#model-name:has-text('base')")
    page.click("[data-task=ask]")
    gateway.plan(plain_text(" A"), plain_text(" base model."), plain_text("")).end()
    ask(page, "Who are you?")
    wait_answered(page)
    assert answers(page) == ["A base model."]
    asked = gateway.requests[0]
    assert asked["path"] == "/v1/completions"
    assert asked["prompt"].endswith("\n\nQuestion: Who are you?\nAnswer:")
    assert asked["prompt"].count("Question:") > 1
    assert asked["stop"] == ["\nQuestion:"]


def test_markup_is_never_html(page: Page, gateway: ScriptedGateway) -> None:
    links = "[a](javascript:alert(3)) [b](https://example.org/) ![c](https://example.org/pixel.png)"
    gateway.plan_whole(f"{HOSTILE}\n\n{links}\n\n```html\n{HOSTILE}\n```", answering(HOSTILE))
    ask(page, HOSTILE)
    wait_answered(page)
    assert page.locator(".thread img, .thread script, .side img").count() == 0
    assert page.locator(".said").inner_text() == HOSTILE
    assert HOSTILE[:20] in answers(page)[0]
    assert page.locator(".prose pre").inner_text() == HOSTILE
    assert page.locator(".prose a").evaluate_all("nodes => nodes.map(node => node.href)") == [
        "https://example.org/",
        "https://example.org/pixel.png",
    ]
    assert "noopener" in (page.get_attribute(".prose a >> nth=0", "rel") or "")
    page.reload()
    assert page.locator(".thread img, .thread script, .side img").count() == 0


def test_the_place_in_the_line_is_told(page: Page, gateway: ScriptedGateway) -> None:
    answer = gateway.plan(swarm("queued", place=3, of=12, expected_s=4.0))
    ask(page, "Is there room?")
    wait_text(page, "You are 3rd of 12 in line, about 4 seconds")
    answer.send(swarm("queued", place=1, of=10, expected_s=0))
    wait_text(page, "You are next in line")
    answer.send(swarm("opening"), text("There is."), finish()).end()
    wait_answered(page)
    assert answers(page) == ["There is."]
    assert page.locator(".stage").is_hidden()


ERRORS = [
    (429, {"message": "slow down", "type": "rate_limit_error"}, "Many people are asking just now"),
    (
        429,
        {"message": "more than 5 requests a minute", "code": "rate_limit_exceeded"},
        "You have asked often in this minute",
    ),
    (503, {"message": "nobody serves blocks 4-8"}, "Nobody serves blocks 4–8."),
    (401, {"message": "no key"}, "This gateway asks for a key"),
    (404, {"message": "no such model", "code": "model_not_found"}, "This model is not here any more"),
    (413, {"message": "too large"}, "That is too long"),
    (504, {"message": "timed out"}, "That took too long"),
    (400, {"message": "n is too large", "param": "n"}, "N is too large."),
    (500, {"message": ""}, "Something went wrong at the gateway"),
]


def test_errors_are_told_in_words(page: Page, gateway: ScriptedGateway) -> None:
    for status, error, shown in ERRORS:
        page.click("#new")
        gateway.refuse(status, error, Retry_After="60")
        ask(page, "Hello?")
        wait_text(page, shown, ".note.bad")
        gateway.plan_whole("Now it works.")
        page.click(".note.bad button >> nth=0")
        wait_text(page, "Now it works.")
        assert page.locator(".note.bad").count() == 0


def test_a_full_line_says_when_to_come_again(page: Page, gateway: ScriptedGateway) -> None:
    error = {"message": "full", "type": "rate_limit_error", "code": "queue_full"}
    gateway.plan({"error": {**error, "status": 429, "retry_after_s": 40}})
    ask(page, "Hello?")
    wait_text(page, "There should be room in 40 seconds.")
    assert "Try again (in " in page.locator(".note.bad button").inner_text()


def test_a_stream_that_breaks_off_keeps_what_came(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan(text("Half"), CUT)
    ask(page, "Hello?")
    wait_text(page, "The answer broke off")
    assert answers(page) == ["Half"]


def test_a_conversation_that_is_too_long_can_go_on(page: Page, gateway: ScriptedGateway) -> None:
    for said in ("One", "Two"):
        gateway.plan_whole(said)
        ask(page, f"Say {said}")
        wait_text(page, said, ".prose >> nth=-1")
    for _ in range(2):
        gateway.refuse(400, {"message": "too many tokens", "code": "context_length_exceeded"})
    ask(page, "Say Three")
    gateway.plan_whole("Three")
    page.click("text=Go on without the oldest messages")
    wait_text(page, "Three", ".prose >> nth=-1")
    assert [said["content"] for said in gateway.requests[4]["messages"]] == ["Say Three"]
    assert answers(page) == ["One", "Two", "Three"]


def test_an_answer_that_could_not_be_so_long_is_asked_for_as_long_as_it_can_be(
    page: Page, gateway: ScriptedGateway
) -> None:
    gateway.refuse(400, {"message": "too many tokens", "code": "context_length_exceeded"})
    gateway.plan_whole("Short.")
    ask(page, "Say it")
    wait_answered(page)
    assert answers(page) == ["Short."]
    first, second = gateway.requests
    assert first.pop("max_tokens") == 512
    assert first == second


def test_a_failed_answer_shows_no_way(page: Page, gateway: ScriptedGateway) -> None:
    error = {"message": "lost", "status": 503}
    answer = gateway.plan(answering("alice", "bob", repairs=1), text("Half"))
    ask(page, "Hello?")
    wait_text(page, "another took over")
    gateway.trouble = "nobody serves block 3"
    answer.send({"error": error})
    wait_text(page, "The swarm cannot answer right now")
    assert page.locator(".hops").is_hidden()
    assert "another took over" not in page.locator(".answer").inner_text()
    page.wait_for_selector("#health.bad")


def test_servers_of_a_route_differ_in_colour(page: Page, gateway: ScriptedGateway) -> None:
    gateway.plan_whole("Well.", answering("a", "g", "m", "s"))  # alike, as far as their names go
    ask(page, "Hello?")
    wait_answered(page)
    classes = page.locator(".hop:not(.end)").evaluate_all("nodes => nodes.map((node) => node.className)")
    assert len(set(classes)) == 4


def test_those_who_listen_hear_that_the_answer_comes_and_all_see_how_to_stop_it(
    page: Page, gateway: ScriptedGateway
) -> None:
    answer = gateway.plan(swarm("opening"))
    ask(page, "Hello?")
    wait_text(page, "Finding a way", "#announcer")
    assert page.locator("#keys-running").is_visible()
    answer.send(text("Well"))
    wait_text(page, "The answer comes", "#announcer")
    answer.send(finish()).end()
    wait_answered(page)
    assert page.locator("#keys-running").is_hidden()


def test_parts_of_an_answer_are_believed_rather_than_the_gateways_last_look(
    page: Page, gateway: ScriptedGateway
) -> None:
    gateway.trouble = "nobody serves blocks 15-29"
    page.reload()
    wait_text(page, "nobody serves blocks 15–29", "#trouble")
    answer = gateway.plan(swarm("opening"))
    ask(page, "Hello?")
    answer.send(text("Well"))
    page.wait_for_selector("#health.good")
    assert page.locator("#trouble").is_hidden()
    with page.expect_response("**/health") as health:
        page.evaluate("dispatchEvent(new Event('online'))")
    assert health.value.status == 503
    health.value.finished()
    assert page.locator("#trouble").is_hidden()
    answer.send(finish()).end()
    wait_answered(page)


def test_trouble_that_is_over_is_soon_known(visit: Callable[..., Page], gateway: ScriptedGateway) -> None:
    gateway.trouble = "nobody serves block 3"
    page = visit(gateway.url)
    page.clock.install()
    page.reload()
    wait_text(page, "nobody serves block 3", "#trouble")
    gateway.trouble = None
    page.clock.fast_forward(3000)
    page.wait_for_selector("#health.good")


def test_trouble_of_the_swarm_is_told_before_anybody_asks(page: Page, gateway: ScriptedGateway) -> None:
    gateway.trouble = "Blocks 4 to 8 are missing."
    page.reload()
    wait_text(page, "Blocks 4 to 8 are missing.")
    assert page.get_attribute("#health", "class") == "dot bad"


def test_answers_go_on_while_another_conversation_is_open(page: Page, gateway: ScriptedGateway) -> None:
    answer = gateway.plan(text("Slowly"))
    ask(page, "Take your time")
    wait_text(page, "Slowly")
    page.click("#new")
    gateway.plan_whole("Quick.")
    ask(page, "Be quick")
    wait_answered(page)
    answer.send(text(" but surely."), finish()).end()
    page.wait_for_function("() => document.querySelectorAll('.pulsing').length === 0")
    page.click(".conversation:has-text('Take your time')")
    assert answers(page) == ["Slowly but surely."]


def test_a_phone_has_room_for_everything(visit: Callable[..., Page], gateway: ScriptedGateway) -> None:
    page = visit(gateway.url, **{**PHONE, "viewport": {"width": 320, "height": 560}})
    page.wait_for_selector("#health.good")
    code = "```\n" + "x = 1; " * 60 + "\n```"
    table = "| a | b |\n| - | - |\n| " + "w" * 90 + " | 2 |"
    gateway.plan_whole(f"{'long' * 40}\n\n{code}\n\n{table}", answering(*["somebody's server"] * 9))
    page.fill("#text", "https://example.org/" + "y" * 200)
    page.click("#send")
    wait_answered(page)
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    bottom = page.locator(".composer").bounding_box()
    assert bottom is not None
    assert bottom["y"] + bottom["height"] <= 560
    assert not page.locator(".conversation").is_visible()
    page.click("#open-side")
    page.locator(".conversation").wait_for(state="visible")
    page.keyboard.press("Escape")
    page.locator(".conversation").wait_for(state="hidden")
