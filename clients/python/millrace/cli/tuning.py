"""`millrace tune`: has an engine measured on this machine's GPU, and shows what was found.

The measuring is a runtime's, in a process of its own (`runtime_service.tune`), which says what it finds in lines of
JSON. Nothing here is imported from the daemons.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from millrace.cli import machine, output
from millrace.cli.failures import FAILED, CommandFailed


def require_gpu() -> None:
    """Returns where there is a GPU to measure on.

    Raises:
        CommandFailed: there is none; says why.
    """
    driver = machine.nvidia_driver()
    if isinstance(driver, str) or not driver.gpus:
        why = driver if isinstance(driver, str) else "the driver knows no device"
        raise CommandFailed(f"there is no NVIDIA GPU here to measure on: {why}")


def program(model: str, quant: str, store: str, compiler: str) -> list[str]:
    """What measures the engine of a model and a quantization in a store; a compile daemon's where one is named."""
    command = [sys.executable, "-m", "runtime_service.tune", "--model", model, "--quant", quant]
    command += ["--store", store, "--log-level", "warning"]
    return [*command, "--compiler", compiler] if compiler else command


def tune(command: Sequence[str], *, as_json: bool) -> None:
    """Runs what measures, tells each site as it is known, and then all that was found.

    Raises:
        CommandFailed: it failed; its last line says why.
    """
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None, "its output is not read"
        for line in process.stdout:
            last = json.loads(line)
            if "site" in last and not as_json:
                output.say("  ".join(filter(None, _row(last["site"]))))
        process.wait()
        said.seek(0)
        problems = said.read().decode(errors="replace").strip().splitlines()
    if process.returncode or "record" not in last:
        reason = problems[-1] if problems else f"it ended with {process.returncode}"
        raise CommandFailed(reason.removeprefix("millrace tune: "), process.returncode or FAILED)
    if as_json:
        output.print_json(last)
        return
    record = last["record"]
    changed = [site for site in record["sites"] if site["choice"] != site["built_in"]]
    columns = ("op", "step", "shape", "before", "us", "after", "us", "gain")
    rows = [_row(site) for site in changed]
    output.print_table(columns, rows, "every built-in choice is as good as any other")
    where = " and ".join(last["published"])
    output.print_line(
        f"{len(changed)} of {len(record['sites'])} choices changed on {record['gpu']}; the record of "
        f"{output.short_name(last['engine'])} is kept ({where}) and used when the engine is loaded next"
    )


def _row(site: dict[str, Any]) -> tuple[str, ...]:
    """Op, step, shape, before, its time, after, its time, gain."""
    step = f"S<={site['sequences']}" if site["sequences"] else f"M<={site['tokens']}"
    if not site["sequences"] and not site["tokens"]:
        step = "any"
    size = f"{site['n']}x{site['k']}" if site["n"] else ""
    shape = " ".join(filter(None, (size, site["dtype"], site["layout"], site["rides"])))
    before, after = site["built_in_us"], site["choice_us"]
    gain = f"{1 - after / before:.1%}" if before else "-"
    is_kept = site["choice"] == site["built_in"]
    return (
        site["op"], step, shape, site["built_in"], f"{before:.2f}",
        "kept" if is_kept else site["choice"], "" if is_kept else f"{after:.2f}",
        "" if is_kept else gain,
    )  # fmt: skip
