"""Soft prompts of PEFT in front of what goes through a swarm, against transformers with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch

from tests.checkpoints import reference, save_bloom, save_llama
from tests.swarm.local import LocalSwarm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids")
PROMPT = 5
CHECKPOINTS: dict[str, Callable[..., Path]] = {"bloom": save_bloom, "llama": save_llama}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return CHECKPOINTS[request.param](tmp_path / "model", blocks=4)


@pytest.fixture
def prompted(checkpoint: Path, tmp_path: Path) -> peft.PeftModel:
    """The model in transformers with a soft prompt, saved in `adapter`."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    model = peft.get_peft_model(reference(checkpoint), config)
    torch.manual_seed(1)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 0.05)
    model.save_pretrained(str(tmp_path / "adapter"))
    return model.eval()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 900, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[2, 2:] = 0
    return ids, mask


def test_logits_are_those_of_peft(checkpoint: Path, prompted: peft.PeftModel, tmp_path: Path) -> None:
    ids, mask = padded()
    with LocalSwarm(checkpoint, ["0:2", "2:4"]) as swarm, torch.no_grad():
        model = swarm.model()
        plain = model(ids, attention_mask=mask).logits
        model.load_adapter(tmp_path / "adapter")
        found = model(ids, attention_mask=mask).logits
        embedded = model(inputs_embeds=model.ends.embedding[ids], attention_mask=mask).logits
    with torch.no_grad():
        expected = prompted(input_ids=ids, attention_mask=mask).logits[:, PROMPT:]
    real = mask.bool()
    scale = expected.abs().max()
    assert (found - expected)[real].abs().max() < 1e-4 * scale
    assert (embedded - found)[real].abs().max() < 1e-5 * scale
    assert (plain - expected)[real].abs().max() > 0.01 * scale


def test_generation_goes_on_from_the_prompt(
    checkpoint: Path, prompted: peft.PeftModel, tmp_path: Path
) -> None:
    ids, _ = padded()
    expected = prompted.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    with LocalSwarm(checkpoint, ["0:2", "2:4"]) as swarm:
        model = swarm.model()
        model.load_adapter(tmp_path / "adapter")
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)
        beams = model.generate(ids[:1], max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
        with model.inference_session(max_length=14) as session:
            first = model.generate(ids, max_new_tokens=3, session=session, do_sample=False, pad_token_id=0)
            rest = model.generate(max_new_tokens=5, session=session, do_sample=False, pad_token_id=0)
        assert torch.equal(torch.cat([first, rest[:, -5:]], dim=1), expected)
    wanted = prompted.generate(
        input_ids=ids[:1],
        attention_mask=torch.ones_like(ids[:1]),
        max_new_tokens=8,
        num_beams=3,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(beams, wanted)
