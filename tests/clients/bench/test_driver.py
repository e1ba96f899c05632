"""What is measured, on a virtual clock: every number is known in advance."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from millrace.cli.bench.driver import Driver, Measurement, RequestFailed
from millrace.cli.bench.report import report_html
from millrace.cli.bench.summary import request_rows, summarize
from millrace.cli.bench.timeline import Slo, Timeline, percentile
from millrace.cli.bench.workload import Lengths, Planned, drawn_lengths, open_loop, plan

from tests.clients.bench.virtual_clock import run_virtually


class ScriptedTarget:
    """Request n has its first token after `first_s(n)`, and the others every `pace_s`."""

    def __init__(self, first_s: Any = lambda n: 0.5, pace_s: float = 0.1) -> None:
        self._first_s, self._pace_s = first_s, pace_s
        self.running = self.most_running = 0
        self.sent_s: list[float] = []

    async def send(self, prompt: list[int], timeline: Timeline) -> None:
        now_s = asyncio.get_running_loop().time
        self.sent_s.append(now_s())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for index in range(timeline.planned.output_tokens):
                first_s = self._first_s(timeline.planned.number)
                await asyncio.sleep(self._pace_s if index else first_s)
                timeline.arrivals.append((now_s(), 1))
        finally:
            self.running -= 1


def requests(*lengths: int, at_s: float | None = None) -> Iterator[Planned]:
    """Requests of so many answer tokens."""
    return iter([Planned(n, at_s, 8, tokens) for n, tokens in enumerate(lengths)])


def drive(target: Any, planned: Iterator[Planned], **options: Any) -> Measurement:
    """A load on a virtual clock."""
    asked: dict[str, Any] = {
        "concurrency": None, "duration_s": None, "timeout_s": None, "seed": 0, **options,
    }  # fmt: skip

    async def run() -> Measurement:
        return await Driver(target, planned, **asked).run()

    return run_virtually(run())


def test_latencies_are_those_of_the_server() -> None:
    measured = drive(ScriptedTarget(lambda n: 0.1 * (n + 1)), requests(*[5] * 10), concurrency=1)
    report = summarize(measured, Slo({}))
    assert report["ttft_ms"] == pytest.approx(
        {"p50": 500, "p90": 900, "p99": 1000, "max": 1000, "mean": 550}
    )
    assert report["itl_ms"] == pytest.approx(
        {"p50": 100, "p90": 100, "p99": 100, "max": 100, "mean": 100}
    )
    assert report["tpot_ms"]["mean"] == pytest.approx(100)
    assert report["e2e_ms"]["max"] == pytest.approx(1400)
    assert report["duration_s"] == pytest.approx(5.5 + 10 * 0.4)
    assert report["output_tokens_per_s"] == pytest.approx(50 / 9.5, abs=0.01)
    assert report["total_tokens_per_s"] == pytest.approx(130 / 9.5, abs=0.01)
    assert report["mean_concurrency"] == pytest.approx(1.0)
    assert report["lag"]["send_ms"]["max"] == 0.0
    assert report["lag"]["fell_behind"] is False


def test_tokens_that_came_together_share_their_wait() -> None:
    timeline = Timeline(Planned(0, None, 1, 5), 0.0)
    timeline.arrivals = [(1.0, 2), (1.6, 3)]
    assert timeline.itl_s() == pytest.approx([0.2, 0.2, 0.2])


def test_a_closed_loop_keeps_its_streams_busy_and_is_never_more() -> None:
    target = ScriptedTarget(pace_s=0.0)
    measured = drive(target, requests(*[1] * 12), concurrency=4)
    assert target.most_running == 4
    assert target.sent_s == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
    assert measured.end_s == pytest.approx(1.5)


def test_an_open_loop_sends_on_time_however_slow_the_server_is() -> None:
    target = ScriptedTarget(lambda n: 1000.0)
    arrivals = open_loop(10.0, 0.5, seed=3)
    planned = list(plan(arrivals, drawn_lengths(Lengths(2, 9), Lengths(1, 1), 3), 50))
    measured = drive(target, iter(planned))
    assert target.sent_s == pytest.approx([p.at_s for p in planned])
    assert target.most_running == 50
    assert max(t.lag_s for t in measured.timelines) == pytest.approx(0.0)


def test_nothing_is_sent_after_the_duration_and_what_runs_is_finished() -> None:
    for concurrency, planned in (
        (1, plan(None, drawn_lengths(Lengths(1, 1), Lengths(1, 1), 0), None)),
        (None, (Planned(n, n * 0.5, 1, 1) for n in range(1000))),
    ):
        measured = drive(
            ScriptedTarget(lambda n: 0.5), planned, concurrency=concurrency, duration_s=2.0
        )
        assert [t.is_finished for t in measured.timelines] == [True] * 4
        assert measured.end_s == pytest.approx(2.0)


def test_a_late_generator_says_so() -> None:
    """One that cannot send when it should must not look like a fast server."""

    class Blocking(ScriptedTarget):
        async def send(self, prompt: list[int], timeline: Timeline) -> None:
            # What a busy generator does to its loop: time passes, and nothing runs.
            asyncio.get_running_loop()._now_s += 0.05  # type: ignore[attr-defined]
            await super().send(prompt, timeline)

    planned = (Planned(n, n * 0.01, 1, 1) for n in range(100))
    report = summarize(drive(Blocking(), planned), Slo({}))
    assert report["lag"]["fell_behind"] is True
    assert report["lag"]["send_ms"]["max"] > 1000
    assert report["lag"]["loop_ms"]["max"] > 40


def test_failures_are_counted_by_reason_and_are_no_latencies() -> None:
    class Failing(ScriptedTarget):
        async def send(self, prompt: list[int], timeline: Timeline) -> None:
            if timeline.planned.number % 3 == 1:
                raise RequestFailed("QUEUE_FULL", "Too much waits.", retry_after_s=7.0)
            await super().send(prompt, timeline)

    first_s = {0: 0.5, 2: 99.0, 3: 0.5, 5: 0.5}.__getitem__
    measured = drive(Failing(first_s), requests(1, 1, 1, 1, 1, 1), concurrency=1, timeout_s=10.0)
    report = summarize(measured, Slo({}))
    assert report["requests"] == {
        "sent": 6, "finished": 3, "failed": {"QUEUE_FULL": 2, "TIMEOUT": 1}, "unfinished": 0,
    }  # fmt: skip
    assert report["failures"]["QUEUE_FULL"] == "Too much waits."
    assert report["ttft_ms"]["max"] == pytest.approx(500)
    # A client that is told when to come again does so: 0.5, 7 of waiting, 10 to the timeout ...
    assert measured.timelines[2].start_s == pytest.approx(7.5)
    assert [row["failure"] for row in request_rows(measured)] == [
        None, "QUEUE_FULL", "TIMEOUT", None, "QUEUE_FULL", None,
    ]  # fmt: skip


def test_goodput_counts_requests_that_keep_to_all_objectives() -> None:
    first_s = [0.1, 0.4, 0.1, 0.4].__getitem__
    measured = drive(ScriptedTarget(first_s), requests(2, 2, 2, 2), concurrency=1)
    good = summarize(measured, Slo.parse("ttft=0.2s, itl=150ms"))["goodput"]
    assert (good["share"], good["objectives_s"]) == (0.5, {"ttft": 0.2, "itl": 0.15})
    assert good["requests_per_s"] == pytest.approx(2 / 1.4, abs=0.001)
    assert summarize(measured, Slo.parse("itl=50ms"))["goodput"]["share"] == 0.0
    assert summarize(measured, Slo.parse("e2e=1s,tpot=0.1001s"))["goodput"]["share"] == 1.0


@pytest.mark.parametrize("text", ["ttft", "ttft=5", "speed=3s", "ttft=-1s", "itl=1min"])
def test_objectives_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no objective"):
        Slo.parse(text)


def test_a_stopped_load_tells_what_it_has() -> None:
    async def run() -> Measurement:
        driver = Driver(
            ScriptedTarget(), requests(1, 1, 1, 50), concurrency=1, duration_s=None,
            timeout_s=None, seed=0,
        )  # fmt: skip
        asyncio.get_running_loop().call_later(3.0, driver.stop)
        return await driver.run()

    measured = run_virtually(run())
    report = summarize(measured, Slo({}))
    assert report["is_interrupted"] is True
    assert (report["requests"]["finished"], report["requests"]["unfinished"]) == (3, 1)
    assert report["ttft_ms"]["max"] == pytest.approx(500)


def test_percentiles_are_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50.0, 90.0, 99.0, 100.0]
    assert (percentile([3.0], 99), percentile([], 50)) == (3.0, None)


def test_the_page_needs_nothing_else_and_escapes_what_servers_say() -> None:
    class Rude(ScriptedTarget):
        async def send(self, prompt: list[int], timeline: Timeline) -> None:
            if timeline.planned.number == 3:
                raise RequestFailed("BAD", "<script>alert(1)</script>")
            await super().send(prompt, timeline)

    slo = Slo.parse("ttft=0.6s")
    measured = drive(Rude(), requests(3, 3, 3, 3), concurrency=2)
    document = {
        "model": "<b>", "target": "here", "protocol": "grpc",
        "load": {"concurrency": 2, "seed": 0}, **summarize(measured, slo),
    }  # fmt: skip
    page = report_html(document, measured, slo)
    assert page.count("<svg") == 6
    assert "http" not in page
    assert "<script" not in page
    assert "<b>&lt;b&gt;" not in page
    assert "&lt;script&gt;" in page


def test_a_page_can_be_made_of_nothing() -> None:
    measured = drive(ScriptedTarget(), requests(), concurrency=1)
    document = {
        "model": "m", "target": "t", "protocol": "grpc", "load": {"concurrency": 1, "seed": 0},
        **summarize(measured, Slo({})),
    }  # fmt: skip
    assert "nan" not in report_html(document, measured, Slo({}))
