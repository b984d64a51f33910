"""A crowd at the gateway: 200 visitors at once with room for 32, and thousands of idle connections.

    python -m benchmarks.crowd [--visitors 200] [--room 32] [--queue 64] [--tokens 24] [--idle 4000]

Two servers of tiny BLOOM and a gateway, processes of their own. Each visitor has an address of its own (in
`X-Forwarded-For`, from a trusted proxy), a connection and a prompt of its own; half of them stream. Who is
told 429 comes again when he was told to. Every answer is compared with what transformers generates from its
prompt. The rounds come once alone, and once beside idle connections and visitors who send 10 MB, junk and
half of a request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import resource
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from benchmarks.harness import SHAPES, checkpoint, reference, servers, workspace
from tests.cli.tokenizers_of_tests import save_words, words

SHAPE = "tiny"
VOCABULARY = SHAPES[SHAPE]["vocab_size"]
STOP_S = 30.0
GIVE_UP_S = 240.0
TLS = ssl.create_default_context()


@dataclass(frozen=True)
class Wanted:
    """A visitor's prompt, and the only right answer to it."""

    prompt: str
    text: str


@dataclass
class Visit:
    """What became of one visitor."""

    answered_s: float = 0.0
    refused: int = 0
    without_time: int = 0
    #: Statuses that are neither an answer nor 429.
    wrong_status: tuple[int, ...] = ()
    is_right: bool = False


class GatewayProcess:
    """`petal-swarm gateway` on loopback."""

    def __init__(self, model: Path, address: str, *options: str) -> None:
        command = [sys.executable, "-m", "petal_swarm.cli.gateway", "--model", str(model)]
        command += ["--model-name", "tiny", "--initial-peers", address, "--port", "0", "--threads", "1"]
        self._process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit(f"the gateway did not start: {' '.join(command)}")
        self.url = line.split()[1]

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def memory_mib(self, kind: str = "VmRSS") -> float:
        """Its resident memory; with `VmHWM` the most it ever was."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split(f"{kind}:")[1].split()[0]) / 1024

    def close(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(STOP_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


def wanted(path: Path, count: int, tokens: int) -> list[Wanted]:
    """Prompts of 4 to 60 words and the texts that transformers generates from them."""
    model, tokenizer = reference(path), words(VOCABULARY)
    draw = random.Random(3)
    each = []
    for _ in range(count):
        prompt = " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(draw.randint(4, 60)))
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[
                0, inputs.input_ids.shape[1] :
            ]
        each.append(Wanted(prompt, str(tokenizer.decode(new, skip_special_tokens=True))))
    return each


def client_of(url: str, headers: dict[str, str]) -> httpx.AsyncClient:
    """A visitor's. They share a TLS context, of which nobody makes use: making one takes 50 ms."""
    return httpx.AsyncClient(base_url=url, timeout=GIVE_UP_S, headers=headers, verify=TLS)


async def visit(url: str, number: int, want: Wanted, tokens: int) -> Visit:
    """Ask until answered."""
    result = Visit()
    body = {"model": "tiny", "prompt": want.prompt, "max_tokens": tokens, "temperature": 0}
    headers = {"X-Forwarded-For": f"10.1.{number // 250}.{number % 250 + 1}"}
    async with client_of(url, headers) as client:
        began = time.perf_counter()
        while time.perf_counter() - began < GIVE_UP_S:
            answer = await client.post("/v1/completions", json={**body, "stream": number % 2 == 0})
            if answer.status_code == 200:
                result.is_right = _text(answer).split() == want.text.split()
                break
            if answer.status_code != 429:
                result.wrong_status += (answer.status_code,)
                break
            result.refused += 1
            retry_s = answer.headers.get("retry-after")
            result.without_time += retry_s is None
            await asyncio.sleep(float(retry_s or 1))
    result.answered_s = time.perf_counter() - began
    return result


def _text(answer: httpx.Response) -> str:
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


async def crowd(url: str, wants: Sequence[Wanted], tokens: int) -> list[Visit]:
    """All at once."""
    return await asyncio.gather(*(visit(url, number, want, tokens) for number, want in enumerate(wants)))


