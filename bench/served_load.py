"""Clients of a runtime, in processes of their own: many generations at once, and when each of their tokens arrived.

`drive` starts the processes, lets all of them go at the same moment, and joins what they saw. A generation's number is
the first token of its prompt (`bench/emissions.py`); the rest of the prompt is random, so that no prefix is cached.
"""

import asyncio
import multiprocessing
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

_TOKENS = (1000, 120_000)
_START_LIMIT_S = 120.0
_OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for.

    Args:
        first: number of the first generation; the others follow.
        processes: of clients, which share the generations evenly.
        is_multiplexed: a process has one call of Generate; else one of GenerateStream a generation.
        is_one_by_one: a process asks for its next generation when it has read the one before.
    """

    first: int
    count: int
    input_tokens: int
    output_tokens: int
    processes: int
    is_multiplexed: bool
    is_one_by_one: bool = False


@dataclass(slots=True)
class Arrivals:
    """What came of one generation: when it was asked for, and (time, tokens) of each event with tokens."""

    asked_s: float
    tokens: list[tuple[float, int]]


def drive(address: str, work: Work) -> dict[int, Arrivals]:
    """The arrivals of all generations, by number; times are of the machine's monotonic clock."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(work.processes)
    clients: list[tuple[Any, Connection]] = []
    for index in range(work.processes):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_client, args=(address, work, index, gate, theirs))
        process.start()
        theirs.close()
        clients.append((process, ours))
    seen: dict[int, Arrivals] = {}
    for process, pipe in clients:
        seen |= pipe.recv()
        process.join()
    return seen


def _client(address: str, work: Work, index: int, gate: Any, pipe: Connection) -> None:
    pipe.send(asyncio.run(_run(address, work, index, gate)))
    pipe.close()


async def _run(address: str, work: Work, index: int, gate: Any) -> dict[int, Arrivals]:
    numbers = range(work.first + index, work.first + work.count, work.processes)
    starts = [_start(number, work) for number in numbers]
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        await channel.channel_ready()
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        await asyncio.to_thread(gate.wait, _START_LIMIT_S)
        if work.is_multiplexed:
            return await _on_one_call(stub, starts)
        if work.is_one_by_one:
            seen = [await _on_its_own(stub, start) for start in starts]
        else:
            seen = await asyncio.gather(*(_on_its_own(stub, start) for start in starts))
        return dict(zip(numbers, seen, strict=True))


def _start(number: int, work: Work) -> pb.StartGeneration:
    draw = random.Random(number)
    prompt = [number, *(draw.randrange(*_TOKENS) for _ in range(work.input_tokens - 1))]
    stop = pb.StopConditions(max_new_tokens=work.output_tokens, ignore_end_tokens=True)
    return pb.StartGeneration(request_id=str(number), token_ids=pb.TokenIds(ids=prompt), stop=stop)


async def _on_one_call(stub: Any, starts: list[pb.StartGeneration]) -> dict[int, Arrivals]:
    seen: dict[int, Arrivals] = {}

    async def commands() -> Any:
        for start in starts:
            seen[int(start.request_id)] = Arrivals(time.monotonic(), [])
            yield pb.GenerateRequest(start=start)

    async for response in stub.Generate(commands()):
        now = time.monotonic()
        for event in response.events:
            _take(event, seen[int(event.request_id)], now)
    return seen


async def _on_its_own(stub: Any, start: pb.StartGeneration) -> Arrivals:
    arrivals = Arrivals(time.monotonic(), [])
    async for response in stub.GenerateStream(pb.GenerateStreamRequest(start=start)):
        now = time.monotonic()
        for event in response.events:
            _take(event, arrivals, now)
    return arrivals


def _take(event: pb.Event, arrivals: Arrivals, now: float) -> None:
    if event.HasField("tokens"):
        arrivals.tokens.append((now, len(event.tokens.token_ids)))
    elif event.HasField("error"):
        raise AssertionError(event.error.message)
