import os

import pytest

from petal_swarm.cli.main import main
from petal_swarm.errors import ConfigError
from petal_swarm.net.addresses import is_peer_id
from petal_swarm.net.swarm_key import SwarmKey

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


def run(capsys, *argv):
    try:
        code = main([str(word) for word in argv])
    except SystemExit as exited:
        code = exited.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_new_key_and_what_to_do_with_it(capsys, tmp_path):
    file = tmp_path / "my.key"
    code, out, err = run(capsys, "key", "new", file)
    key = SwarmKey.load(file)
    assert (code, err) == (0, "")
    assert f"wrote {file} (fingerprint {key.fingerprint})" in out
    assert f"run_server MODEL --swarm-key {file} --new-swarm" in out
    assert file.read_text().split()[1] not in out
    assert run(capsys, "key", "check", file)[1] == f"{file} is a swarm key, fingerprint {key.fingerprint}\n"
    code, out, err = run(capsys, "key", "new", file)
    assert (code, out, err) == (2, "", f"error: {file} exists, and is never overwritten; name another file\n")
    assert SwarmKey.load(file).fingerprint == key.fingerprint


def test_the_name_of_a_key_may_be_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "key", "new")[0] == 0
    assert run(capsys, "key", "check")[1].startswith("swarm.key is a swarm key")


def test_the_peer_id_of_an_identity_stays(capsys, tmp_path):
    code, out, _ = run(capsys, "key", "peer-id", tmp_path / "identity")
    assert (code, is_peer_id(out.strip())) == (0, True)
    assert run(capsys, "key", "peer-id", tmp_path / "identity")[1] == out


@pytest.mark.parametrize("argv", [["key"], ["key", "show"], ["key", "peer-id"]])
def test_bad_arguments_are_one_line_and_status_2(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_a_key_that_others_can_read_is_told_before_anything_is_loaded(capsys, tmp_path):
    from petal_swarm import AutoSwarmModelForCausalLM

    file = tmp_path / "key"
    SwarmKey.generate().save(file)
    file.chmod(0o644)
    code, out, err = run(capsys, "run-server", "MODEL", "--new-swarm", "--swarm-key", file)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"chmod 600 {file}" in err
    with pytest.raises(ConfigError, match=f"chmod 600 {file}"):
        AutoSwarmModelForCausalLM.from_pretrained("MODEL", initial_peers=[PEER], swarm_key=file)
