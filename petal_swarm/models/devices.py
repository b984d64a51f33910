"""What differs between computing in the machine's own memory and on a device beside it.

A device works behind the program: launching is cheap and waiting is not. So nothing in a step may need
a result on the host, and what the host has to tell is copied without waiting.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def on_host(device: torch.device | str) -> bool:
    """Whether tensors on `device` lie in the machine's own memory: views and small calls are cheap there."""
    return torch.device(device).type == "cpu"


def streams(device: torch.device | str) -> Any:
    """`torch.cuda` where `device` has streams, events and pinned memory, else None."""
    return torch.cuda if torch.device(device).type == "cuda" else None


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """`host` on `device`. To CUDA through pinned memory, which is the only way that does not wait."""
    if streams(device) is not None:
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def wait_for(device: torch.device) -> None:
    """Return when everything that was launched on `device` by this thread is done."""
    if (found := streams(device)) is not None:
        found.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


#: What allocators say that have no error of their own: of the CPU, CUDA's driver and cuBLAS, Metal, C++.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for something, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def there(made: T | None) -> T:
    """What was made, if there was memory for it.

    Raises:
        torch.OutOfMemoryError: there was none.
    """
    if made is None:
        raise torch.OutOfMemoryError("out of memory, since something was to be kept here")
    return made


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps for later; after running out of memory that is in the wrong sizes."""
    if (found := streams(device)) is not None:
        found.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
