"""The directory protocol: pings, a model's servers, whether a peer can be dialled, how fast it uploads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError
from petal_swarm.wire import fields
from petal_swarm.wire.frames import Frame

MAX_ANNOUNCEMENTS = 512
MAX_RECORD_BYTES = 8 << 10
MAX_DIALED_PORTS = 4
#: A train of parts, to measure how fast bytes arrive; the first part only marks the beginning.
UPLOAD_PART_BYTES = 32 << 10
MAX_UPLOAD_PARTS = 129


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a `Pong`, to measure the round trip."""

    type: ClassVar[str] = "ping"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> Ping:
        return cls()


@dataclass(frozen=True, slots=True)
class Pong(Ping):
    """Answer to `Ping`."""

    type: ClassVar[str] = "pong"


@dataclass(frozen=True, slots=True)
class ListRequest:
    """Ask for the signed announcements that a peer knows of `model`."""

    type: ClassVar[str] = "list"
    model: str

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "model": self.model}

    @classmethod
    def from_frame(cls, frame: Frame) -> ListRequest:
        return cls(fields.text(frame.header, "model", limit=256))


@dataclass(frozen=True, slots=True)
class Listing:
    """Answer to `ListRequest`: signed records, opaque here, checked by whoever reads them."""

    type: ClassVar[str] = "listing"
    records: tuple[bytes, ...] = field(default=())

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "count": len(self.records)}

    @property
    def payload(self) -> bytes:
        """The records, each behind its length.

        Raises:
            LocalProtocolError: too many of them, or one too long or empty.
        """
        return _join_records(self.records)

    @classmethod
    def from_frame(cls, frame: Frame) -> Listing:
        return cls(_split_records(fields.integer(frame.header, "count", 0, MAX_ANNOUNCEMENTS), frame.payload))


@dataclass(frozen=True, slots=True)
class DialBack:
    """Ask whether this peer answers at these TCP ports of the address that its connection comes from.

    Not addresses: a peer is never made to dial anybody but the one who asks.
    """

    type: ClassVar[str] = "dial-back"
    ports: tuple[int, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "ports": self.ports}

    @classmethod
    def from_frame(cls, frame: Frame) -> DialBack:
        return cls(_ports(frame.header, "ports"))


@dataclass(frozen=True, slots=True)
class DialedBack:
    """Answer to `DialBack`.

    `observed` is the multiaddr that the connection comes from, without a peer id at its end; empty if it is
    not known. `tried` are the ports that were dialled, `reached` those at which the peer answered, with its
    own key. `time_s` is the answering peer's clock, in seconds since 1970.
    """

    type: ClassVar[str] = "dialed-back"
    observed: str = ""
    tried: tuple[int, ...] = ()
    reached: tuple[int, ...] = ()
    time_s: float = 0.0

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "observed": self.observed,
            "tried": self.tried,
            "reached": self.reached,
            "time_s": self.time_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> DialedBack:
        return cls(
            fields.text(frame.header, "observed", ""),
            _ports(frame.header, "tried"),
            _ports(frame.header, "reached"),
            fields.number(frame.header, "time_s", 0, 1e12, 0.0),
        )


@dataclass(frozen=True, slots=True)
class Upload:
    """So many `UploadPart`s follow, 2 at least: ask how long they took to arrive."""

    type: ClassVar[str] = "upload"
    parts: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "parts": self.parts}

    @classmethod
    def from_frame(cls, frame: Frame) -> Upload:
        return cls(fields.integer(frame.header, "parts", 2, MAX_UPLOAD_PARTS))


@dataclass(frozen=True, slots=True)
class UploadPart:
    """`UPLOAD_PART_BYTES` of payload that mean nothing."""

    type: ClassVar[str] = "upload-part"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @property
    def payload(self) -> bytes:
        return _FILLING

    @classmethod
    def from_frame(cls, frame: Frame) -> UploadPart:
        if frame.payload.nbytes != UPLOAD_PART_BYTES:
            raise RemoteProtocolError(
                f"the part of an upload has {UPLOAD_PART_BYTES} bytes, not {frame.payload.nbytes}"
            )
        return cls()


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Answer to `Upload`: seconds from the end of the first part to the end of the last."""

    type: ClassVar[str] = "uploaded"
    took_s: float

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "took_s": self.took_s}

    @classmethod
    def from_frame(cls, frame: Frame) -> Uploaded:
        return cls(fields.number(frame.header, "took_s", 0, 3600))


DirectoryMessage: TypeAlias = (
    Ping | Pong | ListRequest | Listing | DialBack | DialedBack | Upload | UploadPart | Uploaded
)

_FILLING = bytes(UPLOAD_PART_BYTES)


def _join_records(records: tuple[bytes, ...]) -> bytes:
    if len(records) > MAX_ANNOUNCEMENTS or not all(0 < len(record) <= MAX_RECORD_BYTES for record in records):
        raise LocalProtocolError(f"a listing of {len(records)} records is over the protocol's bounds")
    return b"".join(len(record).to_bytes(4, "big") + record for record in records)


def _split_records(count: int, payload: memoryview) -> tuple[bytes, ...]:
    records, offset = [], 0
    for _ in range(count):
        size = int.from_bytes(payload[offset : offset + 4], "big")
        record = bytes(payload[offset + 4 : offset + 4 + size])
        if size > MAX_RECORD_BYTES or len(record) != size or not size:
            raise RemoteProtocolError("a listing's records do not add up to its payload")
        records.append(record)
        offset += 4 + size
    if offset != payload.nbytes:
        raise RemoteProtocolError("a listing's records do not add up to its payload")
    return tuple(records)


def _ports(header: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return fields.items(header, name, _port, limit=MAX_DIALED_PORTS)


def _port(value: Any) -> int:
    return fields.integer({"port": value}, "port", 1, (1 << 16) - 1)
