"""A fleet under a storm, for as long as one likes: what leaks, what is lost, what overload costs.

    python -m bench.chaos storm [--rounds 10] [--streams 300]
    python -m bench.chaos overload [--factor 10]

storm: rounds of streams that are cancelled at random moments; KV blocks must come back within a
second, and memory must not grow. overload: so many times what the runtimes admit at once; what is
refused says when to try again, and what is admitted does not wait longer than a full queue means.
Prints JSON lines, and fails where one of these is not so. tests/integration/test_chaos.py kills
things as well, in less time.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
from millrace.runtime.v1 import runtime_pb2 as pb

from bench.processes import cpu_s
from shared.errors import from_status
from tests.integration.fleet_processes import FleetClient, FleetProcesses, random_start
from tests.runtime_service.daemon import Call, Seen

NUM_RUNTIMES = 3
# Resident memory of any process may grow by so much, and the slowest first tokens come so many times later.
MAX_GROWTH, MAX_LATENESS = 0.02, 2.0


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("storm", "overload"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=10, help="rounds before those")
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--factor", type=int, default=10)
    arguments = parser.parse_args()
    is_storm = arguments.what == "storm"
    few = ("--max-waiting-tokens", "1500", "--max-sequences", "16")
    flags = ("--max-sequences", "128") if is_storm else few
    with (
        tempfile.TemporaryDirectory() as folder,
        FleetProcesses(Path(folder), NUM_RUNTIMES, 1, flags) as fleet,
    ):
        work = storm if is_storm else overload
        asyncio.run(with_client(fleet, work, arguments))


async def with_client(fleet: FleetProcesses, work: Any, arguments: argparse.Namespace) -> None:
    """Does `work` once the fleet serves."""
    async with grpc.aio.insecure_channel(fleet.gateway.address) as channel:
        client = FleetClient(channel)
        await client.deploy(fleet.checkpoint, NUM_RUNTIMES)
        await work(fleet, client, arguments)


async def storm(fleet: FleetProcesses, client: FleetClient, arguments: argparse.Namespace) -> None:
    """Cancels every stream of every round, and looks at what is left."""
    settled = []
    for number in range(-arguments.warm_up, arguments.rounds):
        draw = random.Random(number)
        call = Call(client.stub.Generate())
        for index in range(arguments.streams):
            start = random_start(index, (200, 400))
            start.credit_tokens = 100  # so that none is at its end before it is cancelled
            await call.send(start=start)
        waiting = list(range(arguments.streams))
        draw.shuffle(waiting)
        while waiting:
            assert await call.read()
            for _ in range(min(draw.randrange(40), len(waiting))):
                await call.send(cancel=pb.CancelGeneration(request_id=str(waiting.pop())))
        seen = await call.finish()
        assert {one.reason for one in seen.values()} == {"CANCELLED"}
        ended_s = time.monotonic()
        await client.freed(1.0)
        rss = rss_mb(fleet)
        settled.append(rss)
        freed_ms = round((time.monotonic() - ended_s) * 1000)
        print(json.dumps({"round": number, "freed_ms": freed_ms, "rss_mb": rss}), flush=True)
    # The first rounds fill the KV cache and the allocators' arenas; growth is what goes on then.
    first, last = settled[arguments.warm_up], settled[-1]
    growth = [round(after / before - 1, 4) for before, after in zip(first, last, strict=True)]
    print(json.dumps({"growth": growth}))
    assert max(growth) < MAX_GROWTH, f"memory grew by more than {MAX_GROWTH:.0%}"


def rss_mb(fleet: FleetProcesses) -> list[float]:
    """Resident memory of the gateway, and of each runtime's front and engine process."""
    processes = [psutil.Process(fleet.gateway.process.pid)]
    for runtime in fleet.runtimes:
        front = psutil.Process(runtime.process.pid)
        processes += [front, *front.children()]
    return [round(process.memory_info().rss / 1e6, 1) for process in processes]


def spent_s(fleet: FleetProcesses) -> dict[str, float]:
    """CPU time so far of the gateway, and of all runtimes' fronts, without their engines."""
    fronts = [cpu_s(runtime.process.pid) for runtime in fleet.runtimes]
    return {"gateway": cpu_s(fleet.gateway.process.pid), "fronts": sum(fronts)}


async def overload(
    fleet: FleetProcesses, client: FleetClient, arguments: argparse.Namespace
) -> None:
    """Sends far more than is admitted at once, and says what became of it."""
    admitted = NUM_RUNTIMES * (16 + 1500 // 12)
    late_s: list[float] = []
    costs_s: list[dict[str, float]] = []
    for factor in (1, arguments.factor):
        call = Call(client.stub.Generate())
        sent_s: dict[str, float] = {}
        first_s: dict[str, float] = {}
        before_s = spent_s(fleet)
        for index in range(factor * admitted):
            sent_s[str(index)] = time.monotonic()
            await call.send(start=random_start(index, (20, 40)))
        await call.done()
        while await call.read():
            for event in call.messages[-1].events:
                if event.HasField("tokens"):
                    waited_s = time.monotonic() - sent_s[event.request_id]
                    first_s.setdefault(event.request_id, waited_s)
        found = described(call.seen, list(first_s.values()))
        late_s.append(found["ttft_p99_s"])
        found["cpu_s"] = {name: round(s - before_s[name], 2) for name, s in spent_s(fleet).items()}
        costs_s.append(found["cpu_s"])
        print(json.dumps({"sent": factor * admitted, **found}), flush=True)
        assert set(found["refused"]) <= {"QUEUE_FULL"}, "something else was refused"
        assert not found["retry_after_s"] or found["retry_after_s"][0] > 0, "no delay was told"
    await client.freed(5.0)
    # As many are admitted either way: what is spent beyond that is spent on refusing.
    refusing_us = {
        name: round((costs_s[1][name] - s) / max(found["num_refused"], 1) * 1e6)
        for name, s in costs_s[0].items()
    }
    print(json.dumps({"cpu_us_per_refused": refusing_us}))
    print(json.dumps({"ttft_p99_ratio": round(late_s[1] / late_s[0], 2)}))
    assert late_s[1] < MAX_LATENESS * late_s[0], f"p99 grew by more than {MAX_LATENESS}"
    assert all(runtime.process.poll() is None for runtime in fleet.runtimes)


def described(seen: dict[str, Seen], first_s: list[float]) -> dict[str, Any]:
    """What was admitted and what was refused."""
    errors = [from_status(one.error) for one in seen.values() if one.finished is None]
    delays = [error.retry_after_s or 0.0 for error in errors]
    return {
        "finished": sum(one.finished is not None for one in seen.values()),
        "refused": sorted({error.reason for error in errors}),
        "num_refused": len(errors),
        "retry_after_s": [round(min(delays), 2), round(max(delays), 2)] if delays else [],
        "ttft_p50_s": round(statistics.median(first_s), 3),
        "ttft_p99_s": round(statistics.quantiles(first_s, n=100)[-1], 3),
    }


if __name__ == "__main__":
    main()
