"""`millrace bench serve` against a real gateway over OpenAI's HTTP: real daemons, a CPU engine."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.checkpoints import write_checkpoint
from tests.integration.daemon_process import DaemonProcess
from tests.integration.test_main_job import serving, serving_daemons
from tests.shared.key_files import new_key

pytestmark = pytest.mark.redis

NUM_REQUESTS, NUM_IN, NUM_OUT = 12, 16, 24


def bench(*arguments: str, key: str) -> dict[str, Any]:
    """The report of a load."""
    environ = {name: v for name, v in os.environ.items() if not name.startswith("MILLRACE_")}
    done = subprocess.run(
        [sys.executable, "-m", "millrace.cli", "bench", "serve", *arguments,
         "-c", "4", "-r", str(NUM_REQUESTS), "--in", str(NUM_IN), "--out", str(NUM_OUT),
         "--warm-up", "2", "--json", "-", "--goodput", "ttft=60s,itl=60s"],
        capture_output=True, text=True, timeout=120,
        env={**environ, "MILLRACE_CLI_API_KEY": key},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check(report: dict[str, Any]) -> None:
    """Every request came to its end, with the tokens that were asked for, each counted once."""
    sent = {"sent": NUM_REQUESTS, "finished": NUM_REQUESTS, "failed": {}, "unfinished": 0}
    assert report["requests"] == sent
    assert report["input_tokens"] == NUM_REQUESTS * NUM_IN
    assert report["output_tokens"] == NUM_REQUESTS * NUM_OUT
    assert report["goodput"]["share"] == 1.0
    for row in report["each_request"]:
        assert row["output_tokens"] == NUM_OUT
    assert 0 < report["ttft_ms"]["p50"] <= report["e2e_ms"]["p50"]
    assert 0 < report["itl_ms"]["mean"] < report["e2e_ms"]["max"]


async def test_a_gateway_is_measured_over_http_and_over_grpc(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama")
    key = new_key(capsys, tmp_path / "keys", "acme")
    with (
        serving_daemons(redis_url, tmp_path, checkpoint, "fp32") as (_, runtime),
        DaemonProcess(
            "runtime_service.gateway",
            "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--metrics-listen", "",
            "--runtimes", runtime.address, "--api-keys", str(tmp_path / "keys"),
        ) as gateway,
    ):  # fmt: skip
        http = gateway.wait_for("http_started")["address"]
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            await serving(channel)
        over_http = await asyncio.to_thread(bench, "--openai", f"http://{http}/v1", key=key)
        over_grpc = await asyncio.to_thread(bench, "--runtime", gateway.address, key=key)
    assert (over_http["protocol"], over_grpc["protocol"]) == ("openai", "grpc")
    assert over_http["model"] == over_grpc["model"] == "tiny"
    check(over_http)
    check(over_grpc)
