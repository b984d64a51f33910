"""What one sees of a run: a bar on a terminal, lines elsewhere; and Ctrl-C, which ends it tidily."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from tqdm import tqdm

#: Weight of the past in the loss and speed that are shown: single batches differ too much.
MEMORY = 0.9
#: How many lines a run prints where there is no terminal.
LINES = 20


class Progress:
    """Shows the steps; a `Watcher` of the loop. Use it as a context manager."""

    def __init__(
        self,
        done: int,
        total: int,
        *,
        terminal: bool | None = None,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self.stopping = False
        self._total = total
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._write = write or sys.stderr.write
        self._every = max(1, total // LINES)
        self._loss = _Smoothed()
        self._tokens = _Smoothed()
        self._seconds = _Smoothed()
        self._bar = tqdm(
            desc="tuning", initial=done, total=total, unit="step", disable=not self._terminal, smoothing=0.1
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_step(self, step: int, loss: float, tokens: int, elapsed_s: float) -> None:
        """A step is done."""
        self._loss.add(loss)
        self._tokens.add(tokens)
        self._seconds.add(elapsed_s)
        speed = self._tokens.value / max(self._seconds.value, 1e-9)
        if self._terminal:
            self._bar.set_postfix_str(f"loss {self._loss.value:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update()
        elif step % self._every == 0 or step == self._total:
            left_s = (self._total - step) * self._seconds.value
            left = f", {tqdm.format_interval(left_s)} left" if step < self._total else ""
            self._write(
                f"step {step}/{self._total}: loss {self._loss.value:.3f}, {speed:,.0f} tokens/s{left}\n"
            )

    def stop(self) -> None:
        """End the run after the step that is being computed."""
        if not self.stopping:
            self.stopping = True
            self._write("\nstopping after this step; again to stop at once\n")


class _Smoothed:
    """An exponential mean that does not begin at zero."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        self._sum = MEMORY * self._sum + (1 - MEMORY) * value
        self._weight = MEMORY * self._weight + (1 - MEMORY)

    @property
    def value(self) -> float:
        return self._sum / self._weight


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `stop`; the second does what it does otherwise."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = {number: signal.getsignal(number) for number in numbers}

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, earlier[each])
        stop()

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, earlier[number])
