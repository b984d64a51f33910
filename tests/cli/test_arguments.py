import json
import subprocess
import sys

import pytest

from petal_swarm.cli import chat, demo, generate, run_server, status
from petal_swarm.cli.common import run_program
from petal_swarm.cli.main import COMMANDS, main
from petal_swarm.errors import NetworkError
from petal_swarm.version import __version__

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


def run(capsys, *argv):
    """Exit status, stdout and the lines of stderr."""
    try:
        code = main(list(argv))
    except SystemExit as exited:
        code = exited.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def refused(capsys, *argv):
    code, out, err = run(capsys, *argv)
    assert (code, out, len(err)) == (2, "", 1), err
    return err[0]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"\n  petal-swarm {name} " in out
    assert "examples:" in out
    assert max(map(len, out.splitlines())) <= 110
    assert run(capsys, "help", name)[1] == out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_slow(name):
    code = (
        "import sys\nfrom petal_swarm.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'hivemind', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert run(capsys, "--version")[1] == f"petal_swarm {__version__}\n"


def test_an_unknown_command_suggests_one(capsys):
    assert "did you mean 'generate'" in refused(capsys, "genrate")
    assert "no command 'xyzzy'" in refused(capsys, "xyzzy")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["generate"], "MODEL, --initial-peers"),
        (["generate", "m", "hi"], "--initial-peers"),
        (["generate", "m", "--initial-peers", PEER, "hi"], "'hi' is not an address"),
        (["generate", "m", "hi", "--initial-peers", PEER, "--top-p", "2"], "--top-p: expected"),
        (["generate", "m", "hi", "--initial-peers", PEER, "--temperature", "hot"], "--temperature: expected"),
        (["generate", "m", "hi", "--initial-peers", PEER, "--temperature", "nan"], "--temperature: expected"),
        (["generate", "m", "hi", "--initial-peers", PEER, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "m", "hi", "--initial-peers", PEER, "--transport", "pigeon"], "--transport"),
        (["chat", "m"], "--initial-peers"),
        (["tune", "m", "--data", "d", "--initial-peers", PEER], "--out"),
        (["tune", "m", "--data", "d", "--out", "o", "--rank", "0", "--initial-peers", PEER], "--rank"),
        (["status"], "MODEL, --initial-peers"),
        (["demo", "--servers", "0"], "--servers"),
        (["run-server", "m"], "--new-swarm"),
        (["run-server", "--initial-peers", PEER, "m"], "other arguments go before --initial-peers"),
        (["run-server", "m", "--new-swarm", "--initial-peers", PEER], "not both"),
        (["run-server", "m", "--new-swarm", "--blocks", "4"], "START:END"),
        (["run-server", "m", "--new-swarm", "--blocks", "4:4"], "start < end"),
        (["run-server", "m", "--new-swarm", "--blocks", "0:4", "--num-blocks", "4"], "not both"),
        (["run-server", "m", "--new-swarm", "--blocks", "0:4", "--rebalance"], "--blocks stays"),
        (["run-server", "m", "--new-swarm", "--threads", "0"], "--threads"),
        (["run-server", "m", "--new-swarm", "--max-mbit-per-peer", "0"], "--max-mbit-per-peer must be"),
        (["run-server", "m", "--new-swarm", "--max-mbit-per-peer", "nan"], "--max-mbit-per-peer must be"),
        (["run-server", "m", "--new-swarm", "--upload-mbit", "0"], "--upload-mbit must be 0.1 to 1,000,000"),
        (["run-server", "m", "--new-swarm", "--upload-mbit", "nan"], "--upload-mbit must be"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(capsys, argv, expected):
    assert expected in refused(capsys, *argv)


@pytest.fixture
def unusable(tmp_path):
    """A folder that is no checkpoint, one of an architecture that is not supported, one without tokenizer."""
    (tmp_path / "empty").mkdir()
    for name, kind in (("gpt2", "GPT2LMHeadModel"), ("bloom", "BloomForCausalLM")):
        (tmp_path / name).mkdir()
        config = {"model_type": name, "architectures": [kind], "hidden_size": 64, "n_layer": 2, "n_head": 4}
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    return tmp_path


@pytest.mark.parametrize(
    "command", [["generate", "hi"], ["chat"], ["demo"], ["status"], ["run-server"], ["tune"]]
)
@pytest.mark.parametrize(
    ("name", "expected"),
    [("nowhere", "nowhere"), ("empty", "config.json"), ("gpt2", "GPT2LMHeadModel is not supported")],
)
def test_models_that_cannot_be_used(capsys, unusable, command, name, expected):
    model = str(unusable / name)
    files = ["--data", str(unusable / "data"), "--out", str(unusable / "out")]
    options = {"demo": ["--model", model], "run-server": [model, "--new-swarm"]}
    options["tune"] = [model, *files, "--initial-peers", PEER]
    argv = options.get(command[0], [model, *command[1:], "--initial-peers", PEER])
    assert expected in refused(capsys, command[0], *argv)


def test_a_model_without_tokenizer(capsys, unusable):
    message = refused(capsys, "generate", str(unusable / "bloom"), "hi", "--initial-peers", PEER)
    assert "has no tokenizer" in message


def test_a_prompt_may_follow_options():
    for argv in (["m", "hi", "--initial-peers", PEER], ["m", "--initial-peers", PEER, "--seed", "1", "hi"]):
        arguments = generate.build_parser().parse_intermixed_args(argv)
        assert (arguments.model, arguments.prompt, arguments.initial_peers) == ("m", "hi", [PEER])


@pytest.mark.parametrize("module", [chat, demo, generate, run_server, status])
def test_every_command_can_be_run_as_a_module(module):
    assert callable(module.main)
    assert callable(module.run)


def test_errors_are_one_line_even_if_their_message_is_not(capsys):
    def work(arguments):
        raise NetworkError("first\n  second")

    arguments = status.build_parser().parse_args(["m", "--initial-peers", PEER])
    assert run_program(work, arguments) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_ctrl_c_is_status_130():
    def work(arguments):
        raise KeyboardInterrupt

    arguments = status.build_parser().parse_args(["m", "--initial-peers", PEER])
    assert run_program(work, arguments) == 130


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("auto", "/cache/petal_swarm")),
        (["--kv-dtype", "int8", "--cache-dir", "/elsewhere"], ("int8", "/elsewhere")),
        (["--cache-dir", "none"], ("auto", None)),
    ],
)
def test_options_of_the_kv_cache_and_of_what_is_kept(monkeypatch, options, expected):
    from petal_swarm.cli import serve
    from petal_swarm.server import config

    seen = []

    async def stub(config):
        seen.append((config.kv_dtype, config.cache_dir))
        return 0

    monkeypatch.setattr(config, "default_cache_dir", lambda environment, home: "/cache/petal_swarm")
    monkeypatch.setattr(serve, "serve", stub)
    assert run_server.run(run_server.build_parser().parse_args(["m", "--new-swarm", *options])) == 0
    assert seen == [expected]


def test_the_option_of_bandwidth_is_a_limit_of_sessions():
    from petal_swarm.server.config import ServerConfig, SessionLimits

    arguments = run_server.build_parser().parse_args(["m", "--new-swarm"])
    config = ServerConfig(model="m", new_swarm=True, max_mbit_per_peer=arguments.max_mbit_per_peer)
    assert config.session_limits() == SessionLimits()
    config = ServerConfig(model="m", new_swarm=True, max_mbit_per_peer=8)
    assert config.session_limits().max_bytes_per_s_of_peer == 1e6


def test_a_line_that_is_told_is_announced_in_bytes():
    from petal_swarm.server.config import ServerConfig

    arguments = run_server.build_parser().parse_args(["m", "--new-swarm", "--upload-mbit", "40"])
    config = ServerConfig(model="m", new_swarm=True, upload_mbit=arguments.upload_mbit)
    assert config.upload_bytes_per_s == 5e6
    assert ServerConfig(model="m", new_swarm=True).upload_bytes_per_s == 0
