"""The official `openai` package against a real gateway process, over a real swarm of two servers."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import TETHERED, LocalSwarm, ServerProcess, wait_ready
from petal_swarm.cli.main import main
from tests.checkpoints import VOCABULARY, reference, save_bloom
from tests.cli.tokenizers_of_tests import save_words

KEY = "k-0123456789abcdef"
PROMPT = "w7 w11 w13"
IDS = [7, 11, 13]
WAIT_S = 20.0


@dataclass(frozen=True)
class Gateway:
    model: Path
    first: ServerProcess
    process: ServerProcess

    @property
    def url(self) -> str:
        return self.process.address.result()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)

    def arguments(self, *more: str) -> list[str]:
        words = ["--model", str(self.model), "--port", "0", "--threads", "1", "--wait", "0.5", *more]
        return [*words, "--initial-peers", self.first.address.result()]

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    model = save_bloom(folder / "tiny-bloom", blocks=4)
    save_words(model, VOCABULARY)
    keys = folder / "keys"
    keys.write_text(f"{KEY} tests\n")
    keys.chmod(0o600)
    common = [str(model), "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--kv-tokens", "4096"]
    common += ["--cache-dir", str(folder / "cache"), "--quant", "none"]
    with LocalSwarm() as servers, LocalSwarm(command=(*TETHERED, "gateway")) as gateways:
        first = servers.start("first", [*common, "--new-swarm", "--name", "alice", "--blocks", "0:2"])
        wait_ready([first], timeout_s=60, on_ready=lambda server: None)
        second = ["--name", "bob", "--blocks", "2:4", "--initial-peers", first.address.result()]
        waited = [servers.start("second", [*common, *second])]
        made = Gateway(model, first, first)
        process = gateways.start("gateway", made.arguments("--api-keys", str(keys), "--max-tokens", "1000"))
        wait_ready([*waited, process], timeout_s=60, on_ready=lambda server: None)
        yield Gateway(model, first, process)


def greedy(gateway: Gateway, count: int) -> str:
    tokens = reference(gateway.model).generate(
        torch.tensor([IDS]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return "".join(f" w{token}" for token in tokens[0, len(IDS) :].tolist())


def test_what_the_package_gets_is_what_the_model_says(gateway: Gateway) -> None:
    client = gateway.client()
    assert [model.id for model in client.models.list()] == ["tiny-bloom"]
    assert client.models.retrieve("tiny-bloom").owned_by == "petal-swarm"
    asked: Any = {"model": "tiny-bloom", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    raw = client.completions.with_raw_response.create(**asked)
    answer = raw.parse()
    expected = greedy(gateway, 20)
    assert answer.choices[0].text == expected
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)
    assert raw.headers["x-swarm-route"] == "you -> alice 0:2 -> bob 2:4 -> you"
    assert 'hop1;desc="bob 2:4"' in raw.headers["server-timing"]
    assert answer._request_id.startswith("req_")
    streamed = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(streamed)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == answer.usage


def test_a_chat_and_its_next_turn(gateway: Gateway) -> None:
    client = gateway.client()
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    first = client.chat.completions.create(model="tiny-bloom", messages=messages, max_tokens=5, seed=3)
    again = client.chat.completions.create(model="tiny-bloom", messages=messages, max_tokens=5, seed=3)
    assert first.choices[0].message.content == again.choices[0].message.content, "the same seed"
    said = first.choices[0].message
    messages += [{"role": said.role, "content": said.content}, {"role": "user", "content": "w17"}]
    stream = client.chat.completions.create(
        model="tiny-bloom",
        messages=messages,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage.prompt_tokens > first.usage.total_tokens


def test_choices_logprobs_and_scores(gateway: Gateway) -> None:
    client = gateway.client()
    chat = client.chat.completions.create(
        model="tiny-bloom",
        messages=[{"role": "user", "content": PROMPT}],
        n=3,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        presence_penalty=0.5,
        logit_bias={"5": -100},
    )
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert all(len(choice.logprobs.content[0].top_logprobs) == 2 for choice in chat.choices)
    scored = client.completions.create(model="tiny-bloom", prompt=[IDS], echo=True, logprobs=0, max_tokens=1)
    told = scored.choices[0].logprobs.token_logprobs
    with torch.inference_mode():
        logits = reference(gateway.model)(torch.tensor([IDS])).logits[0].log_softmax(-1)
    assert told[0] is None
    assert told[1:3] == pytest.approx([float(logits[0, 11]), float(logits[1, 13])], abs=1e-3)


def test_the_package_raises_what_it_should(gateway: Gateway) -> None:
    client = gateway.client()
    asked: Any = {"model": "tiny-bloom", "prompt": PROMPT}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**asked, max_tokens=5000)
    with pytest.raises(openai.AuthenticationError):
        gateway.client("k-wrong-wrong-wrong").completions.create(**asked)
    assert client.completions.create(**asked, max_tokens=1).usage.completion_tokens == 1, "it lives"


def test_who_hangs_up_is_worked_for_no_longer(gateway: Gateway) -> None:
    client = gateway.client()
    before = gateway.metric("petal_gateway_abandoned_total")
    stream = client.completions.create(
        model="tiny-bloom",
        prompt=PROMPT,
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + WAIT_S
    while gateway.metric("petal_gateway_abandoned_total") == before:
        assert time.monotonic() < deadline_s
    assert gateway.metric("petal_gateway_running") == 0
    assert gateway.metric("petal_gateway_new_tokens_total") < 1000


def test_the_other_addresses(gateway: Gateway) -> None:
    assert httpx.get(f"{gateway.url}/health").json() == {"status": "ok"}
    about = httpx.get(f"{gateway.url}/api/gateway").json()
    assert (about["needs_key"], about["models"][0]["id"]) == (True, "tiny-bloom")
    peers = httpx.get(f"{gateway.url}/api/swarm").json()["peers"]
    assert sorted(peer["name"] for peer in peers) == ["alice", "bob"]
    page = httpx.get(gateway.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_junk_on_the_socket_does_no_harm(gateway: Gateway) -> None:
    port = int(gateway.url.rpartition(":")[2])
    for junk in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert httpx.get(f"{gateway.url}/health").status_code == 200


def test_a_port_that_is_taken(gateway: Gateway, capsys: Any) -> None:
    port = gateway.url.rpartition(":")[2]
    words = [word if word != "0" else port for word in gateway.arguments()]
    assert main(["gateway", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"error: cannot listen at 127.0.0.1 port {port}: address already in use; choose another with --port"
    ]


def test_many_at_once_are_not_mixed_up(gateway: Gateway) -> None:
    client = gateway.client()
    prompts = [f"w{number} w{number + 1}" for number in range(2, 14)]

    def ask(prompt: str) -> str:
        answer = client.completions.create(model="tiny-bloom", prompt=prompt, max_tokens=12, temperature=0)
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    together = [""] * len(prompts)

    def work(index: int) -> None:
        together[index] = ask(prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) > 1


def test_at_last_a_signal_lets_running_answers_end(gateway: Gateway) -> None:
    client = gateway.client()
    stream = client.completions.create(
        model="tiny-bloom", prompt=PROMPT, max_tokens=60, stream=True, temperature=0
    )
    chunks = iter(stream)
    texts = [next(chunks).choices[0].text]
    os.kill(gateway.process.pid, signal.SIGTERM)
    texts += [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == greedy(gateway, 60)
    assert gateway.process.wait(WAIT_S) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
