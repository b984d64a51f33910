"""Parameters of adapters: their numbers, where they begin, and what a checkpoint of them holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from petal_swarm.client.adapter import SwarmAdapter
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.errors import AdapterError, ConfigError, UnknownModelError
from petal_swarm.models.adapter_settings import Lora, Prefix, Settings, SoftPrompt
from petal_swarm.models.peft_format import read_adapter
from petal_swarm.span import Span
from tests.checkpoints import save_bloom, save_llama
from tests.swarm.local import LocalSwarm

BLOCKS = 2
KINDS: dict[str, Settings] = {
    "lora": Lora(rank=3, targets="all-linear"),
    "prefix": Prefix(tokens=4),
    "prompt": SoftPrompt(tokens=4),
    "lora-head": Lora(rank=2, whole_modules=("lm_head",)),
}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with LocalSwarm(save_llama(tmp_path_factory.mktemp("llama"), blocks=BLOCKS), []) as swarm:
        yield swarm


@pytest.fixture
def model(swarm: LocalSwarm) -> SwarmModelForCausalLM:
    return swarm.model()


def stir(adapter: SwarmAdapter) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)


def test_numbers_lie_as_the_layout_says(model: SwarmModelForCausalLM) -> None:
    adapter = model.add_adapter(Lora(rank=3, alpha=6, targets=("q_proj", "down_proj")))
    stir(adapter)
    config = model.ends.config
    split = adapter.layout.split(config, adapter.numbers(), Span(0, BLOCKS))
    pair = adapter.lora["1-mlp-down_proj"]
    matrices = split[1].lora["mlp.down_proj"]
    assert torch.equal(matrices.a, pair.lora_A)
    assert torch.equal(matrices.b, pair.lora_B)
    assert matrices.scale == 2.0
    matrices.b.sum().backward()
    assert torch.equal(pair.lora_B.grad, torch.ones_like(pair.lora_B))


def test_numbers_of_a_prefix(model: SwarmModelForCausalLM) -> None:
    adapter = model.add_adapter(Prefix(tokens=4))
    split = adapter.layout.split(model.ends.config, adapter.numbers(), Span(0, BLOCKS))
    assert adapter.prefix is not None
    for block, part in split.items():
        assert torch.equal(part.prefix, adapter.prefix[block])


def test_lora_begins_as_pefts(model: SwarmModelForCausalLM) -> None:
    """Nothing at first, and A as PEFT draws it: PEFT goes through the layers in another order."""
    torch.manual_seed(5)
    adapter = model.add_adapter(Lora(rank=3, targets=("q_proj",), blocks=(0,)))
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(64, 64), "default", peft.LoraConfig(r=3), r=3, lora_alpha=8
    )
    torch.manual_seed(5)
    layer.reset_lora_parameters("default", True)
    pair = adapter.lora["0-self_attn-q_proj"]
    assert torch.equal(pair.lora_A, layer.lora_A["default"].weight)
    assert not pair.lora_B.any()


def test_a_soft_prompt_begins_with_embeddings(model: SwarmModelForCausalLM) -> None:
    adapter = model.add_adapter(SoftPrompt(tokens=5, token_ids=(7, 9)))
    assert adapter.soft_prompt is not None
    assert torch.equal(adapter.soft_prompt, model.ends.embedding[[7, 9, 7, 9, 7]])
    model.remove_adapter()
    drawn = model.add_adapter(SoftPrompt(tokens=5)).soft_prompt
    assert drawn is not None
    assert all((row == model.ends.embedding).all(1).any() for row in drawn)
    model.remove_adapter()
    with pytest.raises(AdapterError, match="lacks"):
        model.add_adapter(SoftPrompt(tokens=5, token_ids=(10_000,)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_added_is_trained(model: SwarmModelForCausalLM, kind: str) -> None:
    assert not [name for name, value in model.named_parameters() if value.requires_grad]
    adapter = model.add_adapter(KINDS[kind])
    trained = [value for value in model.parameters() if value.requires_grad]
    expected = len(list(adapter.parameters())) + (kind == "lora-head")
    assert len(trained) == expected > 0
    assert model.ends.embedding.requires_grad is False


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_all_of_it(swarm: LocalSwarm, kind: str, tmp_path: Path) -> None:
    model, other = swarm.model(), swarm.model()
    adapter = model.add_adapter(KINDS[kind])
    stir(adapter)
    if kind == "lora-head":
        with torch.no_grad():
            model.ends.head.add_(1)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = other.load_adapter(tmp_path)
    assert loaded.layout == adapter.layout
    assert torch.equal(loaded.numbers(), adapter.numbers())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    if adapter.soft_prompt is not None:
        assert torch.equal(loaded.soft_prompt, adapter.soft_prompt)
    assert torch.equal(other.ends.head, model.ends.head)
    assert (other.ends.head is other.ends.embedding) == (kind != "lora-head")
    assert read_adapter(tmp_path, model.ends.config).extras.base_model == swarm.checkpoint.source
    frozen = other.load_adapter(tmp_path, is_trainable=False)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert torch.equal(frozen.numbers(), adapter.numbers())


def test_a_checkpoint_of_a_trainer_holds_what_is_trainable(swarm: LocalSwarm, tmp_path: Path) -> None:
    model, other = swarm.model(), swarm.model()
    for each in (model, other):
        each.add_adapter(Lora(rank=2))
        each.between = torch.nn.Linear(3, 3)
    stir(model.adapter)
    model.save_pretrained(tmp_path / "own")
    assert set(load_file(tmp_path / "own" / "model.safetensors")) == {"between.weight", "between.bias"}
    model.save_pretrained(tmp_path / "checkpoint", state_dict=None)
    result = other.load_state_dict(load_file(tmp_path / "checkpoint" / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert not result.missing_keys
    assert torch.equal(other.adapter.numbers(), model.adapter.numbers())
    assert torch.equal(other.between.weight, model.between.weight)
    partly = {"between.weight": torch.zeros(3, 3)}
    missing = other.load_state_dict(partly, strict=False).missing_keys
    assert "between.bias" in missing
    assert "ends.embedding" not in missing
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


def test_push_to_hub_uploads_the_files(model: SwarmModelForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model.add_adapter(Lora(rank=2))
    pushed: list[tuple[str, set[str]]] = []

    def upload(folder: str, repo_id: str, *_: object, **__: object) -> str:
        pushed.append((repo_id, {path.name for path in Path(folder).iterdir()}))
        return "url"

    class Repo:
        repo_id = "someone/adapter"

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repo)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(model, "_upload_modified_files", upload)
    model.push_to_hub("someone/adapter")
    assert pushed == [("someone/adapter", {"adapter_config.json", "adapter_model.safetensors", "README.md"})]


def test_pefts_configurations_are_taken(model: SwarmModelForCausalLM) -> None:
    adapter = model.add_adapter(peft.LoraConfig(r=3, target_modules=["q_proj"]))
    assert adapter.settings == Lora(rank=3, targets=("q_proj",))
    model.remove_adapter()
    with pytest.warns(UserWarning, match="lora_dropout"):
        model.add_adapter(peft.LoraConfig(lora_dropout=0.1))
    model.remove_adapter()
    for refused, message in [
        (peft.LoraConfig(init_lora_weights="gaussian"), "init_lora_weights"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True), "prefix_projection"),
        (
            peft.PromptTuningConfig(
                num_virtual_tokens=2,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text="hello",
                tokenizer_name_or_path="none",
            ),
            "token_ids",
        ),
        (peft.IA3Config(), "IA3"),
        ("lora", "str is no configuration"),
    ]:
        with pytest.raises(AdapterError, match=message):
            model.add_adapter(refused)
        assert model.adapter is None


def test_what_cannot_be(swarm: LocalSwarm, model: SwarmModelForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to save"):
        model.save_pretrained(tmp_path / "nothing")
    model.add_adapter(Prefix(tokens=2))
    with pytest.raises(ConfigError, match="remove_adapter"):
        model.add_adapter(Lora())
    with pytest.raises(UnknownModelError):
        model.load_adapter(tmp_path / "no" / "such" / "folder")
    assert isinstance(model.adapter.settings, Prefix)
    model.remove_adapter()
    with pytest.raises(AdapterError, match="score"):
        model.add_adapter(Lora(whole_modules=("score",)))
    with pytest.warns(UserWarning, match="checkpointing is not used"):
        model.gradient_checkpointing_enable()


def test_another_models_adapter_leaves_ours_alone(
    swarm: LocalSwarm, model: SwarmModelForCausalLM, tmp_path: Path
) -> None:
    with LocalSwarm(save_bloom(tmp_path / "bloom", blocks=BLOCKS), []) as blooms:
        bloom = blooms.model()
        bloom.add_adapter(Lora(rank=2))
        bloom.save_pretrained(tmp_path / "adapter")
    ours = model.add_adapter(Lora(rank=2))
    with pytest.raises(AdapterError, match="no linear layer"):
        model.load_adapter(tmp_path / "adapter")
    assert model.adapter is ours
