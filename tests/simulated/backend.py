"""The simulated device as torch knows it: how tensors come there, and what says that it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from petal_swarm.models import devices

from .device import NAME, DeviceTensor, Simulation, aten, run, unwritten


def _empty(size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    host = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    return DeviceTensor(unwritten(host))


def _empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return DeviceTensor(unwritten(torch.empty_strided(size, stride, dtype=dtype)))


def _arange(*range_: Any, dtype: Any = None, **_: Any) -> Tensor:
    """torch's own would begin with nothing and grow, which wrappers cannot."""
    return DeviceTensor(torch.arange(*range_, dtype=dtype))


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """For callers that torch has told to pass wrappers by: `torch.tensor` is one."""
    return run(aten.copy_.default, (self, source, non_blocking), {})


def register() -> torch.library.Library:
    """Makes the device known to torch, for the rest of the process, as long as the result is kept."""
    module = ModuleType(f"torch.{NAME}")
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_rng_state": lambda place=None: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda state, place=None: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):
        kernels.impl(name, _arange, "PrivateUse1")
    kernels.impl("copy_", _copy, "PrivateUse1")
    return kernels


@contextmanager
def simulated() -> Iterator[Simulation]:
    """The device works inside, for all threads; what was left on it before does not."""
    pin_memory, streams, threads = torch.Tensor.pin_memory, devices.streams, torch.get_num_threads()
    simulation = Simulation.now = Simulation()
    own = simulation.streams
    torch.Tensor.pin_memory = lambda host, device=None: own.pinned.copy(host)  # type: ignore[method-assign]
    devices.streams = lambda place: own if torch.device(place).type == NAME else streams(place)
    torch.set_num_threads(1)
    try:
        # By its threads for devices autograd would have to know streams of this one.
        with torch.autograd.set_multithreading_enabled(False):
            yield simulation
    finally:
        Simulation.now = None
        torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign]
        devices.streams = streams
        torch.set_num_threads(threads)
