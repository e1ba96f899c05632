"""The two generating rpcs, for whoever keeps calls: a runtime, or a gateway.

Both give their calls back however they end, so that what a lost client started ends with its call.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Protocol

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.generation_call import GenerationCall, Member
from shared.auth import Principal
from shared.errors import from_status


class CallKeeper(Protocol[Member]):
    """Where calls are opened."""

    def open_call(self, caller: Principal) -> GenerationCall[Member]:
        """A new call; give it back with `close_call`."""

    def close_call(self, call: GenerationCall[Member]) -> None:
        """Ends what still runs on `call`: nobody reads it."""


async def generate(
    keeper: CallKeeper[Member], commands: AsyncIterator[pb.GenerateRequest], caller: Principal
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Many generations on one call."""
    call = keeper.open_call(caller)
    reading = asyncio.create_task(call.read(commands))
    try:
        async for events in call.messages():
            yield pb.GenerateResponse(events=events)
        await reading
    finally:
        keeper.close_call(call)
        reading.cancel()


async def generate_stream(
    keeper: CallKeeper[Member], request: pb.GenerateStreamRequest, caller: Principal
) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
    """One generation on one call; its error is the call's."""
    call = keeper.open_call(caller)
    try:
        resumes = request.HasField("resume")
        generation = call.resume(request.resume) if resumes else call.start(request.start)
        call.half_close()
        async for events in call.messages():
            if generation.error is not None and events[-1].HasField("error"):
                if events[:-1]:
                    yield pb.GenerateStreamResponse(events=events[:-1])
                raise generation.error
            yield pb.GenerateStreamResponse(events=events)
    finally:
        keeper.close_call(call)


async def generate_all(
    keeper: CallKeeper[Member],
    commands: Iterable[pb.StartGeneration | pb.ResumeGeneration],
    caller: Principal,
    on_begun: Callable[[list[Member]], None] | None = None,
) -> AsyncGenerator[list[pb.Event], None]:
    """Generations of which all are wanted, on one call: the first error is the call's.

    Args:
        commands: told apart by their request ids.
        on_begun: called with the generations, in order, once all are accepted.
    """
    call = keeper.open_call(caller)
    try:
        members = [
            call.start(one) if isinstance(one, pb.StartGeneration) else call.resume(one)
            for one in commands
        ]
        call.half_close()
        for member in members:
            if member.error is not None:
                raise member.error
        if on_begun is not None:
            on_begun(members)
        async for events in call.messages():
            for event in events:
                if event.HasField("error"):
                    raise from_status(event.error)
            yield events
    finally:
        keeper.close_call(call)
