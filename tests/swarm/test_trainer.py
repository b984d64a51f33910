"""Hugging Face's Trainer and accelerate with the model object, through a swarm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers

from petal_swarm.client.classification import SwarmModelForSequenceClassification
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.models.adapter_settings import Lora
from tests.checkpoints import reference, save_llama
from tests.swarm.local import LocalSwarm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory")
PAD = 1


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with LocalSwarm(save_llama(tmp_path_factory.mktemp("model"), blocks=2), ["0:1", "1:2"]) as swarm:
        yield swarm


def fresh(swarm: LocalSwarm) -> SwarmModelForCausalLM:
    """With the same adapter every time."""
    model = swarm.model()
    torch.manual_seed(7)
    model.add_adapter(Lora(rank=4, targets="all-linear"))
    return model


def texts(count: int = 12, *, labelled: bool = False) -> list[dict[str, Any]]:
    """Of different lengths, so that the collator pads them."""
    generator = torch.Generator().manual_seed(8)
    found: list[dict[str, Any]] = []
    for index in range(count):
        ids = torch.randint(3, 40, (4 + index % 3,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": index % 2 if labelled else ids})
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = row["input_ids"]
        missing = width - len(ids)
        batch["input_ids"].append(ids + [PAD] * missing)
        batch["attention_mask"].append([1] * len(ids) + [0] * missing)
        labels = row["labels"]
        batch["labels"].append(labels + [-100] * missing if isinstance(labels, list) else labels)
    return {name: torch.tensor(values) for name, values in batch.items()}


def trainer_of(model: Any, folder: Path, **options: Any) -> transformers.Trainer:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 9,
        **options,
    }
    rows = texts(labelled=isinstance(model, SwarmModelForSequenceClassification))
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**fields),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=collate,
    )


def losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(
    swarm: LocalSwarm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh(swarm)
    trainer = trainer_of(model, tmp_path / "run", gradient_accumulation_steps=2)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 6
    assert found[-1] < found[0] - 0.05
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        model(**collate(texts()[:4])).loss.item(), rel=1e-5
    )

    again = fresh(swarm)
    resumed = trainer_of(again, tmp_path / "run", gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(found[-3:], rel=1e-5)
    assert torch.equal(again.adapter.numbers(), model.adapter.numbers())
    assert "missing keys" not in caplog.text

    trainer.save_model(str(tmp_path / "end"))
    loaded = peft.PeftModel.from_pretrained(
        reference(Path(swarm.checkpoint.source)), str(tmp_path / "end")
    ).eval()
    given = collate(texts()[:4])
    with torch.no_grad():
        assert loaded(**given).loss.item() == pytest.approx(model(**given).loss.item(), rel=1e-5)


def test_trainer_is_as_with_peft_in_one_process(swarm: LocalSwarm, tmp_path: Path) -> None:
    model = fresh(swarm)
    model.save_pretrained(tmp_path / "start")
    source = Path(swarm.checkpoint.source)
    local = peft.PeftModel.from_pretrained(reference(source), str(tmp_path / "start"), is_trainable=True)
    runs = []
    for each, name in ((local, "peft"), (model, "swarm")):
        trainer = trainer_of(each, tmp_path / name, save_strategy="no", gradient_accumulation_steps=2)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], abs=1e-3)


def test_the_best_checkpoint_is_loaded(swarm: LocalSwarm, tmp_path: Path) -> None:
    model = fresh(swarm)
    trainer = trainer_of(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, learning_rate=0.5
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    other = fresh(swarm)
    other.load_adapter(best)
    assert torch.equal(other.adapter.numbers(), model.adapter.numbers())


def test_checkpointing_is_not_used(swarm: LocalSwarm, tmp_path: Path) -> None:
    trainer = trainer_of(
        fresh(swarm), tmp_path, activation_checkpointing=True, max_steps=1, save_strategy="no"
    )
    with pytest.warns(UserWarning, match="checkpointing is not used"):
        trainer.train()


def test_a_classifier_is_trained(swarm: LocalSwarm, tmp_path: Path) -> None:
    model = SwarmModelForSequenceClassification(fresh(swarm), 2)
    trainer = trainer_of(model, tmp_path / "run", max_steps=12, learning_rate=3e-2)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]
    again = SwarmModelForSequenceClassification(fresh(swarm), 2)
    again.load_adapter(tmp_path / "run" / "checkpoint-12")
    assert torch.equal(again.score.weight, model.score.weight)
    assert torch.equal(again.adapter.numbers(), model.adapter.numbers())


def test_accelerate_prepares_it(swarm: LocalSwarm) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = fresh(swarm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = model.adapter.numbers().clone()
    loss = prepared(**collate(texts()[:3])).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    optimizer.step()
    assert accelerator.unwrap_model(prepared) is model
    assert not torch.equal(model.adapter.numbers(), before)
