"""By what an adapter, or the part of it for some blocks, is known: a digest of its shape and its numbers."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor

from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.span import Span

_DOMAIN = b"petal-swarm/1/adapter\n"
#: Digits of an id; an id stands for an adapter as a whole.
ID_DIGITS = 32


def adapter_digest(layout: AdapterLayout, numbers: Tensor, blocks: Span) -> bytes:
    """32 bytes for `numbers`, the flat float32 vector of `blocks`.

    SHA-256 of `petal-swarm/1/adapter`, a line feed, JSON of `[start, end, prefix tokens, places]` without
    spaces, each place as `[block, stem, rank, scale]`, a line feed, and the numbers, little-endian.
    """
    places = [
        [place.block, place.stem, place.rank, float(place.scale)] for place in layout.of_span(blocks).places
    ]
    shape = json.dumps([blocks.start, blocks.end, layout.prefix_tokens, places], separators=(",", ":"))
    digest = hashlib.sha256(_DOMAIN + shape.encode() + b"\n")
    digest.update(numbers.detach().cpu().float().contiguous().numpy().data)
    return digest.digest()


def adapter_id(layout: AdapterLayout, numbers: Tensor, num_blocks: int) -> str:
    """The id of an adapter for a whole model of `num_blocks`, by which peers name it: hexadecimal digits."""
    return adapter_digest(layout, numbers, Span(0, num_blocks)).hex()[:ID_DIGITS]
