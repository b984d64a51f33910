"""Figures measured once, kept, and used again; and what may be wrong with the file that keeps them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.errors import PetalSwarmError
from petal_swarm.server import capacity as subject
from petal_swarm.server.capacity import Capacity, CapacityFile, calibrate, capacity_key, measure
from petal_swarm.server.config import default_cache_dir
from tests.engine.tiny import BLOCKS, Tiny, close, make, rows

FIGURES = Capacity(0.002, 3000.0)
DAY_S = 86_400.0


class Machine:
    """Steps that take a given time, by their length; the first of each length takes `cold` times as long."""

    def __init__(self, token_s: float, overhead_s: float = 0.0, cold: float = 10.0) -> None:
        self.steps: list[tuple[int, int]] = []
        self.spent_s = 0.0
        self._token_s, self._overhead_s, self._cold = token_s, overhead_s, cold

    def __call__(self, position: int, length: int) -> float:
        known = any(length == earlier for _, earlier in self.steps)
        self.steps.append((position, length))
        took = (self._overhead_s + length * self._token_s) * (1 if known else self._cold)
        self.spent_s += took
        return took


def test_a_fast_machine_is_measured_with_whole_chunks():
    machine = Machine(1e-6, overhead_s=1e-4)
    found = measure(machine, blocks=4, chunk=512)
    assert found.block_time_s == pytest.approx(1.01e-4 / 4)
    assert found.prefill_tokens_per_s == pytest.approx(512 / (1e-4 + 512e-6))
    assert machine.spent_s < 0.1
    assert {length for _, length in machine.steps} == {32, 128, 512, 1}
    assert all(position == (512 if length == 1 else 0) for position, length in machine.steps)


def test_a_step_that_is_slow_by_chance_does_not_count():
    took = iter([9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 50.0, 1.0, 1.0, 1.0, *[9.0, 0.5, 70.0], *[0.5] * 50])
    found = measure(lambda position, length: next(took) * 1e-3, blocks=1, chunk=512)
    assert found == Capacity(0.5e-3, pytest.approx(512 / 1e-3))


@pytest.mark.parametrize("token_s", [1e-5, 1e-4, 1e-3, 1e-2])
def test_measuring_takes_about_its_budget(token_s):
    machine = Machine(token_s, cold=1.0)
    found = measure(machine, blocks=1, chunk=512, budget_s=2.0)
    assert found.prefill_tokens_per_s == pytest.approx(1 / token_s)
    assert found.block_time_s == pytest.approx(token_s)
    assert machine.spent_s < 2.5


def test_a_machine_too_slow_for_the_budget_is_measured_by_single_steps():
    machine = Machine(1.0, cold=1.0)
    found = measure(machine, blocks=2, chunk=512)
    assert found == Capacity(0.5, 1.0)
    assert [length for _, length in machine.steps] == [32, 32, 1, 1]


@pytest.mark.parametrize("chunk", [1, 3, 32, 33, 100])
def test_a_small_chunk(chunk):
    machine = Machine(1e-5)
    assert measure(machine, blocks=1, chunk=chunk).prefill_tokens_per_s == pytest.approx(1e5)
    assert max(length for _, length in machine.steps) == chunk


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make("bloom", tmp_path_factory.mktemp("bloom"))


def figures(engine: Engine) -> Capacity:
    return Capacity(engine.stats().block_time_s, engine.stats().prefill_tokens_per_s)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring finds FIGURES; the list grows each time. A glance later finds the machine as fast."""
    calls: list[int] = []
    glance = subject._glance

    def as_fast(step: subject.Step, room: int) -> float:
        assert glance(step, room) > 0
        return FIGURES.block_time_s * BLOCKS

    monkeypatch.setattr(subject, "_glance", as_fast)

    def stub(step: subject.Step, *, blocks: int, chunk: int) -> Capacity:
        assert step(0, chunk) > 0
        assert step(chunk, 1) > 0
        calls.append(chunk)
        return FIGURES

    monkeypatch.setattr(subject, "measure", stub)
    return calls


