"""`millrace bench`: a closed loop of streams against a runtime, and what they felt.

Each of N streams sends a request, reads it to its end, and sends the next: the load that a runtime
sees at a constant concurrency. Prompts are random token ids, so that no prefix is found in a cache,
and answers have a fixed length.
"""

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from millrace.cli import output
from millrace.cli.connecting import async_client
from millrace.retries import Retries
from millrace.session import Session

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Args:
        streams: generations that run at once.
        calls: gRPC calls that carry them.
        requests: in all, after one warm-up request a stream.
        token_range: prompt ids are drawn from it; every model knows the low ones.
    """

    streams: int
    calls: int
    requests: int
    input_tokens: int
    output_tokens: int
    seed: int = 0
    token_range: tuple[int, int] = (10, 250)


@dataclass(slots=True)
class Timeline:
    """One request as its client felt it: seconds, and tokens by their time of arrival."""

    start_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(count for _, count in self.arrivals)

    @property
    def time_to_first_token_s(self) -> float:
        """From sending to the first token."""
        return self.arrivals[0][0] - self.start_s

    def inter_token_s(self) -> list[float]:
        """Seconds a token between arrivals; tokens that came together share their wait."""
        gaps = []
        for (before_s, _), (now_s, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(now_s - before_s) / count] * count
        return gaps


def bench(address: str, load: Load, *, as_json: bool) -> None:
    """Runs the load and prints what was measured."""
    report = measure(address, load)
    if as_json:
        output.print_json(report)
        return
    output.say(
        f"[bold]{report['model']}[/]: {load.streams} streams on {load.calls} call(s), "
        f"{load.requests} requests of {load.input_tokens} in / {load.output_tokens} out, "
        f"{output.duration_text(report['duration_s'])}"
    )
    output.print_table(
        ("", *(f"p{p}" for p in PERCENTILES)),
        [
            (name, *(f"{report[key][f'p{p}']:.1f} ms" for p in PERCENTILES))
            for name, key in (
                ("time to first token", "ttft_ms"),
                ("between tokens", "itl_ms"),
                ("whole answer", "e2e_ms"),
            )
        ],
        "",
    )
    output.print_line(
        f"{report['output_tokens_per_s']:.1f} tokens/s out, "
        f"{report['total_tokens_per_s']:.1f} with prompts, "
        f"{report['requests_per_s']:.2f} requests/s"
    )


def measure(address: str, load: Load) -> dict[str, Any]:
    """What the streams of `load` felt at the runtime of `address`, for programs.

    Raises:
        MillraceError: the runtime refused a request, or went away.
    """
    model, timelines, seconds = asyncio.run(_run(address, load))
    return {"model": model, **summary(load, timelines, seconds)}


def summary(load: Load, timelines: list[Timeline], seconds: float) -> dict[str, Any]:
    """Percentiles and rates of finished requests, for programs."""
    out = sum(timeline.num_tokens for timeline in timelines)
    return {
        "streams": load.streams,
        "calls": load.calls,
        "requests": len(timelines),
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "duration_s": round(seconds, 3),
        "output_tokens_per_s": round(out / seconds, 2),
        "total_tokens_per_s": round((out + len(timelines) * load.input_tokens) / seconds, 2),
        "requests_per_s": round(len(timelines) / seconds, 3),
        "ttft_ms": _percentiles([t.time_to_first_token_s for t in timelines]),
        "itl_ms": _percentiles([gap for t in timelines for gap in t.inter_token_s()]),
        "e2e_ms": _percentiles([t.end_s - t.start_s for t in timelines]),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Nearest-rank percentiles in milliseconds; zeros where nothing was measured."""
    ordered = sorted(seconds) or [0.0]
    return {
        f"p{p}": round(ordered[min(len(ordered) - 1, -(-p * len(ordered) // 100) - 1)] * 1000, 3)
        for p in PERCENTILES
    }


async def _run(address: str, load: Load) -> tuple[str, list[Timeline], float]:
    async with AsyncExitStack() as stack:
        # A request that waits for another try would not be a measurement.
        client = await stack.enter_async_context(async_client(address, Retries(max_attempts=1)))
        model = (await client.get_status()).engine.model
        sessions = [await stack.enter_async_context(client.session()) for _ in range(load.calls)]
        on_calls = [sessions[index % load.calls] for index in range(load.streams)]
        await asyncio.gather(
            *(_request(session, load, -1 - index) for index, session in enumerate(on_calls))
        )
        numbers = iter(range(load.requests))
        timelines: list[Timeline] = []

        async def stream(session: Session) -> None:
            for number in numbers:
                timelines.append(await _request(session, load, number))

        start_s = time.perf_counter()
        await asyncio.gather(*(stream(session) for session in on_calls))
        return model, timelines, time.perf_counter() - start_s


async def _request(session: Session, load: Load, number: int) -> Timeline:
    draw = random.Random(f"{load.seed}/{number}")
    prompt = [draw.randrange(*load.token_range) for _ in range(load.input_tokens)]
    timeline = Timeline(time.perf_counter())
    stream = session.generate(prompt, max_new_tokens=load.output_tokens, ignore_end_tokens=True)
    async for chunk in stream:
        timeline.arrivals.append((time.perf_counter(), len(chunk.token_ids)))
    timeline.end_s = time.perf_counter()
    return timeline
