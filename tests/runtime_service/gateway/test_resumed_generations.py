"""A client that lost its connection to the gateway goes on after the last token that it has."""

from pathlib import Path

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import reason_of
from tests.runtime_service.daemon import TOKENIZER, Call, Seen, until
from tests.runtime_service.gateway.running_gateway import (
    TEXT,
    RunningGateway,
    generation_id_of,
    running_fleet,
    running_gateway,
)


async def resumed(
    fleet: RunningGateway, generation_id: str, *received: int, **fields: int
) -> tuple[Call, Seen]:
    """What a new call sees of that generation."""
    call = fleet.call()
    await call.send(
        resume=pb.ResumeGeneration(
            request_id="again", generation_id=generation_id, received_tokens=received, **fields
        )
    )
    return call, (await call.finish())["again"]


@pytest.mark.parametrize("num_read", [0, 1, 7, 33])
async def test_lost_client_goes_on_after_the_last_token_that_it_has(
    tmp_path: Path, num_read: int
) -> None:
    prompt = TOKENIZER.encode(TEXT).ids
    total = 2 * len(prompt)
    async with running_fleet(tmp_path, step_s=0.002) as fleet:
        call = fleet.call()
        await call.start("a", TEXT, max_new_tokens=total)
        await call.read_until(lambda: call.num_tokens("a") > 40)
        chunks = call.seen["a"].chunks
        num_chunks = next(
            n for n in range(len(chunks) + 1)
            if sum(len(c.token_ids) for c in chunks[:n]) >= num_read
        )  # fmt: skip
        had = sum(len(chunk.token_ids) for chunk in chunks[:num_chunks])
        text = "".join(chunk.text for chunk in chunks[:num_chunks])
        call.raw.cancel()
        _, seen = await resumed(fleet, generation_id_of(call), had)
    assert seen.finished is not None, seen.error
    assert seen.token_ids[0] == (prompt * 2)[had:]
    assert text + seen.text[0] == TEXT * 2
    assert seen.finished.usage.generated_tokens == total
    assert seen.seed == call.seen["a"].seed
    assert fleet.sample("resumed_generations_total") == 1


async def test_resumed_generation_leaves_the_call_that_nobody_reads(tmp_path: Path) -> None:
    """A half-open connection: the old call has not noticed yet."""
    async with running_fleet(tmp_path, step_s=0.004) as fleet:
        old = fleet.call()
        await old.start("a", [40, 41], max_new_tokens=100, credit_tokens=10)
        await old.read_until(lambda: old.num_tokens("a") > 4)
        had = old.num_tokens("a")
        _, seen = await resumed(fleet, generation_id_of(old), had, credit_tokens=1000)
        assert seen.token_ids[0] == ([40, 41] * 50)[had:]
        await old.done()
        await old.read_rest()
        assert old.seen["a"].num_terminal == 0


async def test_finished_generation_can_be_read_again_and_samples_go_on_apart(
    tmp_path: Path,
) -> None:
    async with running_fleet(tmp_path) as fleet:
        call = fleet.call()
        sampling = pb.SamplingParams(n=2, seed=3)
        await call.start("a", [40, 41, 42], max_new_tokens=9, sampling=sampling)
        await call.finish()
        _, seen = await resumed(fleet, generation_id_of(call), 9, 4)
    assert seen.token_ids == {1: ([40, 41, 42] * 3)[4:]}
    assert seen.finished is not None, seen.error
    assert [sample.reason for sample in seen.finished.samples] == [pb.FINISH_REASON_LENGTH] * 2
    assert seen.finished.usage.generated_tokens == 18


async def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1, step_s=0.004) as fleet:
        call = fleet.call()
        await call.start("a", [40, 41], max_new_tokens=300, credit_tokens=10)
        await call.read_until(lambda: call.num_tokens("a") > 4)
        known = generation_id_of(call)
        for generation_id, received, reason in (
            ("nothing", (), "GENERATION_NOT_FOUND"),
            (known, (400,), "INVALID_FIELD"),
            (known, (1, 1), "INVALID_FIELD"),
            (known, (-1,), "INVALID_FIELD"),
        ):
            _, seen = await resumed(fleet, generation_id, *received)
            assert reason_of(seen.error) == reason
        await call.send(cancel=pb.CancelGeneration(request_id="a"))
        assert (await call.finish())["a"].reason == "CANCELLED"
        _, seen = await resumed(fleet, known)
        assert reason_of(seen.error) == "GENERATION_NOT_FOUND"
        runtime = fleet.daemons[0].call()
        await runtime.send(resume=pb.ResumeGeneration(request_id="r", generation_id=known))
        seen = (await runtime.finish())["r"]
        assert reason_of(seen.error) == "GENERATION_NOT_FOUND"


async def test_generation_is_forgotten_after_a_while(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, num_runtimes=1) as fleet:
        addresses = [fleet.daemons[0].server.address]
        async with running_gateway(addresses, fleet.daemons, keep_s=0.05) as forgetful:
            call = forgetful.call()
            await call.start("a", [40, 41], max_new_tokens=3)
            await call.finish()
            kept = forgetful.gateway._kept._items
            await until(lambda: not kept)
            _, seen = await resumed(forgetful, generation_id_of(call), 1)
    assert reason_of(seen.error) == "GENERATION_NOT_FOUND"
