"""Relays and the doctor with real daemons: three processes, one of them behind another."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base58
import pytest

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import LocalSwarm, ServerProcess, wait_ready
from petal_swarm.cli.main import main
from petal_swarm.net.addresses import is_circuit
from petal_swarm.net.p2pd_addresses import address_from_bytes, address_to_bytes
from tests.checkpoints import VOCABULARY, reference, save_bloom
from tests.cli.tokenizers_of_tests import save_words

# hivemind finds its daemon by an old function of importlib.resources.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


@dataclass(frozen=True)
class Swarm:
    model: Path
    relay: ServerProcess
    hidden: ServerProcess

    @property
    def address(self) -> str:
        return self.relay.address.result()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    model = save_bloom(tmp_path_factory.mktemp("reach") / "tiny-bloom", blocks=4)
    save_words(model, VOCABULARY)
    common = [str(model), "--threads", "1", "--kv-tokens", "256", "--quant", "none"]
    common += ["--cache-dir", str(model.parent / "cache")]
    with LocalSwarm() as servers:
        first = [
            "--listen",
            "/ip4/127.0.0.1/tcp/0",
            "--reachability",
            "public",
            "--new-swarm",
            "--blocks",
            "0:2",
        ]
        relay = servers.start("relay", [*common, *first])
        wait_ready([relay], timeout_s=60, on_ready=lambda server: None)
        nowhere = ["--listen", "none", "--reachability", "private", "--initial-peers", relay.address.result()]
        hidden = servers.start("hidden", [*common, *nowhere, "--blocks", "2:4"])
        wait_ready([hidden], timeout_s=60, on_ready=lambda server: None)
        yield Swarm(model, relay, hidden)


def doctor(capsys: Any, *argv: object) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--json", "--device", "cpu", *map(str, argv)])
    return status, json.loads(capsys.readouterr().out)


def test_a_server_that_listens_nowhere_is_used_through_a_relay(swarm: Swarm, capsys: Any) -> None:
    from transformers import AutoTokenizer

    address = swarm.hidden.address.result()
    assert is_circuit(address)
    assert address.startswith(swarm.address)
    assert main(["status", str(swarm.model), "--initial-peers", swarm.address, "--json"]) == 0
    peers = json.loads(capsys.readouterr().out)["peers"]
    assert [peer["addresses"] for peer in peers] == [[swarm.address], [address]]

    program = [sys.executable, "-m", "petal_swarm.cli.main", "generate", str(swarm.model), "the w7 w9 w30 w2"]
    options = ["--max-new-tokens", "24", "--temperature", "0", "--initial-peers", swarm.address]
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(swarm.model)
    ids = tokenizer("the w7 w9 w30 w2", return_tensors="pt")["input_ids"]
    answer = reference(swarm.model).generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert done.stdout.strip() == expected.strip()


def test_the_doctor_finds_a_machine_that_can_be_reached(swarm: Swarm, capsys: Any) -> None:
    status, found = doctor(capsys, swarm.model, "--initial-peers", swarm.address)
    assert status == 0
    assert found["reachability"]["kind"] == "direct"
    assert found["reachability"]["scope"] == "machine"
    assert found["reachability"]["observed_ips"] == ["127.0.0.1"]
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["clock"] == states["reachability"] == states["network daemon"] == "ok"


def test_the_doctor_finds_a_relay(swarm: Swarm, capsys: Any) -> None:
    hidden = ["--listen", "none", "--reachability", "private"]
    status, found = doctor(capsys, *hidden, "--initial-peers", swarm.address)
    assert status == 0
    assert found["reachability"]["kind"] == "relay"
    assert all(map(is_circuit, found["reachability"]["addresses"]))


def test_the_doctor_finds_that_nobody_answers(capsys: Any) -> None:
    status, found = doctor(capsys, "--initial-peers", NOBODY)
    assert status == 1
    assert found["reachability"]["kind"] == "unknown"
    assert not found["reachable"]


def test_the_doctor_finds_a_port_that_is_taken(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, found = doctor(capsys, "--listen", f"/ip4/127.0.0.1/tcp/{port}", "--initial-peers", NOBODY)
    assert status == 1
    assert found["reachability"] is None
    assert found["checks"][-1]["state"] == "problem"
    assert str(port) in found["checks"][-1]["advice"]


def test_the_doctor_says_it_in_plain_words(swarm: Swarm, capsys: Any) -> None:
    assert main(["doctor", "--initial-peers", swarm.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok   reachability: others can reach this machine directly") for line in lines)
    assert main(["doctor", "--reachability", "private", "--listen", "none"]) == 2


def test_addresses_with_peers_inside_in_bytes() -> None:
    """hivemind writes an Ed25519 peer as a CID, which the daemon refuses before `/p2p-circuit`."""
    peer_id = NOBODY.rpartition("/")[2]
    encoded = address_to_bytes(f"{NOBODY}/p2p-circuit")
    assert encoded == bytes.fromhex("047f000001060001a50326") + base58.b58decode(peer_id) + bytes.fromhex(
        "a202"
    )
    for address in (
        f"{NOBODY}/p2p-circuit",
        NOBODY,
        "/ip4/1.2.3.4/tcp/5",
        "/ip6/::1/udp/5/quic-v1",
        "/p2p-circuit",
    ):
        assert address_from_bytes(address_to_bytes(address)) == address
    for bad in ("nonsense", "/ip4/1.2.3/tcp/5", "/ip4/1.2.3.4/tcp/5/p2p/0OIl/p2p-circuit"):
        with pytest.raises(ValueError, match=r"\S"):
            address_to_bytes(bad)
