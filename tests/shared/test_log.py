"""Log lines are JSON where no terminal is, and never show local variables."""

import asyncio
import json
import subprocess
import sys

import structlog
from structlog.typing import EventDict

from shared.log import Tally

SCRIPT = """
import logging
import httpx2
import structlog
from shared.log import canonical_line, configure_logging

configure_logging("info", "auto", "compiler")
structlog.contextvars.bind_contextvars(build="b1")
with canonical_line("build_finished", attempt=1) as line:
    line["state"] = "SUCCEEDED"
logging.getLogger("library").warning("foreign")
structlog.get_logger().debug("hidden")
logging.getLogger().setLevel("DEBUG")
answers = httpx2.MockTransport(lambda request: httpx2.Response(200))
httpx2.Client(transport=answers).get("https://bucket.test/blob?signature=secret")
logging.getLogger().setLevel("INFO")
def fail(prompt):
    raise ValueError("broken")
try:
    fail("a secret prompt")
except ValueError:
    structlog.get_logger().exception("rpc_failed")
try:
    with canonical_line("rpc_finished"):
        raise KeyError("x")
except KeyError:
    pass
"""


def lines_of_script() -> tuple[list[dict[str, object]], str]:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in process.stderr.splitlines()], process.stderr


def test_every_line_is_json_with_its_context() -> None:
    lines, _ = lines_of_script()
    assert [line["event"] for line in lines] == [
        "build_finished", "foreign", "rpc_failed", "rpc_finished",
    ]  # fmt: skip
    assert all(line["component"] == "compiler" for line in lines)
    assert lines[0]["build"] == "b1"
    assert lines[0]["state"] == "SUCCEEDED"
    assert float(str(lines[0]["duration_s"])) >= 0
    assert (lines[3]["error"], lines[3]["level"]) == ("KeyError", "warning")


def test_urls_that_a_registry_redirects_to_are_in_no_line() -> None:
    """They hold signatures, which let whoever reads the log fetch the blob."""
    _, text = lines_of_script()
    assert "bucket.test" not in text


def test_traceback_hides_local_variables() -> None:
    lines, text = lines_of_script()
    assert "ValueError: broken" in str(lines[2]["exception"])
    assert "a secret prompt" not in text


async def test_what_comes_by_the_thousand_is_counted_in_few_lines() -> None:
    """The first is told at once, the others together; later ones in a line of their own; nobody's context is in it."""
    told: asyncio.Queue[EventDict] = asyncio.Queue()

    def tell(_: object, __: str, event: EventDict) -> EventDict:
        told.put_nowait(dict(event))
        return event

    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars, tell]):
        tally = Tally("starts_refused", 0.02, reason="QUEUE_FULL")
        with structlog.contextvars.bound_contextvars(rpc="Generate"):
            for _ in range(1000):
                tally.add()
        lines = [await told.get(), await told.get()]
        tally.add()
        lines.append(await told.get())
    assert [line["count"] for line in lines] == [1, 999, 1]
    assert all(line["event"] == "starts_refused" and "rpc" not in line for line in lines)
