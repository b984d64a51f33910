"""Recording of what is launched on a CUDA device, to be launched again at once."""

from __future__ import annotations

import torch
from torch import Tensor

from petal_swarm.models.kernels.decoding import Compute, Recorded

# With less free memory than this no graph is recorded: what steps allocate for themselves comes first.
_SPARE_BYTES = 256 << 20


class CudaRecorder:
    """A `Recorder`. All its graphs use the same memory, which does no harm as long as one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute, given: Tensor) -> Recorded | None:
        """See `Recorder`. Computes once before: kernels are compiled then, libraries get their memory."""
        if torch.cuda.mem_get_info(self._device)[0] < _SPARE_BYTES:
            return None
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            compute(given)
        caller.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: they send results.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            found = compute(given)
        return Recorded(given, found, graph.replay)
