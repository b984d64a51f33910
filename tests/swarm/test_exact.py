"""A swarm computes what one process computes, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.checkpoints import VOCABULARY, assert_lively, reference
from tests.swarm.local import LocalSwarm

SPANS = {1: ["0:8"], 2: ["0:4", "4:8"], 4: ["0:2", "2:4", "4:6", "6:8"]}


def prompt(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_greedy_tokens_and_logits(checkpoint: Path, servers: int) -> None:
    ids = prompt(1, 16)
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        model, local = swarm.model(), reference(checkpoint)
        ours = model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)
        theirs = local.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)
        assert_lively(theirs, ids.shape[1])
        assert torch.equal(ours, theirs)
        with torch.no_grad():
            expected = local(theirs).logits
        actual = model(theirs).logits
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_left_padded_batch_and_beams(checkpoint: Path, servers: int) -> None:
    ids = prompt(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0
    with LocalSwarm(checkpoint, SPANS[servers]) as swarm:
        model, local = swarm.model(), reference(checkpoint)
        for options in ({"do_sample": False}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}):
            ours = model.generate(ids, attention_mask=mask, max_new_tokens=40, **options)
            theirs = local.generate(ids, attention_mask=mask, max_new_tokens=40, **options)
            assert_lively(theirs, ids.shape[1])
            assert torch.equal(ours, theirs), options


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9, "temperature": 0.8},
        {"top_k": 20, "repetition_penalty": 1.3},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_return_sequences": 4},
        {"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.05)])},
        {"use_cache": False, "max_new_tokens": 5},
        {"prefill_chunk_size": 5},
    ],
    ids=" ".join,
)
def test_sampling(checkpoint: Path, options: dict[str, object]) -> None:
    ids = prompt(2, 9)
    settings = {"max_new_tokens": 30, "do_sample": True, **options}
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model, local = swarm.model(), reference(checkpoint)
        torch.manual_seed(7)
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        torch.manual_seed(7)
        theirs = local.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(ours, theirs)


def test_prompt_lookup_decoding_rolls_back(checkpoint: Path) -> None:
    ids = prompt(1, 6).repeat(1, 4)
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model, local = swarm.model(), reference(checkpoint)
        ours = model.generate(ids, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=4)
        assert torch.equal(ours, local.generate(ids, max_new_tokens=60, do_sample=False))


def test_prompt_lookup_decoding_goes_on_in_a_session(checkpoint: Path) -> None:
    ids, more = prompt(1, 6).repeat(1, 4), prompt(1, 5, seed=3)
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model, local = swarm.model(), reference(checkpoint)
        settings = {"max_new_tokens": 20, "do_sample": False}
        with model.open_session(max_length=160) as session:
            held = model.generate(ids, prompt_lookup_num_tokens=4, session=session, **settings)
            ours = model.generate(more, prompt_lookup_num_tokens=4, session=session, **settings)
        theirs = local.generate(torch.cat([held, more], 1), **settings)
        assert torch.equal(torch.cat([held, ours], 1), theirs)


def test_streamer_and_stopping_criteria(checkpoint: Path) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    def after_ten(tokens: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((tokens.shape[0],), tokens.shape[1] >= 18, dtype=torch.bool)

    ids, streamer = prompt(1, 8), Collect()
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        tokens = swarm.model().generate(
            ids,
            max_new_tokens=50,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([after_ten]),
        )
    assert tokens.shape[1] == 18
    assert streamer.ended
    assert streamer.tokens == tokens[0].tolist()


def test_a_session_goes_on_where_it_ended(checkpoint: Path) -> None:
    first, second = prompt(2, 10), prompt(2, 4, seed=2)
    mask = torch.ones_like(first)
    mask[0, :3] = 0
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        model, local = swarm.model(), reference(checkpoint)
        with model.inference_session(max_length=64) as session:
            one = model.generate(first, attention_mask=mask, max_new_tokens=8, do_sample=False)
            two = model.generate(second, max_new_tokens=8, do_sample=False)
            three = model.generate(None, max_new_tokens=5, do_sample=False)
            assert session.position == 10 + 8 + 4 + 8 + 5 - 1
        whole = torch.cat([one, second], dim=1)
        whole_mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
        expected = local.generate(whole, attention_mask=whole_mask, max_new_tokens=13, do_sample=False)
        assert torch.equal(torch.cat([one, two, three], dim=1), expected)


def test_prompts_longer_than_a_batch_travel_in_chunks(checkpoint: Path) -> None:
    ids = prompt(2, 50)
    with LocalSwarm(checkpoint, SPANS[2], max_batch_tokens=16) as swarm:
        ours = swarm.model().generate(ids, max_new_tokens=10, do_sample=False)
        theirs = reference(checkpoint).generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(ours, theirs)


def test_hops_use_part_of_a_span(checkpoint: Path) -> None:
    ids = prompt(1, 8)
    with LocalSwarm(checkpoint, ["0:5", "3:8"]) as swarm:
        model = swarm.model()
        ours = model.generate(ids, max_new_tokens=20, do_sample=False)
        assert model.last_route is not None
        assert [len(hop.span) for hop in model.last_route.hops] != [5, 5]
        theirs = reference(checkpoint).generate(ids, max_new_tokens=20, do_sample=False)
        assert torch.equal(ours, theirs)


def test_right_padding_in_a_forward(checkpoint: Path) -> None:
    ids = prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with LocalSwarm(checkpoint, SPANS[2]) as swarm, torch.no_grad():
        actual = swarm.model()(ids, attention_mask=mask).logits
        expected = reference(checkpoint)(ids, attention_mask=mask).logits
    kept = mask.bool()
    assert (actual[kept] - expected[kept]).abs().max() <= 1e-4 * expected.abs().max()
    assert not actual[~kept].any()


def test_several_clients_at_once(checkpoint: Path) -> None:
    with LocalSwarm(checkpoint, SPANS[2]) as swarm:
        local = reference(checkpoint)
        models = [swarm.model() for _ in range(3)]
        sessions = [model.open_session(max_length=40) for model in models]
        prompts = [prompt(1, 6 + index, seed=index) for index in range(3)]
        results = list(prompts)
        for _ in range(8):
            for index, model in enumerate(models):
                new = prompts[index] if sessions[index].output_ids is None else None
                piece = model.generate(new, max_new_tokens=1, do_sample=False, session=sessions[index])
                results[index] = torch.cat([results[index], piece[:, -1:]], dim=1)
        for session in sessions:
            session.close()
        for ids, result in zip(prompts, results, strict=True):
            expected = local.generate(ids, max_new_tokens=8, do_sample=False)
            assert torch.equal(result, expected)
