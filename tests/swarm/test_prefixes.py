"""Sessions that start behind a prefix others have left: fewer rows computed, the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.engine.steps import StepRequest
from petal_swarm.server import prefix_steps
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS
from tests.checkpoints import reference
from tests.swarm.local import LocalSwarm
from tests.swarm.test_exact import SPANS, prompt

PAGE = PAGE_TOKENS


class RowCounter:
    """Counts the rows that each server of a swarm computes."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self.rows = [0] * len(swarm.servers)
        for index, server in enumerate(swarm.servers):
            assert server._compute is not None
            self._count(index, server._compute.engine)

    def _count(self, index: int, engine: Any) -> None:
        run = engine.run

        def counted(requests: Sequence[StepRequest]) -> Any:
            self.rows[index] += sum(request.hidden.shape[0] for request in requests)
            return run(requests)

        engine.run = counted

    def take(self) -> list[int]:
        taken, self.rows = self.rows, [0] * len(self.rows)
        return taken


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_a_second_prompt_costs_only_what_is_new(checkpoint: Path, servers: int) -> None:
    shared, local = prompt(1, 5 * PAGE), reference(checkpoint)
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        counter = RowCounter(swarm)
        for number, expected in ((1, 5 * PAGE + 3), (2, 3), (3, 3)):
            ids = torch.cat([shared, prompt(1, 3, seed=number + 10)], dim=1)
            # A client of another peer id shares as well.
            ours = swarm.model().generate(ids, max_new_tokens=1, do_sample=False)
            assert counter.take() == [expected] * servers
            assert torch.equal(ours, local.generate(ids, max_new_tokens=1, do_sample=False))


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_long_generations_are_the_same_token_by_token(checkpoint: Path, servers: int) -> None:
    ids, local = prompt(1, 40), reference(checkpoint)
    expected = local.generate(ids, max_new_tokens=150, do_sample=False)
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        counter = RowCounter(swarm)
        for start in (40, 40, 100, 170):
            begun = expected[:, :start]
            ours = swarm.model().generate(begun, max_new_tokens=190 - start, do_sample=False)
            assert torch.equal(ours, expected)
            counted = counter.take()
        # 170 tokens, all of them known up to the last full page; then 20 new ones less the last.
        assert counted == [170 - 160 + 19] * servers


def test_beams_and_padded_batches(checkpoint: Path) -> None:
    ids, local = prompt(3, 50), reference(checkpoint)
    ids[1:, :40] = ids[0, :40]
    mask = torch.ones_like(ids)
    mask[2, :5] = 0
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model = swarm.model()
        for _ in range(2):
            for options in (
                {"do_sample": False},
                {"num_beams": 4},
                {"do_sample": True, "num_return_sequences": 3},
            ):
                torch.manual_seed(3)
                ours = model.generate(ids, attention_mask=mask, max_new_tokens=30, **options)
                torch.manual_seed(3)
                theirs = local.generate(ids, attention_mask=mask, max_new_tokens=30, **options)
                assert torch.equal(ours, theirs), options


def test_a_prompt_in_many_chunks(bloom: Path) -> None:
    ids, local = prompt(1, 200), reference(bloom)
    expected = local.generate(ids, max_new_tokens=20, do_sample=False)
    with LocalSwarm(bloom, ["0:2", "2:4"], max_batch_tokens=2 * PAGE) as swarm:
        counter = RowCounter(swarm)
        rows = []
        for _ in range(2):
            assert torch.equal(swarm.model().generate(ids, max_new_tokens=20, do_sample=False), expected)
            rows.append(counter.take())
        assert rows == [[219, 219], [8 + 19, 8 + 19]]


def test_chats_go_on_where_an_earlier_turn_ended(bloom: Path) -> None:
    local = reference(bloom)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        counter, model = RowCounter(swarm), swarm.model()
        history = prompt(1, 30)
        for turn in range(4):
            expected = local.generate(history, max_new_tokens=25, do_sample=False)
            assert torch.equal(model.generate(history, max_new_tokens=25, do_sample=False), expected)
            assert turn == 0 or counter.rows[0] < 10 + 2 * PAGE + 25
            counter.take()
            history = torch.cat([expected, prompt(1, 10, seed=turn)], dim=1)


def test_what_one_hop_lost_is_computed_again_by_all(bloom: Path) -> None:
    ids, local = prompt(1, 10 * PAGE + 1), reference(bloom)
    expected = local.generate(ids, max_new_tokens=10, do_sample=False)
    for small in (0, 4 * PAGE, 20 * PAGE):
        with LocalSwarm(bloom, ["0:1", "1:2"]) as swarm:
            swarm.add_server("2:4", prefix_tokens=small)
            counter, model = RowCounter(swarm), swarm.model()
            assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
            counter.take()
            assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
            assert counter.take() == [10 + 10 * PAGE - min(small, 10 * PAGE)] * 3


def test_a_client_may_decline(bloom: Path) -> None:
    ids = prompt(1, 100)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        counter = RowCounter(swarm)
        for share, expected in ((False, 100), (True, 100), (False, 100), (True, 100 - 96)):
            swarm.model(share_prefixes=share).generate(ids, max_new_tokens=1, do_sample=False)
            assert counter.take() == [expected] * 2


def test_logits_of_a_whole_prompt_are_computed(bloom: Path) -> None:
    ids, local = prompt(1, 70), reference(bloom)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm, torch.no_grad():
        model = swarm.model()
        for _ in range(2):
            assert torch.allclose(model(ids).logits, local(ids).logits, atol=1e-4, rtol=1e-4)


def test_two_routes_do_not_believe_each_other(bloom: Path) -> None:
    """The last hop files what two first hops told it under each one's name."""
    ids, local = prompt(1, 100), reference(bloom)
    expected = local.generate(ids, max_new_tokens=5, do_sample=False)
    with LocalSwarm(bloom, ["0:2", "0:2", "2:4"]) as swarm:
        counter = RowCounter(swarm)
        seen = set()
        for _ in range(2):
            model = swarm.model()
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
            seen.add(model.last_route.hops[0].peer_id)
            rows = counter.take()
            assert rows[2] == 104, "the other first hop's prefix is another one"
            first = swarm.server_of(model.last_route.hops[0].peer_id)
            swarm.servers.remove(first)
            swarm.run(first.close())
            swarm.servers.insert(0, first)
        assert len(seen) == 2


def test_a_hop_that_does_not_answer_is_not_waited_for_long(
    bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, local = prompt(1, 100), reference(bloom)
    expected = local.generate(ids, max_new_tokens=5, do_sample=False)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        assert torch.equal(swarm.model().generate(ids, max_new_tokens=5, do_sample=False), expected)
        monkeypatch.setattr(prefix_steps.PrefixSteps, "answered", lambda self, answer: None)
        counter, before = RowCounter(swarm), swarm.loop.time()
        assert torch.equal(swarm.model().generate(ids, max_new_tokens=5, do_sample=False), expected)
        assert counter.take() == [104, 104]
        assert swarm.loop.time() - before == pytest.approx(prefix_steps.ANSWER_TIMEOUT_S, abs=2)
