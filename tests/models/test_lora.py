"""LoRA on lean blocks against PEFT on transformers' layers."""

from __future__ import annotations

import peft_models
import pytest
import torch
from tiny_models import CONFIGS, TOLERANCE, Local, error, make, tokens

from petal_swarm.models.linear import Linear
from petal_swarm.models.lora import LoraDelta, LoraMatrices, Part, with_lora
from petal_swarm.models.stack import BlockStack
from petal_swarm.models.training import with_gradients

LENGTH = 20
IDS = tokens(LENGTH)


def adapted_stack(local, numbers, layout):
    stack = local.stack
    own = layout.split(stack.config, numbers, stack.span)
    blocks = [block.adapted(with_lora(own[n].lora)) for n, block in enumerate(stack._blocks)]
    return BlockStack(stack.config, stack.span, blocks, dtype=stack.dtype)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_lora_on_every_projection_matches_peft(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    local = Local(tmp_path)
    plain = local.step(IDS, 0)
    layout = peft_models.lora_layout(local.checkpoint.config)
    adapted = peft_models.add_lora(model)
    numbers = torch.cat([p.flatten() for p in peft_models.lora_parameters(adapted, layout)])
    local.stack = adapted_stack(local, numbers, layout)
    expected = adapted(IDS[None]).logits[0]
    assert error(local.step(IDS, 0), expected) < TOLERANCE
    assert error(local.in_chunks(IDS, 1), expected) < TOLERANCE
    assert error(plain, expected) > 0.1


def test_a_projection_without_lora_stays_itself(tmp_path):
    make("llama").save_pretrained(tmp_path)
    block = Local(tmp_path).stack._blocks[0]
    a, b = torch.ones(1, 64), torch.ones(64, 1)
    adapted = block.adapted(with_lora({"self_attn.o_proj": LoraMatrices(a, b, 1.0)}))
    assert adapted._qkv is block._qkv
    assert adapted._down is block._down
    assert adapted._out is not block._out
    assert adapted.nbytes == block.nbytes + a.nbytes + b.nbytes


def test_delta_of_narrow_activations_is_computed_wide():
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    delta = LoraDelta.of([Part("p", 6)], {"p": LoraMatrices(a, b, 0.5)})
    assert delta is not None
    x = torch.randn(3, 8).bfloat16()
    out = torch.zeros(3, 6, dtype=torch.bfloat16)
    delta.add_to(out, x)
    assert torch.equal(out, (0.5 * x.float() @ a.t() @ b.t()).bfloat16())


def test_parts_cover_the_rows_of_fused_projections(tmp_path):
    make("qwen3").save_pretrained(tmp_path)
    seen = {}

    def project(parts, base):
        seen[tuple(part.stem for part in parts)] = (sum(part.rows for part in parts), base.weight.shape[0])
        return base

    Local(tmp_path).stack._blocks[0].adapted(project)
    assert all(covered == rows for covered, rows in seen.values())
    assert ("mlp.gate_proj", "mlp.up_proj") in seen


def test_the_gradient_of_an_adapted_projections_input():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (2, 8), (4, 2)))
    parts = [Part("p", 2), Part("q", 4)]
    adapted = with_lora({"q": LoraMatrices(a, b, 0.5)})(parts, Linear(weight))
    whole = weight.clone()
    whole[2:] += 0.5 * b @ a
    grad = torch.randn(3, 6, generator=generator)
    torch.testing.assert_close(adapted.back(grad), grad @ whole)
    trained = with_gradients({"q": LoraMatrices(a, b, 0.5)})(parts, Linear(weight))
    torch.testing.assert_close(trained.back(grad), grad @ whole)
