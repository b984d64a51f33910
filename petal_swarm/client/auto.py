"""The entry points of the client library."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from petal_swarm.client.classification import SwarmModelForSequenceClassification
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.loading_bar import loading_bar
from petal_swarm.client.loop import LoopThread
from petal_swarm.client.model import CLOSE_TIMEOUT_S, SwarmModelForCausalLM
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.ends import load_ends
from petal_swarm.net.swarm_key import load_swarm_key

CONNECT_MARGIN_S = 30.0


class AutoSwarmModelForCausalLM:
    """Loads the client's part of a model and joins a swarm that serves its blocks."""

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        initial_peers: Sequence[str],
        transport: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        progress: bool = True,
        adapter: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> SwarmModelForCausalLM:
        """Read embeddings and LM head of `model`, and connect.

        Args:
            model: a Hugging Face id, a local folder, or a GGUF file; the same that the servers host.
            initial_peers: addresses of one or more servers, as printed after `ready`.
            transport: `p2pd`, `libp2p`, or `auto` for what works here.
            dtype, device: of embeddings and LM head.
            progress: show a progress bar while reading.
            adapter: a folder, or a repository of the Hugging Face Hub, in PEFT's format; or the name of an
                adapter that servers offer. It is used as it is; `load_adapter` is for training on.
            settings: further fields of `ClientConfig`, such as `swarm_key`, the file of a private swarm's
                key; and `revision`, `cache_dir`, `token` for the Hub.

        Raises:
            UnknownModelError, UnsupportedArchitectureError, CheckpointError: the model cannot be read.
            AdapterError: the adapter cannot be used with this model.
            PeerUnreachableError: no initial peer answers.
            ConfigError: an argument cannot be used.
        """
        return load_model(
            model,
            initial_peers=initial_peers,
            transport=transport,
            dtype=dtype,
            device=device,
            progress=progress,
            adapter=adapter,
            settings=settings,
        )[0]


class AutoSwarmModelForSequenceClassification:
    """As `AutoSwarmModelForCausalLM`, for a model that sorts whole texts into classes."""

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        initial_peers: Sequence[str],
        num_labels: int | None = None,
        transport: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        progress: bool = True,
        adapter: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> SwarmModelForSequenceClassification:
        """Read embeddings of `model`, and its head if it has one, and connect.

        Arguments and errors are those of `AutoSwarmModelForCausalLM.from_pretrained`; but `num_labels`, by
        default of the checkpoint's configuration. A head of another size, or where there is none, begins with
        random weights.
        """
        hub = _of_adapters(settings)
        client, checkpoint = load_model(
            model,
            initial_peers=initial_peers,
            transport=transport,
            dtype=dtype,
            device=device,
            progress=progress,
            with_head=False,
            settings=settings,
        )
        try:
            classifier = SwarmModelForSequenceClassification(client, num_labels)
            classifier.take_head(checkpoint)
            if adapter is not None:
                classifier.load_adapter(adapter, is_trainable=False, **hub)
        except BaseException:
            client.close()
            raise
        classifier.eval()
        return classifier


def load_model(
    model: str,
    *,
    initial_peers: Sequence[str],
    transport: str,
    dtype: torch.dtype,
    device: str | torch.device,
    progress: bool,
    settings: dict[str, Any],
    with_head: bool = True,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[SwarmModelForCausalLM, Checkpoint]:
    """As `AutoSwarmModelForCausalLM.from_pretrained`, perhaps without an LM head; and the checkpoint."""
    hub: dict[str, Any] = {
        name: settings.pop(name) for name in ("revision", "cache_dir", "token") if name in settings
    }
    peers = (initial_peers,) if isinstance(initial_peers, str) else tuple(initial_peers)
    config = ClientConfig(initial_peers=peers, transport=transport, **settings)
    load_swarm_key(config.swarm_key)  # a bad one is told before minutes of reading
    checkpoint = open_checkpoint(model, **hub)
    with loading_bar(f"loading {checkpoint.name}", shown=progress) as report:
        ends = load_ends(checkpoint, dtype=dtype, device=device, progress=report, with_head=with_head)
    ref = ModelRef(checkpoint.model_key, checkpoint.config.num_blocks, checkpoint.config.hidden_size)
    loop = LoopThread()
    try:
        swarm = loop.run(Swarm.connect(config), timeout_s=config.connect_timeout_s + CONNECT_MARGIN_S)
    except BaseException:
        loop.close()
        raise
    try:
        client = SwarmModelForCausalLM(checkpoint.hf_config(), ends, loop, swarm, ref)
    except BaseException:
        loop.run(swarm.close(), timeout_s=CLOSE_TIMEOUT_S)
        loop.close()
        raise
    try:
        client.generation_config = checkpoint.generation_config()
        client.eval()
        if adapter is not None:
            _use_adapter(client, adapter, _of_adapters(hub))
    except BaseException:
        client.close()
        raise
    return client, checkpoint


def _of_adapters(settings: dict[str, Any]) -> dict[str, str | None]:
    """A revision is the model's."""
    return {name: settings[name] for name in ("cache_dir", "token") if name in settings}


def _use_adapter(
    client: SwarmModelForCausalLM, adapter: str | os.PathLike[str], hub: dict[str, str | None]
) -> None:
    """Names of adapters that servers offer have no slash in them, ids of the Hub have one."""
    if "/" in os.fspath(adapter) or Path(adapter).is_dir():
        client.load_adapter(adapter, is_trainable=False, **hub)
    else:
        client.use_offered_adapter(os.fspath(adapter))