def calibrated(tiny: Tiny, folder: Path | None, *, kv_dtype: str = "auto", quant: str = "none") -> Engine:
    engine = tiny.engine()
    kept = None if folder is None else CapacityFile(folder)
    calibrate(engine, quant=quant, kv_dtype=kv_dtype, kept=kept)
    return engine


def test_a_second_start_uses_what_the_first_has_measured(bloom, tmp_path, measured, monkeypatch):
    assert figures(calibrated(bloom, tmp_path)) == FIGURES
    steps = []
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, requests: steps.append(1) or run(self, requests))
    assert figures(calibrated(bloom, tmp_path)) == FIGURES
    assert measured == [256]
    assert len(steps) == 1 + subject._MIN_DECODE_SAMPLES  # warming up
    calibrated(bloom, tmp_path, quant="int8")
    calibrated(bloom, tmp_path, kv_dtype="int8")
    assert measured == [256] * 3
    calibrated(bloom, None)
    assert measured == [256] * 4


@pytest.mark.parametrize(("faster", "again"), [(1.4, False), (1.6, True)])
def test_what_a_busy_machine_measured_is_measured_again(
    bloom, tmp_path, measured, monkeypatch, faster, again
):
    calibrated(bloom, tmp_path)
    now_s = FIGURES.block_time_s * BLOCKS / faster
    monkeypatch.setattr(subject, "_glance", lambda step, room: now_s)
    calibrated(bloom, tmp_path)
    assert len(measured) == 1 + again


