"""The few calls that order a device's work: memory that it copies from, marks to wait for, and captured launches.

Everything else of the GPU path sees a device only through this seam and the kernel library, so that tests run all of
it on a CPU.
"""

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the device's work."""

    def synchronize(self) -> None:
        """Waits until the work before the mark is done."""


class DeviceStream(Protocol):
    """Work of one device, in the order in which it is launched."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""

    def host_words(self, count: int) -> torch.Tensor:
        """int32 zeros on the host that the device copies from and to without help."""

    def mark(self) -> Mark:
        """A mark behind all that was launched."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Runs `launch` once, then records it; gives what launches all of it again at once.

        What it launches must depend on the contents of device memory alone.
        """


class CudaStream:
    """torch's current stream on the current CUDA device.

    Graphs share one memory pool: they run one after the other, and nothing that they allocate outlives a replay.
    Errors are looked for on this thread alone, so that other threads may copy weights during a capture.
    """

    def __init__(self) -> None:
        self._device = torch.device("cuda")
        # Warm-up and capture use one stream: libraries keep their workspaces by stream.
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return self._device

    def host_words(self, count: int) -> torch.Tensor:
        """int32 zeros in pinned memory."""
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def mark(self) -> Mark:
        """A new event, recorded."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """One CUDA graph."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            launch()  # libraries choose, load and allocate outside the capture
            # Not `torch.cuda.graph`: it waits for the whole device.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        current.wait_stream(self._side)
        return graph.replay
