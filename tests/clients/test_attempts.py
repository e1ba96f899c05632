"""When a stream of the SDK asks again: the parts that pass with time."""

import grpc
from millrace.attempts import Attempts
from millrace.errors import UNREACHABLE, MillraceError
from millrace.generation import Collector, start_generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2 as pb

LOST = MillraceError("lost", UNREACHABLE, grpc.StatusCode.UNAVAILABLE)


def attempts_of(start: pb.StartGeneration, clock: list[float]) -> tuple[Attempts, Collector]:
    collector = Collector()
    command = pb.GenerateStreamRequest(start=start)
    return Attempts(command, collector, Retries(max_attempts=3), lambda: clock[0]), collector


def test_no_call_is_waited_for_beyond_the_deadline() -> None:
    clock = [10.0]
    attempts, _ = attempts_of(start_generation("hello", timeout_s=1.0), clock)
    clock[0] = 100.0  # the deadline counts from the first call
    attempts.open()
    assert attempts.timeout_s() == 1.5
    first_s = attempts.delay_s(LOST)
    assert first_s is not None
    assert 0.1 <= first_s < 0.2
    clock[0] = 101.45
    assert attempts.delay_s(LOST) is None


def test_losses_that_bring_events_and_no_token_end() -> None:
    attempts, collector = attempts_of(start_generation("hello"), [0.0])
    for is_last in (False, False, True):
        attempts.open()
        collector.take(pb.Event(started=pb.GenerationStarted(generation_id="x1")))
        assert (attempts.delay_s(LOST) is None) is is_last
    assert attempts.num_resumes == 2


def test_losses_that_follow_tokens_do_not_end() -> None:
    attempts, collector = attempts_of(start_generation("hello"), [0.0])
    for index in range(9):
        request = attempts.open()
        assert list(request.resume.received_tokens) == ([index] if index else [])
        collector.take(pb.Event(started=pb.GenerationStarted(generation_id="x1")))
        collector.take(pb.Event(tokens=pb.TokenChunk(token_ids=[index])))
        assert attempts.delay_s(LOST) is not None
