"""`status --watch`: the picture, pure, and what goes into a pipe."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from petal_swarm.cli.live_status import follow
from petal_swarm.cli.swarm_picture import Scale, line_of, picture, summary
from petal_swarm.client.changes import Event
from petal_swarm.client.status import Status
from petal_swarm.client.watch import Happening
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement


def peer(peer_id: str, start: int, end: int, **fields: object) -> Announcement:
    figures = {"block_time_s": 0.001, "step_time_s": 0.006, "kv_tokens": 4096, "kv_tokens_free": 1024}
    return Announcement(peer_id=peer_id, model="key", span=Span(start, end), **(figures | fields))


def status(*peers: Announcement, blocks: int = 8, silent: tuple[str, ...] = ()) -> Status:
    rtts_s = {a.peer_id: 0.0123 for a in peers if a.peer_id not in silent}
    return Status("model", "key", blocks, peers, rtts_s, frozenset(["busy"]))


def happening(words: str, name: str = "", kind: str = "joined") -> Happening:
    return Happening(1, 1.0, Event(kind, words, "a" if name else "", name))


def drawn(
    status: Status, *happenings: Happening, width: int = 80, height: int = 24, **options: Any
) -> list[str]:
    console = Console(width=width, height=height, legacy_windows=False)
    with console.capture() as capture:
        console.print(picture(status, happenings, width, height, **options))
    return capture.get().rstrip("\n").split("\n")


def test_each_server_has_a_line_with_a_bar_in_its_place() -> None:
    lines = drawn(status(peer("a", 0, 4, name="alice"), peer("b", 4, 8)))
    assert lines[0] == "model: 8 blocks, 2 peers; all blocks are served"
    alice = next(line for line in lines if line.startswith("alice"))
    assert alice.startswith("alice          0:4 ")
    assert "100 tok/s  75% full  12 ms" in alice
    other = next(line for line in lines if line.startswith("..b"))
    assert other.index("4:8") - 1 == 14 + Scale(8, 36).column(4)


def test_states_have_signs_and_gaps_are_marked() -> None:
    lines = drawn(
        status(
            peer("a", 0, 4, name="loader", state="joining"),
            peer("b", 4, 8, name="silent"),
            peer("busy", 2, 4),
            silent=("b",),
        )
    )
    assert lines[0] == "model: 8 blocks, 3 peers; nobody serves blocks 0-1 and 4-7"
    served = next(line for line in lines if line.startswith("servers"))
    assert served[14:] == "××××××××▁▁▁▁▁▁▁▁××××××××××××××××"
    assert any(line.startswith("+loader") and "joining" in line for line in lines)
    assert any(line.startswith("×silent") and "no answer" in line for line in lines)
    assert any(line.startswith("~..busy") for line in lines)


@pytest.mark.parametrize("blocks", [1, 8, 70, 176])
@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (200, 60)])
@pytest.mark.parametrize("servers", [0, 3, 200])
def test_it_fits_any_window(blocks: int, width: int, height: int, servers: int) -> None:
    peers = [peer(f"p{n}", n % blocks, min(blocks, n % blocks + 4), name=f"name-{n}") for n in range(servers)]
    lines = drawn(status(*peers, blocks=blocks), *[happening("x" * 300)] * 9, width=width, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_many_servers_share_lines_and_what_does_not_fit_is_counted() -> None:
    many = [peer(f"p{n:02}", n % 4 * 2, n % 4 * 2 + 2, name=f"n{n:02}") for n in range(40)]
    many.sort(key=lambda p: p.span)
    lines = drawn(status(*many), height=20)
    assert sum("▏" in line for line in lines) == 10
    assert not any("more" in line for line in lines)
    few = drawn(status(*many), height=12)
    assert sum(line.strip() == "and 24 peers more" for line in few) == 1


def test_spans_beyond_the_model_are_drawn_at_its_end() -> None:
    assert Scale(8, 40).columns_of(Span(7, 100_000)) == (35, 40)
    assert Scale(8, 40).columns_of(Span(90_000, 100_000)) == (39, 40)
    drawn(status(peer("a", 90_000, 100_000), peer("b", 0, 90_000)))


def test_names_cannot_drive_the_terminal() -> None:
    evil = "\x1b[31m[red]e\x07\u202e\n"
    lines = drawn(status(peer("a", 0, 8, name=evil)), happening("joined", evil))
    text = "".join(lines)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "[red]e" in text
    assert line_of(happening("joined", evil)).endswith(" ?[31m[red]e??? joined")


def test_wide_letters_do_not_push_bars_away() -> None:
    lines = drawn(status(peer("a", 0, 8, name="花瓣花瓣花瓣花瓣花瓣"), peer("b", 0, 8, name="x")))
    chinese = next(line for line in lines if "花" in line)
    plain = next(line for line in lines if line.startswith("x"))
    wide = sum(2 if ord(letter) > 0x2E80 else 1 for letter in chinese[: chinese.index("0:8")])
    assert wide == plain.index("0:8")


def test_a_swarm_out_of_reach_says_so() -> None:
    assert drawn(status(), is_reachable=False)[0].endswith("the swarm cannot be reached")
    assert summary(status()) == "model: 8 blocks, no peers; nobody serves blocks 0-7"


class PipedWatch:
    """Two changes, then whoever follows is told to stop."""

    trouble = None
    version = 1
    status = status(peer("a", 0, 8))

    def since(self, version: int) -> list[Any]:
        happenings = (
            happening("left", "bob\n", "left"),
            happening("nobody serves block 3", "", "gap_opened"),
        )
        return [SimpleNamespace(happenings=happenings)]

    async def later_than(self, version: int, *, timeout_s: float) -> bool:
        if self.version == 2:
            raise asyncio.CancelledError
        self.version = 2
        return True


@pytest.mark.parametrize("as_json", [False, True])
def test_a_pipe_gets_a_line_for_each_event(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(follow(PipedWatch(), as_json))  # type: ignore[arg-type]
    first, *events = capsys.readouterr().out.splitlines()
    if as_json:
        assert json.loads(first)["num_blocks"] == 8
        assert [json.loads(event)["kind"] for event in events] == ["left", "gap_opened"]
        assert json.loads(events[0])["name"] == "bob\n"
    else:
        assert first == "model: 8 blocks, 1 peer; all blocks are served"
        assert [event.split(" ", 1)[1] for event in events] == ["bob? left", "nobody serves block 3"]
