"""The tensor codec: exact bits, fixed bytes, sizes that are checked."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError
from petal_swarm.wire.messages.parts import DTYPE_BYTES, TensorMeta
from petal_swarm.wire.tensors import DTYPES, decode_tensor, dtype_name, encode_tensor

from .samples import same_every_time

SAME_SIZE = {2: torch.int16, 4: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(SAME_SIZE[tensor.element_size()])


def there_and_back(tensor: torch.Tensor) -> torch.Tensor:
    meta, payload = encode_tensor(tensor)
    assert memoryview(payload).nbytes == meta.nbytes
    return decode_tensor(meta, bytes(payload))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        found.dtype is expected.dtype
        and found.shape == expected.shape
        and torch.equal(bits(found), bits(expected))
    )


def test_the_names_and_sizes_agree() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == DTYPE_BYTES
    assert [dtype_name(dtype) for dtype in DTYPES.values()] == list(DTYPES)


@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_pattern_survives(name: str) -> None:
    """Quiet and signalling NaNs with their payloads, both zeros, denormals."""
    dtype = DTYPES[name]

    @same_every_time
    @given(data=st.binary(min_size=24, max_size=24))
    def check(data: bytes) -> None:
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(2, -1)
        assert same(there_and_back(tensor), tensor)

    check()
    if dtype.itemsize == 2:
        everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256)
        assert same(there_and_back(everything.view(dtype)), everything.view(dtype))
    else:
        special = torch.tensor([[0x7FC00001, 0x7F800001, -1, -(1 << 31)]], dtype=torch.int32).view(dtype)
        assert same(there_and_back(special), special)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1)])
@pytest.mark.parametrize("name", DTYPES)
def test_empty_matrices(name: str, shape: tuple[int, int]) -> None:
    tensor = torch.ones(shape, dtype=DTYPES[name])
    assert same(there_and_back(tensor), tensor)


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_not_contiguous(name: str) -> None:
    base = torch.arange(48, dtype=torch.float32).view(6, 8).to(DTYPES[name])
    for view in (base.T, base[::2], base[:, 1:5], base[1:2].expand(4, 8), base.flip(0), base[2:4]):
        assert same(there_and_back(view), view)


def test_the_bytes_are_little_endian_rows() -> None:
    tensor = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    expected = {
        "float32": struct.pack("<4f", 1, -2, 0.5, 3),
        "float16": struct.pack("<4e", 1, -2, 0.5, 3),
        "bfloat16": b"\x80\x3f\x00\xc0\x00\x3f\x40\x40",
    }
    for name, data in expected.items():
        meta, payload = encode_tensor(tensor.to(DTYPES[name]))
        assert (meta, bytes(payload)) == (TensorMeta(name, (2, 2)), data)
        assert torch.equal(decode_tensor(meta, data).float(), tensor)


def test_a_tensor_with_a_gradient_and_one_of_inference_mode() -> None:
    tensor = torch.ones(2, 3, requires_grad=True)
    assert same(there_and_back(tensor * 2), torch.full((2, 3), 2.0))
    with torch.inference_mode():
        frozen = torch.ones(2, 3, dtype=torch.bfloat16)
    assert same(there_and_back(frozen), frozen)


def test_no_copy_on_the_way_out_and_none_on_the_way_in() -> None:
    tensor = torch.zeros(2, 3)
    meta, payload = encode_tensor(tensor)
    tensor[0, 0] = 1
    assert bytes(payload)[:4] == struct.pack("<f", 1)
    writable = bytearray(payload)
    found = decode_tensor(meta, memoryview(writable))
    writable[:4] = struct.pack("<f", 5)
    assert found[0, 0] == 5


def test_a_read_only_payload_is_copied() -> None:
    """Torch knows no read-only memory: writing would change what the sender's bytes are."""
    data = bytes(24)
    found = decode_tensor(TensorMeta("float32", (2, 3)), memoryview(data))
    found.fill_(1)
    assert data == bytes(24)


def test_a_payload_anywhere_in_a_larger_read() -> None:
    data = b"\xff" * 3 + struct.pack("<2f", 1, 2) + b"\xff" * 5
    for whole in (data, bytearray(data)):
        found = decode_tensor(TensorMeta("float32", (1, 2)), memoryview(whole)[3:11])
        assert found.tolist() == [[1, 2]]


@pytest.mark.parametrize("size", [0, 1, 23, 25, 48])
def test_payloads_of_another_size(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match="24 bytes"):
        decode_tensor(TensorMeta("float32", (2, 3)), bytes(size))


@pytest.mark.parametrize(
    "meta", [TensorMeta("float32", (2, 3), "zip"), TensorMeta("float64", (2, 3)), TensorMeta("", (0, 0))]
)
def test_codecs_and_dtypes_not_spoken_here(meta: TensorMeta) -> None:
    with pytest.raises(RemoteProtocolError, match="not supported"):
        decode_tensor(meta, bytes(24))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_do_not_travel(dtype: torch.dtype) -> None:
    with pytest.raises(LocalProtocolError, match=str(dtype)):
        encode_tensor(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_only_matrices_travel(shape: tuple[int, ...]) -> None:
    with pytest.raises(LocalProtocolError, match="matrices"):
        encode_tensor(torch.zeros(shape))
