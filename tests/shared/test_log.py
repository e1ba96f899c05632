"""Log lines are JSON where no terminal is, and never show local variables."""

import json
import subprocess
import sys

SCRIPT = """
import logging
import structlog
from shared.log import canonical_line, configure_logging

configure_logging("info", "auto", "compiler")
structlog.contextvars.bind_contextvars(build="b1")
with canonical_line("build_finished", attempt=1) as line:
    line["state"] = "SUCCEEDED"
logging.getLogger("library").warning("foreign")
structlog.get_logger().debug("hidden")
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


def test_traceback_hides_local_variables() -> None:
    lines, text = lines_of_script()
    assert "ValueError: broken" in str(lines[2]["exception"])
    assert "a secret prompt" not in text
