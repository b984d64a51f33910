"""Sessions with adapters through whole swarms: the answers of PEFT, also when servers go."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from petal_swarm.client.auto import _use_adapter
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.errors import AdapterFullError, AdapterMissingError, ConfigError, MissingBlocksError
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryTransport
from petal_swarm.span import Span
from petal_swarm.wire.connection import SESSION_TABLE, Role
from petal_swarm.wire.messages.opening import Open, Opened
from petal_swarm.wire.protocols import SESSION
from tests.checkpoints import reference, save_bloom, save_llama
from tests.swarm.local import LocalSwarm
from tests.swarm.test_prefixes import RowCounter

BLOCKS = 4
PROMPT = torch.tensor([[7, 11, 23, 42, 5]])
NEW = 12
KINDS = ("bloom", "llama")
PART = ["query_key_value", "dense_4h_to_h", "q_proj", "down_proj"]
SETTINGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", init_lora_weights=False),
    "some": lambda: peft.LoraConfig(
        r=2, lora_alpha=40, target_modules=PART, layers_to_transform=[1], init_lora_weights=False
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
NAMES = tuple(SETTINGS)


class Adapted:
    """A checkpoint, and what PEFT answers with each adapter in a folder beside it."""

    def __init__(self, folder: Path, kind: str) -> None:
        save = {"bloom": save_bloom, "llama": save_llama}[kind]
        self.checkpoint = save(folder / "model", blocks=BLOCKS, hidden=32)
        self.plain = self._tokens(reference(self.checkpoint))
        self.folders: dict[str, Path] = {}
        self.expected: dict[str, list[int]] = {}
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT uses what transformers has deprecated
                model = peft.get_peft_model(reference(self.checkpoint), SETTINGS[name]())
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.normal_(0, 0.8)
                self.folders[name] = folder / name
                model.save_pretrained(self.folders[name])
                self.expected[name] = self._tokens(model.eval())
        assert len({tuple(tokens) for tokens in (self.plain, *self.expected.values())}) == len(NAMES) + 1

    def _tokens(self, model: PreTrainedModel | Any) -> list[int]:
        with torch.no_grad():
            return model.generate(input_ids=PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="session", params=KINDS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp(f"adapted-{request.param}"), request.param)


@pytest.fixture
def swarm(adapted: Adapted) -> Iterator[LocalSwarm]:
    with LocalSwarm(adapted.checkpoint, ["0:2", "2:4"]) as running:
        yield running


def tokens(model: SwarmModelForCausalLM, **options: Any) -> list[int]:
    found = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **options)
    return found[0].tolist()  # type: ignore[no-any-return]


def with_adapter(swarm: LocalSwarm, adapter: Path | str, **settings: Any) -> SwarmModelForCausalLM:
    model = swarm.model(**settings)
    _use_adapter(model, adapter, {})
    return model


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_peft(adapted: Adapted, swarm: LocalSwarm, name: str) -> None:
    model = with_adapter(swarm, adapted.folders[name])
    assert tokens(model) == adapted.expected[name]
    with torch.no_grad():
        logits = model(PROMPT).logits[0]
    assert int(logits[-1].argmax()) == adapted.expected[name][PROMPT.shape[1]]
    model.remove_adapter()
    assert tokens(model) == adapted.plain


def test_several_clients_each_with_its_own(adapted: Adapted, swarm: LocalSwarm) -> None:
    """Their sessions take turns, and share the servers' batches, caches and prefixes."""
    models = {name: with_adapter(swarm, adapted.folders[name]) for name in NAMES}
    sessions = {name: model.open_session(max_length=40) for name, model in models.items()}
    plain = swarm.model()
    models["plain"], sessions["plain"] = plain, plain.open_session(max_length=40)
    expected = {**adapted.expected, "plain": adapted.plain}
    found = {name: [int(token) for token in PROMPT[0]] for name in models}
    for _ in range(NEW):
        for name, model in models.items():
            session = sessions[name]
            new = torch.tensor([found[name][session.position :]])
            rows = session.step(model.ends.embed(new[0]), [new.shape[1]])
            found[name].append(int(model.ends.logits(rows)[-1].argmax()))
    assert found == expected
    for session in sessions.values():
        session.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_dies_and_its_replacement_gets_the_adapter(
    adapted: Adapted, swarm: LocalSwarm, name: str, victim: int
) -> None:
    swarm.add_server(("0:2", "2:4")[victim])
    model = with_adapter(swarm, adapted.folders[name])
    with model.inference_session(max_length=40) as session:
        model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert session.route is not None
        assert session._ring is not None
        before = session._ring.session
        swarm.network.kill(session.route.hops[victim].peer_id)
        rest = model.generate(max_new_tokens=NEW - 4, do_sample=False)
        assert session._ring.session == before, "only the lost hop was replaced"
        assert rest[0, -(NEW - 4) :].tolist() == adapted.expected[name][PROMPT.shape[1] + 4 :]


def test_a_leaving_server_hands_over(adapted: Adapted, swarm: LocalSwarm) -> None:
    swarm.add_server("0:2")
    model = with_adapter(swarm, adapted.folders["prefix"])
    with model.inference_session(max_length=40) as session:
        model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert session.route is not None
        leaving = session.route.hops[0].peer_id
        swarm.run(swarm.server_of(leaving).drain(60.0))
        rest = model.generate(max_new_tokens=NEW - 4, do_sample=False)
        assert session.route.hops[0].peer_id != leaving
        assert rest[0, -(NEW - 4) :].tolist() == adapted.expected["prefix"][PROMPT.shape[1] + 4 :]


