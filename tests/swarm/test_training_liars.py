"""Hops that answer nonsense, or nothing, are avoided; who cannot be replaced is named."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.client.training.lane import Lane
from petal_swarm.errors import PassGoneError, PetalSwarmError
from petal_swarm.net.channel import Channel
from petal_swarm.span import Span
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.tuning import Backwarded, Failed, Forward, Forwarded, Gradients
from petal_swarm.wire.tensors import decode_tensor, encode_tensor
from tests.checkpoints import save_llama
from tests.swarm.test_training_failures import SPANS, Trial, assert_same

Lie = Callable[[Any], Message | None]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), blocks=6, hidden=32)


@pytest.fixture
def lies(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[type[Message], Lie]]:
    """By peer id: which of its messages are changed on their way out, and how; None is never sent."""
    told: dict[str, tuple[type[Message], Lie]] = {}
    send = Channel.send

    def sending(channel: Channel, message: Message) -> None:
        stream: Any = channel._stream
        kind, lie = told.get(getattr(stream, "owner", stream).peer_id, (None, None))
        changed = lie(message) if kind is not None and lie and isinstance(message, kind) else message
        if changed is not None:
            send(channel, changed)

    monkeypatch.setattr(Channel, "send", sending)
    return told


def tensor(message: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    meta, payload = encode_tensor(change(decode_tensor(message.tensor, message.payload)).contiguous())
    return replace(message, tensor=meta, payload=payload)


def nothing(_: Any) -> None:
    return None


#: Which hop says what wrong, and how.
LIES: dict[str, tuple[int, type[Message], Lie]] = {
    "fewer rows": (2, Forwarded, lambda m: tensor(m, lambda rows: rows[1:])),
    "narrow rows": (2, Forwarded, lambda m: tensor(m, lambda rows: rows[:, 1:])),
    "nan": (2, Forwarded, lambda m: tensor(m, lambda rows: rows / 0)),
    "no answer": (2, Forwarded, nothing),
    "a gradient of fewer rows": (0, Backwarded, lambda m: tensor(m, lambda rows: rows[1:])),
    "an infinite gradient": (0, Backwarded, lambda m: tensor(m, lambda rows: rows / 0)),
    "no gradient": (0, Backwarded, nothing),
    "gradients of others": (1, Gradients, lambda m: replace(m, total=m.total + 1)),
    "gradients out of turn": (1, Gradients, lambda m: replace(m, first=1, total=m.total + 1)),
    "infinite gradients": (1, Gradients, lambda m: tensor(m, lambda numbers: numbers / 0)),
    "an answer of a hop in the middle": (1, Gradients, lambda m: Forwarded(m.number, m.tensor, m.payload)),
    "a bug": (1, Gradients, lambda m: Failed(m.number, "internal", "the server failed")),
    "rows of another shape": (0, Forward, lambda m: tensor(m, lambda rows: rows[:, 1:])),
}


@pytest.mark.parametrize("what", LIES)
def test_another_takes_the_place_of_a_liar(
    small: Path, what: str, lies: dict[str, tuple[type[Message], Lie]]
) -> None:
    hop, kind, lie = LIES[what]
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        liar = trial.lanes[0].members[hop].peer_id
        lies[liar] = (kind, lie)
        assert_same(trial.step(), expected)
        (lane,) = (lane for lane in trial.lanes if lane.error is None)
        assert liar not in {member.peer_id for member in lane.members}
        assert liar in trial.avoided
        assert_same(trial.step(), expected)


@pytest.mark.parametrize("what", ["nan", "an infinite gradient", "infinite gradients"])
def test_who_cannot_be_replaced_is_named(
    small: Path, what: str, lies: dict[str, tuple[type[Message], Lie]]
) -> None:
    hop, kind, lie = LIES[what]
    trial = Trial(small, SPANS[::2], wait_for_blocks_s=1.0)
    with trial.swarm:
        trial.step()
        liar = trial.lanes[0].members[hop].peer_id
        lies[liar] = (kind, lie)
        with pytest.raises(PetalSwarmError, match=liar):
            trial.step()


@pytest.mark.parametrize("code", ["pass-gone", "busy", "adapter-missing"])
@pytest.mark.parametrize(("hop", "kind"), [(2, Forwarded), (1, Gradients)])
def test_who_can_never_do_it_is_replaced(
    small: Path, code: str, hop: int, kind: type[Message], lies: dict[str, tuple[type[Message], Lie]]
) -> None:
    """And however long it says to wait, it is not waited for."""
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        idle = trial.lanes[0].members[hop].peer_id
        lies[idle] = (kind, lambda m: Failed(m.number, code, "not now", kind is Gradients, 3600.0))
        started_s = trial.swarm.loop.time()
        assert_same(trial.step(), expected)
        assert trial.swarm.loop.time() - started_s < 100
        (lane,) = (lane for lane in trial.lanes if lane.error is None)
        assert idle not in {member.peer_id for member in lane.members}


def test_who_always_forgets(small: Path, lies: dict[str, tuple[type[Message], Lie]]) -> None:
    """A pass is not sent for ever."""
    trial = Trial(small, SPANS[::2])
    with trial.swarm:
        trial.step()
        forgetful = trial.lanes[0].members[1].peer_id
        lies[forgetful] = (Gradients, lambda m: Failed(m.number, "pass-gone", "forgotten", backward=True))
        with pytest.raises(PassGoneError):
            trial.step()
        del lies[forgetful]
        trial.step()


def test_a_diverged_adapter_is_the_clients_own_fault(small: Path) -> None:
    """The block is named, and nobody is avoided for it."""
    trial = Trial(small, SPANS)
    with trial.swarm:
        trial.step()
        with torch.no_grad():
            for parameter in trial.adapter.parameters():
                parameter.mul_(1e30)
        with pytest.raises(PetalSwarmError, match=r"block \d"):
            trial.step()
        assert not trial.avoided


def test_bad_gradients_of_the_client(small: Path) -> None:
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        out = trial.model.run_blocks(trial.embeds)
        with pytest.raises(PetalSwarmError, match="finite"):
            out.backward(torch.full_like(out, float("nan")))
        with pytest.raises(PetalSwarmError, match="finite"):
            trial.model.run_blocks(trial.embeds / 0)
        assert not trial.avoided
        assert_same(trial.step(), expected)
        lane: Lane
        for lane in trial.model._blocks._trainer._pools[Span(0, 6)].lanes:
            assert lane.repairs == 0


def test_who_computes_nothing_is_replaced_in_the_end(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be busy with others, so that takes a while."""
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        idle = trial.lanes[0].members[1].peer_id
        compute = trial.swarm.server_of(idle)._compute
        assert compute is not None
        monkeypatch.setattr(compute, "run_work", lambda *_: Future())
        assert_same(trial.step(), expected)
        assert idle in trial.avoided
