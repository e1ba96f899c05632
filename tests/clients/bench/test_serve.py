"""`millrace bench serve` as a process, against servers whose pace is known."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from millrace.cli.bench.targets import openai_target
from millrace.cli.failures import CommandFailed
from playwright.async_api import async_playwright

from bench.paced_runtime import Pace, start_paced_runtime
from shared.tls import server_context
from tests.clients.bench.paced_openai import PacedOpenAi
from tests.runtime_service.gateway.test_page import CHROMIUM
from tests.shared.certificates import client_options, made_in, server_files

FIRST_S, TOKEN_S = 0.05, 0.02
HANG_S = 120.0

Done = tuple[int, str, str]


@pytest.fixture
async def runtime() -> AsyncIterator[str]:
    """The address of a runtime at the pace above."""
    server, address = await start_paced_runtime(Pace(FIRST_S, TOKEN_S))
    yield address
    await server.stop(0)


async def start(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
    """The command, running, with no terminal."""
    environ = {name: v for name, v in os.environ.items() if not name.startswith("MILLRACE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "millrace.cli", "bench", "serve", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**environ, "OPENAI_API_KEY": "secret", **variables},
    )  # fmt: skip


async def serve(*arguments: str, **variables: str) -> Done:
    """Exit code, stdout and stderr of the command."""
    process = await start(*arguments, **variables)
    out, err = await asyncio.wait_for(process.communicate(), HANG_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def check_pace(report: dict[str, Any], num_tokens: int) -> None:
    """The report tells the server's pace, slowed down by the machine, and nothing faster.

    tests/clients/bench/test_driver.py holds the numbers to the millisecond, on a clock that no machine slows down.
    """
    first_ms, token_ms = FIRST_S * 1000, TOKEN_S * 1000
    e2e_ms = first_ms + (num_tokens - 1) * token_ms
    for name, pace_ms in (("ttft_ms", first_ms), ("e2e_ms", e2e_ms)):
        assert pace_ms - 1 <= report[name]["p50"], name
    assert report["ttft_ms"]["max"] <= report["e2e_ms"]["max"] <= report["duration_s"] * 1000 + 1
    mean = {name: report[f"{name}_ms"]["mean"] for name in ("ttft", "tpot", "e2e", "itl")}
    # A first token that is read late is followed the sooner by the others: only the last one's moment is the pace's.
    assert e2e_ms - 1 <= mean["ttft"] + (num_tokens - 1) * mean["tpot"] <= mean["e2e"] + 1
    assert mean["itl"] == pytest.approx(mean["tpot"], rel=0.01)


@pytest.mark.parametrize("calls", ["0", "1", "3"])
async def test_a_runtime_is_measured_over_any_number_of_calls(calls: str, runtime: str) -> None:
    code, out, err = await serve(
        "--runtime", runtime, "--calls", calls, "-c", "6", "-r", "18", "--in", "4", "--out", "8",
        "--json", "-", "--goodput", "ttft=10s",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["requests"] == {"sent": 18, "finished": 18, "failed": {}, "unfinished": 0}
    assert (report["output_tokens"], report["input_tokens"]) == (144, 72)
    assert (report["model"], report["protocol"]) == ("paced", "grpc")
    assert report["goodput"]["share"] == 1.0
    assert len(report["each_request"]) == 18
    check_pace(report, 8)


async def test_an_openai_server_is_measured(tmp_path: Path) -> None:
    async with PacedOpenAi(FIRST_S, TOKEN_S) as server:
        page = tmp_path / "report.html"
        code, out, err = await serve(
            "--openai", server.url, "--rate", "40", "-r", "20", "--in", "3-5", "--out", "8",
            "--html", str(page), "--json", str(tmp_path / "report.json"), "--warm-up", "2",
        )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["model"], report["requests"]["finished"]) == ("paced", 20)
    assert report["output_tokens"] == 160
    check_pace(report, 8)
    assert "time to first token" in out.lower()
    told = page.read_text()
    assert told.startswith("<!doctype html>")
    for latency in ("ttft_ms", "itl_ms", "e2e_ms"):
        for share in ("p50", "p99"):
            named = re.findall(rf">{share} ([\d.]+) ms<", told)
            # Both are rounded, to a tenth and to a thousandth.
            assert any(abs(float(ms) - report[latency][share]) < 0.051 for ms in named)
    # How many requests ran at once is a whole number.
    counts = told.split("<h2>Requests at once</h2>")[1].split("</figure>")[0]
    ticks = re.findall(r'text-anchor="end">([^<]+)<', counts)
    assert ticks
    assert all(tick.isdigit() for tick in ticks)
    assert len(server.asked) == 22
    assert {len(body["prompt"]) for body in server.asked} == {3, 4, 5}
    assert server.keys == {"Bearer secret"}


async def test_an_https_server_is_measured_by_the_ca_and_certificate_that_are_given(
    tmp_path: Path,
) -> None:
    certs = made_in(tmp_path)
    tls = server_context(server_files(certs, with_ca=True))
    variables = {
        f"MILLRACE_CLI_{name.upper()}": path
        for name, path in client_options(certs, with_cert=True).items()
    }
    async with PacedOpenAi(0.0, 0.0, tls=tls) as server:
        asked = ("--openai", server.url, "-r", "4", "--out", "2", "--warm-up", "0", "--json", "-")
        code, out, err = await serve(*asked, **variables)
        strange, _, problem = await serve(*asked)
    assert code == 0, err
    assert json.loads(out)["requests"]["finished"] == 4
    assert (strange, problem.count("\n")) == (1, 1)
    assert "certificate verify failed" in problem
    assert len(server.asked) == 4


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
async def test_a_report_is_no_wider_than_a_phone(tmp_path: Path) -> None:
    async with PacedOpenAi(FIRST_S, 0.0) as server:
        page = tmp_path / "report.html"
        code, _, err = await serve(
            "--openai", server.url, "-r", "8", "--out", "2", "--html", str(page),
            "--goodput", "ttft=5s",
        )  # fmt: skip
    assert code == 0, err
    # With numbers as wide as they come where a server is slow.
    page.write_text(re.sub(r"<td>[\d,.]+</td>", "<td>98,765.4</td>", page.read_text()))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        phone = await browser.new_page(viewport={"width": 390, "height": 844})
        await phone.goto(page.as_uri())
        assert await phone.locator("td", has_text="98,765.4").count() == 25
        assert await phone.evaluate("document.documentElement.scrollWidth") == 390
        await browser.close()


async def test_what_an_openai_server_refuses_is_counted_by_its_reason() -> None:
    async with PacedOpenAi(0.0, 0.0, refused=3) as server:
        code, out, err = await serve(
            "--openai", server.url, "-c", "2", "-r", "12", "--out", "2", "--warm-up", "0",
            "--json", "-",
        )  # fmt: skip
    report = json.loads(out)
    assert (code, report["requests"]["failed"]) == (0, {"HTTP_429 QUEUE_FULL": 4}), err
    assert report["failures"] == {"HTTP_429 QUEUE_FULL": "Too much waits."}


async def test_a_server_that_knows_openais_fields_alone_is_measured() -> None:
    async with PacedOpenAi(0.0, 0.0, is_strict=True) as server:
        code, out, err = await serve(
            "--openai", server.url, "-c", "2", "-r", "4", "--out", "2", "--warm-up", "1",
            "--json", "-",
        )  # fmt: skip
    assert (code, json.loads(out)["requests"]["finished"]) == (0, 4), err
    assert ["ignore_eos" in body for body in server.asked] == [True] + [False] * 5


async def test_answers_that_break_off_are_failures() -> None:
    async with PacedOpenAi(0.0, 0.0, breaks_off=True) as server:
        code, out, _ = await serve(
            "--openai", server.url, "-c", "2", "-r", "4", "--out", "2", "--warm-up", "0",
            "--json", "-",
        )  # fmt: skip
    assert (code, json.loads(out)["requests"]["failed"]) == (1, {"CONNECTION_LOST": 4})


async def test_a_trace_is_played_at_its_own_moments(runtime: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{n * 0.4},{n + 2},{n + 1}\n" for n in range(4))
    trace.write_text(f"timestamp,input_tokens,output_tokens\n{rows}")
    code, out, err = await serve(
        "--runtime", runtime, "--trace", str(trace), "--speed", "4", "--json", "-"
    )
    assert code == 0, err
    report = json.loads(out)
    sent = [row["start_s"] - row["lag_s"] for row in report["each_request"]]
    assert sent == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-5)
    assert [row["input_tokens"] for row in report["each_request"]] == [2, 3, 4, 5]
    assert [row["output_tokens"] for row in report["each_request"]] == [1, 2, 3, 4]


async def test_ctrl_c_shows_what_was_measured_until_then() -> None:
    async with PacedOpenAi(0.0, 0.0) as server:
        process = await start("--openai", server.url, "-c", "2", "--duration", "600", "--out", "2")
        await asyncio.wait_for(server.is_busy.wait(), HANG_S)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), HANG_S)
    assert process.returncode == 130, err
    assert "interrupted" in err.decode()
    assert "Traceback" not in err.decode()
    assert "tokens/s out" in out.decode()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", "0"), "--rate is a number above 0"),
        (("--rate", "nan"), "--rate is a number above 0"),
        (("--rate", "2", "-c", "3"), "a loop is open or closed"),
        (("--burstiness", "0.2"), "--burstiness is of an open loop"),
        (("--speed", "2"), "--speed plays a trace's moments"),
        (("--trace", "x.csv", "--rate", "2", "--speed", "2"), "--speed plays a trace's moments"),
        (("--in", "9-3"), "'9-3' is no number of tokens"),
        (("--goodput", "ttft=fast"), "'ttft=fast' is no objective"),
        (("--trace", "/nowhere.csv"), "cannot read /nowhere.csv"),
        (("--json", "/nowhere/report.json"), "its folder does not exist"),
    ],
)
async def test_a_load_that_makes_no_sense_is_one_line(
    arguments: tuple[str, ...], says: str
) -> None:
    code, out, err = await serve("--runtime", "127.0.0.1:1", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


async def test_a_server_that_is_not_there_is_one_line() -> None:
    code, _, err = await serve("--openai", "http://127.0.0.1:1/v1")
    assert (code, err.count("\n")) == (1, 1)
    assert "http://127.0.0.1:1/v1/models does not name a model" in err
    code, _, err = await serve("--runtime", "127.0.0.1:1")
    assert (code, err.count("\n")) == (4, 1)


async def test_tls_files_are_read_where_the_api_is_spoken_to_over_tls(tmp_path: Path) -> None:
    """The variable may name the CA of other daemons, on a machine that has no such file."""
    missing = {"MILLRACE_CLI_TLS_CA": str(tmp_path / "missing.crt")}
    _, _, err = await serve("--openai", "http://127.0.0.1:1/v1", **missing)
    assert "http://127.0.0.1:1/v1/models does not name a model" in err
    _, _, err = await serve("--openai", "https://127.0.0.1:1/v1", **missing)
    assert "missing.crt" in err


async def test_a_server_that_says_nothing_is_not_waited_for_without_end() -> None:
    """It takes the connection, as one behind a dead proxy does."""
    heard = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        heard.set()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        target = openai_target(f"http://127.0.0.1:{port}/v1", "", "", answer_s=0.1)
        with pytest.raises(CommandFailed, match=r"/models gives no answer in 0\.1 s"):
            await target.__aenter__()
        await asyncio.wait_for(heard.wait(), 60)
