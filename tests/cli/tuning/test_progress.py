import signal

import pytest

from petal_swarm.cli.tuning.progress import Progress, stopped_by_signals


def test_lines_where_there_is_no_terminal():
    lines = []
    with Progress(0, 40, terminal=False, write=lines.append) as progress:
        for step in range(1, 41):
            progress.on_step(step, 2.0, 100, 0.5)
    assert len(lines) == 20
    assert lines[0] == "step 2/40: loss 2.000, 200 tokens/s, 00:19 left\n"
    assert lines[-1] == "step 40/40: loss 2.000, 200 tokens/s\n"


def test_a_bar_on_a_terminal(capsys):
    with Progress(3, 10, terminal=True) as progress:
        for step in range(4, 11):
            progress.on_step(step, 2.0, 100, 0.5)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "tuning: 100%" in last
    assert "10/10" in last
    assert "loss 2.000, 200 tokens/s" in last


def test_loss_and_speed_are_those_of_many_steps():
    lines = []
    with Progress(0, 20, terminal=False, write=lines.append) as progress:
        for step in range(1, 21):
            progress.on_step(step, float(step % 2), 100 * (step % 2), 0.5)
    loss, speed = (
        float(word) for word in lines[-1].replace(",", "").split() if word[0].isdigit() and "/" not in word
    )
    assert loss == pytest.approx(0.5, abs=0.1)
    assert speed == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_run_tidily_and_the_second_at_once(number):
    lines = []
    earlier = signal.getsignal(number)
    ends = []
    progress = Progress(0, 9, terminal=False, write=lines.append)
    try:
        signal.signal(number, lambda *_: ends.append(number))
        with stopped_by_signals(progress.stop):
            assert not progress.stopping
            signal.raise_signal(number)
            assert progress.stopping
            assert ends == []
            signal.raise_signal(number)
            assert ends == [number]
        signal.raise_signal(number)
        assert ends == [number, number]
    finally:
        signal.signal(number, earlier)
    assert len(lines) == 1
