"""Hub ids: what is downloaded, from which commit, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tiny_models import make

from petal_swarm.errors import CheckpointError, UnknownModelError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Span

REPO = "petals/tiny"
COMMIT = "0123abcd"


class FakeHub:
    """Serves one folder as a repository, and writes down what was asked of it."""

    def __init__(self, folder, cache):
        self.folder = folder
        self.cache = cache / "models--petals--tiny" / "snapshots" / COMMIT
        self.downloaded = []
        self.streamed = []
        self.revisions = []
        self.failure = None

    def hf_hub_download(self, repo, filename, *, revision, cache_dir, token, tqdm_class):
        assert repo == REPO
        self.revisions.append(revision)
        if self.failure is not None:
            raise self.failure
        if not (self.folder / filename).exists():
            raise errors.EntryNotFoundError(f"404\nno {filename}")
        self.cache.mkdir(parents=True, exist_ok=True)
        self.downloaded.append(filename)
        return shutil.copy(self.folder / filename, self.cache / filename)

    def try_to_load_from_cache(self, repo, filename, *, cache_dir, revision):
        path = self.cache / filename
        return str(path) if path.exists() else None

    def HfFileSystem(self, token):  # noqa: N802
        return self

    def open(self, path, mode, *, revision, block_size):
        assert revision == COMMIT
        filename = path.removeprefix(f"{REPO}/")
        self.streamed.append(filename)
        return (self.folder / filename).open(mode)


def write_one_shard_a_block(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for name in tensors:
        number = name.split(".")[2] if ".layers." in name else "ends"
        index[name] = f"model-{number}.safetensors"
    for file in set(index.values()):
        save_file({n: t for n, t in tensors.items() if index[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "repo")
    write_one_shard_a_block(tmp_path / "repo")
    fake = FakeHub(tmp_path / "repo", tmp_path / "cache")
    for name in ("hf_hub_download", "try_to_load_from_cache", "HfFileSystem"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def test_only_the_shards_of_the_span_are_downloaded(hub):
    checkpoint = open_checkpoint(REPO, revision="main")
    load_blocks(checkpoint, Span(0, 1), dtype=torch.float32)
    assert set(hub.downloaded) == {"config.json", "model.safetensors.index.json", "model-0.safetensors"}
    assert checkpoint.name == "tiny"


def test_the_model_key_reads_ranges_of_shards_and_agrees_with_the_folder(hub):
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.model_key == open_checkpoint(str(hub.folder)).model_key
    assert set(hub.streamed) == {"model-2.safetensors", "model-ends.safetensors"}
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]


def test_shards_are_downloaded_for_the_key_where_ranges_cannot_be_read(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no ranges")

    monkeypatch.setattr(hub, "open", refuse)
    assert open_checkpoint(REPO).model_key == open_checkpoint(str(hub.folder)).model_key


def test_all_files_come_from_one_commit(hub):
    checkpoint = open_checkpoint(REPO, revision="main")
    load_blocks(checkpoint, Span(0, 1), dtype=torch.float32)
    assert hub.revisions[0] == "main"
    assert set(hub.revisions[1:]) == {COMMIT}


def response(status):
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            errors.LocalEntryNotFoundError("offline\nsecond line"),
            "is not in the cache, and the Hugging Face Hub",
        ),
        (errors.GatedRepoError("403\nlong", response=response(403)), "is gated: accept its terms"),
        (errors.RepositoryNotFoundError("404\nlong", response=response(404)), "no such repository"),
        (errors.RevisionNotFoundError("404\nlong", response=response(404)), "no such revision"),
        (errors.HfHubHTTPError("500 broken\nlong", response=response(500)), "500 broken"),
        (OSError("disk full\nlong"), "disk full"),
    ],
)
def test_failures_are_one_line(hub, failure, message):
    hub.failure = failure
    with pytest.raises(UnknownModelError, match=message) as caught:
        open_checkpoint(REPO)
    assert "\n" not in str(caught.value)
    assert REPO in str(caught.value)


def test_a_repository_without_a_configuration(hub):
    (hub.folder / "config.json").unlink()
    with pytest.raises(UnknownModelError, match=r"has no config\.json"):
        open_checkpoint(REPO)


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere", "~nobody/x", "a b", "petals/tiny.gguf", ""])
def test_names_that_cannot_be_hub_ids(name):
    with pytest.raises(UnknownModelError, match="no checkpoint at"):
        open_checkpoint(name)


def test_a_damaged_stream(hub):
    (hub.folder / "model-ends.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"model-ends\.safetensors"):
        _ = open_checkpoint(REPO).model_key
