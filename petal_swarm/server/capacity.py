"""How fast this server is: measured when it first starts, kept for later starts, moved on by real steps.

What is measured holds for one device, one set of shapes and one version of the program; all of that is in
the key that it is kept under.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.span import Slice
from petal_swarm.version import __version__

logger = logging.getLogger(__name__)

#: Measuring stops about here; a machine that needs longer for a single step is measured by that one.
BUDGET_S = 2.0
EXPIRES_S = 30 * 86_400.0
FILE_NAME = "capacity.json"
_MAX_FILE_BYTES = 1 << 20
_MAX_ENTRIES = 256
#: A prompt is sent in chunks; this many tokens are one.
_CHUNK_TOKENS = 512
_FIRST_CHUNK_TOKENS = 32
_PREFILL_SHARE = 0.6
_PREFILL_SAMPLES = 5
_DECODE_SAMPLES = 25
_MIN_DECODE_SAMPLES = 3
#: Kept figures this much slower than a few steps now were measured while the machine was busy.
_DOUBTFUL_RATIO = 1.5

#: `step(position, length)` computes and returns how long that took, in seconds.
Step: TypeAlias = Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Seconds a block for one token of one sequence; tokens a second of a prompt, through the whole span."""

    block_time_s: float
    prefill_tokens_per_s: float


def calibrate(engine: Engine, *, quant: str, kv_dtype: str, kept: CapacityFile | None) -> None:
    """Set the engine's figures: those in `kept`, or, where there are none, measured ones, which are kept.

    Either way a few steps run, so that no client gets the slow first ones; where these are much faster than
    what was kept, it is measured again. An engine too small for that has no figures until its first real
    steps.
    """
    room = min(_CHUNK_TOKENS, engine.max_batch_tokens, engine.stats().kv_tokens_free - 1)
    key = capacity_key(engine, quant=quant, kv_dtype=kv_dtype, chunk=room)
    if room < 1:
        return
    with _steps(engine, room) as step:
        blocks = len(engine.stack.span)
        capacity = kept.load(key) if kept is not None else None
        if capacity is not None and capacity.block_time_s > _DOUBTFUL_RATIO * _glance(step, room) / blocks:
            capacity = None
        if capacity is None:
            capacity = measure(step, blocks=blocks, chunk=room)
            if kept is not None:
                kept.save(key, capacity)
    engine.seed(capacity.block_time_s, capacity.prefill_tokens_per_s)


def measure(step: Step, *, blocks: int, chunk: int, budget_s: float = BUDGET_S) -> Capacity:
    """Medians over steps through `blocks` blocks, of one token and of up to `chunk`, for about `budget_s`.

    The first step of each size counts as warming up only. Chunks grow while the next size should fit.
    """
    spent = 0.0

    def timed(position: int, length: int) -> float:
        nonlocal spent
        took = step(position, length)
        spent += took
        return took

    length = min(chunk, _FIRST_CHUNK_TOKENS)
    timed(0, length)
    prefill = [timed(0, length)]
    prefill_until = budget_s * _PREFILL_SHARE
    while length < chunk:
        longer = min(chunk, 4 * length)
        if spent + 2 * prefill[0] * longer / length > prefill_until:
            break
        timed(0, longer)
        prefill, length = [timed(0, longer)], longer
    while len(prefill) < _PREFILL_SAMPLES and spent + prefill[0] < prefill_until:
        prefill.append(timed(0, length))
    timed(length, 1)
    decode = [timed(length, 1)]
    while len(decode) < _DECODE_SAMPLES and (len(decode) < _MIN_DECODE_SAMPLES or spent < budget_s):
        if spent + decode[0] > 2 * budget_s:
            break
        decode.append(timed(length, 1))
    return Capacity(statistics.median(decode) / blocks, length / statistics.median(prefill))


