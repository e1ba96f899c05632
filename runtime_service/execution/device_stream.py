"""The few calls that order a device's work: memory that it copies from, marks to wait for, and captured launches.

Everything else of the GPU path sees a device only through this seam and the kernel library, so that tests run all of
it on a CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

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
        # A pool that no graph uses is gone for good, so the last one captured stays.
        self._last: torch.cuda.CUDAGraph | None = None

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
            with recording(graph, self._pool):
                launch()
        current.wait_stream(self._side)
        self._last = graph
        return graph.replay


class Recorder(Protocol):
    """The half of `torch.cuda.CUDAGraph` that records."""

    def capture_begin(self, pool: Any = ..., capture_error_mode: str = ...) -> None:
        """From here on launches of the current stream are recorded."""

    def capture_end(self) -> None:
        """Up to here. Raises where something meanwhile could not be recorded."""


@contextmanager
def recording(graph: Recorder, pool: Any) -> Iterator[None]:
    """Has `graph` record what is launched meanwhile, with memory of `pool`; a launch that fails is what is told."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # says only that something failed, which is on its way
            graph.capture_end()
        raise
    graph.capture_end()


class CudaLane:
    """Host memory to the current CUDA device, on a stream of its own: a `weight_copy.Lane`."""

    def __init__(self, num_bytes: int) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._views = [buffer.numpy().data for buffer in self._buffers]
        self._taken = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._at = 0

    def buffer(self) -> memoryview:
        """The buffer whose turn it is."""
        self._at = 1 - self._at
        self._taken[self._at].synchronize()
        return self._views[self._at]

    def send(self, destination: torch.Tensor) -> None:
        """Launches the copy."""
        with torch.cuda.stream(self._stream):
            source = self._buffers[self._at][: len(destination)]
            destination.copy_(source, non_blocking=True)
            self._taken[self._at].record(self._stream)

    def finish(self) -> None:
        """Waits for this lane's stream."""
        self._stream.synchronize()
