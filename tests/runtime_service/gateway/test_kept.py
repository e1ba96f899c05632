"""What the gateway keeps of generations that have ended."""

import gc
import tracemalloc
import weakref

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.kept import MAX_KEPT_BYTES, KeptGenerations
from runtime_service.gateway.routed_generation import KEPT_GENERATION_BYTES, RoutedGeneration
from runtime_service.gateway.run import Run
from runtime_service.generation_call import GenerationCall, OnMember
from shared.errors import EngineLost, GenerationNotFound
from shared.quotas import GenerationQuota


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


async def test_generation_that_made_room_takes_none_any_more() -> None:
    """What is forgotten early is gone, not only unknown until its time is over."""
    kept = KeptGenerations(keep_s=60.0)
    generation = RoutedGeneration("a", _Nowhere(), lambda _: None, lambda _: None)
    generation.begin(pb.StartGeneration(text="x"), "", "a")
    kept.add(generation)
    kept.ended(generation)
    is_there = weakref.ref(generation)
    del generation
    for number in range(4):
        ended(kept, f"large {number}", MAX_KEPT_BYTES // 4 + 1)
    gc.collect()
    assert is_there() is None


class _Starter:
    """Starts what the test then feeds."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def check_room(self, start: pb.StartGeneration, cache_salt: str) -> None: ...

    def new_generation(
        self, request_id: str, on_news: OnMember, on_end: OnMember, quota: GenerationQuota
    ) -> RoutedGeneration:
        return RoutedGeneration(request_id, _Nowhere(), on_news, on_end, quota)

    def start(
        self, generation: RoutedGeneration, start: pb.StartGeneration, cache_salt: str
    ) -> None:
        generation.begin(start, cache_salt, generation.request_id)
        self.runs.append(Run(generation, 0, 1, None))

    def resume(
        self, generation: RoutedGeneration, resume: pb.ResumeGeneration, cache_salt: str
    ) -> None: ...


@pytest.mark.parametrize("has_ended", [False, True])
async def test_what_a_lost_reader_did_not_take_is_not_kept(has_ended: bool) -> None:
    """Text and log probabilities are many times what a resumption needs, and are not counted."""
    starter = _Starter()
    call = GenerationCall(starter)
    generation = call.start(pb.StartGeneration(request_id="a", text="x"))
    (run,) = starter.runs
    generation.run_gained(run, pb.Event(tokens=pb.TokenChunk(token_ids=[1], text="one")))
    if has_ended:
        generation.fail(EngineLost(problem="a test has it so"))
    call.close()
    assert generation.is_ended
    assert list(generation.samples[0].token_ids) == [1]
    assert list(generation.take_events()) == []


async def test_small_generations_count_with_all_that_they_take() -> None:
    kept = KeptGenerations(keep_s=60.0)
    most = MAX_KEPT_BYTES // KEPT_GENERATION_BYTES
    one = RoutedGeneration("", _Nowhere(), lambda _: None, lambda _: None)
    one.begin(pb.StartGeneration(text="x"), "", "first")
    kept.add(one)
    for _ in range(most + 1):  # one object stands for all: what they take is not the matter here
        kept.ended(one)
    with pytest.raises(GenerationNotFound):
        kept.find("first", "")


async def test_token_that_was_sent_takes_as_little_as_is_counted() -> None:
    generation = RoutedGeneration("a", _Nowhere(), lambda _: None, lambda _: None)
    generation.begin(pb.StartGeneration(text="x"), "", "a")
    run = Run(generation, 0, 1, None)
    tracemalloc.start()
    for first in range(0, 100_000, 100):
        tokens = pb.TokenChunk(token_ids=range(100_000 + first, 100_100 + first))
        generation.run_gained(run, pb.Event(tokens=tokens))
        list(generation.take_events())
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes < 8 * 100_000
