"""The checks of `petal-swarm doctor`, in order; each says one thing in plain words, and what to do."""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from petal_swarm.directory.reachability import (
    CLOCK_TOLERANCE_S,
    Reachability,
    advice,
    candidates,
    clock_ahead_s,
    sentence,
)
from petal_swarm.directory.remote import RemoteDirectory, measure_rtt
from petal_swarm.directory.upload import measure_upload, shown
from petal_swarm.errors import ConfigError, NetworkError, PetalSwarmError
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.net.private import PrivateTransport
from petal_swarm.net.relay import Candidate
from petal_swarm.net.swarm_key import SwarmKey, load_swarm_key
from petal_swarm.net.transport import Transport
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.reachability import ReachabilityWatch
from petal_swarm.version import __version__

if TYPE_CHECKING:
    from petal_swarm.models.checkpoint import Checkpoint

PEER_TIMEOUT_S = 10.0
#: 2 Mbit/s: a prompt of 1,000 tokens of BLOOM-176B takes two minutes.
SLOW_BYTES_PER_S = 250e3
#: Asked at most how fast the line sends, each for a while: a swarm may have hundreds that cannot tell.
UPLOADS_TRIED = 4
#: Quantized blocks of one large model, and the model itself in the Hub's cache.
LITTLE_DISK_BYTES = 20 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """`state`: `ok`, `warning` or `problem`. `advice` is what to do next, empty if nothing.

    `details` are lines that say how `text` was found.
    """

    name: str
    state: str
    text: str
    advice: str = ""
    details: tuple[str, ...] = ()


async def examine(
    config: ServerConfig, show: Callable[[Check], None]
) -> tuple[list[Check], Reachability | None]:
    """All checks, each shown as soon as it is done; no verdict if the daemon does not start.

    Raises:
        ModelError: there is no such model.
    """
    key = load_swarm_key(config.swarm_key)
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        show(check)

    add(software())
    checkpoint = await asyncio.to_thread(_open, config.model) if config.model else None
    add(await asyncio.to_thread(hardware, config, checkpoint))
    add(disk(Path(config.cache_dir or "."), _free_bytes(Path(config.cache_dir or "."))))
    try:
        transport = await P2pdTransport.create(
            listen=config.listen_addresses(), announce=config.announce, reachability=config.reachability
        )
    except ConfigError as error:
        add(daemon_failed(error, config))
        return checks, None
    try:
        add(Check("network daemon", "ok", "starts"))
        asking = PrivateTransport(transport, key) if key else transport
        helpers = candidates(config.initial_peers)
        for check in await asyncio.gather(*(peer(asking, helper) for helper in helpers)):
            add(check)
        if checkpoint is not None and helpers:
            helpers = await more_helpers(asking, config, checkpoint.model_key, key)
        watch = ReachabilityWatch(
            transport,
            lambda: _given(helpers),
            peer=asking,
            private=config.reachability == "private",
            on_change=lambda verdict: None,
        )
        verdict = await watch.settle()
        add(clock(clock_ahead_s(watch.sightings)))
        if helpers:
            add(await upload(asking, helpers))
        add(reachability(verdict, watch.refusals))
    finally:
        await transport.close()
    return checks, verdict


def software() -> Check:
    """Versions of what a server needs."""
    versions = {name: _version(name) for name in ("torch", "transformers", "hivemind")}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"petal_swarm {__version__}, Python {platform.python_version()}, {named}"
    if versions["hivemind"] is None:
        return Check(
            "software",
            "problem",
            f"{text}; hivemind is missing",
            "servers need it: pip install hivemind (Linux x86-64 only); clients go with --transport libp2p",
        )
    return Check("software", "ok", text)


