"""What a gateway costs: the same load at a runtime, straight and through a gateway, in turns.

    python -m bench.gateway_cost STORE [--model M] [--quant Q] [--streams 64] [--rounds 5]

STORE is a folder with the engine (bench/build_sample.py makes one). Straight and through take turns
on one runtime, so that what else the machine does touches both; prints the medians over rounds as one
JSON line. Latencies are a client's: to the first token, and between tokens.
"""

import argparse
import json
import statistics
from typing import Any

from millrace.cli.bench.command import Load, Where, measure

from bench.processes import cpu_s, wait_until_serving
from tests.integration.daemon_process import DaemonProcess


def main() -> None:
    """Measures both, `rounds` times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in", dest="input_tokens", type=int, default=16)
    parser.add_argument("--out", dest="output_tokens", type=int, default=64)
    arguments = parser.parse_args()
    with (
        DaemonProcess(
            "runtime_service", "--listen", "127.0.0.1:0", "--metrics-listen", "",
            "--store", arguments.store, "--model", arguments.model, "--quant", arguments.quant,
            "--max-sequences", str(arguments.streams), "--max-sequence-tokens", "512",
        ) as runtime,
        DaemonProcess(
            "runtime_service.gateway", "--listen", "127.0.0.1:0", "--metrics-listen", "",
            "--http-listen", "", "--runtimes", runtime.address,
        ) as gateway,
    ):  # fmt: skip
        for daemon in (runtime, gateway):
            wait_until_serving(daemon.address, daemon.process)
        before_s = cpu_s(gateway.process.pid)
        readings: dict[str, list[dict[str, Any]]] = {"straight": [], "through": []}
        for seed in range(arguments.rounds):
            load = Load(
                concurrency=arguments.streams,
                requests=arguments.streams,
                input_tokens=str(arguments.input_tokens),
                output_tokens=str(arguments.output_tokens),
                warm_up=arguments.streams,
                seed=seed,
            )
            turns = [("straight", runtime.address), ("through", gateway.address)]
            for name, address in turns if seed % 2 else turns[::-1]:
                readings[name].append(measure(Where(address, arguments.calls), load))
        spent_s = cpu_s(gateway.process.pid) - before_s
    # Every stream has a warm-up request before those that are measured.
    num_tokens = 2 * arguments.rounds * arguments.streams * arguments.output_tokens
    figures = {"gateway_cpu_us_per_token": round(spent_s / num_tokens * 1e6, 1)}
    engine = {"model": arguments.model, "quant": arguments.quant}
    print(json.dumps({**engine, **summary(readings), **figures}))


def summary(readings: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each, and the gateway's part; a round's pair is compared with itself."""

    def median(name: str, *keys: str) -> float:
        values = []
        for reading in readings[name]:
            value: Any = reading
            for key in keys:
                value = value[key]
            values.append(value)
        return round(statistics.median(values), 3)

    def paired(*keys: str) -> float:
        differences = []
        for straight, through in zip(readings["straight"], readings["through"], strict=True):
            for key in keys:
                straight, through = straight[key], through[key]
            differences.append(through - straight)
        return round(statistics.median(differences), 3)

    rates = [
        1 - through["output_tokens_per_s"] / straight["output_tokens_per_s"]
        for straight, through in zip(readings["straight"], readings["through"], strict=True)
    ]
    return {
        "streams": readings["straight"][0]["load"]["concurrency"],
        "rounds": len(rates),
        "tokens_per_s": [median(name, "output_tokens_per_s") for name in readings],
        "throughput_lost": round(statistics.median(rates), 4),
        "ttft_p50_ms": [median(name, "ttft_ms", "p50") for name in readings],
        "added_ttft_p50_ms": paired("ttft_ms", "p50"),
        "itl_p50_ms": [median(name, "itl_ms", "p50") for name in readings],
        "added_itl_p50_ms": paired("itl_ms", "p50"),
    }


if __name__ == "__main__":
    main()
