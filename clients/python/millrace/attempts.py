"""The calls that one generation takes: its start, and what follows where one fails; pure.

A start of which nothing arrived is sent again, where that can help. Later on the generation is
resumed, by the id that the server gave it and the tokens that have arrived, so that no token is
lost and none comes twice. Both end after `Retries.max_attempts` calls in a row that bring no token.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from millrace.errors import MillraceError, is_lost_call
from millrace.generation import Collector, Generation
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2 as pb

# A daemon ends a generation at its deadline and says so; who hears nothing waits this much longer.
_DEADLINE_GRACE_S = 0.5


class Attempts:
    """What a stream asks next, and whether it asks again.

    Args:
        command: the first request, a start or a resume.
        collector: what has arrived; the stream feeds it.
        clock: seconds; a start's deadline counts from its first call.
    """

    def __init__(
        self,
        command: pb.GenerateStreamRequest,
        collector: Collector,
        retries: Retries,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_resumes = 0
        self._command = command
        self._collector = collector
        self._retries = retries
        self._clock = clock
        self._deadline_s: float | None = None
        self._num_fruitless = 0
        # As they were when the running call was opened.
        self._num_tokens = self._num_events = 0

    def open(self) -> pb.GenerateStreamRequest:
        """The request of the call that is opened now."""
        collector, start = self._collector, self._command.start
        if self._deadline_s is None and start.HasField("timeout"):
            timeout_s = start.timeout.ToMilliseconds() / 1000
            self._deadline_s = self._clock() + timeout_s + _DEADLINE_GRACE_S
        self._num_tokens, self._num_events = sum(collector.received_tokens), collector.num_events
        if not collector.has_started:
            return self._command
        self.num_resumes += 1
        return resume_generation(collector.generation_id, collector.received_tokens)

    def timeout_s(self) -> float | None:
        """What is left for the call that is opened now; None: it may take its time."""
        return None if self._deadline_s is None else max(self._deadline_s - self._clock(), 0.0)

    def delay_s(self, error: MillraceError) -> float | None:
        """How long to wait before the next call, now that one has failed; None: there is none."""
        collector = self._collector
        if sum(collector.received_tokens) > self._num_tokens:
            self._num_fruitless = 0
        self._num_fruitless += 1
        if collector.num_events > self._num_events and not is_lost_call(error):
            return None  # it is the generation that failed, not its call
        if collector.has_started and not collector.generation_id:
            return None
        delay_s = self._retries.delay_s(error, self._num_fruitless)
        left_s = self.timeout_s()
        return None if delay_s is None or (left_s is not None and delay_s >= left_s) else delay_s


class StreamState:
    """What a stream knows of its generation; blocking and async streams have the same."""

    def __init__(self, command: pb.GenerateStreamRequest, retries: Retries) -> None:
        resume = command.resume
        self._collector = Collector(resume.generation_id, resume.received_tokens)
        self._attempts = Attempts(command, self._collector, retries)

    @property
    def generation_id(self) -> str:
        """Names it for `Client.resume`; "" before it has started, and where it cannot be resumed."""
        return self._collector.generation_id

    @property
    def received_tokens(self) -> Sequence[int]:
        """Tokens that have arrived, by sample."""
        return tuple(self._collector.received_tokens)

    @property
    def num_resumes(self) -> int:
        """How often its connection was lost and it went on over another one."""
        return self._attempts.num_resumes

    @property
    def result(self) -> Generation:
        """The finished generation.

        Raises:
            RuntimeError: the stream was not read to its end.
        """
        if self._collector.result is None:
            raise RuntimeError("the generation has not finished: read the stream to its end first")
        return replace(self._collector.result, num_resumes=self.num_resumes)


def resume_generation(
    generation_id: str, received_tokens: Sequence[int]
) -> pb.GenerateStreamRequest:
    """The request that goes on with a generation after so many tokens of each sample."""
    resume = pb.ResumeGeneration(generation_id=generation_id, received_tokens=received_tokens)
    return pb.GenerateStreamRequest(resume=resume)
