"""Checkpoints in every layout hold the same model, and say in one line what is wrong with a bad one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, Local, make, tokens

from petal_swarm.errors import CheckpointError, ConfigError, ModelError, UnknownModelError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import load_ends
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Span

IDS = tokens(12)
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(params=["bloom", "llama-yarn-tied"])
def folder(request, tmp_path):
    make(request.param).save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def logits(path):
    with torch.inference_mode():
        return Local(path).step(IDS, 0)


def variant(folder, name):
    """A copy of the checkpoint's folder without its weights, and the weights."""
    other = folder.parent / name
    other.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, other)
    return other, load_file(folder / "model.safetensors")


def halves(tensors):
    names = sorted(tensors)
    return {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}


def write_shards(folder, tensors, suffix, save):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for number, half in enumerate(halves(tensors), 1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        save(half, folder / file)
        index |= dict.fromkeys(half, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))


def write_safetensors_shards(folder, tensors):
    write_shards(folder, tensors, "safetensors", save_file)


def write_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


def write_legacy_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_bin_shards(folder, tensors):
    write_shards(folder, tensors, "bin", torch.save)


def write_without_prefix(folder, tensors):
    """As checkpoints saved from the base model: `h.0...` for BLOOM, `layers.0...` for Llama."""
    prefixes = ("transformer.", "model.")
    save_file(
        {next((n.removeprefix(p) for p in prefixes if n.startswith(p)), n): t for n, t in tensors.items()},
        folder / "model.safetensors",
    )


LAYOUTS = [write_safetensors_shards, write_bin, write_legacy_bin, write_bin_shards, write_without_prefix]


@pytest.mark.parametrize("write", LAYOUTS)
def test_layouts_hold_the_same_model(folder, write):
    other, tensors = variant(folder, "other")
    write(other, tensors)
    assert torch.equal(logits(other), logits(folder))
    found, expected = open_checkpoint(str(other)), open_checkpoint(str(folder))
    assert found.model_key == expected.model_key
    assert found.names() == expected.names()
    assert found.name == "other"


def test_safetensors_are_preferred(folder):
    (folder / "pytorch_model.bin").write_bytes(b"nothing that could be read")
    assert logits(folder).isfinite().all()


def test_model_key_is_stable(tmp_path):
    """Peers of different versions must agree: a change here splits the swarm."""
    make("llama").save_pretrained(tmp_path)
    tensors = {name: torch.full_like(t, 0.5) for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_checkpoint(str(tmp_path)).model_key == "llama-3x64-a260ad5dc07c"


@pytest.mark.parametrize("stem", ["norm", "layers.2.self_attn.q_proj", "layers.2.mlp.down_proj"])
def test_model_key_tells_a_fine_tune_apart(tmp_path, stem):
    make("llama").save_pretrained(tmp_path)
    before = open_checkpoint(str(tmp_path)).model_key
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.{stem}.weight"] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    after = open_checkpoint(str(tmp_path)).model_key
    assert after != before
    assert after.startswith("llama-3x64-")


def test_model_key_does_not_depend_on_the_stored_dtype(tmp_path):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "full")
    half, full = (open_checkpoint(str(tmp_path / name)) for name in ("half", "full"))
    assert (half.config.torch_dtype, full.config.torch_dtype) == ("bfloat16", "float32")
    assert half.model_key == full.model_key


def test_progress_counts_every_byte_of_the_span(folder):
    checkpoint = open_checkpoint(str(folder))
    calls = []
    stack = load_blocks(
        checkpoint, Span(1, BLOCKS), dtype=torch.float32, progress=lambda *done: calls.append(done)
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert len({total for _, total in calls}) == 1
    assert done[-1] == calls[-1][1] <= stack.nbytes
    calls.clear()
    load_ends(checkpoint, dtype=torch.float32, progress=lambda *done: calls.append(done))
    assert calls[-1][0] == calls[-1][1]


def test_load_converts_and_owns(folder):
    checkpoint = open_checkpoint(str(folder))
    name = f"{checkpoint.family.ends.final_norm}.weight"
    tensor = checkpoint.load([name], dtype=torch.float16)[name]
    assert tensor.dtype == torch.float16
    (folder / "model.safetensors").unlink()
    assert tensor.isfinite().all()


def test_generation_and_hf_configurations(folder):
    checkpoint = open_checkpoint(str(folder))
    assert type(checkpoint.hf_config()).__name__ in ("BloomConfig", "LlamaConfig")
    assert checkpoint.generation_config().eos_token_id == 2
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(str(folder)).generation_config().eos_token_id == 2


def fails(error, match, folder):
    with pytest.raises(error, match=match) as caught:
        logits(folder)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    fails(UnknownModelError, "no checkpoint at", tmp_path / "nothing")
    fails(UnknownModelError, "no checkpoint at", "./nothing.gguf")
    fails(UnknownModelError, "has no config.json", tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"?")
    fails(UnknownModelError, "neither a folder nor", tmp_path / "weights.pt")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    fails(UnknownModelError, "holds no weights", folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_config_is_not_an_object(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    fails(CheckpointError, "config.json", folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_safetensors(folder, keep):
    truncate(folder / "model.safetensors", keep)
    fails(CheckpointError, "model.safetensors is damaged", folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
@pytest.mark.parametrize("write", [write_bin, write_legacy_bin])
def test_truncated_bin(folder, keep, write):
    other, tensors = variant(folder, "bin")
    write(other, tensors)
    truncate(other / "pytorch_model.bin", keep)
    fails(CheckpointError, "pytorch_model.bin is damaged", other)


def truncate(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def test_bin_with_code_is_refused(folder):
    other, _ = variant(folder, "bin")
    torch.save({"a": Malicious()}, other / "pytorch_model.bin")
    fails(CheckpointError, "pytorch_model.bin is damaged", other)


def test_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if ".1." in n)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    fails(CheckpointError, f"has no tensor {name}", folder)


def test_wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if ".1." in n)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    fails(CheckpointError, f"{name} of model.safetensors has shape", folder)


def test_quantized_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if ".1." in n)
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    fails(CheckpointError, "quantized checkpoints are not supported", folder)


def test_shard_is_missing(folder):
    other, tensors = variant(folder, "sharded")
    write_safetensors_shards(other, tensors)
    (other / SHARD).unlink()
    fails(CheckpointError, f"lacks the file {SHARD}", other)


def test_shard_lacks_a_tensor_of_the_index(folder):
    other, tensors = variant(folder, "sharded")
    write_safetensors_shards(other, tensors)
    shard = load_file(other / SHARD)
    name = next(n for n in sorted(shard) if ".1." in n)
    del shard[name]
    save_file(shard, other / SHARD)
    fails(CheckpointError, f"{SHARD} has no tensor {name}", other)


@pytest.mark.parametrize("target", ["../../outside.safetensors", "/etc/passwd", 7, "model.pt"])
def test_index_names_only_files_beside_it(folder, target):
    other, tensors = variant(folder, "sharded")
    write_safetensors_shards(other, tensors)
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": target}}))
    fails(CheckpointError, "no usable weight_map", other)


def test_span_beyond_the_model(folder):
    with pytest.raises(ConfigError, match="has blocks 0:3"):
        load_blocks(open_checkpoint(str(folder)), Span(2, 4), dtype=torch.float32)


def test_all_errors_are_model_errors():
    assert issubclass(CheckpointError, ModelError)
    assert issubclass(UnknownModelError, ModelError)
