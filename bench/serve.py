"""Latency and throughput of a running runtime over gRPC, as its clients feel them.

    python -m bench.serve [--runtime HOST:PORT] [--streams 1,4,16] [--calls 1] [--in 64] [--out 128]

Prints one JSON line a number of streams. `millrace bench serve` is the same measurement of one load;
bench/cpu_decode.py runs the same workloads without daemon and gRPC, which gives the path's cost.
"""

import argparse
import json

from millrace.cli.bench.command import Load, Where, measure


def main() -> None:
    """Measures each number of streams, each with requests enough to settle."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runtime", default="127.0.0.1:7602")
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream")
    parser.add_argument("--in", dest="input_tokens", type=int, default=64)
    parser.add_argument("--out", dest="output_tokens", type=int, default=128)
    arguments = parser.parse_args()
    for streams in map(int, arguments.streams.split(",")):
        load = Load(
            concurrency=streams,
            requests=streams * arguments.rounds,
            input_tokens=str(arguments.input_tokens),
            output_tokens=str(arguments.output_tokens),
            warm_up=streams,
        )
        where = Where(arguments.runtime, min(arguments.calls, streams))
        print(json.dumps(measure(where, load)), flush=True)


if __name__ == "__main__":
    main()
