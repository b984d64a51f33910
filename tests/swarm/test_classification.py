"""A classifier through a swarm, against transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from petal_swarm.client.classification import SwarmModelForSequenceClassification
from petal_swarm.errors import AdapterError, CheckpointError, ConfigError
from petal_swarm.models.adapter_settings import Lora, Prefix
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import load_ends
from petal_swarm.models.peft_format import read_adapter
from tests.checkpoints import save_bloom, save_llama
from tests.swarm.local import LocalSwarm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids")
CHECKPOINTS: dict[str, Callable[..., Path]] = {"bloom": save_bloom, "llama": save_llama}
LABELS = 3
PAD = 1


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS[request.param](tmp_path_factory.mktemp("model"), blocks=3)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier in transformers that was made of the checkpoint."""
    torch.manual_seed(6)
    model = load_theirs(checkpoint)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    return folder


def load_theirs(folder: Path) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS)
    model.config.pad_token_id = PAD
    return model.eval()


@pytest.fixture(scope="module")
def swarm(checkpoint: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(checkpoint, ["0:2", "2:3"]) as swarm:
        yield swarm


@pytest.fixture
def model(swarm: LocalSwarm, checkpoint: Path, theirs: Path) -> SwarmModelForSequenceClassification:
    lm = swarm.model()
    model = SwarmModelForSequenceClassification(lm, LABELS)
    model.take_head(open_checkpoint(str(theirs)))
    model.config.pad_token_id = PAD
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 900, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, :2] = 0  # on either side
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def test_scores_are_those_of_transformers(model: SwarmModelForSequenceClassification, theirs: Path) -> None:
    labels = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = load_theirs(theirs)(**batch(), labels=labels)
        found = model(**batch(), labels=labels)
    rows = [0, 1]  # transformers counts positions from the padding on the left, if nobody tells
    assert (found.logits - expected.logits)[rows].abs().max() < 1e-4 * expected.logits.abs().max()
    assert found.loss is not None
    unpadded = {"input_ids": batch()["input_ids"][2:, 2:]}
    with torch.no_grad():
        alone = model(**unpadded).logits
    assert (found.logits[2] - alone[0]).abs().max() < 1e-4 * alone.abs().max()


def test_padding_is_told_by_its_token(model: SwarmModelForSequenceClassification) -> None:
    given = batch()
    with torch.no_grad():
        found = model(given["input_ids"]).logits
        expected = model(**given).logits
    assert torch.allclose(found[:2], expected[:2], atol=1e-5)


def test_a_server_of_the_language_model_serves_the_classifier(checkpoint: Path, theirs: Path) -> None:
    assert open_checkpoint(str(theirs)).model_key == open_checkpoint(str(checkpoint)).model_key


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_gradients_and_folders(
    model: SwarmModelForSequenceClassification, theirs: Path, kind: str, tmp_path: Path
) -> None:
    configs: dict[str, Any] = {
        "lora": peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear"),
        "prefix": peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    }
    torch.manual_seed(4)
    expected = peft.get_peft_model(load_theirs(theirs), configs[kind])
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3 if "score" in name else 0.1)
    expected.eval().save_pretrained(str(tmp_path / "theirs"))
    model.load_adapter(tmp_path / "theirs")
    given = {"input_ids": batch()["input_ids"][:1], "labels": torch.tensor([2])}
    wanted, found = expected(**given), model(**given)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-4)
    assert (found.logits - wanted.logits).abs().max() < 1e-4 * wanted.logits.abs().max()
    wanted.loss.backward()
    found.loss.backward()
    head = next(p for name, p in expected.named_parameters() if "score" in name and p.requires_grad)
    assert (model.score.weight.grad - head.grad).abs().max() < 1e-4 * head.grad.abs().max()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.adapter.parameters())
    model.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(load_theirs(theirs), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, wanted.logits)


def test_the_head_is_trained_from_the_start(
    model: SwarmModelForSequenceClassification, checkpoint: Path, tmp_path: Path
) -> None:
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]
    model(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.score.weight.grad.abs().max() > 0
    model.add_adapter(Prefix(tokens=2))
    model.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path, model.ends.config)
    assert torch.equal(stored.extras.modules["score.weight"], model.score.weight)
    assert stored.extras.task_type == "SEQ_CLS"
    with pytest.raises(AdapterError, match=r"score.*another task"):
        model.lm.load_adapter(tmp_path)
    smaller = SwarmModelForSequenceClassification(model.lm, 2)
    with pytest.raises(AdapterError, match="has shape"):
        smaller.load_adapter(tmp_path)
    model.remove_adapter()
    with pytest.raises(AdapterError, match="lm_head"):
        model.add_adapter(Lora(whole_modules=("lm_head",)))
    with pytest.raises(ConfigError, match="num_labels"):
        SwarmModelForSequenceClassification(model.lm, 0)


def test_no_lm_head_is_needed(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert config.tie_word_embeddings is False
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    ends = load_ends(checkpoint, dtype=torch.float32, with_head=False)
    assert ends.embed(torch.tensor([3])).shape == (1, 16)
    with pytest.raises(ConfigError, match="without its LM head"):
        ends.logits(torch.zeros(1, 16))
    with pytest.raises(CheckpointError, match="lm_head"):
        load_ends(checkpoint, dtype=torch.float32)