def _glance(step: Step, room: int) -> float:
    """Seconds of the fastest of a few steps of one token; warms up, too."""
    warm = min(room, _FIRST_CHUNK_TOKENS)
    step(0, warm)
    return min(step(warm, 1) for _ in range(_MIN_DECODE_SAMPLES))


@contextlib.contextmanager
def _steps(engine: Engine, room: int) -> Iterator[Step]:
    """Steps of a session of its own, of up to `room` tokens and one more; leaves nothing in the cache."""
    session = object()
    hidden = torch.zeros(room, engine.stack.config.hidden_size, dtype=engine.stack.dtype)  # as from the wire
    engine.open_session(session, max_length=room + 1)

    def step(position: int, length: int) -> float:
        request = StepRequest(
            session, engine.stack.span, (Slice(0, position, length),), hidden[:length], rows="last"
        )
        (result,) = engine.run([request])
        if result.error is not None:
            raise result.error
        return result.compute_s

    try:
        yield step
    finally:
        engine.close_session(session)


def capacity_key(engine: Engine, *, quant: str, kv_dtype: str, chunk: int) -> str:
    """Everything that the figures depend on, as one line of JSON."""
    stack = engine.stack
    config = stack.config
    facts = {
        "device": stack.device.type,
        "name": device_name(stack.device),
        "threads": torch.get_num_threads(),
        "dtype": str(stack.dtype).removeprefix("torch."),
        "quant": quant,
        "kv_dtype": kv_dtype,
        "family": config.family,
        "hidden_size": config.hidden_size,
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "intermediate_size": config.intermediate_size,
        # A step's own cost is shared by its blocks, and few blocks fit the processor's cache.
        "blocks": len(stack.span),
        "streamed": stack.streamed_blocks,
        "chunk": chunk,
        "decoder": stack.decoder is not None,
        "ranks": stack.ranks,
        "version": __version__,
        "torch": torch.__version__,
    }
    return json.dumps(facts, sort_keys=True)


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the CPU, as well as the system can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class CapacityFile:
    """Figures by key in `folder`/capacity.json. Trouble with the file costs measuring again, nothing else."""

    def __init__(self, folder: Path | str, now: Callable[[], float] = time.time) -> None:
        self._path = Path(folder) / FILE_NAME
        self._now = now

    def load(self, key: str) -> Capacity | None:
        """What was kept under `key` within the last 30 days."""
        entry = self._entries().get(key)
        return None if entry is None else entry[1]

    def save(self, key: str, capacity: Capacity) -> None:
        """Keep `capacity`, drop what has expired. Of two servers that save at once one may be forgotten."""
        entries = {**self._entries(), key: (self._now(), capacity)}
        newest = sorted(entries.items(), key=lambda item: item[1][0])[-_MAX_ENTRIES:]
        document = {name: {"measured_at": at, **asdict(figures)} for name, (at, figures) in newest}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(self._path, json.dumps({"capacities": document}, indent=1))
        except OSError as error:
            logger.warning("cannot keep measured figures in %s: %s", self._path, error)

    def _entries(self) -> dict[str, tuple[float, Capacity]]:
        try:
            with open(self._path, encoding="utf-8") as file:
                document = json.loads(file.read(_MAX_FILE_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        kept = document.get("capacities") if isinstance(document, dict) else None
        if not isinstance(kept, dict):
            return {}
        entries = {key: _parse(value) for key, value in kept.items()}
        now = self._now()
        return {key: entry for key, entry in entries.items() if entry and 0.0 <= now - entry[0] < EXPIRES_S}


def _parse(value: Any) -> tuple[float, Capacity] | None:
    if not isinstance(value, dict):
        return None
    numbers = [value.get(name) for name in ("measured_at", "block_time_s", "prefill_tokens_per_s")]
    sound = [n for n in numbers if isinstance(n, float) and math.isfinite(n) and n > 0]
    return (sound[0], Capacity(sound[1], sound[2])) if len(sound) == len(numbers) else None


def _write_atomically(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
