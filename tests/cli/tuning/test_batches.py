import pytest
import torch

from petal_swarm.cli.tuning.batches import IGNORED, Order, collate, hold_out
from petal_swarm.cli.tuning.data import Example


def example(*tokens, unlearned=0):
    return Example(torch.tensor(tokens), torch.arange(len(tokens)) >= unlearned)


def test_a_batch_is_padded_and_says_what_counts():
    batch = collate([example(5, 6, 7, unlearned=2), example(8, 9)])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7], [8, 9, IGNORED]]
    assert (batch.num_tokens, batch.num_learned) == (5, 2)


@pytest.mark.parametrize("size", [1, 3, 4, 10, 99])
def test_every_example_once_in_each_epoch(size):
    order = Order(10, size, seed=5)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert sorted(number for batch in batches for number in batch) == list(range(10))
        assert all(len(batch) == min(size, 10) for batch in batches[:-1])


def test_the_order_depends_on_epoch_and_seed_alone():
    assert Order(50, 50, 1).batch(0) == Order(50, 50, 1).batch(0)
    orders = [Order(50, 50, seed).batch(epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 6


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.01, 1), (0.25, 5), (0.9, 7), (0.999, 7)])
def test_a_share_is_held_out(share, count):
    examples = [example(number, number) for number in range(20)]
    learned, held_out = hold_out(examples, share, seed=3, at_most=7)
    assert len(held_out) == count
    numbers = [int(each.tokens[0]) for each in (*learned, *held_out)]
    assert sorted(numbers) == list(range(20))
    assert numbers[: len(learned)] == sorted(numbers[: len(learned)])
    again, _ = hold_out(examples, share, seed=3, at_most=7)
    assert again == learned


def test_a_single_example_is_learned():
    learned, held_out = hold_out([example(1, 2)], 0.5, seed=0, at_most=9)
    assert (len(learned), held_out) == (1, [])
