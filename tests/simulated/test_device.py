"""The simulated device itself: what it must notice, or it shows nothing."""

from __future__ import annotations

import pytest
import torch

from petal_swarm.models.devices import to_device

from .device import NAME, DeviceTensor, Simulation
from .streams import RaceError


def test_numbers_are_true_and_elsewhere(device: Simulation) -> None:
    host = torch.randn(3, 4)
    own = host.to(NAME)
    assert isinstance(own, DeviceTensor)
    assert own.device.type == NAME
    assert torch.equal((own @ own.t()).cpu(), host @ host.t())
    own[1:].as_strided((2, 2), (4, 1), 5).mul_(2)
    assert torch.equal(own.cpu()[1:, 1:3], 2 * host[1:, 1:3])
    assert torch.tensor([1, 2], device=NAME).tolist() == [1, 2]
    assert torch.arange(3, device=NAME).cpu().tolist() == [0, 1, 2]


def test_memory_that_nobody_wrote_to_is_not_a_number(device: Simulation) -> None:
    assert torch.empty(2, 3, device=NAME, dtype=torch.float16).cpu().isnan().all()
    assert torch.empty(2, 3, device=NAME).new_empty(5).cpu().isnan().all()


@pytest.mark.parametrize(
    "mix",
    [
        lambda own, host: own + host,
        lambda own, host: host + own,
        lambda own, host: own @ host,
        lambda own, host: torch.cat([own, host]),
        lambda own, host: own.index_select(0, torch.tensor([0])),
        lambda own, host: own.index_copy_(0, torch.tensor([0]), own[:1]),
        lambda own, host: own.addmm_(host, own),
        lambda own, host: torch.nn.functional.linear(own, host),
        lambda own, host: torch.nn.functional.layer_norm(own, (3,), host[0]),
        lambda own, host: torch.add(own, own, out=host),
    ],
)
def test_tensors_of_two_places_do_not_mix(device: Simulation, mix: object) -> None:
    own, host = torch.ones(3, 3, device=NAME), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="same device"):
        mix(own, host)  # type: ignore[operator]


def test_numbers_of_the_host_may_be_mixed_in(device: Simulation) -> None:
    own = torch.ones(3, device=NAME)
    device.clear()
    assert (own * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]
    assert own.masked_fill(own > 0, torch.tensor(3.0)).cpu().tolist() == [3, 3, 3]
    assert {wait.what for wait in device.waits} == {"copy to the host"}


@pytest.mark.parametrize(
    "work",
    [
        lambda own: own.sum().item(),
        lambda own: bool((own > 0).all()),
        lambda own: own.tolist(),
        lambda own: own.cpu(),
        lambda own: torch.empty(3).copy_(own),
        lambda own: own.nonzero(),
        lambda own: own[own > 0],
        lambda own: torch.where(own > 0),
        lambda own: own[torch.tensor([0])],
        lambda own: torch.masked_select(own, own > 0),
        lambda own: torch.equal(own, own),
        lambda own: torch.allclose(own, own),
        lambda own: own.unique(),
        lambda own: own.repeat_interleave(torch.ones(3, device=NAME, dtype=torch.long)),
        lambda own: torch.ones(3).to(NAME),
        lambda own: torch.ones(3).to(NAME, non_blocking=True),
        lambda own: torch.ones(3).pin_memory().to(NAME),
        lambda own: torch.tensor([1.0], device=NAME),
    ],
)
def test_waiting_is_noticed(device: Simulation, work: object) -> None:
    own = torch.ones(3, device=NAME)
    device.clear()
    work(own)  # type: ignore[operator]
    assert len(device.waits) >= 1


def test_what_does_not_wait(device: Simulation) -> None:
    own = to_device(torch.ones(3, 3), NAME)
    own[1:] = 2
    own[:, None].add_(1).softmax(-1)
    torch.where(own > 0, own, -own).masked_fill(own > 1, torch.inf)
    own.index_select(0, torch.arange(2, device=NAME))
    torch.nn.functional.scaled_dot_product_attention(own, own, own, attn_mask=own)
    assert device.waits == []
    assert device.sent == ["elsewhere"]


def test_gradients_flow(device: Simulation) -> None:
    host = torch.randn(4, 3)
    own = host.to(NAME).requires_grad_()
    (own.softmax(-1) ** 2).sum().backward()
    plain = host.clone().requires_grad_()
    (plain.softmax(-1) ** 2).sum().backward()
    assert own.grad is not None
    assert plain.grad is not None
    assert own.grad.device.type == NAME
    assert torch.allclose(own.grad.cpu(), plain.grad)


def test_a_stream_that_does_not_wait(device: Simulation) -> None:
    streams = device.streams
    own, host = torch.zeros(3, device=NAME), torch.ones(3).pin_memory()
    side = streams.Stream(NAME)
    with streams.stream(side), pytest.raises(RaceError, match="another stream"):
        own.copy_(host, non_blocking=True)
    side.wait_event(streams.current_stream().record_event())
    with streams.stream(side):
        own.copy_(host, non_blocking=True)
    with pytest.raises(RaceError, match="another stream"):
        own.view(3, 1) + 1
    streams.current_stream().wait_stream(side)
    assert (own + 1).cpu().tolist() == [2, 2, 2]


def test_an_event_that_is_too_early(device: Simulation) -> None:
    streams, own = device.streams, torch.zeros(3, device=NAME)
    side = streams.Stream(NAME)
    early = side.record_event()
    side.wait_stream(streams.current_stream())
    with streams.stream(side):
        own.add_(1)
    streams.current_stream().wait_event(early)
    with pytest.raises(RaceError, match="another stream"):
        own.add_(1)


def test_pinned_memory_that_is_written_to_too_early(device: Simulation) -> None:
    host = torch.ones(3).pin_memory()
    host.to(NAME, non_blocking=True)
    device.streams.current_stream().synchronize()
    host.fill_(2)
    host.to(NAME, non_blocking=True)
    host.fill_(3)
    with pytest.raises(RaceError, match="pinned"):
        device.streams.current_stream().synchronize()


def test_who_waited_is_told(device: Simulation) -> None:
    from petal_swarm.wire.tensors import encode_tensor

    encode_tensor(torch.zeros(2, 2, device=NAME))
    assert device.waits == [("copy to the host", "wire.tensors:encode_tensor")]
