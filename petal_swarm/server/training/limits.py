"""Bounds on what training may take of a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.training import Passes, PassLimits
from petal_swarm.wire.frames import MAX_PAYLOAD_BYTES
from petal_swarm.wire.messages.parts import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """Times in seconds. `room_bytes`: for all that passes keep. `max_pass_tokens`: rows of a pass.

    `max_passes`: of a run, not finished. What nothing was heard of for `keep_s` is dropped, and so is a run
    for `idle_timeout_s`; in `repair_timeout_s` a lost neighbour must be replaced.
    """

    room_bytes: int = 1 << 30
    max_pass_tokens: int = 2048
    max_runs: int = 256
    max_runs_of_peer: int = 64
    max_passes: int = 1024
    keep_s: float = 600.0
    idle_timeout_s: float = 1800.0
    repair_timeout_s: float = 60.0

    @property
    def retained_bytes(self) -> int:
        """For messages that were sent on, kept for neighbours to come; the rest is for `passes`."""
        return self.room_bytes // 4

    def rows_of_pass(self, hidden_size: int) -> int:
        """At most so many rows of that many numbers: they must fit one message in any dtype."""
        fits = MAX_PAYLOAD_BYTES // (hidden_size * max(DTYPE_BYTES.values()))
        return max(1, min(self.max_pass_tokens, fits))

    def passes(self, compute: Compute, clock: Callable[[], float]) -> Passes:
        """What computes passes within these limits. Ranks on a CPU are in one memory, and keep equal parts of
        graphs, and an adapter each; inputs are only here.
        """
        stack = compute.engine.stack
        ranks = stack.ranks if stack.device.type == "cpu" else 1
        limits = PassLimits(
            activation_bytes=self.room_bytes // 2 // ranks,
            adapter_bytes=PassLimits.adapter_bytes // ranks,
            input_bytes=self.room_bytes // 4,
            max_rows=self.rows_of_pass(stack.config.hidden_size),
            keep_s=self.keep_s,
        )
        return Passes(stack, limits, piece_rows=compute.piece_rows, clock=clock)
