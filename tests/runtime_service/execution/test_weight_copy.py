"""Weights reach the device as the store has them, by any number of threads, or not at all."""

import threading
from pathlib import Path

import pytest
import torch

from runtime_service.execution import weight_copy
from runtime_service.execution.weight_copy import WeightCopy
from shared.engine import EngineDraft, EngineManifest
from shared.errors import DigestMismatch
from shared.store import LocalStore
from shared.store.weights import WeightReader, WeightWriter
from tests.shared.engines import engine_key

_CPU = torch.device("cpu")


class HostLane:
    """A device that is the host, and takes what was sent only when its buffer is asked for again."""

    def __init__(self, num_bytes: int) -> None:
        self._buffers = [bytearray(num_bytes) for _ in range(2)]
        self._sent: list[torch.Tensor | None] = [None, None]
        self._at = 0

    def buffer(self) -> memoryview:
        self._at = 1 - self._at
        self._arrive(self._at)
        return memoryview(self._buffers[self._at])

    def send(self, destination: torch.Tensor) -> None:
        self._sent[self._at] = destination

    def finish(self) -> None:
        for at in range(2):
            self._arrive(at)

    def _arrive(self, at: int) -> None:
        destination, self._sent[at] = self._sent[at], None
        if destination is not None:
            content = torch.frombuffer(self._buffers[at], dtype=torch.uint8)
            destination.copy_(content[: len(destination)])


class StuckLane(HostLane):
    """Gives no buffer until it may."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.is_asked, self.may_go = threading.Event(), threading.Event()

    def buffer(self) -> memoryview:
        self.is_asked.set()
        self.may_go.wait()
        return super().buffer()


@pytest.fixture(autouse=True)
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cut into many pieces, the last of them shorter."""
    monkeypatch.setattr(weight_copy, "LANE_BYTES", 1000)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[LocalStore, EngineManifest]:
    """Weights of several dtypes over several blobs, an empty one among them."""
    store = LocalStore(tmp_path)
    draw = torch.Generator().manual_seed(0)
    with WeightWriter(store, max_blob_bytes=20_000) as writer:
        for number in range(5):
            weight = torch.randn((60 + number, 33), generator=draw).to(torch.bfloat16)
            scale = torch.randn(60 + number, generator=draw)
            writer.add(f"{number}", {"weight": weight, "scale": scale})
        writer.add("empty", {"weight": torch.empty(0, 4)})
        layers = writer.finish()
    return store, store.publish(EngineDraft(engine_key(), "tiny", layers))


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_weights_arrive_as_the_store_has_them(
    stored: tuple[LocalStore, EngineManifest], num_lanes: int
) -> None:
    with WeightReader(*stored) as reader:
        reader.start_verify()
        lanes = [HostLane(1000) for _ in range(num_lanes)]
        with WeightCopy(reader, reader.index.tensors, _CPU, lanes) as copy:
            copy.join()
        for name, roles in copy.weights.items():
            for role, tensor in roles.items():
                assert torch.equal(tensor, reader.tensor(name, role))
                assert tensor.dtype == reader.tensor(name, role).dtype


def test_a_file_that_is_cut_short_meanwhile_is_an_error_of_join(
    stored: tuple[LocalStore, EngineManifest],
) -> None:
    store, engine = stored
    with WeightReader(store, engine) as reader:
        reader.start_verify()
        reader.verify()
        blob = engine.layer("weights/00000")
        with open(store.blob_path(blob.digest), "r+b") as file:
            file.truncate(500)
        copy = WeightCopy(reader, reader.index.tensors, _CPU, [HostLane(1000)])
        with copy, pytest.raises(DigestMismatch):
            copy.join()


def test_leaving_early_ends_the_threads(stored: tuple[LocalStore, EngineManifest]) -> None:
    lane = StuckLane(1000)
    with WeightReader(*stored) as reader:
        reader.start_verify()
        copy = WeightCopy(reader, ["0", "1"], _CPU, [lane])
        lane.is_asked.wait()
        lane.may_go.set()
        copy.__exit__(None, None, None)
    assert not [t for t in threading.enumerate() if t.name.startswith("copy-weights")]
