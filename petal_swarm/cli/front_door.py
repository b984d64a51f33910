"""The life of a gateway process: from its arguments to `ready`, and from a signal to the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from petal_swarm.cli.signals import Signals, first_of
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.generation.generator import Generator, connect_generator
from petal_swarm.errors import ConfigError, PetalSwarmError
from petal_swarm.gateway.config import DEFAULT_CHOICES, GatewayConfig
from petal_swarm.gateway.front_door import FrontDoor, LineConfig
from petal_swarm.gateway.guard import PRIVATE, PUBLIC, Guard, GuardConfig, Limits, hosts_of
from petal_swarm.gateway.guard.config import is_loopback
from petal_swarm.gateway.metrics import Metrics
from petal_swarm.gateway.serving import listen
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.routing.blocks import format_blocks, latest, missing_blocks
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger("petal_swarm.cli")

#: Leaving the swarm has deadlines of its own; this is for the sum.
CLOSE_TIMEOUT_S = 10.0
#: To ask who serves what.
LOOK_TIMEOUT_S = 5.0
KIB = 1 << 10


async def serve(arguments: argparse.Namespace) -> int:
    """Join the swarm, open the door, and keep it open until a signal comes. Returns the exit status."""
    signals = Signals()
    opening = asyncio.create_task(_open(arguments))
    await first_of(opening, signals.first)
    if not opening.done():
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        return 0
    generator, door = opening.result()
    # What was loaded stays. To look through all of it for garbage takes 0.15 s, and all answers would wait.
    gc.collect()
    gc.freeze()
    try:
        _reload_keys_on_hangup(door.guard)
        print(f"ready {door.url}", flush=True)
        _describe(arguments, door)
        looking = asyncio.create_task(_tell_missing(generator))
        await signals.first
        looking.cancel()
        running = door.gateway.num_running
        if running:
            print(
                f"leaving: {running} {'answer is' if running == 1 else 'answers are'} under way, waiting"
                f" up to {arguments.drain_timeout:g} s; Ctrl-C again leaves at once",
                file=sys.stderr,
                flush=True,
            )
        closing = asyncio.create_task(door.close(arguments.drain_timeout))
        await first_of(closing, signals.second)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await _leave(generator)
    return 0


async def _open(arguments: argparse.Namespace) -> tuple[Generator, FrontDoor]:
    """Everything between the arguments and a gateway that serves; leaves nothing behind if it fails."""
    client = ClientConfig(
        initial_peers=tuple(arguments.initial_peers),
        transport=arguments.transport,
        swarm_key=arguments.swarm_key,
        identity=arguments.identity,
        wait_for_blocks_s=arguments.wait_s,
    )
    # What is cheap to find out comes before the model and the swarm, which take seconds.
    metrics = Metrics()
    guard = Guard(guard_config(arguments), on_refusal=metrics.guarded)
    line = LineConfig(max_requests=arguments.max_requests, max_queue=arguments.max_queue)
    bound = listen(arguments.host, arguments.port)
    try:
        checkpoint = await asyncio.to_thread(open_checkpoint, arguments.model)
        config = GatewayConfig(
            model_name=arguments.model_name or checkpoint.name,
            max_tokens=arguments.max_tokens,
            max_choices=min(DEFAULT_CHOICES, arguments.max_requests),
        )
        generator = await connect_generator(
            arguments.model,
            client,
            dtype=getattr(torch, arguments.dtype),
            adapters=dict(arguments.adapters),
            progress=sys.stderr.isatty(),
        )
        try:
            return generator, await FrontDoor.open(generator, bound, config, guard, metrics, line)
        except BaseException:
            await _leave(generator)
            raise
    except BaseException:
        bound.close()
        raise


async def _leave(generator: Generator) -> None:
    await generator.close()
    await generator.swarm.close()


def guard_config(arguments: argparse.Namespace) -> GuardConfig:
    """The door's rules. Limits are those of a public gateway if anybody but this machine can come.

    Raises:
        ConfigError: an option cannot be used.
    """
    private = is_loopback(arguments.host) and not arguments.trusted_proxy
    usual = PRIVATE if private else PUBLIC
    given = {
        "requests_per_min": arguments.requests_per_min,
        "tokens_per_min": arguments.tokens_per_min,
        "max_requests": arguments.requests_at_once,
    }
    limits = Limits(
        **{
            name: getattr(usual, name) if value is None else value or None  # 0 is no limit
            for name, value in given.items()
        }
    )
    if arguments.allow_anonymous and arguments.api_keys is None:
        raise ConfigError("--allow-anonymous is for a gateway with --api-keys")
    hosts = hosts_of(arguments.host)
    return GuardConfig(
        limits=limits,
        keys_file=Path(arguments.api_keys) if arguments.api_keys else None,
        allow_anonymous=arguments.allow_anonymous,
        trusted_proxies=tuple(arguments.trusted_proxy),
        allowed_hosts=None if hosts is None else (*hosts, *(host.lower() for host in arguments.allow_host)),
        cors_origins=tuple(arguments.cors),
        max_body_bytes=arguments.max_body_kib * KIB,
    )


def _describe(arguments: argparse.Namespace, door: FrontDoor) -> None:
    """Say on stderr what can be done with it."""
    lines = [
        f"serving {door.gateway.config.model_name}",
        f"in a browser: {door.url}   the swarm: {door.url}/swarm",
        f'in Python:    openai.OpenAI(base_url="{door.url}/v1", api_key={_key_shown(arguments)})',
    ]
    if is_loopback(arguments.host):
        lines.append("only this machine can reach it; to let others in, add --host 0.0.0.0")
    elif not arguments.api_keys:
        lines.append(
            "anybody who can reach this machine may use it; for those with a key only, add --api-keys"
        )
    print("\n".join(lines), file=sys.stderr)


async def _tell_missing(generator: Generator) -> None:
    """Say on stderr which blocks nobody serves, if there are any: it is `ready` all the same."""
    swarm, ref = generator.swarm, generator.ref
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            known = await swarm.view.announcements(ref.key)
    except (PetalSwarmError, TimeoutError):
        print("who serves which blocks is not known yet", file=sys.stderr, flush=True)
        return
    print(missing_words(known, ref.num_blocks), end="", file=sys.stderr, flush=True)


def missing_words(known: Iterable[Announcement], num_blocks: int) -> str:
    """What to say of the blocks that nobody serves; nothing if there are none."""
    peers = latest(known)
    missing = missing_blocks([peer for peer in peers if peer.state == "serving"], num_blocks)
    if not missing:
        return ""
    told = f"nobody serves {format_blocks(missing)} now, so that nobody can be answered"
    if any(peer.state == "joining" and any(block in peer.span for block in missing) for peer in peers):
        return f"{told}; a server of some of them is still joining\n"
    return f"{told}; start servers of them: the gateway finds them by itself\n"


def _key_shown(arguments: argparse.Namespace) -> str:
    return '"none"' if arguments.api_keys is None or arguments.allow_anonymous else "KEY"


def _reload_keys_on_hangup(guard: Guard) -> None:
    def reload() -> None:
        try:
            number = guard.reload_keys()
        except ConfigError as error:
            logger.error("the keys are as before: %s", error)
        else:
            told = "there are no keys to read: --api-keys" if number is None else f"keys read again: {number}"
            print(told, file=sys.stderr, flush=True)

    if hasattr(signal, "SIGHUP"):
        with contextlib.suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
