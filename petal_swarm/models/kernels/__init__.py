"""Kernels of our own for a CUDA device, in Triton, and what decides whether they are used.

Only `ready`, and what it says yes to, imports Triton. docs/decisions/0033-kernels-and-graphs.md has reasons.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

logger = logging.getLogger(__name__)

#: Triton compiles for NVIDIA's Turing and later.
_LEAST_CAPABILITY = (7, 5)
# Of a device whose number nobody knows: in Triton's interpreter.
_PROCESSORS = 8
_permitted = False


def permit() -> None:
    """Let kernels be tried from now on. A setting of the process, as torch's number of threads is."""
    global _permitted
    _permitted = True


def ready(device: torch.device) -> bool:
    """Whether kernels may be tried on `device`. Says once in the log why not, where one might expect them."""
    return _permitted and _usable(device)


@cache
def _usable(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        logger.info("no kernels of our own: they are for NVIDIA's Turing and later")
        return False
    try:
        import triton  # noqa: F401 - all that is asked is whether it loads
    except (ImportError, OSError, RuntimeError) as error:
        logger.info("no kernels of our own: Triton does not load (%s)", error)
        return False
    return True


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device of a thread, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors there are to keep busy."""
    if device.type != "cuda":
        return _PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
