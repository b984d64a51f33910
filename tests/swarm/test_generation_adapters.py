"""Answers with adapters: folders of the client's own, soft prompts, and those that servers offer."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from petal_swarm.client.generation.adapters import NO_ADAPTER, ReadyAdapter, load_adapter
from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.errors import AdapterError, ConfigError
from petal_swarm.models.peft_format import read_adapter, write_adapter
from tests.checkpoints import reference
from tests.swarm.local import LocalSwarm
from tests.swarm.test_adapters import NEW, PROMPT, Adapted
from tests.swarm.test_generation import GREEDY, answers, collect, generator_of, tokens_of

IDS = tuple(PROMPT[0].tolist())
REQUEST = GenerationRequest(prompts=(IDS,), max_new_tokens=NEW, sampling=GREEDY)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapted"), "bloom")


def own(swarm: LocalSwarm, **folders: Path) -> dict[str, ReadyAdapter]:
    return {name: load_adapter(folder, swarm.checkpoint.config) for name, folder in folders.items()}


def test_each_answer_has_the_adapter_it_asked_for(adapted: Adapted) -> None:
    names = (None, "lora", "prefix", "lora")
    with LocalSwarm(adapted.checkpoint, ["0:2", "2:4"]) as swarm:
        folders = {name: adapted.folders[name] for name in ("lora", "prefix")}
        generator = generator_of(swarm, adapters=own(swarm, **folders))

        async def work() -> list[list[int]]:
            assert await generator.adapters() == ("lora", "prefix")
            running = [collect(generator.start(replace(REQUEST, adapter=name))) for name in names]
            return [tokens_of(found[0]) for found in await asyncio.gather(*running)]

        found = swarm.run(work())
    expected = [adapted.expected[name] if name else adapted.plain for name in names]
    assert [[*IDS, *tokens] for tokens in found] == expected


def test_adapters_that_servers_offer(adapted: Adapted) -> None:
    with LocalSwarm(adapted.checkpoint, ["0:2", "2:4"]) as swarm:
        server = swarm.add_server("0:4", adapters=(f"tone={adapted.folders['lora']}",))
        (offered,) = [name for _, name in server.announcement().adapters]
        generator = generator_of(swarm, adapters={"own": NO_ADAPTER})
        for name in ("tone", offered):
            (pieces,) = answers(swarm, generator, replace(REQUEST, adapter=name)).values()
            assert [*IDS, *tokens_of(pieces)] == adapted.expected["lora"]
        assert swarm.run(generator.adapters()) == ("own", "tone")
        swarm.add_server("0:4", adapters=(f"tone={adapted.folders['prefix']}",))
        with pytest.raises(ConfigError, match="neither here"):
            answers(swarm, generator, replace(REQUEST, adapter="manners"))
        swarm.run(asyncio.sleep(10))
        with pytest.raises(ConfigError, match="several adapters are called 'tone'"):
            answers(swarm, generator, replace(REQUEST, adapter="tone"))


def test_a_soft_prompt_stands_before_every_prompt(adapted: Adapted, tmp_path: Path) -> None:
    prompts = (IDS, (9, 8, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT uses what transformers has deprecated
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(reference(adapted.checkpoint), config)
        torch.manual_seed(1)
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.normal_(0, 0.05)
        model.save_pretrained(str(tmp_path))
        model.eval()
        theirs = [
            model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=8,
                do_sample=False,
            )[0, len(ids) :].tolist()
            for ids in prompts
        ]
        given = torch.tensor([[*IDS, *theirs[0]]])
        with torch.no_grad():
            logits = model(input_ids=given).logits[0, 3:].log_softmax(-1)
    with LocalSwarm(adapted.checkpoint, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm, adapters=own(swarm, soft=tmp_path))
        request = GenerationRequest(
            prompts=prompts, max_new_tokens=8, sampling=GREEDY, adapter="soft", choices=2
        )
        found = answers(swarm, generator, request)
        told = answers(swarm, generator, replace(request, top_logprobs=0, prompt_logprobs=True))
    assert [tokens_of(found[choice]) for choice in range(4)] == [theirs[0], theirs[0], theirs[1], theirs[1]]
    scored = [one for piece in told[0] for one in piece.logprobs]
    for place, one in enumerate(scored[1:]):
        assert one.logprob == pytest.approx(float(logits[place, one.token]), abs=1e-3)


def test_an_adapter_with_a_head_of_its_own_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    with LocalSwarm(adapted.checkpoint, ["0:4"]) as swarm:
        config = swarm.checkpoint.config
    stored = read_adapter(adapted.folders["lora"], config)
    head = {"lm_head.weight": torch.zeros(config.vocab_size, config.hidden_size)}
    settings = replace(stored.extras.settings, whole_modules=("lm_head",))
    extras = replace(stored.extras, modules=head, settings=settings)
    write_adapter(tmp_path / "headed", config, stored._replace(extras=extras))
    with pytest.raises(AdapterError, match=r"lm_head\.weight"):
        load_adapter(tmp_path / "headed", config)
