"""GGUF files: the same model as in safetensors, every quantization near it, and damage told apart."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TOLERANCE, Local, error, make, tokens

from petal_swarm.errors import CheckpointError, ModelError, UnsupportedArchitectureError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.gguf_file import GGUFFile
from petal_swarm.models.rope import RopeParameters, inverse_frequencies

IDS = tokens(12)
NAMES = ["bloom", "bloom-6-heads", "llama", "qwen2", "qwen3"]


def logits(path):
    with torch.inference_mode():
        return Local(path).step(IDS, 0)


def reference(model):
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


@pytest.mark.parametrize("name", NAMES)
def test_plain_numbers_match_transformers(tmp_path, name):
    model = make(name)
    path = write_gguf(tmp_path / "model.gguf", model)
    assert error(logits(path), reference(model)) < TOLERANCE
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.name == "model"
    assert type(checkpoint.hf_config()) is type(model.config)
    assert checkpoint.hf_config().vocab_size == model.config.vocab_size


def test_configuration_matches_that_of_the_folder(tmp_path):
    model = make("qwen3")
    model.save_pretrained(tmp_path)
    folder = open_checkpoint(str(tmp_path))
    file = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", model)))
    same_eps = dataclasses.replace(file.config, norm_eps=folder.config.norm_eps)
    assert same_eps == folder.config
    assert file.names() == folder.names()
    assert file.model_key != folder.model_key, "a GGUF file is named with its quantization"


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 3e-2), ("Q4_1", 0.5)]
)
def test_quantized_files_stay_near(tmp_path, kind, tolerance):
    model = make("llama-linear")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    model = type(model)(model.config).eval()
    path = write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType[kind])
    assert error(logits(path), reference(model)) < tolerance


def test_biases_and_frequency_factors_are_found(tmp_path):
    """llama.cpp stores the scaling of Llama 3 as divisors of the plain frequencies."""
    model = make("llama3-biases")
    scaled = model.model.rotary_emb.inv_freq
    plain = inverse_frequencies(RopeParameters(theta=1e4), 2 * len(scaled))

    def add_factors(writer):
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())

    path = write_gguf(tmp_path / "model.gguf", model, extra=add_factors)
    assert error(logits(path), reference(model)) < TOLERANCE


def test_rope_scaling_metadata(tmp_path):
    def add_scaling(writer):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    model = make("llama-yarn-tied")
    path = write_gguf(tmp_path / "model.gguf", model, extra=add_scaling)
    assert error(logits(path), reference(model)) < TOLERANCE


def test_chat_models_may_end_with_two_tokens(tmp_path):
    model = make("qwen2")
    path = write_gguf(tmp_path / "model.gguf", model, extra=lambda w: w.add_eot_token_id(5))
    generation = open_checkpoint(str(path)).generation_config()
    assert (generation.bos_token_id, generation.eos_token_id) == (1, [2, 5])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", make("llama"))


def copy_with(file, folder, data):
    path = folder / "copy.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 1000, 0.5, 0.999])
def test_truncated(file, tmp_path, keep):
    data = file.read_bytes()
    count = int(len(data) * keep) if isinstance(keep, float) else keep
    path = copy_with(file, tmp_path, data[:count])
    with pytest.raises(CheckpointError, match=r"copy\.gguf is damaged") as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_headers_never_surprise(file, tmp_path_factory, data):
    """Whatever the bytes say, opening either works or blames the checkpoint."""
    original = file.read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    path = copy_with(file, tmp_path_factory.mktemp("mutated"), bytes(changed))
    with contextlib.suppress(ModelError):
        checkpoint = open_checkpoint(str(path))
        checkpoint.load(checkpoint.names(), dtype=torch.float32)


def test_another_architecture(file, tmp_path):
    data = file.read_bytes().replace(b"llama", b"mamba")
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba' is not supported, only bloom, llama"):
        open_checkpoint(str(copy_with(file, tmp_path, data)))


def test_metadata_values(file):
    opened = GGUFFile(file)
    assert opened.get("general.architecture") == "llama"
    assert opened.get("llama.block_count") == 3
    assert opened.get("no.such.key", 7) == 7
    assert "llama.block_count" in opened
    assert opened.scalars()["tokenizer.ggml.eos_token_id"] == 2
