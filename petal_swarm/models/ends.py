"""What a client holds of a model: the embeddings before the first block and the head after the last."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petal_swarm.errors import ConfigError
from petal_swarm.models.checkpoint import Checkpoint, Progress
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of


class Ends(nn.Module):
    """Embeddings and LM head with frozen weights; gradients pass through to `hidden`.

    There may be no LM head, for a model with another one.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], *, with_head: bool = True) -> None:
        super().__init__()
        family = family_of(config)

        def frozen(name: str) -> nn.Parameter:
            return nn.Parameter(tensors[name], requires_grad=False)

        self.config = config
        self._rms = family.rms_norms
        self.embedding = frozen(f"{family.ends.embedding}.weight")
        self.head: nn.Parameter | None = self.embedding
        if not config.tied_embeddings:
            self.head = frozen(f"{family.ends.head}.weight") if with_head else None
        self.norm_weight = frozen(f"{family.ends.final_norm}.weight")
        self.norm_bias = None if self._rms else frozen(f"{family.ends.final_norm}.bias")
        stem = family.ends.embedding_norm
        self.embedding_norm_weight = None if stem is None else frozen(f"{stem}.weight")
        self.embedding_norm_bias = None if stem is None or self._rms else frozen(f"{stem}.bias")

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """What goes into block 0: int64 `[...]` -> `[..., hidden_size]`."""
        return self.enter(F.embedding(token_ids, self.embedding))

    def enter(self, embeddings: Tensor) -> Tensor:
        """What goes into block 0 for `embeddings [..., hidden_size]` that may be no token's."""
        if self.embedding_norm_weight is None:
            return embeddings
        return self._norm(embeddings, self.embedding_norm_weight, self.embedding_norm_bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: `[..., hidden_size]` -> `[..., vocab_size]`."""
        return F.linear(self.leave(hidden), self.lm_head())

    def leave(self, hidden: Tensor) -> Tensor:
        """What a head gets of the last block's `hidden [..., hidden_size]`: the final norm of it."""
        return self._norm(hidden, self.norm_weight, self.norm_bias)

    def train_head(self) -> None:
        """Make the LM head trainable: a parameter of its own, also where it was the embedding."""
        if self.lm_head() is self.embedding:
            self.head = nn.Parameter(self.embedding.detach().clone(), requires_grad=False)
        self.lm_head().requires_grad_(True)

    def lm_head(self) -> nn.Parameter:
        """`[vocab_size, hidden_size]`.

        Raises:
            ConfigError: there is none here.
        """
        if self.head is None:
            raise ConfigError("the model was loaded without its LM head, for another task")
        return self.head

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._rms:
            return F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return wide.to(x.dtype) * weight


def load_ends(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    with_head: bool = True,
) -> Ends:
    """Loads embeddings, final norm and head; without the head if that is not the embeddings.

    Raises:
        CheckpointError: tensors are missing, misshapen or damaged.
    """
    shapes = checkpoint.family.end_tensors(checkpoint.config)
    if not with_head:
        shapes.pop(f"{checkpoint.family.ends.head}.weight", None)
    tensors = checkpoint.load(shapes, dtype=dtype, device=device, progress=progress)
    return Ends(checkpoint.config, tensors, with_head=with_head)
