"""The progress bar of loading, for programs and notebooks. Light to import: servers use it too."""

from __future__ import annotations

from collections.abc import Callable

from tqdm.auto import tqdm


class loading_bar:  # noqa: N801 - reads as a function, `with loading_bar(...) as report`
    """A byte-counting progress bar for `load_blocks` and `load_ends`; callable with (done, total)."""

    def __init__(self, title: str, *, shown: bool) -> None:
        self._bar = tqdm(
            desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=not shown, leave=False
        )

    def __enter__(self) -> Callable[[int, int], None]:
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _report(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
