"""What a client sees when servers are missing, full, slow to come, or gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from petal_swarm.engine.compute import Done, InlineCompute
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.errors import (
    CacheFullError,
    ConfigError,
    MissingBlocksError,
    SessionTooLongError,
    SilentBlocksError,
)
from petal_swarm.server.server import Server
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm


def prompt(length: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def expected(bloom: Path, ids: torch.Tensor, count: int) -> torch.Tensor:
    return reference(bloom).generate(ids, max_new_tokens=count, do_sample=False)


def test_missing_blocks_are_named_after_a_stated_time(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:1", "3:4"]) as swarm:
        model = swarm.model(wait_for_blocks_s=7)
        started = swarm.loop.time()
        with pytest.raises(MissingBlocksError, match=r"blocks 1-2.*waited 7 s") as caught:
            model.generate(prompt(), max_new_tokens=2)
        assert caught.value.blocks == (1, 2)
        assert 7 <= swarm.loop.time() - started < 9


def test_servers_that_do_not_answer_are_named_by_their_blocks(bloom: Path) -> None:
    """Their announcements live on for a while."""
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        model = swarm.model(wait_for_blocks_s=1)
        swarm.network.kill(swarm.servers[1].announcement().peer_id)
        with pytest.raises(SilentBlocksError, match="who serves blocks 2-3 does not answer") as caught:
            model.generate(prompt(), max_new_tokens=2)
        assert caught.value.blocks == (2, 3)


def test_a_client_waits_for_the_missing_server(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2"]) as swarm:
        model = swarm.model(wait_for_blocks_s=60)

        async def come_late() -> None:
            await asyncio.sleep(5)
            await swarm.start_server("2:4")

        late = swarm.loop.create_task(come_late())
        tokens = model.generate(prompt(), max_new_tokens=5, do_sample=False)
        swarm.run(asyncio.wait({late}))
        assert torch.equal(tokens, expected(bloom, prompt(), 5))


def test_a_prompt_longer_than_the_kv_cache(bloom: Path) -> None:
    with (
        LocalSwarm(bloom, ["0:4"], kv_tokens=64) as swarm,
        pytest.raises(CacheFullError, match="64 of 64 tokens free"),
    ):
        swarm.model().generate(prompt(100), max_new_tokens=5)


def test_more_tokens_than_the_session_was_opened_for(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        model = swarm.model()
        with (
            model.inference_session(max_length=12),
            pytest.raises(SessionTooLongError, match="max_length of 12"),
        ):
            model.generate(prompt(8), max_new_tokens=8, min_new_tokens=8)
        with pytest.raises(ConfigError, match="at least 1"), model.inference_session(max_length=0):
            pass


def test_routing_avoids_a_full_server(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"], kv_tokens=64) as swarm:
        roomy = swarm.add_server("0:4", kv_tokens=1024)
        model = swarm.model()
        tokens = model.generate(prompt(100), max_new_tokens=5, do_sample=False)
        assert model.last_route is not None
        assert [hop.peer_id for hop in model.last_route.hops] == [roomy.announcement().peer_id]
        assert torch.equal(tokens, expected(bloom, prompt(100), 5))


def test_a_server_that_refuses_is_routed_around(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4", "0:4"]) as swarm:
        model = swarm.model()
        model.generate(prompt(), max_new_tokens=1)
        assert model.last_route is not None
        first = swarm.server_of(model.last_route.hops[0].peer_id)
        assert first._host is not None
        first._host.draining = True  # before its announcement says so
        tokens = model.generate(prompt(), max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens, expected(bloom, prompt(), 5))


def test_a_dead_server_is_routed_around_before_its_record_expires(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4", "2:4"]) as swarm:
        model = swarm.model()
        model.generate(prompt(), max_new_tokens=1)
        assert model.last_route is not None
        swarm.network.kill(model.last_route.hops[1].peer_id)
        tokens = model.generate(prompt(), max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens, expected(bloom, prompt(), 5))


def test_a_session_nobody_uses_ends(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        model = swarm.model()
        with model.open_session(max_length=64) as session:
            model.generate(prompt(), max_new_tokens=3, session=session)
            swarm.run(asyncio.sleep(2000))
            assert swarm.servers[0].num_sessions == 0


def test_a_joining_server_takes_what_the_swarm_needs(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2"]) as swarm:
        assert str(swarm.add_server(None, num_blocks=2).span) == "2:4"
        assert str(swarm.add_server(None, num_blocks=4).span) == "0:4"
        with pytest.raises(ConfigError, match="outside the model"):
            swarm.add_server("2:9")
        with pytest.raises(ConfigError, match="4 blocks"):
            swarm.add_server(None, num_blocks=9)


def test_lossy_links_change_nothing(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"], seed=3) as swarm:
        for server in swarm.servers:
            for other in swarm.servers:
                if server is not other:
                    link = swarm.network.link(server.announcement().peer_id, other.announcement().peer_id)
                    link.loss, link.jitter_s, link.bytes_per_s = 0.2, 0.05, 1e5
        tokens = swarm.model().generate(prompt(), max_new_tokens=20, do_sample=False)
        assert torch.equal(tokens, expected(bloom, prompt(), 20))


def test_a_short_step_does_not_overtake_a_long_one(bloom: Path) -> None:
    """Once, a decode step could run in place while the chunk before it was still in the compute thread."""
    with LocalSwarm(bloom, ["0:2", "2:4"], max_batch_tokens=16) as swarm:
        for server in swarm.servers:
            _hold_back_long_steps(server)
        ids = prompt(18)  # chunks of 16 and 2 tokens
        tokens = swarm.model().generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, expected(bloom, ids, 3))


def _hold_back_long_steps(server: Server) -> None:
    """Make the server's compute behave like a thread that is slow to hand over long steps."""
    compute = server._compute
    assert isinstance(compute, InlineCompute)
    run_now, submit = compute.run_now, compute.submit

    def short_only(request: StepRequest) -> StepResult | None:
        return run_now(request) if request.hidden.shape[0] <= 4 else None

    def later(request: StepRequest, done: Done) -> None:
        asyncio.get_running_loop().call_later(0.5, submit, request, done)

    compute.run_now = short_only  # type: ignore[method-assign, assignment]
    compute.submit = later  # type: ignore[method-assign]
