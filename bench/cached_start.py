"""From the start of a runtime process with a built engine to its first token, several times.

python bench/cached_start.py STORE [QUANT [RUNS]]
"""

import json
import socket
import statistics
import subprocess
import sys
import time

import grpc
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc


def first_token_s(store: str, quant: str) -> float:
    """Seconds from the process's start to a client's first token, trying every 20 ms."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "runtime_service", "--listen", address, "--store", store]
    command += ["--model", "smollm2-135m", "--quant", quant, "--metrics-listen", ""]
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as daemon:
        try:
            while True:
                assert daemon.poll() is None, f"the daemon ended with status {daemon.returncode}"
                try:
                    return one_token(address) - start
                except grpc.RpcError:
                    time.sleep(0.02)  # not listening, or no engine yet
        finally:
            daemon.terminate()


def one_token(address: str) -> float:
    """When the first token came."""
    request = runtime_pb2.GenerateStreamRequest(
        start=runtime_pb2.StartGeneration(
            text="The sky is", stop=runtime_pb2.StopConditions(max_new_tokens=4)
        )
    )
    with grpc.insecure_channel(address) as channel:
        for response in runtime_pb2_grpc.RuntimeServiceStub(channel).GenerateStream(request):
            if any(event.HasField("tokens") for event in response.events):
                return time.perf_counter()
    raise AssertionError("the stream ended without a token")


def main(store: str, quant: str = "int8", runs: str = "5") -> None:
    """Prints one JSON line."""
    readings = [first_token_s(store, quant) for _ in range(int(runs))]
    figures = {"quant": quant, "first_token_s": [round(r, 2) for r in readings]}
    print(json.dumps({**figures, "median_s": round(statistics.median(readings), 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
