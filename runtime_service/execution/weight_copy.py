"""Packed weights from the store's files to the device, by several threads while the caller does something else.

Files are read straight into memory that the device copies from: a mapping would cost a page fault for every few pages.
Each thread has a lane of its own, a stream with two such buffers: one is filled while the other one is copied.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

import torch

from shared.store.weights import WeightReader

LANE_BYTES = 16 << 20
NUM_LANES = 4


class Lane(Protocol):
    """A way to the device that one thread uses."""

    def buffer(self) -> memoryview:
        """LANE_BYTES of host memory, once the device has taken what was sent from them before."""

    def send(self, destination: torch.Tensor) -> None:
        """Copies the first bytes of the buffer that was given last to `destination`, uint8, without waiting."""

    def finish(self) -> None:
        """Returns once everything has arrived."""


class WeightCopy:
    """Copies under way; a context manager, which ends them.

    `weights` have their places on the device from the start, and their values once `join` has returned.

    Args:
        reader: its files are open (`start_verify`), and stay so until this ends.
        names: of the weights that are wanted.
    """

    def __init__(
        self,
        reader: WeightReader,
        names: Iterable[str],
        device: torch.device,
        lanes: Sequence[Lane],
    ) -> None:
        self.weights = {name: _places(reader, name, device) for name in names}
        self._reader = reader
        self._pieces = self._all_pieces()
        self._lock = threading.Lock()
        self._is_stopped = False
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"copy-weights-{number}")
            for number, lane in enumerate(lanes)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(t.nbytes for roles in self.weights.values() for t in roles.values())

    def join(self) -> None:
        """Returns once all weights are on the device. Raises what went wrong."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        for thread in self._threads:
            thread.join()

    def _run(self, lane: Lane) -> None:
        try:
            while (piece := self._next()) is not None:
                name, role, start, destination = piece
                buffer = lane.buffer()[: len(destination)]
                self._reader.read_into(buffer, name, role, start)
                lane.send(destination)
            lane.finish()
        except BaseException as error:  # for `join`, which raises it
            self._errors.append(error)
            self._is_stopped = True

    def _next(self) -> tuple[str, str, int, torch.Tensor] | None:
        with self._lock:
            return None if self._is_stopped else next(self._pieces, None)

    def _all_pieces(self) -> Iterator[tuple[str, str, int, torch.Tensor]]:
        """(weight, role, first byte, where it goes), in the order of the files."""
        places = self._reader.index.tensors
        tensors = [
            (places[name][role], name, role, tensor)
            for name, roles in self.weights.items()
            for role, tensor in roles.items()
        ]
        for _, name, role, tensor in sorted(tensors, key=lambda t: (t[0].blob, t[0].offset)):
            content = tensor.reshape(-1).view(torch.uint8)
            for start in range(0, len(content), LANE_BYTES):
                yield name, role, start, content[start : start + LANE_BYTES]


def _places(reader: WeightReader, name: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Uninitialized tensors on the device, as the weight's are."""
    places = {}
    for role, stored in reader.index.tensors[name].items():
        dtype = getattr(torch, stored.dtype)
        assert isinstance(dtype, torch.dtype), f"{stored.dtype!r} is no dtype"
        num_bytes = math.prod(stored.shape) * dtype.itemsize
        content = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        places[role] = content.view(dtype).reshape(stored.shape)
    return places
