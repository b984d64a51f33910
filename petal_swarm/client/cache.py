"""What Hugging Face's `generate` takes for a KV cache: a thin face of an `InferenceSession`."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from petal_swarm.client.session import InferenceSession


class SwarmCache(Cache):  # type: ignore[misc]
    """The KV cache that lies in the swarm. `width` counts columns of the padded batch seen so far.

    While `looks_ahead`, the most likely next step is sent before it is asked for, unless one of its
    tokens is in `final_tokens`, or the batch has `max_width` columns already.
    """

    def __init__(self, session: InferenceSession, width: int = 0) -> None:
        super().__init__(layers=[])
        self.session = session
        self.width = width
        self.looks_ahead = False
        self.guessed = False
        self.final_tokens: frozenset[int] = frozenset()
        self.max_width = session.max_length

    def look_ahead(self, final_tokens: frozenset[int], max_width: int) -> None:
        """Begin to send steps ahead: what follows is greedy decoding."""
        self.looks_ahead = True
        self.final_tokens = final_tokens
        self.max_width = max_width

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that are in the cache."""
        return self.width

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.session.max_length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam i goes on from beam `beam_idx[i]`."""
        self.session.fork(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = len(self.session.lengths)
        self.session.fork([index for index in range(count) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.session.fork(indices.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns; if positive, keep that many (older releases)."""
        dropped = -tokens_to_remove if tokens_to_remove <= 0 else self.width - tokens_to_remove
        if dropped > 0:
            self.session.truncate([length - dropped for length in self.session.lengths])
            self.width -= dropped

    def activate_past_recording(self) -> None:
        """Nothing to do: positions are absolute, so any earlier state can be returned to."""

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def __len__(self) -> int:
        return 0
