"""Many clients at once on two real servers: packed batches, chunks and shared prefixes change no token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("hivemind")

from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.cli.local_swarm import LocalSwarm, wait_ready
from petal_swarm.client.model import SwarmModelForCausalLM
from tests.checkpoints import VOCABULARY, assert_lively, reference, save_bloom

CLIENTS = 6
ROUNDS = 4

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("many") / "tiny-bloom")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[SwarmModelForCausalLM]:
    """A client of two servers whose spans overlap, with little room for a batch and for the KV cache."""
    common = [str(checkpoint), "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--quant", "none"]
    common += ["--kv-tokens", "4096", "--max-batch-tokens", "64"]
    with LocalSwarm() as servers:
        first = servers.start("first", [*common, "--new-swarm", "--blocks", "0:5"])
        wait_ready([first], timeout_s=60, on_ready=lambda server: None)
        address = first.address.result()
        second = servers.start("second", [*common, "--initial-peers", address, "--blocks", "3:8"])
        wait_ready([second], timeout_s=60, on_ready=lambda server: None)
        with AutoSwarmModelForCausalLM.from_pretrained(
            str(checkpoint), initial_peers=[address], progress=False
        ) as client:
            yield client


def cases(seed: int) -> Iterator[tuple[torch.Tensor, dict[str, object]]]:
    """What one client asks for, again and again: short and long prompts, some of one beginning; beams."""
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(5, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(99))
    for _ in range(ROUNDS):
        length = random.choice([1, 3, 17, 40, 150])
        ids = torch.randint(5, VOCABULARY, (1, length), generator=generator)
        if random.random() < 0.5:
            ids = torch.cat([common, ids], dim=1)
        options: dict[str, object] = {"num_beams": 3} if random.random() < 0.25 else {}
        yield ids, {"do_sample": False, "max_new_tokens": random.choice([5, 30]), **options}


def test_tokens_are_those_of_each_client_alone(checkpoint: Path, model: SwarmModelForCausalLM) -> None:
    local = reference(checkpoint)

    def client(seed: int) -> list[torch.Tensor]:
        return [model.generate(ids, **options) for ids, options in cases(seed)]

    with ThreadPoolExecutor(CLIENTS) as threads:
        found = list(threads.map(client, range(CLIENTS)))
    for seed, outputs in enumerate(found):
        for (ids, options), output in zip(cases(seed), outputs, strict=True):
            expected = local.generate(ids, attention_mask=torch.ones_like(ids), **options)
            assert torch.equal(output, expected), (seed, ids.shape, options)


def test_a_long_prompt_beside_others_that_decode(checkpoint: Path, model: SwarmModelForCausalLM) -> None:
    local = reference(checkpoint)
    long = torch.randint(5, VOCABULARY, (1, 2000), generator=torch.Generator().manual_seed(5))
    short = torch.randint(5, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))

    def answer(ids: torch.Tensor, count: int) -> Callable[[], torch.Tensor]:
        return lambda: model.generate(ids, max_new_tokens=count, do_sample=False)

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(answer(long, 5)), *(threads.submit(answer(short, 120)) for _ in range(3))]
        outputs = [job.result() for job in jobs]
    assert torch.equal(outputs[0], local.generate(long, max_new_tokens=5, do_sample=False))
    expected = local.generate(short, max_new_tokens=120, do_sample=False)
    assert_lively(expected, short.shape[1])
    assert all(torch.equal(output, expected) for output in outputs[1:])
