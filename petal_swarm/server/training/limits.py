"""Bounds on what training may take of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """Times in seconds. `retained_bytes`: of messages that were sent on, kept for neighbours to come.

    `max_passes`: of a run, not finished; `max_in_flight`: of those, come and not computed. What nothing was
    heard of for `keep_s` is dropped, and so is a run for `idle_timeout_s`; in `repair_timeout_s` a lost
    neighbour must be replaced.
    """

    retained_bytes: int = 1 << 28
    max_runs: int = 256
    max_runs_of_peer: int = 64
    max_passes: int = 1024
    max_in_flight: int = 32
    keep_s: float = 600.0
    idle_timeout_s: float = 1800.0
    repair_timeout_s: float = 60.0
