"""Triton's interpreter, in which kernels run on CPU tensors: for tests of their numbers without a device.

Of bfloat16 the interpreter says little: it cuts numbers off instead of rounding them, and `tl.dot` multiplies
their bits as integers. tests/gpu can.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch


def load() -> None:
    """Imports Triton and all kernels to be interpreted from then on, where Triton is and no device.

    Nobody may have imported Triton before, as bitsandbytes and with it peft do.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        # Triton reads this when it and kernels are imported; there is no other way to ask for it.
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        import triton

        import petal_swarm.models.kernels.start  # noqa: F401 - with all kernels
    triton.knobs.propagate_env = False  # what is set below is not for processes that tests start
    triton.knobs.runtime.interpret = True


def require() -> None:
    """Skips the module that calls it where kernels cannot be interpreted; before it imports any of them."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the device here, and tests/gpu tests them", allow_module_level=True)
    language = pytest.importorskip("triton.language", reason="Triton is not installed: pip install triton")
    assert "Interpreted" in type(language.sum).__name__, "somebody imported Triton before tests/conftest.py"
