"""From the start of a runtime daemon's process to its first token over gRPC, the store's files in the page cache.

    python -m bench.gpu_kernels build/gpu --models llama-3.1-8b,llama-3.2-1b      (needs no GPU)
    python -m bench.gpu_start build/gpu FOLDER --model llama-3.1-8b --runs 3

FOLDER gets a store with an engine of random weights, as large as the model. One JSON line a start, with its phases as
the daemon's GetStatus tells them.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from millrace.runtime.v1 import runtime_pb2 as pb

from bench.gpu_served import write_engine
from bench.processes import timed_start

_ASKED = pb.StartGeneration(
    token_ids=pb.TokenIds(ids=range(1000, 1016)), stop=pb.StopConditions(max_new_tokens=2)
)


def start(folder: Path, model: str, quant: str) -> dict[str, Any]:
    """One start: seconds to the first token, and where they went."""
    flags = ("--store", str(folder), "--model", model, "--quant", quant)
    first_s, status = timed_start(_ASKED, *flags)
    phases = {p.name: round(p.duration.ToNanoseconds() / 1e9, 3) for p in status.startup}
    return {"first_token_s": round(first_s, 3), "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--keeps", action="store_true", help="leave the store, or use the one there"
    )
    options = parser.parse_args()
    common = {"model": options.model, "quant": options.quant}
    if not (options.keeps and options.folder.exists()):
        written = write_engine(options.folder, options.kernels, options.model, options.quant)
        print(json.dumps(common | {"case": "write"} | written), flush=True)
    try:
        for _ in range(options.runs):
            line = start(options.folder, options.model, options.quant)
            print(json.dumps(common | {"case": "start"} | line), flush=True)
    finally:
        if not options.keeps:
            shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
