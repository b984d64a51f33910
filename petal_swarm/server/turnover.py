"""When a full server may have room again: from how long its sessions have lasted. Pure: no clock."""

from __future__ import annotations

#: Before any session has ended.
FIRST_GUESS_S = 30.0
#: How much one more session moves the mean.
_SMOOTHING = 0.2
MIN_RETRY_S = 1.0
#: To ask once a minute costs a client nothing, and by then much may have changed.
MAX_RETRY_S = 60.0


class Turnover:
    """The mean life of sessions. Of n sessions that last so long each, one ends every mean / n seconds."""

    def __init__(self) -> None:
        self._mean_life_s = FIRST_GUESS_S

    def ended(self, life_s: float) -> None:
        """A session has ended that was open for so many seconds."""
        self._mean_life_s += (life_s - self._mean_life_s) * _SMOOTHING

    def retry_after_s(self, sessions: int, waiting: int) -> float:
        """Seconds until one more than the `waiting` ones should find that one of `sessions` has ended."""
        expected_s = self._mean_life_s * (waiting + 1) / max(1, sessions)
        return min(max(expected_s, MIN_RETRY_S), MAX_RETRY_S)
