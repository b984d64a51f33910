"""The directory protocol: listings that do not add up, and ports that are none."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError
from petal_swarm.wire.fields import MAX_TEXT
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages import Message, decode, encode
from petal_swarm.wire.messages.directory import (
    MAX_ANNOUNCEMENTS,
    MAX_RECORD_BYTES,
    MAX_UPLOAD_PARTS,
    UPLOAD_PART_BYTES,
    DialBack,
    DialedBack,
    DirectoryMessage,
    Listing,
    ListRequest,
    Ping,
    Pong,
    Upload,
    Uploaded,
    UploadPart,
)

from .damage import LISTS, TEXTS, altered, check_bad_fields, transmitted

PORTS = [*LISTS, [1] * 5]

BAD: dict[type[Message], dict[str, list[Any]]] = {
    Ping: {},
    Pong: {},
    ListRequest: {"model": [*TEXTS, "x" * 257, ...]},
    Listing: {"count": [-1, MAX_ANNOUNCEMENTS + 1, True, 2.0, "2", None, ...]},
    DialBack: {"ports": PORTS},
    DialedBack: {
        "observed": [*TEXTS, "x" * (MAX_TEXT + 1)],
        "tried": PORTS,
        "reached": PORTS,
        "time_s": [-1, float("nan"), float("inf"), 1e13, "1", True],
    },
    Upload: {"parts": [1, 0, -1, MAX_UPLOAD_PARTS + 1, True, 2.0, "2", None, ...]},
    UploadPart: {},
    Uploaded: {"took_s": [-1e-9, float("nan"), float("inf"), 3601, "1", True, None, ...]},
}


@pytest.mark.parametrize("kind", get_args(DirectoryMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])


@pytest.mark.parametrize("entry", [0, 1 << 16, -1, True, "1", 1.0, None], ids=repr)
def test_ports_that_are_none(entry: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="'port'"):
        decode(altered(DialBack, ports=[1, entry]))


@pytest.mark.parametrize(
    ("count", "payload"),
    [
        (1, b""),
        (1, b"\0\0\0"),
        (1, b"\0\0\0\0"),
        (1, b"\0\0\0\2a"),
        (1, b"\0\0\0\1ab"),
        (0, b"\0\0\0\1a"),
        (2, b"\0\0\0\1a"),
        (1, b"\0\0\0\1a\0\0\0\1b"),
        (1, b"\xff\xff\xff\xffa"),
        (1, (MAX_RECORD_BYTES + 1).to_bytes(4, "big") + bytes(MAX_RECORD_BYTES + 1)),
    ],
    ids=repr,
)
def test_listings_that_do_not_add_up(count: int, payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="records"):
        decode(Frame({"type": "listing", "count": count}, memoryview(payload)))


@pytest.mark.parametrize("size", [0, 1, UPLOAD_PART_BYTES - 1, UPLOAD_PART_BYTES + 1])
def test_a_part_of_another_size_would_measure_something_else(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"not {size}"):
        decode(Frame({"type": "upload-part"}, memoryview(bytes(size))))


def test_a_listing_over_the_bounds_is_not_sent() -> None:
    """The peer would take it for an attack, and end the stream."""
    full = Listing((b"x",) * MAX_ANNOUNCEMENTS)
    assert decode(transmitted(full)) == full
    for records in [(b"x",) * (MAX_ANNOUNCEMENTS + 1), (bytes(MAX_RECORD_BYTES + 1),), (b"",)]:
        with pytest.raises(LocalProtocolError, match="bounds"):
            encode(Listing(records))
