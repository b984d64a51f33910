"""The adapters that a generator can use: folders of its own, and those that servers offer to everybody."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from petal_swarm.client.adapters import Adapter, NamedAdapter, StaticAdapter
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import AdapterError, ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.peft_format import read_adapter

#: What servers were heard to offer so long ago is still taken for true.
RECENT_S = 5.0


@dataclass(frozen=True, eq=False, slots=True)
class ReadyAdapter:
    """`blocks` is what servers compute with, `soft_prompt [tokens, hidden_size]` what precedes a prompt."""

    blocks: Adapter | NamedAdapter | None = None
    soft_prompt: Tensor | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the soft prompt adds to each sequence."""
        return 0 if self.soft_prompt is None else self.soft_prompt.shape[0]


NO_ADAPTER = ReadyAdapter()


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> ReadyAdapter:
    """Read an adapter in PEFT's format.

    Raises:
        UnknownModelError: there is no such folder or repository of the Hugging Face Hub.
        AdapterError: it is damaged, not supported, does not fit the model, or has a head of its own.
    """
    stored = read_adapter(folder, config)
    if stored.extras.modules:
        names = ", ".join(sorted(stored.extras.modules))
        raise AdapterError(
            f"the adapter {os.fspath(folder)} brings {names}, which cannot be used beside others"
        )
    blocks = StaticAdapter.of(config, stored.layout, stored.numbers) if stored.numbers.numel() else None
    return ReadyAdapter(blocks, stored.extras.soft_prompt)


class Adapters:
    """By name; lives in the swarm's event loop."""

    def __init__(self, swarm: Swarm, ref: ModelRef, own: Mapping[str, ReadyAdapter]) -> None:
        self._swarm = swarm
        self._ref = ref
        self._own = dict(own)
        self._offered: dict[str, set[str]] = {}
        self._heard_s: float | None = None

    async def names(self) -> tuple[str, ...]:
        """What can be asked for now; what servers offer may be a few seconds old."""
        if not self._is_recent():
            announcements = await self._swarm.view.announcements(self._ref.key)
            offered: dict[str, set[str]] = {}
            for announcement in announcements:
                for name, adapter in announcement.adapters:
                    offered.setdefault(name, set()).add(adapter)
            self._offered, self._heard_s = offered, _now()
        return tuple(self._own) + tuple(sorted(set(self._offered) - set(self._own)))

    def check(self, name: str | None) -> None:
        """
        Raises:
            ConfigError: there is no such adapter, as far as that is known without asking.
        """
        if name is None or name in self._own or not self._is_recent():
            return
        if name not in self._offered and not any(name in ids for ids in self._offered.values()):
            raise _unknown(name)

    async def find(self, name: str | None) -> ReadyAdapter:
        """
        Raises:
            ConfigError: there is no such adapter, or servers offer several of this name.
        """
        if name is None:
            return NO_ADAPTER
        if name in self._own:
            return self._own[name]
        await self.names()
        self.check(name)
        found = self._offered.get(name, {name})
        if len(found) > 1:
            raise ConfigError(
                f"several adapters are called {name!r}; give one's id: {', '.join(sorted(found))}"
            )
        return ReadyAdapter(NamedAdapter(*found))

    def _is_recent(self) -> bool:
        return self._heard_s is not None and _now() - self._heard_s < RECENT_S


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"there is no adapter {name!r}: neither here, nor offered by servers")


def _now() -> float:
    return asyncio.get_running_loop().time()
