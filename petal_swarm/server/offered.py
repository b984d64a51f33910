"""`--adapters`: what a server offers to everybody, read from folders in PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.peft_format import read_adapter
from petal_swarm.wire.announcement import MAX_ADAPTER_NAME


@dataclass(frozen=True, eq=False, slots=True)
class OfferedAdapter:
    """An adapter for everybody, with the numbers of all blocks: flat float32."""

    name: str
    layout: AdapterLayout
    numbers: Tensor


def read_offered(given: Sequence[str], checkpoint: Checkpoint) -> list[OfferedAdapter]:
    """The adapters of these folders or Hub ids, each maybe with `NAME=` in front of it.

    Raises:
        ConfigError: a name that cannot be used, or twice the same; an adapter without numbers for blocks.
        AdapterError, UnknownModelError: an adapter cannot be read.
    """
    found: dict[str, OfferedAdapter] = {}
    for entry in given:
        name, source = name_and_source(entry)
        if name in found:
            raise ConfigError(f"two adapters are called {name!r}; give them names, such as other={source}")
        stored = read_adapter(source, checkpoint.config)
        if not stored.numbers.numel():
            raise ConfigError(f"the adapter {source} has nothing for blocks: only clients can use it")
        found[name] = OfferedAdapter(name, stored.layout, stored.numbers)
    return list(found.values())


def name_and_source(entry: str) -> tuple[str, str]:
    """`tone=./folder`, or `./tone` alone, as name and folder.

    Raises:
        ConfigError: a name with spaces, or too long.
    """
    name, equals, source = entry.partition("=")
    if not equals:
        name, source = PurePath(entry).name, entry
    if not name or len(name) > MAX_ADAPTER_NAME or not name.isprintable() or " " in name or not source:
        raise ConfigError(
            f"--adapters takes FOLDER or NAME=FOLDER, a name without spaces, got {entry!r:.100}"
        )
    return name, source
