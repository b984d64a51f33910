"""Gradients through a swarm are those of one process: transformers with PEFT is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.errors import ConfigError
from petal_swarm.models.adapter_settings import Lora, Prefix, SoftPrompt
from petal_swarm.span import Span
from tests.checkpoints import VOCABULARY, reference
from tests.models import peft_models
from tests.swarm.local import LocalSwarm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids")
SPANS = {1: ["0:8"], 2: ["0:4", "4:8"], 4: ["0:2", "2:4", "4:6", "6:8"]}
TOLERANCE = 1e-4


def batch(sequences: int = 3, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels; padded on the right, as in training."""
    ids = torch.randint(5, VOCABULARY, (sequences, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, sequences):
        mask[row, width - 3 * row :] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def assert_near(found: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Relative to the norm of all of it."""
    assert found is not None, what
    assert expected is not None, what
    assert expected.norm() > 0, what
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{what}: {error:.2g}"


def lora_pair(checkpoint: Path, model: SwarmModelForCausalLM) -> tuple[Any, list[Tensor], list[Tensor]]:
    """PEFT's model, the LoRA parameters of `model`, and those of PEFT, which have the same numbers."""
    local = peft_models.add_lora(reference(checkpoint))
    settings = Lora(rank=peft_models.RANK, alpha=peft_models.RANK * peft_models.SCALE, targets="all-linear")
    adapter = model.add_adapter(settings)
    theirs = peft_models.lora_parameters(local, adapter.layout)
    ours = list(adapter.parameters())
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    return local, ours, theirs


@pytest.mark.parametrize("servers", SPANS)
def test_lora(checkpoint: Path, servers: int) -> None:
    ids, mask, labels = batch()
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        model = swarm.model()
        local, ours, theirs = lora_pair(checkpoint, model)
        for _ in range(2):  # the second step with other numbers, and along an open lane
            expected = local(input_ids=ids, attention_mask=mask, labels=labels)
            found = model(ids, attention_mask=mask, labels=labels)
            assert_near(found.logits[mask.bool()], expected.logits[mask.bool()], "logits")
            assert_near(found.loss, expected.loss, "loss")
            expected.loss.backward()
            found.loss.backward()
            for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                assert_near(mine.grad, other.grad, f"parameter {index}")
            with torch.no_grad():
                for mine, other in zip(ours, theirs, strict=True):
                    other -= 0.01 * other.grad
                    mine.copy_(other)


@pytest.mark.parametrize("servers", SPANS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs(checkpoint: Path, servers: int, side: str) -> None:
    ids, mask, labels = batch()
    if side == "left":
        mask, labels = mask.flip(1), labels.flip(1)
        # transformers predicts the first token from padding, whatever that is.
        labels = labels.masked_fill(mask.cumsum(1) == 1, -100)
    local = reference(checkpoint).requires_grad_(False)
    embeds = local.get_input_embeddings()(ids)
    theirs, ours = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    expected = local(inputs_embeds=theirs, attention_mask=mask, labels=labels)
    expected.loss.backward()
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        found = swarm.model()(inputs_embeds=ours, attention_mask=mask, labels=labels)
        found.loss.backward()
    assert_near(found.loss, expected.loss)
    assert_near(ours.grad, theirs.grad)


@pytest.mark.parametrize("servers", SPANS)
def test_prefixes(checkpoint: Path, servers: int) -> None:
    ids, mask, labels = batch()
    local = peft_models.add_prefix(reference(checkpoint))
    weight = peft_models.prefix_parameter(local)
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        model = swarm.model()
        adapter = model.add_adapter(Prefix(tokens=peft_models.PREFIX_TOKENS))
        (parameter,) = adapter.parameters()
        config = model.ends.config
        with torch.no_grad():
            parameter.copy_(peft_models.prefix_numbers(config, weight).view(parameter.shape))
        expected = local(input_ids=ids, attention_mask=mask, labels=labels)
        expected.loss.backward()
        found = model(ids, attention_mask=mask, labels=labels)
        found.loss.backward()
        assert_near(found.loss, expected.loss)
        assert parameter.grad is not None
        assert weight.grad is not None
        assert_near(parameter.grad.flatten(), peft_models.prefix_numbers(config, weight.grad))


def test_soft_prompts_and_a_module_between_blocks(checkpoint: Path) -> None:
    """What is the client's own is differentiated by torch; blocks on both sides of it by the swarm."""
    ids, mask, _ = batch()
    local = reference(checkpoint).requires_grad_(False)
    bottleneck = nn.Linear(64, 64)
    blocks = local.transformer.h if hasattr(local, "transformer") else local.model.layers
    handle = blocks[3].register_forward_hook(
        lambda _, __, output: (
            bottleneck(output) if isinstance(output, Tensor) else (bottleneck(output[0]), *output[1:])
        )
    )
    expected = local(input_ids=ids, attention_mask=mask).logits
    handle.remove()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    (expected * weights).sum().backward()
    theirs, bottleneck.weight.grad = bottleneck.weight.grad, None
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model = swarm.model()
        hidden = model.run_blocks(model.ends.embed(ids), mask, (0, 4))
        hidden = model.run_blocks(bottleneck(hidden), mask, Span(4, 8))
        found = model.ends.logits(hidden)
        (found * weights).sum().backward()
    real = mask.bool()
    assert_near(found[real], expected[real])
    assert_near(bottleneck.weight.grad, theirs)


def test_an_optimizer_learns_a_soft_prompt(checkpoint: Path) -> None:
    ids, mask, labels = batch()
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model = swarm.model()
        model.add_adapter(SoftPrompt(tokens=4))
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05, losses


def test_many_passes_along_disjoint_routes(checkpoint: Path) -> None:
    """Batches are cut, and go through all servers; each pass is one of the whole's parts."""
    ids, mask, labels = batch(12, 70)
    local = reference(checkpoint).requires_grad_(False)
    embeds = local.get_input_embeddings()(ids)
    theirs, ours = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    expected = local(inputs_embeds=theirs, attention_mask=mask, labels=labels)
    expected.loss.backward()
    with LocalSwarm(checkpoint, ["0:4", "4:8", "0:4", "4:8"], max_batch_tokens=150) as swarm:
        model = swarm.model()
        found = model(inputs_embeds=ours, attention_mask=mask, labels=labels)
        found.loss.backward()
        lanes = model._blocks._trainer._pools[Span(0, 8)].lanes
        assert len(lanes) == 2
        peers = {member.peer_id for lane in lanes for member in lane.members}
        assert len(peers) == 4
        assert all(lane.forward_s > 0 and not lane.courses for lane in lanes)
    assert_near(found.loss, expected.loss)
    assert_near(ours.grad, theirs.grad)


def test_backward_twice_and_graphs_that_are_dropped(checkpoint: Path) -> None:
    ids, mask, _ = batch()
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model = swarm.model()
        embeds = model.ends.embed(ids).requires_grad_()
        out = model.run_blocks(embeds, mask)
        out.square().sum().backward(retain_graph=True)
        first = embeds.grad
        embeds.grad = None
        out.square().sum().backward()
        assert_near(embeds.grad, first)
        (lane,) = model._blocks._trainer._pools[Span(0, 8)].lanes
        dropped = model.run_blocks(embeds, mask)
        assert lane.courses
        del dropped, out
        with torch.no_grad():
            model.run_blocks(embeds, mask)
        assert not lane.courses


def test_without_gradients_nothing_is_kept(checkpoint: Path) -> None:
    ids, mask, _ = batch()
    with LocalSwarm(checkpoint, SPANS[1]) as swarm, torch.no_grad():
        model = swarm.model()
        found = model.run_blocks(model.ends.embed(ids), mask, None)
        expected = model(ids, attention_mask=mask).logits
        assert_near(model.ends.logits(found)[mask.bool()], expected[mask.bool()])
        (lane,) = model._blocks._trainer._pools[Span(0, 8)].lanes
        assert not lane.courses


def test_bad_input(checkpoint: Path) -> None:
    ids, _, _ = batch(2, 40)
    with LocalSwarm(checkpoint, SPANS[2], max_batch_tokens=32) as swarm:
        model = swarm.model()
        embeds = model.ends.embed(ids).requires_grad_()
        with pytest.raises(ConfigError, match="a sequence of 40 tokens is longer than the 32"):
            model.run_blocks(embeds)
        for blocks, message in (
            ((4, 9), "has 8 blocks"),
            ((4, 4), "a span needs"),
            ((-1, 4), "a span needs"),
        ):
            with pytest.raises(ConfigError, match=message):
                model.run_blocks(embeds[:, :8], blocks=blocks)
        with pytest.raises(ConfigError, match="expected"):
            model.run_blocks(embeds[:, :8, :5])
        with pytest.raises(ConfigError, match="hidden must be"):
            model.run_blocks(embeds[0])
        model._closed = True
        with pytest.raises(ConfigError, match="closed"):
            model.run_blocks(embeds[:, :8])