@contextlib.asynccontextmanager
async def trouble(gateway: GatewayProcess, idle: int) -> AsyncIterator[None]:
    """Idle connections, half of which begin a request, kept up; and visitors who send what is no use."""

    async def one_idle(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(*gateway.address, local_addr=("127.0.0.2", 0))
                if number % 2:
                    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: ")
                await reader.read()  # until it is closed
                writer.close()
            await asyncio.sleep(1)

    async def one_rude(content: bytes) -> None:
        headers = {"X-Forwarded-For": "10.2.0.1"}
        async with client_of(gateway.url, headers) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.post("/v1/completions", content=content)
                    assert 400 <= answer.status_code < 500, answer.status_code
                await asyncio.sleep(0.2)

    rude = (b"x" * 10_000_000, b'{"model": "tiny", "prompt": "\xff', b'{"a":' * 100_000)
    tasks = [asyncio.create_task(one_idle(number)) for number in range(idle)]
    tasks += [asyncio.create_task(one_rude(content)) for content in rude]
    try:
        await asyncio.sleep(5)
        yield
        broken = [task.exception() for task in tasks if task.done()]
        assert not broken, broken[:3]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def report(name: str, visits: Sequence[Visit], took_s: float, tokens: int, gateway: GatewayProcess) -> None:
    """One line for a round."""
    times = sorted(each.answered_s for each in visits)
    right = sum(each.is_right for each in visits)
    odd = [status for each in visits for status in each.wrong_status]
    print(
        f"{name:<10} {right}/{len(visits)} right, {sum(each.refused for each in visits)} times 429"
        f" ({sum(each.without_time for each in visits)} without a time), other statuses: {odd or 'none'};"
        f" {right * tokens / took_s:.0f} tok/s, answered after {statistics.median(times):.2f} s"
        f" (p95 {times[int(len(times) * 0.95)]:.2f} s); gateway {gateway.memory_mib():.0f} MiB",
        flush=True,
    )


async def rounds(gateway: GatewayProcess, wants: Sequence[Wanted], arguments: argparse.Namespace) -> bool:
    """Whether every visitor got the right answer, and every refusal had a time."""
    everybody: list[Visit] = []

    async def measure(name: str) -> None:
        began = time.perf_counter()
        visits = await crowd(gateway.url, wants, arguments.tokens)
        report(name, visits, time.perf_counter() - began, arguments.tokens, gateway)
        everybody.extend(visits)

    await crowd(gateway.url, wants[: arguments.room], arguments.tokens)  # warm
    print(f"{'warm':<10} gateway {gateway.memory_mib():.0f} MiB")
    for _ in range(arguments.rounds):
        await measure("crowd")
    async with trouble(gateway, arguments.idle):
        for _ in range(arguments.rounds):
            await measure("+ trouble")
    await measure("after")
    print(f"{'most':<10} gateway {gateway.memory_mib('VmHWM'):.0f} MiB")
    return all(each.is_right and not each.without_time for each in everybody)


@contextlib.contextmanager
def serving(path: Path, arguments: argparse.Namespace) -> Iterator[GatewayProcess]:
    """A swarm of two, and the gateway before it."""
    options = ("--max-requests", str(arguments.room), "--max-queue", str(arguments.queue))
    with servers(path, ["0:4", "4:8"]) as swarm:
        gateway = GatewayProcess(path, swarm[0].address, "--trusted-proxy", "127.0.0.1", *options)
        try:
            yield gateway
        finally:
            gateway.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("visitors", 200), ("room", 32), ("queue", 64), ("tokens", 24), ("idle", 4000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with workspace() as folder:
        path = checkpoint(SHAPE, folder)
        save_words(path, VOCABULARY)
        wants = wanted(path, arguments.visitors, arguments.tokens)
        with serving(path, arguments) as gateway:
            fine = asyncio.run(rounds(gateway, wants, arguments))
    if not fine:
        raise SystemExit("not everybody got the right answer, or a time to come again")


if __name__ == "__main__":
    main()
