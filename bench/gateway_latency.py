"""The time that a gateway adds to each token, on a machine that is otherwise idle.

    python -m bench.gateway_latency [--streams 64] [--pace-ms 25] [--rounds 4] [--calls 1]

A scripted runtime (bench/paced_runtime.py) sends a token to each stream at a fixed pace, with the
moment in its text; the client, on the same clock, sees how long each was on its way, straight and
through a gateway in turns. No engine competes for the cores, so that what is measured is the path;
bench/gateway_cost.py measures what it costs where they do. Prints medians over rounds as one JSON
line; a token's first is counted apart, from the start command to its arrival.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import psutil
from millrace import AsyncClient

from bench.processes import cpu_s, wait_until_serving
from tests.integration.daemon_process import DaemonProcess

PERCENTILES = (50, 90, 99)
FIRST_MS = 20.0


def main() -> None:
    """Measures both, `rounds` times, and their difference in each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--calls", type=int, default=1, help="that the streams share")
    parser.add_argument("--pace-ms", type=float, default=25.0, help="between a stream's tokens")
    parser.add_argument("--step-ms", type=float, default=0.0, help="tokens come in such steps")
    parser.add_argument("--out", type=int, default=200, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    with (
        paced_runtime(given.pace_ms, given.step_ms) as runtime,
        DaemonProcess(
            "runtime_service.gateway", "--listen", "127.0.0.1:0", "--metrics-listen", "",
            "--http-listen", "", "--runtimes", runtime,
        ) as gateway,
    ):  # fmt: skip
        wait_until_serving(gateway.address, gateway.process)
        rounds, spent_s = asyncio.run(take_turns(given, runtime, gateway))
    tokens = given.rounds * given.streams * given.out
    print(json.dumps({**vars(given), **summary(rounds), "load": psutil.getloadavg()[0],
                      "gateway_cpu_us_per_token": round(spent_s / tokens * 1e6, 1)}))  # fmt: skip


async def take_turns(
    given: argparse.Namespace, runtime: str, gateway: DaemonProcess
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """What was felt in each round, and the gateway's CPU time in all of them."""
    rounds: dict[str, list[dict[str, float]]] = {"straight": [], "through": []}
    spent_s = 0.0
    for index in range(given.rounds + 1):
        turns = [("straight", runtime), ("through", gateway.address)]
        for name, address in turns if index % 2 else turns[::-1]:
            before_s = cpu_s(gateway.process.pid)
            felt = await measure(address, given.streams, given.calls, given.out)
            if index:  # the first round warms up
                rounds[name].append(felt)
                spent_s += cpu_s(gateway.process.pid) - before_s
    return rounds, spent_s


@contextmanager
def paced_runtime(pace_ms: float, step_ms: float) -> Iterator[str]:
    """The address of a scripted runtime in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.paced_runtime", "--stamps", "--first-ms", str(FIRST_MS),
         "--pace-ms", str(pace_ms), "--step-ms", str(step_ms)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


async def measure(address: str, streams: int, calls: int, tokens: int) -> dict[str, float]:
    """Milliseconds on the way, by percentile, over all tokens; and to the first, from the start."""
    on_way_s: list[float] = []
    first_s: list[float] = []

    async def one(session: Any, delay_s: float) -> None:
        await asyncio.sleep(delay_s)  # spread over the pace, as real streams are
        began_s = time.monotonic()
        is_first = True
        async for chunk in session.generate([11, 12, 13], max_new_tokens=tokens):
            now_s = time.monotonic()
            if is_first and chunk.text:
                first_s.append(now_s - began_s)
                is_first = False
            on_way_s.extend(now_s - float(stamp) for stamp in chunk.text.split())

    async with AsyncClient(runtime=address) as client:
        sessions = [client.session() for _ in range(calls)]
        for session in sessions:
            await session.__aenter__()
        turns = cycle(sessions)
        await asyncio.gather(*(one(next(turns), 0.1 * n / streams) for n in range(streams)))
        for session in sessions:
            await session.__aexit__(None, None, None)
    assert len(on_way_s) == streams * tokens, "a token did not come"
    felt = {f"p{p}": percentile_ms(on_way_s, p) for p in PERCENTILES}
    return {**felt, "first_p50": percentile_ms(first_s, 50) - FIRST_MS}


def percentile_ms(seconds: list[float], percent: int) -> float:
    """The nearest-rank percentile, in milliseconds."""
    ordered = sorted(seconds)
    return ordered[max(-(-percent * len(ordered) // 100) - 1, 0)] * 1000


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each, and of what a round's pair differs by."""
    keys = rounds["straight"][0]
    pairs = list(zip(rounds["straight"], rounds["through"], strict=True))
    return {
        **{
            f"{name}_ms": {k: round(statistics.median(r[k] for r in felt), 3) for k in keys}
            for name, felt in rounds.items()
        },
        "added_ms": {k: round(statistics.median(t[k] - s[k] for s, t in pairs), 3) for k in keys},
    }


if __name__ == "__main__":
    main()
