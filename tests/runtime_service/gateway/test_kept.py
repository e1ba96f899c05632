"""What the gateway keeps of generations that have ended."""

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.kept import MAX_KEPT_BYTES, KeptGenerations
from runtime_service.gateway.routed_generation import RoutedGeneration
from runtime_service.gateway.run import Run
from shared.errors import GenerationNotFound


class _Nowhere:
    """A placer that runs nothing."""

    def place(self, run: Run) -> None: ...
    def ended(self, generation: RoutedGeneration, reason: str) -> None: ...
    def recovered(self, generation: RoutedGeneration) -> None: ...
    def first_token(self, seconds: float) -> None: ...


def ended(kept: KeptGenerations, name: str, num_bytes: int) -> None:
    """A generation of that id and about that size, which has ended."""
    generation = RoutedGeneration(name, _Nowhere(), lambda _: None, lambda _: None)
    generation.begin(pb.StartGeneration(text="x" * num_bytes), "", name)
    kept.add(generation)
    kept.ended(generation)


async def test_large_generations_make_room_of_as_many_small_ones_as_it_takes() -> None:
    kept = KeptGenerations(keep_s=60.0)
    for number in range(100):
        ended(kept, f"small {number}", 1)
    large = MAX_KEPT_BYTES // 4 + 1
    for number in range(4):
        ended(kept, f"large {number}", large)
    for gone in ("small 99", "large 0"):
        with pytest.raises(GenerationNotFound):
            kept.find(gone, "")
    assert kept.find("large 1", "").request_id == "large 1"
