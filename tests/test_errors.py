"""The tree of errors: who is to blame, and which survive the way over the wire."""

from __future__ import annotations

import pytest

from petal_swarm import errors
from petal_swarm.errors import (
    BusyError,
    ConfigError,
    DeadlineError,
    MissingBlocksError,
    PetalSwarmError,
    RemoteError,
    remote_error,
)

EVERY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
REMOTE = [kind for kind in EVERY if issubclass(kind, RemoteError)]


def test_there_is_one_root() -> None:
    assert all(issubclass(kind, PetalSwarmError) for kind in EVERY)
    assert all(kind.__doc__ for kind in EVERY)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(DeadlineError, TimeoutError)


@pytest.mark.parametrize("kind", REMOTE, ids=lambda kind: kind.code)
def test_a_remote_error_comes_back_as_itself(kind: type[RemoteError]) -> None:
    error = remote_error(kind.code, "what to do next", peer_id="peer", retry_after_s=1.5)
    assert type(error) is kind
    assert (str(error), error.peer_id, error.retry_after_s) == ("what to do next", "peer", 1.5)
    assert (kind("text").peer_id, kind("text").retry_after_s) == (None, None)


def test_codes_are_short_and_their_own() -> None:
    assert len({kind.code for kind in REMOTE}) == len(REMOTE)
    assert all(0 < len(kind.code) <= 64 for kind in REMOTE)


@pytest.mark.parametrize("code", ["", "from-the-future", "BUSY"])
def test_other_codes_become_plain_remote_errors(code: str) -> None:
    assert type(remote_error(code, "text")) is RemoteError
    assert type(remote_error(BusyError.code, "text")) is BusyError


def test_missing_blocks_are_named() -> None:
    assert MissingBlocksError("nobody serves them", range(3, 6)).blocks == (3, 4, 5)
    assert MissingBlocksError("nobody").blocks == ()
