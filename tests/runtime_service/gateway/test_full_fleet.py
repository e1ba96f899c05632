"""A fleet that is full refuses at once, fairly, and without asking runtimes whose answer it knows."""

import os
import signal
from pathlib import Path

from millrace.runtime.v1 import runtime_pb2 as pb

from shared.errors import from_status
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS, HANG_S, Call, Daemon, Seen, until
from tests.runtime_service.gateway.running_gateway import RunningGateway, is_whole, running_fleet

# No look at a runtime while a test runs: what the gateway knows is what it has seen itself.
FULL = {
    "poll_s": HANG_S,
    "max_waiting_tokens": 8,
    "max_sequences": 1,
    "step_s": 0.002,
    **ENDLESS,
}
PROMPT = [40, 41, 42, 43]


async def started(call: Call, name: str) -> None:
    """Waits until a runtime has taken this one."""
    await call.read_until(lambda: bool(call.seen.get(name, Seen()).prompt_tokens))


async def running(call: Call, name: str) -> None:
    """Waits until this one has a token."""
    await call.read_until(lambda: call.num_tokens(name) > 0)


async def fill(fleet: RunningGateway, call: Call) -> Daemon:
    """The runtime on which "running" runs for ever; "waiting" and "next" fill its queue, and no other's."""
    await call.start("running", PROMPT, max_new_tokens=ENDLESS_TOKENS)
    await call.read_until(lambda: call.num_tokens("running") > 0)
    daemon = fleet.busiest()
    for number in range(1, len(fleet.daemons)):
        # A prompt that begins as none before goes where there is least to do.
        name = f"running {number}"
        await call.start(name, [40 + number, *PROMPT], max_new_tokens=ENDLESS_TOKENS)
        await running(call, name)
    for name in ("waiting", "next"):
        # One that begins as "running" goes where that runs.
        await call.start(name, PROMPT, max_new_tokens=8)
        await started(call, name)
    assert fleet.runs_on(daemon) == 3
    return daemon


async def fill_known(fleet: RunningGateway, call: Call) -> Daemon:
    """Likewise, of a fleet of one; and it has said so."""
    daemon = await fill(fleet, call)
    await call.start("refused", PROMPT)
    assert await reason(call, "refused") == "QUEUE_FULL"
    return daemon


async def cancel(call: Call, name: str) -> None:
    """Cancels this one and waits for its end."""
    await call.send(cancel=pb.CancelGeneration(request_id=name))
    await call.read_to_end(name)


async def reason(call: Call, name: str) -> str:
    """Why this one fails."""
    return from_status((await call.read_to_end(name)).error).reason


def num_refused(daemon: Daemon) -> float:
    """Starts that the runtime itself has refused."""
    return daemon.runtime.metrics.num_ended("QUEUE_FULL")


