"""A log that strangers write to stays readable."""

from __future__ import annotations

import logging

import pytest

from petal_swarm.net.complaints import LIMIT, WINDOW_S, Complaints


class Log:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.time_s = 0.0
        self.complaints = Complaints(logging.getLogger("test"), now=lambda: self.time_s)
        self._caplog = caplog
        caplog.set_level(logging.DEBUG)

    def warns(self, peer_id: str) -> bool:
        self._caplog.clear()
        self.complaints.about(peer_id, "peer %s did it", peer_id)
        [record] = self._caplog.records
        assert f"peer {peer_id} did it" in record.getMessage()
        return record.levelno == logging.WARNING


def test_each_peer_once_and_again_when_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(caplog)
    assert [log.warns("a"), log.warns("a"), log.warns("b")] == [True, False, True]
    log.time_s = WINDOW_S - 1
    assert not log.warns("a")
    log.time_s = WINDOW_S
    assert log.warns("a")


def test_many_names_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(caplog)
    assert sum(log.warns(str(number)) for number in range(1000)) == LIMIT
    log.time_s = WINDOW_S
    assert log.warns("another")
