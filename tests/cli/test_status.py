import json

from petal_swarm.cli.status import show
from petal_swarm.client.status import Status, to_json
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement


def peer(peer_id, start, end, **fields):
    figures = {"block_time_s": 0.001, "step_time_s": 0.006, "kv_tokens": 4096, "kv_tokens_free": 1024}
    return Announcement(peer_id=peer_id, model="key", span=Span(start, end), **(figures | fields))


def status_of(*peers, silent=()):
    rtts_s = {a.peer_id: 0.0123 for a in peers if a.peer_id not in silent}
    return Status("model", "key", 8, tuple(peers), rtts_s)


def shown(capsys, status):
    show(status)
    return capsys.readouterr().out


def test_all_blocks_are_served(capsys):
    status = status_of(
        peer("a", 0, 4, name="left-half"),
        peer("b", 4, 8, version="0.1.0", queue_s=1.5, bandwidth_bytes_per_s=4.75e6),
    )
    out = shown(capsys, status)
    assert status.missing == ()
    assert "model: 8 blocks, 2 peers" in out
    assert "all 8 blocks are served" in out
    first, second = (" ".join(line.split()) for line in out.splitlines() if "serving" in line)
    assert first == "left-half 0:4 serving float32 100 0 ms 1,024 of 4,096 12 ms"
    assert second == "..b 4:8 serving float32 100 1.5 s 1,024 of 4,096 12 ms 38 Mbit/s 0.1.0"


def test_missing_blocks_are_named(capsys):
    status = status_of(peer("a", 0, 3), peer("b", 5, 8, state="joining", name="late"))
    assert status.missing == (3, 4, 5, 6, 7)
    out = shown(capsys, status)
    assert "nobody serves blocks 3-7" in out
    assert "joining" in out


def test_a_peer_that_does_not_answer_serves_nothing(capsys):
    status = status_of(peer("a", 0, 4), peer("b", 4, 8), silent=("b",))
    assert status.missing == (4, 5, 6, 7)
    assert "no answer" in shown(capsys, status)
    assert [p["rtt_s"] for p in to_json(status)["peers"]] == [0.0123, None]


def test_nobody_is_there(capsys):
    out = shown(capsys, status_of())
    assert "no peers" in out
    assert "nobody serves blocks 0-7" in out


def test_names_cannot_drive_the_terminal(capsys):
    out = shown(capsys, status_of(peer("a", 0, 8, name="\x1b[31m[red]evil\n", version="\x07")))
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "?[31m[red]evil?" in out


def test_json_is_for_programs():
    document = json.loads(
        json.dumps(to_json(status_of(peer("a", 0, 4, name="x", addresses=("/ip4/1.2.3.4",)))))
    )
    assert document["missing_blocks"] == [4, 5, 6, 7]
    assert document["num_blocks"] == 8
    assert document["peers"] == [
        {
            "peer_id": "a",
            "name": "x",
            "span": [0, 4],
            "state": "serving",
            "dtype": "float32",
            "quant": "none",
            "tokens_per_s": 100.0,
            "queue_s": 0.0,
            "kv_tokens": 4096,
            "kv_tokens_free": 1024,
            "rtt_s": 0.0123,
            "bandwidth_bytes_per_s": 0.0,
            "version": "",
            "addresses": ["/ip4/1.2.3.4"],
        }
    ]
