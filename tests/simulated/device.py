"""A device that computes on the CPU, and is as strict as a GPU about where tensors are and who waits.

Its tensors hold true numbers in the host's memory, but say that they are elsewhere. They refuse to be mixed
with the host's where CUDA refuses; memory that nobody has written to holds NaN. A `Simulation` records when
the host waits for the device. What it cannot show: how long anything takes, kernels of our own and CUDA
graphs, how CUDA's allocator gives memory on, and an order between threads of the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .streams import Memory, Streams

aten = torch.ops.aten
NAME = "simulated"

# Operations by elements take numbers that are on the host. So do these.
_TAKE_NUMBERS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
_EMPTY = {aten.new_empty.default, aten.empty_like.default, aten.new_empty_strided.default}
# Sizes or results depend on numbers, for which CUDA waits.
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Wait(NamedTuple):
    """The host waited for the device in `place`, "module:function" of the project."""

    what: str
    place: str


class Simulation:
    """What happens on the device. There is one at a time."""

    now: Simulation | None = None

    def __init__(self) -> None:
        self.streams = Streams(self.waited)
        self.waits: list[Wait] = []
        #: Where the host sent numbers to the device and went on.
        self.sent: list[str] = []

    def waited(self, what: str) -> None:
        self.waits.append(Wait(what, _place()))

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.waits.clear()
        self.sent.clear()

    def copied_in(self, source: Tensor, non_blocking: bool) -> None:
        """A copy of the host's `source` to the device."""
        if non_blocking and self.streams.pinned.holds(source):
            self.sent.append(_place())
            self.streams.current_stream().reads_host(source)
        else:
            self.waited("copy to the device")
            self.streams.current_stream().finish()

    def wait_for_numbers(self, what: str) -> None:
        self.waited(what)
        self.streams.current_stream().finish()


class DeviceTensor(Tensor):
    """A tensor of the device: `host` has its numbers; views of each other share their `memory`."""

    host: Tensor
    memory: Memory
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor, memory: Memory | None = None) -> DeviceTensor:
        device = torch.device(NAME, 0)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        made.host = host
        made.memory = memory or Memory(host.untyped_storage(), device)
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), named: dict[str, Any] | None = None
    ) -> Any:
        return run(function, arguments, named or {})

    # Of a wrapper torch itself knows no memory.

    def untyped_storage(self) -> Any:
        return self.memory

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def set_(self, memory: Any, *place: Any) -> Any:  # type: ignore[override]
        """A tensor of its own, not this one: the project asks for no more."""
        return DeviceTensor(torch.empty(0, dtype=self.dtype).set_(memory.host, *place), memory)

    def record_stream(self, stream: Any) -> None:
        """Memory is not given on here while anybody has it."""

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME} {self.host!r}"


class _Facts:
    """What does not change about an operation."""

    def __init__(self, function: Any) -> None:
        name = function.name()
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        self.takes_numbers = torch.Tag.pointwise in function.tags or function in _TAKE_NUMBERS
        self.waits = (
            name.removeprefix("aten::") if any(tag in function.tags for tag in _DATA_DEPENDENT) else ""
        )
        aliases = [
            (place, each.name, each.alias_info) for place, each in enumerate(function._schema.arguments)
        ]
        #: The places and names of what it writes to.
        self.written = [(place, name) for place, name, alias in aliases if alias and alias.is_write]


_facts = cache(_Facts)


def run(function: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
    """What the device makes of an operation on its tensors."""
    facts = _facts(function)
    if facts.composite:
        return function.decompose(*arguments, **named)
    if function is aten._conj.default:
        function = aten.conj_physical.default  # a wrapper cannot say that its numbers are to be conjugated
    simulation = Simulation.now
    assert simulation is not None, "the device is used while it is simulated"
    tensors = list(_tensors([*arguments, *named.values()]))
    stays = _look(simulation, function, arguments, named, tensors)
    own = [value for value in tensors if isinstance(value, DeviceTensor)]
    values = (arguments[n] if n < len(arguments) else named.get(name) for n, name in facts.written)
    written = {one.memory: None for one in _tensors(values) if isinstance(one, DeviceTensor)}
    read = {value.memory: None for value in own if value.memory not in written}
    stream = simulation.streams.current_stream()
    stream.launch(read, written)
    result = function(*_mapped(_on_host, arguments), **{n: _mapped(_on_host, v) for n, v in named.items()})
    if not stays:
        return result
    if function in _EMPTY:
        unwritten(result)
    given = {id(value.host): value for value in own}
    bases = {value.memory.data_ptr(): value for value in own}

    def on_device(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if (same := given.get(id(value))) is not None:
            assert same.shape == value.shape, f"{function} changes shapes, which is not simulated"
            return same
        base = bases.get(value.untyped_storage().data_ptr()) if value.numel() else None
        if base is not None:
            with torch.inference_mode(base.is_inference()):  # as torch has it for views
                return DeviceTensor(value, base.memory)
        made = DeviceTensor(value)
        stream.launch((), (made.memory,))
        return made

    return _mapped(on_device, result)


def _look(
    simulation: Simulation,
    function: Any,
    arguments: Sequence[Any],
    named: dict[str, Any],
    tensors: Sequence[Tensor],
) -> bool:
    """Notes what CUDA would wait for, refuses what it refuses; whether the result stays on the device."""
    if function is aten.copy_.default:
        target, source = arguments[:2]
        if not isinstance(target, DeviceTensor):
            simulation.wait_for_numbers("copy to the host")
            return False
        if not isinstance(source, DeviceTensor):
            simulation.copied_in(source, bool([*arguments[2:], named.get("non_blocking", False)][0]))
        return True
    if function is aten._to_copy.default:
        device = named.get("device")
        if device is not None and device.type != NAME:
            simulation.wait_for_numbers("copy to the host")
            return False
        return True
    if function in _INDEXING:
        for index in _tensors(arguments[1]):
            if not isinstance(index, DeviceTensor):
                simulation.wait_for_numbers("an index on the host")
            elif index.dtype in (torch.bool, torch.uint8):
                simulation.wait_for_numbers("a mask as index")
        tensors = list(_tensors([arguments[0], *arguments[2:3]]))
    facts = _facts(function)
    for value in tensors:
        if not isinstance(value, DeviceTensor) and not (facts.takes_numbers and value.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({function})"
            )
    if facts.waits and function not in _INDEXING:
        simulation.wait_for_numbers(facts.waits)
    return True


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return [_mapped(change, one) for one in value] if isinstance(value, (list, tuple)) else change(value)


def _on_host(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _place() -> str:
    """The innermost function of the project, but for the one that waits for others."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("petal_swarm.") and module != "petal_swarm.models.devices":
            return f"{module.removeprefix('petal_swarm.')}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def unwritten(host: Tensor) -> Tensor:
    """Holds NaN, or -1."""
    host.untyped_storage().fill_(255)
    return host