def test_the_key_tells_machines_and_models_apart(bloom, tmp_path, monkeypatch):
    engine = bloom.engine()
    key = capacity_key(engine, quant="none", kv_dtype="auto", chunk=64)
    others = [
        capacity_key(engine, quant=q, kv_dtype=k, chunk=64) for q, k in (("int8", "auto"), ("none", "int8"))
    ]
    others.append(capacity_key(engine, quant="none", kv_dtype="auto", chunk=63))
    others.append(
        capacity_key(make("llama", tmp_path).engine(), quant="none", kv_dtype="auto", chunk=64),
    )
    for name, value in (("__version__", "9.9"), ("device_name", lambda device: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(subject, name, value)
            others.append(capacity_key(engine, quant="none", kv_dtype="auto", chunk=64))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        others.append(capacity_key(engine, quant="none", kv_dtype="auto", chunk=64))
    assert len({key, *others}) == 1 + len(others)
    assert capacity_key(bloom.engine(), quant="none", kv_dtype="auto", chunk=64) == key


def test_a_real_measurement_leaves_nothing_behind(bloom):
    engine = bloom.engine()
    engine.open_session("a", max_length=64)
    hidden = rows(30)
    engine.run([_step("a", hidden[:20], 0)])
    calibrate(engine, quant="none", kv_dtype="auto", kept=None)
    stats = engine.stats()
    assert stats.sessions == 1
    assert stats.kv_tokens - stats.kv_tokens_free == 32
    assert stats.block_time_s > 0
    assert stats.prefill_tokens_per_s > 0
    (result,) = engine.run([_step("a", hidden[20:], 20)])
    assert close(result.hidden, bloom.expected(hidden)[20:])


def _step(session, hidden, position):
    from tests.engine.test_engine import step

    return step(session, hidden, position)


@pytest.mark.parametrize(("kv_tokens", "max_batch_tokens"), [(0, 64), (15, 64), (16, 64), (32, 1), (80, 3)])
def test_a_small_engine(bloom, kv_tokens, max_batch_tokens):
    engine = bloom.engine(kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
    calibrate(engine, quant="none", kv_dtype="auto", kept=None)
    assert engine.stats().sessions == 0
    assert engine.stats().kv_tokens_free == engine.stats().kv_tokens
    assert (engine.stats().block_time_s > 0) == (kv_tokens >= 16)


def test_a_step_that_fails_is_told(bloom, monkeypatch):
    engine = bloom.engine()
    monkeypatch.setattr(Engine, "place", _fail)
    with pytest.raises(PetalSwarmError, match="no"):
        calibrate(engine, quant="none", kv_dtype="auto", kept=None)
    assert engine.stats().sessions == 0


def _fail(self, request):
    raise PetalSwarmError("no")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


def test_entries_are_kept_for_a_month(tmp_path):
    clock = Clock()
    CapacityFile(tmp_path / "new" / "folder", clock).save("a", FIGURES)
    kept = CapacityFile(tmp_path / "new" / "folder", clock)
    assert kept.load("a") == FIGURES
    assert kept.load("b") is None
    clock.now_s += 20 * DAY_S
    kept.save("b", Capacity(1.0, 2.0))
    clock.now_s += 10 * DAY_S
    assert kept.load("a") is None
    assert kept.load("b") == Capacity(1.0, 2.0)
    clock.now_s -= 11 * DAY_S
    assert kept.load("b") is None  # the clock was set back: who knows how old it is
    clock.now_s += 12 * DAY_S
    kept.save("c", FIGURES)
    document = json.loads((tmp_path / "new" / "folder" / "capacity.json").read_text())
    assert set(document["capacities"]) == {"b", "c"}
    assert os.listdir(tmp_path / "new" / "folder") == ["capacity.json"]


def test_the_file_does_not_grow_without_end(tmp_path):
    clock = Clock()
    kept = CapacityFile(tmp_path, clock)
    for number in range(subject._MAX_ENTRIES + 2):
        kept.save(str(number), FIGURES)
        clock.now_s += 1
    assert kept.load("1") is None
    assert kept.load("2") == kept.load(str(subject._MAX_ENTRIES + 1)) == FIGURES


GOOD = {"measured_at": 1e9, "block_time_s": 0.5, "prefill_tokens_per_s": 9.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"capacities": []}',
        '{"capacities": {"a": null}}',
        "[" * 100_000,
        "\udcff",
        *(
            json.dumps({"capacities": {"a": {**GOOD, name: value}}})
            for name in GOOD
            for value in (None, "1", -1.0, 0.0, float("nan"), float("inf"), True, [])
        ),
    ],
)
def test_damage_is_ignored_and_written_over(tmp_path, text):
    path = tmp_path / "capacity.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    kept = CapacityFile(tmp_path, Clock())
    assert kept.load("a") is None
    kept.save("a", FIGURES)
    assert kept.load("a") == FIGURES


def test_damage_to_one_entry_harms_no_other(tmp_path):
    document = {"capacities": {"a": {**GOOD, "block_time_s": None}, "b": GOOD}}
    (tmp_path / "capacity.json").write_text(json.dumps(document))
    assert CapacityFile(tmp_path, Clock()).load("b") == Capacity(0.5, 9.0)


@pytest.mark.parametrize("place", ["file in the way", "cannot be replaced"])
def test_a_folder_that_cannot_be_written_costs_a_line(bloom, tmp_path, measured, caplog, place):
    folder = tmp_path / "folder"
    if place == "file in the way":
        folder.write_text("not a folder")
    else:
        (folder / "capacity.json").mkdir(parents=True)
    assert figures(calibrated(bloom, folder)) == FIGURES
    (record,) = caplog.records
    assert record.message.startswith("cannot keep measured figures in ")
    assert "\n" not in record.message
    if folder.is_dir():
        assert os.listdir(folder) == ["capacity.json"]


def test_where_the_cache_is():
    home = Path("/home/somebody")
    assert default_cache_dir({}, home) == home / ".cache" / "petal_swarm"
    assert default_cache_dir({"XDG_CACHE_HOME": ""}, home) == home / ".cache" / "petal_swarm"
    assert default_cache_dir({"XDG_CACHE_HOME": "relative"}, home) == home / ".cache" / "petal_swarm"
    assert default_cache_dir({"XDG_CACHE_HOME": "/cache"}, home) == Path("/cache/petal_swarm")
