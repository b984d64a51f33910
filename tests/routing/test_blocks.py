"""Coverage of a model, and the words for its blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.routing import coverage, format_blocks, latest, missing_blocks
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

from .swarms import server, swarms


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([], "no blocks"),
        ([12], "block 12"),
        ([3, 4], "blocks 3-4"),
        ([4, 5, 6, 7, 12], "blocks 4-7 and 12"),
        ([9, 1, 3, 4, 3], "blocks 1, 3-4 and 9"),
    ],
)
def test_blocks_are_named_compactly(blocks: list[int], words: str) -> None:
    assert format_blocks(blocks) == words


def test_only_serving_servers_cover() -> None:
    swarm = [
        server("a", 0, 3),
        server("b", 2, 9),
        server("c", 0, 5, state="joining"),
        server("d", 0, 5, state="left"),
    ]
    assert coverage(swarm, 5) == (1, 1, 2, 1, 1)
    assert coverage(swarm, Span(2, 4)) == (2, 1)
    assert missing_blocks([swarm[0], swarm[2]], 5) == (3, 4)
    assert missing_blocks([], Span(3, 5)) == (3, 4)


@given(swarms(), st.integers(0, 4), st.integers(1, 5))
def test_coverage_counts_peers(swarm: list[Announcement], start: int, length: int) -> None:
    wanted = Span(start, start + length)
    assert coverage(swarm, wanted) == tuple(sum(b in a.span for a in swarm) for b in wanted.blocks())
    assert missing_blocks(swarm, wanted) == tuple(
        b for b in wanted.blocks() if not any(b in a.span for a in swarm)
    )


def test_a_peer_counts_once_with_what_it_said_last() -> None:
    swarm = [server("b", 0, 1), server("a", 0, 4), server("a", 2, 3)]
    assert latest(swarm) == [swarm[2], swarm[0]]
    assert coverage(swarm, 4) == (1, 0, 1, 0)


def test_a_model_has_blocks() -> None:
    with pytest.raises(ConfigError):
        coverage([], 0)
    with pytest.raises(ConfigError):
        missing_blocks([], -1)