def hardware(config: ServerConfig, checkpoint: Checkpoint | None) -> Check:
    """The device that a server would take, its free memory, and how much of the model fits."""
    import torch

    from petal_swarm.server.hardware import free_bytes, resolve_device
    from petal_swarm.server.loader import Loader

    try:
        device = resolve_device(config.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        text = f"{name}, {free_bytes(device) / 2**30:.1f} GiB free"
        if checkpoint is None:
            return Check("hardware", "ok", text)
        plan = Loader(config, checkpoint).plan(None)
    except ConfigError as error:
        return Check(
            "hardware", "problem", str(error), "close other programs, or take a smaller model or --quant"
        )
    return Check(
        "hardware",
        "ok",
        f"{text}: {plan.num_blocks} of {checkpoint.config.num_blocks} blocks of {checkpoint.name} fit",
        details=tuple(plan.lines()),
    )


def disk(folder: Path, free_bytes: int) -> Check:
    """Room for what is kept between starts."""
    text = f"{free_bytes / 2**30:.0f} GiB free for {folder}"
    if free_bytes < LITTLE_DISK_BYTES:
        return Check(
            "disk",
            "warning",
            text,
            "large models may not fit; put the cache elsewhere with --cache-dir FOLDER",
        )
    return Check("disk", "ok", text)


def daemon_failed(error: ConfigError, config: ServerConfig) -> Check:
    """The daemon did not start: mostly a port that is taken."""
    listen = ", ".join(config.listen)
    return Check(
        "network daemon",
        "problem",
        str(error),
        f"is a server running here already, on {listen}? Ask about another port" if listen else "",
    )


async def peer(transport: Transport, helper: Candidate) -> Check:
    """Whether an initial peer can be reached from here, and how far it is."""
    name = f"peer ..{helper.peer_id[-8:]}"
    try:
        rtt_s = await measure_rtt(transport, helper.peer_id, helper.addresses, timeout_s=PEER_TIMEOUT_S)
    except NetworkError as error:
        return Check(
            name,
            "problem",
            str(error),
            "is a server running there, and is this the address that it printed after `ready`?",
        )
    except PetalSwarmError as error:
        return Check(name, "problem", f"answers with something else: {error}", "is it a petal_swarm server?")
    return Check(name, "ok", f"reached in {1e3 * rtt_s:.2g} ms there and back")


async def upload(transport: Transport, helpers: Sequence[Candidate]) -> Check:
    """How fast the line sends, to the first peer that tells."""
    for helper in helpers[:UPLOADS_TRIED]:
        try:
            rate = await measure_upload(transport, helper.peer_id, helper.addresses)
        except PetalSwarmError:
            continue  # an older version, or busy
        text = f"{shown(rate)} to ..{helper.peer_id[-8:]}"
        if rate < SLOW_BYTES_PER_S:
            return Check("upload", "warning", text, "long prompts will mostly go through faster servers")
        return Check("upload", "ok", text)
    return Check("upload", "warning", "nobody could tell how fast it is")


async def more_helpers(
    transport: Transport, config: ServerConfig, model_key: str, key: SwarmKey | None
) -> list[Candidate]:
    """The initial peers, and servers of the model that they know of."""
    try:
        known = await RemoteDirectory(transport, config.initial_peers, key=key).lookup(model_key)
    except NetworkError:
        known = []  # the peers' own checks have said so
    return candidates(config.initial_peers, known)


def clock(ahead_s: float | None) -> Check:
    """This machine's clock against the others'; announcements are refused when it is off by more than 5 s."""
    if ahead_s is None:
        return Check("clock", "warning", "nobody told the time")
    if abs(ahead_s) <= CLOCK_TOLERANCE_S:
        return Check("clock", "ok", "agrees with the swarm's")
    direction = "behind" if ahead_s > 0 else "ahead of"
    return Check(
        "clock",
        "problem",
        f"{abs(ahead_s):,.0f} s {direction} the swarm's",
        "set it, or let the system do so (timedatectl set-ntp true): others refuse what a wrong clock says",
    )


def reachability(verdict: Reachability, refusals: str) -> Check:
    """The verdict as a check. What relays said is told only where it matters."""
    state = {"direct": "ok", "relay": "warning"}.get(verdict.kind, "problem")
    why = f" (relays: {refusals})" if refusals and verdict.kind == "none" else ""
    return Check("reachability", state, sentence(verdict) + why, advice(verdict))


def _open(model: str) -> Checkpoint:
    from petal_swarm.models.checkpoint import open_checkpoint

    return open_checkpoint(model)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(folder: Path) -> int:
    """Free on the disk of `folder`, or of the nearest one above that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


async def _given(helpers: Sequence[Candidate]) -> Sequence[Candidate]:
    return helpers
