"""Where the files of a checkpoint are: a local folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import IO, Any, Protocol

from petal_swarm.errors import CheckpointError, UnknownModelError

_STREAM_BLOCK_BYTES = 1 << 18
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")


class Folder(Protocol):
    """Files by name; `find` fetches the file if it is elsewhere, and answers None if there is none."""

    source: str
    name: str

    def identity(self) -> str | None:
        """Changes whenever the weights do, without reading them; None if that cannot be told."""
        ...

    def find(self, filename: str) -> Path | None: ...

    def stream(self, filename: str) -> IO[bytes] | None:
        """The file where it is, to read a little of it; None if `find` costs nothing."""
        ...


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.name = path.resolve().name
        self._path = path

    def identity(self) -> str | None:
        files = sorted(file for file in self._path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        return "\n".join(map(file_identity, files))

    def find(self, filename: str) -> Path | None:
        path = self._path / filename
        return path if path.is_file() else None

    def stream(self, filename: str) -> IO[bytes] | None:
        return None


class HubFolder:
    """A repository of the Hub; files are downloaded when they are asked for, into the Hub's cache.

    After the first file all others come from the same commit, so that a push during a download cannot mix
    two versions.
    """

    def __init__(self, repo: str, *, revision: str | None, cache_dir: str | None, token: str | None) -> None:
        self.source = repo
        self.name = repo.rpartition("/")[2]
        self._revision = revision
        self._cache_dir = cache_dir
        self._token = token

    def identity(self) -> str | None:
        commit = self._revision or ""
        return f"{self.source}@{commit}" if _COMMIT.fullmatch(commit) else None

    def find(self, filename: str) -> Path | None:
        import huggingface_hub
        from huggingface_hub import errors

        try:
            found = huggingface_hub.hf_hub_download(
                self.source,
                filename,
                revision=self._revision,
                cache_dir=self._cache_dir,
                token=self._token,
                tqdm_class=_silent_progress(),
            )
        except errors.LocalEntryNotFoundError as error:
            raise UnknownModelError(
                f"{filename} of {self.source} is not in the cache, and the Hugging Face Hub cannot be reached"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
            raise UnknownModelError(f"{self.source}: {_reason(error)}") from error
        path = Path(found)
        if path.parent.parent.name == "snapshots":
            self._revision = path.parent.name
        return path

    def stream(self, filename: str) -> IO[bytes] | None:
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(
            self.source, filename, cache_dir=self._cache_dir, revision=self._revision
        )
        if isinstance(cached, str):
            return None
        files = huggingface_hub.HfFileSystem(token=self._token)
        opened: IO[bytes] = files.open(
            f"{self.source}/{filename}", "rb", revision=self._revision, block_size=_STREAM_BLOCK_BYTES
        )
        return opened


def file_identity(path: Path) -> str:
    """Path, size and time of the last change, of the file that a link leads to."""
    path = path.resolve()
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its terms on huggingface.co and pass a token"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hugging Face Hub has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such folder, and no such repository on the Hugging Face Hub (or it is private)"
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _silent_progress() -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


def open_folder(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    kind: str = "checkpoint",
) -> Folder:
    """The folder at the path `model`, otherwise the Hub repository of that id; `kind` is for errors.

    Raises:
        UnknownModelError: `model` is neither a folder nor something that can be a Hub id.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return LocalFolder(path)
    if path.is_file():
        raise UnknownModelError(f"{model} is neither a folder nor a .gguf file")
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise UnknownModelError(f"there is no {kind} at {model}")
    return HubFolder(model, revision=revision, cache_dir=cache_dir, token=token)


def read_json(folder: Folder, filename: str) -> dict[str, Any] | None:
    """The object in a JSON file of the folder; None if there is no such file.

    Raises:
        CheckpointError: it does not hold a JSON object.
    """
    path = folder.find(filename)
    if path is None:
        return None
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{filename} of {folder.source} is not valid JSON") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{filename} of {folder.source} holds no JSON object")
    return loaded
