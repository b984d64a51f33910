"""The tensor codec: hidden states to payload bytes and back. The one file of this layer that knows torch.

Codec `raw` is the tensor itself, row-major and little-endian. Others are announced in the `codec`
field, so that a peer which does not know one refuses it by name.
"""

from __future__ import annotations

import sys

import torch

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages.parts import TensorMeta

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("petal_swarm needs a little-endian machine")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `"float32"`.

    Raises:
        LocalProtocolError: the dtype has no name on the wire.
    """
    if dtype not in _NAMES:
        raise LocalProtocolError(f"{dtype} cannot be sent; use one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def encode_tensor(tensor: torch.Tensor) -> tuple[TensorMeta, Buffer]:
    """`[rows, columns]` -> what it is and its bytes; no copy if it is contiguous and on the CPU."""
    if tensor.dim() != 2:
        raise LocalProtocolError(f"only matrices travel, got shape {list(tensor.shape)}")
    meta = TensorMeta(dtype_name(tensor.dtype), (tensor.shape[0], tensor.shape[1]))
    flat = tensor if tensor.is_inference() else tensor.detach()
    if flat.device.type != "cpu" or not flat.is_contiguous():
        flat = flat.contiguous().cpu()  # in this order it is one copy off the device
    if flat.dtype is torch.bfloat16:
        flat = flat.view(torch.int16)  # numpy has no bfloat16
    return meta, flat.numpy().data.cast("B") if meta.nbytes else b""


def decode_tensor(meta: TensorMeta, payload: Buffer) -> torch.Tensor:
    """`[rows, columns]` on the CPU, sharing the payload's memory where that may be written to.

    Raises:
        RemoteProtocolError: an unknown dtype or codec, or a payload of the wrong size.
    """
    if meta.codec != "raw" or meta.dtype not in DTYPES:
        raise RemoteProtocolError(f"tensor codec {meta.codec!r} of {meta.dtype!r} is not supported")
    if memoryview(payload).nbytes != meta.nbytes:
        raise RemoteProtocolError(f"tensor needs {meta.nbytes} bytes, got {memoryview(payload).nbytes}")
    if meta.nbytes == 0:
        return torch.empty(meta.shape, dtype=DTYPES[meta.dtype])
    if memoryview(payload).readonly:
        payload = bytearray(payload)
    return torch.frombuffer(payload, dtype=DTYPES[meta.dtype]).view(meta.shape)
