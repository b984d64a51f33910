"""Triton's interpreter, in which kernels run on CPU tensors: for tests of their numbers without a device.

`pip install triton` where a CPU build of torch came without it. Of bfloat16 the interpreter says little: it
cuts numbers off instead of rounding them, and `tl.dot` multiplies their bits as integers. tests/gpu can.
"""

from __future__ import annotations

import os

import pytest
import torch


def require() -> None:
    """Skips the module that calls it where kernels cannot be interpreted; before it imports any of them."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the device here, and tests/gpu tests them", allow_module_level=True)
    with pytest.MonkeyPatch.context() as patch:
        # Triton reads this when it and kernels are imported; there is no other way to ask for it.
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
        import petal_swarm.models.kernels.start  # noqa: F401 - with all kernels
        from petal_swarm.models.kernels import triton_products
    if "Interpreted" not in type(triton_products.finish).__name__:
        pytest.skip("somebody imported Triton before, not to interpret kernels", allow_module_level=True)
    triton.knobs.runtime.interpret = True
