"""Two processes that share blocks out, as one engine: equal results, interruptions, and how they end."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.engine.ranks import RankSettings
from petal_swarm.engine.steps import StepRequest
from petal_swarm.engine.training import Passes
from petal_swarm.errors import CheckpointError, RemoteError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.sharding import Shard
from petal_swarm.models.stack import load_blocks
from petal_swarm.server.ranks import RankProcesses, load_ranks
from petal_swarm.span import Slice
from tests.engine.test_training import COUNT, LENGTHS, run
from tests.engine.tiny import WHOLE, make, rows

TOLERANCE = 1e-5


def engine_of(
    folder: Path, on_lost: threading.Event | None = None, *, tokens: int = 512, spread_from: int = 25
) -> Engine:
    """Prompts of `spread_from` rows and more are spread, others are not."""
    settings = RankSettings(
        model=str(folder),
        span=WHOLE,
        shard=Shard(0, 2),
        dtype=torch.float32,
        device="cpu",
        quant="none",
        threads=1,
        spread_from=spread_from,
    )
    lost = on_lost or threading.Event()
    stack = load_ranks(open_checkpoint(str(folder)), settings, ["cpu"], None, lost.set)
    return Engine(stack, kv_tokens=tokens, max_batch_tokens=tokens // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[tuple[Engine, Engine]]:
    """The blocks shared out, and whole."""
    shared = engine_of(folder)
    whole = load_blocks(open_checkpoint(str(folder)), WHOLE, dtype=torch.float32)
    yield shared, Engine(whole, kv_tokens=512, max_batch_tokens=256)
    shared.close()


def step(session: object, position: int, count: int, seed: int, **more: object) -> StepRequest:
    return StepRequest(session, WHOLE, (Slice(0, position, count),), rows(count, seed), **more)  # type: ignore[arg-type]


def adapter_of(engine: Engine) -> tuple[AdapterLayout, torch.Tensor]:
    """LoRA where it is cut by rows and by columns, and a prefix."""
    places = (LoraPlace(1, "mlp.down_proj", 3, 0.7), LoraPlace(2, "self_attn.k_proj", 2, 1.5))
    layout = AdapterLayout(places, prefix_tokens=4)
    size = layout.numbers(engine.stack.config, WHOLE)
    return layout, torch.randn(size, generator=torch.Generator().manual_seed(7))


def near(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    assert found is not None
    assert expected is not None
    return float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


def both(engines: tuple[Engine, Engine], requests: list[StepRequest]) -> None:
    shared, whole = (engine.run(requests) for engine in engines)
    for found, expected in zip(shared, whole, strict=True):
        assert found.error is None
        assert near(found.hidden, expected.hidden)


def test_prefill_decode_and_batches_are_equal(engines: tuple[Engine, Engine]) -> None:
    for engine in engines:
        for session in "ab":
            engine.open_session(session, max_length=64)
    both(engines, [step("a", 0, 29, 1)])
    both(engines, [step("b", 0, 20, 2), step("a", 29, 1, 3)])
    both(engines, [step("b", 20, 1, 4), step("a", 30, 1, 5)])
    both(engines, [step("a", 10, 3, 6)])
    for engine in engines:
        for session in "ab":
            engine.close_session(session)


def test_forks_copy_rows_at_all_ranks(engines: tuple[Engine, Engine]) -> None:
    for engine in engines:
        engine.open_session("fork", max_length=64)
    both(engines, [step("fork", 0, 21, 1)])
    slices = (Slice(0, 21, 1), Slice(1, 21, 1))
    both(engines, [StepRequest("fork", WHOLE, slices, rows(2, 3), forks=(0, 0))])
    for engine in engines:
        engine.close_session("fork")


def test_interrupted_prefill_is_equal(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        for session in ("long", "short"):
            engine.open_session(session, max_length=64)
        engine.run([step("short", 0, 5, 1)])
        placed = engine.place(step("long", 0, 40, 2))
        batch = engine.begin([Chunk(placed, 40)])
        batch.advance()
        (between,) = engine.run([step("short", 5, 1, 3)])
        while not batch.done:
            batch.advance()
        given_up = engine.begin([Chunk(engine.place(step("short", 6, 2, 4)), 2)])
        given_up.advance()
        del given_up
        (after,) = engine.run([step("short", 6, 1, 5)])
        found.append([placed.result(), between.hidden, after.hidden])
        for session in ("long", "short"):
            engine.close_session(session)
    assert all(near(*pair) for pair in zip(*found, strict=True))


def test_adapters_and_prefixes_are_equal(engines: tuple[Engine, Engine]) -> None:
    layout, numbers = adapter_of(engines[0])
    for engine in engines:
        served = engine.stack.serve_adapter(layout, numbers, WHOLE)
        engine.open_session("adapted", max_length=64, adapter=served)
        engine.open_session("plain", max_length=64)
        del served
    both(engines, [step("adapted", 0, 12, 1), step("plain", 0, 9, 2)])
    both(engines, [step("plain", 9, 1, 3), step("adapted", 12, 1, 4)])
    for engine in engines:
        engine.close_session("adapted")
    both(engines, [step("plain", 10, 1, 5)])
    for engine in engines:
        engine.close_session("plain")


def test_gradients_are_equal_between_steps(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        engine.open_session("s", max_length=64)
        passes = Passes(engine.stack, piece_rows=lambda: 14)
        adapter = adapter_of(engine)
        out = run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, adapter, keep=True))
        passes._passes["a"].drop_graph()
        back = passes.backward("a", rows(COUNT, 1))
        next(back)
        (between,) = engine.run([step("s", 0, 29, 2)])
        found.append([out, between.hidden, *run(back)])
        passes.forget("a")
        engine.close_session("s")
        nothing = AdapterLayout(), torch.empty(0)  # of a client whose adapter is for other blocks
        run(passes.forward("b", rows(COUNT), LENGTHS, WHOLE, nothing, keep=True))
        hidden, of_numbers = run(passes.backward("b", rows(COUNT, 1)))
        assert of_numbers is not None
        assert of_numbers.shape == (0,)
        found[-1].append(hidden)
        passes.forget("b")
    assert all(near(*pair) for pair in zip(*found, strict=True))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_rank_that_runs_out_of_memory_lives(folder: Path) -> None:
    """In earnest: the system refuses it more than it has, and a few megabytes."""
    lost = threading.Event()
    shared = engine_of(folder, lost, tokens=16384, spread_from=1 << 30)
    whole = load_blocks(open_checkpoint(str(folder)), WHOLE, dtype=torch.float32)
    engines = shared, Engine(whole, kv_tokens=16384, max_batch_tokens=8192)
    for engine in engines:
        engine.open_session("large", max_length=8192)
        engine.open_session("small", max_length=64)
    both(engines, [step("small", 0, 5, 1)])
    pid = shared.stack.crew._others._processes[0].pid  # type: ignore[attr-defined]
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (3 << 20)
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    slices = tuple(Slice(sequence, 0, 64) for sequence in range(128))
    large = StepRequest("large", WHOLE, slices, rows(8192, 2))
    placed = [engine.place(large) for engine in engines]
    batch = shared.begin([Chunk(placed[0], 8192)])
    while not batch.done:
        batch.advance()
    engines[1].compute([Chunk(placed[1], 8192)])
    assert shared.fitting_rows < 8192, "there was no memory for all at once"
    assert near(placed[0].result(), placed[1].result())
    both(engines, [step("small", 5, 1, 3)])
    assert not lost.is_set()
    shared.close()


def test_a_rank_lost_between_two_blocks_ends_it_all_clearly(folder: Path) -> None:
    lost = threading.Event()
    engine = engine_of(folder, lost)
    engine.open_session("a", max_length=64)
    batch = engine.begin([Chunk(engine.place(step("a", 0, 30, 1)), 30)])
    batch.advance()
    passes = Passes(engine.stack)
    run(passes.forward("a", rows(COUNT), LENGTHS, WHOLE, keep=True))
    back = passes.backward("a", rows(COUNT))
    next(back)
    engine.stack.crew._others._processes[0].kill()  # type: ignore[attr-defined]
    assert lost.wait(20)
    with pytest.raises(RemoteError, match="a part of this server's blocks is gone"):
        next(back)
    with pytest.raises(RemoteError, match="a part of this server's blocks is gone"):
        batch.advance()
    with pytest.raises(RemoteError, match="a part of this server's blocks is gone"):
        engine.run([step("a", 30, 1, 2)])
    engine.close()


def test_parts_that_cannot_be_loaded_leave_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader has read its part; the others find that the weights are gone."""
    make("llama", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    left: list[int | None] = []
    end = RankProcesses.end

    def noting(self: RankProcesses) -> None:
        end(self)
        left.extend(process.poll() for process in self._processes)

    monkeypatch.setattr(RankProcesses, "end", noting)
    monkeypatch.setattr("petal_swarm.server.ranks.read_part", lambda *_: [])
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    settings = RankSettings(str(tmp_path), WHOLE, Shard(0, 2), torch.float32, "cpu", "none")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_ranks(checkpoint, settings, ["cpu"], None, lambda: None)
    assert left
    assert None not in left