def test_audits_compute_with_the_adapter(adapted: Adapted) -> None:
    with LocalSwarm(adapted.checkpoint, ["0:4", "0:4"]) as swarm:
        model = with_adapter(swarm, adapted.folders["lora"], audit_rate=1.0)
        with model.inference_session(max_length=40):
            assert tokens(model) == adapted.expected["lora"]

            swarm.run(asyncio.sleep(30))
        stats = model._swarm.audits
        assert stats.passed > 0
        assert not stats.failed


def test_servers_offer_adapters_to_everybody(adapted: Adapted) -> None:
    offers = (f"tone={adapted.folders['lora']}", str(adapted.folders["prefix"]))
    with LocalSwarm(adapted.checkpoint, ["0:2", "2:4"]) as swarm:
        swarm.add_server("0:4", adapters=offers)
        (server,) = [server for server in swarm.servers if server.announcement().adapters]
        announced = dict(server.announcement().adapters)
        assert sorted(announced) == ["prefix", "tone"]
        model = with_adapter(swarm, "tone")
        assert tokens(model) == adapted.expected["lora"]
        assert model.last_route is not None
        assert [hop.peer_id for hop in model.last_route.hops] == [server.announcement().peer_id]
        assert tokens(with_adapter(swarm, announced["prefix"])) == adapted.expected["prefix"]
        with pytest.raises(ConfigError, match="prefix, tone"):
            with_adapter(swarm, "manners", wait_for_blocks_s=1.0)
        with pytest.raises(ConfigError, match="of your own"):
            model(inputs_embeds=torch.randn(1, 3, 32, requires_grad=True))


def test_an_adapter_that_is_offered_for_some_blocks_only(adapted: Adapted) -> None:
    """Who serves the others is there, so the error must not say that nobody is."""
    with LocalSwarm(adapted.checkpoint, ["2:4"]) as swarm:
        with pytest.raises(ConfigError, match="no server offers any adapter"):
            with_adapter(swarm, "manners", wait_for_blocks_s=1.0)
        swarm.add_server("0:2", adapters=(f"tone={adapted.folders['lora']}",))
        with pytest.raises(MissingBlocksError, match="nobody offers the adapter tone for blocks 2-3"):
            tokens(with_adapter(swarm, "tone", wait_for_blocks_s=1.0))


def test_a_swarm_whose_servers_take_no_adapters(adapted: Adapted) -> None:
    with LocalSwarm(adapted.checkpoint, ["0:4"], adapter_mib=0) as swarm:
        with pytest.raises(AdapterFullError):
            tokens(with_adapter(swarm, adapted.folders["lora"], wait_for_room_s=0.0))
        assert tokens(swarm.model()) == adapted.plain


def test_prompts_are_shared_with_the_same_adapter_only(adapted: Adapted, swarm: LocalSwarm) -> None:
    prompt = torch.arange(40)[None] * 7 % 1000

    def generated(name: str | None, **settings: Any) -> list[int]:
        model = swarm.model(**settings)
        if name is not None:
            _use_adapter(model, adapted.folders[name], {})
        return model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()  # type: ignore[no-any-return]

    names = ("lora", "prefix", "some", None)
    alone = [generated(name, share_prefixes=False) for name in names]
    assert [generated(name) for name in names] == alone
    counter = RowCounter(swarm)
    assert [generated(name) for name in names] == alone
    assert counter.take() == [4 * (8 + 5)] * 2, "two pages of each prompt were there"


def test_nobody_uses_the_adapter_of_another(adapted: Adapted) -> None:
    with LocalSwarm(adapted.checkpoint, ["0:4"]) as swarm:
        owner = with_adapter(swarm, adapted.folders["lora"])
        assert tokens(owner) == adapted.expected["lora"]
        assert owner.adapter is not None
        known = owner._snapshots.of(owner.adapter.layout, owner.adapter.numbers())
        assert known is not None

        async def attempt(peer: MemoryTransport) -> Opened:
            server = swarm.servers[0].announcement().peer_id
            stream = await peer.open_stream(server, SESSION, timeout_s=5)
            channel = Channel(stream, SESSION_TABLE, Role.DIALER)
            key = swarm.checkpoint.model_key
            channel.send(Open(b"s" * 16, 0, key, Span(0, 4), 8, adapter=known.id))
            return await channel.expect(Opened, timeout_s=5)

        with pytest.raises(AdapterMissingError):
            swarm.run(attempt(swarm.transport()))
        owners = owner._swarm.transport
        assert isinstance(owners, MemoryTransport)
        assert swarm.run(attempt(owners)).max_batch_tokens > 1


def test_an_adapter_that_is_given_up_before_the_session_opens(adapted: Adapted) -> None:
    """Others may take its room in between: it is uploaded again."""
    with LocalSwarm(adapted.checkpoint, ["0:4"]) as swarm:
        host = swarm.servers[0]._host
        assert host is not None
        find, lost = host.adapters.store.find, []

        def forgetful(peer: str, adapter: str, span: Span) -> Any:
            if not lost:
                lost.append(adapter)
                host.adapters.store.forget(peer, adapter)
            return find(peer, adapter, span)

        host.adapters.store.find = forgetful  # type: ignore[method-assign]
        assert tokens(with_adapter(swarm, adapted.folders["lora"])) == adapted.expected["lora"]
        assert lost
        swarm.run(asyncio.sleep(1))
        assert len(host.adapters.store)
        host.adapters.store._clock = lambda: 1e9
        swarm.run(asyncio.sleep(2))
        assert not len(host.adapters.store), "what is not used any more is given up"
