"""PEFT's files, read and written, against PEFT itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from petal_swarm.errors import AdapterError, UnknownModelError
from petal_swarm.models.adapter_settings import Lora, Prefix, SoftPrompt, settings_of
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.peft_format import StoredAdapter, read_adapter, write_adapter
from petal_swarm.span import Span
from tests.models.tiny_models import BLOCKS, make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers', of what PEFT calls


def shape_of(model: Any) -> ModelConfig:
    stated = model.config.to_dict()
    return ModelConfig.from_hf({**stated, "architectures": [type(model).__name__]})


def made_by_peft(architecture: str, config: Any, folder: Path, seed: int = 3) -> Any:
    """A PEFT model whose adapter is far from doing nothing, saved."""
    model = peft.get_peft_model(make(architecture), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    model.save_pretrained(str(folder))
    return model


LORAS: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": "all-linear", "r": 3, "use_rslora": True, "bias": "none"},
    "some-blocks": {"target_modules": ["v_proj", "query_key_value"], "layers_to_transform": [0, 2]},
    "one-block": {"target_modules": ["v_proj", "query_key_value"], "layers_to_transform": 1},
    "regex": {"target_modules": r".*\.(0|2)\..*(gate_proj|dense_h_to_4h)"},
    "patterns": {
        "target_modules": ["v_proj", "query_key_value", "down_proj", "dense_4h_to_h"],
        "exclude_modules": ["layers.2.mlp.down_proj", "h.2.mlp.dense_4h_to_h"],
        "rank_pattern": {r"(layers|h)\.1\..*": 2, "down_proj|dense_4h_to_h": 5},
        "alpha_pattern": {"v_proj|query_key_value": 11},
    },
}


@pytest.mark.parametrize("architecture", ["bloom", "llama", "qwen3"])
@pytest.mark.parametrize("name", LORAS)
def test_lora_of_peft(architecture: str, name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORAS[name])
    model = made_by_peft(architecture, config, tmp_path / "made")
    shape = shape_of(model.get_base_model())
    layout, numbers, extras = read_adapter(tmp_path / "made", shape)
    split = layout.split(shape, numbers, Span(0, BLOCKS))
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)
    }
    assert len(layers) == len(layout.places) > 0
    for place in layout.places:
        stem = f"{place.block}.{place.stem}"
        layer = next(module for name, module in layers.items() if name.endswith(f".{stem}"))
        matrices = split[place.block].lora[place.stem]
        assert torch.equal(matrices.a, layer.lora_A["default"].weight)
        assert torch.equal(matrices.b, layer.lora_B["default"].weight)
        assert matrices.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
    write_adapter(tmp_path / "written", shape, StoredAdapter(layout, numbers, extras))
    assert_equal_models(model, architecture, tmp_path / "written")
    again = read_adapter(tmp_path / "written", shape)
    assert again.layout == layout
    assert torch.equal(again.numbers, numbers)


def assert_equal_models(model: Any, architecture: str, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected)")
        loaded = peft.PeftModel.from_pretrained(make(architecture), str(folder))
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits
        plain = make(architecture)(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(plain, expected[:, -12:], atol=1e-2)


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
@pytest.mark.parametrize("projected", [False, True])
def test_prefix_of_peft(architecture: str, projected: bool, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projected, encoder_hidden_size=8
    )
    model = made_by_peft(architecture, config, tmp_path / "made")
    shape = shape_of(model.get_base_model())
    layout, numbers, extras = read_adapter(tmp_path / "made", shape)
    assert extras.settings == Prefix(tokens=4)
    past = model.eval().get_prompt(1)
    for block, adapter in layout.split(shape, numbers, Span(0, BLOCKS)).items():
        assert adapter.prefix is not None
        assert torch.equal(adapter.prefix[0], past.layers[block].keys[0])
        assert torch.equal(adapter.prefix[1], past.layers[block].values[0])
    write_adapter(tmp_path / "written", shape, StoredAdapter(layout, numbers, extras))
    assert_equal_models(model, architecture, tmp_path / "written")


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_soft_prompt_of_peft(architecture: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = made_by_peft(architecture, config, tmp_path / "made")
    shape = shape_of(model.get_base_model())
    layout, numbers, extras = read_adapter(tmp_path / "made", shape)
    assert extras.settings == SoftPrompt(tokens=4)
    assert not layout.places
    assert numbers.numel() == 0
    assert extras.soft_prompt is not None
    assert torch.equal(extras.soft_prompt, model.get_prompt(1)[0])
    write_adapter(tmp_path / "written", shape, StoredAdapter(layout, numbers, extras))
    assert_equal_models(model, architecture, tmp_path / "written")


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_head_of_peft(kind: str, tmp_path: Path) -> None:
    configs = {
        "lora": peft.LoraConfig(task_type="SEQ_CLS"),
        "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }
    base = make("llama")
    base.config.num_labels = 3
    model = peft.get_peft_model(transformers.LlamaForSequenceClassification(base.config), configs[kind])
    model.save_pretrained(str(tmp_path / "made"))
    shape = shape_of(base)
    stored = read_adapter(tmp_path / "made", shape)
    assert {name: tuple(value.shape) for name, value in stored.extras.modules.items()} == {
        "score.weight": (3, 64)
    }
    write_adapter(tmp_path / "written", shape, stored)
    made, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("made", "written"))
    assert made.keys() == written.keys()
    assert all(torch.equal(made[name], written[name]) for name in made)


def test_own_settings_mean_what_pefts_do(tmp_path: Path) -> None:
    given = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert settings_of(given) == Lora(rank=4, alpha=7, targets=("q_proj",), whole_modules=("lm_head",))
    assert settings_of(peft.PrefixTuningConfig(num_virtual_tokens=6)) == Prefix(tokens=6)
    assert settings_of(Prefix(tokens=6)) == Prefix(tokens=6)
    shape = shape_of(make("llama"))
    everywhere = Lora(targets="all-linear", blocks=(1,)).layout(shape)
    assert {(place.block, place.stem.split(".")[1]) for place in everywhere.places} == {
        (1, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


# -- bad input -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made_by_peft("llama", peft.LoraConfig(r=4, task_type="CAUSAL_LM"), tmp_path)
    return tmp_path


@pytest.fixture
def shape() -> ModelConfig:
    return shape_of(make("llama"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "None"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "other weights"),
        ({"r": "four"}, "must be an integer"),
        ({"r": 0}, "at least 1"),
        ({"r": 10_000}, "does not fit"),
        ({"r": 5}, "has shape"),
        ({"lora_alpha": float("nan")}, "scale"),
        ({"rank_pattern": {"q_proj": -1}}, "a rank of -1"),
        ({"rank_pattern": {"(": 2}}, "regular expression"),
        ({"rank_pattern": [1]}, "cannot be used"),
        ({"target_modules": ["c_attn"]}, "no linear layer"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        ({"target_modules": 7}, "cannot be used"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks the tensor"),
        ({"target_modules": ["q_proj"]}, "does not name"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform"),
        ({"peft_type": "PREFIX_TUNING"}, "num_virtual_tokens"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "lacks the tensor"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1 << 30}, "tokens"),
    ],
)
def test_bad_configurations(folder: Path, shape: ModelConfig, fields: dict[str, Any], message: str) -> None:
    edit_config(folder, **fields)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, shape)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_are_not_finite(folder: Path, shape: ModelConfig) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[7].fill_(torch.inf))
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj\.lora_B.* not finite"):
        read_adapter(folder, shape)


def test_tensors_that_are_no_numbers(folder: Path, shape: ModelConfig) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(AdapterError, match="int8"):
        read_adapter(folder, shape)


def test_missing_and_unexpected_tensors(folder: Path, shape: ModelConfig) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors.update({"more": tensors[name].clone()}))
    with pytest.raises(AdapterError, match="does not name, such as more"):
        read_adapter(folder, shape)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(AdapterError, match="lacks the tensor"):
        read_adapter(folder, shape)


def test_an_adapter_of_another_model(folder: Path) -> None:
    with pytest.raises(AdapterError, match="no linear layer"):
        read_adapter(folder, shape_of(make("bloom")))
    with pytest.raises(AdapterError, match="has shape"):
        read_adapter(folder, shape_of(make("qwen3")))


def test_damaged_files(folder: Path, shape: ModelConfig) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged"):
        read_adapter(folder, shape)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(folder, shape)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="JSON"):
        read_adapter(folder, shape)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="not an adapter"):
        read_adapter(folder, shape)
    with pytest.raises(UnknownModelError, match="no adapter at"):
        read_adapter(folder / "nothing" / "here" / "at-all", shape)
    weights.write_bytes(b"")
    with pytest.raises(UnknownModelError, match="is a file: an adapter is a folder"):
        read_adapter(weights, shape)


def test_old_weights_are_read(folder: Path, shape: ModelConfig) -> None:
    weights = folder / "adapter_model.safetensors"
    expected = read_adapter(folder, shape).numbers
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    assert torch.equal(read_adapter(folder, shape).numbers, expected)


def test_what_is_not_finite_is_not_written(folder: Path, shape: ModelConfig, tmp_path: Path) -> None:
    stored = read_adapter(folder, shape)
    stored.numbers[17] = torch.nan
    with pytest.raises(AdapterError, match="not written"):
        write_adapter(tmp_path / "written", shape, stored)
    assert not (tmp_path / "written").exists()
    with pytest.raises(AdapterError, match="numbers"):
        write_adapter(tmp_path / "written", shape, stored._replace(numbers=stored.numbers[1:]))
