"""A runtime that computes nothing: each generation gets a token at a fixed pace.

    python -m bench.paced_runtime [--listen 127.0.0.1:0] [--first-ms 50] [--pace-ms 20]

Prints its address. What clients of it measure beyond its pace is the path between and their own
slowness: bench/gateway_latency.py and the load generator's tests use it. All generations of a call
that are due together go into one message, as a real runtime's step does.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from millrace.engine.v1 import engine_pb2
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

_ROUNDING_S = 1e-6


@dataclass(slots=True)
class Pace:
    """When tokens come: the first after `first_s`, each of the others after `token_s`.

    Args:
        step_s: tokens come only at multiples of it, as steps do; 0: whenever they are due.
        stamps: a token's text is the monotonic time at which it was sent.
    """

    first_s: float = 0.05
    token_s: float = 0.02
    step_s: float = 0.0
    stamps: bool = False


class PacedRuntime(runtime_pb2_grpc.RuntimeServiceServicer):
    """RuntimeService at a pace."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._started_s = time.time()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """Always serving."""
        response = pb.GetStatusResponse(
            state=pb.RUNTIME_STATE_SERVING,
            runtime_id="paced",
            engine=engine_pb2.Engine(name=f"engines/{'ab' * 32}", model="paced"),
        )
        response.start_time.FromMicroseconds(round(self._started_s * 1e6))
        response.limits.max_sequence_tokens = 1 << 20
        return response

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One generation."""
        call = _Call(self._pace)
        call.start(request.start)
        call.is_closed = True
        async for events in call.messages():
            yield pb.GenerateStreamResponse(events=events)

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Many generations."""
        call = _Call(self._pace)
        reading = asyncio.create_task(call.read(request_iterator))
        try:
            async for events in call.messages():
                yield pb.GenerateResponse(events=events)
        finally:
            reading.cancel()


class _Call:
    """The generations of one call, by when their next token is due."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._due_s: dict[str, float] = {}
        self._left: dict[str, int] = {}
        self._totals: dict[str, tuple[float, int, int]] = {}
        self._events: list[pb.Event] = []
        self._news = asyncio.Event()
        self.is_closed = False

    async def read(self, requests: AsyncIterator[pb.GenerateRequest]) -> None:
        async for request in requests:
            if request.HasField("start"):
                self.start(request.start)
            elif request.HasField("cancel") and request.cancel.request_id in self._due_s:
                self._finish(request.cancel.request_id, pb.FINISH_REASON_CANCELLED)
            self._news.set()
        self.is_closed = True
        self._news.set()

    def start(self, start: pb.StartGeneration) -> None:
        name, num_tokens = start.request_id, max(start.stop.max_new_tokens, 1)
        now_s, num_prompt_tokens = time.monotonic(), len(start.token_ids.ids)
        started = pb.GenerationStarted(seed=1, prompt_tokens=num_prompt_tokens)
        self._events.append(pb.Event(request_id=name, started=started))
        self._due_s[name] = self._step(now_s + self._pace.first_s)
        self._left[name] = num_tokens
        self._totals[name] = (now_s, num_prompt_tokens, num_tokens)

    async def messages(self) -> AsyncIterator[list[pb.Event]]:
        while self._due_s or self._events or not self.is_closed:
            if self._events:
                events, self._events = self._events, []
                yield events
                continue
            self._news.clear()
            next_s = min(self._due_s.values(), default=time.monotonic() + 60)
            try:
                async with asyncio.timeout(max(next_s - time.monotonic(), 0)):
                    await self._news.wait()
            except TimeoutError:
                self._advance(next_s)

    def _advance(self, next_s: float) -> None:
        for name in [name for name, due_s in self._due_s.items() if due_s <= next_s]:
            text = f"{time.monotonic():.6f} " if self._pace.stamps else "x"
            chunk = pb.TokenChunk(text=text, token_ids=[self._left[name]])
            self._events.append(pb.Event(request_id=name, tokens=chunk))
            self._left[name] -= 1
            # From when it was due, not from when it came: lateness does not add up.
            self._due_s[name] = self._step(self._due_s[name] + self._pace.token_s)
            if not self._left[name]:
                self._finish(name, pb.FINISH_REASON_LENGTH)

    def _finish(self, name: str, reason: pb.FinishReason.ValueType) -> None:
        start_s, num_prompt_tokens, num_tokens = self._totals.pop(name)
        usage = pb.Usage(
            prompt_tokens=num_prompt_tokens, generated_tokens=num_tokens - self._left.pop(name)
        )
        del self._due_s[name]
        total = Duration()
        total.FromNanoseconds(round((time.monotonic() - start_s) * 1e9))
        finished = pb.GenerationFinished(
            samples=[pb.SampleFinish(reason=reason)], usage=usage, timings=pb.Timings(total=total)
        )
        self._events.append(pb.Event(request_id=name, finished=finished))

    def _step(self, due_s: float) -> float:
        step_s = self._pace.step_s
        # A rounding error is no reason to wait for the step after.
        return due_s if not step_s else -(-(due_s - _ROUNDING_S) // step_s) * step_s


async def start_paced_runtime(pace: Pace, listen: str = "127.0.0.1:0") -> tuple[Any, str]:
    """A started grpc.aio server, and its address."""
    server = grpc.aio.server()
    runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(PacedRuntime(pace), server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port(listen)
    await server.start()
    return server, f"{listen.rpartition(':')[0]}:{port}"


async def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--first-ms", type=float, default=50.0)
    parser.add_argument("--pace-ms", type=float, default=20.0)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--stamps", action="store_true")
    given = parser.parse_args()
    pace = Pace(given.first_ms / 1e3, given.pace_ms / 1e3, given.step_ms / 1e3, given.stamps)
    server, address = await start_paced_runtime(pace, given.listen)
    print(address, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
