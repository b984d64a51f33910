"""Gradients of lean blocks against autograd in transformers and PEFT, with padded batches there."""

from __future__ import annotations

from copy import deepcopy

import peft_models
import pytest
import torch
from tiny_models import BLOCKS, CONFIGS, TOLERANCE, VOCABULARY, Local, error, make
from torch import Tensor

from petal_swarm.models import block_source, int8, nf4, training
from petal_swarm.models.adapters import AdapterLayout, BlockAdapter
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.quantization import quantize
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Span

#: Neighbours of the same length are attended to together.
LENGTHS = (11, 7, 7, 15)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """A model in transformers, and the same one here."""
    path = tmp_path_factory.mktemp(request.param)
    model = make(request.param)
    model.save_pretrained(path)
    return model.requires_grad_(False), Local(path)


def packed_ids(lengths):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator)


def weights_of_loss(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def reference(model, embedded: Tensor, lengths) -> Tensor:
    """Logits of packed rows by a batch that is padded on the right: `[tokens, vocabulary]`."""
    rows = embedded.split(list(lengths))
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
    logits = model(inputs_embeds=padded, attention_mask=mask.long(), use_cache=False).logits
    return torch.cat([own[:n] for own, n in zip(logits, lengths, strict=True)])


def trained(local, hidden, lengths, adapters=None, prefix_tokens=0):
    """The same by the lean blocks."""
    sequences = local.stack.sequences(lengths, prefix_tokens)
    for block in range(BLOCKS):
        adapter = BlockAdapter() if adapters is None else adapters[block]
        hidden = local.stack.forward_trained(block, hidden, sequences, adapter)
    return local.ends.logits(hidden)


def embed(model, local, ids):
    """The rows that the blocks begin with, and those that transformers is given for them."""
    hidden = local.ends.embed(ids).requires_grad_()
    return hidden, model.get_input_embeddings()(ids).requires_grad_()


def gradient_of_embeddings(local, model, hidden_grad, embedded):
    """BLOOM normalizes what it is given, before the first block."""
    norm = getattr(model.base_model, "word_embeddings_layernorm", None)
    if norm is None:
        return hidden_grad
    (found,) = torch.autograd.grad(norm(embedded), embedded, hidden_grad)
    return found


def test_gradients_of_inputs(case):
    model, local = case
    ids = packed_ids(LENGTHS)
    hidden, embedded = embed(model, local, ids)
    found, expected = trained(local, hidden, LENGTHS), reference(model, embedded, LENGTHS)
    assert error(found.detach(), expected.detach()) < TOLERANCE
    weights = weights_of_loss(expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, embedded, weights)
    (hidden_grad,) = torch.autograd.grad(found, hidden, weights)
    assert error(gradient_of_embeddings(local, model, hidden_grad, embedded), expected_grad) < TOLERANCE


def test_gradients_of_lora_on_every_projection(case):
    model, local = case
    config = local.stack.config
    layout = peft_models.lora_layout(config)
    adapted = peft_models.add_lora(deepcopy(model))
    parameters = peft_models.lora_parameters(adapted, layout)
    numbers = torch.cat([own.detach().flatten() for own in parameters]).requires_grad_()
    ids = packed_ids(LENGTHS)
    hidden, embedded = embed(model, local, ids)
    found = trained(local, hidden, LENGTHS, layout.split(config, numbers, local.stack.span))
    expected = reference(adapted, embedded, LENGTHS)
    assert error(found.detach(), expected.detach()) < TOLERANCE
    weights = weights_of_loss(expected.shape)
    expected_grads = torch.autograd.grad(expected, [embedded, *parameters], weights)
    hidden_grad, grad = torch.autograd.grad(found, [hidden, numbers], weights)
    assert error(gradient_of_embeddings(local, model, hidden_grad, embedded), expected_grads[0]) < TOLERANCE
    assert_each_close(layout, config, grad, torch.cat([own.flatten() for own in expected_grads[1:]]))


def assert_each_close(layout, config, found, expected):
    """Every matrix by itself: large gradients hide small ones."""
    span = peft_models.whole(config)
    split = [layout.split(config, numbers, span) for numbers in (found, expected)]
    for block in span.blocks():
        for stem, own in split[0][block].lora.items():
            other = split[1][block].lora[stem]
            assert error(own.a, other.a) < TOLERANCE, (block, stem, "a")
            assert error(own.b, other.b) < TOLERANCE, (block, stem, "b")


def test_gradients_of_prefixes(case):
    model, local = case
    config = local.stack.config
    adapted = peft_models.add_prefix(deepcopy(model))
    parameter = peft_models.prefix_parameter(adapted)
    layout = AdapterLayout((), peft_models.PREFIX_TOKENS)
    numbers = peft_models.prefix_numbers(config, parameter.detach()).requires_grad_()
    ids = packed_ids(LENGTHS)
    hidden, embedded = embed(model, local, ids)
    adapters = layout.split(config, numbers, local.stack.span)
    found = trained(local, hidden, LENGTHS, adapters, peft_models.PREFIX_TOKENS)
    expected = reference(adapted, embedded, LENGTHS)
    assert error(found.detach(), expected.detach()) < TOLERANCE
    weights = weights_of_loss(expected.shape)
    expected_embedded, expected_grad = torch.autograd.grad(expected, [embedded, parameter], weights)
    hidden_grad, grad = torch.autograd.grad(found, [hidden, numbers], weights)
    assert error(gradient_of_embeddings(local, model, hidden_grad, embedded), expected_embedded) < TOLERANCE
    assert error(grad, peft_models.prefix_numbers(config, expected_grad)) < TOLERANCE


# -- other lengths, precisions, and weights ---------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "qwen2-window", "llama"])
@pytest.mark.parametrize("written_numbers", [1 << 30, 0])
@pytest.mark.parametrize("prefix", [False, True])
def test_sequences_longer_than_a_chunk_of_queries(name, written_numbers, prefix, tmp_path, monkeypatch):
    """By masks that are written out, and by views of one row of numbers."""
    monkeypatch.setattr(training, "_MASK_NUMBERS", written_numbers)
    model = make(name).requires_grad_(False)
    model.save_pretrained(tmp_path)
    local, lengths = Local(tmp_path), (300, 20)
    config, adapters, adapted = local.stack.config, None, model
    if prefix:
        adapted = peft_models.add_prefix(model)
        numbers = peft_models.prefix_numbers(config, peft_models.prefix_parameter(adapted).detach())
        adapters = AdapterLayout((), peft_models.PREFIX_TOKENS).split(config, numbers, local.stack.span)
    hidden, embedded = embed(model, local, packed_ids(lengths))
    found = trained(local, hidden, lengths, adapters, peft_models.PREFIX_TOKENS if prefix else 0)
    expected = reference(adapted, embedded, lengths)
    assert error(found.detach(), expected.detach()) < TOLERANCE
    weights = weights_of_loss(expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, embedded, weights)
    (hidden_grad,) = torch.autograd.grad(found, hidden, weights)
    assert error(gradient_of_embeddings(local, model, hidden_grad, embedded), expected_grad) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bloom", "qwen3"])
def test_gradients_in_16_bits(name, dtype, tmp_path):
    make(name).save_pretrained(tmp_path)
    wide, narrow = (
        gradients(load_blocks(open_checkpoint(str(tmp_path)), Span(0, BLOCKS), dtype=own))
        for own in (torch.float32, dtype)
    )
    # Errors add up over three blocks far from the identity.
    limit = 24 * torch.finfo(dtype).eps
    assert max(off(one, other) for one, other in zip(narrow, wide, strict=True)) < limit


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_gradients_of_quantized_blocks(name, quant, packed, tmp_path, monkeypatch):
    """Against blocks that hold the same weights in float32. Packed products round activations, which moves
    the gradients of blocks as wild as these.
    """
    monkeypatch.setattr(int8, "_SMALL_WEIGHT", 0 if packed else 1 << 60)
    if not packed:
        monkeypatch.setattr(nf4, "packing_works", lambda block_size: False)
    make(name).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    stack = load_blocks(checkpoint, Span(0, BLOCKS), dtype=torch.float32, quant=quant)
    monkeypatch.setattr(block_source, "quantize", dequantized)
    twin = load_blocks(checkpoint, Span(0, BLOCKS), dtype=torch.float32, quant=quant)
    limit = 0.3 if packed else 1e-4
    pairs = zip(gradients(stack), gradients(twin), strict=True)
    assert max(off(one, other) for one, other in pairs) < limit


def dequantized(name, weight, quant):
    return quantize(name, weight, quant).dequantized()


def off(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def gradients(stack):
    """Of the rows that go into blocks, and of LoRA."""
    layout = peft_models.lora_layout(stack.config)
    generator = torch.Generator().manual_seed(8)
    count = layout.numbers(stack.config, stack.span)
    numbers = (torch.randn(count, generator=generator) * 0.2).requires_grad_()
    adapters = layout.split(stack.config, numbers, stack.span)
    shape = (sum(LENGTHS), stack.config.hidden_size)
    hidden = torch.randn(shape, generator=generator).to(stack.dtype).requires_grad_()
    sequences = stack.sequences(LENGTHS)
    out = hidden
    for block in range(BLOCKS):
        out = stack.forward_trained(block, out, sequences, adapters[block])
    assert out.dtype == stack.dtype
    found = torch.autograd.grad(out, [hidden, numbers], weights_of_loss(shape).to(stack.dtype))
    assert [own.dtype for own in found] == [stack.dtype, torch.float32]
    return found
