"""What a token costs the front process, and what it carries: a real daemon over an engine that only keeps a GPU's time.

    python -m bench.front_path [--step-ms 25] [--streams 256] [--tokens 200] [--processes 2] [--relays 0]
        [--profile FILE]

Two JSON lines: generations on multiplexed calls, and on one call each. CPU time is of the daemon's front process alone:
IPC, detokenizing, serializing, gRPC and its threads. `--step-ms 1` asks for more than any front carries.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc

from bench.emissions import read_emissions
from bench.paced_engine import EMISSIONS, LOADER, STEP_MS
from bench.processes import cpu_s, free_address
from bench.served_load import Arrivals, Work, drive
from bench.served_report import report
from bench.served_store import publish_textual
from shared.store import LocalStore


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running runtime daemon, and its front process."""

    address: str
    front: psutil.Process

    def cpu_s(self) -> tuple[float, float]:
        """Of the front process and of its relays together, all of their threads."""
        relays = [
            child for child in self.front.children() if "runtime_service.relay" in child.cmdline()
        ]
        return cpu_s(self.front.pid), sum(cpu_s(relay.pid) for relay in relays)


@contextmanager
def running_daemon(
    store: Path,
    loader: str,
    *flags: str,
    environ: dict[str, str] | None = None,
    profile: str = "",
    limit_s: float = 300.0,
) -> Iterator[Daemon]:
    """A daemon of this Python that serves from `store`; it is there once it serves.

    Args:
        profile: where cProfile's statistics of the front's loop go; "" for none.
    """
    address = free_address()
    command = [sys.executable, "-m", "bench.served_daemon", loader, profile, "--listen", address]
    command += ["--store", str(store), "--metrics-listen", "", "--log-level", "warning", *flags]
    with subprocess.Popen(command, env={**os.environ, **(environ or {})}) as process:
        try:
            _wait_serving(process, address, limit_s)
            yield Daemon(address, psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _wait_serving(process: "subprocess.Popen[bytes]", address: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    with grpc.insecure_channel(address) as channel:
        stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
        while time.monotonic() < deadline:
            assert process.poll() is None, f"the daemon ended with status {process.returncode}"
            try:
                status = stub.GetStatus(
                    runtime_pb2.GetStatusRequest(), wait_for_ready=True, timeout=5
                )
            except grpc.RpcError:
                continue
            if status.state == runtime_pb2.RUNTIME_STATE_SERVING:
                return
            time.sleep(0.05)
    raise AssertionError(f"not serving after {limit_s} s")


def measured(daemon: Daemon, work: Work) -> tuple[dict[int, Arrivals], tuple[float, float]]:
    """What the clients of `work` saw, and the CPU seconds of the front and of its relays."""
    before = daemon.cpu_s()
    seen = drive(daemon.address, work)
    front_s, relays_s = (now - then for now, then in zip(daemon.cpu_s(), before, strict=True))
    return seen, (front_s, relays_s)


def main() -> None:
    """Measures both ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--in", dest="input_tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--relays", type=int, default=0)
    parser.add_argument("--only", choices=("multiplexed", "own"))
    parser.add_argument("--profile", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        publish_textual(store, "paced", "cpu", "bf16", 128_000)
        environ = {STEP_MS: str(options.step_ms)}
        flags = ("--model", "paced", "--quant", "bf16", "--arch", "cpu")
        flags = (*flags, "--relays", str(options.relays))
        with running_daemon(
            store.root, LOADER, *flags, environ=environ, profile=options.profile
        ) as daemon:
            for number, name in enumerate(("multiplexed", "own")):
                if options.only in (None, name):
                    work = Work(
                        1000 * (number + 1), options.streams, options.input_tokens,
                        options.tokens, options.processes, is_multiplexed=name == "multiplexed",
                    )  # fmt: skip
                    seen, spent_s = measured(daemon, work)
                    emitted = read_emissions(store.root / EMISSIONS)
                    line = {"calls": name, "relays": options.relays, "streams": work.count}
                    line["step_ms"] = options.step_ms
                    print(json.dumps(line | report(work, seen, emitted, spent_s)), flush=True)


if __name__ == "__main__":
    main()
