"""Gradients of lean blocks against autograd in transformers and PEFT: inputs, LoRA, prefixes, padded batches."""

from __future__ import annotations

from copy import deepcopy

import peft_models
import pytest
import torch
from tiny_models import BLOCKS, CONFIGS, TOLERANCE, VOCABULARY, Local, error, make
from torch import Tensor

from petal_swarm.models.adapters import AdapterLayout, BlockAdapter

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
