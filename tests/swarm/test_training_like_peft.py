"""Everything that can be trained through a swarm, against PEFT in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.models.peft_format import read_adapter
from tests.checkpoints import reference, save_bloom, save_llama
from tests.swarm.local import LocalSwarm

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:Position ids", "ignore:Model has `tie_word_embeddings"
)
CHECKPOINTS: dict[str, Callable[..., Path]] = {"bloom": save_bloom, "llama": save_llama}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"),
    "lora-head": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=3, modules_to_save=["lm_head"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS[request.param](tmp_path_factory.mktemp("model"), blocks=3)


@pytest.fixture(scope="module")
def swarm(checkpoint: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(checkpoint, ["0:2", "2:3"]) as swarm:
        yield swarm


@pytest.fixture
def model(swarm: LocalSwarm, checkpoint: Path) -> SwarmModelForCausalLM:
    return swarm.model()


def made_by_peft(checkpoint: Path, kind: str, folder: Path) -> Any:
    torch.manual_seed(4)
    made = peft.get_peft_model(reference(checkpoint), CONFIGS[kind]())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "lm_head" not in name:
                parameter.normal_(0, 0.1)
    made.save_pretrained(str(folder))
    return made.eval()


def batch() -> dict[str, torch.Tensor]:
    """Padded on the right, with the labels that a collator makes."""
    ids = torch.randint(3, 900, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients(
    model: SwarmModelForCausalLM, checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    expected = made_by_peft(checkpoint, kind, tmp_path)
    model.load_adapter(tmp_path)
    wanted, found = expected(**batch()), model(**batch())
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    real = batch()["attention_mask"].bool()
    logits = wanted.logits[:, -7:]
    assert (found.logits - logits)[real].abs().max() < 1e-4 * logits.abs().max()
    wanted.loss.backward()
    found.loss.backward()
    # As a folder, so that PEFT's names and order of numbers are what is compared.
    write_gradients(expected, tmp_path / "expected")
    write_own_gradients(model, tmp_path / "found")
    theirs, ours = (read_adapter(tmp_path / name, model.ends.config) for name in ("expected", "found"))
    compare(ours.numbers, theirs.numbers)
    if kind == "prompt":
        compare(ours.extras.soft_prompt, theirs.extras.soft_prompt)
    for name, tensor in theirs.extras.modules.items():
        compare(ours.extras.modules[name], tensor)
    assert model.ends.embedding.grad is None


def write_gradients(made: Any, folder: Path) -> None:
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    made.save_pretrained(str(folder))


def write_own_gradients(model: SwarmModelForCausalLM, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    model.save_pretrained(folder)


def compare(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    if expected.numel():
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_an_optimizer_trains_what_was_added(
    model: SwarmModelForCausalLM, checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    expected = made_by_peft(checkpoint, kind, tmp_path / "start")
    model.load_adapter(tmp_path / "start")
    losses: list[list[float]] = []
    for trained in (expected, model):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = trained(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0] - 0.01
    model.save_pretrained(tmp_path / "end")
    loaded = peft.PeftModel.from_pretrained(reference(checkpoint), str(tmp_path / "end")).eval()
    with torch.no_grad():
        ours, theirs = model(**batch()), loaded(**batch())
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    ids = batch()["input_ids"][:1]
    tokens = [
        each.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
        for each in (model, loaded)
    ]
    assert torch.equal(tokens[0], tokens[1])


def test_evaluation_has_the_same_loss(model: SwarmModelForCausalLM, checkpoint: Path, tmp_path: Path) -> None:
    expected = made_by_peft(checkpoint, "lora", tmp_path)
    model.load_adapter(tmp_path, is_trainable=False)
    with torch.no_grad():
        assert model(**batch()).loss.item() == pytest.approx(expected(**batch()).loss.item(), rel=1e-5)
        logits = model(**batch(), logits_to_keep=2).logits
        assert torch.equal(logits, model(**batch()).logits[:, -2:])
