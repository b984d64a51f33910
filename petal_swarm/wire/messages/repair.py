"""How a ring is watched and mended while its session goes on: lost links, new neighbours, signs of life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from petal_swarm.wire import fields
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages.parts import MAX_STEP, NO_STEP, Neighbour, optional_neighbour, optional_peer


@dataclass(frozen=True, slots=True)
class Reroute:
    """Client to a hop: its neighbours in the ring change; each new link is of `epoch`.

    `upstream`: steps come from this peer from now on, and no more from the one before. `next`: results go
    there, from the first that it lacks on; `also` keeps the present next hop beside it. `answered`: the
    client has had all answers up to this step; the last hop owes it those after that, and a replay may
    join those before. None leaves a thing as it is.
    """

    type: ClassVar[str] = "reroute"
    epoch: int
    upstream: str | None = None
    next: Neighbour | None = None
    also: bool = False
    answered: int | None = None

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "epoch": self.epoch,
            "upstream": self.upstream,
            "next": self.next.to_header() if self.next else None,
            "also": self.also,
            "answered": self.answered,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Reroute:
        header = frame.header
        return cls(
            epoch=fields.integer(header, "epoch", 0, MAX_STEP),
            upstream=optional_peer(header, "upstream"),
            next=optional_neighbour(header, "next"),
            also=fields.flag(header, "also", False),
            answered=fields.optional(
                header, "answered", lambda: fields.integer(header, "answered", NO_STEP, MAX_STEP)
            ),
        )


@dataclass(frozen=True, slots=True)
class Rerouted:
    """Answer to `Reroute`: it is done, and the new next hop, if there is one, takes steps."""

    type: ClassVar[str] = "rerouted"
    epoch: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "epoch": self.epoch}

    @classmethod
    def from_frame(cls, frame: Frame) -> Rerouted:
        return cls(fields.integer(frame.header, "epoch", 0, MAX_STEP))


@dataclass(frozen=True, slots=True)
class Lost:
    """A hop to its client: the link of `epoch`, to the next hop or from the `upstream`, is gone.

    The session lives on here and waits for a `Reroute`. Where not all that was sent to the next hop is
    still known, another one cannot take its place: then it is not `replayable`.
    """

    type: ClassVar[str] = "lost"
    epoch: int
    upstream: bool = False
    replayable: bool = True
    reason: str = ""

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "epoch": self.epoch,
            "upstream": self.upstream,
            "replayable": self.replayable,
            "reason": self.reason[: fields.MAX_TEXT],
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Lost:
        return cls(
            fields.integer(frame.header, "epoch", 0, MAX_STEP),
            fields.flag(frame.header, "upstream", False),
            fields.flag(frame.header, "replayable", True),
            fields.text(frame.header, "reason", ""),
        )


@dataclass(frozen=True, slots=True)
class Leaving:
    """A hop to its client: this server wants to leave; another one should take its place."""

    type: ClassVar[str] = "leaving"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> Leaving:
        return cls()


@dataclass(frozen=True, slots=True)
class Probe:
    """Client to a hop: are you there, and how far?"""

    type: ClassVar[str] = "probe"
    number: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.number}

    @classmethod
    def from_frame(cls, frame: Frame) -> Probe:
        return cls(fields.integer(frame.header, "number", 0, MAX_STEP))


@dataclass(frozen=True, slots=True)
class Progress:
    """Answer to `Probe`: the last step that has arrived, and the last that is computed."""

    type: ClassVar[str] = "progress"
    number: int
    arrived: int
    done: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.number, "arrived": self.arrived, "done": self.done}

    @classmethod
    def from_frame(cls, frame: Frame) -> Progress:
        return cls(
            fields.integer(frame.header, "number", 0, MAX_STEP),
            fields.integer(frame.header, "arrived", NO_STEP, MAX_STEP),
            fields.integer(frame.header, "done", NO_STEP, MAX_STEP),
        )


RepairMessage: TypeAlias = Reroute | Rerouted | Lost | Leaving | Probe | Progress
