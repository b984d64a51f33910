"""Logits of the tokens that Hugging Face's `generate` asks for, through the session behind its cache."""

from __future__ import annotations

import torch

from petal_swarm.client.cache import SwarmCache
from petal_swarm.client.front import Front, strip_prompt
from petal_swarm.client.packing import Packing, unique_rows


def step_logits(
    front: Front,
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: SwarmCache,
    logits_to_keep: int | torch.Tensor,
) -> torch.Tensor:
    """Append `given` to the sequences of `cache`: logits `[batch, columns, vocab]` of the columns to keep.

    Where the cache looks ahead, the step that will most likely follow is on its way when this returns.
    """
    last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
    if last_only and cache.looks_ahead and given.dim() == 2:
        logits = _next_logits(front, given, attention_mask, cache)
        _send_ahead(front, logits, cache)
        return logits
    repeated = None
    if last_only and cache.width == 0 and given.dim() == 2:
        repeated = unique_rows(given, attention_mask)
    if repeated is not None:
        given = given[repeated[0]]
        attention_mask = attention_mask[repeated[0]] if attention_mask is not None else None
    logits = _step(front, given, attention_mask, cache, last_only=last_only)
    logits = kept_columns(logits, logits_to_keep)
    if repeated is not None:
        cache.session.fork(repeated[1])
        logits = logits[repeated[1]]
    return logits


def _step(
    front: Front,
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: SwarmCache,
    *,
    last_only: bool,
) -> torch.Tensor:
    """Logits of all columns of `given`; of the last alone if that is enough and no padding."""
    packing = Packing.of(given.shape[0], given.shape[1], attention_mask)
    last_only = last_only and (packing.kept is None or bool(packing.kept[:, -1].all()))
    hidden, lengths = front.rows(given, packing, prompted=not any(cache.session.lengths))
    rows = cache.session.step(hidden, lengths, rows="last" if last_only else "all")
    if not last_only:
        rows = strip_prompt(rows, lengths, packing.lengths)
    cache.width += given.shape[1]
    logits = front.ends.logits(rows)
    return logits[:, None] if last_only else packing.unpack(logits)


def _next_logits(
    front: Front, given: torch.Tensor, attention_mask: torch.Tensor | None, cache: SwarmCache
) -> torch.Tensor:
    """One column of greedy decoding: of the step sent ahead, if that guessed right."""
    rows = cache.session.take_ahead(given) if given.shape[1] == 1 else None
    if rows is not None:
        cache.width += 1
        return front.ends.logits(rows)[:, None]
    if cache.guessed:
        # A logits processor or the padding of a finished sequence is at work, and will be again.
        cache.looks_ahead = False
    return _step(front, given, attention_mask, cache, last_only=True)[:, -1:]


def _send_ahead(front: Front, logits: torch.Tensor, cache: SwarmCache) -> None:
    tokens = logits[:, -1].argmax(-1)
    cache.guessed = (
        cache.looks_ahead and cache.width < cache.max_width and cache.final_tokens.isdisjoint(tokens.tolist())
    )
    if cache.guessed:
        cache.session.step_ahead(tokens[:, None], front.ends.embed(tokens))


def kept_columns(logits: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The columns that were asked for: all by default, the last ones, or those of an index."""
    if isinstance(logits_to_keep, int):
        return logits[:, -logits_to_keep:] if 0 < logits_to_keep < logits.shape[1] else logits
    return logits[:, logits_to_keep]
