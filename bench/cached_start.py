"""From the start of a runtime process with a built engine to its first token, several times.

    python bench/cached_start.py STORE [QUANT [RUNS]]

STORE is a folder with the engine (bench/build_sample.py makes one). Prints one JSON line.
"""

import argparse
import json
import statistics
from pathlib import Path

from millrace.runtime.v1 import runtime_pb2 as pb

from bench.processes import timed_start

_ASKED = pb.StartGeneration(text="The sky is", stop=pb.StopConditions(max_new_tokens=4))


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("quant", nargs="?", default="int8")
    parser.add_argument("runs", nargs="?", type=int, default=5)
    options = parser.parse_args()
    flags = ("--store", str(options.store), "--model", "smollm2-135m", "--quant", options.quant)
    readings = [timed_start(_ASKED, *flags)[0] for _ in range(options.runs)]
    figures = {"quant": options.quant, "first_token_s": [round(r, 2) for r in readings]}
    print(json.dumps({**figures, "median_s": round(statistics.median(readings), 2)}))


if __name__ == "__main__":
    main()