async def test_other_runtimes_take_what_a_full_one_does_not(tmp_path: Path) -> None:
    """Only what all are known to be full for is refused early, with the delay of the shorter line."""
    async with running_fleet(tmp_path, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        full = await fill(fleet, call)
        (other,) = (daemon for daemon in fleet.daemons if daemon is not full)
        await call.start("moved", PROMPT)  # the full one says that it is
        await started(call, "moved")
        assert (num_refused(full), num_refused(other)) == (1, 0)
        await call.start("sent elsewhere", PROMPT)
        await started(call, "sent elsewhere")
        assert (num_refused(full), num_refused(other)) == (1, 0)
        assert [fleet.runs_on(daemon) for daemon in (full, other)] == [3, 3]
        delays = []
        for number in range(8):
            await call.start(str(number), PROMPT)
            error = from_status((await call.read_to_end(str(number))).error)
            assert error.reason == "QUEUE_FULL"
            delays.append(error.retry_after_s or 0.0)
        assert (num_refused(full), num_refused(other)) == (1, 1)
        # Half of a queue each, which takes half a second as long as nothing is seen to leave it.
        assert max(delays) < 2.2, "the two lines grow alike"
        assert min(delays) > 0
        call.raw.cancel()


async def test_starts_without_credit_are_no_part_of_the_queue(tmp_path: Path) -> None:
    """Neither those that the runtime takes, nor those that are too many."""
    async with running_fleet(tmp_path, 1, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        daemon = await fill_known(fleet, call)
        for number in range(10):
            await call.start(str(number), PROMPT, credit_tokens=0)
        for number in range(2, 10):
            assert await reason(call, str(number)) == "QUEUE_FULL"
        await cancel(call, "waiting")
        await call.start("has room", PROMPT)
        await started(call, "has room")
        assert num_refused(daemon) == 9
        call.raw.cancel()


async def test_cancelled_starts_without_credit_make_no_room(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 1, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        for name in ("held", "too"):
            await call.start(name, PROMPT, credit_tokens=0)
            await started(call, name)
        daemon = await fill_of_held(fleet, call)
        (link,) = fleet.fleet
        num_left = link._line._num_left
        for name in ("held", "too"):
            await cancel(call, name)
        assert link._line._num_left == num_left, "the queue seems to drain faster"
        await call.start("late", PROMPT)
        assert await reason(call, "late") == "QUEUE_FULL"
        assert num_refused(daemon) == 1, "the runtime was asked"
        call.raw.cancel()


async def fill_of_held(fleet: RunningGateway, call: Call) -> Daemon:
    """As `fill_known`, where "held" and "too" run already."""
    (daemon,) = fleet.daemons
    await call.start("running", PROMPT, max_new_tokens=ENDLESS_TOKENS)
    await call.read_until(lambda: call.num_tokens("running") > 0)
    for name in ("waiting", "next", "refused"):
        await call.start(name, PROMPT, max_new_tokens=8)
    assert await reason(call, "refused") == "QUEUE_FULL"
    return daemon


async def test_start_that_gets_its_first_credit_joins_the_queue(tmp_path: Path) -> None:
    """It takes the room that another leaves."""
    async with running_fleet(tmp_path, 1, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        daemon = await fill_known(fleet, call)
        await call.start("held", PROMPT, credit_tokens=0)
        await started(call, "held")
        await call.let_go_on("held")
        await cancel(call, "waiting")
        await call.start("late", PROMPT)
        assert await reason(call, "late") == "QUEUE_FULL"
        assert num_refused(daemon) == 1, "the runtime was asked"
        await cancel(call, "held")
        await call.start("has room", PROMPT)
        await started(call, "has room")
        call.raw.cancel()


async def test_prompt_that_never_runs_is_refused_as_such_and_stands_in_no_line(
    tmp_path: Path,
) -> None:
    too_long = int(ENDLESS["max_sequence_tokens"]) + 1
    async with running_fleet(tmp_path, 1, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        await fill_known(fleet, call)
        (link,) = fleet.fleet
        num_left, excess = link._line._num_left, link._excess_tokens
        before_s = from_status(call.seen["refused"].error).retry_after_s or 0.0
        await call.start("long", [40] * too_long)
        assert await reason(call, "long") == "PROMPT_TOO_LONG"
        assert (link._line._num_left, link._excess_tokens) == (num_left, excess)
        await call.start("late", PROMPT)
        after_s = from_status((await call.read_to_end("late")).error).retry_after_s or 0.0
        assert after_s <= before_s + 0.6
        call.raw.cancel()


async def test_resumed_start_is_for_its_runtime_to_refuse(tmp_path: Path) -> None:
    """It may have nothing left to wait for."""
    async with running_fleet(tmp_path, 1, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        await fill_known(fleet, call)
        await call.start("at its end", PROMPT, max_new_tokens=2, resumed_token_ids=[40, 41])
        assert (await call.read_to_end("at its end")).reason == "LENGTH"
        call.raw.cancel()


async def test_moved_generation_asks_a_runtime_that_is_known_to_be_full(tmp_path: Path) -> None:
    """Nothing new is sent there: it must not wait behind that, nor until the next look."""
    async with running_fleet(tmp_path, **FULL) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        full = await fill(fleet, call)
        (lost,) = (daemon for daemon in fleet.daemons if daemon is not full)
        await call.start("elsewhere", PROMPT)
        await started(call, "elsewhere")
        await cancel(call, "elsewhere")
        assert num_refused(full) == 1
        os.kill(lost.client.pid, signal.SIGKILL)
        await until(lambda: num_refused(full) > 1)
        for name in ("running", "waiting", "next"):
            await cancel(call, name)
        await until(lambda: fleet.runs_on(full) == 1)
        await call.send(cancel=pb.CancelGeneration(request_id="running 1"))
        assert (await call.read_to_end("running 1")).reason == "CANCELLED"


async def test_starts_without_credit_that_are_too_many_keep_nobody_else_out(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 1, poll_s=HANG_S, max_waiting_tokens=8) as fleet:
        call = fleet.call()
        for name in ("held", "too", "many"):
            await call.start(name, [40, 41, 42, 43], max_new_tokens=2, credit_tokens=0)
        await call.read_to_end("many")
        await call.start("after", [40, 41, 42, 43], max_new_tokens=2)
        await call.read_to_end("after")
        for name in ("held", "too"):
            await call.let_go_on(name)
        seen = await call.finish()
    assert from_status(seen["many"].error).reason == "QUEUE_FULL"
    for name in ("held", "too", "after"):
        is_whole(seen[name], [40, 41, 42, 43], 2)


async def test_full_runtime_is_not_asked_again_until_something_leaves_its_queue(
    tmp_path: Path,
) -> None:
    """Refusing is what an overloaded fleet does most: only the first refusal costs the runtime anything."""
    options = {"max_waiting_tokens": 8, "max_sequences": 1, "step_s": 0.002, **ENDLESS}
    async with running_fleet(tmp_path, 1, poll_s=HANG_S, **options) as fleet:  # type: ignore[arg-type]
        call, metrics = fleet.call(), fleet.daemons[0].runtime.metrics
        await call.start("running", [40, 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("running") > 0)
        for name in ("waiting", "next", "refused"):
            await call.start(name, [40, 41, 42, 43], max_new_tokens=8)
        await call.read_to_end("refused")
        assert metrics.num_ended("QUEUE_FULL") == 1
        late = [str(number) for number in range(50)]
        for name in late:
            await call.start(name, [40, 41, 42, 43], max_new_tokens=8)
        errors = [from_status((await call.read_to_end(name)).error) for name in late]
        assert {error.reason for error in errors} == {"QUEUE_FULL"}
        assert all(error.retry_after_s for error in errors)
        assert metrics.num_ended("QUEUE_FULL") == 1
        # None of them became a generation, and all of them count.
        assert fleet.sample("generations_total", reason="QUEUE_FULL") == 51
        assert fleet.sample("running_generations") == 3
        await call.send(cancel=pb.CancelGeneration(request_id="waiting"))
        await call.read_to_end("waiting")
        await call.start("asks", [40, 41, 42, 43], max_new_tokens=8)
        await call.start("too many", [40], max_new_tokens=8)
        await call.read_to_end("too many")
        assert metrics.num_ended("QUEUE_FULL") == 1, "what leaves and what comes is known here"
        await call.send(cancel=pb.CancelGeneration(request_id="running"))
        await call.read_until(lambda: call.num_tokens("next") > 0)
        await call.start("after", [40, 41], max_new_tokens=2)
        seen = await call.finish()
    is_whole(seen["asks"], [40, 41, 42, 43], 8)
    is_whole(seen["after"], [40, 41], 2)


async def test_refused_starts_come_back_spread_over_the_time_that_they_take(tmp_path: Path) -> None:
    """The gateway knows of all of them, of which the runtime was asked about one."""
    options = {"max_waiting_tokens": 8, "max_sequences": 1, "step_s": 0.002, **ENDLESS}
    async with running_fleet(tmp_path, 1, poll_s=HANG_S, **options) as fleet:  # type: ignore[arg-type]
        call = fleet.call()
        await call.start("running", [40, 41], max_new_tokens=ENDLESS_TOKENS)
        await call.read_until(lambda: call.num_tokens("running") > 0)
        names = [str(number) for number in range(200)]
        for name in names:
            await call.start(name, [40, 41, 42, 43])
        await call.read_until(lambda: sum(one.num_terminal for one in call.seen.values()) > 190)
        delays = [
            from_status(one.error).retry_after_s or 0.0
            for one in (call.seen.get(name, Seen()) for name in names)
            if one.error is not None
        ]
        assert len(set(delays)) > len(delays) / 4
        assert max(delays) > 20 * min(delays)
        call.raw.cancel()
        most_at_once = max(delays.count(delay_s) for delay_s in set(delays))
        assert most_at_once < 10
