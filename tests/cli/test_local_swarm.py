"""Server processes, with small programs in the place of servers."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from petal_swarm.cli.common import add_adapter_option, add_client_options, add_loading_options, new_parser
from petal_swarm.cli.demo import ask, build_parser, client_arguments
from petal_swarm.cli.local_swarm import (
    LocalSwarm,
    ServerProcess,
    ended_by_signals,
    serve_locally,
    server_arguments,
    split_evenly,
    wait_ready,
)
from petal_swarm.errors import DeadlineError, SwarmError
from petal_swarm.span import Span
from tests.checkpoints import save_llama
from tests.cli.fakes import FakeModel
from tests.cli.tokenizers_of_tests import characters

READY = "print('loading'); print('ready', '/ip4/addr', flush=True); import sys; sys.stdin.read()"
FAILS = "import sys; print('noise', file=sys.stderr); sys.exit('error: no such model')"
SILENT = "import sys; sys.stdin.read()"
#: Ignores SIGTERM, and has a child as a server has its daemon.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready", child.pid, flush=True)
child.wait()
"""
#: A starter that is about to be killed: prints the pids of its server and of the server's child.
STARTER = """
import subprocess, sys, time
from petal_swarm.cli.local_swarm import ServerProcess
server = ServerProcess("s", ["server"], command=[sys.executable, "-c", sys.argv[1]])
print(server.pid, server.address.result(60), flush=True)
time.sleep(600)
"""
TETHERED = """
import subprocess, sys, time
from petal_swarm.cli import run_server, tethered
def serve(argv, prog):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("ready", child.pid, flush=True)
    child.wait()
run_server.main = serve
tethered.GRACE_S = 0.1
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tethered.main(["run-server"])
"""


@contextlib.contextmanager
def process(program, name="server"):
    started = ServerProcess(name, ["server"], command=[sys.executable, "-c", program])
    try:
        yield started
    finally:
        started.kill(after_s=0)


def await_end(*pids):
    """Wait until none of these is left, but as a zombie."""
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert all(entry.status() == psutil.STATUS_ZOMBIE for entry in alive)


def test_the_address_is_what_follows_ready():
    with process(READY) as server:
        told = []
        wait_ready([server], timeout_s=60, on_ready=told.append)
        assert told == [server]
        assert server.address.result() == "/ip4/addr"


def test_a_server_that_does_not_start_says_why():
    with (
        process(FAILS, "demo-2") as server,
        pytest.raises(SwarmError, match="demo-2 did not start: no such model"),
    ):
        wait_ready([server], timeout_s=60, on_ready=lambda server: None)


def test_a_server_that_says_nothing_at_all():
    with process("raise SystemExit(3)") as server, pytest.raises(SwarmError, match="status 3"):
        wait_ready([server], timeout_s=60, on_ready=lambda server: None)


def test_waiting_has_an_end():
    with process(SILENT, "demo-1") as server, pytest.raises(DeadlineError, match="demo-1 did not start"):
        wait_ready([server], timeout_s=0.1, on_ready=lambda server: None)


def test_kill_leaves_nothing_of_a_stubborn_server_and_its_daemon():
    with process(STUBBORN) as server:
        daemon = int(server.address.result(60))
        server.terminate()
        server.kill(after_s=0.1)
        await_end(server.pid, daemon)


def test_kill_ends_the_daemon_of_a_server_that_died():
    with process(STUBBORN) as server:
        daemon = int(server.address.result(60))
        os.kill(server.pid, signal.SIGKILL)
        server.kill(after_s=60)
        await_end(daemon)


def test_a_server_ends_with_its_starter_even_after_kill_9():
    starter = subprocess.Popen([sys.executable, "-c", STARTER, TETHERED], stdout=subprocess.PIPE)
    with starter:
        pids = [int(word) for word in starter.stdout.readline().split()]
        starter.kill()
    assert len(pids) == 2
    await_end(*pids)


def test_a_swarm_ends_its_servers_even_when_interrupted():
    pids = []

    def interrupted_demo():
        with LocalSwarm(command=[sys.executable, "-c", STUBBORN], stop_s=0.1) as swarm:
            for name in ("a", "b"):
                server = swarm.start(name, [])
                pids.extend([server.pid, int(server.address.result(60))])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_demo()
    assert len(pids) == 4
    await_end(*pids)


#: A server that says what it was told: its peers' address, name and blocks.
TALKATIVE = """
import sys
words = sys.argv[1:]
print("ready", "/" + "-".join(words[words.index(option) + 1] for option in ("--name", "--blocks")
      + ("--initial-peers",) * ("--initial-peers" in words)), flush=True)
sys.stdin.read()
"""


def test_a_local_swarm_shares_out_the_blocks_and_all_join_the_first(tmp_path):
    model = str(save_llama(tmp_path / "model", blocks=5))
    told = []
    with serve_locally(model, servers=3, tell=told.append, command=_program(TALKATIVE)) as swarm:
        first, *others = swarm.addresses
    assert first == "/local-1-0:1"
    assert sorted(others) == [f"/local-2-1:3-{first}", f"/local-3-3:5-{first}"]
    assert sorted(told) == [
        f"local-{n} serves blocks {span}" for n, span in enumerate(("0:1", "1:3", "3:5"), 1)
    ]


def test_a_local_swarm_that_cannot_start_leaves_nothing(tmp_path):
    model = str(save_llama(tmp_path / "model", blocks=2))
    with pytest.raises(SwarmError, match="local-1 did not start: no such model"):
        serve_locally(model, command=_program(FAILS))


def _program(text):
    return [sys.executable, "-c", text]


def test_sigterm_unwinds():
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is earlier


@pytest.mark.parametrize(
    ("blocks", "parts", "expected"),
    [
        (30, 3, ["0:10", "10:20", "20:30"]),
        (8, 3, ["0:2", "2:5", "5:8"]),
        (2, 3, ["0:1", "1:2"]),
        (4, 1, ["0:4"]),
    ],
)
def test_split_evenly(blocks, parts, expected):
    assert [str(span) for span in split_evenly(blocks, parts)] == expected


def test_servers_of_a_local_swarm_stay_on_this_machine():
    first = server_arguments("m", Span(0, 4), name="demo-1", threads=1)
    second = server_arguments("m", Span(4, 8), name="demo-2", threads=1, address="/ip4/addr")
    for words in (first, second):
        assert words[words.index("--listen") + 1] == "/ip4/127.0.0.1/tcp/0"
    assert "--new-swarm" in first
    assert second[second.index("--initial-peers") + 1] == "/ip4/addr"
    assert second[second.index("--name") + 1] == "demo-2"


def test_the_client_of_the_demo_has_all_options_of_a_client():
    client = client_arguments(build_parser().parse_args([]), "/ip4/addr")
    parser = new_parser("client", "", "")
    add_client_options(parser)
    add_loading_options(parser)
    add_adapter_option(parser)
    known = vars(parser.parse_args(["m", "--initial-peers", "/ip4/127.0.0.1/tcp/1/p2p/12D3Koo"]))
    assert set(vars(client)) == set(known)


def test_the_demo_shows_question_answer_route_and_speed(capsys):
    tokenizer = characters()
    ask(FakeModel(tokenizer, "Because."), tokenizer, build_parser().parse_args(["Why?"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:6] == ["> Why?", "", "Because.", "", "every token went you -> someone 0:4 -> you"]
    assert lines[6].startswith("9 tokens, ")
