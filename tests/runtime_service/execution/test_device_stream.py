"""What a recording that breaks off tells."""

from typing import Any

import pytest

from runtime_service.execution.device_stream import recording


class _Graph:
    """A recording that ends as the driver ends it: with an error of its own where a launch failed."""

    def __init__(self) -> None:
        self.has_failed = False
        self.num_begun = self.num_ended = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.num_begun += 1

    def capture_end(self) -> None:
        self.num_ended += 1
        if self.has_failed:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_launch_that_fails_while_it_is_recorded_is_what_is_told() -> None:
    """Not what the driver says of the recording afterwards: a full GPU would not be known as one."""
    graph = _Graph()
    graph.has_failed = True
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"), recording(graph, (0, 1)):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert (graph.num_begun, graph.num_ended) == (1, 1)


def test_recording_that_cannot_be_ended_is_told() -> None:
    graph = _Graph()
    graph.has_failed = True
    with pytest.raises(RuntimeError, match="previous error"), recording(graph, (0, 1)):
        pass
