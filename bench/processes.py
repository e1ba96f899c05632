"""Runtime daemons as benchmarks start and watch them: where they listen, their CPU time, and their first token."""

import signal
import socket
import subprocess
import sys
import time
from typing import Any

import grpc
import psutil
from millrace.channels import wait_until_answering
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

# A request that comes too early is sent again after this.
_RETRY_S = 0.02


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, all of its threads; other load on the machine does not show in it."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def wait_until_serving(
    address: str, process: "subprocess.Popen[Any]", limit_s: float = 120.0
) -> None:
    """Returns when the daemon at `address`, whose `process` this is, serves.

    Raises:
        SystemExit: it ended, or did not serve in time.
    """

    def check() -> None:
        if process.poll() is not None:
            raise SystemExit(f"the daemon ended with status {process.returncode}")

    if not wait_until_answering(address, limit_s, check, must_serve=True):
        raise SystemExit(f"the daemon at {address} does not serve after {limit_s:.0f} s")


def timed_start(asked: pb.StartGeneration, *flags: str) -> tuple[float, pb.GetStatusResponse]:
    """Seconds from the start of a runtime daemon's process to a client's first token, and its status then.

    Raises:
        SystemExit: the daemon ended; with its status.
    """
    address = free_address()
    command = [sys.executable, "-m", "runtime_service", "--listen", address, *flags]
    command += ["--metrics-listen", "", "--log-level", "warning"]
    began = time.perf_counter()
    with subprocess.Popen(command) as daemon:
        try:
            first_s = _first_token(daemon, address, asked) - began
            with grpc.insecure_channel(address) as channel:
                stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
                return first_s, stub.GetStatus(pb.GetStatusRequest())
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


def _first_token(
    daemon: "subprocess.Popen[bytes]", address: str, asked: pb.StartGeneration
) -> float:
    """When it came."""
    while True:
        if daemon.poll() is not None:
            raise SystemExit(f"the daemon ended with status {daemon.returncode}")
        try:
            with grpc.insecure_channel(address) as channel:
                stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
                for response in stub.GenerateStream(pb.GenerateStreamRequest(start=asked)):
                    if any(event.HasField("tokens") for event in response.events):
                        return time.perf_counter()
        except grpc.RpcError:
            time.sleep(_RETRY_S)  # it does not listen, or has no engine yet
