"""The async SDK against a scripted daemon: streams, and many of them on one call."""

import asyncio

import millrace
import pytest
from millrace.retries import Retries

from shared.errors import EngineLost, PromptTooLong
from tests.clients.scripted_daemon import TEXT, WORDS, Script, ScriptedDaemon


async def test_async_stream_gives_the_same(daemon: ScriptedDaemon) -> None:
    async with millrace.AsyncClient(runtime=daemon.address) as client:
        async with client.generate("hello") as stream:
            texts = [chunk.text async for chunk in stream]
        assert texts == list(WORDS)
        assert stream.result.text == TEXT


async def test_leaving_an_async_block_cancels(daemon: ScriptedDaemon, script: Script) -> None:
    script.blocks_after = 1
    async with millrace.AsyncClient(runtime=daemon.address) as client:
        async with client.generate("hello") as stream:
            async for chunk in stream:
                assert chunk.text == "Once"
                break
        assert await asyncio.to_thread(script.cancelled.wait, 60)


async def test_cancelled_task_cancels_its_generation(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.blocks_after = 1
    async with millrace.AsyncClient(runtime=daemon.address) as client:
        stream = client.generate("hello")
        arrived = asyncio.Event()

        async def read() -> None:
            async for _ in stream:
                arrived.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(arrived.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(script.cancelled.wait, 60)


async def test_session_carries_many_generations_on_one_call(daemon: ScriptedDaemon) -> None:
    async with (
        millrace.AsyncClient(runtime=daemon.address) as client,
        client.session() as session,
    ):
        results = await asyncio.gather(
            *(session.generate("hello", seed=1 + i).wait() for i in range(20))
        )
    assert [result.seed for result in results] == list(range(1, 21))
    assert {result.text for result in results} == {TEXT}


async def test_failing_generation_leaves_the_others_of_its_session(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.failures = [PromptTooLong(prompt_tokens=9, max_sequence_tokens=8)]
    async with (
        millrace.AsyncClient(runtime=daemon.address) as client,
        client.session() as session,
    ):
        results = await asyncio.gather(
            *(session.generate("hello").wait() for _ in range(3)), return_exceptions=True
        )
    failed = [result for result in results if isinstance(result, millrace.MillraceError)]
    assert [error.reason for error in failed] == ["PROMPT_TOO_LONG"]
    assert sum(isinstance(result, millrace.Generation) for result in results) == 2


async def test_session_start_is_tried_again_when_nothing_arrived(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.failures = [EngineLost(problem="killed", retry_after_s=0.02)]
    async with (
        millrace.AsyncClient(runtime=daemon.address) as client,
        client.session() as session,
    ):
        assert (await session.generate("hello").wait()).text == TEXT
    assert [request.start.request_id for request in script.asked[:2]] == ["1", "2"]


async def test_closing_a_session_stream_cancels_that_generation_alone(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.blocks_after = 1
    async with (
        millrace.AsyncClient(runtime=daemon.address) as client,
        client.session() as session,
    ):
        async with session.generate("hello") as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(script.cancelled.wait, 60)
        assert script.asked[-1].cancel.request_id == "1"
        script.blocks_after = None
        assert (await session.generate("hello").wait()).text == TEXT


async def test_broken_call_ends_every_stream_of_its_session(script: Script) -> None:
    script.blocks_after = 1
    with ScriptedDaemon(script) as daemon:
        client = millrace.AsyncClient(runtime=daemon.address, retries=Retries(max_attempts=1))
        async with client, client.session() as session:
            streams = [session.generate("hello") for _ in range(3)]
            first = [await anext(aiter(stream)) for stream in streams]
            assert [chunk.text for chunk in first] == ["Once"] * 3
            await asyncio.to_thread(daemon.__exit__)
            ended = await asyncio.gather(
                *(stream.wait() for stream in streams), return_exceptions=True
            )
    assert all(isinstance(end, millrace.MillraceError) for end in ended)


async def test_closing_a_session_stream_ends_who_reads_it(
    daemon: ScriptedDaemon, script: Script
) -> None:
    """Its events have no place to arrive any more, so nobody may go on waiting for them."""
    script.blocks_after = 1
    async with (
        millrace.AsyncClient(runtime=daemon.address) as client,
        client.session() as session,
    ):
        stream = session.generate("hello")
        chunks = aiter(stream)
        assert (await anext(chunks)).text == "Once"
        waiting = asyncio.ensure_future(anext(chunks, None))
        await asyncio.sleep(0)
        await stream.close()
        assert await asyncio.wait({waiting}, timeout=30) == ({waiting}, set())
        assert waiting.result() is None


@pytest.mark.parametrize("closed", ["session", "client"])
async def test_leaving_a_session_ends_every_stream_of_it(
    daemon: ScriptedDaemon, script: Script, closed: str
) -> None:
    """As cancelled: they neither wait for ever nor go on over a call that nobody would close."""
    script.blocks_after = 1
    async with millrace.AsyncClient(runtime=daemon.address) as client:
        async with client.session() as session:
            chunks = [aiter(session.generate("hello")) for _ in range(3)]
            for one in chunks:
                assert (await anext(one)).text == "Once"
            waiting = [asyncio.ensure_future(anext(one, None)) for one in chunks]
            await asyncio.sleep(0)
            if closed == "client":
                await client.close()
        ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
    reasons = [end.reason for end in ended if isinstance(end, millrace.MillraceError)]
    assert reasons == ["CANCELLED"] * 3
    assert len(script.asked) == 3
