"""The client's part of a model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TOLERANCE, error, make, tokens

from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import load_ends


@pytest.fixture(params=["bloom", "llama", "llama-yarn-tied"])
def pair(request, tmp_path):
    model = make(request.param)
    model.save_pretrained(tmp_path)
    return model, load_ends(open_checkpoint(str(tmp_path)), dtype=torch.float32)


def test_embeddings_match_transformers(pair):
    model, ends = pair
    seen = {}
    first = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    first[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    ids = tokens(9)
    with torch.no_grad():
        model(ids[None])
        assert error(ends.embed(ids), seen["hidden"][0]) < TOLERANCE


def test_gradients_pass_through_and_weights_are_frozen(pair):
    model, ends = pair
    hidden = torch.randn(3, model.config.hidden_size, requires_grad=True)
    ends.logits(hidden).logsumexp(-1).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ends.parameters())


def test_any_leading_dimensions(pair):
    _, ends = pair
    ids = tokens(6).view(2, 3)
    assert torch.equal(ends.embed(ids)[1], ends.embed(ids[1]))
    hidden = ends.embed(ids)
    assert ends.logits(hidden).shape == (2, 3, ends.config.vocab_size)


def test_tied_head_shares_memory(pair):
    model, ends = pair
    tied = model.config.tie_word_embeddings
    assert (ends.head is ends.embedding) == tied
    assert len(list(ends.parameters())) == len({id(p) for p in ends.parameters()})
