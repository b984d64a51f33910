"""petal_swarm: run large language models together, each peer hosting some of the blocks.

The names below are loaded on first use, so that `import petal_swarm` stays cheap and free of side
effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from petal_swarm.version import __version__

if TYPE_CHECKING:
    from petal_swarm.cli.local_swarm import serve_locally as serve_locally
    from petal_swarm.client.auto import AutoSwarmModelForCausalLM as AutoSwarmModelForCausalLM
    from petal_swarm.client.auto import (
        AutoSwarmModelForSequenceClassification as AutoSwarmModelForSequenceClassification,
    )
    from petal_swarm.models.adapter_settings import Lora as Lora
    from petal_swarm.models.adapter_settings import Prefix as Prefix
    from petal_swarm.models.adapter_settings import SoftPrompt as SoftPrompt
    from petal_swarm.span import Span as Span

_LAZY = {
    "AutoSwarmModelForCausalLM": "petal_swarm.client.auto",
    "AutoSwarmModelForSequenceClassification": "petal_swarm.client.auto",
    "Lora": "petal_swarm.models.adapter_settings",
    "Prefix": "petal_swarm.models.adapter_settings",
    "SoftPrompt": "petal_swarm.models.adapter_settings",
    "Span": "petal_swarm.span",
    "serve_locally": "petal_swarm.cli.local_swarm",
}

__all__ = [
    "AutoSwarmModelForCausalLM",
    "AutoSwarmModelForSequenceClassification",
    "Lora",
    "Prefix",
    "SoftPrompt",
    "Span",
    "__version__",
    "serve_locally",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
